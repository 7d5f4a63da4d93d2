"""Pictures: the only file that imports matplotlib or seaborn; takes arrays, returns figures.

Figures are made without pyplot, so nothing global is kept or has to be closed. Images are 3 x H x W or
H x W x 3, floats in [0, 1] or uint8. Cyan always outlines what was predicted, amber what is true.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

import files
from config import InputError

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".pdf", ".svg", ".eps", ".ps")
PREDICTED_COLOUR = "#00D5FF"
TRUTH_COLOUR = "#FFB000"
TRAIN_COLOUR = "#0072B2"
VALIDATION_COLOUR = "#D55E00"
FRESH_COLOUR = "#009E73"
OTHER_COLOUR = "#9AA5AD"
HEAT = "inferno"
# Okabe and Ito (2008), safe for the common colour blindnesses; the shapes tell apart what print in grey does not.
CLASS_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000", "#B8A800", "#7A5195")
CLASS_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")

PANEL_IN = 2.9
LOG_RATIO = 30.0
RATES = ("accuracy", "f1", "precision", "recall")
"""Terms of a history that lie between 0 and 1, macro averages of them too: drawn on a linear axis however far they
rise.
"""
OUTLINE_MARGIN_FRAC = 0.012
CLOSE_UP_FRAC = 0.25
PEAK_FRAC = 0.08
"""Side of the brackets around the largest value of a map that passes its threshold nowhere, as a share of the longer
side of the image.
"""
SMALL_PERCENT = 1.0
HEAT_NEAR_FRAC = 0.7
HEAT_ALPHA = 0.45

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.labelsize": 10.0,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.fontsize": 9.0,
    "figure.titlesize": 13.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "image.interpolation": "nearest",
    "text.parse_math": False,  # titles hold file names
}


def save(figure: Figure, path: Path | str, dpi: int = 100, tight: bool = False) -> None:
    """Write a figure so that the file is either whole or absent; the ending names the format.

    Args:
        tight: crop to the drawing with the usual small border, as the plots of series are.

    Raises:
        InputError: the path is a folder or has another ending than those of pictures, or cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in ENDINGS or path.is_dir():
        raise InputError(f"{path} is no file name of a picture; expected one that ends in {', '.join(ENDINGS)}.")
    content = io.BytesIO()
    _write(figure, content, dpi, tight, path.suffix.lower().removeprefix("."))
    files.write_whole(path, content.getbuffer())


def pixels(figure: Figure, dpi: int = 100, tight: bool = False) -> np.ndarray:
    """The very pixels that `save` would write as PNG, H x W x 3 uint8."""
    buffer = io.BytesIO()
    _write(figure, buffer, dpi, tight)
    return np.asarray(Image.open(buffer).convert("RGB"))


def _write(figure: Figure, target: io.BytesIO, dpi: int, tight: bool, kind: str = "png") -> None:
    # Ticks are made when a figure is drawn, so a user's own settings must not reach that moment either.
    with home_style, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # drawn as boxes
        figure.savefig(target, dpi=dpi, bbox_inches="tight" if tight else None, format=kind)


class _HomeStyle(contextlib.AbstractContextManager):
    """matplotlib's own defaults in place of the user's settings, which are put back when the last thread that is within
    leaves: there is one set of settings for all threads.
    """

    def __init__(self):
        self.lock, self.n_within, self.users = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if not self.n_within:  # a backend, once set, is not put back by rc_context
                defaults = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")}
                self.users.enter_context(matplotlib.rc_context(defaults))
            self.n_within += 1

    def __exit__(self, *error) -> None:
        with self.lock:
            self.n_within -= 1
            if not self.n_within:
                self.users.close()


home_style = _HomeStyle()
"""Within it figures are made and drawn (``with plots.home_style:``), whatever the user has set."""


# ------------------------------------------------------------------------------------------ why an image is bad


def reconstruction_grid(
    images: Sequence[np.ndarray],
    reconstructions: Sequence[np.ndarray],
    defect_maps: Sequence[np.ndarray],
    titles: Sequence[str],
    map_max: float,
) -> Figure:
    """A row for each image: original, reconstruction, defect map on one scale from 0 to map_max (to 1 where that is not
    above 0).
    """
    n_images = len(images)
    if not len(reconstructions) == len(defect_maps) == len(titles) == n_images > 0:
        raise ValueError("expected one entry an image in each list")
    with matplotlib.rc_context(_STYLE):
        figure, grid = _grid(n_images, 3, PANEL_IN, extra_width_in=0.9)
        for axes, image, reconstruction, defect_map, title in zip(
            grid, images, reconstructions, defect_maps, titles, strict=True
        ):
            _show_photo(axes[0], image, "")
            _show_photo(axes[1], reconstruction, "")
            drawn = _show_map(axes[2], defect_map, map_max, "")
            axes[0].set_ylabel(_printable(title))
        for axis, name in zip(grid[0], ("Original", "Reconstruction", "Defect map"), strict=True):
            axis.set_title(name)
        shown_max = max(float(np.max(defect_map)) for defect_map in defect_maps)
        _heat_bar(figure, drawn, list(grid[:, 2]), shown_max, None)
    return figure


def defect_panel(
    image: np.ndarray,
    reconstruction: np.ndarray,
    defect_map: np.ndarray,
    predicted_mask: np.ndarray,
    truth_mask: np.ndarray | None,
    title: str,
    map_max: float,
    threshold: float | None = None,
    defective: bool = False,
) -> Figure:
    """Everything about one image side by side: original with outlines, close-up, reconstruction, map, masks.

    The close-up shows the strongest predicted region when it is small, or, where none is predicted in what is called
    ``defective``, where the map is largest; the ground truth is left out when None.
    A threshold is marked on the colour bar of the map, which runs from 0 to map_max (to 1 where that is not above 0).
    """
    window = _close_up_window(defect_map, predicted_mask, defective)
    n_panels = 4 + (window is not None) + (truth_mask is not None)
    with matplotlib.rc_context(_STYLE):
        figure, grid = _grid(1, n_panels, PANEL_IN, extra_width_in=0.9, extra_height_in=0.75)
        panels = iter(grid[0])
        original = _show_photo(next(panels), image, "Original")
        _outline(original, predicted_mask, PREDICTED_COLOUR)
        if truth_mask is not None:
            _outline(original, truth_mask, TRUTH_COLOUR, dashed=True)
        if window is not None:
            _show_close_up(next(panels), original, image, window)
        _show_photo(next(panels), reconstruction, "Reconstruction")
        axis = next(panels)
        drawn = _show_map(axis, defect_map, map_max, "Defect map")
        _heat_bar(figure, drawn, [axis], float(np.max(defect_map)), threshold)
        _show_mask(next(panels), predicted_mask, "Predicted defect", PREDICTED_COLOUR)
        if truth_mask is not None:
            _show_mask(next(panels), truth_mask, "Ground truth", TRUTH_COLOUR)
        figure.suptitle(_printable(title))
        _outline_legend(
            figure, predicted=bool(np.any(predicted_mask)), truth=truth_mask is not None and bool(np.any(truth_mask))
        )
    return figure


def overlay_image(
    image: np.ndarray, defect_map: np.ndarray, predicted_mask: np.ndarray, threshold: float
) -> np.ndarray:
    """A photo called defective, with heat where the map nears or passes the threshold, and a line around each predicted
    region.

    Where none is predicted, brackets say where the map is largest.

    Args:
        image: H x W x 3 uint8 of any size.
        defect_map, predicted_mask: of any size; both are stretched over the photo.

    Returns:
        H x W x 3 uint8; pixels far below the threshold and away from a region, or from the brackets, are the photo's
        own.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.dtype} {image.shape}; expected H x W x 3 uint8")
    height, width = image.shape[:2]
    heat = cv2.resize(np.asarray(defect_map, np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    mask = cv2.resize(
        (np.asarray(predicted_mask) > 0).astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST
    )
    start = threshold - (1.0 - HEAT_NEAR_FRAC) * abs(threshold)
    rise = max(threshold - start, 1e-12)
    blended, warm = image.copy(), heat > start
    strength = np.clip((heat[warm] - start) / rise, 0.0, 1.0)[:, None] * HEAT_ALPHA
    level = 0.45 + 0.5 * np.clip((heat[warm] - threshold) / max(float(heat.max()) - threshold, rise), 0.0, 1.0)
    colour = matplotlib.colormaps[HEAT](level)[:, :3] * 255.0
    blended[warm] = np.rint(image[warm] * (1.0 - strength) + colour * strength).astype(np.uint8)
    thickness_px = max(1, round(max(height, width) / 300))
    halo = thickness_px + 2 * max(1, thickness_px // 2)
    lines, closed = (_region_rings(mask, extra_px=thickness_px), True) if mask.any() else (_peak_brackets(heat), False)
    for colour, width_px in (((0, 0, 0), halo), (_rgb(PREDICTED_COLOUR), thickness_px)):
        cv2.polylines(blended, lines, closed, colour, width_px, cv2.LINE_8)
    return blended


def picture_sheet(rows: Sequence[Sequence[np.ndarray]], gap_px: int = 4) -> np.ndarray:
    """Rows of pictures, each (3, H, W) in [0, 1], as one uint8 picture with grey gaps."""
    gaps = [(0, 0), (gap_px, gap_px), (gap_px, gap_px)]
    cells = [[np.pad(picture, gaps, constant_values=0.6) for picture in row] for row in rows]
    sheet = np.concatenate([np.concatenate(row, 2) for row in cells], 1)
    return np.rint(255 * sheet.clip(0, 1)).astype(np.uint8).transpose(1, 2, 0)


def _peak_brackets(heat: np.ndarray) -> list[np.ndarray]:
    """The four corners of a square around the largest value of a map (H, W), each as points (3, 1, 2) in x, y."""
    row, column = np.unravel_index(np.argmax(heat), heat.shape)
    side = max(4, round(PEAK_FRAC * max(heat.shape)))
    top, left = (
        int(np.clip(at - side // 2, 0, max(0, length - 1 - side)))
        for at, length in zip((row, column), heat.shape, strict=True)
    )
    corner = np.array([[side // 3, 0], [0, 0], [0, side // 3]])
    turned = [np.where(flip, side - corner, corner) for flip in itertools.product((False, True), repeat=2)]
    return [(np.array([left, top]) + each).astype(np.int32)[:, None] for each in turned]


def _label(name: str) -> str:
    """The name of a category or measure as a label of a table."""
    return _printable(name.replace("_", " "))


def _printable(title: str) -> str:
    """A title without what no font has: the bytes of a file name that are no text."""
    return title.encode("utf-8", "replace").decode("utf-8")


def _rgb(colour: str) -> tuple[int, int, int]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def _region_rings(mask: np.ndarray, extra_px: int = 0) -> list[np.ndarray]:
    # The line stands off the region: a defect of a few pixels would vanish under its own outline.
    mask = (np.asarray(mask) > 0).astype(np.uint8)
    margin_px = max(2, round(OUTLINE_MARGIN_FRAC * max(mask.shape))) + extra_px
    left, top, width, height = cv2.boundingRect(mask)
    around = 1 - mask[top : top + height, left : left + width]
    around = cv2.copyMakeBorder(around, *[margin_px + 1] * 4, cv2.BORDER_CONSTANT, value=1)
    near = (cv2.distanceTransform(around, cv2.DIST_L2, cv2.DIST_MASK_5) <= margin_px).astype(np.uint8)
    rings, _ = cv2.findContours(near, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    corner, last = np.array([left, top]) - margin_px - 1, np.array(mask.shape[::-1]) - 1
    return [np.clip(ring + corner, 0, last) for ring in rings]


def _grid(
    n_rows: int, n_columns: int, side_in: float, extra_width_in: float = 0.0, extra_height_in: float = 0.3
) -> tuple[Figure, np.ndarray]:
    size = (side_in * n_columns + extra_width_in, side_in * n_rows + extra_height_in)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)


def _photo(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3:
        image = np.moveaxis(image, 0, 2)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.shape}; expected 3 x H x W or H x W x 3")
    return image if image.dtype == np.uint8 else np.clip(image, 0.0, 1.0)


def _bare(axis: Axes, title: str) -> Axes:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title)
    for spine in axis.spines.values():
        spine.set(visible=True, color=OTHER_COLOUR, linewidth=0.6)
    return axis


def _show_photo(axis: Axes, image: np.ndarray, title: str) -> Axes:
    axis.imshow(_photo(image), interpolation="antialiased")
    return _bare(axis, title)


def _show_map(axis: Axes, defect_map: np.ndarray, map_max: float, title: str):
    drawn = axis.imshow(
        defect_map, cmap=HEAT, vmin=0.0, vmax=map_max if map_max > 0 else 1.0, interpolation="antialiased"
    )
    _bare(axis, title)
    return drawn


def _show_mask(axis: Axes, mask: np.ndarray, title: str, colour: str) -> None:
    binary = np.asarray(mask) > 0
    share = 100.0 * binary.mean()
    palette = matplotlib.colors.ListedColormap(["#14181C", colour])
    axis.imshow(binary, cmap=palette, vmin=0, vmax=1, interpolation="nearest")
    if share < SMALL_PERCENT:  # a ring keeps a region of a few pixels from being overlooked
        _outline(axis, binary, "#FFFFFF", halo=False, width=0.8)
    _bare(axis, title)
    axis.set_xlabel("nothing" if not binary.any() else f"{share:.2g} % of the image")


def _outline(
    axis: Axes, mask: np.ndarray, colour: str, dashed: bool = False, halo: bool = True, width: float = 1.4
) -> None:
    for ring in _region_rings(mask):
        points = np.concatenate((ring[:, 0], ring[:1, 0]))
        if halo:
            axis.plot(
                points[:, 0], points[:, 1], color="black", linewidth=width + 1.4, alpha=0.7, scalex=False, scaley=False
            )
        style = (0, (3, 2)) if dashed else "solid"
        axis.plot(
            points[:, 0], points[:, 1], color=colour, linewidth=width, linestyle=style, scalex=False, scaley=False
        )


def _outline_legend(figure: Figure, predicted: bool, truth: bool) -> None:
    entries = [
        (predicted, PREDICTED_COLOUR, "solid", "Predicted defect"),
        (truth, TRUTH_COLOUR, (0, (3, 2)), "Ground truth"),
    ]
    lines = [
        Line2D([], [], color=colour, linestyle=style, linewidth=2.2, label=label)
        for shown, colour, style, label in entries
        if shown
    ]
    if lines:
        figure.legend(handles=lines, loc="outside lower left", ncols=2, frameon=False)


def _heat_bar(figure: Figure, drawn, axes: list[Axes], shown_max: float, threshold: float | None) -> None:
    map_max = drawn.norm.vmax
    bar = figure.colorbar(
        drawn,
        ax=axes,
        extend="max" if shown_max > map_max else "neither",
        fraction=0.05,
        pad=0.03,
        aspect=20 * len(axes),
    )
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(4)
    bar.set_label("Deviation from good")
    if threshold is not None and 0.0 <= threshold <= map_max:
        bar.ax.axhline(threshold, color="black", linewidth=3.2)
        bar.ax.axhline(threshold, color=PREDICTED_COLOUR, linewidth=1.6)
        bar.set_label("Deviation from good (line: threshold)")


def _close_up_window(
    defect_map: np.ndarray, predicted_mask: np.ndarray, defective: bool
) -> tuple[int, int, int] | None:
    """(top, left, side) in px around the strongest predicted region, or in what is ``defective`` without one around the
    largest value; None when there is nothing to show or it is large.
    """
    mask = (np.asarray(predicted_mask) > 0).astype(np.uint8)
    if not mask.any() and defective:
        mask[np.unravel_index(np.argmax(defect_map), mask.shape)] = 1
    if not mask.any():
        return None
    peak = np.unravel_index(np.argmax(np.where(mask, defect_map, -np.inf)), mask.shape)
    _, labels, boxes, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    left, top, width, height, _ = boxes[labels[peak]]
    side = round(CLOSE_UP_FRAC * min(mask.shape))
    if max(width, height) > 0.8 * side:
        return None
    corner = (top + height // 2 - side // 2, left + width // 2 - side // 2)
    return (*(int(np.clip(c, 0, n - side)) for c, n in zip(corner, mask.shape, strict=True)), side)


def _show_close_up(axis: Axes, original: Axes, image: np.ndarray, window: tuple[int, int, int]) -> None:
    top, left, side = window
    photo = _photo(image)
    axis.imshow(photo[top : top + side, left : left + side], interpolation="nearest")
    _bare(axis, f"Close-up, {max(photo.shape[:2]) / side:.0f}\u00d7")
    for spine in axis.spines.values():
        spine.set(color="black", linewidth=1.4)
    for colour, width in (("black", 2.2), ("white", 0.9)):
        original.add_patch(
            Rectangle((left - 0.5, top - 0.5), side, side, fill=False, edgecolor=colour, linewidth=width)
        )


# ------------------------------------------------------------------------------------------ training


def training_curves(history: Sequence[Mapping[str, float]], best_epoch: int | None = None) -> Figure:
    """A panel for each named term with its "train/<term>", "val/<term>" and "fresh/<term>" values over the epochs.

    Args:
        history: a dict for each epoch; "epoch" counts from 1 when it is not given.
        best_epoch: marked on every panel; by default the one of the least "val/total" (or "val/loss").
    """
    terms = list(
        dict.fromkeys(
            key.split("/", 1)[1] for row in history for key in row if key.startswith(("train/", "val/", "fresh/"))
        )
    )
    terms.sort(key=lambda term: term not in ("total", "loss"))
    if not terms:
        raise ValueError("expected a history with keys such as 'train/pixel' and 'val/pixel'")
    epochs = [row.get("epoch", number) for number, row in enumerate(history, 1)]
    best = _best_epoch(history, epochs) if best_epoch is None else best_epoch
    n_columns = min(3, len(terms))
    n_rows = -(-len(terms) // n_columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.2 * n_columns, 2.9 * n_rows + 0.4), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
        for axis, term in zip(grid, terms, strict=False):
            _draw_term(axis, history, epochs, term, best)
        for axis in grid[len(terms) :]:
            axis.remove()
        # One legend over the panels; the panel with the most lines has every entry.
        handles, labels = max(
            (axis.get_legend_handles_labels() for axis in grid[: len(terms)]), key=lambda pair: len(pair[1])
        )
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    return figure


def _best_epoch(history: Sequence[Mapping[str, float]], epochs: Sequence[int]) -> int | None:
    for key in ("val/total", "val/loss"):
        known = [
            (row[key], epoch) for row, epoch in zip(history, epochs, strict=True) if np.isfinite(row.get(key, np.nan))
        ]
        if known:
            return min(known)[1]
    return None


def _draw_term(
    axis: Axes, history: Sequence[Mapping[str, float]], epochs: Sequence[int], term: str, best: int | None
) -> None:
    seen = []
    for part, label, colour, style in (
        ("train", "Training", TRAIN_COLOUR, "-"),
        ("val", "Validation", VALIDATION_COLOUR, "--"),
        ("fresh", "Validation, fresh series", FRESH_COLOUR, "-."),
    ):
        points = [
            (epoch, row[f"{part}/{term}"])
            for epoch, row in zip(epochs, history, strict=True)
            if row.get(f"{part}/{term}") is not None
        ]
        if points:
            marker = "o" if len(points) < 25 else ""
            axis.plot(
                *zip(*points, strict=True),
                color=colour,
                linestyle=style,
                linewidth=1.6,
                marker=marker,
                markersize=3,
                label=label,
            )
            seen += [value for _, value in points if np.isfinite(value)]
    if seen and term.removeprefix("macro_") not in RATES and min(seen) > 0 and max(seen) / min(seen) > LOG_RATIO:
        axis.set_yscale("log")
    if best is not None:
        axis.axvline(best, color="#444444", linewidth=1.0, linestyle=":", label=f"Best epoch ({best})")
    axis.set(title=term.replace("_", " "), xlabel="Epoch")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.grid(alpha=0.25)


# ------------------------------------------------------------------------------------------ tables as pictures


def metrics_heatmap(rows: Mapping[str, Mapping[str, float | None]]) -> Figure:
    """Categories by metrics, coloured from 0 (dark) to 1 (light), the number in each cell; absent cells blank."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    values = np.array(
        [[np.nan if row.get(name) is None else row[name] for name in names] for row in rows.values()], dtype=float
    )
    labels = list(map(_label, names))
    figure = _heatmap(values, values, ".3f", labels, list(map(_label, rows)), "cividis", "Value (0 to 1)")
    axis = figure.axes[0]
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.set_xticklabels(labels, rotation=35, ha="left")
    return figure


def confusion_heatmap(confusion: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Counts of true (rows) against predicted classes (columns), coloured by share of the true class; zeros blank."""
    confusion = np.asarray(confusion)
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    text = np.where(confusion > 0, confusion.astype(str), "")
    labels = list(map(_label, class_names))
    figure = _heatmap(share, text, "", labels, labels, "Blues", "Share of the true class")
    axis = figure.axes[0]
    axis.set(xlabel="Predicted class", ylabel="True class")
    axis.set_xticklabels(labels, rotation=35, ha="right", rotation_mode="anchor")
    return figure


def _heatmap(
    values: np.ndarray,
    text: np.ndarray,
    form: str,
    columns: Sequence[str],
    rows: Sequence[str],
    palette: str,
    meaning: str,
) -> Figure:
    import seaborn  # here, as it takes a second to load and most pictures do without

    n_rows, n_columns = values.shape
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(0.72 * n_columns + 3.2, 0.5 * n_rows + 2.2), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        seaborn.heatmap(
            values,
            ax=axis,
            annot=text,
            fmt=form,
            cmap=palette,
            vmin=0.0,
            vmax=1.0,
            linewidths=1.0,
            linecolor="white",
            xticklabels=columns,
            yticklabels=rows,
            annot_kws={"size": 9},
            cbar_kws={"label": meaning},
        )
        axis.set_yticklabels(rows, rotation=0)
    return figure


# ------------------------------------------------------------------------------------------ classes and series


def class_probability_panel(
    image: np.ndarray, reconstruction: np.ndarray, probabilities: Mapping[str, float], title: str
) -> Figure:
    """Original, reconstruction and a bar for each class, the most likely on top and coloured."""
    ranked = sorted(probabilities.items(), key=lambda item: -item[1])
    names, values = [_label(name) for name, _ in ranked], [value for _, value in ranked]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(12.5, 3.9), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 3, width_ratios=(1.15, 1.15, 1.3))
        _show_photo(axes[0], image, "Original")
        _show_photo(axes[1], reconstruction, "Reconstruction")
        bars = axes[2].barh(names, values, color=[VALIDATION_COLOUR] + [OTHER_COLOUR] * (len(names) - 1))
        labels = axes[2].bar_label(bars, labels=[f"{100 * value:.1f} %" for value in values], padding=3, fontsize=9)
        for text in (labels[0], axes[2].get_yticklabels()[0]):
            text.set_fontweight("bold")
        axes[2].invert_yaxis()
        axes[2].set(xlim=(0.0, 1.15), xticks=np.linspace(0, 1, 5), xlabel="Probability", title="Classes")
        axes[2].tick_params(axis="y", length=0)
        figure.suptitle(_printable(title))
    return figure


def latent_scatter(points_2d: np.ndarray, labels: Sequence[str]) -> Figure:
    """Latent means projected to two dimensions, (n, 2), with a colour and a shape for each label."""
    points, labels = np.asarray(points_2d, dtype=float), np.asarray(labels, dtype=str)
    if points.shape != (len(labels), 2):
        raise ValueError(f"points are {points.shape}; expected ({len(labels)}, 2)")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.5, 6.0), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        for number, name in enumerate(np.unique(labels)):
            chosen = points[labels == name]
            axis.scatter(
                chosen[:, 0],
                chosen[:, 1],
                s=26,
                alpha=0.75,
                linewidths=0.4,
                edgecolors="white",
                label=_label(name),
                color=CLASS_COLOURS[number % len(CLASS_COLOURS)],
                marker=CLASS_MARKERS[(number + number // len(CLASS_COLOURS)) % len(CLASS_MARKERS)],
            )
        axis.set(xlabel="First component", ylabel="Second component", title="Latent space")
        axis.grid(alpha=0.25)
        figure.legend(loc="outside right upper", frameon=False)
    return figure


def series_figure(values: Sequence[float], times: Sequence[float] | None = None) -> Figure:
    """A series as the classifier sees it, in training and at inference; write it by save(..., tight=True).

    Args:
        times: where along the axis of time each value lies; None: 0, 1, 2 and so on.
    """
    with home_style:
        figure = Figure(figsize=(8, 6), dpi=100)
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        times = np.arange(len(values)) if times is None else times
        axis.plot(times, np.asarray(values, dtype=float), linewidth=1.5, color="#1f77b4")
        axis.grid(alpha=0.3)
        axis.set_xlabel("Time", fontsize=12)
        axis.set_ylabel("Value", fontsize=12)
        axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
    return figure
