"""Name the anomaly in plots and CSV series: a table, pictures and top classes; also draws and walks through the latent
space.
"""

from __future__ import annotations

import sys

import config
import scripts

if __name__ == "__main__":
    scripts.answer_early(config.InferClassifierSettings, __doc__)

import csv
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import checkpoints
import data_loader
import data_loader_supervised as plot_loader
import engine
import files
import image_files
import latent_space
import plots
import series_plots
import vae_classifier
from vae_classifier import BEST, VAEClassifier, load_vae_classifier

__all__ = ["batch_predict", "load_vae_classifier", "predict", "predict_from_csv", "predict_single_image"]

PREDICTIONS, LATENT = Path("results") / "vae_classifier_predictions", Path("results") / "latent"
PICTURE_NAME = re.compile(r"\d{5,}_.*\.png", re.DOTALL)
"""What pictures of predictions are called: the number of the row, and the plot's stem."""
FEW_FILES = 20
AGREEMENT = (
    ": adjusted Rand index {adjusted_rand_index:.3f} against the classes of {n_plots} plots (0: by chance, 1: the same "
    "groups)"
)


class Predicted(NamedTuple):
    """What is said of one file; where it cannot be used, ``error`` says why and the rest is empty."""

    path: Path
    probabilities: dict[str, float] = {}  # by falling probability  # noqa: RUF012
    p_value: float = 1.0
    image: Tensor | None = None  # (3, S, S) in [0, 1] as the network saw it
    reconstruction: Tensor | None = None  # (3, R, R) in [0, 1]
    mu: np.ndarray | None = None  # (D,)
    error: str = ""
    note: str = ""  # what to know of it: of a CSV, the column read, rows that hold no number

    @property
    def name(self) -> str:
        """The likeliest class, or "error"."""
        return "error" if self.error else next(iter(self.probabilities))

    @property
    def confidence(self) -> float:
        return 0.0 if self.error else next(iter(self.probabilities.values()))


# ---------------------------------------------------------------------------------------- for notebooks


def predict(
    paths: Sequence[str | Path],
    model: VAEClassifier,
    class_names: Sequence[str],
    device: torch.device | str | None = None,
    batch_size: int = 32,
    flips_below: float | None = None,
) -> Iterator[Predicted]:
    """One result a file, image or CSV, in the order of the paths; memory does not grow with their number.

    Args:
        device: where to compute, and where the model is put; None for where it lies.
        flips_below: average over the flips of training where the class is less sure than this; None does as calibrated.

    Raises:
        InputError: the model comes from no file, or has another number of classes than there are names.
    """
    _require_names(model, class_names)
    runtime = _runtime(model, device)
    batches = plot_loader.iter_plots(
        paths, model.run_settings["image_size"], model.run_settings["crop_axes"], batch_size
    )
    for batch, found in runtime.each(
        lambda batch: (batch, list(_judged(batch, model, class_names, runtime, flips_below))), batches
    ):
        yield from (found[i] for i in np.argsort(batch.places))


def _runtime(model: VAEClassifier, device: torch.device | str | None) -> engine.Runtime:
    """Where to compute, and the model is put there."""
    runtime = engine.Runtime(next(model.parameters()).device if device is None else engine.resolve_device(device))
    model.to(runtime.device)
    return runtime


def _require_names(model: VAEClassifier, class_names: Sequence[str]) -> None:
    if model.calibration is None:
        raise config.InputError("The model comes from no file; expected one that load_vae_classifier returns.")
    if len(class_names) != len(model.class_names):
        raise config.InputError(
            f"{len(class_names)} class names for a model of {len(model.class_names)} classes; expected "
            f"{', '.join(model.class_names)}."
        )


def _judged(
    batch: plot_loader.PlotBatch,
    model: VAEClassifier,
    class_names: Sequence[str],
    runtime: engine.Runtime,
    flips_below: float | None,
) -> Iterator[Predicted]:
    """One result a file, unreadable ones first."""
    yield from (Predicted(path, error=reason) for path, reason in batch.errors)
    if not len(batch.images):
        return
    said = vae_classifier.judge(model, runtime.put(batch.images), flips_below)
    for i, path in enumerate(batch.paths):
        order = np.argsort(-said.probabilities[i], kind="stable")
        ranked = {class_names[k]: float(said.probabilities[i, k]) for k in order}
        yield Predicted(
            path,
            ranked,
            float(said.p_values[i]),
            batch.images[i],
            torch.from_numpy(said.reconstruction[i]),
            said.mu[i],
            note=batch.notes[i],
        )


def predict_single_image(
    image_path: str | Path,
    model: VAEClassifier,
    class_names: Sequence[str],
    device: torch.device | str | None = None,
    save_visualization: str | Path | None = None,
) -> tuple[str, dict[str, float], Tensor]:
    """(class, probabilities by falling size, reconstruction (3, R, R) in [0, 1]) of an image or the plot of a CSV.

    Args:
        save_visualization: file for the picture of original, reconstruction and classes; none when None.

    Raises:
        InputError: the file cannot be used.
    """
    found = next(predict([image_path], model, class_names, device))
    if found.error:
        raise config.InputError(f"{image_path} {found.error}.")
    if save_visualization:
        write_panel(found, model, Path(save_visualization))
    return found.name, found.probabilities, found.reconstruction


def batch_predict(
    image_dir: str | Path,
    model: VAEClassifier,
    class_names: Sequence[str],
    device: torch.device | str | None = None,
    output_dir: str | Path | None = None,
) -> list[tuple[str, str, float]]:
    """[(name, class, confidence), ...] for every image and CSV below a folder; unreadable ones as ("...", "error",
    0.0).

    With ``output_dir``, predictions.csv and a picture of each plot (200 at most) are written there.

    Raises:
        InputError: there is no such folder, or nothing in it, or ``output_dir`` cannot be made, or is that very folder.
    """
    is_folder = isinstance(image_dir, (str, Path)) and Path(image_dir).is_dir()
    if output_dir is not None and is_folder and Path(output_dir).resolve() == Path(image_dir).resolve():
        raise config.InputError(
            f"output_dir is {output_dir}, the folder of the plots; expected another, as the pictures there "
            "would be taken for plots the next time."
        )
    paths = plot_loader.find_plots(image_dir, [] if output_dir is None else [Path(output_dir)])
    results = predict(paths, model, class_names, device)
    if output_dir is not None:
        settings = config.InferClassifierSettings()
        results = recorded(results, model, class_names, Path(output_dir), settings.max_pictures, Tally())
    base = Path(image_dir) if is_folder else None
    return [
        (each.path.relative_to(base).as_posix() if base else each.path.name, each.name, each.confidence)
        for each in results
    ]


def predict_from_csv(
    csv_path: str | Path,
    model: VAEClassifier,
    class_names: Sequence[str],
    device: torch.device | str | None = None,
    save_plot: bool = True,
    output_dir: str | Path = PREDICTIONS,
) -> tuple[str, dict[str, float]]:
    """(class, probabilities by falling size) of a CSV series; its plot is kept as ``output_dir/<stem>_plot.png``.

    Raises:
        InputError: the CSV cannot be used.
    """
    _require_names(model, class_names)
    plot = series_plots.render_series(series_plots.read_series(csv_path).values)
    image = plot_loader.prepare_image(plot, model.run_settings["image_size"], model.run_settings["crop_axes"])
    batch = plot_loader.PlotBatch(data_loader.to_tensor(image), [Path(csv_path)], [""], [], [0])
    found = next(_judged(batch, model, class_names, _runtime(model, device), None))
    if save_plot:
        image_files.write_png(Path(output_dir) / f"{files.short_stem(Path(csv_path).stem)}_plot.png", plot)
    return found.name, found.probabilities


# ------------------------------------------------------------------------------------- the command line


@dataclass
class Tally:
    """What the command counts on its way."""

    names: Counter = field(default_factory=Counter)
    n_unreadable: int = 0
    n_unknown: int = 0
    n_remarks: int = 0
    n_pictures: int = 0
    picture_s: float = 0.0


def main(settings: config.InferClassifierSettings) -> None:
    """Predict, write predictions.csv and pictures, print top classes or a summary;
    then what the latent flags ask for."""
    if not settings.inputs and not settings.generate:
        raise config.UsageError(
            "No plots given; expected images, CSVs or folders (or --generate CLASS). See inference_vae_classifier.py "
            "--help."
        )
    device = engine.resolve_device(settings.device)
    written = [Path(settings.output_dir) / folder for folder in (PREDICTIONS, LATENT)]
    paths = plot_loader.find_plots(settings.inputs, written) if settings.inputs else []
    if settings.interpolate and len(paths) != 2:
        raise config.UsageError(f"--interpolate takes exactly two plots; got {len(paths)}.")
    if paths and settings.clusters > len(paths):
        raise config.UsageError(
            f"{len(paths)} plots cannot make {settings.clusters} clusters; expected at least as many plots."
        )
    path = checkpoints.find_trained(settings.model, settings.output_dir, BEST)
    model, names = load_vae_classifier(path, device)
    print(f"model: {path}")
    if settings.generate:
        write_generated(model, settings)
    if paths:
        kept = predict_all(paths, model, names, device, settings)
        write_latent(kept, model, settings)


def predict_all(
    paths: list[Path],
    model: VAEClassifier,
    names: list[str],
    device: torch.device,
    settings: config.InferClassifierSettings,
) -> list[Predicted]:
    """Predict every file; returns the results without pictures where a latent flag needs them, else nothing.

    Raises:
        InputError: none can be read; the table then says why of each.
    """
    out, tally = Path(settings.output_dir) / PREDICTIONS, Tally()
    flips_below = {"auto": None, "always": 1.0, "never": 0.0}[settings.flips]
    keep, kept = settings.encode or settings.clusters or settings.scatter != "none" or settings.interpolate, []
    started = time.perf_counter()
    files.remove_written(out, {"": PICTURE_NAME}, paths)
    results = recorded(
        predict(paths, model, names, device, settings.batch_size, flips_below),
        model,
        names,
        out,
        settings.max_pictures if settings.pictures else 0,
        tally,
    )
    for each in tqdm(results, total=len(paths), unit="plot", file=sys.stderr):
        if each.error or (each.note and len(paths) <= FEW_FILES):
            tqdm.write(f"warning: {each.path}{':' if each.note else ''} {each.error or each.note}.", file=sys.stderr)
        if len(paths) <= FEW_FILES:
            print(top_three(each, model))
        if keep:
            kept.append(each if settings.interpolate else each._replace(image=None, reconstruction=None))
    seconds = time.perf_counter() - started - tally.picture_s
    if len(paths) > FEW_FILES and tally.n_remarks:
        print(f"warning: remarks on {tally.n_remarks} files are in {out / 'remarks.csv'}.", file=sys.stderr)
    print(summary(tally, len(paths), seconds, model))
    print(
        f"table: {out / 'predictions.csv'}"
        + (
            f"   pictures: {out} ({tally.n_pictures} of {len(paths)}, {tally.picture_s:.1f} s; --max-pictures sets "
            "how many)"
            if tally.n_pictures
            else ""
        )
    )
    if tally.n_unreadable == len(paths):
        raise config.InputError(f"No file can be read; the last, {each.path}, {each.error}.")
    return kept


def recorded(
    results: Iterator[Predicted],
    model: VAEClassifier,
    class_names: Sequence[str],
    out: Path,
    max_pictures: int,
    tally: Tally,
) -> Iterator[Predicted]:
    """The same results, each written to ``out/predictions.csv``, what is wrong with one to ``out/remarks.csv``, and the
    first ones as a picture, on its way.
    """
    with files.open_table(out / "predictions.csv") as file, files.open_table(out / "remarks.csv") as remarks_file:
        writer, remarks = csv.writer(file), csv.writer(remarks_file)
        writer.writerow(["path", "predicted", "confidence", "p_value", *class_names])
        remarks.writerow(["path", "remark"])
        for number, each in enumerate(results, 1):
            writer.writerow(row(each, class_names))
            if each.error or each.note:
                remarks.writerow([str(each.path), each.error or each.note])
                tally.n_remarks += not each.error
            tally.names[each.name] += 1
            tally.n_unreadable += bool(each.error)
            tally.n_unknown += is_unknown(each, model)
            if tally.n_pictures < max_pictures and not each.error:
                begun = time.perf_counter()
                write_panel(each, model, out / f"{number:05d}_{files.short_stem(each.path.stem)}.png")
                tally.n_pictures += 1
                tally.picture_s += time.perf_counter() - begun
            yield each


def row(each: Predicted, class_names: Sequence[str]) -> list[str]:
    if each.error:
        return [str(each.path), "error", "", "", *[""] * len(class_names)]
    return [
        str(each.path),
        each.name,
        f"{each.confidence:.6g}",
        f"{each.p_value:.6g}",
        *(f"{each.probabilities[name]:.6g}" for name in class_names),
    ]


def is_unknown(each: Predicted, model: VAEClassifier) -> bool:
    """Whether the picture is none of the known kinds, at the calibrated rate of false alarms."""
    return not each.error and each.p_value <= model.calibration.alpha


def top_three(each: Predicted, model: VAEClassifier) -> str:
    if each.error:
        return f"{each.path}: error: {each.error}"
    shown = ", ".join(f"{name} {share:.1%}" for name, share in list(each.probabilities.items())[:3])
    return f"{each.path}: " + (
        f"none of these (p = {each.p_value:.3f}; nearest: {shown})"
        if is_unknown(each, model)
        else f"{shown} (p = {each.p_value:.2f})"
    )


def summary(tally: Tally, n_files: int, seconds: float, model: VAEClassifier) -> str:
    lines = (
        [f"{name:<24s}{tally.names[name]:>7d}" for name in [*model.class_names, "error"] if tally.names[name]]
        if n_files > FEW_FILES
        else []
    )
    alpha = model.calibration.alpha
    note = "" if model.calibration.promised else "; too few validation plots to call anything so"
    lines.append(
        f"{n_files} files, {tally.n_unreadable} unreadable, {tally.n_unknown} none of these (at {100 * alpha:g}% false "
        f"alarms{note}); {n_files / max(seconds, 1e-9):.1f} plots/s"
    )
    return "\n".join(lines)


def write_panel(each: Predicted, model: VAEClassifier, path: Path) -> None:
    """Original, reconstruction and class probabilities of one plot."""
    said = f"none of these (nearest: {each.name})" if is_unknown(each, model) else each.name
    title = f"{each.path.name}: {said.replace('_', ' ')}, {each.confidence:.1%}, p = {each.p_value:.3f}"
    plots.save(
        plots.class_probability_panel(each.image.numpy(), each.reconstruction.numpy(), each.probabilities, title), path
    )


# ---------------------------------------------------------------------------------------- latent space


def write_generated(model: VAEClassifier, settings: config.InferClassifierSettings) -> None:
    """results/latent/generated_<class>.png: plots drawn from the class's latent Gaussian."""
    drawn = latent_space.generate_class(model, settings.generate, settings.n_pictured, settings.seed)
    path = Path(settings.output_dir) / LATENT / f"generated_{settings.generate}.png"
    n_rows = len(drawn) // 4 if len(drawn) % 4 == 0 else 1
    image_files.write_png(path, plots.picture_sheet(np.split(drawn.numpy(), n_rows)))
    print(f"{len(drawn)} plots of {settings.generate}: {path}")


def write_latent(kept: list[Predicted], model: VAEClassifier, settings: config.InferClassifierSettings) -> None:
    """The table, clusters, scatters and interpolation that the flags ask for."""
    out, kept = Path(settings.output_dir) / LATENT, [each for each in kept if not each.error]
    mu, labels, clusters = np.array([each.mu for each in kept]), [folder_class(each, model) for each in kept], None
    if settings.encode or settings.clusters:
        write_table(kept, clusters, out / "latent.csv")
        print(f"latent means: {out / 'latent.csv'}")
    if settings.clusters:
        clusters = latent_space.cluster(mu, settings.clusters, settings.seed)
        write_table(kept, clusters, out / "latent.csv")
        found = latent_space.agreement(labels, clusters)
        files.write_json(out / "clusters.json", {"n_clusters": settings.clusters, **found})
        print(f"{settings.clusters} clusters{AGREEMENT.format(**found) if found else ''}")
    if settings.scatter != "none":
        points = latent_space.project_2d(mu, settings.scatter, settings.seed)
        groups = {"scatter": [label or each.name for label, each in zip(labels, kept, strict=True)]} | (
            {}
            if clusters is None
            else {"clusters": [f"cluster {number:{len(str(settings.clusters - 1))}d}" for number in clusters]}
        )
        for name, group in groups.items():
            path = out / f"{name}_{settings.scatter}.png"
            plots.save(plots.latent_scatter(points, group), path)
            print(f"{name}: {path}")
    if settings.interpolate:
        if len(kept) != 2:
            raise config.InputError("One of the two plots cannot be read, so there is no way between them.")
        drawn, probabilities = latent_space.interpolate(model, kept[0].image, kept[1].image, settings.n_pictured)
        image_files.write_png(out / "interpolation.png", plots.picture_sheet([drawn.numpy()]))
        print(
            f"interpolation: {out / 'interpolation.png'} "
            f"({' -> '.join(model.class_names[k] for k in probabilities.argmax(1))})"
        )


def folder_class(each: Predicted, model: VAEClassifier) -> str:
    """The class whose folder the plot lies in, else nothing."""
    return each.path.parent.name if each.path.parent.name in model.class_names else ""


def write_table(kept: list[Predicted], clusters: np.ndarray | None, path: Path) -> None:
    """latent.csv: path, predicted class, cluster where there are any, latent means."""
    grouped = [[]] * len(kept) if clusters is None else [[number] for number in clusters]
    with files.open_table(path) as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "path",
                "predicted",
                *(["cluster"] if clusters is not None else []),
                *(f"mu_{i}" for i in range(len(kept[0].mu) if kept else 0)),
            ]
        )
        writer.writerows(
            [str(each.path), each.name, *group, *(f"{value:.6g}" for value in each.mu)]
            for each, group in zip(kept, grouped, strict=True)
        )


if __name__ == "__main__":
    sys.exit(scripts.run_script(config.InferClassifierSettings, __doc__, main))
