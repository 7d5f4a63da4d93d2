"""Train the VAE classifier on plots, keep the epoch with the best validation F1, calibrate it, and score the test set
once.
"""

from __future__ import annotations

import sys

import config
import scripts

if __name__ == "__main__":
    scripts.answer_early(config.TrainClassifierSettings, __doc__)

import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoints
import data_loader
import data_loader_supervised as plot_loader
import engine
import evaluation
import files
import plot_calibration
import plots
import vae_classifier
from classifier_data import MixedSampler, Plots, read_data, read_plots
from classifier_training import (
    FULL_PER_CLASS,
    Run,
    WeightAverage,
    batches,
    encode,
    keep_if_best,
    resume,
    save_best,
    save_last,
    validation_score,
    write_pictures,
)
from vae_classifier import BEST, LAST, ClassifierLoss, VAEClassifier

WRITTEN = {
    "results": re.compile(r"vae_classifier_(results\.json|(curves|confusion)\.png)"),
    "reconstructions": re.compile(r"vae_classifier_epoch_\d+\.png"),
}
"""Names, in each folder, of the reports and pictures that a run makes in its course; one from the start removes those
of an earlier run, but no model.
"""
MEASURES = ("accuracy", "macro_f1", "macro_precision", "macro_recall")


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def main(settings: config.TrainClassifierSettings) -> None:
    """Train, and leave checkpoints, results, pictures, curves and history in the output folder."""
    run = prepare(settings if settings.data_dir else use_demo(settings))
    started = time.perf_counter()
    with checkpoints.telling_what_is_kept(run, run.out / BEST):
        train(run)
    print(
        f"best epoch {run.best_epoch} of {run.settings.epochs} (validation macro F1 {run.best:.4f}, each plot seen "
        f"once), {(time.perf_counter() - started) / 60:.1f} minutes: {run.out / BEST}"
    )
    plots.save(plots.training_curves(run.history, run.best_epoch), run.out / "results" / "vae_classifier_curves.png")
    finish(run)


def use_demo(settings: config.TrainClassifierSettings) -> config.TrainClassifierSettings:
    """Settings for ``data/`` where it holds class folders, else for the built-in demo and its preset."""
    train_folder = Path("data") / "train"
    if train_folder.is_dir() and len(plot_loader.class_folders(train_folder)) > 1:
        return settings.replace(data_dir="data")
    root = Path(settings.output_dir) / "data" / "demo_series"
    say(f"No --data-dir given: using the built-in demo in {root} with configs/classifier_demo.yaml.")
    plot_loader.make_demo(root, plot_loader.progress_bar("demo series"))
    preset = config.read_yaml(str(Path(__file__).parent / "configs" / "classifier_demo.yaml"))
    return settings.with_preset(preset).replace(data_dir=str(root))


def make_runtime(settings: config.TrainClassifierSettings) -> engine.Runtime:
    full = settings.precision == "auto" and engine.resolve_device(settings.device).type == "cpu"
    return engine.make_runtime(settings.device, "float32" if full else settings.precision)


def prepare(settings: config.TrainClassifierSettings) -> Run:
    """Read and make the data, build the model."""
    runtime = make_runtime(settings)
    data = read_data(settings, plot_loader.progress_bar, say)
    settings = flipped_as_classes_allow(settings, data.folder.classes)
    n_validation = ", ".join(f"{len(group.labels)} {name}" for name, group in data.validation.items())
    say(
        f"{len(data.folder.classes)} classes: {data.n_real} training plots and "
        f"{len(data.training.labels) - data.n_real} generated ones; validation: {n_validation}."
    )
    engine.seed_everything(settings.seed)
    model, averaged = (runtime.put_model(VAEClassifier(settings, len(data.folder.classes))) for _ in range(2))
    model.run_settings = averaged.run_settings = config.as_dict(settings)
    rows = np.unique(np.linspace(0, data.n_real - 1, 256).astype(int))
    model.fit_reconstruction_scale(batches(data.training.images[rows], settings.batch_size, runtime))
    return Run(
        settings,
        runtime,
        data,
        model,
        WeightAverage(model, averaged.eval(), settings.ema_decay),
        ClassifierLoss(settings),
    )


def flipped_as_classes_allow(
    settings: config.TrainClassifierSettings, classes: Sequence[str]
) -> config.TrainClassifierSettings:
    """Settings without the flips that nobody asked for, where they may turn a plot into one of another class (a rising
    series into a falling one): they are known to keep betise's nine kinds alone. A run that goes on flips as it did.
    """
    unasked = [name for name in ("flip_time", "flip_value") if getattr(settings, name) and name not in settings.given]
    if settings.resume and (last := Path(settings.output_dir) / LAST).exists():
        with checkpoints.reading_contents(last):
            trained = checkpoints.load_training(last, vae_classifier.KIND, ("settings",))["settings"]
            return settings.replace(**{name: trained[name] for name in unasked})
    if set(classes) <= set(config.CLASSES) or not unasked:
        return settings
    say(
        "The classes are not betise's nine kinds: plots are not flipped, as that may change their class; where it does "
        "not, give --flip-time (backwards), --flip-value (upside down)."
    )
    return settings.replace(**dict.fromkeys(unasked, False))


def make_loader(run: Run) -> DataLoader:
    s, training, n_real = run.settings, run.data.training, run.data.n_real
    dataset = plot_loader.LabelledImages(training.images, training.labels, s, s.seed)
    sampler = MixedSampler(n_real, len(training.labels) - n_real, s.real_share, s.epoch_samples, s.seed)
    return data_loader.training_loader(
        dataset,
        sampler,
        s.batch_size,
        data_loader.resolve_num_workers(s.num_workers, run.runtime.device),
        run.runtime.pin_memory,
    )


def train(run: Run) -> list[dict]:
    """All epochs; returns the history, a dict of named numbers for each epoch."""
    s, runtime = run.settings, run.runtime
    loader = make_loader(run)
    optimizer, scheduler = make_optimizer(run, s.epochs * len(loader))
    if s.resume:
        resume(run, optimizer, scheduler)
    else:
        save_last(run, optimizer, scheduler)  # so that none goes on from an earlier run's with this one's model
        files.remove_written(run.out, WRITTEN)
    run.settings = s.replace(resume=False)  # what is kept asks for no checkpoint
    config.save(run.settings, run.out / "vae_models" / "config.yaml")
    with tqdm(
        total=s.epochs * len(loader), initial=len(run.history) * len(loader), unit="step", file=sys.stderr
    ) as progress:
        for epoch in range(len(run.history) + 1, s.epochs + 1):
            loader.sampler.set_epoch(epoch)
            seen = Seen(len(run.classes))
            trained = engine.train_epoch(
                run.model,
                stepping(loader, run, progress),
                training_terms(run, seen),
                optimizer,
                scheduler,
                runtime,
                s.gradient_clip,
            )
            row = {"epoch": epoch, **engine.prefixed("train", {**trained, **seen.measures()})}
            for name, group in run.data.validation.items():
                row |= engine.prefixed("val" if name == "real" else name, validate(run, group))
            run.history.append(row)
            is_best = keep_if_best(run, validation_score(row))
            if epoch % s.picture_every == 0 or epoch == s.epochs:
                write_pictures(run, epoch)
            # last of all, so that a resumed run makes what an interrupted one did not
            save_last(run, optimizer, scheduler)
            progress.write(epoch_block(row, s.epochs, is_best), file=sys.stderr)
    return run.history


def make_optimizer(run: Run, n_steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW on ``run.model`` and its learning rate over so many steps."""
    s = run.settings
    return engine.make_optimizer(parameter_groups(run.model, s.weight_decay), s, n_steps, s.warmup_frac)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weights decay, biases and the scales of normalisations do not."""
    decaying = [p for p in model.parameters() if p.dim() > 1]
    return [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]


def stepping(loader: DataLoader, run: Run, progress: tqdm) -> Iterator[plot_loader.LabelledSample]:
    for batch in loader:
        yield batch  # the optimizer step happens before the next batch is asked for
        run.average.update()
        progress.update()


class Seen:
    """Confusion of the plots seen so far."""

    def __init__(self, n_classes: int):
        self.confusion = np.zeros((n_classes, n_classes), np.int64)

    def add(self, labels: Tensor, scores: Tensor) -> None:
        self.confusion += evaluation.confusion_matrix(labels.tolist(), scores.argmax(1).tolist(), len(self.confusion))

    def measures(self) -> dict[str, float]:
        report = evaluation.classification_report_dict(self.confusion, n_resamples=0)
        return {name: report[name]["value"] for name in MEASURES}


def training_terms(run: Run, seen: Seen):
    """The loss of a training batch, as ``engine.train_epoch`` wants it."""

    def terms(batch: plot_loader.LabelledSample) -> tuple[dict[str, Tensor], int]:
        found, logits = run.loss.terms(run.model, run.runtime.put(batch.images), run.runtime.put(batch.labels))
        seen.add(batch.labels, logits)
        return found, len(batch.labels)

    return terms


def validate(run: Run, group: Plots) -> dict[str, float]:
    """Mean loss terms and measures on validation plots, seen once each: their flips would take a tenth of the
    training time.

    Raises:
        DivergedError: one of them is not finite.
    """
    seen, labels = Seen(len(run.classes)), torch.from_numpy(group.labels)
    pairs = zip(
        batches(group.images, run.settings.batch_size, run.runtime), labels.split(run.settings.batch_size), strict=True
    )

    def terms(batch: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], int]:
        images, truth = batch
        found, logits = run.loss.terms(run.judged, images, run.runtime.put(truth))
        seen.add(truth, logits)
        return found, len(truth)

    found = {**engine.evaluate(run.judged, pairs, terms, run.runtime), **seen.measures()}
    for name, value in found.items():
        if not math.isfinite(value):
            raise engine.DivergedError(
                f"The {name} of validation became {value}; training stops (try a lower --learning-rate)."
            )
    return found


def epoch_block(row: dict, epochs: int, is_best: bool) -> str:
    """The epoch as a small table for people."""
    lines = [f"epoch {row['epoch']}/{epochs}" + ("   NEW BEST" if is_best else "")]
    lines.append(" " * 12 + "    loss  reconstr.      kl   class   accuracy     F1  precision  recall")
    for key, title in (("train", "training"), ("val", "validation"), ("fresh", "fresh series")):
        if f"{key}/total" in row:
            loss = [row[f"{key}/{name}"] for name in ("total", "reconstruction", "kl", "classification", *MEASURES)]
            columns = zip(loss, (8, 11, 8, 8, 11, 7, 11, 8), strict=True)
            lines.append(f"{title:<12s}" + "".join(f"{value:{width}.4f}" for value, width in columns))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ in the end


def finish(run: Run) -> None:
    """Calibrate the best model on all training plots, score it once on the test set, write and print the results."""
    checkpoints.require_epoch(
        run.out / BEST, checkpoints.load_checkpoint(run.out / BEST, vae_classifier.KIND, ("epoch",)), run
    )
    model, _ = vae_classifier.load_vae_classifier(run.out / BEST, run.runtime.device, fuse=False)
    save_best(run, model, FULL_PER_CLASS, run.best_epoch)
    model, _ = vae_classifier.load_vae_classifier(run.out / BEST, run.runtime.device)
    results = {"best_epoch": run.best_epoch, "epochs": run.settings.epochs, "alpha": run.settings.target_false_alarms}
    groups = {
        ("validation" if name == "real" else "fresh_series"): group for name, group in run.data.validation.items()
    }
    test = (
        read_plots(run.data.folder.test, run.settings, run.data.cache, plot_loader.progress_bar("test plots"), say)
        if run.data.folder.test
        else None
    )
    scored = "test" if test is not None and len(test.labels) else "validation"
    if scored == "validation":
        say(
            f"{run.data.folder.root} has no readable test plots: the results are those of validation, on which the "
            "epoch was chosen."
        )
    reports = {name: report(run, model, group) for name, group in groups.items()}
    main_report = report(run, model, test) if scored == "test" else reports.pop("validation")
    files.write_json(
        run.out / "results" / "vae_classifier_results.json", {"scored_on": scored, **main_report, **results, **reports}
    )
    plots.save(
        plots.confusion_heatmap(np.array(main_report["confusion_matrix"]), run.classes),
        run.out / "results" / "vae_classifier_confusion.png",
    )
    print(table(scored, main_report, reports))
    if not model.calibration.promised:
        print(too_few(model.calibration))
    print(f"results: {run.out / 'results' / 'vae_classifier_results.json'}")


def report(run: Run, model: VAEClassifier, group: Plots) -> dict:
    """Measures with intervals, calibration, reconstruction and share of false alarms on labelled plots."""
    s, calibration = run.settings, model.calibration
    encoded = encode(run, model, group)
    probabilities = plot_calibration.calibrated_probabilities(encoded, calibration)
    confusion = evaluation.confusion_matrix(group.labels, probabilities.argmax(1), len(run.classes))
    before = plot_calibration.calibrated_probabilities(encoded, calibration, calibrated=False)
    quality: dict[str, list[float]] = {"mse": [], "psnr": [], "ssim": []}
    p_values = calibration.p_values(
        calibration.novelty(calibration.distances(encoded.errors, encoded.mu, encoded.pictures))
    )
    for images, mu in zip(
        batches(group.images, s.batch_size, run.runtime), encoded.mu.split(s.batch_size), strict=True
    ):
        with torch.inference_mode():
            drawn, target = model.reconstruct(images, run.runtime.put(mu)).float().cpu(), model.target(images).cpu()
        quality["mse"] += evaluation.mse(drawn, target).tolist()
        quality["psnr"] += evaluation.psnr(drawn, target, data_range=1.0).tolist()
        quality["ssim"] += evaluation.ssim(drawn, target, data_range=1.0).tolist()
    return {
        **evaluation.classification_report_dict(confusion, run.classes, s.bootstrap, s.seed),
        "expected_calibration_error": {
            "before": evaluation.expected_calibration_error(before, group.labels),
            "after": evaluation.expected_calibration_error(probabilities, group.labels),
            "temperature": calibration.temperature,
            "temperature_flips": calibration.temperature_flips,
        },
        "reconstruction": {name: evaluation.summarise(values, s.bootstrap, s.seed) for name, values in quality.items()},
        "none_of_these": evaluation.rate_figure(int((p_values <= calibration.alpha).sum()), len(group.labels)),
    }


def table(scored: str, main_report: dict, reports: dict[str, dict]) -> str:
    """The results as text for the terminal."""
    lines = [f"{'class':<24s}{'plots':>6s}{'F1':>8s}{'precision':>11s}{'recall':>8s}"]
    for name, row in main_report["per_class"].items():
        lines.append(
            f"{name:<24s}{row['n_images']:>6d}"
            + "".join(
                f"{row[key]['value']:>{width}.3f}" for key, width in (("f1", 8), ("precision", 11), ("recall", 8))
            )
        )
    for name, each in {scored: main_report, **reports}.items():
        shown = "  ".join(
            f"{key.replace('macro_', 'macro ')} {evaluation.figure_text(each[key])}" for key in ("accuracy", "macro_f1")
        )
        error = each["expected_calibration_error"]
        lines.append(f"{name.replace('_', ' ')}: {shown}")
        lines.append(
            f"    calibration error {error['before']:.3f} -> {error['after']:.3f}  SSIM "
            f"{each['reconstruction']['ssim']['value']:.3f}  called none of these {each['none_of_these']['value']:.1%}"
        )
    return "\n".join(lines)


def too_few(calibration: plot_calibration.ClassifierCalibration) -> str:
    """What follows from fewer validation plots than the rate asked for takes."""
    n, expected = min(map(len, calibration.scores.values())), math.ceil(1 / calibration.alpha) - 1
    return (
        f"{n} validation plots are too few to call a plot none of these at {calibration.alpha:.1%} false alarms, so "
        f"none will be called so; expected {expected} or more (--validation-frac, --target-false-alarms)."
    )


if __name__ == "__main__":
    sys.exit(scripts.run_script(config.TrainClassifierSettings, __doc__, main))
