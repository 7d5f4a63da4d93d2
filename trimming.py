"""Which of the good images may be defective, where nobody has looked: those with places that deviate from their
prediction as no place of the others does.

Features alone do not tell: on many a part, edges and reflections lie as far from those of the other images as a small
defect does. How far the features of a place lie from what is predicted for it, in units of the predicted deviation,
does. So a small model learns the features of all images, defective ones among them, for a few minutes; like the
refinement of Yoon et al. 2022 ("Self-supervise, Refine, Repeat"), but with one model, and each image held against the
others alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import data_loader
import engine
from config import TrainSettings, UsageError
from coresets import rows_of, some_rows
from defect_maps import decorrelated
from vae_model import DetailLoss, DetailVAE

SIDE_PX = 384
"""Largest side at which images are compared."""
BASE_CHANNELS = 8
"""Width of the model that learns their features."""
N_SHOWN = 1600
"""Images that it is shown, with repeats."""
N_SAMPLED = 10240
"""Places of all images that those of each are compared with."""
STRANGEST_FRAC = 0.05
"""Share of the places of an image, its most unusual ones, that make its outlier score."""
N_COMPARISONS = 2
"""Rounds: against all images, then only against those not flagged."""


def suspects(paths: list[Path], settings: TrainSettings, runtime: engine.Runtime) -> list[Path]:
    """Of the images that can be read, the share ``trim_frac`` that is the least like the others.

    Raises:
        UsageError: the settings have no backbone, so that there are no features.
    """
    side = min(SIDE_PX, settings.image_size)
    small = settings.replace(image_size=side, base_channels=BASE_CHANNELS, segmentation=False)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = runtime.put_model(DetailVAE(small, settings.vgg16_weights))
        if not model.n_features:
            raise UsageError(
                "Images can only be trimmed by their features; expected no --backbone none with --trim-frac."
            )

        def batches(size: int) -> Iterator[data_loader.ImageBatch]:
            return data_loader.iter_image_batches(paths, side, settings.resize, size)

        if len(next(batches(2)).paths) < 2:
            return []  # GoodImages says that too few can be read
        model.fit_feature_scale(runtime.put(batch.images) for batch in batches(settings.batch_size))
        read, features = zip(
            *(
                (batch.paths, model.grid_features(runtime.put(batch.images)).half().cpu())
                for batch in batches(settings.batch_size)
            ),
            strict=True,
        )
        deviations = learned_deviations(model, torch.cat(features), small, runtime)
    read = list(itertools.chain.from_iterable(read))
    unlike: list[int] = []
    for _ in range(N_COMPARISONS):
        usual = [index for index in range(len(read)) if index not in unlike]
        if len(usual) < 2:
            break
        unlike = unlikeness(deviations, usual).topk(round(settings.trim_frac * len(read))).indices.tolist()
    return sorted(read[index] for index in unlike)


def learned_deviations(model: DetailVAE, features: Tensor, settings: TrainSettings, runtime: engine.Runtime) -> Tensor:
    """Let the model learn standardised features (N, C, h, w) and return how they then deviate from its prediction, over
    the predicted deviation and without correlation, (N, C, h, w) in half the precision.
    """
    loss = DetailLoss(settings, None)
    engine.train_steps(
        model,
        TensorDataset(features),
        settings.batch_size,
        math.ceil(N_SHOWN / settings.batch_size),
        lambda batch: loss.of_features(model, batch),
        "comparing images",
        settings,
        runtime,
    )
    batches = features.split(settings.batch_size)
    model.fit_whitening(
        (runtime.put(batch).float() for batch in batches), len(features), torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        told = (model.describe(None, runtime.put(batch).float(), paint=False) for batch in batches)
        return torch.cat([decorrelated(output.deviation, model).half().cpu() for output in told])


@torch.no_grad()
def unlikeness(maps: Tensor, among: Sequence[int]) -> Tensor:
    """Outlier score of each map (N, C, h, w), (N,): mean distance of its most unusual 5 % of places to places sampled
    from the second-nearest other map; second, because a defect may occur twice.

    Args:
        among: indices of the maps that all are compared with, two or more.
    """
    generator = torch.Generator().manual_seed(0)
    n_each = math.ceil(N_SAMPLED / len(among))
    samples = torch.cat([some_rows(maps[index][None].float(), n_each, generator) for index in among])
    found = []
    for index, each in enumerate(maps):
        distances = torch.cdist(rows_of(each[None].float())[0], samples).unflatten(1, (len(among), -1)).amin(2)
        others = [column for column, number in enumerate(among) if number != index]
        second = distances[:, others].kthvalue(min(2, len(others)), 1).values
        found.append(second.topk(math.ceil(STRANGEST_FRAC * len(second))).values.mean())
    return torch.stack(found)
