"""A data set's good test images, as they are and with defects drawn on them by code that training does not know.

``test_vae.py`` on what this writes says how well a model finds and outlines what it has not learned to. Defects take
0.02 to 2 % of an image, as those that training draws; no kind of ``drawn_defects`` is used.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config
import scripts

if __name__ == "__main__":
    scripts.answer_early(config.ForeignDefectsSettings, __doc__)

import math
from collections.abc import Callable, Iterable

import cv2
import numpy as np
from tqdm import tqdm

from benchmarks import drawn_sets
from drawn_defects import AREA_FRAC, PEAK_LEVELS, VISIBLE_LEVELS
from image_files import ImageError, read_image
from image_folders import MVTecFolder

ATTEMPTS = 100
"""Times that a defect is drawn anew until it can be seen and is of the right size."""
PLAIN_FRAC = 0.5
"""Share of a defect's pixels that are to differ by PEAK_LEVELS or more."""


# ------------------------------------------------------------------------------------------------ shapes


def ellipse(rng: np.random.Generator, shape: tuple[int, int], area_px: float) -> np.ndarray:
    """Cover (H, W), 0 or 1."""
    radius, stretch = math.sqrt(area_px / math.pi), rng.uniform(0.6, 1.6)
    middle, sides = pixel(within(rng, shape, radius)), pixel((max(1, radius * stretch), max(1, radius / stretch)))
    return cv2.ellipse(np.zeros(shape, np.float32), middle, sides, rng.uniform(0, 180), 0, 360, 1, -1)


def polygon(rng: np.random.Generator, shape: tuple[int, int], area_px: float) -> np.ndarray:
    """Cover (H, W), 0 or 1, of five to eight corners."""
    radius, n = math.sqrt(area_px / math.pi), int(rng.integers(5, 9))
    angles, lengths = np.sort(rng.uniform(0, 2 * np.pi, n)), radius * rng.uniform(0.7, 1.6, n)
    corners = np.stack([np.cos(angles), np.sin(angles)], 1) * lengths[:, None] + within(rng, shape, radius)
    return cv2.fillPoly(np.zeros(shape, np.float32), [np.rint(corners).astype(np.int32)], 1)


def straight(rng: np.random.Generator, shape: tuple[int, int], area_px: float) -> np.ndarray:
    """Cover (H, W), 0 or 1, of a straight line."""
    width_px = max(1, round(rng.uniform(1, 4) * max(shape) / 512))
    start, angle = within(rng, shape, 0.1 * min(shape)), rng.uniform(0, 2 * np.pi)
    end = start + min(area_px / width_px, 0.8 * min(shape)) * np.array([np.cos(angle), np.sin(angle)])
    return cv2.line(np.zeros(shape, np.float32), pixel(start), pixel(end), 1, width_px)


def rectangle(rng: np.random.Generator, shape: tuple[int, int], area_px: float) -> np.ndarray:
    """Cover (H, W), 0 or 1."""
    stretch = rng.uniform(0.5, 2)
    sides = (math.sqrt(area_px * stretch), math.sqrt(area_px / stretch))
    height, width = (min(max(2, round(each)), limit) for each, limit in zip(sides, shape, strict=True))
    top, left = (int(rng.integers(0, limit - side + 1)) for side, limit in zip((height, width), shape, strict=True))
    cover = np.zeros(shape, np.float32)
    cover[top : top + height, left : left + width] = 1
    return cover


def dots(rng: np.random.Generator, shape: tuple[int, int], area_px: float) -> np.ndarray:
    """Cover (H, W), 0 or 1, of a cluster of three to eleven dots."""
    n = int(rng.integers(3, 12))
    radius = max(1.2, math.sqrt(area_px / n / math.pi))
    middle, cover = within(rng, shape, 3 * radius), np.zeros(shape, np.float32)
    for _ in range(n):
        at, side = middle + rng.normal(0, 4 * radius, 2), max(1, round(radius * rng.uniform(0.6, 1.3)))
        cv2.circle(cover, pixel(at), side, 1, -1)
    return cover


def patch(rng: np.random.Generator, shape: tuple[int, int], area_px: float, softness: float) -> np.ndarray:
    """Cover (H, W), 0 to 1, of a blob with an uneven edge, blurred by that share of its radius."""
    radius = math.sqrt(area_px / math.pi)
    middle, (down, across) = within(rng, shape, radius), np.mgrid[: shape[0], : shape[1]]
    uneven = smooth_noise(rng, shape, max(2, 0.5 * radius))
    nearness = 1 - np.hypot(across - middle[0], down - middle[1]) / (1.6 * radius) + 0.25 * uneven
    level = np.partition(nearness.ravel(), -int(area_px))[-int(area_px)]
    return cv2.GaussianBlur((nearness >= level).astype(np.float32), (0, 0), max(0.8, softness * radius))


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], cell_px: float) -> np.ndarray:
    """Noise (H, W) of about spread 1 that changes over so many pixels."""
    cells = rng.standard_normal([max(2, round(side / cell_px)) for side in shape]).astype(np.float32)
    return cv2.resize(cells, shape[::-1], interpolation=cv2.INTER_CUBIC)


def within(rng: np.random.Generator, shape: tuple[int, int], margin: float) -> np.ndarray:
    """A point (x, y) that far from the border, or the middle of a side that is too short for it."""
    return np.array([rng.uniform(min(margin, side / 2), max(side - margin, side / 2)) for side in shape[::-1]])


def pixel(point: Iterable[float]) -> tuple[int, ...]:
    return tuple(round(float(each)) for each in point)


# ------------------------------------------------------------------------------------------------- kinds

# Each takes an image (H, W, 3), 0 to 255, how many pixels to change and another image, and returns the image changed.


def coloured(rng: np.random.Generator, image: np.ndarray, area_px: float, other: np.ndarray) -> np.ndarray:
    return blended(image, rng.uniform(0, 255, 3), ellipse(rng, image.shape[:2], area_px))


def toned(rng: np.random.Generator, image: np.ndarray, area_px: float, other: np.ndarray) -> np.ndarray:
    """Flatter, and lighter or darker."""
    cover = polygon(rng, image.shape[:2], area_px)
    mean = np.average(image.reshape(-1, 3), axis=0, weights=cover.ravel() + 1e-9)
    return blended(image, mean + signed(rng, 20, 80), rng.uniform(0.5, 1) * cover)


def lined(rng: np.random.Generator, image: np.ndarray, area_px: float, other: np.ndarray) -> np.ndarray:
    return image + signed(rng, 30, 80) * straight(rng, image.shape[:2], area_px)[..., None]


def exchanged(rng: np.random.Generator, image: np.ndarray, area_px: float, other: np.ndarray) -> np.ndarray:
    """What another image has at another place."""
    other = np.roll(other, [int(rng.integers(side)) for side in image.shape[:2]], (0, 1))
    return blended(image, other * rng.uniform(0.8, 1.2), rectangle(rng, image.shape[:2], area_px))


def overgrown(rng: np.random.Generator, image: np.ndarray, area_px: float, other: np.ndarray) -> np.ndarray:
    """A texture of three colours of noise, seen through."""
    cell_px = max(image.shape) / rng.integers(8, 64)
    texture = np.stack([128 + 60 * smooth_noise(rng, image.shape[:2], cell_px) for _ in range(3)], -1)
    cover = patch(rng, image.shape[:2], area_px, 0)
    return blended(image, np.clip(texture, 0, 255), rng.uniform(0.3, 0.9) * cover)


def grained(rng: np.random.Generator, image: np.ndarray, area_px: float, other: np.ndarray) -> np.ndarray:
    noise = rng.normal(0, rng.uniform(15, 40), (*image.shape[:2], 1))
    return image + noise * patch(rng, image.shape[:2], area_px, 0)[..., None]


def shaded(rng: np.random.Generator, image: np.ndarray, area_px: float, other: np.ndarray) -> np.ndarray:
    """Lighter or darker, with a soft edge."""
    return image + signed(rng, 20, 60) * patch(rng, image.shape[:2], area_px, 0.35)[..., None]


def specked(rng: np.random.Generator, image: np.ndarray, area_px: float, other: np.ndarray) -> np.ndarray:
    return image + signed(rng, 30, 90) * dots(rng, image.shape[:2], area_px)[..., None]


def blended(image: np.ndarray, over: np.ndarray, cover: np.ndarray) -> np.ndarray:
    return image + cover[..., None] * (over - image)


def signed(rng: np.random.Generator, low: float, high: float) -> float:
    """So many levels, lighter or darker."""
    return rng.choice([-1, 1]) * rng.uniform(low, high)


KINDS: dict[str, Callable[[np.random.Generator, np.ndarray, float, np.ndarray], np.ndarray]] = {
    "colour": coloured,
    "tone": toned,
    "line": lined,
    "exchange": exchanged,
    "overgrowth": overgrown,
    "grain": grained,
    "shade": shaded,
    "specks": specked,
}


# --------------------------------------------------------------------------------------------- the data set


def draw_foreign(
    rng: np.random.Generator, image: np.ndarray, kind: str, other: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """An image (H, W, 3), 0 to 255, with a defect of a kind of KINDS, and where it differs by VISIBLE_LEVELS or more,
    bool (H, W); None where none that can be seen was drawn in so many attempts.
    """
    n_pixels = image.shape[0] * image.shape[1]
    for _ in range(ATTEMPTS):
        area_px = n_pixels * np.exp(rng.uniform(*np.log(AREA_FRAC)))
        changed = np.clip(np.rint(KINDS[kind](rng, image, area_px, other)), 0, 255)
        change = np.abs(changed - image).max(2)
        mask = change >= VISIBLE_LEVELS
        is_seen = (change[mask] >= PEAK_LEVELS).mean() >= PLAIN_FRAC if mask.any() else False
        if is_seen and AREA_FRAC[0] <= mask.mean() <= AREA_FRAC[1]:
            return changed, mask
    return None


def write_foreign(images: list[np.ndarray], root: Path, seed: int, n_each: int) -> list[str]:
    """Good images (H, W, 3), BGR, and so many of them with a defect of each kind; what could not be drawn, in words."""
    rng, missing = np.random.default_rng(seed), []
    for number, image in enumerate(images):
        drawn_sets.write(root, "test/good", number, image)
    jobs = [(kind, number) for kind in KINDS for number in range(n_each)]
    for at, (kind, number) in enumerate(tqdm(jobs, unit="image", file=sys.stderr)):
        image, other = images[at % len(images)], images[int(rng.integers(len(images)))]
        other = cv2.resize(other, image.shape[1::-1], interpolation=cv2.INTER_AREA)
        drawn = draw_foreign(rng, image.astype(np.float32), kind, other.astype(np.float32))
        if drawn is None:
            missing.append(f"{kind} {number:03d}")
            continue
        drawn_sets.write(root, f"test/{kind}", number, *drawn)
    return missing


def main(settings: config.ForeignDefectsSettings) -> None:
    """Write the set; the same images every time with the same seed.

    Raises:
        UsageError: there is no data set named.
        InputError: it has no good test images, or none can be read.
    """
    if not settings.data_dir:
        raise config.UsageError("No data set is named; expected --data-dir with images in test/good.")
    paths = [item.path for item in MVTecFolder(settings.data_dir, require_train=False).test if item.category == "good"]
    images = []
    for path in paths:
        try:
            images.append(read_image(path)[:, :, ::-1])
        except ImageError as error:
            print(f"warning: {error}", file=sys.stderr)
    if not images:
        raise config.InputError(f"{settings.data_dir} has no image in test/good that can be read; expected some.")
    out = Path(settings.output_dir) / settings.out
    missing = write_foreign(images, out, settings.seed, settings.per_kind)
    if missing:
        print(f"warning: nothing that can be seen was drawn for {', '.join(missing)}.", file=sys.stderr)
    print(f"{len(images)} good images, {len(KINDS)} kinds of defects: {out}")


if __name__ == "__main__":
    sys.exit(scripts.run_script(config.ForeignDefectsSettings, __doc__, main))
