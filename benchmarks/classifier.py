"""The VAE classifier beside a plain ResNet and a frozen VAE with a head: same plots, epochs and cores; a table and a
JSON file.

All take the weights of the last epoch, averaged over steps; the test set is scored once for each, nothing is chosen by
it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config
import scripts

if __name__ == "__main__":
    scripts.answer_early(config.ClassifierBenchmarkSettings, __doc__)

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from tqdm import tqdm

import data_loader
import data_loader_supervised as plot_loader
import engine
import evaluation
import files
import train_vae_classifier as stage
from classifier_data import read_plots
from classifier_training import Run, WeightAverage, batches
from vae_classifier import smoothed_targets, view_log_probabilities

HEAD_WIDTH = 256
COLUMNS = (
    ("test accuracy", "test", "accuracy"),
    ("test macro F1", "test", "macro_f1"),
    ("validation accuracy", "real", "accuracy"),
    ("fresh accuracy", "fresh", "accuracy"),
)


class PlainResNet(nn.Module):
    """A ResNet of one basic block a stage (He et al. 2016,
    4.9 M parameters) behind the interface of ``VAEClassifier``."""

    def __init__(self, n_classes: int):
        super().__init__()
        self.trunk = ResNet(BasicBlock, [1, 1, 1, 1])
        n_features = self.trunk.fc.in_features
        self.trunk.fc = nn.Identity()
        self.head = nn.Linear(n_features, n_classes)

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        """Pooled features (B, 512) of images (B, 3, S, S) in [0, 1]."""
        return self.trunk(1 - images), None


class CrossEntropy:
    """The classification term alone; with ``frozen`` the encoder neither learns nor updates its statistics."""

    def __init__(self, label_smoothing: float, frozen: bool = False):
        self.label_smoothing, self.frozen = label_smoothing, frozen

    def terms(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """As ``ClassifierLoss.terms``, in training."""
        if self.frozen:
            model.eval()
            model.head.train()
        with torch.set_grad_enabled(not self.frozen):
            features, _ = model.encode(images)
        logits = model.head(features).float()
        return {
            "total": F.cross_entropy(logits, smoothed_targets(labels, logits.shape[1], self.label_smoothing))
        }, logits


def fit(run: Run, epochs: int, title: str) -> None:
    """Train ``run.model`` on ``run.loss`` for so many epochs; the average of its weights follows in ``run.judged``."""
    loader = stage.make_loader(run)
    optimizer, scheduler = stage.make_optimizer(run, epochs * len(loader))
    with tqdm(total=epochs * len(loader), unit="step", desc=title, file=sys.stderr) as progress:
        for epoch in range(1, epochs + 1):
            loader.sampler.set_epoch(epoch)
            seen = stage.Seen(len(run.classes))
            engine.train_epoch(
                run.model,
                stage.stepping(loader, run, progress),
                stage.training_terms(run, seen),
                optimizer,
                scheduler,
                run.runtime,
                run.settings.gradient_clip,
            )


def with_average(run: Run, model: nn.Module, averaged: nn.Module) -> None:
    run.model = model
    run.average = WeightAverage(model, averaged.eval(), run.settings.ema_decay)


def train_joint(run: Run) -> None:
    fit(run, run.settings.epochs, "joint")


def train_resnet(run: Run) -> None:
    with_average(run, *(run.runtime.put_model(PlainResNet(len(run.classes))) for _ in range(2)))
    run.loss = CrossEntropy(run.settings.label_smoothing)
    fit(run, run.settings.epochs, "resnet")


def train_frozen(run: Run) -> None:
    """A VAE that sees no label, then a head of two layers on its frozen means."""
    n_head = max(1, round(run.settings.head_share * run.settings.epochs))
    run.loss.settings = run.settings.replace(class_weight=0.0)
    fit(run, max(1, run.settings.epochs - n_head), "VAE")
    model = run.judged
    for each in (model, run.model):
        each.head = nn.Sequential(
            nn.Linear(run.settings.latent_dim, HEAD_WIDTH), nn.SiLU(), nn.Linear(HEAD_WIDTH, len(run.classes))
        ).to(run.runtime.device)
    with_average(run, model.requires_grad_(False), run.model)
    model.head.requires_grad_(True)
    run.loss = CrossEntropy(run.settings.label_smoothing, frozen=True)
    fit(run, n_head, "head")


METHODS = {"joint": train_joint, "resnet": train_resnet, "frozen": train_frozen}


@torch.inference_mode()
def predicted(run: Run, images: np.ndarray) -> np.ndarray:
    """Classes (n,) of plots, all named from their flips, too."""
    model, found = run.judged.eval(), []
    flips = data_loader.flip_axes(run.settings.flip_time, run.settings.flip_value)
    for batch in batches(images, run.settings.batch_size, run.runtime):
        views = view_log_probabilities(model, batch, model.head(model.encode(batch)[0]), flips)
        found.append(views.mean(0).argmax(1).cpu().numpy())
    return np.concatenate(found)


def measure(name: str, settings: config.ClassifierBenchmarkSettings) -> dict:
    """Train one method and score it; figures with intervals, seconds, plots/s from memory, parameters."""
    run = stage.prepare(settings)
    test = (
        read_plots(run.data.folder.test, settings, run.data.cache, plot_loader.progress_bar("test plots"), stage.say)
        if run.data.folder.test
        else None
    )
    groups = {**({"test": test} if test is not None and len(test.labels) else {}), **run.data.validation}
    started = time.perf_counter()
    METHODS[name](run)
    trained = time.perf_counter()
    found = {group: predicted(run, labelled.images) for group, labelled in groups.items()}
    rate = sum(map(len, found.values())) / (time.perf_counter() - trained)
    row = {
        "method": name,
        "seed": settings.seed,
        "training_s": trained - started,
        "plots_per_s": rate,
        "parameters": sum(p.numel() for p in run.judged.parameters()),
    }
    for group, classes in found.items():
        confusion = evaluation.confusion_matrix(groups[group].labels, classes, len(run.classes))
        report = evaluation.classification_report_dict(confusion, run.classes, settings.bootstrap, settings.seed)
        row[group] = {measure: report[measure] for measure in ("accuracy", "macro_f1")}
    return row


def main(settings: config.ClassifierBenchmarkSettings) -> None:
    """Every method once, a row printed as soon as it is known."""
    if not settings.methods:
        raise config.UsageError("--methods names none; expected some of joint, resnet, frozen.")
    if not settings.data_dir:
        settings = stage.use_demo(settings)
    out, rows = Path(settings.output_dir) / "benchmark_results" / "classifier.json", []
    print(
        f"{'method':<8s}"
        + "".join(f"{title:>24s}" for title, _, _ in COLUMNS)
        + f"{'training':>10s}{'plots/s':>9s}{'parameters':>12s}"
    )
    for name in settings.methods:
        rows.append(measure(name, settings.replace(resume=False)))
        print(line(rows[-1]), flush=True)
        files.write_json(out, {"settings": config.as_dict(settings), "rows": rows})
    print(f"figures: {out}")


def line(row: dict) -> str:
    """A row of the table."""
    figures = [row.get(group, {}).get(measure) for _, group, measure in COLUMNS]
    shown = [evaluation.figure_text(figure, "") for figure in figures]
    return (
        f"{row['method']:<8s}"
        + "".join(f"{each:>24s}" for each in shown)
        + f"{row['training_s']:>8.0f} s{row['plots_per_s']:>9.0f}{row['parameters']:>12,d}"
    )


if __name__ == "__main__":
    sys.exit(scripts.run_script(config.ClassifierBenchmarkSettings, __doc__, main))
