"""Images on disk -> tensors; run directly it is the preprocess stage.

Everywhere in the code an image is float32 RGB in [0, 1], shaped N x 3 x H x W; at the border to files it is
uint8 H x W x 3 RGB. One bad file never costs the rest: readers of many files return what they skipped and why.

    python data_loader.py SRC --out DST --image-size N
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

import config
import drawn_defects
import files
import scripts
from image_files import (
    ImageError,
    fit_image,
    fit_mask,
    picture_window,
    read_defects,
    read_image,
    unread_reason,
    write_png,
)
from image_folders import (
    REPORT_NAME,
    MVTecFolder,
    drawn_copies,
    files_under,
    find_images,
    first_copies,
    kept_rows,
    masks_beside,
    unread_under,
)
from streams import ahead
from tiles import tile_corners, window

if TYPE_CHECKING:  # torch takes seconds to import and --help must not wait for it
    import torch

KEEP_IN_MEMORY_BYTES = 2 * 1024**3


# ------------------------------------------------------------------------------------ pixels to tensors


def flip_axes(across: bool, upright: bool) -> list[tuple[int, ...]]:
    """Dimensions of images (B, C, H, W) to flip for each view beside the images as they are.

    >>> flip_axes(across=True, upright=True)
    [(3,), (2,), (2, 3)]
    """
    return [(3,)] * across + [(2,)] * upright + [(2, 3)] * (across and upright)


def to_tensor(images: np.ndarray | Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 N x H x W x 3 (or a list of H x W x 3, or one) -> float32 N x 3 x H x W in [0, 1].

    Raises:
        ValueError: another type or shape.
    """
    import torch

    stacked = np.asarray(images) if isinstance(images, np.ndarray) else np.stack(list(images))
    stacked = stacked[None] if stacked.ndim == 3 else stacked
    if stacked.dtype != np.uint8 or stacked.ndim != 4 or stacked.shape[3] != 3:
        raise ValueError(f"images are {stacked.dtype} {stacked.shape}; expected uint8 N x H x W x 3.")
    return torch.from_numpy(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))).float().div_(255.0)


def assert_images(images: torch.Tensor) -> torch.Tensor:
    """The tensor itself when it is float32 N x 3 x H x W in [0, 1]: the one check at the boundary.

    Raises:
        ValueError: another type, shape or range, values that are not finite, or no image.
    """
    import torch

    if not torch.is_tensor(images) or images.dtype != torch.float32 or images.ndim != 4 or images.shape[1] != 3:
        got = f"{images.dtype} {tuple(images.shape)}" if torch.is_tensor(images) else type(images).__name__
        raise ValueError(f"images are {got}; expected a float32 tensor N x 3 x H x W.")
    if not images.numel():
        raise ValueError(f"There are no images in a tensor of shape {tuple(images.shape)}; expected one or more.")
    low, high = (float(value) for value in torch.aminmax(images.detach()))
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(f"images range from {low:g} to {high:g}; expected [0, 1].")
    return images


# ------------------------------------------------------------------------------------ reading many files


class LoadedImages(NamedTuple):
    images: torch.Tensor  # float32 N x 3 x S x S in [0, 1]
    paths: list[Path]
    errors: list[tuple[Path, str]]  # what was skipped and why


class ImageBatch(NamedTuple):
    images: torch.Tensor  # float32 B x 3 x S x S in [0, 1]; for "tile" 1 x 3 x H x W
    paths: list[Path]
    original_sizes: list[tuple[int, int]]  # height, width; ``read_image(path)`` gives the pixels again
    errors: list[tuple[Path, str]]

    def windows(
        self, resize: str, letterboxed: Mapping[Path, tuple[int, int]] = MappingProxyType({})
    ) -> list[tuple[slice, slice]]:
        """``picture_window`` of every image, made with that ``resize``; of those that ``MVTecFolder.letterboxed``
        knows, too, without the bars in the file.
        """
        sizes = (letterboxed.get(path, size) for path, size in zip(self.paths, self.original_sizes, strict=True))
        return [picture_window(size, self.images.shape[-1], resize) for size in sizes]


def _read_fitted(path: Path, image_size: int, resize: str) -> tuple[np.ndarray, tuple[int, int]] | ImageError:
    try:
        image = read_image(path)
    except ImageError as error:
        return error
    return fit_image(image, image_size, resize), image.shape[:2]


def _read_all(paths: Sequence[str | Path], image_size: int, resize: str) -> Iterator[tuple]:
    """(path, ``_read_fitted`` of it) in order; of whole photographs few are held at a time."""
    return ahead(lambda path: _read_fitted(path, image_size, resize), map(Path, paths), 2 if resize == "tile" else 32)


def evenly(n: int, n_wanted: int) -> list[int]:
    """Indices of all of n things, or of ``n_wanted`` at most, evenly spread; 0 wants all.

    >>> evenly(9, 3)
    [0, 4, 8]
    """
    return np.unique(np.linspace(0, n - 1, min(n_wanted or n, n)).round().astype(int)).tolist()


def _empty_tensor(image_size: int) -> torch.Tensor:
    return to_tensor(np.zeros((0, image_size, image_size, 3), np.uint8))


def load_images(
    paths: str | Path | Sequence[str | Path], image_size: int, resize: str = "stretch", n_tiles: int = 0
) -> LoadedImages:
    """Images (N, 3, S, S) in [0, 1], their paths and what was skipped, as ``load_batch`` reads them."""
    batch = load_batch(paths, image_size, resize, n_tiles)
    return LoadedImages(batch.images, batch.paths, batch.errors)


def load_batch(
    paths: str | Path | Sequence[str | Path], image_size: int, resize: str = "stretch", n_tiles: int = 0
) -> ImageBatch:
    """Every readable image as one tensor, in order, with the list of those skipped; of one path, a folder or a glob
    what ``find_images`` finds.

    For "tile": every tile of it, or ``n_tiles`` at most, evenly spread; its path and size are repeated.
    """
    images, kept, sizes, errors = [], [], [], []
    for path, result in _read_all(find_images(paths) if isinstance(paths, (str, Path)) else paths, image_size, resize):
        if isinstance(result, ImageError):
            errors.append((path, result.reason))
        else:
            image, size = result
            corners = tile_corners(*image.shape[:2], image_size)
            tiles = [
                np.ascontiguousarray(image[window(*corners[row], image_size)]) for row in evenly(len(corners), n_tiles)
            ]
            images += tiles
            kept += [path] * len(tiles)
            sizes += [size] * len(tiles)
    return ImageBatch(to_tensor(images) if images else _empty_tensor(image_size), kept, sizes, errors)


def iter_image_batches(
    paths: Iterable[str | Path], image_size: int, resize: str = "stretch", batch_size: int = 8, n_threads: int = 0
) -> Iterator[ImageBatch]:
    """Batches in the order of the paths, decoded by threads two batches ahead; memory does not grow with n.

    Every batch but the last holds ``batch_size`` readable images, for "tile" one, whole; skipped files ride along in
    ``errors``. Only when no file at all is readable is there a batch without images.
    """
    batch_size = 1 if resize == "tile" else batch_size
    rows: list[tuple[Path, np.ndarray, tuple[int, int]]] = []
    errors: list[tuple[Path, str]] = []

    def batch() -> ImageBatch:
        images = to_tensor([row[1] for row in rows]) if rows else _empty_tensor(image_size)
        return ImageBatch(images, [row[0] for row in rows], [row[2] for row in rows], list(errors))

    for path, result in ahead(
        lambda path: _read_fitted(path, image_size, resize), map(Path, paths), 2 * batch_size, n_threads
    ):
        if isinstance(result, ImageError):
            errors.append((path, result.reason))
            continue
        if len(rows) == batch_size:
            yield batch()
            rows, errors = [], []
        rows.append((path, *result))
    if rows or errors:
        yield batch()


def draw_on(
    images: torch.Tensor, windows: Iterable[tuple[slice, slice]], area_share: float, rng: np.random.Generator
) -> tuple[torch.Tensor, np.ndarray]:
    """Images (B, 3, H, W) in [0, 1], on the CPU, with a defect drawn within the window of each, but for mere strips,
    and where it is, bool (B, H, W).

    ``area_share``: areas are that many times as large a share of the image as in training.
    """
    drawn = []
    for image, inside in zip(images, windows, strict=True):
        pixels = (image.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)
        areas = tuple(area_share * frac for frac in drawn_defects.AREA_FRAC)
        drawn.append(drawn_within(pixels, inside, partial(drawn_defects.draw_defect, rng=rng, area_frac=areas)))
    pixels, masks = zip(*drawn, strict=True)
    return to_tensor(pixels), np.stack(masks)


def drawn_within(
    image: np.ndarray, inside: tuple[slice, slice], draw: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """A copy of an image, uint8 H x W x 3, with what ``draw`` makes of the window of it, but of a mere strip, and where
    that is, bool H x W.
    """
    pixels, mask = image.copy(), np.zeros(image.shape[:2], bool)
    if min(mask[inside].shape) >= drawn_defects.SMALLEST_SIDE_PX:
        pixels[inside], mask[inside] = draw(pixels[inside])
    return pixels, mask


# --------------------------------------------------------------------------------------------- training


class TrainSample(NamedTuple):
    images: torch.Tensor  # float32 3 x S x S in [0, 1], augmented: the target
    corrupted: torch.Tensor  # the same with a drawn defect, or equal
    defect_mask: torch.Tensor  # float32 1 x S x S, 1 where the defect is
    key: int  # equal keys are equal samples: variant * n + index


def augment_image(image: np.ndarray, augment: config.AugmentSettings, rng: np.random.Generator) -> np.ndarray:
    """A randomly moved and re-lit copy of a uint8 S x S x 3 image: one interpolation, one colour matrix."""
    height, width = image.shape[:2]
    angle = rng.uniform(-1, 1) * augment.rotation_deg
    zoom = 1.0 + rng.uniform(-1, 1) * augment.scale_frac
    shift = rng.uniform(-1, 1, 2) * augment.shift_frac * (width, height)
    flips = rng.random(2) < 0.5
    gain, contrast = 1.0 + rng.uniform(-1, 1, 2) * augment.brightness
    saturation = 1.0 + rng.uniform(-1, 1) * augment.saturation

    move = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, zoom)
    move[:, 2] += shift
    if augment.flip_horizontal and flips[0]:
        move = move @ np.array([[-1.0, 0, width - 1], [0, 1, 0], [0, 0, 1]])
    if augment.flip_vertical and flips[1]:
        move = move @ np.array([[1.0, 0, 0], [0, -1, height - 1], [0, 0, 1]])
    # cubic: a linear filter would leave training images blurrier than the images judged later
    moved = cv2.warpAffine(image, move, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
    return _recolour(moved, gain, contrast, saturation)


def _recolour(image: np.ndarray, gain: float, contrast: float, saturation: float) -> np.ndarray:
    luma = np.array([0.299, 0.587, 0.114])
    matrix = gain * contrast * (saturation * np.eye(3) + (1.0 - saturation) * luma[None, :])
    offset = np.full((3, 1), 127.5 * (1.0 - contrast))
    return cv2.transform(image, np.hstack([matrix, offset]))


class GoodImages:
    """Training samples from good images: a map-style data set whose chance depends on (seed, epoch, index) only.

    Every file is decoded and fitted once here, and kept in memory when all fit into KEEP_IN_MEMORY_BYTES.

    Args:
        paths: good images.
        image_size, resize: as for ``fit_image``.
        augment: ranges of the random changes (``config.TrainSettings`` is one).
        defect_share: share of samples that get a drawn defect, 0..1.
        seed: seed of all random choices.
        letterboxed: as ``ImageBatch.windows`` takes it: nothing is drawn on grey bars as they lie before augmentation,
            and nothing at all on pictures that are mere strips.
        n_variants: every image has so many variants, which come round again; 0 for a new one in every epoch. The first
            is the image as it is: what is interpolated and re-lit is a little softer than what is judged later.

    Attributes:
        paths: the readable ones; skipped: (path, reason) of the others.
        images: uint8 H x W x 3 of each, or None where not all fit into memory.

    Raises:
        InputError: fewer than 2 images can be read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        image_size: int,
        resize: str,
        augment: config.AugmentSettings,
        defect_share: float,
        seed: int,
        n_variants: int = 0,
        letterboxed: Mapping[Path, tuple[int, int]] = MappingProxyType({}),
    ):
        self.n_variants = n_variants
        self.image_size, self.resize, self.augment = image_size, resize, augment
        self.defect_share, self.seed = defect_share, seed
        self.paths: list[Path] = []
        self.skipped: list[tuple[Path, str]] = []
        # number of the image, top and left within it; one an image without "tile"
        self.tiles: list[tuple[int, int, int]] = []
        self._windows: list[tuple[slice, slice]] = []  # of each image, all but grey bars
        images, n_bytes = [], 0
        for path, result in _read_all(paths, image_size, resize):
            if isinstance(result, ImageError):
                self.skipped.append((path, result.reason))
                continue
            self.tiles += [(len(self.paths), *corner) for corner in tile_corners(*result[0].shape[:2], image_size)]
            self.paths.append(path)
            self._windows.append(picture_window(letterboxed.get(path, result[1]), image_size, resize))
            n_bytes += result[0].nbytes
            if n_bytes <= KEEP_IN_MEMORY_BYTES:
                images.append(result[0])
            else:
                images.clear()
        if len(self.paths) < 2:
            why = f"; {self.skipped[0][0]} {self.skipped[0][1]}" if self.skipped else ""
            raise config.InputError(
                f"{len(self.paths)} of {len(paths)} training images can be read, expected 2 or more{why}."
            )
        self.images = images or None
        self._last: tuple[int, np.ndarray | None] = (-1, None)  # the image decoded last, where not all are kept

    def __len__(self) -> int:
        return len(self.tiles)

    def _image(self, index: int) -> np.ndarray:
        number, top, left = self.tiles[index]
        if self.images is None and self._last[0] != number:
            self._last = number, fit_image(read_image(self.paths[number]), self.image_size, self.resize)
        whole = self._last[1] if self.images is None else self.images[number]
        return whole[window(top, left, self.image_size)]

    def _window(self, index: int) -> tuple[slice, slice]:
        return self._windows[self.tiles[index][0]]

    def plain_batches(self, batch_size: int, n_images: int = 0) -> Iterator[torch.Tensor]:
        """Every image once, or ``n_images`` at most, evenly over all, without augmentation, float32 B x 3 x S x S in
        [0, 1].
        """
        rows = evenly(len(self), n_images)
        for start in range(0, len(rows), batch_size):
            yield to_tensor([self._image(index) for index in rows[start : start + batch_size]])

    def with_defects(self, number: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A good image, one of four as it is and the others augmented, the same with at most ``n`` drawn defects, and
        where they are, float32 (3, S, S) twice and (1, S, S).

        The same for the same ``number``, but none of the samples that ``__getitem__`` makes.
        """
        import torch

        rng = np.random.default_rng((self.seed, len(self), number, n))
        index = int(rng.integers(len(self)))
        image = self._image(index)
        clean = image if number % 4 == 0 else augment_image(image, self.augment, rng)
        draw = partial(drawn_defects.draw_defects, rng=rng, donors=self.images or (), n=n)
        damaged, mask = drawn_within(clean, self._window(index), draw)
        pair = to_tensor([clean, damaged])
        return pair[0], pair[1], torch.from_numpy(mask.astype(np.float32)[None])

    def __getitem__(self, key: int) -> TrainSample:
        """The sample of ``key = epoch * n + index``."""
        import torch

        epoch, index = divmod(int(key), len(self))
        variant = epoch % self.n_variants if self.n_variants else epoch
        rng = np.random.default_rng((self.seed, variant, index))
        clean = augment_image(self._image(index), self.augment, rng) if variant else self._image(index)
        corrupted, mask = clean, np.zeros(clean.shape[:2], bool)
        if rng.random() < self.defect_share:
            draw = partial(drawn_defects.draw_defect, rng=rng, donors=self.images or ())
            corrupted, mask = drawn_within(clean, self._window(index), draw)
        pair = to_tensor([clean, corrupted])
        return TrainSample(
            pair[0], pair[1], torch.from_numpy(mask.astype(np.float32)[None]), variant * len(self) + index
        )


class EpochSampler:
    """Keys ``epoch * n + index`` in an order shuffled by (seed, epoch)."""

    def __init__(self, n: int, seed: int, epoch: int = 0):
        self.n, self.seed, self.epoch = n, seed, epoch

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for another epoch from the next iteration on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.n)
        return iter((self.epoch * self.n + order).tolist())

    def __len__(self) -> int:
        return self.n


def resolve_num_workers(num_workers: int, device: str | torch.device) -> int:
    """-1 becomes 0 on CPU (the cores compute) and a worker a core, eight at most, with CUDA."""
    if num_workers >= 0:
        return num_workers
    return min(8, os.cpu_count() or 1) if str(device).startswith("cuda") else 0


def _one_thread(worker_id: int) -> None:
    cv2.setNumThreads(1)


def training_loader(
    dataset: torch.utils.data.Dataset, sampler: Sized, batch_size: int, num_workers: int = 0, pin_memory: bool = False
) -> torch.utils.data.DataLoader:
    """Batches of one epoch in the sampler's order; ``loader.sampler.set_epoch(e)`` turns the same loader to another
    epoch.

    A last batch of a single image is dropped when there are others: batch normalisation cannot use it.
    """
    import torch

    return torch.utils.data.DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=len(sampler) > batch_size and len(sampler) % batch_size == 1,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # of its own: the run's random numbers do not depend on workers
        worker_init_fn=_one_thread,
        # a forked worker inherits OpenCV's thread pool without its threads and can wait for them for ever
        multiprocessing_context="spawn" if num_workers else None,
    )


# ------------------------------------------------------------------------------------------- preprocessing

PARTS = ("train", "validation", "test", "ground_truth")
MAX_SPREAD = 1.1
"""Of aspect ratios, the largest by the smallest; above it, stretched images are told to be unlike one another."""
SAVE_REPORT_EVERY = 200  # files: an interrupted run repeats at most so many


@dataclass(frozen=True)
class _Job:
    sources: tuple[Path, ...]  # an image, or all masks of one
    output: str  # below the destination, forward slashes
    image: Path | None = None  # for masks: the image that they belong to
    size: tuple[int, int] | None = None  # height and width before an earlier preprocessing drew grey bars

    def signature(self) -> list:
        """What must be unchanged for the output to be still right."""
        return [
            [str(path), path.stat().st_mtime_ns, path.stat().st_size] for path in (*self.sources, self.image) if path
        ]


def preprocess(
    settings: config.PreprocessSettings, progress: Callable[[Iterable, int], Iterable] = lambda items, total: items
) -> dict:
    """Resize a raw folder into the MVTec layout under ``settings.out``; returns the report that is also written there.

    Outputs that are already there, made from the same file with the same settings, are left alone; outputs of an
    earlier run that no longer belong are removed, so that no image stays in train/ after moving to test/.

    Args:
        settings: source, destination and size.
        progress: wraps the iterable of finished files, for a progress bar.

    Raises:
        InputError: unusable source or destination, which holds a file of the user's where one is to be written, or
            fewer than 3 good images could be read.
    """
    source, out = _source_and_out(settings)
    jobs, unread, warnings = _plan(source, settings)
    made_with = {"image_size": settings.image_size, "resize": settings.resize}
    valid, warnings_of_others = _made_before(out, str(source), made_with, {job.output for job in jobs})
    report = {
        "source": str(source),
        "made_with": made_with,
        "settings": config.as_dict(settings),
        "kept": [],
        "skipped": [],
        "warnings": warnings + warnings_of_others,
    }
    _save_report(out, report, valid)  # before anything is written over
    try:
        done = ahead(lambda job: _run_job(job, out, settings, valid), jobs, 32)
        for n_done, (_, result) in enumerate(progress(done, len(jobs)), 1):
            report["skipped" if "reason" in result else "kept"].append(result)
            report["warnings"] += result.get("warnings", [])
            if n_done % SAVE_REPORT_EVERY == 0:
                _save_report(out, report, valid)
    finally:
        _save_report(out, report, valid)
    for row in report["skipped"]:  # of a source that has become unreadable
        (out / row["output"]).unlink(missing_ok=True)
    report["skipped"] += [{"source": str(path), "reason": unread_reason(path)} for path in unread]
    if settings.resize == "stretch" and not any(job.size for job in jobs):  # those are square before
        report["warnings"] += _warn_of_aspects(report["kept"])
    report["counts"] = _count(report)
    _save_report(out, report, {})
    n_good = report["counts"].get("train/good", 0)
    if n_good < 3:
        raise config.InputError(
            f"Only {n_good} good training image(s) of {source} could be used; expected 3 or more (see "
            f"{out / REPORT_NAME})."
        )
    return report


def _made_before(out: Path, source: str, made_with: dict, planned: Set[str]) -> tuple[dict[str, dict], list[str]]:
    """The row of each planned output in the report of an earlier run, its signature None where it is to be made anew;
    and sentences on what the destination holds besides. What an earlier run made that no longer belongs is removed.

    Raises:
        InputError: a planned output is there and in no report; case does not tell files apart everywhere.
    """
    before = files.read_json(out / REPORT_NAME)
    written = {row["output"]: row for row in kept_rows(before)}
    made_soon, known = sorted(planned - written.keys()), {output.lower() for output in written}
    if own := [output for output in made_soon if output.lower() not in known and (out / output).exists()]:
        raise config.InputError(
            f"{out / own[0]} is there and in no report of preprocessing; expected another --out, or one without images."
        )
    if before.get("made_with") != made_with:  # none is right any more, but all stay known until they are made anew
        written = {output: {**row, "signature": None} for output, row in written.items()}
    warnings, removed = [], sorted(written.keys() - planned)
    if removed and (source_before := before.get("source", source)) != source:
        warnings.append(f"{len(removed)} files in {out}, made from {source_before}, are removed.")
    there = {path.relative_to(out).as_posix() for part in PARTS[:3] for path in files_under(out / part)}
    if others := sorted(there - written.keys() - planned):
        more = f" and {len(others) - 1} more" if others[1:] else ""
        warnings.append(f"{out / others[0]}{more}: not made by preprocessing, left there, and so part of the data set.")
    files.make_folder(out)
    for output in removed:
        (out / output).unlink(missing_ok=True)
    # what is made is listed before it is made, so that an interrupted run knows its own again
    valid = {output: {"output": output, "signature": None} for output in made_soon}
    return valid | {output: row for output, row in written.items() if output in planned}, warnings


def _source_and_out(settings: config.PreprocessSettings) -> tuple[Path, Path]:
    if len(settings.source) != 1:
        raise config.UsageError(f"{len(settings.source)} source folders were given; expected one.")
    source, out = Path(settings.source[0]), Path(settings.output_dir) / settings.out
    real_source, real_out = source.resolve(), out.resolve()
    inside = [real_source / name for name in PARTS]
    if real_source == real_out or any(real_out.is_relative_to(folder) for folder in inside):
        raise config.InputError(f"The output folder {out} lies in the source folder {source}; expected another place.")
    if settings.bad_dir and real_out.is_relative_to(Path(settings.bad_dir).resolve()):
        raise config.InputError(
            f"The output folder {out} lies in the folder of defective images {settings.bad_dir}; expected another "
            "place."
        )
    if any(real_source.is_relative_to(real_out / name) for name in PARTS):
        raise config.InputError(f"The source folder {source} lies in the output folder {out}; expected another place.")
    return source, out


def _plan(source: Path, settings: config.PreprocessSettings) -> tuple[list[_Job], list[Path], list[str]]:
    """Which file becomes which: images first, then the masks named after them; pictures that are not read; warnings."""
    folder = MVTecFolder(source, bad_dir=settings.bad_dir)
    masks, unread = {item.path: item.mask_paths for item in folder.test if item.mask_paths}, folder.unread
    bad, bad_dir = [], Path(settings.bad_dir)
    if settings.bad_dir:
        _check_bad_dir(bad_dir, folder)
        bad, unread = files_under(bad_dir), unread + unread_under(bad_dir)
        masks = masks_beside(bad)
    placed = _place_flat(folder, settings) if folder.flat else _place_mvtec(folder)
    of_images = set().union(*masks.values())
    for path in bad:
        if path not in of_images:
            placed[path] = f"test/defective/{path.relative_to(bad_dir).with_suffix('').as_posix()}"
    outputs = _unique_outputs(placed)
    jobs = [_Job((path,), output, size=folder.letterboxed.get(path)) for path, output in outputs.items()]
    for path, output in outputs.items():
        if path in masks:  # those of what is itself a mask are left out with it
            below = output.removeprefix("test/").removesuffix(".png")
            jobs.append(_Job(masks[path], f"ground_truth/{below}_mask.png", path, folder.letterboxed.get(path)))
    return jobs, unread, folder.warnings


def _check_bad_dir(bad_dir: Path, folder: MVTecFolder) -> None:
    if not folder.flat:
        raise config.UsageError(
            f"The source folder {folder.root} is in the MVTec layout, with its defective images in test/; expected a "
            "flat one with --bad-dir."
        )
    if not bad_dir.is_dir():
        raise config.InputError(f"The folder of defective images {bad_dir} does not exist.")
    if folder.root.resolve().is_relative_to(bad_dir.resolve()):
        raise config.InputError(
            f"The folder of defective images {bad_dir} holds the good ones of {folder.root} too; expected a folder of "
            "defective ones alone."
        )


def _place_mvtec(folder: MVTecFolder) -> dict[Path, str]:
    images = [*folder.train_good, *folder.validation_good, *(item.path for item in folder.test)]
    return {path: Path(folder.relative(path)).with_suffix("").as_posix() for path in images}


def _place_flat(folder: MVTecFolder, settings: config.PreprocessSettings) -> dict[Path, str]:
    good = folder.train_good
    firsts = first_copies(good)
    n = len(set(firsts))
    test = drawn_copies(firsts, max(min(round(settings.test_frac * n), n - 3), 0), settings.seed)
    if n < len(good):
        folder.warnings.append(
            f"{folder.root} holds {len(good) - n} copies of other images there, byte for byte; each is kept on its "
            "original's side of train/good and test/good."
        )
    return {path: f"{'test' if i in test else 'train'}/good/{path.stem}" for i, path in enumerate(good)}


def _unique_outputs(placed: dict[Path, str]) -> dict[Path, str]:
    """a.png and a.jpg become a_png.png and a_jpg.png; case does not tell files apart everywhere."""
    placed = {
        path: Path(place).with_name(files.short_stem(Path(place).name)).as_posix() for path, place in placed.items()
    }
    counts = Counter(place.lower() for place in placed.values())
    taken = {place for place, n in counts.items() if n == 1}
    outputs = {}
    for path, place in placed.items():
        if counts[place.lower()] > 1:
            place = f"{place}_{path.suffix.lower().lstrip('.')}"
            base, n = place, 2
            while place.lower() in taken:
                place, n = f"{base}_{n}", n + 1
            taken.add(place.lower())
        outputs[path] = f"{place}.png"
    return outputs


def _run_job(job: _Job, out: Path, settings: config.PreprocessSettings, valid: dict) -> dict:
    """Write one output unless it is still right; the row for the report."""
    row, warnings = {"source": str(job.sources[0]), "output": job.output}, []
    try:
        signature = job.signature()
        before = valid.get(job.output, {})
        if before.get("signature") == signature and "height" in before and (out / job.output).is_file():
            return before
        if job.image:
            whole = read_defects(job.sources, job.image, warn=warnings.append)
            pixels = fit_mask(whole, settings.image_size, settings.resize).astype(np.uint8) * 255
        else:
            whole = read_image(job.sources[0])
            pixels = fit_image(whole, settings.image_size, settings.resize)
    except ImageError as error:
        if job.image and Path(error.args[0]) == job.image:
            return {**row, "reason": f"belongs to an image that {error.reason}"}
        return {**row, "source": error.args[0], "reason": error.reason}
    except FileNotFoundError:
        return {**row, "reason": "is gone"}
    except OSError as error:
        return {**row, "reason": f"cannot be read ({error.strerror or error})"}
    write_png(out / job.output, pixels)
    height, width = job.size or whole.shape[:2]
    return {
        **row,
        "height": height,
        "width": width,
        "signature": signature,
        **({"warnings": warnings} if warnings else {}),
    }


def _save_report(out: Path, report: dict, valid: dict) -> None:
    """Rows of an earlier run that were not reached yet stay known."""
    reached = {row.get("output") for row in (*report["kept"], *report["skipped"])}
    later = [row for output, row in valid.items() if output not in reached]
    files.write_json(out / REPORT_NAME, {**report, "kept": report["kept"] + later})


def _warn_of_aspects(kept: list[dict]) -> list[str]:
    """A sentence on the images among the rows that were stretched, where their aspect ratios differ; or none."""
    ratios = [row["width"] / row["height"] for row in kept if not row["output"].startswith("ground_truth/")]
    if not ratios or max(ratios) <= MAX_SPREAD * min(ratios):
        return []
    return [
        f"The images are from {min(ratios):.2f} to {max(ratios):.2f} times as wide as high and are stretched to "
        "squares, so that the same part looks different in them; expected one aspect ratio, or --resize letterbox."
    ]


def _count(report: dict) -> dict[str, int]:
    counts = Counter(Path(*Path(row["output"]).parts[:2]).as_posix() for row in report["kept"])
    return {**dict(sorted(counts.items())), "skipped": len(report["skipped"])}


def main(settings: config.PreprocessSettings) -> None:
    """The preprocess stage: run, then say what happened."""
    from tqdm import tqdm

    report = preprocess(
        settings, lambda items, total: tqdm(items, total=total, desc="preprocess", unit="file", file=sys.stderr)
    )
    for sentence in report["warnings"]:
        print(f"warning: {sentence}", file=sys.stderr)
    for row in report["skipped"]:
        print(f"skipped: {row['source']} {row['reason']}.", file=sys.stderr)
    out = Path(settings.output_dir) / settings.out
    for place, n in report["counts"].items():
        print(f"{place:<32} {n:>6}")
    print(f"{out}: {settings.image_size} x {settings.image_size} px, {settings.resize}; details in {out / REPORT_NAME}")


if __name__ == "__main__":
    sys.exit(scripts.run_script(config.PreprocessSettings, "Resize a raw folder into the MVTec layout.", main))
