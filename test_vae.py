"""Test a trained DetailVAE: figures with intervals, pictures, scores and maps for every image in test/."""

from __future__ import annotations

import sys

import config
import scripts

if __name__ == "__main__":
    scripts.answer_early(config.DetailTestSettings, __doc__)

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoints
import data_loader
import defect_maps
import evaluation
import files
import image_folders
import plots
from tiles import tile_corners, window
from vae_model import BEST

FIGURES = (
    ("image", "auroc"),
    ("image", "average_precision"),
    ("image", "f1"),
    ("pixel", "auroc"),
    ("pixel", "average_precision"),
    ("pixel", "aupro"),
    ("pixel", "f1"),
    ("pixel", "iou"),
    ("pixel", "pointing"),
)
"""What the terminal table and the heatmap show of each category."""
TAKEN_NAMES = {"maps", "metrics", "scores.csv"}
"""What lies in ``test_results`` beside the categories' folders of pictures."""
N_DRAWN = 3
"""Defects drawn on each good image, one at a time, to see how much survives in the reconstruction and how well they are
found.
"""


@dataclass
class Results:
    """The first three lists are parallel, one entry an image in the order tested."""

    items: list[image_folders.MVTecItem] = field(default_factory=list)
    detections: list[defect_maps.Detection] = field(default_factory=list)
    masks: list[np.ndarray | None] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)  # "image" and "reason" of those that cannot be read
    # the rest is of good images only
    quality: dict[str, list[float]] = field(default_factory=lambda: {"mse": [], "psnr": [], "ssim": []})
    skip_leak: list[tuple[float, float]] = field(default_factory=list)
    # "good" or "drawn", and its mask: each good image that is drawn on, and what is drawn
    drawn: list[tuple[str, defect_maps.Detection, np.ndarray]] = field(default_factory=list)


def main(settings: config.DetailTestSettings) -> None:
    """Score test/, write figures and pictures, print the table."""
    model = checkpoints.find_trained(settings.model, settings.output_dir, BEST)
    detector = defect_maps.load_detector(model, settings.device, settings.precision)
    trained_on = Path(detector.settings.data_dir)
    if not settings.data_dir and not trained_on.exists():
        raise config.InputError(f"{trained_on}, which the model was trained on, is not there; expected a --data-dir.")
    folder = image_folders.MVTecFolder(settings.data_dir or trained_on, require_train=False)
    require_free_names(folder)
    for warning in folder.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    out = Path(settings.output_dir) / "test_results"
    remove_earlier(out)
    results = run_test(detector, folder, settings, out)
    made_of = {"model": model, "data_dir": str(folder.root), "seed": settings.seed}
    report = {**make_report(results, detector.calibration, settings), **made_of}
    write_report(report, out / "metrics")
    print(f"model: {model}   data: {folder.root}")
    print(table(report))
    print(f"figures: {out / 'metrics' / 'test_metrics.json'}   scores: {out / 'scores.csv'}")


def require_free_names(folder: image_folders.MVTecFolder) -> None:
    """Nothing, where no category's pictures would lie among other files of ``test_results``.

    Raises:
        InputError: a category is called as a file or folder there.
    """
    for name in (name for name in folder.categories if name.lower() in TAKEN_NAMES):
        raise config.InputError(
            f"The category folder {folder.root / 'test' / name} has the name of other results; expected any but "
            f"{', '.join(sorted(TAKEN_NAMES))}."
        )


def run_test(
    detector: defect_maps.Detector, folder: image_folders.MVTecFolder, settings: config.DetailTestSettings, out: Path
) -> Results:
    """Detect on every readable test image, writing its row of scores.csv and its picture (and map) as soon as it is
    judged.
    """
    by_path = {item.path: item for item in folder.test}
    names, results = output_names(folder), Results()
    # other defects than those that training, of the same seed by default, sets the pixel threshold with
    rng = np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=(1,)))
    batches = data_loader.iter_image_batches(
        list(by_path), detector.image_size, detector.fitting, detector.runtime.batch_size(settings.batch_size)
    )
    with (
        files.open_table(out / "scores.csv") as file,
        tqdm(total=len(by_path), unit="image", file=sys.stderr) as bar,
    ):
        scores = csv.writer(file)
        scores.writerow(["image", "category", "score", "p_value", "label"])

        def warn(sentence: str) -> None:
            bar.write(f"warning: {sentence}", file=sys.stderr)

        for batch in batches:
            for path, reason in batch.errors:
                warn(f"{path} is skipped: {reason}")
                results.skipped.append({"image": folder.relative(path), "reason": reason})
            images, windows = detector.runtime.put(batch.images), batch.windows(detector.fitting, folder.letterboxed)
            detections = detector.detect(images) if len(images) else []
            judged = zip(batch.paths, batch.original_sizes, windows, detections, strict=True)
            for index, (path, original_hw, inside, detection) in enumerate(judged):
                item, image = by_path[path], batch.images[index].numpy()
                mask = image_folders.read_truth(
                    item, detector.image_size, detector.fitting, detection.defect_map.shape, warn, original_hw
                )
                results.items.append(item)
                results.masks.append(None if mask is None else mask[inside])
                if item.category == "good":
                    measure_good(results, detector, images[index : index + 1], detection, inside, rng)
                said = f"{detection.score:.6g}", f"{detection.p_value:.6g}", detection.label
                scores.writerow([folder.relative(item.path), item.category, *said])
                write_image(out, names[item.path], detector.calibration, item, image, detection, mask, settings)
                kept = detection._replace(reconstruction=None, defect_map=detection.defect_map[inside])
                results.detections.append(kept)
            bar.update(len(batch.paths) + len(batch.errors))
    if not results.items:
        raise config.InputError(f"None of the images in {folder.root / 'test'} can be read.")
    return results


def measure_good(
    results: Results,
    detector: defect_maps.Detector,
    image: torch.Tensor,
    detection: defect_maps.Detection,
    inside: tuple[slice, slice],
    rng: np.random.Generator,
) -> None:
    """Reconstruction quality of one good image (1, 3, H, W) already judged, how much of drawn defects survives in it,
    and where they are seen.

    All within its bars; where that is a mere strip nothing is drawn, where it is thinner than SSIM's window there is no
    SSIM.
    """
    plain = torch.from_numpy(detection.reconstruction[None]).to(image.device)
    painted_tiles, tiles = (cut_tiles(each[(..., *inside)], detector.image_size) for each in (plain, image))
    results.quality["mse"].append(evaluation.mse(painted_tiles, tiles).mean().item())
    results.quality["psnr"].append(evaluation.psnr(painted_tiles, tiles, data_range=1.0).mean().item())
    smallest = min(tiles.shape[2:])
    results.quality["ssim"].append(
        evaluation.ssim(painted_tiles, tiles, data_range=1.0).mean().item()
        if smallest > 2 * evaluation.SSIM_RADIUS_PX
        else np.nan
    )
    damaged, masks = data_loader.draw_on(
        image.expand(N_DRAWN, -1, -1, -1), [inside] * N_DRAWN, detector.tile_share(*image.shape[2:]), rng
    )
    if not masks.any():
        return
    damaged = damaged.to(image.device)
    found = detector.detect(damaged)
    for category, each, mask in (
        ("good", detection, np.zeros_like(masks[0])),
        *(("drawn", *each) for each in zip(found, masks, strict=True)),
    ):
        results.drawn.append(
            (category, each._replace(reconstruction=None, defect_map=each.defect_map[inside]), mask[inside])
        )
    images = torch.cat([image, damaged])
    reconstruction = torch.cat(
        [plain, torch.from_numpy(np.stack([each.reconstruction for each in found])).to(image.device)]
    )
    pairs = (([0, index], torch.from_numpy(mask).to(image.device)) for index, mask in enumerate(masks, 1))
    leaks = [evaluation.surviving_contrast(reconstruction[pair], images[pair], mask) for pair, mask in pairs]
    results.skip_leak.append(tuple(map(sum, zip(*leaks, strict=True))))


def cut_tiles(image: torch.Tensor, side: int) -> torch.Tensor:
    """The tiles (N, 3, side, side) of an image (1, 3, H, W); itself where it is one tile."""
    return torch.cat([image[(..., *window(*corner, side))] for corner in tile_corners(*image.shape[2:], side)])


def output_names(folder: image_folders.MVTecFolder) -> dict[Path, str]:
    """What a picture and a map are called below their category's folder: the stem; where another image has that stem,
    or that name with its ending, the path there, with its ending.
    """
    below = {item.path: item.path.relative_to(folder.root / "test" / item.category) for item in folder.test}

    def claimed(item: image_folders.MVTecItem, name: str) -> tuple[str, str]:
        return item.category, name.lower()  # case does not tell files apart everywhere

    claims = Counter(
        claimed(item, name) for item in folder.test for name in (item.path.stem, below[item.path].as_posix())
    )
    named = {
        item.path: Path(item.path.stem) if claims[claimed(item, item.path.stem)] == 1 else below[item.path]
        for item in folder.test
    }
    return {path: shortened(found) for path, found in named.items()}


def shortened(name: Path) -> str:
    """A name or path of a picture as the file system takes it, still without the picture's ending."""
    return name.with_name(files.short_stem(name.name)).as_posix()


def write_image(
    out: Path,
    name: str,
    calibration: defect_maps.Calibration,
    item: image_folders.MVTecItem,
    image: np.ndarray,
    detection: defect_maps.Detection,
    mask: np.ndarray | None,
    settings: config.DetailTestSettings,
) -> None:
    """The panel of one image, and its raw map with --save-maps."""
    if settings.pictures:
        title = (
            f"{item.category}/{item.path.name}: {detection.label}, score {detection.score:.2f} "
            f"(threshold {calibration.threshold:.2f}), p = {detection.p_value:.3f}"
        )
        limit = calibration.pixel_threshold
        figure = plots.defect_panel(
            image,
            detection.reconstruction,
            detection.defect_map,
            detection.defect_map > limit,
            mask,
            title,
            3 * limit,
            limit,
            detection.label == "defective",
        )
        plots.save(figure, out / item.category / f"{name}.png")
    if settings.save_maps:
        path = out / "maps" / item.category / f"{name}.npy"
        with files.whole_file(path) as file:
            np.save(file, detection.defect_map)


def remove_earlier(out: Path) -> None:
    """Remove the figures of an earlier run, and the pictures and maps of the images in its table, whichever way
    ``output_names`` called them.
    """
    for name in ("test_metrics.json", "metrics_heatmap.png"):
        (out / "metrics" / name).unlink(missing_ok=True)
    table = out / "scores.csv"
    if not table.is_file():
        return
    try:
        with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            tested = [Path(row.get("image") or "") for row in csv.DictReader(file)]
    except csv.Error:  # damaged
        return
    for image in tested:
        if len(image.parts) < 3 or ".." in image.parts or "\0" in str(image):  # not our table
            continue
        category, below = image.parts[1], Path(*image.parts[2:])
        for name in map(shortened, (Path(image.stem), below)):
            (out / category / f"{name}.png").unlink(missing_ok=True)
            (out / "maps" / category / f"{name}.npy").unlink(missing_ok=True)


def make_report(results: Results, calibration: defect_maps.Calibration, settings: config.DetailTestSettings) -> dict:
    """test_metrics.json: detection, the same of defects drawn on the good images, reconstruction, skip leak, what could
    not be read, threshold and promise.
    """
    report = figures(
        [item.category for item in results.items], results.detections, results.masks, calibration, settings
    )
    if results.drawn:
        # without intervals: the defects drawn on one image are no independent draws
        drawn = figures(*zip(*results.drawn, strict=True), calibration, settings.replace(bootstrap=0))
        report["drawn_defects"] = {level: drawn[level] for level in ("image", "pixel")}
    quality = {
        name: evaluation.summarise(values, settings.bootstrap, settings.seed)
        for name, values in results.quality.items()
    }
    leak = evaluation.surviving_share(results.skip_leak, settings.bootstrap, settings.seed)
    report["reconstruction"] = {
        name: figure for name, figure in {**quality, "skip_leak": leak}.items() if figure is not None
    }
    if "good" in report["categories"]:
        report["categories"]["good"]["reconstruction"] = report["reconstruction"]
    return {
        **report,
        "skipped": results.skipped,
        "threshold": calibration.threshold,
        "pixel_threshold": calibration.pixel_threshold,
        "alpha": calibration.alpha,
        "alpha_promised": calibration.promised,
    }


def figures(
    categories: Sequence[str],
    detections: Sequence[defect_maps.Detection],
    masks: Sequence[np.ndarray | None],
    calibration: defect_maps.Calibration,
    settings: config.DetailTestSettings,
) -> dict:
    """``evaluation.detection_report`` of detections."""
    scores, called, maps = zip(
        *((each.score, each.label == "defective", each.defect_map) for each in detections), strict=True
    )
    return evaluation.detection_report(
        categories, scores, called, maps, masks, calibration.pixel_threshold, settings.bootstrap, settings.seed
    )


def write_report(report: dict, folder: Path) -> None:
    files.write_json(folder / "test_metrics.json", report)
    plots.save(plots.metrics_heatmap(rows_of(report)), folder / "metrics_heatmap.png")


def rows_of(report: dict) -> dict[str, dict[str, float | None]]:
    """Category -> figure name -> value or None, the whole test last."""
    groups = {name: group for name, group in report["categories"].items() if name != "good"}
    groups["all" if "all" not in groups else "all categories"] = report
    return {
        name: {
            f"{level} {key}".replace("_", " "): group.get(level, {}).get(key, {}).get("value") for level, key in FIGURES
        }
        for name, group in groups.items()
    }


def table(report: dict) -> str:
    """The report as text for the terminal."""
    rows = rows_of(report)
    named = {name: name.replace("average precision", "AP") for name in next(iter(rows.values()))}
    width = max(len(name) for name in rows) + 2
    lines = [" " * width + "  ".join(named.values())]
    for row, values in rows.items():
        cells = {name: "-" if value is None else f"{value:.3f}" for name, value in values.items()}
        lines.append(f"{row:<{width}s}" + "  ".join(f"{cell:>{len(named[name])}s}" for name, cell in cells.items()))
    for group, keys in (
        ("image", ("auroc",)),
        ("pixel", ("auroc", "average_precision", "aupro")),
        ("reconstruction", ("psnr", "ssim", "skip_leak")),
    ):
        lines += [
            f"{group} {key}: {evaluation.figure_text(report[group][key])}"
            for key in keys
            if key in report.get(group, {})
        ]
    drawn = report.get("drawn_defects", {}).get("pixel", {})
    if "average_precision" in drawn:
        lines.append(f"drawn defects, pixel average_precision: {evaluation.figure_text(drawn['average_precision'])}")
    if "false_alarm_rate" in report:
        false_alarms = evaluation.figure_text(report["false_alarm_rate"])
        lines.append(f"false alarms on good images (asked for: {report['alpha']:.1%}): {false_alarms}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(scripts.run_script(config.DetailTestSettings, __doc__, main))
