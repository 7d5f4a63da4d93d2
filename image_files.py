"""One image or mask: from a file to pixels and back, and to the network's square and back."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

import config
import files

MIN_SIDE_PX = 8
MAX_ASPECT = 50
MAX_PIXELS = 89_000_000  # just below the size from which Pillow warns of a decompression bomb
FAINTEST_LABEL = 32
"""Of masks of several levels, of 255: what is darker may be noise."""
LETTERBOX_GREY = 128
_PHONE_SUFFIXES = (".heic", ".heif", ".hif", ".jxl")
_RAW_SUFFIXES = (".arw", ".cr2", ".cr3", ".crw", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".sr2", ".srw")
UNREAD_SUFFIXES = _PHONE_SUFFIXES + _RAW_SUFFIXES
"""Pictures as telephones and cameras store them that no decoder here reads; of raw ones it would take the thumbnail."""
_TIFF_BITS, _TIFF_COMPRESSION, _TIFF_ZERO, _TIFF_PLANES = 258, 259, 262, 284
"""Tags: bits of each sample, 1 for no compression, 0 where 0 is white, 2 where colours lie apart."""
_EXIF_ORIENTATION = 0x0112
_HALF_TURNS = (2, 3, 4)
"""EXIF orientations of photographs stored mirrored or upside down, which have the height and width of the upright ones.
"""
_QUARTER_TURNS = (5, 6, 7, 8)
"""Those in which height and width are exchanged."""


class ImageError(files.FileError):
    """One image file cannot be used."""


# ------------------------------------------------------------------------------------- reading one file


def read_image(path: str | Path) -> np.ndarray:
    """The image as uint8 H x W x 3 RGB, whatever its format, but for those of UNREAD_SUFFIXES.

    Grey, palette and CMYK become RGB, 16 bits are scaled to 8, alpha is laid on white, the EXIF orientation is
    applied, of several frames the first is taken.

    Raises:
        ImageError: of UNREAD_SUFFIXES, empty, damaged, no image, over MAX_PIXELS, a side below MIN_SIDE_PX or an
            aspect ratio beyond MAX_ASPECT.
    """
    if reason := unread_reason(path):
        raise ImageError(path, reason)
    data = _read_bytes(path)
    size = _plain_size(data)
    if size:
        _check_size(path, *size)
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is not None and pixels.shape[:2] == size:
            return pixels
    return _decode(path, data, _to_rgb, _check_size)


def unread_reason(path: str | Path) -> str:
    """What ``read_image`` says is wrong with a picture of UNREAD_SUFFIXES; "" for other files."""
    suffix = Path(path).suffix.lower()
    if suffix not in UNREAD_SUFFIXES:
        return ""
    return f"is a picture in {suffix[1:].upper()} format, which is not read; expected it exported as JPEG or PNG"


def read_mask(path: str | Path) -> np.ndarray:
    """A defect mask as bool H x W: what is bright, or for masks of small labels (0, 1, 2 ...) and of fractions what is
    above 0; of labels beside bright ones (60, 180 ...), too, what touches no bright one.

    Of a mask in one colour alone the alpha channel counts; what is fully transparent beside what is not, is not marked.

    Raises:
        ImageError: empty, damaged or no image.
    """
    values = _decode(path, _read_bytes(path), _mask_values, _check_bomb)
    lossy = Path(path).suffix.lower() in (".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".jp2")
    bright = values > (127 if lossy or values.max() > 127 else 0)
    return bright if lossy else bright | _faint_labels(values, bright)


def _faint_labels(values: np.ndarray, bright: np.ndarray) -> np.ndarray:
    """Regions of a mask (H, W) of FAINTEST_LABEL and more that are flat somewhere, as what a JPEG left of one is not,
    and bright nowhere, as a soft rim is.
    """
    marked = values >= FAINTEST_LABEL
    if not (marked & ~bright).any():
        return np.zeros_like(bright)
    n, regions = cv2.connectedComponents(marked.astype(np.uint8), connectivity=8)
    box, is_faint = np.ones((3, 3), np.uint8), np.zeros(n, bool)
    is_faint[regions[cv2.erode(values, box) == cv2.dilate(values, box)]] = True
    is_faint[[0, *np.unique(regions[bright])]] = False
    return is_faint[regions]


def _mask_values(image) -> np.ndarray:
    """A loaded Pillow image of any mode -> H x W, larger where a mask marks more."""
    if image.mode == "F":
        return np.asarray(image) > 0
    colours = np.asarray(image.convert("RGB"))
    brightest = colours.max(axis=2)
    alpha = np.asarray(image.convert("RGBA"))[..., 3] if _has_alpha(image) else None
    if alpha is None or alpha.min() == alpha.max():
        return brightest
    return alpha if (colours == colours[0, 0]).all() else brightest * (alpha > 0)


def read_defects(
    mask_paths: Sequence[Path],
    image_path: Path,
    original_hw: tuple[int, int] | None = None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> np.ndarray:
    """All masks of an image in one, bool of the image's own height and width, ``original_hw`` where they are known.

    ``warn`` is told of a mask of another aspect ratio, which is stretched over the image, and of one of a photograph
    that its camera stored turned, where the shapes do not tell whether it was drawn on the upright one, as is assumed.

    Raises:
        ImageError: one of them, or the image, cannot be read, a mask lies across its image, or together they mark
            nothing.
    """
    original_hw = original_hw or read_image(image_path).shape[:2]
    orientation, square = _orientation(image_path), original_hw[0] == original_hw[1]
    keep_shape = (*_HALF_TURNS, *(_QUARTER_TURNS if square else ()))
    united = np.zeros(original_hw, bool)
    for path in mask_paths:
        mask = read_mask(path)
        if mask.shape == original_hw[::-1] and not square:
            mask = _turned_as(orientation, path, mask)
        elif orientation in keep_shape and _orientation(path) in (None, 1):
            warn(
                f"{image_path} was stored turned (EXIF orientation {orientation}) and its mask {path} was not; "
                "the mask is taken as drawn on the upright photograph."
            )
        if not _same_aspect(mask.shape, original_hw):
            warn(
                f"{path} is {mask.shape[1]} x {mask.shape[0]} px and its image {image_path} {original_hw[1]} x "
                f"{original_hw[0]} px; expected the same aspect ratio. The mask is stretched over the image."
            )
        united |= mask if mask.shape == original_hw else _resample_mask(mask, *original_hw)
    if not united.any():
        raise ImageError(mask_paths[0], "marks no pixel as defective")
    return united


def _same_aspect(one_hw: tuple[int, int], other_hw: tuple[int, int]) -> bool:
    """Whether one size can be the other, scaled, with each side off by less than a pixel."""
    return abs(one_hw[0] * other_hw[1] - one_hw[1] * other_hw[0]) < max(sum(one_hw), sum(other_hw))


def _orientation(path: Path) -> int | None:
    """The EXIF orientation that ``read_image`` applies to an image, 1 to 8; None where there is none.

    Raises:
        ImageError: the file cannot be read.
    """
    from PIL import Image

    data = _read_bytes(path)
    if _plain_size(data):
        return None
    with Image.open(io.BytesIO(data)) as image:  # as Pillow has read it before
        return image.getexif().get(_EXIF_ORIENTATION)


def _turned_as(orientation: int | None, path: Path, mask: np.ndarray) -> np.ndarray:
    """The mask of a photograph as its camera stored it, turned by the EXIF orientation of that."""
    turned = {5: mask.T, 6: np.rot90(mask, -1), 7: np.rot90(mask, 2).T, 8: np.rot90(mask)}
    if orientation not in turned:
        raise ImageError(
            path,
            f"is {mask.shape[1]} x {mask.shape[0]} px and lies across its image; expected {mask.shape[0]} x "
            f"{mask.shape[1]}",
        )
    return turned[orientation]


def _read_bytes(path: str | Path) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(path, f"cannot be read ({error.strerror or error})") from error
    if not data:
        raise ImageError(path, "is empty (0 bytes)")
    return data


def _check_bomb(path: str | Path, height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ImageError(path, f"is {width} x {height} px; expected {MAX_PIXELS // 10**6} megapixels at most")


def _check_size(path: str | Path, height: int, width: int) -> None:
    _check_bomb(path, height, width)
    if min(height, width) < MIN_SIDE_PX or max(height, width) > MAX_ASPECT * min(height, width):
        raise ImageError(
            path,
            f"is {width} x {height} px; expected sides of {MIN_SIDE_PX} px or more and an aspect ratio of "
            f"{MAX_ASPECT}:1 at most",
        )


def _plain_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of what OpenCV reads as it is meant, without transparency or orientation, else None."""
    return _plain_png_size(data) or _plain_jpeg_size(data)


def _plain_png_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an intact 8-bit grey, RGB or palette PNG without transparency or orientation, else None.

    The checksums are verified here because libpng, inside OpenCV, writes its own complaints to stderr.
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or len(data) < 45:
        return None
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", data[16:29])
    if depth != 8 or colour not in (0, 2, 3) or interlace:
        return None
    at, view, has_colours = 8, memoryview(data), colour != 3  # a palette image needs its PLTE chunk first
    while at + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        stop = at + 8 + length
        if kind in (b"tRNS", b"eXIf", b"acTL") or stop + 4 > len(data):
            return None
        if kind in (b"tEXt", b"zTXt", b"iTXt") and data.startswith(b"Raw profile type", at + 8):  # EXIF of old writers
            return None
        if zlib.crc32(view[at + 4 : stop]) != int.from_bytes(data[stop : stop + 4], "big"):
            return None
        has_colours |= kind == b"PLTE"
        if kind in (b"IDAT", b"IEND") and not has_colours:
            return None
        if kind == b"IEND":
            return height, width
        at = stop + 4
    return None


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a complete 8-bit grey or YCbCr JPEG without EXIF or Adobe marks, else None."""
    if data[:3] != b"\xff\xd8\xff" or not data[-64:].rstrip(b"\x00\r\n ").endswith(b"\xff\xd9"):
        return None
    at, size = 2, None
    while at + 9 < len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:
            return size
        if marker == 0xEE or (marker == 0xE1 and data[at + 4 : at + 8] == b"Exif"):
            return None
        if marker in (0xC0, 0xC1, 0xC2):
            depth, height, width, n_channels = struct.unpack(">BHHB", data[at + 4 : at + 10])
            if depth != 8 or n_channels not in (1, 3):
                return None
            size = height, width
        at += 2 + length
    return None


class _ValuesError(ValueError):
    """Pixels have values that are not known how to show."""


def _decode(path, data: bytes, convert: Callable, check: Callable) -> np.ndarray:
    """Everything odd goes through Pillow, which knows more formats and refuses damaged files."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            check(path, image.height, image.width)
            tags = getattr(image, "tag_v2", {})  # of a TIFF: those that Pillow leaves unheeded
            deep = max(tags.get(_TIFF_BITS, (0,))) == 16
            if deep and tags.get(_TIFF_PLANES) == 2 and tags.get(_TIFF_COMPRESSION, 1) == 1:
                raise ImageError(
                    path,
                    "holds uncompressed 16-bit colours in planes of their own; expected them side by side, or "
                    "compressed",
                )
            image.load()
            upright = ImageOps.exif_transpose(image)
            if deep and tags.get(_TIFF_ZERO) == 0 and upright.mode.startswith("I;16"):  # 0 is white
                upright = Image.fromarray(65535 - np.asarray(upright))
            return convert(upright)
    except config.InputError:
        raise
    except _ValuesError as error:
        raise ImageError(path, f"holds {error}") from None
    except UnidentifiedImageError:
        raise ImageError(path, "is not an image in a known format") from None
    except Image.DecompressionBombError:
        raise ImageError(path, f"is too large; expected {MAX_PIXELS // 10**6} megapixels at most") from None
    except Exception as error:  # the many decoders raise nearly anything on damaged bytes
        raise ImageError(
            path, f"is damaged ({' '.join(str(error).split()).rstrip('.') or type(error).__name__})"
        ) from None


def _to_rgb(image) -> np.ndarray:
    """A loaded Pillow image of any mode -> uint8 H x W x 3."""
    if image.mode.startswith("I") or image.mode == "F":
        return np.repeat(_to_8_bits(np.asarray(image), image.mode)[..., None], 3, axis=2)
    if _has_alpha(image):
        from PIL import Image

        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _has_alpha(image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    top = 1.0 if mode == "F" else 65535.0
    if not (low >= 0.0 and high <= top):
        raise _ValuesError(f"grey values from {low:g} to {high:g}; expected 0 to {top:g}")
    return np.rint(values.astype(np.float64) * (255.0 / top)).astype(np.uint8)


# ------------------------------------------------------------------------------- to the network's square


def _fit_box(height: int, width: int, image_size: int, resize: str) -> tuple[int, int, int, int]:
    """top, left, height, width of the picture inside the square."""
    if resize == "stretch":
        return 0, 0, image_size, image_size
    if resize != "letterbox":
        raise ValueError(f"resize is {resize!r}; expected 'stretch' or 'letterbox'.")
    scale = image_size / max(height, width)
    fitted_h, fitted_w = max(1, round(height * scale)), max(1, round(width * scale))
    return (image_size - fitted_h) // 2, (image_size - fitted_w) // 2, fitted_h, fitted_w


def _resample(pixels: np.ndarray, height: int, width: int, enlarge: int = cv2.INTER_LINEAR) -> np.ndarray:
    """Shrink by averaging, then enlarge: each axis gets the filter that suits it."""
    small = min(height, pixels.shape[0]), min(width, pixels.shape[1])
    if small != pixels.shape[:2]:
        pixels = cv2.resize(pixels, (small[1], small[0]), interpolation=cv2.INTER_AREA)
    return pixels if small == (height, width) else cv2.resize(pixels, (width, height), interpolation=enlarge)


def _tiled_size(height: int, width: int, image_size: int) -> tuple[int, int]:
    """Height and width at which an image is cut into tiles: its own, enlarged where a side is shorter than a tile."""
    scale = max(1.0, image_size / min(height, width))
    return max(image_size, round(height * scale)), max(image_size, round(width * scale))


def fit_image(image: np.ndarray, image_size: int, resize: str) -> np.ndarray:
    """uint8 H x W x 3 -> uint8 image_size x image_size x 3: stretched, or letterboxed with grey bars;
    whole for "tile"."""
    if resize == "tile":
        return np.ascontiguousarray(_resample(image, *_tiled_size(*image.shape[:2], image_size)))
    top, left, height, width = _fit_box(*image.shape[:2], image_size, resize)
    fitted = _resample(image, height, width)
    if (height, width) == (image_size, image_size):
        return np.ascontiguousarray(fitted)
    square = np.full((image_size, image_size, 3), LETTERBOX_GREY, np.uint8)
    square[top : top + height, left : left + width] = fitted
    return square


def _resample_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Half-covered pixels count; thin parts, that half cover no pixel nearby, count wherever they touch."""
    small = min(height, mask.shape[0]), min(width, mask.shape[1])
    covered = _resample(mask.astype(np.float32), *small)
    solid = covered >= 0.5
    near_solid = cv2.dilate(solid.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    kept = solid | ((covered > 1e-6) & ~near_solid)
    # centres on centres as images are enlarged, which INTER_NEAREST would leave up to half a pixel behind
    return _resample(kept.astype(np.uint8), height, width, cv2.INTER_NEAREST_EXACT) > 0


def fit_mask(mask: np.ndarray, image_size: int, resize: str) -> np.ndarray:
    """A mask of an image's own size, bool H x W, true where defective -> bool as ``fit_image`` sizes the image, without
    losing thin defects.
    """
    if resize == "tile":
        return _resample_mask(mask, *_tiled_size(*mask.shape, image_size))
    top, left, height, width = _fit_box(*mask.shape, image_size, resize)
    square = np.zeros((image_size, image_size), bool)
    square[top : top + height, left : left + width] = _resample_mask(mask, height, width)
    return square


def unfit_map(defect_map: np.ndarray, original_hw: tuple[int, int], resize: str) -> np.ndarray:
    """A float map as ``fit_image`` sizes the image -> float32 of the original height and width, bars cut off."""
    inside = defect_map[picture_window(original_hw, defect_map.shape[0], resize)]
    return _resample(np.ascontiguousarray(inside, dtype=np.float32), *original_hw)


def picture_window(original_hw: tuple[int, int], image_size: int, resize: str) -> tuple[slice, slice]:
    """Rows and columns that the image itself takes of what ``fit_image`` makes of it: all but grey bars."""
    if resize == "tile":
        return slice(None), slice(None)
    top, left, height, width = _fit_box(*original_hw, image_size, resize)
    return slice(top, top + height), slice(left, left + width)


# ------------------------------------------------------------------------------------- writing one file


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 H x W or H x W x 3 RGB, whole or not at all, making the folder."""
    _, data = cv2.imencode(".png", pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    files.write_whole(path, data.tobytes())
