"""Which images and masks are where: files, folders and globs, data sets in the MVTec layout or flat, good images held
out.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import config
import files
from image_files import UNREAD_SUFFIXES, ImageError, fit_mask, read_defects

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".jfif", ".gif", ".jp2", ".avif")
REPORT_NAME = "preprocess_report.json"
MASK_ENDINGS = ("_mask", "_gt", "_label")
"""Of a stem beside the image of that stem, in any case: a mask of it."""


# --------------------------------------------------------------------------------------- finding images


def files_under(folder: Path, deep: bool = True, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[Path]:
    """Files with such a suffix, sorted; hidden files and folders are left out, linked folders followed once."""
    found, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        folders[:] = [] if real in seen or not deep else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            found += [
                Path(where, name) for name in names if name.lower().endswith(suffixes) and not name.startswith(".")
            ]
        seen.add(real)
    return sorted(filter(is_readable_kind, found), key=lambda path: path.as_posix())


def is_readable_kind(path: Path) -> bool:
    """True for files and for broken links, which the reader reports; False for named pipes, on which reading blocks."""
    return path.is_file() or not path.exists()


def find_images(inputs: str | Path | Sequence[str | Path], outputs: Sequence[Path] = ()) -> list[Path]:
    """Images as ``find_files`` finds them, sorted; those of UNREAD_SUFFIXES too, whose reader says what is wrong."""
    found = find_files(inputs, outputs, IMAGE_SUFFIXES + UNREAD_SUFFIXES)
    return sorted(_without_twins(found), key=lambda path: path.as_posix())


def unread_under(folder: Path, deep: bool = True) -> list[Path]:
    """Pictures of UNREAD_SUFFIXES as ``files_under`` finds them, but those beside a readable one of their name: cameras
    store both.
    """
    if not files_under(folder, deep, UNREAD_SUFFIXES):  # as nearly everywhere: no other file need be looked at
        return []
    found = _without_twins(files_under(folder, deep, IMAGE_SUFFIXES + UNREAD_SUFFIXES))
    return [path for path in found if path.suffix.lower() in UNREAD_SUFFIXES]


def _without_twins(paths: Sequence[Path]) -> list[Path]:
    readable = {path.with_suffix("") for path in paths if path.suffix.lower() not in UNREAD_SUFFIXES}
    return [p for p in paths if p.suffix.lower() not in UNREAD_SUFFIXES or p.with_suffix("") not in readable]


def find_files(
    inputs: str | Path | Sequence[str | Path],
    outputs: Sequence[Path] = (),
    suffixes: tuple[str, ...] = IMAGE_SUFFIXES,
    what: str = "image",
) -> list[Path]:
    """Files with such a suffix named by files, folders (recursive) and globs: in the order of the inputs, without
    duplicates or hidden files.

    A file named outright is kept whatever its suffix, so that its reader can say what is wrong with it.

    Args:
        outputs: folders that are written; what an input finds in them is left out, unless it lies in them itself.
        what: the files, as a message calls one.

    Raises:
        InputError: an input does not exist or is an empty path, which would be the current folder; or nothing was
            found.
    """
    inputs = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    written = [os.path.join(os.path.realpath(folder), "") for folder in outputs]  # noqa: PTH118 (ends in a separator)
    found: dict[str, Path] = {}
    for given in inputs:
        if not str(given):
            raise config.InputError("An input is an empty path; expected a file, a folder or a glob.")
        here = os.path.join(os.path.realpath(given), "")  # noqa: PTH118
        left_out = tuple(folder for folder in written if not here.startswith(folder))
        for path in _expand(given, suffixes, what):
            real = os.path.realpath(path)
            if not real.startswith(left_out):
                found.setdefault(real, path)
    if not found:
        raise config.InputError(
            f"No {what} found in {', '.join(map(str, inputs)) or 'an empty list'}; expected files ending in "
            f"{', '.join(suffix for suffix in suffixes if suffix not in UNREAD_SUFFIXES)}."
        )
    return list(found.values())


def _expand(given: str | Path, suffixes: tuple[str, ...], what: str) -> list[Path]:
    path = Path(given)
    if path.is_dir():
        return files_under(path, suffixes=suffixes)
    if path.exists() or path.is_symlink():  # of a broken link its reader says what is wrong
        return [path]
    if not glob.has_magic(str(given)):
        raise config.InputError(f"{given} does not exist; expected an {what}, a folder or a glob.")
    found: list[Path] = []
    for match in map(Path, sorted(glob.glob(str(given), recursive=True))):  # noqa: PTH207 (absolute patterns)
        if match.is_dir():
            found += files_under(match, suffixes=suffixes)
        elif match.name.lower().endswith(suffixes) and is_readable_kind(match):
            found.append(match)
    return found


# -------------------------------------------------------------------------------------------- data sets


def is_flat(root: Path) -> bool:
    """Whether a folder is one of good images, without train/good and test/."""
    return not _is_sorted_out(root) and bool(files_under(root, deep=False))


def _is_sorted_out(root: Path) -> bool:
    """Whether a folder has the MVTec layout's train/good or test/."""
    return (root / "train" / "good").is_dir() or (root / "test").is_dir()


def masks_beside(paths: Sequence[Path]) -> dict[Path, tuple[Path, ...]]:
    """Of images among the paths, those with masks beside them: files of their stem and one of MASK_ENDINGS."""
    images = {(path.parent, path.stem): path for path in paths}
    found: dict[Path, tuple[Path, ...]] = {}
    for path in paths:
        for ending in MASK_ENDINGS:
            image = images.get((path.parent, path.stem[: -len(ending)]))
            if image and path.stem.lower().endswith(ending):
                found[image] = (*found.get(image, ()), path)
    return found


class MVTecItem(NamedTuple):
    path: Path
    category: str
    mask_paths: tuple[Path, ...]  # which together mark its defects; none for a good image, or where there are none


class MVTecFolder:
    """What a data set holds; nothing is decoded.

    Attributes:
        root: its folder.
        flat: true for one folder of good images without train/ and test/.
        train_good: the good training images.
        validation_good: good images in validation/good, none in most data sets; where there are some, ``split`` holds
            them out.
        test: MVTecItem(path, category, mask_paths), sorted by category and path.
        categories: names of the test folders that hold images, "good" first.
        unread: pictures of UNREAD_SUFFIXES where images are looked for, which are left out.
        letterboxed: height and width before ``data_loader.preprocess`` of images in whose files it drew grey bars.
        warnings: sentences on what looks wrong but does not stop the work.

    Args:
        bad_dir: beside a flat folder of good images, or in it, the one of defective images, which are not missed.

    Raises:
        InputError: no such folder, no train/good, or fewer than 3 images in it (``require_train=False``: no test
            images).
    """

    def __init__(self, root: str | Path, require_train: bool = True, bad_dir: str = ""):
        self.root = Path(root)
        self.warnings: list[str] = []
        if not self.root.is_dir():
            wrong = "is a file" if self.root.exists() else "does not exist"
            raise config.InputError(
                f"The data folder {root} {wrong}; expected a folder with train/good, or one of good images."
            )
        good = self.root / "train" / "good"
        self.flat = is_flat(self.root)
        self.train_good = self._find_flat() if self.flat else files_under(good)
        self.validation_good = [] if self.flat else self._find_validation()
        self.test = [] if self.flat else self._find_test()
        if self.flat:
            self._warn_of_deeper(bad_dir)
        self.unread = self._find_unread()
        self.categories = sorted({item.category for item in self.test}, key=lambda name: (name != "good", name))
        self.letterboxed = _letterboxed(self.root)
        self._check(good, require_train)

    def _check(self, good: Path, require_train: bool) -> None:
        unread = (
            f" {len(self.unread)} picture(s) there are in formats that are not read; expected JPEG or PNG."
            if self.unread
            else ""
        )
        if require_train and not self.flat and not good.is_dir():
            raise config.InputError(f"{self.root} has no folder train/good{self._instead_of_train_good()}{unread}")
        if require_train and len(self.train_good) < 3:
            where = self.root if self.flat else good
            raise config.InputError(
                f"{where} holds {len(self.train_good)} image(s); expected 3 or more good ones.{unread}"
            )
        if not require_train:
            self.require_test()

    def _instead_of_train_good(self) -> str:
        """What there is in a folder without train/good, and what was expected, as the end of a sentence."""
        n_folders = 0 if _is_sorted_out(self.root) else len({path.parent for path in files_under(self.root)})
        if not n_folders:
            return "; expected the good training images there."
        return (
            f", but {n_folders} sub-folder(s) that hold images; put those of good parts into train/good, where "
            "sub-folders are kept, or give data_loader.py the folder of them (and one of bad parts as --bad-dir)."
        )

    def split(self, good: Sequence[Path], holdout_frac: float, seed: int) -> tuple[list[Path], list[Path]]:
        """Good images of train/good as (training, held out): all of them and what lies in validation/good, or, where
        nothing does, as ``split_holdout`` says and raises.
        """
        return (list(good), self.validation_good) if self.validation_good else split_holdout(good, holdout_frac, seed)

    def require_test(self) -> None:
        """Nothing where there are test images.

        Raises:
            InputError: there are none.
        """
        if not self.test:
            raise config.InputError(
                f"{self.root} has no images in test/<category>/; expected test/good and a folder for each kind of "
                "defect."
            )

    def _find_flat(self) -> list[Path]:
        found = files_under(self.root, deep=False)
        masks = list(itertools.chain(*masks_beside(found).values()))
        if masks:
            self.warnings.append(
                f"{self.root} holds {len(masks)} mask(s) beside the images that they are named after "
                f"({masks[0].name}{', ...' if masks[1:] else ''}); they are left out."
            )
        return sorted(set(found).difference(masks), key=lambda path: path.as_posix())

    def _find_unread(self) -> list[Path]:
        if _is_sorted_out(self.root):
            parts = [self.root / "train" / "good", self.root / "validation" / "good", self.root / "test"]
            unread = [path for part in parts for path in unread_under(part)]
        else:
            unread = unread_under(self.root, deep=False)
        if unread:
            self.warnings.append(
                f"{self.root} holds {len(unread)} picture(s) in formats that are not read "
                f"({self.relative(unread[0])}{', ...' if unread[1:] else ''}); they are left out, expected them "
                "exported as JPEG or PNG."
            )
        return unread

    def _find_validation(self) -> list[Path]:
        folder = self.root / "validation" / "good"
        images = files_under(folder)
        if folder.is_dir() and not images:
            self.warnings.append(f"{folder} holds no images; some of train/good are held out.")
        return images

    def _warn_of_deeper(self, bad_dir: str) -> None:
        bad = {os.path.realpath(path) for path in files_under(Path(bad_dir))} if bad_dir else set()
        n_deeper = sum(
            path.parent != self.root and os.path.realpath(path) not in bad for path in files_under(self.root)
        )
        if n_deeper:
            self.warnings.append(f"{self.root} holds {n_deeper} image(s) in folders below it; they are left out.")

    def _find_test(self) -> list[MVTecItem]:
        test = self.root / "test"
        folders = (
            sorted(path for path in test.iterdir() if path.is_dir() and not path.name.startswith("."))
            if test.is_dir()
            else []
        )
        if test.is_dir() and files_under(test, deep=False):
            self.warnings.append(f"{test} holds images outside any category folder; they are left out.")
        items = []
        for folder in folders:
            images = files_under(folder)
            masks, others = (
                ({}, [])
                if folder.name == "good"
                else _match_masks(images, folder, self.root / "ground_truth" / folder.name)
            )
            items += [MVTecItem(path, folder.name, masks.get(path, ())) for path in images]
            if folder.name != "good" and folder.name.lower() == "good":
                self.warnings.append(f"{folder} counts as a kind of defect; expected good images in {test / 'good'}.")
            if not images:
                self.warnings.append(f"{folder} holds no images.")
            elif others:
                self.warnings.append(
                    f"ground_truth/{folder.name} holds {len(others)} mask(s) that are named after no image of "
                    f"test/{folder.name}, or after several "
                    f"({self.relative(others[0])}{', ...' if len(others) > 1 else ''}); they are left out."
                )
        if any(item.mask_paths for item in items):
            unmasked = [item for item in items if item.category != "good" and not item.mask_paths]
            self.warnings += [
                f"{self.relative(item.path)} has no mask in ground_truth/{item.category}; it is left out of pixel "
                "metrics."
                for item in unmasked
            ]
        return items

    def relative(self, path: str | Path) -> str:
        """The path below the root, with forward slashes."""
        return Path(path).relative_to(self.root).as_posix()


def _match_masks(
    images: list[Path], folder: Path, mask_folder: Path
) -> tuple[dict[Path, tuple[Path, ...]], list[Path]]:
    """The masks of each image, and those that belong to none.

    A mask is called <stem>_mask, or that with an ending (an image may have several), <stem>, or <stem> with another
    ending, or anything in a folder <stem>; of these kinds, an image takes the first that there is.
    """
    named: dict[str, list[Path]] = {}
    for image in images:
        named.setdefault(image.stem, []).append(image.relative_to(folder))
    places = {image.parent for same in named.values() for image in same}
    found: dict[Path, dict[int, list[Path]]] = {}
    masks = files_under(mask_folder)
    for mask in masks:
        image, kind = _image_of(mask.relative_to(mask_folder), named, places)
        if image:
            found.setdefault(folder / image, {}).setdefault(kind, []).append(mask)
    taken = {image: tuple(kinds[min(kinds)]) for image, kinds in found.items()}
    return taken, sorted(set(masks).difference(*taken.values()))


def _image_of(mask: Path, named: dict[str, list[Path]], places: set[Path]) -> tuple[Path | None, int]:
    """The one image that a mask is named after, and how (0 surely, 1 by the bare stem, 2 by another ending); all paths
    are relative.

    In a sub-folder that the images have too, it can only be an image there; the longest name counts: 1_2_gt belongs to
    image 1_2, not to image 1.
    """
    home = next((place for place in mask.parents if place in places and place != Path()), None)
    if mask.parent not in places:
        whole = [image for image in named.get(mask.parent.name, []) if image.parent == mask.parent.parent]
        if whole:
            return (whole[0], 0) if len(whole) == 1 else (None, 0)
    for length in range(len(mask.stem), 0, -1):
        ending = mask.stem[length:]
        near = [image for image in named.get(mask.stem[:length], []) if home in (None, image.parent)]
        if near and ending[:1] in ("", "_", "-", "."):
            here = [image for image in near if image.parent == Path()] or near
            return here[0] if len(here) == 1 else None, 0 if ending.startswith("_mask") else 2 if ending else 1
    return None, 0


def read_truth(
    item: MVTecItem,
    image_size: int,
    resize: str,
    map_hw: tuple[int, int],
    warn: Callable[[str], None],
    original_hw: tuple[int, int] | None = None,
) -> np.ndarray | None:
    """Ground truth of a test image, bool of its map's height and width: all False for a good image, None where a defect
    has no mask.

    Masks that ``read_defects`` refuses are none either; ``warn`` is told so, and what that warns of. The image is read
    for its own height and width where they are not given.
    """
    if item.category == "good":
        return np.zeros(map_hw, bool)
    if not item.mask_paths:
        return None
    try:
        return fit_mask(read_defects(item.mask_paths, item.path, original_hw, warn), image_size, resize)
    except ImageError as error:
        warn(f"{error} Its image is left out of pixel metrics.")
        return None


def split_holdout(n_or_paths: int | Sequence[Path], holdout_frac: float, seed: int) -> tuple[list, list]:
    """Split good images by seed into (training, held out), each in the order given; copies of a file stay together.

    Held out are ``max(round(frac * n), min(19, floor(0.4 * n)))`` of n without copies, at least 1, leaving at least 2:
    19 is the fewest with which a false-alarm rate of 5 % can be promised.

    Raises:
        InputError: fewer than 3 images that are no copies.

    >>> [len(part) for part in split_holdout(110, 0.2, seed=0)]
    [88, 22]
    >>> [len(part) for part in split_holdout(48, 0.2, seed=0)]
    [29, 19]
    """
    items = list(range(n_or_paths)) if isinstance(n_or_paths, int) else list(n_or_paths)
    firsts = items if isinstance(n_or_paths, int) else first_copies(items)
    n = len(set(firsts))
    if n < 3:
        also = f" and {len(items) - n} copies" if n < len(items) else ""
        raise config.InputError(
            f"There are {n} usable good image(s){also}; expected 3 or more, of which one is held out."
        )
    n_held = min(max(round(holdout_frac * n), min(19, int(0.4 * n)), 1), n - 2)
    held = drawn_copies(firsts, n_held, seed)
    return [item for i, item in enumerate(items) if i not in held], [items[i] for i in sorted(held)]


def first_copies(paths: Sequence[Path]) -> list[int]:
    """For each file the index of the first one of the same bytes: its own, but for copies.

    Files that are empty or cannot be read are no copies; their reader says what is wrong with them.
    """
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
    alike = Counter(sizes)
    firsts: dict[bytes | int, int] = {}
    contents = (_digest(path) if size and alike[size] > 1 else b"" for path, size in zip(paths, sizes, strict=True))
    return [firsts.setdefault(content or index, index) for index, content in enumerate(contents)]


def _digest(path: Path) -> bytes:
    """Of a file's bytes; empty where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return b""


def drawn_copies(firsts: Sequence[int], n_drawn: int, seed: int) -> set[int]:
    """Indices of ``n_drawn`` files drawn at random, and of their copies, as ``first_copies`` knows them."""
    distinct = sorted(set(firsts))
    drawn = {distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))[:n_drawn]}
    return {i for i, first in enumerate(firsts) if first in drawn}


# ---------------------------------------------------------------------------- the report of preprocessing


def preprocessed_by(root: str | Path) -> tuple[str, int]:
    """How ``data_loader.preprocess`` made the images of a data set square, "stretch" or "letterbox", and of which side
    in px, as its report has it; "" and 0 where there is none.
    """
    return _made_with(files.read_json(Path(root) / REPORT_NAME))


def _made_with(report: dict) -> tuple[str, int]:
    match report.get("made_with"):
        case {"resize": str(resize), "image_size": int(side)}:
            return resize, side
    return "", 0


def _letterboxed(root: Path) -> dict[Path, tuple[int, int]]:
    """``MVTecFolder.letterboxed``, from the report of preprocessing; empty where that was not by letterbox, or an
    earlier version's.
    """
    report = files.read_json(root / REPORT_NAME)
    if _made_with(report)[0] != "letterbox":
        return {}
    made = (row for row in kept_rows(report) if row.get("signature", "") is not None)  # others are made anew yet
    sizes = ((root / row["output"], (row.get("height"), row.get("width"))) for row in made)
    return {path: size for path, size in sizes if all(isinstance(side, int) and side > 0 for side in size)}


def kept_rows(report: dict) -> list[dict]:
    """The rows of a report on what was written, without what is no such row or names no file in the set's folders."""
    rows = report.get("kept")
    return (
        [row for row in rows if isinstance(row, dict) and _is_inside(row.get("output"))]
        if isinstance(rows, list)
        else []
    )


def _is_inside(output: object) -> bool:
    """Whether it is a path as ``train/good/a.png``: a deletion must not follow one that leads elsewhere."""
    if not isinstance(output, str) or "\0" in output:
        return False
    path = Path(output)
    return len(path.parts) >= 3 and not path.is_absolute() and ".." not in path.parts
