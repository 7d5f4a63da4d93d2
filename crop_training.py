"""What learns last of all, from crops of good images with several drawn defects each: the pixel branch goes on, then
the head that outlines defects learns.

The latents and what they predict of features stay as they are, and with them all that the image score comes from. A
crop costs the one a fifth, the other a thirtieth of what an image costs in a step of the whole model, so both see many
more drawn defects here; and what the head sees painted no longer changes. Crops around defects are full of them, images
are not: a head that learned from those alone takes many a good place for one. So it is asked what it is wrong about on
further images, and goes on with crops of that beside the others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset
from tqdm import tqdm

import engine
from config import TrainSettings
from data_loader import GoodImages
from layers import fold_layers
from vae_model import (
    FEATURE_STRIDE,
    DetailLoss,
    DetailVAE,
    Painting,
    crop_windows,
    cut,
    feature_surprise,
    sound_places,
)

N_DEFECTS = 5
"""Defects drawn on an image, at most, and crops taken of it."""
N_STRANGE = 1
"""Of these crops, so many lie where the image deviates most although nothing is drawn (see ``strange_places``)."""
STRANGE_FRAC = 0.01
"""Share of the places of an image that are called strange."""
CROP_PX = 64
"""Side of a crop."""
MOST_IMAGES = 800
"""Images where the settings name no number: a quarter of those training was to show, so many at most."""
PIXEL_BATCH = 16
"""Crops in a step of the pixel branch."""
PIXEL_STEPS_AN_IMAGE = 0.6
"""Steps of the pixel branch for each image."""
N_PERCEPTUAL = 4
"""Crops of such a step that the perceptual loss is taken of: VGG16 costs three times what painting does."""
HEAD_BATCH = 32
"""Crops in a step of the head."""
HEAD_STEPS_AN_IMAGE = 1.0
"""Steps of the head for each image."""
MISTAKEN_IMAGES = 0.4
"""Second round, on crops that the head is wrong about, half of each batch: its images as a share of the first round's.
"""
MISTAKEN_STEPS = 0.6
"""Steps of the second round as a share of the first's."""
MISTAKEN_LEARNING_RATE = 0.3
"""Learning rate of the second round as a share of the first's."""


class Crops(NamedTuple):
    """N crops of S x S pixels, s = S / 8, on the CPU; in half the precision but for the taps, which may be large."""

    clean: Tensor  # (N, 3, S, S) in [0, 1] good images
    images: Tensor  # (N, 3, S, S) the same with defects
    mask: Tensor  # (N, 1, S, S) where those are, 0 or 1
    trunk: Tensor  # (N, 8 * base_channels, s, s) what the model decodes of the images
    taps: Tensor  # (N, n_taps, s, s) ``tap_deviations``, from there too
    features: Tensor  # (N, 2 * C, s, s) features and their deviations, as ``DetailVAE.seen`` returns them


def n_images(settings: TrainSettings, n_shown: int) -> int:
    """How many images are drawn on, where training was to show the model so many."""
    return settings.crop_images or max(1, min(MOST_IMAGES, n_shown // 4))


def learn_last(
    model: DetailVAE, training: GoodImages, n: int, loss: DetailLoss, settings: TrainSettings, runtime: engine.Runtime
) -> dict[str, float]:
    """Let the pixel branch of a trained model go on learning from crops of n images, and give it a head that outlines
    defects, where it is to have one.

    Nothing else of the model changes, nor does the state of the random numbers. Returns the mean loss of all steps of
    each.

    Raises:
        DivergedError: a loss or its gradient is not finite.
    """
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        crops = drawn_crops(fold_layers(copy.deepcopy(model)), training, range(n), N_STRANGE, runtime)
        losses = {"pixels": train_pixels(model, crops, n, loss, settings, runtime)}
        if settings.segmentation:
            losses |= train_head(model, training, crops, n, settings, runtime)
        return losses


def drawn_crops(
    model: DetailVAE, training: GoodImages, numbers: range, n_strange: int, runtime: engine.Runtime
) -> Crops:
    """N_DEFECTS crops of each image of those numbers, with defects drawn on it, and what the model, in evaluation mode,
    says there.

    ``n_strange`` of them lie where it takes a good part for something else: where the head sees defects, or features
    deviate without one; the others around drawn defects.
    """
    size = runtime.batch_size(0)

    def drawn() -> Iterator[tuple[Tensor, ...]]:
        for start in range(0, len(numbers), size):
            samples = [training.with_defects(number, N_DEFECTS) for number in numbers[start : start + size]]
            yield tuple(torch.stack(each) for each in zip(*samples, strict=True))

    def described(batch: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        with torch.no_grad(), runtime.autocast():
            output = model.describe(runtime.put(batch[1]), paint=model.defect_head is not None)
            taps, features = model.seen(output)
            suspicion = taps if output.defect_logits is None else F.max_pool2d(output.defect_logits, FEATURE_STRIDE)
            return batch, tuple(each.float().cpu() for each in (output.trunk, taps, features)), suspicion.float().cpu()

    found = []
    with tqdm(total=len(numbers), unit="image", desc="drawing defects", leave=False) as bar:
        for drawn_on, told, suspicion in runtime.each(described, drawn()):
            bar.update(len(drawn_on[0]))
            strange = strange_places(drawn_on[2], suspicion)
            for number in range(N_DEFECTS):
                windows = crop_windows(strange if number < n_strange else drawn_on[2], CROP_PX, 1.0)
                clean, images, mask = (cut(each, windows, FEATURE_STRIDE).half() for each in drawn_on)
                trunk, taps, features = (cut(each, windows, 1) for each in told)
                found.append((clean, images, mask, trunk.half(), taps, features.half()))
    return Crops(*(torch.cat(each) for each in zip(*found, strict=True)))


def strange_places(defect_mask: Tensor, suspicion: Tensor) -> Tensor:
    """Where a good part looks least like one: 1 at the 1 % of places that are suspected most, but for what is drawn and
    near it, else 0; the mask (B, 1, H, W), without suspicions.

    Hard negatives (Felzenszwalb et al. 2010, section 4.4): a glint or an edge that has moved is rare, so that crops
    around defects hardly show any.

    Args:
        defect_mask: (B, 1, H, W), above 0 on drawn defects.
        suspicion: (B, C, H/8, W/8), the mean over channels counts: ``DetailVAE.seen``'s taps, or the head's log-odds.
    """
    if not suspicion.shape[1]:
        return defect_mask
    mean = suspicion.mean(1, keepdim=True)
    mean = mean.masked_fill(sound_places(defect_mask, torch.zeros_like(mean)) == 0, mean.min().item())
    most = mean.flatten(1).quantile(1 - STRANGE_FRAC, dim=1)[:, None, None, None]
    return F.interpolate((mean >= most).float(), scale_factor=FEATURE_STRIDE)


def train_pixels(
    model: DetailVAE, crops: Crops, n: int, loss: DetailLoss, settings: TrainSettings, runtime: engine.Runtime
) -> float:
    """Let the pixel branch paint the crops as if there were no defect on them; the mean of its loss."""
    model.eval()

    def terms(clean: Tensor, images: Tensor, mask: Tensor, trunk: Tensor, taps: Tensor) -> dict[str, Tensor]:
        return loss.of_pixels(model, clean, images, mask, trunk, taps, N_PERCEPTUAL)

    data = TensorDataset(*crops[:5])
    return engine.train_steps(
        model.pixel_branch,
        data,
        PIXEL_BATCH,
        max(1, round(PIXEL_STEPS_AN_IMAGE * n)),
        terms,
        "painting",
        settings,
        runtime,
    )


def train_head(
    model: DetailVAE, training: GoodImages, crops: Crops, n: int, settings: TrainSettings, runtime: engine.Runtime
) -> dict[str, float]:
    """Give the model a new head and train it on the crops of n images, then on those and as many of what it is wrong
    about on further ones; the mean cross-entropies in nats a pixel.
    """
    seen = seen_by_head(model, crops, runtime)
    model.add_defect_head()
    head = runtime.put_model(model.defect_head)

    def terms(images: Tensor, mask: Tensor, taps: Tensor, features: Tensor, *painting: Tensor) -> dict[str, Tensor]:
        return {"total": F.binary_cross_entropy_with_logits(head(images, Painting(*painting), taps, features), mask)}

    n_steps = max(1, round(HEAD_STEPS_AN_IMAGE * n))
    losses = {"outlines": engine.train_steps(head, seen, HEAD_BATCH, n_steps, terms, "outlines", settings, runtime)}
    further = range(n, n + max(1, round(MISTAKEN_IMAGES * n)))
    mistaken = seen_by_head(
        model, drawn_crops(fold_layers(copy.deepcopy(model)), training, further, N_DEFECTS, runtime), runtime
    )
    both = TensorDataset(*(torch.cat(pair) for pair in zip(seen.tensors, mistaken.tensors, strict=True)))
    weights = torch.cat([torch.full((len(each),), 1 / len(each)) for each in (seen, mistaken)])
    slower = settings.replace(learning_rate=MISTAKEN_LEARNING_RATE * settings.learning_rate)
    losses["mistakes"] = engine.train_steps(
        head, both, HEAD_BATCH, max(1, round(MISTAKEN_STEPS * n_steps)), terms, "mistakes", slower, runtime, weights
    )
    return losses


def seen_by_head(model: DetailVAE, crops: Crops, runtime: engine.Runtime) -> TensorDataset:
    """Images, masks, taps, features and painting of crops: what the head learns from."""
    painting = painted(fold_layers(copy.deepcopy(model)), crops, runtime)
    return TensorDataset(crops.images, crops.mask, crops.taps, crops.features, *painting)


def painted(model: DetailVAE, crops: Crops, runtime: engine.Runtime) -> Painting:
    """What the model, in evaluation mode, paints of the crops, on the CPU, in half the precision."""

    def paint(rows: Tensor) -> list[Tensor]:
        images, trunk, taps = (runtime.put(each[rows]).float() for each in (crops.images, crops.trunk, crops.taps))
        with torch.no_grad(), runtime.autocast():
            painting = model.decode_pixels(trunk, images, feature_surprise(taps, model.tap_channels))
        return [each.half().cpu() for each in painting]

    batches = torch.arange(len(crops.mask)).split(HEAD_BATCH)
    return Painting(*(torch.cat(each) for each in zip(*runtime.each(paint, batches), strict=True)))
