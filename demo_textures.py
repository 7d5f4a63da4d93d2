"""The built-in demo of textures in the MVTec layout: crops of photographs, some with a drawn defect and its mask."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np

import config
import drawn_defects
import files
from image_files import read_image, write_png

DEMO_VERSION = 3
DEMO_SIDE_PX = 128
DEMO_TINTS = {"brick": (1.08, 0.88, 0.78), "grass": (0.82, 1.08, 0.70), "gravel": (1.05, 0.98, 0.88)}
DEMO_COUNTS = {"train/good": 100, "validation/good": 20, "test/good": 20, "test/scratch": 12, "test/paint": 12}
DEMO_PLACES = {"train": (0.0, 1.0, 0.0, 0.58), "validation": (0.0, 0.45, 0.58, 1.0), "test": (0.45, 1.0, 0.58, 1.0)}
"""Top, bottom, left and right of where crops come from, as shares of a photograph: those held out are to be as unlike
those of training as those of the test.
"""


def make_demo(root: str | Path = "data/demo_textures") -> Path:
    """Write the built-in demo in the MVTec layout into ``root``, unless it is there already; returns ``root``.

    Crops of the photographs of brick, grass and gravel that scikit-image ships (nothing is downloaded), tinted, those
    of train/, validation/ and test/ from places apart; some test crops carry a drawn scratch or paint blob with an
    exact mask. Always the same files.

    Raises:
        InputError: scikit-image's photographs are missing, or ``root`` holds something else.
    """
    root = Path(root)
    marker = {"demo_version": DEMO_VERSION, "counts": DEMO_COUNTS}
    if files.read_json(root / "demo.json") == marker:
        return root
    if (
        root.exists()
        and (not root.is_dir() or any(root.iterdir()))
        and "demo_version" not in files.read_json(root / "demo.json")
    ):
        raise config.InputError(f"{root} exists and is not the built-in demo; move it away or give --data-dir.")
    photographs = _demo_photographs()
    rng = np.random.default_rng(DEMO_VERSION)
    files.write_json(root / "demo.json", {**marker, "unfinished": True})
    for folder, count in DEMO_COUNTS.items():
        for i in range(count):
            crop = _demo_crop(photographs[i % len(photographs)], DEMO_PLACES[folder.split("/")[0]], rng)
            _write_demo_image(root, folder, f"{i:03d}", crop, rng)
    files.write_json(root / "demo.json", marker)
    return root


def _demo_photographs() -> list[np.ndarray]:
    """uint8 H x W x 3 photographs, read from the installed package: its loaders might download."""
    spec = find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec and spec.origin else Path("skimage-is-not-installed")
    shipped = [
        (folder / f"{name}.png", tint) for name, tint in DEMO_TINTS.items() if (folder / f"{name}.png").is_file()
    ]
    if not shipped:
        raise config.InputError(
            "The built-in demo needs the photographs that scikit-image ships; install scikit-image or give --data-dir."
        )
    return [np.clip(read_image(path) * np.array(tint), 0, 255).astype(np.uint8) for path, tint in shipped]


def _demo_crop(
    photograph: np.ndarray, place: tuple[float, float, float, float], rng: np.random.Generator
) -> np.ndarray:
    height, width = photograph.shape[:2]
    top, bottom, left, right = (
        round(share * side) for share, side in zip(place, (height, height, width, width), strict=True)
    )
    top, left = rng.integers(top, bottom - DEMO_SIDE_PX + 1), rng.integers(left, right - DEMO_SIDE_PX + 1)
    crop = photograph[top : top + DEMO_SIDE_PX, left : left + DEMO_SIDE_PX]
    return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)


def _write_demo_image(root: Path, folder: str, stem: str, crop: np.ndarray, rng: np.random.Generator) -> None:
    draw = {"scratch": _demo_scratch, "paint": _demo_paint}.get(folder.split("/")[1])
    if draw:
        alpha, colour = draw(crop, rng)
        drawn = np.rint(crop + alpha[..., None] * (colour - crop)).astype(np.uint8)
        mask = cv2.absdiff(drawn, crop).max(axis=2) >= drawn_defects.VISIBLE_LEVELS
        write_png(root / "ground_truth" / folder.split("/")[1] / f"{stem}_mask.png", mask.astype(np.uint8) * 255)
        crop = drawn
    write_png(root / folder / f"{stem}.png", crop)


def _demo_scratch(crop: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and colour of a curved bright scratch, drawn apart from ``drawn_defects`` so that the test is fair."""
    middle = rng.uniform(0.3, 0.7, 2) * DEMO_SIDE_PX
    angle, half, bow = rng.uniform(0, np.pi), rng.uniform(18, 36), rng.uniform(-10, 10)
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    t = np.linspace(-1, 1, 24)[:, None]
    points = middle + t * half * along + (1 - t * t) * bow * across
    canvas = np.zeros((DEMO_SIDE_PX * 4, DEMO_SIDE_PX * 4), np.uint8)
    cv2.polylines(canvas, [np.rint(points * 4).astype(np.int32)], False, 255, int(rng.integers(9, 14)), cv2.LINE_AA)
    alpha = cv2.resize(canvas, crop.shape[1::-1], interpolation=cv2.INTER_AREA) / 255
    return alpha * rng.uniform(0.75, 0.95), np.array([226.0, 226.0, 220.0])


def _demo_paint(crop: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and colour of a paint blob made of overlapping discs."""
    middle, radius = rng.uniform(0.25, 0.75, 2) * DEMO_SIDE_PX, rng.uniform(5, 9)
    canvas = np.zeros(crop.shape[:2], np.float32)
    for _ in range(5):
        centre = np.rint(middle + rng.normal(0, 0.6 * radius, 2)).astype(int)
        cv2.circle(canvas, tuple(centre.tolist()), round(radius * rng.uniform(0.6, 1.0)), 1.0, -1)
    colours = np.array([[70.0, 95, 150], [160, 60, 55], [215, 205, 180], [60, 60, 65]])
    return cv2.GaussianBlur(canvas, (0, 0), 1.0) * rng.uniform(0.8, 0.95), colours[rng.integers(len(colours))]
