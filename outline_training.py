"""How the head that outlines defects learns: last of all, from what the finished model paints of good images with several drawn defects each.

A crop of a defect costs the head alone a fiftieth of what it costs in a step of the whole model, so it can see many more of them; and what is
painted of them no longer changes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from tqdm import tqdm

import engine
from config import TrainSettings
from data_loader import GoodImages
from vae_model import FEATURE_STRIDE, DetailVAE, Painting, crop_windows, cut, fold_layers

N_DEFECTS = 5
"""Defects drawn on an image at most, and crops taken of it."""
CROP_PX, BATCH_SIZE, STEPS_AN_IMAGE = 64, 32, 2
"""Side of a crop, crops in a step, and steps for each image that is painted."""
MOST_IMAGES = 500
"""Images where the settings name no number: an eighth of those shown in training, so many at most."""


def n_images(settings: TrainSettings, n_shown: int) -> int:
    """How many images are painted for the head, where the model was shown so many in training."""
    return settings.outline_images or max(1, min(MOST_IMAGES, n_shown // 8))


def train_head(model: DetailVAE, training: GoodImages, n: int, settings: TrainSettings, runtime: engine.Runtime) -> float:
    """Give the model a new head and train it on crops of n images; nothing else of the model changes. The mean cross-entropy of all steps, in nats a pixel.

    Raises:
        DivergedError: the loss or its gradient is not finite.
    """
    n_steps = n * STEPS_AN_IMAGE
    with torch.random.fork_rng(), tqdm(total=n + n_steps, unit="step", desc="outlines", leave=False) as bar:
        painter = fold_layers(copy.deepcopy(model))
        torch.manual_seed(settings.seed)
        crops = painted_crops(painter, training, n, runtime, bar)
        model.add_defect_head()
        head = runtime.put_model(model.defect_head)
        optimizer = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, engine.warmup_cosine(n_steps))

        def terms(batch: list[Tensor]) -> tuple[dict[str, Tensor], int]:
            bar.update()
            images, *painting, taps, mask = (runtime.put(each).float() for each in batch)
            return {"total": F.binary_cross_entropy_with_logits(head(images, Painting(*painting), taps), mask)}, len(images)

        loader = DataLoader(crops, BATCH_SIZE, sampler=RandomSampler(crops, replacement=True, num_samples=n_steps * BATCH_SIZE), pin_memory=runtime.pin_memory)
        return engine.train_epoch(head, loader, terms, optimizer, scheduler, runtime, settings.gradient_clip)["total"]


def painted_crops(painter: DetailVAE, training: GoodImages, n: int, runtime: engine.Runtime, bar: tqdm) -> TensorDataset:
    """Crops around defects drawn on n good images, of all that the head sees and of where they are: images, what the model paints of them
    (``Painting``), tap deviations, masks, on the CPU, in half the precision but for the deviations, which may be large. The model is in evaluation mode."""
    size = runtime.batch_size(0)

    def drawn() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, n, size):
            samples = [training.with_defects(number, N_DEFECTS) for number in range(start, min(start + size, n))]
            yield tuple(torch.stack(each) for each in zip(*samples, strict=True))

    def painted(batch: tuple[Tensor, Tensor]) -> tuple[list[Tensor], Tensor]:
        images, masks = batch
        with torch.no_grad(), runtime.autocast():
            on_device = runtime.put(images)
            painting, taps = painter.head_inputs(on_device, painter.describe(on_device, paint=False))
        return [images, *(each.float().cpu() for each in (*painting, taps))], masks

    found = []
    for (*maps, taps), masks in runtime.each(painted, drawn()):
        bar.update(len(masks))
        for _ in range(N_DEFECTS):
            windows = crop_windows(masks, CROP_PX, 1.0)
            found.append([*(cut(each, windows, FEATURE_STRIDE).half() for each in maps), cut(taps, windows, 1), cut(masks, windows, FEATURE_STRIDE).half()])
    return TensorDataset(*(torch.cat(each) for each in zip(*found, strict=True)))
