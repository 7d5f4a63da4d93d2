"""Class folders and CSV series -> plots -> tensors; run directly it renders or generates.

Plots come from one function, ``series_plots.render_series``, and reach the network through one, ``prepare_image``,
whether they were files or CSVs, in training or at inference.

    python data_loader_supervised.py render CSV_DIR --out DST
    python data_loader_supervised.py generate --per-class N --out DST
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

import config
import data_loader
import files
import image_files
import image_folders
import scripts
import series_generator
import series_plots
from streams import ahead, in_processes

if TYPE_CHECKING:
    import torch

SERIES_SUFFIXES = (".csv", ".tsv")
DARK = 90  # spines are black; the line's blue channel is 180, the grid's 231
DAMAGED_CACHE = (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile, zlib.error)
"""What reading a cut, damaged or foreign cache file was seen to raise."""
RENDER_REPORT, MANIFEST = "render_report.json", "manifest.json"
DEMO_PER_CLASS = {"train": 60, "test": 20}
DEMO_SEED = 20_240
Progress = Callable[[Iterable, int], Iterable]
_Known = dict[str, tuple[list[int], np.ndarray | str]]  # path -> (size and time, its plot or why there is none)


# ------------------------------------------------------------------------------- one plot for the network


def crop_to_axes(image: np.ndarray) -> np.ndarray:
    """The inside of a plot's axes, from a uint8 H x W x 3 picture of it; the whole picture where no axes are found.

    Looks for a thin dark line down the left third and one along the bottom third, each over half of the picture and
    with light beside it: the left and the bottom spine. They also tell where the axes end at the top and at the right.
    """
    height, width = image.shape[:2]
    left = _spine(image[:, : width // 3, 2] < DARK, first=True)
    bottom = _spine((image[2 * height // 3 :, :, 2] < DARK).T, first=False)
    if left is None or bottom is None:
        return image
    column, (top, _) = left
    row, (_, right) = bottom
    row += 2 * height // 3
    if row - top < height // 3 or right - column < width // 3:
        return image
    return image[top:row, column + 1 : right]


def _spine(dark: np.ndarray, first: bool) -> tuple[int, tuple[int, int]] | None:
    """(column, (first, last) row) of a vertical line at most 4 px wide over half of the rows of a bool H x W."""
    share = dark.mean(axis=0)
    columns = np.flatnonzero(share >= 0.5)
    if not 1 <= len(columns) <= 4 or columns[-1] - columns[0] != len(columns) - 1:
        return None
    beside = [share[i] for i in (columns[0] - 2, columns[-1] + 2) if 0 <= i < len(share)]
    if max(beside, default=0.0) > 0.25:
        return None
    column = int(columns[-1] if first else columns[0])
    rows = np.flatnonzero(dark[:, column])
    return column, (int(rows[0]), int(rows[-1]))


def prepare_image(image: np.ndarray, image_size: int, crop_axes: bool) -> np.ndarray:
    """uint8 H x W x 3 of any size -> uint8 S x S x 3 as the network sees it; thin lines are averaged, never skipped."""
    return image_files.fit_image(crop_to_axes(image) if crop_axes else image, image_size, "stretch")


def read_plot(path: str | Path) -> tuple[np.ndarray, str]:
    """uint8 H x W x 3 RGB of an image file, or of the plot of a CSV series, and a remark on rows that hold no number
    and on which of several columns was read, or "".

    Raises:
        ImageError, SeriesError: the file cannot be used; ``reason`` says why.
    """
    if not str(path).lower().endswith(SERIES_SUFFIXES):
        return image_files.read_image(path), ""
    series = series_plots.read_series(path)
    return series_plots.render_series(series.values), _remark(series)


def _remark(series: series_plots.Series) -> str:
    column = series.column if series.column.startswith("column ") else f"column {series.column!r}"
    clauses = [f"{column} of {series.n_columns} that could be the series was read"] if series.n_columns > 1 else []
    if series.n_dropped:
        n_rows = len(series.values) + series.n_dropped + len(series.sums)
        clauses.append(f"{series.n_dropped} of {n_rows} rows hold no number")
    if series.sums:
        clauses.append(f"the last {len(series.sums)}, called {', '.join(series.sums)}, were left out as sums")
    return ", and ".join(clauses)


class _Prepared(NamedTuple):
    image: np.ndarray | None  # uint8 S x S x 3
    said: str  # where there is none, why; else what to know of it, or nothing
    refused: bool = False  # by the operating system, which may allow it later


def _read_prepared(path: Path, image_size: int, crop_axes: bool) -> _Prepared:
    try:
        image, note = read_plot(path)
        return _Prepared(prepare_image(image, image_size, crop_axes), note)
    except (image_files.ImageError, series_plots.SeriesError) as error:
        return _Prepared(None, error.reason, isinstance(error.__cause__, OSError))


# ----------------------------------------------------------------------------------- many plots, streamed


class PlotBatch(NamedTuple):
    images: torch.Tensor  # float32 B x 3 x S x S in [0, 1]
    paths: list[Path]
    notes: list[str]  # on each, what to know of it, or nothing
    errors: list[tuple[Path, str]]  # files skipped since the last batch and why
    places: list[int]  # among all paths, of the skipped files and then of the images


def find_plots(inputs: str | Path | Sequence[str | Path], outputs: Sequence[Path] = ()) -> list[Path]:
    """Images and CSV series as ``image_folders.find_files`` finds them."""
    return image_folders.find_files(inputs, outputs, image_folders.IMAGE_SUFFIXES + SERIES_SUFFIXES, "image or CSV")


def iter_plots(
    paths: Iterable[str | Path], image_size: int, crop_axes: bool, batch_size: int = 32, n_threads: int = 0
) -> Iterator[PlotBatch]:
    """Batches in the order of the paths, read by threads two batches ahead; memory does not grow with their number.

    Every batch but the last holds ``batch_size`` readable plots; a batch without images only carries errors.
    """
    rows: list[np.ndarray] = []
    kept: list[tuple[int, Path, str]] = []
    errors: list[tuple[int, Path, str]] = []

    def batch() -> PlotBatch:
        images = data_loader.to_tensor(np.stack(rows) if rows else np.zeros((0, image_size, image_size, 3), np.uint8))
        return PlotBatch(
            images,
            [path for _, path, _ in kept],
            [note for *_, note in kept],
            [(path, reason) for _, path, reason in errors],
            [place for place, *_ in errors + kept],
        )

    work = ahead(lambda path: _read_prepared(path, image_size, crop_axes), map(Path, paths), 2 * batch_size, n_threads)
    for place, (path, result) in enumerate(work):
        if result.image is None:
            errors.append((place, path, result.said))
            continue
        rows.append(result.image)
        kept.append((place, path, result.said))
        if len(rows) == batch_size:
            yield batch()
            rows, kept, errors = [], [], []
    if rows or errors:
        yield batch()


# ------------------------------------------------------------------------------------------ class folders


TAKEN_NAMES = {"path", "predicted", "confidence", "p_value", "error"}
"""What tables of predictions call their other columns, and a file that cannot be read."""


class ClassFolder:
    """A data set with ``train/<class>`` and, where there is one, ``test/<class>``.

    Attributes:
        classes: names, sorted; a label is an index into them.
        train, test: lists of (path, label), in the order of classes and names; test may be empty.

    Raises:
        InputError: no train folder, a single class, a class without images or with a name of TAKEN_NAMES, or test
            classes other than the training ones.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        folders = class_folders(self.root / "train")
        if len(folders) < 2:
            raise config.InputError(
                f"{self.root / 'train'} holds {len(folders)} class folder(s); expected at least two, one for each "
                "class."
            )
        self.classes = [folder.name for folder in folders]
        if taken := TAKEN_NAMES.intersection(self.classes):
            raise config.InputError(
                f"The class folder {self.root / 'train' / min(taken)} has the name of a column of predictions, or of "
                f"what cannot be read; expected any but {', '.join(sorted(TAKEN_NAMES))}."
            )
        self.train = self._items(folders)
        self.test: list[tuple[Path, int]] = []
        if (self.root / "test").is_dir() and (tests := class_folders(self.root / "test")):
            self._check_same([folder.name for folder in tests])
            self.test = self._items(tests)

    def n_shared(self) -> int:
        """How many files of test have the content of one of train; read are only those of the same size."""
        sizes = [{path: _mark(path)[0] for path, _ in items} for items in (self.train, self.test)]
        common = set(sizes[0].values()) & set(sizes[1].values()) - {-1, 0}
        train, test = ([files.digest(path) for path, size in part.items() if size in common] for part in sizes)
        known = set(train) - {""}
        return sum(digest in known for digest in test)

    def _items(self, folders: list[Path]) -> list[tuple[Path, int]]:
        items = []
        for folder in folders:
            images = image_folders.files_under(folder)
            if not images:
                raise config.InputError(
                    f"The class folder {folder} holds no image; expected files ending in "
                    f"{', '.join(image_folders.IMAGE_SUFFIXES)}."
                )
            items += [(path, self.classes.index(folder.name)) for path in images]
        return items

    def _check_same(self, test_classes: list[str]) -> None:
        unknown, absent = sorted(set(test_classes) - set(self.classes)), sorted(set(self.classes) - set(test_classes))
        parts = [f"has {', '.join(unknown)}, which train does not"] if unknown else []
        parts += [f"lacks {', '.join(absent)}"] if absent else []
        if parts:
            raise config.InputError(
                f"{self.root / 'test'} {' and '.join(parts)}; expected the same class folders in train and test."
            )


def class_folders(parent: Path) -> list[Path]:
    """The folders in ``train`` or ``test``, by name; hidden ones are left out.

    Raises:
        InputError: there is no such folder.
    """
    if not parent.is_dir():
        raise config.InputError(
            f"{parent} is no folder; expected the layout train/<class>/* and test/<class>/* under {parent.parent}."
        )
    return sorted(
        (path for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")),
        key=lambda path: path.name,
    )


def stratified_split(labels: Sequence[int], validation_frac: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) indices, sorted: the same share of each class, at least one on both sides where it has
    two.

    >>> training, validation = stratified_split([0] * 10 + [1] * 20, 0.2, seed=0)
    >>> len(training), len(validation), int((validation < 10).sum())
    (24, 6, 2)
    """
    labels = np.asarray(labels)
    held: list[int] = []
    for label in np.unique(labels):
        members = np.random.default_rng((seed, int(label))).permutation(np.flatnonzero(labels == label))
        n_held = min(max(1, round(validation_frac * len(members))), len(members) - 1)
        held += members[:n_held].tolist()
    validation = np.sort(np.array(held, dtype=np.int64))
    return np.setdiff1d(np.arange(len(labels)), validation), validation


# -------------------------------------------------------------------------------- decoded once, then cached


class CachedPlots(NamedTuple):
    images: np.ndarray  # uint8 N x S x S x 3
    kept: list[int]  # index of each into the paths asked for
    errors: list[tuple[Path, str]]  # what was skipped and why
    n_decoded: int  # 0 when all came from the cache


def load_plots(
    paths: Sequence[str | Path],
    image_size: int,
    crop_axes: bool,
    cache_dir: str | Path | None = None,
    progress: Progress = lambda items, total: items,
) -> CachedPlots:
    """Every readable plot, decoded and resized once: a later call takes from the cache what did not change since.

    The cache is one compressed file under ``cache_dir`` for each set of paths and settings; a source counts as
    unchanged while its size and time are, and one that the system refused to read is tried again. It is written whole
    or not at all, so runs may share it, and a damaged one is made anew, as is one whose first plot looks otherwise
    today, for the code or a library that draws, crops or resizes has changed then.
    """
    paths = [Path(path) for path in paths]
    marks = [_mark(path) for path in paths]
    file = None if cache_dir is None else _cache_file(Path(cache_dir), paths, image_size, crop_axes)
    known = {} if file is None else _read_cache(file, image_size)
    if not _as_made_now(known, paths, marks, image_size, crop_axes):
        known = {}
    todo = [i for i, path in enumerate(paths) if known.get(str(path), (None,))[0] != marks[i]]
    fresh: dict[int, np.ndarray | str] = {}
    refused = set()
    work = ahead(lambda i: _read_prepared(paths[i], image_size, crop_axes), todo, 64)
    for i, result in progress(work, len(todo)):
        fresh[i] = result.said if result.image is None else result.image
        if result.refused:
            refused.add(paths[i])
    results = [fresh[i] if i in fresh else known[str(path)][1] for i, path in enumerate(paths)]
    kept = [i for i, result in enumerate(results) if not isinstance(result, str)]
    images = np.stack([results[i] for i in kept]) if kept else np.zeros((0, image_size, image_size, 3), np.uint8)
    errors = [(paths[i], result) for i, result in enumerate(results) if isinstance(result, str)]
    if file is not None and todo:
        _write_cache(file, paths, marks, images, kept, dict(errors), refused)
    return CachedPlots(images, kept, errors, len(todo))


def _mark(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError:
        return [-1, -1]
    return [status.st_size, status.st_mtime_ns]


def _as_made_now(known: _Known, paths: list[Path], marks: list[list[int]], image_size: int, crop_axes: bool) -> bool:
    """Whether the first plot of a cache, among those whose file is as it was, would be made the same today."""
    for path, mark in zip(paths, marks, strict=True):
        cached_mark, cached = known.get(str(path), (None, ""))
        if cached_mark == mark and not isinstance(cached, str):
            made = _read_prepared(path, image_size, crop_axes).image
            return made is not None and np.array_equal(made, cached)
    return True


def _cache_file(cache_dir: Path, paths: list[Path], image_size: int, crop_axes: bool) -> Path:
    key = json.dumps([image_size, crop_axes, [os.path.abspath(path) for path in paths]])  # noqa: PTH100 (links stay)
    return (
        cache_dir / f"plots_{image_size}_{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}.npz"
    )


def _read_cache(file: Path, image_size: int) -> _Known:
    """What a cache file holds; nothing when there is none or it is damaged."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            index, images = json.loads(str(stored["index"])), stored["images"]
        if images.dtype != np.uint8 or images.shape[1:] != (image_size, image_size, 3):
            return {}
        return {path: (mark, reason if row < 0 else images[row]) for path, mark, row, reason in index}
    except DAMAGED_CACHE:
        return {}


def _write_cache(
    file: Path,
    paths: list[Path],
    marks: list[list[int]],
    images: np.ndarray,
    kept: list[int],
    reasons: dict[Path, str],
    left_out: set[Path],
) -> None:
    rows = {i: row for row, i in enumerate(kept)}
    index = [
        (str(path), marks[i], rows.get(i, -1), reasons.get(path, ""))
        for i, path in enumerate(paths)
        if path not in left_out
    ]
    write_arrays(file, {"index": np.array(json.dumps(index)), "images": images})


def write_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz, lightly compressed, as ``files.whole_file`` does and raises."""
    with files.whole_file(file) as out, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


# --------------------------------------------------------------------------------------- training samples


class LabelledSample(NamedTuple):
    images: torch.Tensor  # float32 3 x S x S in [0, 1]
    labels: torch.Tensor  # int64, a class index


def augment_plot(image: np.ndarray, settings: config.SupervisedDataSettings, rng: np.random.Generator) -> np.ndarray:
    """A randomly changed uint8 S x S x 3 plot of the same kind.

    Which changes keep each of the nine kinds: a series read backwards or with its sign changed keeps its kind (an event
    stays an event, a rising trend becomes a falling one, a random walk stays one), exactly so for plots cropped to
    their axes. Small stretches and shifts keep it because events lie a tenth of the length or more from the ends. Left
    out: noise, blur and erasing, which make or hide point anomalies and shifts of variance; large cuts in time, which
    can cut the event away; stretches that differ along time, which turn a level or a slope into another.
    """
    if settings.flip_time and rng.random() < 0.5:
        image = image[:, ::-1]
    if settings.flip_value and rng.random() < 0.5:
        image = image[::-1]
    side = image.shape[0]
    zoom = 1 + rng.uniform(-settings.stretch_frac, settings.stretch_frac, 2)
    shift = rng.uniform(-settings.shift_frac, settings.shift_frac, 2) * side
    jitter = rng.uniform(0, settings.line_jitter)
    if settings.stretch_frac or settings.shift_frac:
        move = np.array(
            [[zoom[0], 0, (1 - zoom[0]) * side / 2 + shift[0]], [0, zoom[1], (1 - zoom[1]) * side / 2 + shift[1]]]
        )
        image = cv2.warpAffine(
            np.ascontiguousarray(image), move, (side, side), flags=cv2.INTER_LINEAR, borderValue=(255, 255, 255)
        )
    if jitter > 0:
        image = np.ascontiguousarray(image)
        image = cv2.addWeighted(image, 1 - jitter, cv2.erode(image, np.ones((2, 2), np.uint8)), jitter, 0)
    return np.ascontiguousarray(image)


class LabelledImages:
    """Samples of labelled plots: a map-style data set whose chance depends on (seed, epoch, index) only.

    Args:
        images: uint8 N x S x S x 3, prepared.
        labels: N class indices.
        settings: ranges of the random changes; None for none at all (validation, test).
        seed: seed of all random choices.
    """

    def __init__(
        self, images: np.ndarray, labels: Sequence[int], settings: config.SupervisedDataSettings | None, seed: int = 0
    ):
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images and {len(labels)} labels; expected as many of both.")
        self.images, self.labels, self.settings, self.seed = images, np.asarray(labels, dtype=np.int64), settings, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int) -> LabelledSample:
        """The sample of ``key = epoch * n + index``."""
        import torch

        epoch, index = divmod(int(key), len(self))
        image = self.images[index]
        if self.settings is not None:
            image = augment_plot(image, self.settings, np.random.default_rng((self.seed, epoch, index)))
        return LabelledSample(data_loader.to_tensor(image)[0], torch.tensor(self.labels[index]))


# ------------------------------------------------------------------------------- render: CSV files -> plots


def render_folder(
    source: str | Path, out: str | Path, num_workers: int = -1, progress: Progress = lambda items, total: items
) -> dict:
    """Draw every CSV under ``source`` to a PNG in the same folder under ``out``.

    Plots of a CSV that has not changed since are left alone; those of one that is gone, or that is drawn elsewhere now,
    are removed.

    Returns:
        {"rendered": n, "kept": n, "skipped": [{"source", "reason"}], "dropped_rows": {source: n}, "columns": {source:
        the one drawn of several that could be the series}, "classes": {folder: n}, "outputs": {plot: {"source", "size",
        "mtime_ns"}}}, also written to ``out/render_report.json``.

    Raises:
        InputError: no such folder, or no CSV in it.
    """
    source, out = Path(source), Path(out)
    if not source.is_dir():
        raise config.InputError(f"{source} is no folder; expected class folders of CSV series.")
    found = image_folders.files_under(source, suffixes=SERIES_SUFFIXES)
    if not found:
        raise config.InputError(f"No CSV found in {source}; expected files ending in {', '.join(SERIES_SUFFIXES)}.")
    jobs = list(_render_jobs(found, source, out))
    marks = {target.relative_to(out).as_posix(): _source_mark(path) for path, target in jobs}
    before = _rendered_before(out)
    outputs = _without_stale(before.pop("outputs"), marks, out)
    elsewhere = _drawn_of_others(jobs, marks, outputs)
    todo = [
        job
        for job, (name, mark) in zip(jobs, marks.items(), strict=True)
        if job[0] not in elsewhere and (outputs.get(name) != mark or not job[1].exists())
    ]
    done = set(found).difference(elsewhere, (path for path, _ in todo))
    kept = {path.relative_to(source).as_posix() for path in done}
    noted = {key: {name: note for name, note in notes.items() if name in kept} for key, notes in before.items()}
    report: dict = {"rendered": 0, "kept": len(kept), **noted, "classes": {}}
    skipped = [{"source": path.relative_to(source).as_posix(), "reason": why} for path, why in elsewhere.items()]
    report |= {"skipped": skipped, "outputs": outputs}
    drawn = progress(in_processes(_render_one, todo, num_workers), len(todo))
    try:
        for (path, target), (reason, notes) in zip(todo, drawn, strict=True):
            name, output = path.relative_to(source).as_posix(), target.relative_to(out).as_posix()
            if reason:
                if outputs.pop(output, None):  # what an earlier run drew; other files stay
                    target.unlink(missing_ok=True)
                report["skipped"].append({"source": name, "reason": reason})
            else:
                outputs[output] = marks[output]
                report["rendered"] += 1
            for key, note in notes.items():
                report[key][name] = note
    finally:
        report["classes"] = dict(
            Counter(target.parent.relative_to(out).as_posix() for _, target in jobs if target.exists())
        )
        files.write_json(out / RENDER_REPORT, report)
    return report


def _rendered_before(out: Path) -> dict[str, dict]:
    """``dropped_rows``, ``columns`` and ``outputs`` of the report there is, without what is damaged."""
    report, keys = files.read_json(out / RENDER_REPORT), ("dropped_rows", "columns", "outputs")
    before = {key: report[key] if isinstance(report.get(key), dict) else {} for key in keys}
    is_mark = lambda mark: isinstance(mark, dict) and isinstance(mark.get("source"), str)  # noqa: E731
    return before | {"outputs": {name: mark for name, mark in before["outputs"].items() if is_mark(mark)}}


def _source_mark(path: Path) -> dict:
    """What must be unchanged for a plot to be still right."""
    size, mtime_ns = _mark(path)
    return {"source": os.path.abspath(path), "size": size, "mtime_ns": mtime_ns}  # noqa: PTH100 (links stay)


def _drawn_of_others(
    jobs: list[tuple[Path, Path]], marks: dict[str, dict], outputs: dict[str, dict]
) -> dict[Path, str]:
    """Series that are not to be drawn, since their plot is that of another file, still there and not drawn elsewhere
    now, and the reason.
    """
    sources, reasons = {mark["source"] for mark in marks.values()}, {}
    for (path, target), name in zip(jobs, marks, strict=True):
        other = Path(outputs.get(name, marks[name])["source"])
        is_there = target.exists() and other.exists() and str(other) not in sources
        if is_there and not (path.exists() and other.samefile(path)):
            reasons[path] = f"is not drawn over the plot of {other}; expected another --out"
    return reasons


def _without_stale(outputs: dict[str, dict], marks: dict[str, dict], out: Path) -> dict[str, dict]:
    """The recorded plots that have a source; those that nothing is drawn to now, and whose source is gone or drawn
    elsewhere, are removed.
    """
    sources = {mark["source"] for mark in marks.values()}
    stale = {
        name
        for name, mark in outputs.items()
        if name not in marks and (mark["source"] in sources or not Path(mark["source"]).exists())
    }
    for name in stale:
        (out / name).unlink(missing_ok=True)
    return {name: mark for name, mark in outputs.items() if name not in stale}


def _render_jobs(found: list[Path], source: Path, out: Path) -> Iterator[tuple[Path, Path]]:
    taken = set()
    for path in found:
        target = out / path.relative_to(source).with_suffix(".png")
        if target in taken:  # a.csv and a.tsv
            target = target.with_name(f"{files.short_stem(path.name)}.png")
        taken.add(target)
        yield path, target


def _render_one(job: tuple[Path, Path]) -> tuple[str, dict]:
    """Why there is no plot, or "", and what the report says of it beside that, by its keys."""
    path, target = job
    try:
        series = series_plots.read_series(path)
    except series_plots.SeriesError as error:
        return error.reason, {}
    files.write_whole(target, series_plots.plot_png(series_plots.render_series(series.values)))
    notes = {"dropped_rows": series.n_dropped, "columns": series.column if series.n_columns > 1 else ""}
    return "", {key: note for key, note in notes.items() if note}


# --------------------------------------------------------------------------- generate: labelled series, drawn


class _GenerateJob(NamedTuple):
    kind: str
    index: int
    style: str
    seed: tuple[int, ...]
    csv: Path
    png: Path


def generate(
    out: str | Path,
    per_class: int,
    seed: int = 0,
    home_share: float = 0.5,
    num_workers: int = -1,
    progress: Progress = lambda items, total: items,
) -> dict:
    """Write ``per_class`` labelled series of each kind: CSVs to ``<out>_csv/<kind>``, their plots to ``out/<kind>``.

    The same arguments write the same files, however many processes work.

    Returns:
        the manifest, also written to ``out/manifest.json``: seed, share, betise's version and every series' parameters.

    Raises:
        InputError: betise is missing, or the folder holds series of other arguments.
    """
    version = series_generator.require_betise()
    out, given = Path(os.path.abspath(out)), {"seed": seed, "per_class": per_class, "home_share": home_share}  # noqa: PTH100 (links stay)
    before = files.read_json(out / MANIFEST)
    for name, value in given.items():
        if before.get(name, value) != value:
            raise config.InputError(
                f"{out} holds series generated with {name} {before[name]}, not {value}; expected another folder "
                "(--out) or the same arguments."
            )
    jobs = [
        _generate_job(out, kind, index, seed, home_share)
        for kind in series_generator.KINDS
        for index in range(per_class)
    ]
    made = list(progress(in_processes(_generate_one, jobs, num_workers), len(jobs)))
    series = [
        {
            "csv": job.csv.relative_to(out.parent).as_posix(),
            "plot": job.png.relative_to(out.parent).as_posix(),
            "kind": job.kind,
            "seed": list(job.seed),
            "parameters": parameters,
        }
        for job, parameters in zip(jobs, made, strict=True)
    ]
    manifest = {**given, "betise": version, "series": series}
    files.write_json(out / MANIFEST, manifest)
    return manifest


def _generate_job(out: Path, kind: str, index: int, seed: int, home_share: float) -> _GenerateJob:
    key = (seed, series_generator.KINDS.index(kind), index)
    style = "home" if np.random.default_rng((*key, 1)).random() < home_share else "present"
    name = f"{kind}_{style}_{index:05d}"
    return _GenerateJob(kind, index, style, key, series_folder(out) / kind / f"{name}.csv", out / kind / f"{name}.png")


def series_folder(out: Path) -> Path:
    """Where the CSVs of the plots generated into ``out`` lie: beside it, however it is spelled."""
    out = Path(os.path.abspath(out))  # noqa: PTH100 (links stay)
    return out.with_name(f"{out.name}_csv")


def _generate_one(job: _GenerateJob) -> dict:
    series = series_generator.generate_series(job.kind, job.style, job.seed)
    files.write_whole(job.csv, ("data\n" + "\n".join(map(repr, series.values.tolist())) + "\n").encode())
    files.write_whole(job.png, series_plots.plot_png(series_plots.render_series(series.values)))
    return series.parameters


def make_demo(root: str | Path = "data/demo_series", progress: Progress = lambda items, total: items) -> Path:
    """The built-in demo: generated plots of the nine kinds as ``train`` and ``test``; made once, then found."""
    root = Path(root)
    for number, (part, per_class) in enumerate(DEMO_PER_CLASS.items()):
        if not (root / part / MANIFEST).exists():  # written last, so it says that the part is whole
            generate(root / part, per_class, seed=DEMO_SEED + number, progress=progress)
    return root


# ------------------------------------------------------------------------------------------ the commands


def progress_bar(title: str) -> Progress:
    """A bar on stderr that counts plots, as ``render_folder``, ``generate`` and ``make_demo`` take it."""
    from tqdm import tqdm

    return lambda items, total: tqdm(items, total=total, desc=title, unit="plot", file=sys.stderr)


def render_main(settings: config.RenderSettings) -> None:
    """The render command: draw, then say what happened."""
    if len(settings.source) != 1:
        raise config.UsageError(f"render takes one folder; got {len(settings.source)}.")
    out = Path(settings.output_dir) / settings.out
    report = render_folder(settings.source[0], out, settings.num_workers, progress_bar("render"))
    for row in report["skipped"]:
        print(f"skipped: {row['source']} {row['reason']}.", file=sys.stderr)
    if report["columns"]:
        said = f"{len(report['columns'])} CSVs have several columns that could be the series"
        print(f"warning: {said}; the one drawn of each is in {out / RENDER_REPORT}.", file=sys.stderr)
    print(
        f"{out}: {report['rendered']} plots drawn, {report['kept']} already there, {len(report['skipped'])} CSVs "
        f"skipped; details in {out / RENDER_REPORT}"
    )
    if not report["rendered"] + report["kept"]:
        raise config.InputError(f"None of the {len(report['skipped'])} CSVs in {settings.source[0]} could be drawn.")


def generate_main(settings: config.GenerateSettings) -> None:
    """The generate command: make series and plots, then say what there is."""
    out = Path(settings.output_dir) / settings.out
    manifest = generate(
        out, settings.per_class, settings.seed, settings.home_share, settings.num_workers, progress_bar("generate")
    )
    print(
        f"{out}: {len(manifest['series'])} plots in {len(series_generator.KINDS)} class folders; series in "
        f"{series_folder(out)}, parameters in {out / MANIFEST}"
    )


COMMANDS = {
    "render": (
        config.RenderSettings,
        "Draw CSV series, in class folders, as plots in the same class folders.",
        render_main,
    ),
    "generate": (config.GenerateSettings, "Generate labelled series of the nine kinds and draw them.", generate_main),
}


def run(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command that comes first; anything else is wrong usage (2)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        return scripts.run_script(*COMMANDS[argv[0]], argv=argv[1:], prog=f"data_loader_supervised.py {argv[0]}")
    usage = "usage: data_loader_supervised.py render CSV_DIR --out DST | generate --per-class N --out DST"
    if argv in (["--help"], ["-h"]):
        print(f"{__doc__.splitlines()[0]}\n\n{usage}\n\nEach command has its own --help.")
        return 0
    got = f"unknown command '{argv[0]}'" if argv else "no command given"
    print(f"error: {got}; expected render or generate.\n{usage}", file=sys.stderr)
    return config.UsageError.exit_code


if __name__ == "__main__":
    sys.exit(run())
