"""Which images DetailVAE learns from and which good ones are held out, and how they are made to fit the network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import checkpoints
import config
import data_loader
import engine
import image_folders
import trimming
from vae_model import KIND, LAST

N_HELD_TILES = 256
"""Held-out tiles, at most, in the validation loss."""
Say = Callable[[str], None]
"""Told of what looks wrong, in whole sentences."""


@dataclass
class Data:
    """What training may see; of the test set only the folder is known."""

    folder: image_folders.MVTecFolder
    left_out: list[str]  # training images that take no part, as places below the data folder
    training: data_loader.GoodImages
    held_paths: list[Path]
    held: data_loader.ImageBatch  # good images, or their tiles
    held_windows: list[tuple[slice, slice]] | None  # what of each of them is picture and no grey bar; None where all is


def read_data(settings: config.TrainSettings, runtime: engine.Runtime, say: Say) -> Data:
    """The good images of the data set, those to learn from and those held out.

    Raises:
        InputError: the folders are not as they should be, or too few images can be read.
    """
    folder = image_folders.MVTecFolder(settings.data_dir)
    if folder.validation_good and settings.holdout_frac != config.TrainSettings.holdout_frac:
        say(f"warning: {settings.data_dir} has a folder validation/good, which is held out; --holdout-frac has no say.")
    train_paths, held_paths, trimmed = split_good(settings, folder, runtime, say)
    training = data_loader.GoodImages(
        train_paths,
        settings.image_size,
        settings.fitting,
        augment=settings,
        defect_share=settings.drawn_defects,
        seed=settings.seed,
        n_variants=settings.variants,
        letterboxed=folder.letterboxed,
    )
    held = data_loader.load_batch(
        held_paths, settings.image_size, settings.fitting, math.ceil(N_HELD_TILES / len(held_paths))
    )
    for sentence in [*folder.warnings, *(f"{path} is skipped: {why}" for path, why in training.skipped + held.errors)]:
        say(f"warning: {sentence}")
    if not len(held.images):
        raise config.InputError(
            f"None of the {len(held_paths)} held-out good images of {settings.data_dir} can be read."
        )
    windows = held.windows(settings.fitting, folder.letterboxed) if settings.fitting == "letterbox" else None
    return Data(folder, trimmed, training, held_paths, held, windows)


def fitted_as_on_disk(settings: config.TrainSettings, say: Say) -> config.TrainSettings:
    """Settings that fit images as preprocessing fitted those of the data set, so that raw ones are judged as these were
    seen; a ``resize`` that was given stays.

    Where the images were made smaller than they are wanted, ``say`` is told.
    """
    done, side = image_folders.preprocessed_by(settings.data_dir)
    if done and (settings.tile or settings.image_size > side):
        asked = "tile" if settings.tile else f"image_size {settings.image_size}"
        expected = (
            "the raw images" if settings.tile else f"images preprocessed at {settings.image_size} px, or the raw ones"
        )
        say(
            f"warning: the images in {settings.data_dir} were made {side} px square, and {asked} is asked for: raw "
            f"images to be judged will be sharper; expected {expected}."
        )
    if settings.tile or done in ("", settings.resize):
        return settings
    if "resize" in settings.given:
        say(
            f"warning: the images in {settings.data_dir} were made square by {done}, and {settings.resize} is given: "
            "raw images to be judged will look unlike them."
        )
        return settings
    say(f"The images in {settings.data_dir} were made square by {done}: so will be those to be judged.")
    return settings.replace(resize=done)


def split_good(
    settings: config.TrainSettings, folder: image_folders.MVTecFolder, runtime: engine.Runtime, say: Say
) -> tuple[list[Path], list[Path], list[str]]:
    """Images to train on and images held out, and the places below the data folder of those left out of both."""
    trimmed = left_out(settings, folder, runtime, say)
    good = [path for path in folder.train_good if folder.relative(path) not in trimmed]
    return *folder.split(good, settings.holdout_frac, settings.seed), trimmed


def left_out(
    settings: config.TrainSettings, folder: image_folders.MVTecFolder, runtime: engine.Runtime, say: Say
) -> list[str]:
    """Places below the data folder of training images that may be defective: those that ``trimming.suspects`` finds, or
    found for the checkpoint that a run goes on from; of each ``say`` is told.
    """
    if not settings.trim_frac:
        return []
    if settings.weights:
        found = left_out_before(settings.weights, checkpoints.load_checkpoint)
    elif settings.resume:
        found = left_out_before(Path(settings.output_dir) / LAST, checkpoints.load_training)
    else:
        if settings.tile:
            say(
                "warning: --trim-frac compares whole photographs, made small: what only shows in tiles leaves none of "
                "them out."
            )
        found = list(map(folder.relative, trimming.suspects(folder.train_good, settings, runtime)))
    why = f"is left out: it is among the {settings.trim_frac:.0%} least like the others"
    for name in found:
        say(f"warning: {folder.root / name} {why}.")
    return found


def left_out_before(path: Path | str, load: Callable[..., dict]) -> list[str]:
    """What the run that wrote a file of training left out."""
    contents = load(path, KIND, ("left_out",))
    with checkpoints.reading_contents(path):
        return list(map(str, contents["left_out"]))
