"""Synthetic defects drawn on good images: scratches, paint, stains, dents, pasted patches, missing texture.

A network that only ever saw good images can be taught to repair by showing it a damaged copy and asking for
the original (denoising; the idea of pasting real texture is CutPaste, Li et al. 2021; of noise-shaped
blends, DRAEM, Zavrtanik et al. 2021). Everything is drawn inside a small box, so the cost follows the size of
the defect and not that of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

VISIBLE_LEVELS = 6  # a pixel belongs to the mask when a channel moved by this much, of 255
PEAK_LEVELS = 10  # a defect whose strongest pixel moved by less is drawn again
CONTRAST_LEVELS = (12.0, 110.0)  # log-uniform: median about 36 levels, few strong ones
ATTEMPTS = 6
APART_PX = 4
AREA_FRAC = (0.0002, 0.02)
SMALLEST_SIDE_PX = 16
SMALLEST_PX = 16.0
"""Area below which nothing is aimed at: on small images a smaller defect could not be told from noise."""


class _Patch(NamedTuple):
    top: int
    left: int
    pixels: np.ndarray  # float32 h x w x 3, on the 0..255 scale


def draw_defect(
    image: np.ndarray,
    rng: np.random.Generator,
    donors: Sequence[np.ndarray] = (),
    area_frac: tuple[float, float] = AREA_FRAC,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one defect (now and then a group of two or three) anywhere on a copy of the image.

    Args:
        image: uint8 H x W x 3 RGB, sides of SMALLEST_SIDE_PX or more; left untouched.
        rng: the only source of chance, so that equal generators give equal defects.
        donors: other uint8 H x W x 3 images from which patches may be cut; without any they come from ``image``.
        area_frac: smallest and largest area aimed at, as a share of the image, log-uniform between them; at least
            SMALLEST_PX.

    Returns:
        The damaged copy, and a bool H x W mask of the pixels that changed by VISIBLE_LEVELS or more; never empty.

    Raises:
        ValueError: wrong dtype, shape or area.
    """
    _check(image, area_frac)
    n_pixels = image.shape[0] * image.shape[1]
    low, high = (max(frac * n_pixels, SMALLEST_PX) for frac in area_frac)
    area_px = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    n_parts = 1 if rng.random() < 0.8 else int(rng.integers(2, 4))
    damaged = image.copy()
    for _ in range(n_parts):
        _draw_visible(damaged, max(area_px / n_parts, 3.0), rng, donors)
    mask = _changed(image, damaged) >= VISIBLE_LEVELS
    if not mask.any():  # parts that cancel each other out, or an area below a pixel
        _invert_spot(damaged, rng)
        mask = _changed(image, damaged) >= VISIBLE_LEVELS
    return damaged, mask


def draw_defects(
    image: np.ndarray, rng: np.random.Generator, donors: Sequence[np.ndarray], n: int
) -> tuple[np.ndarray, np.ndarray]:
    """At most ``n`` of ``draw_defect`` on one copy of the image, each at least APART_PX from the others: one that is
    not is left out.
    """
    damaged, mask = image, np.zeros(image.shape[:2], bool)
    for _ in range(n):
        further, there = draw_defect(damaged, rng, donors)
        if not (there & (cv2.dilate(mask.astype(np.uint8), np.ones((2 * APART_PX + 1,) * 2, np.uint8)) > 0)).any():
            damaged, mask = further, mask | there
    return damaged, mask


def _check(image: np.ndarray, area_frac: tuple[float, float]) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < SMALLEST_SIDE_PX:
        raise ValueError(
            f"image is {image.dtype} {image.shape}; expected uint8 H x W x 3 with sides of {SMALLEST_SIDE_PX} px or "
            "more."
        )
    if not 0 < area_frac[0] <= area_frac[1] <= 0.5:
        raise ValueError(f"area_frac is {area_frac}; expected 0 < smallest <= largest <= 0.5.")


def _changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Largest change over the channels, uint8 H x W."""
    difference = cv2.absdiff(before, after)
    return cv2.max(cv2.max(difference[..., 0], difference[..., 1]), difference[..., 2])


def _draw_visible(image: np.ndarray, area_px: float, rng: np.random.Generator, donors: Sequence[np.ndarray]) -> None:
    """Draw in place, choosing again while the result cannot be seen (a white scratch on white)."""
    for attempt in range(ATTEMPTS):
        contrast = float(np.exp(rng.uniform(*np.log(CONTRAST_LEVELS)))) * (1.0 + 0.5 * attempt)
        draw = _KINDS[int(np.searchsorted(_SHARES, rng.random(), side="right"))]
        patch = draw(image, area_px, contrast, rng, donors)
        height, width = patch.pixels.shape[:2]
        there = image[patch.top : patch.top + height, patch.left : patch.left + width]
        drawn = np.clip(np.rint(patch.pixels), 0, 255).astype(np.uint8)
        if _changed(there, drawn).max() >= PEAK_LEVELS:
            there[:] = drawn
            return


def _invert_spot(image: np.ndarray, rng: np.random.Generator) -> None:
    top, left, spot = _box(image, 2, 2, rng)
    image[top : top + 2, left : left + 2] = np.where(spot > 127, spot - 60, spot + 60).astype(np.uint8)


# ------------------------------------------------------------------------------------- shapes and noise


def _box(image: np.ndarray, height: float, width: float, rng: np.random.Generator) -> tuple[int, int, np.ndarray]:
    """A box of about that size inside the image: top, left, and its pixels as float32."""
    height, width = (
        min(int(np.ceil(side)), limit) for side, limit in zip((height, width), image.shape[:2], strict=True)
    )
    top = int(rng.integers(0, image.shape[0] - height + 1))
    left = int(rng.integers(0, image.shape[1] - width + 1))
    return top, left, image[top : top + height, left : left + width].astype(np.float32)


def _noise(height: int, width: int, cells: float, rng: np.random.Generator, octaves: int = 2) -> np.ndarray:
    """Smooth value noise in about [-1, 1], float32 h x w, ``cells`` bumps along the longer side."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        n = cells * 2**octave
        longest = max(height, width)
        grid = rng.uniform(-1, 1, (max(2, round(n * height / longest) + 1), max(2, round(n * width / longest) + 1)))
        total += cv2.resize(grid.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC) / 2**octave
    return total


def _blob_box(image: np.ndarray, area_px: float, rng: np.random.Generator, softness: float):
    """A box with an irregular blob of about that area in it: top, left, pixels, alpha in [0, 1]."""
    stretch = float(np.exp(rng.normal(0.0, 0.45)))
    side = np.sqrt(area_px / 0.4)
    top, left, pixels = _box(image, max(side * stretch, 4), max(side / stretch, 4), rng)
    height, width = pixels.shape[:2]
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)[None]
    field = 1.0 - np.sqrt(x * x + y * y) + rng.uniform(0.1, 0.4) * _noise(height, width, rng.uniform(2, 5), rng)
    ranked = np.sort(field, axis=None)
    level = ranked[int((1.0 - min(area_px / field.size, 0.45)) * (field.size - 1))]
    ramp = max(softness * float(ranked[-1] - level), 1.5 / max(height, width))
    alpha = np.clip((field - level) / ramp + 0.25, 0.0, 1.0)
    if min(height, width) > 6:  # a soft blob must close before its box does
        alpha = alpha * np.clip((1.0 - np.maximum(np.abs(y), np.abs(x))) / 0.2, 0.0, 1.0)
    return top, left, pixels, alpha


def _tint(rng: np.random.Generator, amount: float) -> np.ndarray:
    """Three factors around 1: a colour cast."""
    return (1.0 + amount * rng.uniform(-1, 1, 3)).astype(np.float32)


def _sign(pixels: np.ndarray, rng: np.random.Generator) -> float:
    """Brighter or darker, leaning to the side where there is room."""
    return -1.0 if rng.random() < 0.25 + 0.5 * float(pixels.mean()) / 255 else 1.0


def _shading(height_map: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light from the side on a relief: its slope towards a random direction, scaled to a peak of 1."""
    angle = rng.uniform(0, 2 * np.pi)
    smooth = cv2.GaussianBlur(height_map, (0, 0), max(0.6, 0.06 * max(height_map.shape)))
    slope = np.cos(angle) * cv2.Sobel(smooth, cv2.CV_32F, 1, 0) + np.sin(angle) * cv2.Sobel(smooth, cv2.CV_32F, 0, 1)
    return slope / (float(np.abs(slope).max()) + 1e-6)


def _blend(pixels: np.ndarray, other: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return pixels + alpha[..., None] * (other - pixels)


# ------------------------------------------------------------------------------------------------ kinds


def _strand(origin: np.ndarray, angle: float, length: float, bend: float, rng: np.random.Generator) -> np.ndarray:
    """Points (x, y) of a line that wanders: about ``length`` long, from ``origin``."""
    n = 20
    turns = angle + np.cumsum(rng.normal(0, bend, n)) + rng.normal(0, 0.5 * bend) * np.arange(n)
    steps = np.stack([np.cos(turns), np.sin(turns)], 1) * (length / n)
    return np.concatenate([origin[None], origin + np.cumsum(steps, 0)])


def _scratch_lines(length: float, width_px: float, n_strands: int, rng: np.random.Generator) -> np.ndarray:
    """Coverage in [0, 1], float32 h x w, of the strands of a scratch on a canvas of its own."""
    angle, bend = rng.uniform(0, 2 * np.pi), rng.choice([0.0, 0.04, 0.1, 0.2])
    strands = []
    for _ in range(n_strands):
        origin = rng.normal(0, 0.08 * length, 2) if strands else np.zeros(2)
        share = 1.0 if not strands else rng.uniform(0.3, 0.9)
        strands.append(_strand(origin, angle + rng.normal(0, 0.12), length * share, bend, rng))
    points = np.concatenate(strands)
    margin = 2.0 * width_px + 3.0
    low = points.min(0) - margin
    size = np.ceil(points.max(0) + margin - low).astype(int)
    scale = 4 if size.max() <= 128 else 2
    canvas = np.zeros((size[1] * scale, size[0] * scale), np.uint8)
    for strand in strands:
        at = np.rint((strand - low + rng.uniform(0, 0.5, 2)) * scale * 16).astype(np.int32)
        cv2.polylines(canvas, [at], False, 255, max(1, round(width_px * scale)), cv2.LINE_AA, shift=4)
    return cv2.resize(canvas, (size[0], size[1]), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _scratch(image, area_px, contrast, rng, donors) -> _Patch:
    """A thin line or a bundle, bright or dark, fading in and out, some with a lit or shaded edge."""
    side = max(image.shape[:2])
    width_px = float(np.exp(rng.uniform(np.log(0.5), np.log(2.5)))) * max(side / 256, 0.75)
    n_strands = int(rng.choice([1, 1, 1, 2, 2, 3]))
    area_px = min(area_px, 4 * 0.5 * side * (width_px + 0.7))  # a scratch stays thin: the largest areas are not reached
    n_strands = max(n_strands, int(np.ceil(area_px / (0.5 * side * (width_px + 0.7)))))
    length = max(area_px / (width_px + 0.7) / (1 + 0.6 * (n_strands - 1)) * 0.8, 5.0)
    line = _scratch_lines(length, width_px, n_strands, rng)
    top, left, pixels = _box(image, *line.shape, rng)
    height, width = pixels.shape[:2]
    line = line[:height, :width]
    line = line * np.clip(0.85 + 0.5 * _noise(height, width, 4, rng, 1), 0.15, 1.0)
    levels = _sign(pixels, rng) * contrast * _tint(rng, 0.15)
    drawn = pixels + line[..., None] * levels * 1.3
    if rng.random() < 0.5:
        shift = rng.uniform(0.6, 1.0) * max(width_px, 1.0) * np.array([1.0, -1.0])[rng.integers(0, 2, 2)]
        move = np.array([[1, 0, shift[0]], [0, 1, shift[1]]])
        edge = cv2.warpAffine(line, move, (width, height)) * (1.0 - line)
        drawn -= edge[..., None] * levels * rng.uniform(0.3, 0.8)
    return _Patch(top, left, drawn)


def _paint(image, area_px, contrast, rng, donors) -> _Patch:
    """A drop or run of paint: a patch of the same or another colour, lit like something raised."""
    top, left, pixels, alpha = _blob_box(image, area_px, rng, softness=rng.uniform(0.15, 0.6))
    mean = pixels.mean((0, 1))
    strength = contrast if rng.random() < 0.6 else 0.0  # without it only the relief shows
    colour = mean + _sign(pixels, rng) * strength * _tint(rng, 0.5)
    if rng.random() < 0.15:
        colour = rng.uniform(0, 255, 3)
    keep = rng.uniform(0.1, 0.6) if strength else 0.8  # how much of the texture below shows through
    body = colour.astype(np.float32) + keep * (pixels - mean)
    relief = _shading(alpha.astype(np.float32), rng) * contrast * rng.uniform(0.4, 1.0)
    drawn = _blend(pixels, body + relief[..., None], alpha)
    return _Patch(top, left, drawn)


def _stain(image, area_px, contrast, rng, donors) -> _Patch:
    """A stain or rust: see-through, grainy, of uneven colour and soft outline."""
    top, left, pixels, alpha = _blob_box(image, area_px, rng, softness=rng.uniform(0.4, 1.5))
    height, width = pixels.shape[:2]
    grain = _noise(height, width, rng.uniform(5, 12), rng, 3)
    if rng.random() < 0.35:
        colour = np.array([120, 70, 35], np.float32) * rng.uniform(0.6, 1.4) * _tint(rng, 0.2)
        opacity = np.clip(contrast / 80, 0.12, 0.95)
    else:
        colour = pixels.mean((0, 1)) + _sign(pixels, rng) * contrast * _tint(rng, 0.8) * 1.5
        opacity = rng.uniform(0.4, 0.9)
    body = colour.astype(np.float32) + (grain * rng.uniform(0.1, 0.5) * contrast)[..., None] * _tint(rng, 0.3)
    patchy = alpha * opacity * np.clip(0.75 + 0.5 * grain, 0.0, 1.0)
    return _Patch(top, left, _blend(pixels, body.astype(np.float32), patchy.astype(np.float32)))


def _dent(image, area_px, contrast, rng, donors) -> _Patch:
    """A dent or chip: the surface is warped and lit from one side, the bottom of a chip is darker."""
    top, left, pixels, alpha = _blob_box(image, 0.65 * area_px, rng, softness=rng.uniform(0.5, 2.0))
    height, width = pixels.shape[:2]
    y, x = np.indices((height, width), dtype=np.float32)
    pull = alpha.astype(np.float32) * np.float32(rng.uniform(-0.5, 0.5))
    warped = cv2.remap(
        pixels,
        x + pull * (x - width / 2),
        y + pull * (y - height / 2),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    lit = _shading(alpha.astype(np.float32), rng) * contrast
    if rng.random() < 0.4:
        lit = lit * 0.6 - alpha * contrast * 0.7
    return _Patch(top, left, warped + lit[..., None] * _tint(rng, 0.1))


def _paste(image, area_px, contrast, rng, donors) -> _Patch:
    """A piece from another place or another image, turned and re-coloured, with a hard or soft outline."""
    top, left, pixels, alpha = _blob_box(image, area_px, rng, softness=rng.uniform(0.1, 0.5))
    height, width = pixels.shape[:2]
    donor = donors[int(rng.integers(len(donors)))] if len(donors) and rng.random() < 0.6 else image
    angle, zoom = rng.uniform(0, 360), float(np.exp(rng.uniform(-0.4, 0.4)))
    turn = cv2.getRotationMatrix2D((rng.uniform(0, donor.shape[1]), rng.uniform(0, donor.shape[0])), angle, zoom)
    turn[:, 2] += (width / 2, height / 2) - turn @ (*rng.uniform(0.1, 0.9, 2) * donor.shape[1::-1], 1.0)
    piece = cv2.warpAffine(
        donor, turn, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    ).astype(np.float32)
    if rng.random() < 0.5:  # same mean colour: only the structure is wrong
        piece = piece + pixels.mean((0, 1)) - piece.mean((0, 1))
    piece = piece * _tint(rng, 0.1) + rng.uniform(-0.3, 0.3) * contrast
    if rng.random() < 0.3:
        alpha = np.ones_like(alpha)
        inset_y, inset_x = int(0.18 * height), int(0.18 * width)  # back to the area aimed at
        alpha[:inset_y], alpha[height - inset_y :], alpha[:, :inset_x], alpha[:, width - inset_x :] = 0, 0, 0, 0
    return _Patch(top, left, _blend(pixels, piece.astype(np.float32), alpha.astype(np.float32)))


def _missing(image, area_px, contrast, rng, donors) -> _Patch:
    """Texture that is gone: smeared, or filled with its own mean colour a little off."""
    top, left, pixels, alpha = _blob_box(image, area_px, rng, softness=rng.uniform(0.2, 0.8))
    if rng.random() < 0.5:
        body = cv2.blur(pixels, (max(3, pixels.shape[1] // 2), max(3, pixels.shape[0] // 2)))
    else:
        body = np.broadcast_to(np.median(pixels, axis=(0, 1)), pixels.shape)
    body = body + _sign(pixels, rng) * contrast * 0.4 * _tint(rng, 0.3)
    return _Patch(top, left, _blend(pixels, body.astype(np.float32), alpha.astype(np.float32)))


_KINDS: tuple[Callable[..., _Patch], ...] = (_scratch, _paint, _stain, _dent, _paste, _missing)
_SHARES = np.cumsum([0.30, 0.20, 0.14, 0.12, 0.14])  # the rest is missing texture
