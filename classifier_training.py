"""One training of the VAE with a classifier: what its epochs share, how it is calibrated as it stands, and what is kept
and pictured of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import checkpoints
import config
import data_loader
import engine
import image_files
import plot_calibration
import plots
import vae_classifier
from classifier_data import Data, Plots
from vae_classifier import BEST, KIND, LAST, ClassifierLoss, VAEClassifier

N_PICTURED = 8
"""Validation plots in one picture."""
QUICK_PER_CLASS, FULL_PER_CLASS = 40, 400
"""Training plots of each class behind the calibration of a best epoch, and behind the one that is kept in the end."""
MAY_DIFFER = checkpoints.MAY_DIFFER | {"bootstrap", "data_dir"}


class WeightAverage:
    """A running average of a model's weights and statistics (Polyak & Juditsky 1992), in a model of its own."""

    def __init__(self, model: nn.Module, averaged: nn.Module, decay: float):
        self.model, self.averaged, self.decay, self.n_steps = model, averaged, decay, 0
        averaged.load_state_dict(model.state_dict())

    @torch.no_grad()
    def update(self) -> None:
        self.n_steps += 1
        decay = min(self.decay, (1 + self.n_steps) / (10 + self.n_steps))  # the first steps are soon forgotten
        for kept, new in zip(self.averaged.state_dict().values(), self.model.state_dict().values(), strict=True):
            if kept.is_floating_point():
                kept.lerp_(new, 1 - decay)
            else:
                kept.copy_(new)


@dataclass
class Run:
    """What the epochs share."""

    settings: config.TrainClassifierSettings
    runtime: engine.Runtime
    data: Data
    model: VAEClassifier
    average: WeightAverage
    loss: ClassifierLoss
    history: list[dict] = field(default_factory=list)
    best: float = -1.0
    best_epoch: int = 0

    @property
    def out(self) -> Path:
        return Path(self.settings.output_dir)

    @property
    def epochs(self) -> int:
        return self.settings.epochs

    @property
    def classes(self) -> list[str]:
        return self.data.folder.classes

    @cached_property
    def sources(self) -> dict:
        folder = self.data.folder
        return {
            "class_names": folder.classes,
            **checkpoints.describe_files(folder.root, [path for path, _ in folder.train]),
        }

    @property
    def judged(self) -> VAEClassifier:
        """The model that is validated and kept."""
        return self.average.averaged


def batches(images: np.ndarray, batch_size: int, runtime: engine.Runtime) -> Iterator[Tensor]:
    for start in range(0, len(images), batch_size):
        yield runtime.put(data_loader.to_tensor(images[start : start + batch_size]))


# ------------------------------------------------------------------------------------ as it stands


def calibrate(run: Run, model: VAEClassifier, per_class: int) -> plot_calibration.ClassifierCalibration:
    """Class Gaussians from at most so many training plots of a class, the rest from validation plots."""
    images, labels = run.data.training
    rng = np.random.default_rng(run.settings.seed)
    rows = np.sort(
        np.concatenate([rng.permutation(np.flatnonzero(labels == k))[:per_class] for k in range(len(run.classes))])
    )
    training = encode(run, model, Plots(images[rows], labels[rows]), flips=False)
    validation = {name: encode(run, model, group) for name, group in run.data.validation.items()}
    return plot_calibration.fit_calibration(
        training, validation, len(run.classes), run.settings.target_false_alarms, run.settings.flips_below
    )


def encode(run: Run, model: VAEClassifier, group: Plots, flips: bool = True) -> plot_calibration.Encoded:
    """Encoded plots in full precision, as inference sees them."""
    return vae_classifier.encode_plots(
        model, batches(group.images, run.settings.batch_size, run.runtime), group.labels, flips
    )


# ------------------------------------------------------------------- what is kept and shown of it


def save_best(run: Run, model: VAEClassifier, per_class: int, epoch: int) -> None:
    """A checkpoint with all that inference needs, of the model after that epoch."""
    contents = vae_classifier.checkpoint_contents(
        model, calibrate(run, model, per_class), config.as_dict(run.settings), run.classes, epoch
    )
    checkpoints.save_checkpoint(run.out / BEST, KIND, contents)


def validation_score(row: dict) -> float:
    """Macro F1 of validation, the mean over its groups: plots of the data set and, where there are any,
    fresh series."""
    return float(np.mean([row[key] for key in ("val/macro_f1", "fresh/macro_f1") if key in row]))


def keep_if_best(run: Run, macro_f1: float) -> bool:
    """Write the best checkpoint when validation macro F1 is the highest so far, or equals it at a lower loss."""
    losses = [row["val/total"] for row in run.history]
    if run.best_epoch and (macro_f1, -losses[-1]) <= (run.best, -losses[run.best_epoch - 1]):
        return False
    save_best(run, run.judged, QUICK_PER_CLASS, len(run.history))
    run.best, run.best_epoch = macro_f1, len(run.history)  # only of what is saved is it said that it is kept
    return True


def save_last(run: Run, optimizer: torch.optim.Optimizer, scheduler) -> None:
    """The state from which --resume goes on, and the history so far."""
    averaged = {"averaged": run.average.averaged.state_dict(), "n_steps": run.average.n_steps}
    checkpoints.save_training(
        run, optimizer, scheduler, run.out / LAST, KIND, run.out / "results" / "vae_classifier_history.json", averaged
    )


def resume(run: Run, optimizer: torch.optim.Optimizer, scheduler) -> None:
    """Continue from the last checkpoint, with the running average of weights."""
    state = checkpoints.resume_training(
        run, optimizer, scheduler, run.out / LAST, KIND, MAY_DIFFER, ("averaged", "n_steps")
    )
    checkpoints.load_weights(run.average.averaged, state["averaged"], run.out / LAST)
    run.average.n_steps = state["n_steps"]


@torch.inference_mode()
def write_pictures(run: Run, epoch: int) -> None:
    """Validation plots, evenly over the classes, above their reconstructions and what the latent vector alone draws."""
    group = run.data.validation["real"]
    rows = np.linspace(0, len(group.labels) - 1, min(N_PICTURED, len(group.labels))).astype(int)
    images = run.runtime.put(data_loader.to_tensor(group.images[rows]))
    said = run.judged.eval()(images)
    shown = (run.judged.target(images), said.reconstruction, run.judged.decode(said.mu))
    sheet = plots.picture_sheet([pictures.float().cpu().numpy() for pictures in shown])
    image_files.write_png(run.out / "reconstructions" / f"vae_classifier_epoch_{epoch}.png", sheet)
