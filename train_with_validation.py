"""Train DetailVAE on good images, validate on held-out good ones, calibrate it, and keep the best."""

from __future__ import annotations

import sys

import config
import scripts

if __name__ == "__main__":
    scripts.answer_early(config.TrainSettings, __doc__)

import contextlib
import dataclasses
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoints
import crop_training
import data_loader
import defect_maps
import demo_textures
import engine
import files
import image_folders
import plots
from detail_data import fitted_as_on_disk, read_data
from detail_training import (
    Run,
    keep_if_best,
    odd_images,
    save_last,
    save_model,
    selection_loss,
    write_pictures,
)
from perceptual_loss import PerceptualLoss, weights_here
from vae_model import BEST, KIND, LAST, DetailLoss, DetailVAE, FeatureCache

WRITTEN = {
    "metrics": re.compile(r"training_curves\.png|calibration\.json"),
    "reconstructions/train": re.compile(r"epoch_\d+\.png"),
    "reconstructions/validation": re.compile(r".+_epoch_\d+\.png", re.DOTALL),
}
"""Names, in each folder, of what a run writes in its course, or at its end; one from the start removes those of an
earlier run, but no model.
"""
PLACES = {"data_dir", "vgg16_weights"}
"""Where files lie. May change between runs: fingerprints of the files check that the data are the same."""
MAY_DIFFER = checkpoints.MAY_DIFFER | PLACES | {"checkpoint_every", "patience"}
MAP_FIELDS = {each.name for each in dataclasses.fields(config.MapSettings)}
HERE_FIELDS = {"weights", "output_dir", "device", "precision", "num_workers"}
"""With --weights, taken from this run, as the settings of maps are; all others come from the checkpoint."""
MOST_EPOCHS = 150
"""Passes over the training images, at most, where their number is not set: from 27 images on ``train_samples`` decide,
fewer would be learned by heart.
"""
VALIDATED_AFTER, PICTURED_AFTER = 500, 1800
"""Training images, about, that lie between two validations, and between two rounds of pictures, where validate_every
and picture_every are 0.
"""
MADE_ANEW = {"bank", "whitening", "prototypes"}
"""Of a model, what a calibration makes anew; all else is trained."""
N_STATISTICS = 2048
"""Training images (or tiles), at most, from which the statistics and the bank of features come."""
N_REFERENCE = 256
"""Training images (or tiles), at most, from which is learned how features deviate from their prediction."""


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def main(settings: config.TrainSettings) -> None:
    """Train, and leave checkpoints, pictures, curves and history in the output folder."""
    if settings.weights:
        run = recalibrate(settings)
        print(f"weights of {settings.weights}, calibrated anew: {run.out / BEST}")
    else:
        run = prepare(fitted_as_on_disk(settings if settings.data_dir else use_demo(settings), say))
        started = time.perf_counter()
        with checkpoints.telling_what_is_kept(run, run.out / BEST):
            train(run)
        minutes = (time.perf_counter() - started) / 60
        plots.save(plots.training_curves(run.history, run.best_epoch), run.out / "metrics" / "training_curves.png")
        print(
            f"best epoch {run.best_epoch} of {run.epochs} (validation loss "
            f"{run.history[run.best_epoch - 1]['val/total']:.4f}), {minutes:.1f} minutes: {run.out / BEST}"
        )
    detector = defect_maps.load_detector(run.out / BEST, run.runtime.device, run.settings.precision)
    files.write_json(run.out / "metrics" / "calibration.json", detector.calibration.as_dict())
    print(detector.calibration.describe())
    for sentence in odd_images(run, detector):
        say(f"warning: {sentence}")


def use_demo(settings: config.TrainSettings) -> config.TrainSettings:
    """Settings for ``data/`` where it holds train/good or is one folder of good images, else for the built-in demo
    and its preset.
    """
    data = Path("data")
    if (data / "train" / "good").is_dir() or image_folders.is_flat(data):
        return settings.replace(data_dir=str(data))
    root = demo_textures.make_demo(Path(settings.output_dir) / "data" / "demo_textures")
    say(f"No --data-dir given: using the built-in demo in {root} with configs/demo.yaml.")
    preset = config.read_yaml(Path(__file__).parent / "configs" / "demo.yaml")
    return settings.with_preset(preset).replace(data_dir=str(root))


def prepare(settings: config.TrainSettings, weights: dict | None = None) -> Run:
    """Read the data, build the model; with ``weights``, not to be trained but calibrated.

    Raises:
        InputError: the data cannot be used, or there is no file of VGG16's weights where one is named.
        UsageError: no map has a weight above 0.
    """
    defect_maps.map_shares(settings, settings.backbone != "none")
    settings = settings.replace(segmentation=settings.segmentation and settings.drawn_defects > 0)
    asked = settings.vgg16_weights if weights is None and settings.map_perceptual else ""
    if asked and not weights_here(config.as_dict(settings)):
        raise config.InputError(f"There is no file {asked}; expected VGG16's weights.")
    runtime = engine.make_runtime(settings.device, settings.precision)
    engine.seed_everything(settings.seed)
    data = read_data(settings, runtime, say)
    perceptual = None
    if settings.perceptual_weight > 0 and weights is None:
        perceptual = PerceptualLoss(settings.vgg16_weights, crop_px=settings.perceptual_crop_px).to(runtime.device)
    model = build_model(settings, runtime, data.training, weights)
    held_out = [
        (batch, model.grid_features(batch)) for batch in map(runtime.put, data.held.images.split(settings.batch_size))
    ]
    some = data.training.plain_batches(settings.batch_size, N_REFERENCE) if model.n_features else []
    reference = [model.grid_features(runtime.put(batch)).half().cpu() for batch in some]
    return Run(
        settings=settings,
        runtime=runtime,
        folder=data.folder,
        left_out=data.left_out,
        training=data.training,
        held_paths=data.held_paths,
        held_out=held_out,
        held_windows=data.held_windows,
        reference=reference,
        model=model,
        loss=DetailLoss(settings, perceptual),
        features=FeatureCache(model) if settings.variants else FeatureCache(model, capacity_bytes=0),
        epochs=settings.epochs or min(MOST_EPOCHS, max(1, round(settings.train_samples / len(data.training)))),
    )


def build_model(
    settings: config.TrainSettings, runtime: engine.Runtime, training: data_loader.GoodImages, weights: dict | None
) -> DetailVAE:
    """The model with the scale and the bank of the training images' features: new and still without the head that
    outlines defects, or with these weights.
    """
    new = weights is None
    model = runtime.put_model(
        DetailVAE(settings.replace(segmentation=False) if new else settings, settings.vgg16_weights)
    )
    if new:
        plain = training.plain_batches(settings.batch_size, N_STATISTICS)
        model.fit_feature_scale(runtime.put(batch) for batch in plain)
    else:
        checkpoints.load_weights(model, weights, settings.weights)
    if model.n_features and (settings.map_bank or settings.score_bank):
        plain = training.plain_batches(settings.batch_size, N_STATISTICS)
        model.fit_bank((model.grid_features(runtime.put(batch)) for batch in plain), min(N_STATISTICS, len(training)))
    return model


def recalibrate(settings: config.TrainSettings) -> Run:
    """Keep the weights of a checkpoint and make its banks, maps and thresholds anew, from the images it was trained and
    calibrated on.

    Of the settings of maps, and of the places of files, those change that a flag or the file gave; all others stay as
    they were.

    Raises:
        InputError: the checkpoint cannot be used, its data are not those of then, what is no matter of maps was given
            and is otherwise there, or the output folder holds another model.
    """
    contents = checkpoints.load_checkpoint(settings.weights, KIND, ("settings", "model", "epoch", "finished"))
    with checkpoints.reading_contents(settings.weights):
        trained = config.from_dict(config.TrainSettings, contents["settings"])
    fixed = {key: getattr(settings, key) for key in sorted(settings.given - MAP_FIELDS - HERE_FIELDS - PLACES)}
    if not contents["finished"]:  # the head that outlines defects learns last of all
        fixed.pop("segmentation", None)
    checkpoints.require_same(
        settings.weights, fixed, vars(trained), "expected settings of maps and thresholds alone with --weights."
    )
    ours = HERE_FIELDS | (MAP_FIELDS & settings.given) | {key for key in PLACES if getattr(settings, key)}
    spare_another_model(Path(settings.output_dir) / BEST, settings.weights, contents["model"])
    run = prepare(trained.replace(**{key: getattr(settings, key) for key in ours}), contents["model"])
    with checkpoints.reading_contents(settings.weights):
        checkpoints.require_same_files(settings.weights, run, contents, "with --weights")
    run.finished = contents["finished"]
    config.save(run.settings, run.out / "models" / "config.yaml")
    save_model(run, BEST.name, contents["epoch"])
    return run


def spare_another_model(path: Path, weights: str, model: dict) -> None:
    """Raise InputError where what was trained of a checkpoint that is about to be written over is not this model."""
    if not path.exists() or path.samefile(weights):
        return
    # one that cannot be read is another, too: of an earlier version, perhaps
    with contextlib.suppress(config.InputError), checkpoints.reading_contents(path):
        there = checkpoints.load_checkpoint(path, KIND, ("model",))["model"]
        trained = model.keys() - MADE_ANEW
        if there.keys() - MADE_ANEW == trained and all(torch.equal(there[name], model[name]) for name in trained):
            return
    raise config.InputError(f"{path} holds another model than {weights}; expected another --output-dir.")


def train(run: Run) -> list[dict]:
    """All epochs; returns the history, a dict of named terms for each epoch.

    Raises:
        DivergedError: a loss or its gradient is not finite, or no validation loss was.
    """
    s, runtime = run.settings, run.runtime
    loader = data_loader.training_loader(
        run.training,
        data_loader.EpochSampler(len(run.training), s.seed),
        s.batch_size,
        data_loader.resolve_num_workers(s.num_workers, runtime.device),
        runtime.pin_memory,
    )
    optimizer, scheduler = engine.make_optimizer(run.model.parameters(), s, run.epochs * len(loader))
    if s.resume:
        checkpoints.resume_training(run, optimizer, scheduler, run.out / LAST, KIND, MAY_DIFFER)
        if not has_ended(run):
            keep_finished(run)
    else:
        save_last(run, optimizer, scheduler)
        files.remove_written(run.out, WRITTEN)
    run.settings = s.replace(resume=False)  # what is kept asks for no checkpoint
    config.save(run.settings, run.out / "models" / "config.yaml")
    with tqdm(
        total=run.epochs * len(loader), initial=len(run.history) * len(loader), unit="step", file=sys.stderr
    ) as bar:
        while not has_ended(run):
            epoch = len(run.history) + 1
            loader.sampler.set_epoch(epoch)
            kl_scale = min(1.0, epoch / s.kl_warmup_epochs) if s.kl_warmup_epochs else 1.0
            trained = engine.train_epoch(
                run.model,
                ticking(loader, bar),
                training_terms(run, kl_scale),
                optimizer,
                scheduler,
                runtime,
                s.gradient_clip,
            )
            run.history.append({"epoch": epoch, **engine.prefixed("train", trained)})
            line = f"epoch {epoch}/{run.epochs}  train {trained['total']:.4f}"
            is_validated = is_due(run, epoch, s.validate_every, VALIDATED_AFTER) or epoch == run.epochs
            if is_validated:
                line += check_in(run, epoch)
            if epoch % s.checkpoint_every == 0:
                save_model(run, f"epoch_{epoch:04d}.pth", epoch)
            if is_due(run, epoch, s.picture_every, PICTURED_AFTER) and not has_ended(run):
                write_pictures(run, epoch)
            if is_validated:  # last of all, so that a resumed run makes what an interrupted one did not
                save_last(run, optimizer, scheduler)
            bar.write(line, file=sys.stderr)
    if not run.best_epoch:
        raise engine.DivergedError(
            "No validation loss was a finite number, so no model is written (try a lower --learning-rate)."
        )
    finish(run)
    return run.history


def keep_finished(run: Run) -> None:
    """Keep a copy of a finished model where a run goes on that may replace it by a better one, not finished yet."""
    best = run.out / BEST
    if not best.exists():
        return
    finished = 0
    # one that cannot be read, of an earlier version perhaps, is none of this run's
    with contextlib.suppress(config.InputError), checkpoints.reading_contents(best):
        contents = checkpoints.load_checkpoint(best, KIND, ("epoch", "finished"))
        finished = int(contents["epoch"]) if contents["finished"] else 0
    if finished:
        kept = best.with_name(f"finished_epoch_{finished:04d}.pth")
        with files.whole_file(kept, sync=True) as copy, best.open("rb") as there:
            shutil.copyfileobj(there, copy)
        say(f"The finished model of epoch {finished} is kept as {kept}.")


def finish(run: Run) -> None:
    """Let the best model learn from crops what it learns last, where it has not yet, and picture it.

    Raises:
        InputError: the best model's file cannot be used, or holds that of an earlier epoch.
    """
    contents = checkpoints.load_checkpoint(run.out / BEST, KIND, ("model", "epoch", "finished"))
    checkpoints.require_epoch(run.out / BEST, contents, run)
    if contents["finished"]:
        return
    checkpoints.load_weights(run.model, contents["model"], run.out / BEST)
    run.calibrated = None
    if run.settings.drawn_defects:
        n_shown = len(run.history) * len(run.training) if run.settings.epochs else run.settings.train_samples
        n = crop_training.n_images(run.settings, n_shown)
        losses = crop_training.learn_last(run.model, run.training, n, run.loss, run.settings, run.runtime)
        told = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        say(f"crops of {n} images with drawn defects, mean loss: {told}")
    run.finished = True
    save_model(run, BEST.name, run.best_epoch)
    write_pictures(run, len(run.history))


def is_due(run: Run, epoch: int, every: int, n_images: int) -> bool:
    """Whether after this epoch comes what is due every so many epochs, or, where that is 0, after about every
    ``n_images`` training images.
    """
    return epoch % (every or max(1, round(n_images / len(run.training)))) == 0


def has_ended(run: Run) -> bool:
    """Whether all epochs are done, or there were so many validations since the best one that patience is at an end."""
    in_vain = sum("val/total" in row for row in run.history[run.best_epoch :])
    return len(run.history) == run.epochs or 0 < run.settings.patience <= in_vain


def check_in(run: Run, epoch: int) -> str:
    """Validate and keep the model if it is the best so far; returns the rest of the epoch's line."""
    validated = validate(run)
    run.history[-1].update(engine.prefixed("val", validated))
    is_best = keep_if_best(run, epoch, selection_loss(run, validated))
    shown = "  ".join(
        f"{name} {validated[name]:.4f}" for name in ("l1", "perceptual", "feature", "kl_detail") if name in validated
    )
    return f"  validation {validated['total']:.4f}  ({shown}){'  best' if is_best else ''}"


def ticking(loader, bar: tqdm) -> Iterator[data_loader.TrainSample]:
    for batch in loader:
        yield batch
        bar.update()


def training_terms(run: Run, kl_scale: float):
    """The loss of a training batch, as ``engine.train_epoch`` wants it; features come from the cache."""

    def terms(batch: data_loader.TrainSample) -> tuple[dict[str, Tensor], int]:
        images, corrupted = run.runtime.put(batch.images), run.runtime.put(batch.corrupted)
        keys = batch.key.tolist()
        clean = run.features(keys, images)
        # a sample without a drawn defect is its own clean image
        actual = run.features(
            [~key if mask.any() else key for key, mask in zip(keys, batch.defect_mask, strict=True)], corrupted
        )
        return run.loss(run.model, images, corrupted, kl_scale, batch.defect_mask, clean, actual), len(images)

    return terms


def validate(run: Run) -> dict[str, float]:
    """Mean loss terms on the held-out good images, with the same random crops at every epoch."""

    def terms(batch: tuple[Tensor, Tensor | None]) -> tuple[dict[str, Tensor], int]:
        images, features = batch
        return run.loss(run.model, images, images, 1.0, clean=features), len(images)

    with torch.random.fork_rng():
        torch.manual_seed(run.settings.seed)
        return engine.evaluate(run.model, run.held_out, terms, run.runtime)


if __name__ == "__main__":
    sys.exit(scripts.run_script(config.TrainSettings, __doc__, main))
