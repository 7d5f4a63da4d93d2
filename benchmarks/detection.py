"""DetailVAE beside anomalib's PatchCore and PaDiM: same backbone weights, good images, threshold rule and cores; a
table and a JSON file.

Each method runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config
import scripts

if __name__ == "__main__":
    scripts.answer_early(config.DetectionBenchmarkSettings, __doc__)

import contextlib
import importlib.util
import itertools
import multiprocessing
import shutil
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import data_loader
import defect_maps
import detail_data
import engine
import evaluation
import files
import image_folders
import train_with_validation
from coresets import farthest_points
from perceptual_loss import Backbone, load_backbone
from vae_model import BEST

MEASURED = (
    ("image", "auroc"),
    ("image", "f1"),
    ("pixel", "auroc"),
    ("pixel", "average_precision"),
    ("pixel", "aupro"),
    ("pixel", "pointing"),
)
LAYER = "grid"  # what anomalib's models call the features they are given
N_CHANNELS = 100
CORESET_SHARE = 0.1
BATCH_SIZE = 8
N_RESAMPLES = 1000

# --------------------------------------------------------------------------------------------- baselines


class NamedGrid(torch.nn.Module):
    """A backbone's grid as the one layer of anomalib's models, which ask for features by the names of layers."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {LAYER: self.backbone.grid(images)}


def require_anomalib() -> None:
    """Raises InputError where anomalib is not installed."""
    if importlib.util.find_spec("anomalib") is None:
        raise config.InputError(
            "PatchCore and PaDiM are anomalib's, which is not installed; expected pip install -r "
            "benchmarks/requirements.txt, or --methods detailvae."
        )


def anomalib_model(name: str, backbone: Backbone, images: Tensor, seed: int) -> torch.nn.Module:
    """anomalib's PatchCore (Roth et al. 2022) or PaDiM (Defard et al. 2021, over 100 random channels), fitted to
    ``images`` (N, 3, H, W).

    Both see the grid of ``backbone`` in place of a network of their own. PatchCore's coreset is a tenth of the places,
    each the farthest from those chosen before, as in anomalib, but found by ``coresets.farthest_points`` in a random
    projection to 64 dimensions for anomalib's 300.

    Returns:
        A module that takes images (B, 3, H, W) to ``pred_score`` (B,) and ``anomaly_map`` (B, 1, H, W).

    Raises:
        InputError: anomalib is not installed.
    """
    require_anomalib()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports of what is deprecated
        from anomalib.models.image.padim.torch_model import PadimModel
        from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    torch.manual_seed(seed)
    # replaced at once
    model = (PatchcoreModel if name == "patchcore" else PadimModel)(
        backbone="resnet18", layers=["layer1", "layer2"], pre_trained=False
    )
    model.feature_extractor, model.layers = NamedGrid(backbone), [LAYER]
    if name == "padim":
        model.idx = torch.randperm(backbone.channels)[:N_CHANNELS]
    with torch.inference_mode():
        for batch in images.split(BATCH_SIZE):
            model.train()(batch)
        if name == "padim":
            model.fit()
        else:
            places = torch.cat(model.embedding_store)
            model.embedding_store.clear()
            model.memory_bank = places[
                farthest_points(places, max(1, round(CORESET_SHARE * len(places))), torch.Generator().manual_seed(seed))
            ]
    return model.eval()


@dataclass
class Baseline:
    """A feature method with a threshold from held-out good images; ``detect`` as ``defect_maps.Detector`` has it."""

    model: torch.nn.Module
    calibration: defect_maps.Calibration | None = None

    def maps(self, images: Tensor) -> tuple[list[float], np.ndarray]:
        """Scores and maps (B, H, W) of images (B, 3, H, W)."""
        with torch.inference_mode():
            found = self.model(images)
        return found.pred_score.flatten().tolist(), found.anomaly_map[:, 0].numpy()

    def detect(self, images: Tensor) -> list[defect_maps.Detection]:
        return [
            self.calibration.judge(score)._replace(defect_map=each)
            for score, each in zip(*self.maps(images), strict=True)
        ]


def warn(*sentences: str) -> None:
    for sentence in sentences:
        train_with_validation.say(f"warning: {sentence}")


def train_baseline(name: str, settings: config.DetectionBenchmarkSettings) -> Baseline:
    """Fit on the training images, set the thresholds on the held-out ones, both split as DetailVAE splits them.

    Raises:
        InputError: none of either can be read.
    """
    folder = image_folders.MVTecFolder(settings.data_dir)
    runtime = engine.make_runtime(settings.device, settings.precision)
    *paths, _ = detail_data.split_good(settings, folder, runtime, train_with_validation.say)
    training, held = (data_loader.load_batch(each, settings.image_size, settings.resize) for each in paths)
    skipped = (f"{path} is skipped: {reason}" for path, reason in training.errors + held.errors)
    warn(*folder.warnings, *skipped)
    for batch, some, kind in zip((training, held), paths, ("training", "held-out good"), strict=True):
        if not len(batch.images):
            raise config.InputError(f"None of the {len(some)} {kind} images of {settings.data_dir} can be read.")
    baseline = Baseline(
        anomalib_model(name, load_backbone(settings.backbone, settings.vgg16_weights), training.images, settings.seed)
    )
    scores, maps = zip(*(baseline.maps(batch) for batch in held.images.split(BATCH_SIZE)), strict=True)
    all_scores = itertools.chain.from_iterable(scores)
    pixels = defect_maps.pixels_within(maps, held.windows(settings.resize, folder.letterboxed))
    baseline.calibration = defect_maps.Calibration.of(
        {}, all_scores, pixels, settings.target_false_alarms, settings.pixel_false_positives, not settings.trim_frac
    )
    return baseline


def train_detailvae(settings: config.DetectionBenchmarkSettings) -> defect_maps.Detector:
    """What ``train_with_validation.py`` leaves behind."""
    with contextlib.redirect_stdout(sys.stderr):
        train_with_validation.main(config.from_dict(config.TrainSettings, config.as_dict(settings), settings.given))
    return defect_maps.load_detector(Path(settings.output_dir) / BEST, precision=settings.precision)


# ------------------------------------------------------------------------------------------ training sets


def training_set(settings: config.DetectionBenchmarkSettings, n_images: int, folder: Path) -> str:
    """The data set to train and test on: the given one, or one of links in which training has fewer images or defective
    ones.

    Args:
        n_images: in training, all told; 0 keeps every good one.

    Raises:
        InputError: there are not so many images.
    """
    if not n_images and not settings.contamination:
        return settings.data_dir
    source, rng = image_folders.MVTecFolder(settings.data_dir), np.random.default_rng(settings.seed)
    defective = [item for item in source.test if item.category != "good"]
    n_images = n_images or len(source.train_good)
    n_bad = max(1, round(settings.contamination * n_images)) if settings.contamination else 0
    for n, there, kind in (
        (n_images - n_bad, len(source.train_good), "good training images"),
        (n_bad, max(len(defective) - 1, 0), "defective test images beside one that must stay"),
    ):
        if n > there:
            raise config.InputError(f"{settings.data_dir} has {there} {kind}; {n} were asked for.")
    good = [source.train_good[i] for i in sorted(rng.permutation(len(source.train_good))[: n_images - n_bad])]
    hidden = {defective[i].path for i in rng.permutation(len(defective))[:n_bad]}
    shutil.rmtree(folder, ignore_errors=True)
    for path in sorted(hidden):
        link(path, folder / "train" / "good" / source.relative(path))
    for path in [*good, *source.validation_good]:
        link(path, folder / source.relative(path))
    report = files.read_json(source.root / image_folders.REPORT_NAME)  # says where its images have grey bars
    if report:
        moved = {source.relative(path): f"train/good/{source.relative(path)}" for path in hidden}
        kept = [{**row, "output": moved.get(row["output"], row["output"])} for row in image_folders.kept_rows(report)]
        files.write_json(folder / image_folders.REPORT_NAME, {**report, "kept": kept})
    for item in source.test:
        if item.path not in hidden:
            for path in (item.path, *item.mask_paths):
                link(path, folder / source.relative(path))
    return str(folder)


def link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source.resolve())
    except OSError:  # Windows without the right to make links
        shutil.copyfile(source, target)


# ------------------------------------------------------------------------------------------- measurement


def measure(name: str, settings: config.DetectionBenchmarkSettings) -> dict:
    """Train one method, run it over ``test/``; figures with intervals, seconds, images/s with maps, peak memory in MB.

    Raises:
        InputError: images that it needs cannot be read.
    """
    started = time.perf_counter()
    detector = train_detailvae(settings) if name == "detailvae" else train_baseline(name, settings)
    trained = time.perf_counter()
    folder, found = image_folders.MVTecFolder(settings.data_dir), []
    for batch in data_loader.iter_image_batches(
        [item.path for item in folder.test], settings.image_size, settings.fitting, BATCH_SIZE
    ):
        warn(*(f"{path} is skipped: {reason}" for path, reason in batch.errors))
        detections = (
            [each._replace(reconstruction=None) for each in detector.detect(batch.images)] if len(batch.images) else []
        )
        found += zip(
            batch.paths,
            batch.original_sizes,
            batch.windows(settings.fitting, folder.letterboxed),
            detections,
            strict=True,
        )
    if not found:
        raise config.InputError(f"None of the images in {folder.root / 'test'} can be read.")
    speed = {
        "training_s": trained - started,
        "images_per_s": len(found) / (time.perf_counter() - trained),
        "peak_memory_mb": peak_memory_mb(),
    }
    by_path, maps, truths = {item.path: item for item in folder.test}, [], []
    for path, size, inside, each in found:  # grey bars are no pixels
        truth = image_folders.read_truth(
            by_path[path], settings.image_size, settings.fitting, each.defect_map.shape, warn, size
        )
        maps.append(each.defect_map[inside])
        truths.append(None if truth is None else truth[inside])
    report = evaluation.detection_report(
        [by_path[path].category for path, *_ in found],
        [each.score for *_, each in found],
        [each.label == "defective" for *_, each in found],
        maps,
        truths,
        detector.calibration.pixel_threshold,
        N_RESAMPLES,
        settings.seed,
    )
    return {
        "method": name,
        "seed": settings.seed,
        "train_images": len(folder.train_good),
        "contamination": settings.contamination,
        **{f"{level} {key}": report.get(level, {}).get(key) for level, key in MEASURED},
        **speed,
    }


def peak_memory_mb() -> float | None:
    """Peak resident memory of this process; None on Windows, which does not say."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main(settings: config.DetectionBenchmarkSettings) -> None:
    """Every method with every seed on the CPU, a row printed as soon as it is known; one that fails is left out, with a
    warning.

    Raises:
        InputError: no method could be measured.
    """
    if settings.weights:
        raise config.UsageError("Every method is trained; expected no --weights.")
    if not settings.data_dir:
        settings = train_with_validation.use_demo(settings)
    if not settings.methods:
        raise config.UsageError("--methods names none; expected some of detailvae, patchcore, padim.")
    if settings.device == "cuda" or settings.backbone == "none":
        raise config.UsageError(
            "The baselines need a backbone and run on the CPU; expected no --device cuda and no --backbone none."
        )
    if settings.tile and set(settings.methods) != {"detailvae"}:
        raise config.UsageError("The baselines see whole images; expected --methods detailvae with --tile.")
    settings = detail_data.fitted_as_on_disk(settings, train_with_validation.say)
    image_folders.MVTecFolder(settings.data_dir).require_test()
    if set(settings.methods) != {"detailvae"}:
        require_anomalib()
    out, rows = Path(settings.output_dir) / "benchmark_results", []
    print(
        "  ".join(
            [
                "method    ",
                "seed",
                "images",
                *(f"{level} {key}".replace("average_precision", "AP").rjust(24) for level, key in MEASURED),
                "training",
                "images/s",
                "memory",
            ]
        )
    )
    for n_images, seed in itertools.product(settings.train_images or (0,), settings.seeds or (settings.seed,)):
        data_dir = training_set(settings.replace(seed=seed), n_images, out / f"data_{n_images}_{seed}")
        for name in settings.methods:
            run = settings.replace(
                seed=seed,
                data_dir=data_dir,
                device="cpu",
                resume=False,
                output_dir=str(out / f"{name}_{n_images}_{seed}"),
            )
            try:
                rows.append(in_own_process(name, run))
            except config.InputError as error:
                warn(f"{name} fails with seed {seed}: {error}")
                continue
            print(line(rows[-1]), flush=True)
            files.write_json(out / "detection.json", {"settings": config.as_dict(settings), "rows": rows})
    if not rows:
        raise config.InputError("No method could be measured; the warnings above say why.")
    print(f"figures: {out / 'detection.json'}")


def in_own_process(name: str, settings: config.DetectionBenchmarkSettings) -> dict:
    """``measure`` where memory and libraries are fresh.

    Raises:
        InputError: the process was killed, most likely for want of memory.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, name, settings).result()
        except BrokenProcessPool:
            raise config.InputError(
                f"{name} was killed, most likely for want of memory; try a smaller --image-size."
            ) from None
        except KeyboardInterrupt:  # the pool would wait for the whole training
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def line(row: dict) -> str:
    """A row of the table."""
    shown = [f"{row['method']:<10s}", f"{row['seed']:>4d}", f"{row['train_images']:>6d}"]
    for level, key in MEASURED:
        shown.append(evaluation.figure_text(row[f"{level} {key}"], "").rjust(24))
    memory = row["peak_memory_mb"]
    return "  ".join(
        [*shown, f"{row['training_s']:>6.0f} s", f"{row['images_per_s']:>8.1f}", f"{memory:>5.0f}M" if memory else "-"]
    )


if __name__ == "__main__":
    sys.exit(scripts.run_script(config.DetectionBenchmarkSettings, __doc__, main))
