"""Call every image of a folder good or defective, with a table, an overlay for each defective one and a summary."""

from __future__ import annotations

import sys

import config
import scripts

if __name__ == "__main__":
    scripts.answer_early(config.ClassifySettings, __doc__)

import csv
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
from tqdm import tqdm

import checkpoints
import data_loader
import files
import image_files
import image_folders
import plots
from defect_maps import Detection, Detector, load_detector
from vae_model import BEST

__all__ = ["Classified", "classify", "classify_folder", "load_detector"]


OVERLAY_NAME = re.compile(r"\d{5,}_.*\.jpg", re.DOTALL)
"""What overlays are called: the number of the row, and the image's stem."""
JPEG_SIDE_PX = 65_500
"""The longest side that JPEG files are written with."""


class Classified(NamedTuple):
    """What is said of one file; ``detection`` is None and ``error`` says why where it cannot be read."""

    path: Path
    detection: Detection | None
    error: str = ""


def main(settings: config.ClassifySettings) -> None:
    """Classify, write results.csv and overlays, print the summary.

    Raises:
        InputError: there is no image, or none can be read; the table then says why of each.
    """
    model = checkpoints.find_trained(settings.model, settings.output_dir, BEST)
    detector = load_detector(model, settings.device, settings.precision)
    if settings.target_false_alarms:
        detector.calibration = detector.calibration.at(settings.target_false_alarms)
        if not detector.calibration.promised:
            print(f"warning: {detector.calibration.describe()}", file=sys.stderr)
    out = Path(settings.output_dir) / "classification_results"
    paths = image_folders.find_images(settings.images, [out])
    counts = {"good": 0, "defective": 0, "error": 0}
    started = time.perf_counter()
    files.remove_written(out, {"overlays": OVERLAY_NAME}, paths)
    with (
        files.open_table(out / "results.csv") as file,
        tqdm(total=len(paths), unit="image", file=sys.stderr) as bar,
    ):
        writer = csv.writer(file)
        writer.writerow(["image", "score", "p_value", "label", "reason"])
        for number, result in enumerate(classify(detector, paths, settings.batch_size), 1):
            writer.writerow(row(result))
            counts[label_of(result)] += 1
            if settings.overlays and label_of(result) == "defective":
                name = f"{number:05d}_{files.short_stem(result.path.stem)}.jpg"
                try:
                    write_overlay(result, detector, out / "overlays" / name)
                except image_files.ImageError as error:  # gone, or another, since it was judged
                    bar.write(f"warning: {error} It is called defective and has no overlay.", file=sys.stderr)
            bar.update()
    seconds = time.perf_counter() - started
    threshold, alpha = detector.calibration.threshold, detector.calibration.alpha
    files.write_json(out / "summary.json", {"model": model, "threshold": threshold, "alpha": alpha, **counts})
    print(f"model: {model}   threshold: {threshold:.3f}")
    print(
        f"{counts['good']} good, {counts['defective']} defective, {counts['error']} unreadable; "
        f"{len(paths) / seconds:.1f} images/s"
    )
    print(
        f"table: {out / 'results.csv'}"
        + (f"   overlays: {out / 'overlays'}" if counts["defective"] and settings.overlays else "")
    )
    if counts["error"] == len(paths):
        raise config.InputError(f"No image can be read; the last, {result.path}, {result.error}.")


def classify(
    detector: Detector, paths: Sequence[Path], batch_size: int = 0, thorough: bool = False
) -> Iterator[Classified]:
    """One result a file, in batches in the order of the paths, unreadable ones first; memory does not grow with n.

    Only with ``thorough`` have good images a defect map and a reconstruction too; that takes them twice the time.
    """
    batches = data_loader.iter_image_batches(
        paths, detector.image_size, detector.fitting, detector.runtime.batch_size(batch_size)
    )

    def detected(batch: data_loader.ImageBatch) -> list[Classified]:
        detections = detector.detect(detector.runtime.put(batch.images), thorough) if len(batch.images) else []
        return [Classified(path, None, reason) for path, reason in batch.errors] + [
            Classified(path, detection) for path, detection in zip(batch.paths, detections, strict=True)
        ]

    for found in detector.runtime.each(detected, batches):
        yield from found


def classify_folder(
    folder: str | Path | Sequence[str | Path], detector: Detector, batch_size: int = 0, thorough: bool = True
) -> list[Classified]:
    """Results for every image below a folder (or in a list of files), for notebooks; about 16 bytes a pixel of the
    images as the network sees them.

    Raises:
        InputError: there is no image.
    """
    return list(classify(detector, image_folders.find_images(folder), batch_size, thorough))


def label_of(result: Classified) -> str:
    return result.detection.label if result.detection else "error"


def row(result: Classified) -> list[str]:
    if result.detection is None:
        return [str(result.path), "", "", "error", result.error]
    return [
        str(result.path),
        f"{result.detection.score:.6g}",
        f"{result.detection.p_value:.6g}",
        result.detection.label,
        "",
    ]


def write_overlay(result: Classified, detector: Detector, path: Path) -> None:
    """The photograph at its own size, but for sides that JPEG does not hold, with the defect map over it."""
    image = image_files.read_image(result.path)
    if max(image.shape[:2]) > JPEG_SIDE_PX:
        scale = JPEG_SIDE_PX / max(image.shape[:2])
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    defect_map = image_files.unfit_map(result.detection.defect_map, image.shape[:2], detector.fitting)
    threshold = detector.calibration.pixel_threshold
    overlay = plots.overlay_image(image, defect_map, defect_map > threshold, threshold)
    in_bgr = cv2.cvtColor(overlay, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", in_bgr, [cv2.IMWRITE_JPEG_QUALITY, 90])
    files.write_whole(path, encoded.tobytes())


if __name__ == "__main__":
    sys.exit(scripts.run_script(config.ClassifySettings, __doc__, main))
