"""What each part of DetailVAE is worth: it is trained and tested without one part after the other, over several seeds;
a table and a JSON file.

Parts of training cost a training each, of few images by default; parts of the maps and the score take the weights of
the first row. Every row is what the scripts themselves would give: train_with_validation.py with the row's flags, then
test_vae.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config
import scripts

if __name__ == "__main__":
    scripts.answer_early(config.AblationSettings, __doc__)

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable

import numpy as np

import detail_data
import files
import image_folders
import test_vae
import train_with_validation
from vae_model import BEST

DEFAULT, N_SEEDS = "everything", 3
TRAINED = {
    DEFAULT: [],
    "no drawn defects": ["--drawn-defects", "0"],
    "features as they are: no noise, no patches": ["--feature-noise", "0", "--feature-paste", "0"],
    "no backbone": ["--backbone", "none"],
    "no skips": ["--no-skips"],
    "no perceptual loss": ["--perceptual-weight", "0"],
    "global latent of 1": ["--latent-dim", "1"],
    "detail latent of 1 channel": ["--detail-channels", "1"],
    "no KL term": ["--kl-weight", "0", "--detail-kl-weight", "0"],
}
"""Flags of rows that are trained."""


def alone(kind: str, name: str = "") -> list[str]:
    """Flags that leave of all "map" or "score" shares this one alone, or none."""
    shares = [
        each.name
        for each in dataclasses.fields(config.MapSettings)
        if each.name.startswith(f"{kind}_") and each.name != "map_flips"
    ]
    return [
        word for each in shares for word in ("--" + each.replace("_", "-"), "1" if each == f"{kind}_{name}" else "0")
    ]


RECALIBRATED = {
    "map without residual": ["--map-pixel", "0"],
    "map without likelihood": ["--map-likelihood", "0"],
    "map without bank": ["--map-bank", "0"],
    "map of the plain feature error alone": alone("map", "feature"),
    "residual without ceiling": ["--residual-ceiling", "0"],
    "no outline by the head": ["--segmentation-gate", "0"],
    "faint evidence not linked": ["--link-frac", "0"],
    "map relative to what stands out all over": ["--own-level", "0.2"],
    "averaged over flips": ["--map-flips"],
    "score of the nearest deviations alone": alone("score", "nearest"),
    "score of the bank alone": alone("score", "bank"),
    "score of the likelihood alone": alone("score", "likelihood"),
    "score of the defect map": alone("score"),
}
"""Flags of rows that keep the weights of the first."""
COLUMNS = {
    "image AUROC": ("image", "auroc"),
    "pixel AUROC": ("pixel", "auroc"),
    "pixel AP": ("pixel", "average_precision"),
    "AUPRO": ("pixel", "aupro"),
    "pointing": ("pixel", "pointing"),
    "drawn: image AUROC": ("drawn_defects", "image", "auroc"),
    "drawn: pixel AP": ("drawn_defects", "pixel", "average_precision"),
}


def main(settings: config.AblationSettings) -> None:
    """Every row with every seed, a row printed as soon as it is known; one that fails is left out, with a warning.

    Raises:
        InputError: no row could be measured.
    """
    if settings.weights or settings.resume:
        raise config.UsageError(
            "Every row is trained from the start or takes the weights of the first; expected no --weights and no "
            "--resume."
        )
    rows = chosen_rows(settings.rows)
    if not settings.data_dir:
        settings = train_with_validation.use_demo(settings).replace(train_samples=settings.train_samples)
    settings = detail_data.fitted_as_on_disk(settings, train_with_validation.say)  # the rows' files give every setting
    image_folders.MVTecFolder(settings.data_dir).require_test()
    out, measured = Path(settings.output_dir) / "benchmark_results" / "ablation", []
    print(" | ".join(["row", *COLUMNS, "minutes"]))
    for name in rows:
        if name != DEFAULT and changes_nothing(name, settings):
            train_with_validation.say(f"warning: the row '{name}' is left out: it changes nothing of these settings.")
            continue
        for seed in dict.fromkeys(settings.seeds or range(settings.seed, settings.seed + N_SEEDS)):
            try:
                if name in RECALIBRATED and (DEFAULT, seed) not in {(each["row"], each["seed"]) for each in measured}:
                    # an earlier run's would be there still
                    raise config.InputError(f"the row '{DEFAULT}' left no weights to judge with.")
                measured.append(measure(name, settings.replace(seed=seed), out))
            except config.InputError as error:
                train_with_validation.say(f"warning: the row '{name}' fails with seed {seed}: {error}")
            files.write_json(out.with_suffix(".json"), {"settings": config.as_dict(settings), "rows": measured})
        print(line(name, [each for each in measured if each["row"] == name]), flush=True)
    if not measured:
        raise config.InputError("No row could be measured; the warnings above say why.")
    print(f"figures: {out.with_suffix('.json')}")


def chosen_rows(wanted: tuple[str, ...]) -> list[str]:
    """All rows, or the wanted ones after the first, whose weights others need.

    Raises:
        UsageError: there is no such row.
    """
    known = [*TRAINED, *RECALIBRATED]
    for name in wanted:
        if name not in known:
            raise config.UsageError(
                f"There is no row {name!r}; expected some of {', '.join(repr(each) for each in known)}."
            )
    return [name for name in known if not wanted or name in wanted or name == DEFAULT]


def changes_nothing(name: str, settings: config.AblationSettings) -> bool:
    """Whether a row's flags ask for what the settings say anyway."""
    asked = config.parse(config.TrainSettings, "", (TRAINED | RECALIBRATED)[name])
    return all(getattr(asked, key) == getattr(settings, key) for key in asked.given)


def measure(name: str, settings: config.AblationSettings, out: Path) -> dict:
    """Train or recalibrate one row with ``settings.seed``, test it, and return its figures."""

    def folder(row: str) -> Path:
        return out / f"{row.replace(' ', '_').replace(':', '').replace(',', '')}_{settings.seed}"

    here, started = folder(name), time.perf_counter()
    common = [
        "--output-dir",
        here,
        "--device",
        settings.device,
        "--precision",
        settings.precision,
    ]
    if name in TRAINED:
        base = config.from_dict(config.TrainSettings, config.as_dict(settings))
        config.save(base, here / "base.yaml")
        call(train_with_validation.main, config.TrainSettings, "--config", here / "base.yaml", *common, *TRAINED[name])
    else:
        (here / BEST).unlink(missing_ok=True)  # an earlier run's, of other weights
        call(
            train_with_validation.main,
            config.TrainSettings,
            "--weights",
            folder(DEFAULT) / BEST,
            *common,
            *RECALIBRATED[name],
        )
    minutes = (time.perf_counter() - started) / 60
    call(
        test_vae.main,
        config.DetailTestSettings,
        "--model",
        here / BEST,
        *common,
        "--no-pictures",
        "--bootstrap",
        0,
    )
    report = json.loads((here / "test_results" / "metrics" / "test_metrics.json").read_text(encoding="utf-8"))
    return {
        "row": name,
        "seed": settings.seed,
        "minutes": minutes,
        **{title: value_at(report, path) for title, path in COLUMNS.items()},
    }


def call(stage: Callable[[config.Settings], None], settings_class: type[config.Settings], *flags) -> None:
    """Run a stage as its command line would; what it prints goes beside the table."""
    with contextlib.redirect_stdout(sys.stderr):
        stage(config.parse(settings_class, "", [str(flag) for flag in flags]))


def value_at(report: dict, path: tuple[str, ...]) -> float | None:
    for key in path:
        report = (report or {}).get(key)
    return report["value"] if report else None


def line(name: str, rows: list[dict]) -> str:
    """Mean and spread (largest less smallest) of every figure over the seeds."""
    shown = [f"{name:<44s}"]
    for title in [*COLUMNS, "minutes"]:
        values = [each[title] for each in rows if each[title] is not None]
        digits = 1 if title == "minutes" else 3
        shown.append(f"{np.mean(values):.{digits}f} ({np.ptp(values):.{digits}f})" if values else "-")
    return " | ".join(shown)


if __name__ == "__main__":
    sys.exit(scripts.run_script(config.AblationSettings, __doc__, main))
