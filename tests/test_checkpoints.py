"""Checkpoints are whole or absent, and never run code; a run goes on from the state of training."""

from __future__ import annotations

import os
import pickle
import stat
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import checkpoints
import engine
from config import InputError, RunSettings

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # said of damaged and foreign files
RUNTIME = engine.Runtime(torch.device("cpu"))
CONTENTS = {"model": {"w": torch.arange(6.0).view(2, 3)}, "n": 3, "x": 0.5, "names": ["a", "b"], "none": None}


def saved(tmp_path, kind="kind"):
    path = tmp_path / "models" / "a.pth"
    checkpoints.save_checkpoint(path, kind, CONTENTS)
    return path


def refusal(path, kind="kind"):
    with pytest.raises(InputError) as caught:
        checkpoints.load_checkpoint(path, kind)
    message = str(caught.value)
    assert str(path) in message and message.endswith(".") and "\n" not in message and caught.value.exit_code == 1
    return message


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    contents = checkpoints.load_checkpoint(saved(tmp_path), "kind")
    assert torch.equal(contents["model"]["w"], CONTENTS["model"]["w"])
    assert {key: contents[key] for key in ("n", "x", "names", "none")} == {
        "n": 3,
        "x": 0.5,
        "names": ["a", "b"],
        "none": None,
    }
    assert (contents["format"], contents["kind"]) == (checkpoints.FORMAT, "kind")
    assert contents["versions"]["torch"] == torch.__version__ and type(contents["versions"]["torch"]) is str


def test_saving_leaves_one_file_with_the_usual_permissions(tmp_path):
    path = saved(tmp_path)
    checkpoints.save_checkpoint(path, "kind", {"n": 4})
    assert [each.name for each in path.parent.iterdir()] == ["a.pth"]
    assert checkpoints.load_checkpoint(path, "kind")["n"] == 4
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("where", [(torch, "save"), (os, "fsync"), (Path, "replace")], ids=lambda pair: pair[1])
def test_a_failure_while_writing_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch, where):
    path = saved(tmp_path)
    before = path.read_bytes()

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*where, interrupt)
        checkpoints.save_checkpoint(path, "kind", {"n": 4})
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["a.pth"]


def test_a_full_disk_is_said_in_a_sentence_and_keeps_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    path = saved(tmp_path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # a write beyond fails as on a full disk
    try:
        with pytest.raises(
            InputError, match=r"Cannot write .*a\.pth: File too large; expected a writable folder with room"
        ):
            checkpoints.save_checkpoint(path, "kind", {"model": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["a.pth"]


def test_a_folder_that_cannot_be_written_is_said_in_a_sentence(tmp_path):
    (tmp_path / "models").write_text("a file stands where the folder should")
    for path in (tmp_path / "models" / "a.pth", tmp_path / "models" / "deeper" / "a.pth"):
        with pytest.raises(InputError, match=r"Cannot write .*a\.pth: .*; expected a writable folder"):
            checkpoints.save_checkpoint(path, "kind", CONTENTS)


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    assert "no checkpoint at" in refusal(tmp_path / "none.pth")
    assert "no checkpoint at" in refusal(tmp_path)


def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path):
    content = saved(tmp_path).read_bytes()
    path = tmp_path / "cut.pth"
    for length in range(0, len(content), max(1, len(content) // 60)):
        path.write_bytes(content[:length])
        assert "not a readable checkpoint" in refusal(path)


def test_damaged_bytes_end_in_a_sentence_or_in_a_checkpoint(tmp_path):
    content, rng, path = saved(tmp_path).read_bytes(), np.random.default_rng(0), tmp_path / "damaged.pth"
    n_refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert checkpoints.load_checkpoint(path, "kind")["kind"] == "kind"
        except InputError:
            n_refused += 1
    assert n_refused > 30


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    for content in (
        b"",
        b"not a checkpoint",
        bytes(range(256)) * 8,
        pickle.dumps({"format": 1, "kind": "kind"}, 4)[:-3],
    ):
        path.write_bytes(content)
        assert "not a readable checkpoint" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "a zip of something else")
    assert "not a readable checkpoint" in refusal(path)


@pytest.mark.parametrize(
    "contents",
    [
        {"n": 1},
        {"format": checkpoints.FORMAT + 1, "kind": "kind"},
        [1, 2],
        torch.zeros(3),
        {"format": torch.zeros(3), "kind": "kind"},
    ],
)
def test_other_formats_are_refused(tmp_path, contents):
    torch.save(contents, tmp_path / "other.pth")
    assert f"not a checkpoint of format {checkpoints.FORMAT}" in refusal(tmp_path / "other.pth")


@pytest.mark.parametrize("contents", [{"a": 1}, {"a": 1, "b": None}])
def test_an_incomplete_file_is_refused_and_what_is_missing_named(tmp_path, contents):
    checkpoints.save_checkpoint(tmp_path / "a.pth", "kind", contents)
    with pytest.raises(InputError, match="it lacks b, c;"):
        checkpoints.load_checkpoint(tmp_path / "a.pth", "kind", ("a", "b", "c"))
    assert checkpoints.load_checkpoint(tmp_path / "a.pth", "kind", ("a",))["a"] == 1


def test_another_kind_is_refused_and_both_are_named(tmp_path):
    assert "holds a 'classifier'; expected a 'detail_vae'" in refusal(saved(tmp_path, "classifier"), "detail_vae")


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_file_is_refused_and_never_run(tmp_path):
    mark, contents = (
        tmp_path / "it ran",
        {"format": checkpoints.FORMAT, "kind": "kind", "x": Harmful(tmp_path / "it ran")},
    )
    torch.save(contents, tmp_path / "zip.pth")
    torch.save(contents, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(contents))
    for name in ("zip.pth", "legacy.pth", "plain.pth"):
        assert "holds code, which is never run" in refusal(tmp_path / name)
        assert not mark.exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())["x"].close()
    assert mark.exists()  # the trap works: it was the reader that kept it from closing


def test_weights_that_do_not_fit_are_refused():
    model = nn.Linear(2, 2)
    for state in ({"weight": torch.zeros(3, 3), "bias": torch.zeros(2)}, {"weight": torch.zeros(2, 2)}, {}, [1], None):
        with pytest.raises(InputError, match=r"weights in a\.pth do not fit"):
            checkpoints.load_weights(model, state, "a.pth")
    state = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    assert torch.equal(checkpoints.load_weights(model, state, "a.pth").weight, torch.ones(2, 2))
    with pytest.raises(InputError, match=r"a\.pth holds weights that are not finite; the file is damaged\."):
        checkpoints.load_weights(model, {**state, "bias": torch.tensor([0.0, torch.nan])}, "a.pth")


# ------------------------------------------------------------------------------------------------ resuming


def line_run():
    """A training run of a linear model after one of two epochs, its optimizer and scheduler."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    so_far = {"history": [{"epoch": 1}], "best": 2.0, "best_epoch": 1, "epochs": 2, "sources": {}}
    return SimpleNamespace(settings=RunSettings(), runtime=RUNTIME, model=model, **so_far), optimizer, scheduler


def test_a_run_may_be_resumed_where_losses_are_scaled_but_not_with_fewer_epochs(tmp_path):
    plain, optimizer, scheduler = line_run()
    checkpoints.save_training(plain, optimizer, scheduler, tmp_path / "last.pth", "line", tmp_path / "history.json")
    assert torch.load(tmp_path / "last.pth", weights_only=True)["epoch"] == 1
    scaled = SimpleNamespace(
        **{
            **vars(plain),
            "runtime": engine.Runtime(torch.device("cpu"), torch.float16, torch.amp.GradScaler("cpu")),
            "history": [],
            "best": 9.0,
        }
    )
    checkpoints.resume_training(scaled, optimizer, scheduler, tmp_path / "last.pth", "line", set())
    assert scaled.history == plain.history and scaled.best == 2.0 and scaled.runtime.scaler.get_scale() > 1
    with pytest.raises(
        InputError, match=r"last\.pth has 1 epochs behind it; expected --epochs of 1 or more to resume, not 0"
    ):
        checkpoints.resume_training(
            SimpleNamespace(**{**vars(plain), "epochs": 0}), optimizer, scheduler, tmp_path / "last.pth", "line", set()
        )


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimizer", None, "is incomplete: it lacks optimizer"),
        ("optimizer", {}, "cannot be used"),
        ("settings", "abc", "cannot be used"),
        ("history", 3, "cannot be used"),
        ("history", "ab", "cannot be used"),
        ("random", {}, "cannot be used"),
        ("sources", [1], "cannot be used"),
        ("more", None, "is incomplete: it lacks more"),
    ],
)
def test_a_damaged_state_of_training_is_refused_in_a_sentence(tmp_path, key, value, words):
    run, optimizer, scheduler = line_run()
    checkpoints.save_training(run, optimizer, scheduler, tmp_path / "a.pth", "line", tmp_path / "a.json", {"more": 1})
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    torch.save({**state, key: value}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=words) as caught:
        checkpoints.resume_training(run, optimizer, scheduler, tmp_path / "a.pth", "line", set(), ("more",))
    assert "\n" not in str(caught.value) and "a.pth" in str(caught.value)


def test_want_of_memory_is_no_damage():
    with pytest.raises(RuntimeError, match="can't allocate memory"), checkpoints.reading_contents("a.pth"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def test_files_are_told_apart_by_what_they_hold_unless_a_checkpoint_says_nothing_of_it(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        path.write_bytes(b"1234")
    run, _, _ = line_run()
    run.sources = checkpoints.describe_files(tmp_path, paths)
    paths[1].write_bytes(b"1243")
    now = checkpoints.describe_files(tmp_path, paths)
    assert {key for key in now if now[key] != run.sources[key]} == {"training_contents"}
    checkpoints.require_same_files("a.pth", run, {"sources": {"n_training_files": 2}}, "to resume")
    with pytest.raises(
        InputError, match=r"was trained with training_contents .*; expected the data of then to resume\."
    ):
        checkpoints.require_same_files("a.pth", run, {"sources": now}, "to resume")
