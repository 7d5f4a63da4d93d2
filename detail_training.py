"""One training of DetailVAE: what its epochs share, how it is calibrated as it stands, and what is kept and pictured of
it.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import checkpoints
import config
import conformal
import data_loader
import defect_maps
import engine
import files
import image_folders
import plots
from layers import fold_layers
from vae_model import BEST, KIND, LAST, DetailLoss, DetailVAE, FeatureCache

N_PICTURED = 4
"""Images in one reconstruction picture."""
INTERIM_STEP = 4
"""While training goes on, one of so many of the reference's batches says how features deviate, for a quarter of the
time.
"""
N_DRAWN = 2
"""Times that a defect is drawn on each held-out image, for the pixel threshold."""


@dataclass
class Run:
    """What the epochs share."""

    settings: config.TrainSettings
    runtime: engine.Runtime
    folder: image_folders.MVTecFolder
    left_out: list[str]  # training images that take no part, as places below the data folder
    training: data_loader.GoodImages
    held_paths: list[Path]
    # those good images, or their tiles (B, 3, S, S) and their features (B, C, S/8, S/8)
    held_out: list[tuple[Tensor, Tensor | None]]
    held_windows: list[tuple[slice, slice]] | None  # what of each of them is picture and no grey bar; None where all is
    reference: list[Tensor]  # float16 features (B, C, S/8, S/8) of training images as they are, on the CPU
    model: DetailVAE
    loss: DetailLoss
    features: FeatureCache
    epochs: int
    history: list[dict] = field(default_factory=list)
    best: float = float("inf")
    best_epoch: int = 0
    calibrated: tuple[int, defect_maps.Detector] | None = None  # and the epoch after which it was calibrated
    finished: bool = False  # whether the training on crops is done

    @property
    def out(self) -> Path:
        return Path(self.settings.output_dir)

    @cached_property
    def sources(self) -> dict:
        return checkpoints.describe_files(self.folder.root, self.folder.train_good + self.folder.validation_good)


# ------------------------------------------------------------------------------------ as it stands


def calibrated_detector(run: Run) -> defect_maps.Detector:
    """The model as it stands, folded as ``load_detector`` does, and calibrated on the held-out good images; once an
    epoch.
    """
    epoch = len(run.history)
    if run.calibrated is None or run.calibrated[0] != epoch:
        some = run.reference if run.finished else run.reference[::INTERIM_STEP]
        run.model.fit_deviations((run.runtime.put(features).float() for features in some), sum(map(len, some)))
        perceptual = defect_maps.load_map_perceptual(run.settings, run.runtime.device)
        model = fold_layers(copy.deepcopy(run.model))
        detector = defect_maps.Detector(model, run.settings, None, perceptual, run.runtime)
        detector.calibration = defect_maps.calibrate(
            detector, whole_held_out(run), run.held_windows, drawn_held_out(run, detector) if run.finished else ()
        )
        run.calibrated = epoch, detector
    return run.calibrated[1]


def whole_held_out(run: Run) -> Iterator[Tensor]:
    """The held-out good images, in batches as they are in memory; where those are tiles, read anew, one whole at a
    time.
    """
    if not run.settings.tile:
        return (images for images, _ in run.held_out)
    batches = data_loader.iter_image_batches(run.held_paths, run.settings.image_size, run.settings.fitting)
    return (run.runtime.put(batch.images) for batch in batches if len(batch.images))


def drawn_held_out(run: Run, detector: defect_maps.Detector) -> Iterator[tuple[Tensor, np.ndarray]]:
    """The same images, N_DRAWN times over, each time with another defect drawn on each, and where those are, bool (B,
    H, W); nothing where training draws none.
    """
    rng = np.random.default_rng(run.settings.seed)
    for _ in range(N_DRAWN if run.settings.drawn_defects else 0):
        windows = iter(run.held_windows or itertools.repeat((slice(None), slice(None))))
        for images in whole_held_out(run):
            drawn, masks = data_loader.draw_on(
                images, itertools.islice(windows, len(images)), detector.tile_share(*images.shape[2:]), rng
            )
            yield run.runtime.put(drawn), masks


# ------------------------------------------------------------------------------- what is kept of it


def save_model(run: Run, name: str, epoch: int) -> None:
    """A checkpoint with all that inference needs, of the model after that epoch."""
    checkpoints.save_checkpoint(
        run.out / "models" / name, KIND, model_contents(run, calibrated_detector(run).calibration, epoch)
    )


def model_contents(run: Run, calibration: defect_maps.Calibration, epoch: int) -> dict:
    return {
        "settings": {**config.as_dict(run.settings), "segmentation": run.model.defect_head is not None},
        "sources": run.sources,
        "left_out": run.left_out,
        "value_range": [0.0, 1.0],
        "image_size": run.settings.image_size,
        "class_names": ["good", "defective"],
        "epoch": epoch,
        "finished": run.finished,
        "calibration": calibration.as_dict(),
        "model": run.model.state_dict(),
    }


def selection_loss(run: Run, validated: dict[str, float]) -> float:
    """What an epoch is judged by: the validation loss without the pixel branch's terms, where that goes on learning
    after the last epoch.
    """
    return run.loss.of_latents(validated) if run.model.n_features and run.settings.drawn_defects else validated["total"]


def keep_if_best(run: Run, epoch: int, loss: float) -> bool:
    """Write models/best_model.pth when this loss is the lowest so far."""
    if not loss < run.best:  # also where it is not a number
        return False
    save_model(run, BEST.name, epoch)
    run.best, run.best_epoch = loss, epoch  # only of what is saved is it said that it is kept
    return True


def save_last(run: Run, optimizer: torch.optim.Optimizer, scheduler) -> None:
    """models/last.pth, from which --resume goes on, and the history so far."""
    history = run.out / "metrics" / "training_history.json"
    checkpoints.save_training(run, optimizer, scheduler, run.out / LAST, KIND, history, {"left_out": run.left_out})


# ------------------------------------------------------------------------------ what is shown of it


def write_pictures(run: Run, epoch: int) -> None:
    """Grids of training images (with the defects drawn on them) and of each category in test/."""
    detector = calibrated_detector(run)
    n = min(N_PICTURED, len(run.training))
    samples = [run.training[index] for index in range(n)]
    draw_grid(
        run,
        detector,
        [each.corrupted for each in samples],
        [f"train {i}{', a defect drawn' if sample.defect_mask.any() else ''}" for i, sample in enumerate(samples)],
        f"train/epoch_{epoch}.png",
    )
    for category in run.folder.categories:
        paths = [item.path for item in run.folder.test if item.category == category][:N_PICTURED]
        loaded = [
            batch
            for batch in data_loader.iter_image_batches(paths, run.settings.image_size, run.settings.fitting, 1)
            if len(batch.images)
        ]
        if loaded:
            draw_grid(
                run,
                detector,
                [batch.images[0] for batch in loaded],
                [f"{category}/{batch.paths[0].stem}" for batch in loaded],
                f"validation/{files.short_stem(category)}_epoch_{epoch}.png",
            )


def draw_grid(run: Run, detector: defect_maps.Detector, images: list[Tensor], titles: list[str], name: str) -> None:
    found = [detector.detect(run.runtime.put(image[None]))[0] for image in images]
    figure = plots.reconstruction_grid(
        [image.numpy() for image in images],
        [each.reconstruction for each in found],
        [each.defect_map for each in found],
        titles,
        3 * detector.calibration.pixel_threshold,
    )
    plots.save(figure, run.out / "reconstructions" / name)


def odd_images(run: Run, detector: defect_maps.Detector) -> list[str]:
    """A sentence on each held-out good image whose score lies far above those of the others: it may not be good, and
    may set the threshold.
    """
    calibration = detector.calibration
    fence = conformal.outer_fence(calibration.good_scores)
    n, n_odd = len(calibration.good_scores), sum(score > fence for score in calibration.good_scores)
    if not n_odd:
        return []
    advice, sentences = "it does not set the threshold.", []
    if calibration.threshold > fence:
        without = min(0.5, math.ceil(100 * (n_odd + 1) / (n + 1)) / 100)
        advice = (
            f"such images set the threshold of {calibration.threshold:.2f}. Unless they are good ones, take them out "
            f"of the training images and train again; --target-false-alarms {without:.2g}, also of classify_images.py, "
            "sets it without them."
        )
    for batch in data_loader.iter_image_batches(run.held_paths, run.settings.image_size, run.settings.fitting, 1):
        found = detector.detect(run.runtime.put(batch.images), thorough=False) if batch.paths else []
        for path, each in zip(batch.paths, found, strict=True):
            if each.score > fence:
                sentences.append(
                    f"{path} scores {each.score:.2f}, far above the other held-out good images (half of them score "
                    f"below {statistics.median(calibration.good_scores):.2f}); {advice}"
                )
    return sentences
