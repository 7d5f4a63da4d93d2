"""Which plots the classifier learns from, is validated and tested on: real ones, generated ones, and how both are
mixed.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import config
import data_loader_supervised as plot_loader
import series_generator
import series_plots
import streams

TRAIN_TAG, FRESH_TAG = 1, 2
Bar = Callable[[str], plot_loader.Progress]
"""Makes, for a title, what shows how far a long step is."""


class Plots(NamedTuple):
    images: np.ndarray  # uint8 (N, S, S, 3)
    labels: np.ndarray  # int64 (N,)


@dataclass
class Data:
    """What training may see; the test set is only read in the end."""

    folder: plot_loader.ClassFolder
    training: Plots  # those of the data set first, then the generated ones
    n_real: int
    # "real": held out of the training plots; "fresh": present-style series, where there are any
    validation: dict[str, Plots]
    cache: Path


def read_plots(
    items: Sequence[tuple[Path, int]],
    settings: config.TrainClassifierSettings,
    cache: Path,
    progress: plot_loader.Progress,
    say: Callable[[str], None],
) -> Plots:
    """Plots of the readable ones among (path, label) items; of each unreadable one ``say`` is told."""
    loaded = plot_loader.load_plots(
        [path for path, _ in items], settings.image_size, settings.crop_axes, cache, progress
    )
    for path, reason in loaded.errors:
        say(f"warning: {path} is skipped: {reason}")
    return Plots(loaded.images, np.array([items[i][1] for i in loaded.kept], dtype=np.int64))


def read_data(settings: config.TrainClassifierSettings, bar: Bar, say: Callable[[str], None]) -> Data:
    """Training and validation plots of the data set, and the generated ones that are mixed in; what looks wrong,
    ``say`` is told in whole sentences.

    Raises:
        InputError: the folders are not as they should be, or a class has no two readable plots.
    """
    folder = plot_loader.ClassFolder(settings.data_dir)
    cache = Path(settings.output_dir) / "data" / "cache"
    if n_shared := folder.n_shared():
        say(
            f"warning: {n_shared} of {len(folder.test)} test plots also lie in the training set, with the same "
            "content: figures on them say too much."
        )
    everything = read_plots(folder.train, settings, cache, bar("training plots"), say)
    for k, name in enumerate(folder.classes):
        n = int((everything.labels == k).sum())
        if n < 2:
            raise config.InputError(
                f"{folder.root / 'train' / name} holds {n} readable plot(s); expected at least two, one of them for "
                "validation."
            )
    training, held = plot_loader.stratified_split(everything.labels, settings.validation_frac, settings.seed)
    real, validation = (Plots(everything.images[rows], everything.labels[rows]) for rows in (training, held))
    generated, fresh = make_generated(settings, folder.classes, cache, bar, say)
    groups = {"real": validation, **({"fresh": fresh} if len(fresh.labels) else {})}
    return Data(folder, joined([real, *generated]), len(real.labels), groups, cache)


def joined(parts: Sequence[Plots]) -> Plots:
    return parts[0] if len(parts) == 1 else Plots(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def make_generated(
    settings: config.TrainClassifierSettings, classes: list[str], cache: Path, bar: Bar, say: Callable[[str], None]
) -> tuple[list[Plots], Plots]:
    """(plots to mix into training, fresh plots for validation); both empty where the classes are not betise's nine
    kinds.
    """
    side = settings.image_size
    none = Plots(np.zeros((0, side, side, 3), np.uint8), np.zeros(0, np.int64))
    wanted = settings.generated_home + settings.generated_present + settings.fresh_per_class
    if tuple(classes) != series_generator.KINDS:
        if wanted:
            say(
                f"The {len(classes)} classes of {settings.data_dir} are not the nine kinds that betise makes: no "
                "generated plots are mixed in."
            )
        return [], none
    shares = (("home", settings.generated_home), ("present", settings.generated_present))
    mixed_in = [
        generated_plots(settings, style, per_class, TRAIN_TAG, cache, bar(f"{style} series"))
        for style, per_class in shares
        if per_class
    ]
    fresh = (
        generated_plots(settings, "present", settings.fresh_per_class, FRESH_TAG, cache, bar("present series"))
        if settings.fresh_per_class
        else none
    )
    return mixed_in, fresh


def generated_plots(
    settings: config.TrainClassifierSettings,
    style: str,
    per_class: int,
    tag: int,
    cache: Path,
    progress: plot_loader.Progress,
) -> Plots:
    """``per_class`` generated series of each kind as plots, made once for these settings and then read from the cache,
    unless the first plots of the kinds look otherwise today, for the code or a library that draws has changed then.
    """
    side = settings.image_size
    jobs = [
        (kind, style, (settings.seed, tag, k, i), side, settings.crop_axes)
        for k, kind in enumerate(series_generator.KINDS)
        for i in range(per_class)
    ]
    code = inspect.getsource(series_generator)  # be it a comment that changes: surer than a number kept by hand
    key = json.dumps(
        [series_generator.require_betise(), style, per_class, tag, settings.seed, side, settings.crop_axes, code]
    )
    file = cache / f"generated_{style}_{side}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    images = read_array(file)
    if images is None or not _as_drawn_now(images, jobs, per_class):
        images = np.empty((len(jobs), side, side, 3), np.uint8)
        made = streams.in_processes(draw_generated, jobs, -1)
        for i, image in enumerate(progress(made, len(jobs))):
            images[i] = image
        plot_loader.write_arrays(file, {"images": images})
    return Plots(images, np.repeat(np.arange(len(series_generator.KINDS)), per_class))


def _as_drawn_now(images: np.ndarray, jobs: list[tuple], per_class: int) -> bool:
    """Whether there is an image for every job, and the first of each kind looks as it would be drawn today."""
    drawn = [draw_generated(job) for job in jobs[::per_class]]
    return images.shape == (len(jobs), *drawn[0].shape) and np.array_equal(images[::per_class], drawn)


def draw_generated(job: tuple[str, str, tuple[int, ...], int, bool]) -> np.ndarray:
    kind, style, seed, image_size, crop_axes = job
    series = series_generator.generate_series(kind, style, seed)
    return plot_loader.prepare_image(series_plots.render_series(series.values), image_size, crop_axes)


def read_array(file: Path) -> np.ndarray | None:
    """The array of a cache file; None where there is none or it is damaged."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            return stored["images"]
    except plot_loader.DAMAGED_CACHE:
        return None


class MixedSampler:
    """Keys of real and generated plots in a stated share, shuffled by (seed, epoch).

    Each of the two is a stream that shows all its plots, newly shuffled, before it shows one again. Keys are
    ``round * n + index``, so that ``LabelledImages`` changes a plot differently whenever it comes again.

    >>> sampler = MixedSampler(4, 100, 0.5, 0, seed=0)
    >>> sampler.set_epoch(1); keys = list(sampler)
    >>> len(keys), sum(key % 104 < 4 for key in keys)
    (8, 4)
    """

    def __init__(self, n_real: int, n_generated: int, real_share: float, epoch_samples: int, seed: int):
        share = real_share if n_generated else 1.0
        total = epoch_samples or round(n_real / share)
        self.n, self.seed, self.epoch = n_real + n_generated, seed, 1
        drawn = max(1, round(share * total))
        self.streams = [(0, n_real, drawn)] + ([(n_real, n_generated, max(0, total - drawn))] if n_generated else [])

    def set_epoch(self, epoch: int) -> None:
        """Draw for another epoch, counted from 1, from the next iteration on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        keys: list[int] = []
        for start, size, drawn in self.streams:
            first = (self.epoch - 1) * drawn
            rounds = {
                turn: np.random.default_rng((self.seed, start, turn)).permutation(size)
                for turn in range(first // size, (first + drawn - 1) // size + 1)
            }
            keys += [
                (at // size) * self.n + start + int(rounds[at // size][at % size]) for at in range(first, first + drawn)
            ]
        return iter(np.random.default_rng((self.seed, self.epoch, 7)).permutation(keys).tolist())

    def __len__(self) -> int:
        return sum(drawn for _, _, drawn in self.streams)
