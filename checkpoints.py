"""Checkpoints: written whole or not at all, read without running code from them; and the state of training that a run
goes on from.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import platform
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

import files
from config import InputError, Settings, UsageError, as_dict
from engine import DivergedError, Runtime, random_state, restore_random_state
from scripts import is_out_of_memory

FORMAT = 13
"""Format number written into every checkpoint; a reader refuses any other."""
MAY_DIFFER = {"resume", "epochs", "output_dir", "device", "precision", "num_workers", "picture_every"}
"""Settings in which a resumed run of any stage may differ from the one that it goes on with."""


def versions() -> dict[str, str]:
    """Versions of what wrote a checkpoint."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}


def save_checkpoint(path: Path, kind: str, contents: dict) -> None:
    """Write a checkpoint of plain values, whole or not at all.

    Raises:
        InputError: the folder cannot be written or the disk is full; an older file at the path is kept.
    """
    content = io.BytesIO()  # not the file itself: torch hides why it cannot be written, as on a full disk
    torch.save({"format": FORMAT, "kind": kind, "versions": versions(), **contents}, content)
    files.write_whole(Path(path), content.getbuffer(), sync=True)


def find_trained(given: str, output_dir: str, usual: Path) -> str:
    """The checkpoint given; else the usual one under the output folder, or under the current folder where that alone
    has one.
    """
    there = Path(output_dir) / usual
    return given or str(usual if usual.exists() and not there.exists() else there)


def load_checkpoint(path: Path | str, kind: str, needs: Iterable[str] = ()) -> dict:
    """Read a checkpoint onto the CPU without ever running code from it.

    Args:
        needs: names that must be among the contents.

    Raises:
        InputError: no such file, truncated, not a checkpoint of ours, of another format or kind, or incomplete.
    """
    given, path = str(path), Path(path)
    if not path.is_file():
        raise InputError(
            f"There is no checkpoint at {given or 'an empty path'}; expected the file that training writes."
        )
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, *files.DAMAGED_CHECKPOINT):
        raise InputError(
            f"{path} is not a readable checkpoint: it is truncated, of another program, or holds code, which is never "
            "run."
        ) from None
    if not isinstance(contents, dict) or not isinstance(contents.get("format"), int) or contents["format"] != FORMAT:
        raise InputError(
            f"{path} is not a checkpoint of format {FORMAT}; expected a file written by this version's training."
        )
    if contents.get("kind") != kind:
        raise InputError(f"{path} holds a '{contents.get('kind')}'; expected a '{kind}'.")
    missing = [name for name in needs if contents.get(name) is None]
    if missing:
        raise InputError(
            f"{path} is incomplete: it lacks {', '.join(missing)}; train again or take another checkpoint."
        )
    return contents


@contextlib.contextmanager
def reading_contents(path: Path | str) -> Iterator[None]:
    """Within it, whatever is wrong with what a checkpoint holds becomes one sentence.

    Raises:
        InputError: a value is missing, of another type or outside its bounds.
    """
    try:
        yield
    except (UsageError, TypeError, KeyError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{path} is damaged: what it holds cannot be used ({str(error).rstrip('.')}); train again "
            "or take another checkpoint."
        ) from None


def finite(name: str, value: object) -> float:
    """A number that a checkpoint holds.

    Raises:
        ValueError: it is something else, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; expected a finite number")
    return float(value)


def load_weights(model: nn.Module, state: dict, path: Path | str) -> nn.Module:
    """Copy a state dict into a model.

    Raises:
        InputError: names or shapes do not match the architecture, or a weight is not finite.
    """
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError):
        raise InputError(
            f"The weights in {path} do not fit its own architecture settings; the file is damaged."
        ) from None
    if not all(torch.isfinite(weight).all() for weight in model.state_dict().values()):
        raise InputError(f"{path} holds weights that are not finite; the file is damaged.")
    return model


# ---------------------------------------------------------------------------------------------- resuming


class TrainingRun(Protocol):
    """What a training stage's own ``Run`` has, and what goes into the file it resumes from."""

    settings: Settings
    runtime: Runtime
    model: nn.Module
    history: list[dict]
    best: float
    best_epoch: int

    @property
    def epochs(self) -> int:
        """How many there are in all."""

    @property
    def sources(self) -> dict:
        """Plain values that tell one training set from another."""


def describe_files(folder: Path, paths: Sequence[Path]) -> dict:
    """How many training files there are, and two fingerprints: of their places below the folder and their sizes, and of
    what they hold.
    """
    marks = [(path.relative_to(folder).as_posix(), path.stat().st_size if path.exists() else -1) for path in paths]
    contents = [files.digest(path) for path in paths]
    return {
        "n_training_files": len(marks),
        "training_files": _fingerprint(marks),
        "training_contents": _fingerprint(contents),
    }


def _fingerprint(values: list) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def require_same_files(path: Path | str, run: TrainingRun, contents: dict, how: str) -> None:
    """Raise InputError where a checkpoint's ``sources`` differ from the run's in anything that it tells of them."""
    require_same(path, run.sources, {**run.sources, **contents.get("sources", {})}, f"expected the data of then {how}.")


def require_epoch(path: Path | str, contents: dict, run: TrainingRun) -> None:
    """Raise InputError where what should be the best model of a run is that of an earlier epoch; a later one is the
    run's own, interrupted before it wrote so.
    """
    with reading_contents(path):
        is_earlier = contents["epoch"] < run.best_epoch
    if is_earlier:
        raise InputError(
            f"{path} holds the model of epoch {contents['epoch']}; expected that of epoch {run.best_epoch}, the best "
            "of this run."
        )


STATE_OF_TRAINING = (
    "settings",
    "model",
    "optimizer",
    "scheduler",
    "scaler",
    "random",
    "history",
    "best",
    "best_epoch",
)
"""What ``save_training`` keeps and ``resume_training`` needs."""


def save_training(
    run: TrainingRun,
    optimizer: torch.optim.Optimizer,
    scheduler,
    path: Path,
    kind: str,
    history: Path,
    extra: dict | None = None,
) -> None:
    """The state from which ``resume_training`` goes on, with ``extra`` entries, and the history so far as JSON."""
    state = {
        "settings": as_dict(run.settings),
        "sources": run.sources,
        "model": run.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": run.runtime.scaler.state_dict(),
        "random": random_state(),
        "epoch": len(run.history),
        "history": run.history,
        "best": run.best,
        "best_epoch": run.best_epoch,
    }
    save_checkpoint(path, f"{kind}_training", {**state, **(extra or {})})
    files.write_json(history, {"best_epoch": run.best_epoch, "epochs": run.history})


def load_training(path: Path | str, kind: str, needs: Iterable[str] = ()) -> dict:
    """``load_checkpoint`` of what ``save_training`` wrote."""
    return load_checkpoint(path, f"{kind}_training", needs)


def require_same(path: Path | str, ours: dict, trained: dict, expected: str) -> None:
    """Raise InputError, naming the first that differs, where a checkpoint was trained with other settings than ours."""
    for key, value in ours.items():
        if trained.get(key) != value:
            raise InputError(f"{path} was trained with {key} {trained.get(key)!r}, not {value!r}; {expected}")


def resume_training(
    run: TrainingRun,
    optimizer: torch.optim.Optimizer,
    scheduler,
    path: Path,
    kind: str,
    may_differ: set[str],
    more: Iterable[str] = (),
) -> dict:
    """Continue as if never interrupted; returns the whole state, ``more`` being a stage's extra entries in it.

    Raises:
        InputError: there is none, it is damaged or incomplete, has more epochs behind it than there are in all, or was
            made with other data, or other settings than those that may differ.
    """
    state = load_training(path, kind, (*STATE_OF_TRAINING, *more))
    with reading_contents(path):
        done, trained = len(state["history"]), dict(state["settings"])
        require_same(
            path,
            {key: value for key, value in as_dict(run.settings).items() if key not in may_differ},
            trained,
            "give the same settings to resume.",
        )
        require_same_files(path, run, state, "to resume")
        if done > run.epochs:
            raise InputError(
                f"{path} has {done} epochs behind it; expected --epochs of {done} or more to resume, not {run.epochs}."
            )
        load_weights(run.model, state["model"], path)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] and run.runtime.scaler.is_enabled():  # empty where the run was of another precision
            run.runtime.scaler.load_state_dict(state["scaler"])
        run.history, run.best, run.best_epoch = list(map(dict, state["history"])), state["best"], state["best_epoch"]
        restore_random_state(state["random"])
    return state


@contextlib.contextmanager
def telling_what_is_kept(run: TrainingRun, best: Path) -> Iterator[None]:
    """Within it, a run that diverges says which epoch's checkpoint is kept, or that the one there is of an earlier run.

    Raises:
        DivergedError: it did.
    """
    try:
        yield
    except DivergedError as error:
        if not run.best_epoch and not best.exists():
            raise
        kept = f"of epoch {run.best_epoch} is kept" if run.best_epoch else "is of an earlier run"
        raise DivergedError(f"{str(error).rstrip('.')}; {best} {kept}.") from None
