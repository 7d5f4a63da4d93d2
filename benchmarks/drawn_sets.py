"""Data sets for measuring how general a method is, in the MVTec layout, where no photographs may be shared.

Varied metal surfaces, a part that always lies the same way and a woven fabric, all drawn by code, and pieces of the
user's own photographs of textures. The defects are drawn and have nothing to do with those that training draws.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config
import scripts

if __name__ == "__main__":
    scripts.answer_early(config.DrawnSetsSettings, __doc__)

import math
from collections.abc import Callable

import cv2
import numpy as np

from image_files import read_image, write_png

SIDE = 512
BACKGROUND = (70, 66, 62)
N_HOLES, N_SCREWS, N_RIBS = 12, 4, 24
YARN_PX = (11.0, 12.5)
"""Width of the fabric's yarns that run down and across."""
TRAINING_PART, PIECE_FRAC, LEAST_PIECE_PX = 0.6, 0.35, 128
"""Share of a photograph, from the left, that training images are pieces of; the side of a piece as a share of the
photograph's shorter one, and at least.
"""

Drawn = tuple[np.ndarray, np.ndarray]
"""A float image (side, side, 3), BGR, about 0 to 255, and the mask (side, side) of its defect."""


# ------------------------------------------------------------------------------------------- ingredients


def grain(rng: np.random.Generator, side: int, across: float, down: float) -> np.ndarray:
    """Gaussian noise (side, side) of spread 1, blurred by so many pixels."""
    noise = rng.standard_normal((side, side)).astype(np.float32)
    noise = cv2.GaussianBlur(
        noise, (0, 0), sigmaX=max(across, 0.3), sigmaY=max(down, 0.3), borderType=cv2.BORDER_REFLECT_101
    )
    return noise / noise.std()


def light(rng: np.random.Generator, side: int, strength: float) -> np.ndarray:
    """A factor of brightness (side, side): a ramp one way and a fall-off around a lamp."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    fall_off = (x - rng.uniform(-0.3, 0.3)) ** 2 + (y - rng.uniform(-0.3, 0.3)) ** 2
    return 1 + strength * (np.cos(angle) * x + np.sin(angle) * y) - strength * 0.6 * fall_off


def path(rng: np.random.Generator, side: int, n_steps: int, step_px: float, wobble: float) -> np.ndarray:
    """Points (n_steps + 1, 2) of a walk whose direction changes by ``wobble`` radians a step."""
    at, angle = rng.uniform(0.15, 0.85, 2) * side, rng.uniform(0, 2 * np.pi)
    points = [at]
    for _ in range(n_steps):
        angle += rng.normal(0, wobble)
        at = at + step_px * np.array([np.cos(angle), np.sin(angle)])
        points.append(at)
    return np.array(points, np.float32)


def line(side: int, points: np.ndarray, width_px: float) -> np.ndarray:
    """Cover (side, side), 0 to 1, of a line through the points."""
    fine = np.zeros((side * 4, side * 4), np.uint8)
    cv2.polylines(fine, [(points * 4).astype(np.int32)], False, 255, max(1, int(4 * width_px)))
    return cv2.resize(fine, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def blob(rng: np.random.Generator, side: int, radius_px: float) -> np.ndarray:
    """Cover (side, side), 0 to 1, of a patch with an uneven edge somewhere in the middle of the image."""
    uneven = grain(rng, side, radius_px * 0.5, radius_px * 0.5)
    y, x = np.mgrid[:side, :side]
    at = rng.uniform(0.2, 0.8, 2) * side
    distance = np.hypot(y - at[0], x - at[1]) / radius_px
    return np.clip(1.5 * (1.1 - distance + 0.25 * uneven), 0, 1).astype(np.float32)


# ---------------------------------------------------------------------------------------- metal surfaces


def surface(rng: np.random.Generator, side: int = SIDE) -> np.ndarray:
    """A rolled, cast or ground surface, each of its own roughness, direction, light and tint."""
    kind = rng.integers(3)
    if kind == 0:
        texture = 0.6 * grain(rng, side, rng.uniform(12, 40), 0.5) + 0.5 * grain(rng, side, rng.uniform(3, 8), 0.6)
    elif kind == 1:
        texture = 0.7 * grain(rng, side, 1.2, 1.2) + 0.5 * grain(rng, side, 5, 5) * rng.uniform(0.3, 1)
    else:
        texture = 0.7 * grain(rng, side, rng.uniform(8, 20), 0.8)
        turn = cv2.getRotationMatrix2D((side / 2, side / 2), rng.uniform(0, 180), 1.5)
        texture = cv2.warpAffine(texture, turn, (side, side), borderMode=cv2.BORDER_REFLECT)
    texture = texture + 0.5 * grain(rng, side, 40, 40)
    grey = (
        rng.uniform(90, 170) * light(rng, side, rng.uniform(0.1, 0.6))
        + rng.uniform(6, 18) * texture
        + rng.normal(0, 2, (side, side))
    )
    return np.clip(grey[..., None] * rng.uniform(0.96, 1.04, 3), 0, 255).astype(np.float32)


def scratched(rng: np.random.Generator, image: np.ndarray, sign: int) -> Drawn:
    side = len(image)
    cover = line(side, path(rng, side, rng.integers(6, 20), 12, 0.05), rng.uniform(1, 2.5))
    return image + sign * rng.uniform(25, 60) * cover[..., None], cover > 0.3


def cracked(rng: np.random.Generator, image: np.ndarray, sign: int) -> Drawn:
    side = len(image)
    cover = line(side, path(rng, side, rng.integers(20, 60), 5, 0.5), rng.uniform(1, 3))
    return image - rng.uniform(25, 60) * cover[..., None], cover > 0.3


def stained(rng: np.random.Generator, image: np.ndarray, sign: int) -> Drawn:
    cover = blob(rng, len(image), rng.uniform(12, 45))
    return image + sign * rng.uniform(12, 30) * cover[..., None] * rng.uniform(0.8, 1.1, 3), cover > 0.5


def pitted(rng: np.random.Generator, image: np.ndarray, sign: int) -> Drawn:
    cover, middle = np.zeros(image.shape[:2], np.float32), rng.uniform(0.2, 0.8, 2) * len(image)
    for _ in range(rng.integers(3, 12)):
        cv2.circle(
            cover,
            tuple(int(each) for each in middle + rng.normal(0, 25, 2)),
            int(rng.integers(1, 5)),
            1.0,
            -1,
            cv2.LINE_AA,
        )
    cover = cv2.GaussianBlur(cover, (0, 0), 0.8)
    return image - rng.uniform(30, 70) * cover[..., None], cover > 0.4


def roughened(rng: np.random.Generator, image: np.ndarray, sign: int) -> Drawn:
    """A patch with a grain of its own."""
    cover = blob(rng, len(image), rng.uniform(18, 45))[..., None]
    other = image.mean() + rng.uniform(8, 20) * grain(rng, len(image), 2, 8)[..., None]
    return image * (1 - cover) + other * cover, cover[..., 0] > 0.5


SURFACE_DEFECTS: dict[str, Callable[[np.random.Generator, np.ndarray, int], Drawn]] = {
    "scratch": scratched,
    "crack": cracked,
    "stain": stained,
    "pits": pitted,
    "patch": roughened,
}
"""The last argument is 1 for what is lighter, -1 for what is darker, where it may be either."""


# ---------------------------------------------------------------------------------- pieces of a photograph


def piece(rng: np.random.Generator, photo: np.ndarray, side_px: int, side: int = SIDE) -> np.ndarray:
    """A random square of ``side_px`` pixels of a photograph (H, W, 3), lit unevenly, with the grain of a camera."""
    top, left = (rng.integers(0, length - side_px + 1) for length in photo.shape[:2])
    cut = cv2.resize(
        photo[top : top + side_px, left : left + side_px].astype(np.float32),
        (side, side),
        interpolation=cv2.INTER_CUBIC,
    )
    return cut * light(rng, side, rng.uniform(0, 0.2))[..., None].astype(np.float32) * rng.uniform(
        0.92, 1.08
    ) + rng.normal(0, 2, cut.shape)


def slit(rng: np.random.Generator, image: np.ndarray) -> Drawn:
    """A dark cut with a lit edge."""
    side = len(image)
    cover = line(side, path(rng, side, rng.integers(6, 16), 12, 0.08), rng.uniform(2, 4.5))
    edge = np.roll(cover, (2, 2), (0, 1)) * (1 - cover)
    return image * (1 - 0.6 * cover[..., None]) + 25 * edge[..., None], cover > 0.3


def threaded(rng: np.random.Generator, image: np.ndarray) -> Drawn:
    side = len(image)
    cover = line(side, path(rng, side, rng.integers(15, 40), 6, 0.3), rng.uniform(1.5, 3))
    return image * (1 - cover[..., None]) + rng.uniform(20, 235, 3) * cover[..., None], cover > 0.3


def tinted(rng: np.random.Generator, image: np.ndarray) -> Drawn:
    cover = blob(rng, len(image), rng.uniform(15, 45))
    return image * (1 - cover[..., None] * (1 - rng.uniform(0.6, 1.15, 3))), cover > 0.5


def pierced(rng: np.random.Generator, image: np.ndarray) -> Drawn:
    cover = blob(rng, len(image), rng.uniform(7, 22))
    return image * (1 - 0.75 * cover[..., None]), cover > 0.5


def smeared(rng: np.random.Generator, image: np.ndarray) -> Drawn:
    cover = blob(rng, len(image), rng.uniform(18, 45))
    return image + cover[..., None] * (cv2.GaussianBlur(image, (0, 0), rng.uniform(3, 5)) - image), cover > 0.5


PIECE_DEFECTS = {"slit": slit, "thread": threaded, "tint": tinted, "hole": pierced, "smear": smeared}


# --------------------------------------------------------------------------------------- an aligned part


def cap(rng: np.random.Generator, missing: tuple[str, int] | None = None, side: int = SIDE) -> np.ndarray:
    """A round cap with holes, screws turned at random, ribs and a label, (side, side, 3); one of them is ``missing``,
    or the label misprinted.
    """
    scale = side / SIDE
    image = np.full((2 * side, 2 * side, 3), BACKGROUND, np.uint8)
    middle = np.array([side, side])

    def at(point: np.ndarray) -> tuple[int, ...]:
        return tuple(round(float(each)) for each in point)

    def px(length: float) -> int:
        return max(1, round(scale * length))

    def around(radius: float, number: float, of: int) -> np.ndarray:
        angle = 2 * np.pi * number / of
        return middle + scale * radius * np.array([np.cos(angle), np.sin(angle)])

    def disc(point: np.ndarray, radius: float, colour: tuple[int, int, int], thickness: float = 0) -> None:
        cv2.circle(image, at(point), px(radius), colour, px(thickness) if thickness else -1, cv2.LINE_AA)

    disc(middle, 430, (150, 155, 160))
    disc(middle, 430, (95, 98, 102), 14)
    disc(middle, 360, (168, 172, 176))
    disc(middle, 360, (120, 122, 126), 6)
    for hole in range(N_HOLES):
        point = around(395, hole, N_HOLES)
        if missing != ("hole", hole):
            disc(point, 16, (40, 40, 42))
            disc(point, 16, (110, 112, 115), 3)
    for screw in range(N_SCREWS):
        point, angle = around(250, screw + 0.5, N_SCREWS), rng.uniform(0, np.pi)
        if missing == ("screw", screw):
            disc(point, 44, (60, 60, 62))
            continue
        disc(point, 44, (190, 188, 180))
        disc(point, 44, (110, 108, 104), 4)
        slot = scale * 30 * np.array([np.cos(angle), np.sin(angle)])
        cv2.line(image, at(point - slot), at(point + slot), (80, 80, 78), px(9), cv2.LINE_AA)
    for rib in range(N_RIBS):
        if missing != ("rib", rib):
            cv2.line(
                image, at(around(90, rib, N_RIBS)), at(around(170, rib, N_RIBS)), (130, 134, 138), px(6), cv2.LINE_AA
            )
    disc(middle, 70, (60, 90, 150))
    disc(middle, 70, (40, 60, 100), 5)
    label = "DV-30" if missing == ("label", 0) else "DV-80"
    cv2.putText(
        image,
        label,
        at(middle + scale * np.array([-62, 12])),
        cv2.FONT_HERSHEY_SIMPLEX,
        1.2 * scale,
        (230, 230, 230),
        px(4),
        cv2.LINE_AA,
    )
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)


def incomplete(rng: np.random.Generator, image: np.ndarray) -> Drawn:
    """A cap that lacks a hole, a screw or a rib, or has another label;
    the mask is where it differs from the whole one."""
    kinds = ("hole", N_HOLES), ("screw", N_SCREWS), ("rib", N_RIBS), ("label", 1)
    drawn = [(name, int(rng.integers(n))) for name, n in kinds]
    missing, seed = drawn[rng.integers(len(kinds))], int(rng.integers(1 << 30))
    whole, lacking = (cap(np.random.default_rng(seed), each, len(image)) for each in (None, missing))
    return lacking, np.abs(whole - lacking).max(2) > 12


def _somewhere_on_the_cap(rng: np.random.Generator, side: int) -> np.ndarray:
    radius, angle = rng.uniform(20, 200) * side / SIDE, rng.uniform(0, 7)
    return side / 2 + radius * np.array([np.cos(angle), np.sin(angle)])


def scraped(rng: np.random.Generator, image: np.ndarray) -> Drawn:
    side = len(image)
    start, points = _somewhere_on_the_cap(rng, side), path(rng, side, rng.integers(4, 14), 8, 0.1)
    cover = line(side, (points + (start - points[0])).astype(np.float32), rng.uniform(0.8, 2))
    return image + rng.choice([-1, 1]) * rng.uniform(20, 55) * cover[..., None], cover > 0.3


def dirty(rng: np.random.Generator, image: np.ndarray) -> Drawn:
    side = len(image)
    middle, cover = _somewhere_on_the_cap(rng, side), blob(rng, side, rng.uniform(5, 16))
    shift = middle - np.argwhere(cover > 0.5).mean(0)[::-1]
    cover = cv2.warpAffine(cover, np.float32([[1, 0, shift[0]], [0, 1, shift[1]]]), (side, side))
    return image * (1 - 0.6 * cover[..., None] * rng.uniform(0.5, 1)), cover > 0.5


def dented(rng: np.random.Generator, image: np.ndarray) -> Drawn:
    """One side of a hollow is lighter, the other darker."""
    side = len(image)
    middle, radius = _somewhere_on_the_cap(rng, side), rng.uniform(6, 18)
    y, x = np.mgrid[:side, :side].astype(np.float32)
    hollow, angle = np.exp(-((x - middle[0]) ** 2 + (y - middle[1]) ** 2) / radius**2), rng.uniform(0, 7)
    slope = hollow * ((x - middle[0]) * np.cos(angle) + (y - middle[1]) * np.sin(angle)) / radius
    return image + rng.uniform(25, 50) * slope[..., None] * 1.6, hollow > 0.3


def chipped(rng: np.random.Generator, image: np.ndarray) -> Drawn:
    """A bit of the rim is gone."""
    side, angle = len(image), rng.uniform(0, 7)
    rim = side / 2 + side * 215 / SIDE * np.array([np.cos(angle), np.sin(angle)])
    cover = np.zeros((side, side), np.float32)
    cv2.fillConvexPoly(cover, cv2.convexHull((rim + rng.normal(0, 9, (5, 2))).astype(np.int32)), 1.0, cv2.LINE_AA)
    return image * (1 - cover[..., None]) + np.array(BACKGROUND) * cover[..., None], cover > 0.5


CAP_DEFECTS: dict[str, Callable[[np.random.Generator, np.ndarray], Drawn]] = {
    "missing": incomplete,
    "scratch": scraped,
    "dirt": dirty,
    "dent": dented,
    "chip": chipped,
}


# -------------------------------------------------------------------------------------- a woven fabric


def fabric(
    rng: np.random.Generator, side: int = SIDE, broken: float | None = None, thick: float | None = None
) -> Drawn:
    """A plain weave, a little turned and warped, of yarns of uneven brightness; where asked, with a yarn broken, or
    thick, for a length, so far across or down, 0 to 1.
    """
    y, x = np.mgrid[:side, :side].astype(np.float32)
    angle = np.deg2rad(rng.normal(0, 1.5))
    across = x * np.cos(angle) + y * np.sin(angle) + rng.uniform(0, 200) + 1.4 * grain(rng, side, 35, 35)
    down = -x * np.sin(angle) + y * np.cos(angle) + rng.uniform(0, 200) + 1.4 * grain(rng, side, 35, 35)
    yarns = across / YARN_PX[0], down / YARN_PX[1]
    warp, weft = (np.floor(at).astype(int) + 100 for at in yarns)
    warp_at, weft_at = (np.sin(np.pi * (at - np.floor(at))) for at in yarns)  # 1 along the middle of a yarn
    warp_tone, weft_tone = (rng.normal(0, 7, 400).astype(np.float32) for _ in range(2))
    over = (warp + weft) % 2 == 0
    image = np.where(
        over,
        95 + 60 * warp_at * (0.6 + 0.4 * weft_at) + warp_tone[warp % 400],
        75 + 60 * weft_at * (0.6 + 0.4 * warp_at) + weft_tone[weft % 400],
    )
    mask = np.zeros((side, side), bool)
    if broken is not None:
        mask = (warp == warp[side // 2, int(side * broken)]) & _a_length(rng, y)
        image = np.where(mask, 55 + 8 * weft_at, image)
    if thick is not None:
        mask = (weft == weft[int(side * thick), side // 2]) & _a_length(rng, x)
        image = np.where(mask, image + 28, image)
    image = image + 3 * grain(rng, side, 0.7, 0.7) + 4 * grain(rng, side, 2, 2)
    image = image * light(rng, side, rng.uniform(0.05, 0.25)) * rng.uniform(0.93, 1.07)
    return np.clip(image[..., None] * np.array([0.78, 0.9, 1.0], np.float32), 0, 255).astype(np.float32), mask


def _a_length(rng: np.random.Generator, along: np.ndarray) -> np.ndarray:
    """Where a coordinate (side, side) lies in a random stretch of it, 0.16 to 0.6 of the side."""
    side = len(along)
    return np.abs(along - side * rng.uniform(0.3, 0.7)) < side * rng.uniform(0.08, 0.3)


FABRIC_DEFECTS: dict[str, Callable[[np.random.Generator, int], Drawn]] = {
    "gap": lambda rng, side: fabric(rng, side, broken=rng.uniform(0.2, 0.8)),
    "thick": lambda rng, side: fabric(rng, side, thick=rng.uniform(0.2, 0.8)),
    "stain": lambda rng, side: tinted(rng, fabric(rng, side)[0]),
    "hole": lambda rng, side: pierced(rng, fabric(rng, side)[0]),
    "thread": lambda rng, side: threaded(rng, fabric(rng, side)[0]),
}


def photographed(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray) -> Drawn:
    """Turned and moved by a little, lit unevenly, with the grain of a camera."""
    side = len(image)
    move = cv2.getRotationMatrix2D((side / 2, side / 2), rng.normal(0, 0.7), 1 + rng.normal(0, 0.004))
    move[:, 2] += rng.normal(0, 2, 2)
    image, moved = (
        cv2.warpAffine(each.astype(np.float32), move, (side, side), borderMode=cv2.BORDER_REPLICATE)
        for each in (image, mask)
    )
    lit = image * light(rng, side, rng.uniform(0, 0.25))[..., None].astype(np.float32) * rng.uniform(0.93, 1.07)
    return lit + rng.normal(0, 2.2, image.shape) + 3 * grain(rng, side, 1, 1)[..., None], moved > 0.5


# ---------------------------------------------------------------------------------------------- the sets


def write(root: Path, folder: str, number: int, image: np.ndarray, mask: np.ndarray | None = None) -> None:
    """An image of a set, and the mask of a defective one, where the MVTec layout has them."""
    write_png(root / folder / f"{number:03d}.png", np.clip(image[:, :, ::-1], 0, 255).astype(np.uint8))
    if mask is not None:
        write_png(root / folder.replace("test", "ground_truth") / f"{number:03d}_mask.png", mask.astype(np.uint8) * 255)


def write_surfaces(
    root: Path, seed: int = 0, n_train: int = 300, n_good: int = 40, n_each: int = 12, side: int = SIDE
) -> None:
    """Metal surfaces, none like another; so many to train, good ones to test, and defective ones of each kind."""
    rng = np.random.default_rng(2 * seed + 5)
    for folder, n in (("train/good", n_train), ("test/good", n_good)):
        for number in range(n):
            write(root, folder, number, surface(rng, side))
    for kind, draw in SURFACE_DEFECTS.items():
        for number in range(n_each):
            image, sign = surface(rng, side), rng.choice([-1, 1])
            write(root, f"test/{kind}", number, *draw(rng, image, sign))


def write_caps(
    root: Path, seed: int = 0, n_train: int = 110, n_good: int = 30, n_each: int = 10, side: int = SIDE
) -> None:
    """The cap, always nearly in the same place; so many to train, good ones to test,
    and defective ones of each kind."""
    rng = np.random.default_rng(2 * seed + 6)
    sound = np.zeros((side, side), bool)
    for folder, n in (("train/good", n_train), ("test/good", n_good)):
        for number in range(n):
            write(root, folder, number, photographed(rng, cap(rng, side=side), sound)[0])
    for kind, draw in CAP_DEFECTS.items():
        for number in range(n_each):
            write(root, f"test/{kind}", number, *photographed(rng, *draw(rng, cap(rng, side=side))))


def write_fabrics(
    root: Path, seed: int = 0, n_train: int = 110, n_good: int = 30, n_each: int = 10, side: int = SIDE
) -> None:
    """Pieces of a woven fabric; so many to train, good ones to test, and defective ones of each kind."""
    rng = np.random.default_rng(2 * seed + 21)
    for folder, n in (("train/good", n_train), ("test/good", n_good)):
        for number in range(n):
            write(root, folder, number, fabric(rng, side)[0])
    for number in range(n_each):
        for kind, draw in FABRIC_DEFECTS.items():
            write(root, f"test/{kind}", number, *draw(rng, side))


def write_pieces(
    root: Path,
    photo: np.ndarray,
    seed: int = 0,
    n_train: int = 200,
    n_good: int = 30,
    n_each: int = 10,
    side: int = SIDE,
) -> None:
    """Pieces of a photograph (H, W, 3), BGR: of its left part to train, of its right part to test, defective ones of
    each kind.

    Raises:
        ValueError: the photograph is too small, or its right part narrower than a piece.
    """
    rng, side_px = np.random.default_rng(2 * seed + 7), int(PIECE_FRAC * min(photo.shape[:2]))
    training, test = np.split(photo, [int(TRAINING_PART * photo.shape[1])], axis=1)
    if side_px < LEAST_PIECE_PX or test.shape[1] < side_px:
        least = math.ceil(LEAST_PIECE_PX / PIECE_FRAC)
        raise ValueError(
            f"the photograph is {photo.shape[0]} x {photo.shape[1]} px; expected a shorter side of {least} px or "
            "more, and about the same height as width."
        )
    for folder, part, n in (("train/good", training, n_train), ("test/good", test, n_good)):
        for number in range(n):
            write(root, folder, number, piece(rng, part, side_px, side))
    for kind, draw in PIECE_DEFECTS.items():
        for number in range(n_each):
            write(root, f"test/{kind}", number, *draw(rng, piece(rng, test, side_px, side)))


def main(settings: config.DrawnSetsSettings) -> None:
    """Write the sets; the same images every time with the same seed.

    Raises:
        UsageError: two sets would have one name.
        InputError: a photograph cannot be read or is too small.
    """
    out, photos = Path(settings.output_dir) / settings.out, [Path(path) for path in settings.photos]
    names = [path.stem for path in photos] + ["surfaces", "cap", "fabric"]
    if len(set(names)) < len(names):
        raise config.UsageError(f"The sets would be named {', '.join(names)}; expected photographs of different names.")
    for path in photos:
        try:
            write_pieces(out / path.stem, read_image(path)[:, :, ::-1], settings.seed)
        except ValueError as error:
            raise config.InputError(f"{path} makes no set: {error}") from None
        print(f"pieces of {path}: {out / path.stem}")
    write_surfaces(out / "surfaces", settings.seed)
    write_caps(out / "cap", settings.seed)
    write_fabrics(out / "fabric", settings.seed)
    print(f"metal surfaces: {out / 'surfaces'}   an aligned part: {out / 'cap'}   a fabric: {out / 'fabric'}")


if __name__ == "__main__":
    sys.exit(scripts.run_script(config.DrawnSetsSettings, __doc__, main))
