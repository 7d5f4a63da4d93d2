"""The one step, the loops, the averages, and checkpoints that are whole or absent and never run code."""

from __future__ import annotations

import copy
import math
import os
import pickle
import stat
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import engine
from config import InputError, RunSettings

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # said of damaged and foreign files
RUNTIME = engine.Runtime(torch.device("cpu"))


class NoSchedule:
    def __init__(self):
        self.n_steps = 0

    def step(self):
        self.n_steps += 1


def weights_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def line(seed=0):
    """y = 2 x - 1 without noise: a model, batches of ragged size, and the loss of a batch."""
    torch.manual_seed(seed)
    model = nn.Linear(1, 1)
    x = torch.linspace(-1, 1, 10).view(-1, 1)
    batches = [(part, 2 * part - 1) for part in x.split(4)]

    def terms(batch):
        error = (model(batch[0]) - batch[1]).square().mean()
        return {"total": error, "half": 0.5 * error}, len(batch[0])

    return model, batches, terms


# ------------------------------------------------------------------------------------------------- the step


def test_a_step_is_one_step_of_plain_gradient_descent():
    model, batches, terms = line()
    before, schedule = weights_of(model), NoSchedule()
    expected = torch.autograd.grad(terms(batches[0])[0]["total"], list(model.parameters()))
    engine.optimizer_step(
        terms(batches[0])[0]["total"], torch.optim.SGD(model.parameters(), lr=0.1), schedule, RUNTIME, 0.0
    )
    for now, old, gradient in zip(model.parameters(), before, expected, strict=True):
        torch.testing.assert_close(now, old - 0.1 * gradient)
    assert schedule.n_steps == 1


def test_two_steps_do_not_add_up_gradients():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for _ in range(2):
        engine.optimizer_step(3 * weight.sum(), optimizer, NoSchedule(), RUNTIME, 0.0)
    assert weight.item() == -6.0


def test_gradients_are_clipped_by_their_common_norm():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0)
    engine.optimizer_step(30 * a.sum() + 40 * b.sum(), optimizer, NoSchedule(), RUNTIME, 0.5)
    assert (a.item(), b.item()) == pytest.approx((-0.3, -0.4), rel=1e-4)


def test_a_scaled_loss_makes_the_same_clipped_step():
    moved = []
    for scaler in (
        torch.amp.GradScaler("cpu", enabled=False),
        torch.amp.GradScaler("cpu", enabled=True, init_scale=1024.0),
    ):
        weight = nn.Parameter(torch.zeros(2))
        runtime = engine.Runtime(torch.device("cpu"), None, scaler)
        engine.optimizer_step(
            3 * weight[0] + 4 * weight[1], torch.optim.SGD([weight], lr=1.0), NoSchedule(), runtime, 1.0
        )
        moved.append(weight.tolist())
    assert moved[0] == pytest.approx([-0.6, -0.8], rel=1e-4) and moved[1] == pytest.approx(moved[0])


def test_scaled_gradients_that_stay_infinite_end_the_training():
    weight = nn.Parameter(torch.zeros(1))
    runtime = engine.Runtime(torch.device("cpu"), None, torch.amp.GradScaler("cpu", enabled=True))
    optimizer, n_skipped = torch.optim.SGD([weight], lr=1.0), 0
    with pytest.raises(engine.DivergedError, match="stays infinite in float16"):
        while n_skipped < 100:
            engine.optimizer_step(
                (weight * math.inf).nan_to_num(0.0, 0.0).sum() + torch.sqrt(weight).sum(),
                optimizer,
                NoSchedule(),
                runtime,
                1.0,
            )
            n_skipped += 1
    assert n_skipped == 30 and weight.item() == 0.0


def test_small_gradients_are_not_blown_up_by_clipping():
    weight = nn.Parameter(torch.zeros(1))
    engine.optimizer_step(0.1 * weight.sum(), torch.optim.SGD([weight], lr=1.0), NoSchedule(), RUNTIME, 5.0)
    assert weight.item() == pytest.approx(-0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_leaves_the_weights_untouched(bad):
    model, batches, terms = line()
    before, schedule = copy.deepcopy(model.state_dict()), NoSchedule()
    with pytest.raises(engine.DivergedError, match=f"loss became {bad}.*learning-rate"):
        engine.optimizer_step(
            terms(batches[0])[0]["total"] * bad, torch.optim.SGD(model.parameters(), lr=0.1), schedule, RUNTIME, 1.0
        )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert schedule.n_steps == 0 and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_leaves_the_weights_untouched(clip):
    weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(engine.DivergedError):  # the root of 0 is 0, its slope is infinite
        engine.optimizer_step(weight.sqrt().sum(), torch.optim.SGD([weight], lr=1.0), NoSchedule(), RUNTIME, clip)
    assert torch.equal(weight.detach(), torch.zeros(2))


def test_warmup_cosine_rises_in_a_line_then_falls_as_a_cosine_to_zero():
    factor = engine.warmup_cosine(200, warmup_frac=0.1)
    steps = np.arange(201)
    expected = np.where(steps < 20, (steps + 1) / 20, 0.5 * (1 + np.cos(np.pi * (steps - 20) / 180)))
    np.testing.assert_allclose([factor(int(step)) for step in steps], expected, atol=1e-12)
    assert factor(10_000) == 0.0
    assert all(0 <= engine.warmup_cosine(n)(step) <= 1 for n in (1, 2, 3) for step in range(5))
    assert engine.warmup_cosine(1)(0) > 0  # a run of one step still learns


# -------------------------------------------------------------------------------------- averages and loops


def test_averages_of_ragged_batches_are_those_of_all_values_at_once():
    values = np.random.default_rng(0).normal(size=23)
    averages = engine.Averages()
    for part in np.split(values, [5, 12, 13]):
        averages.add({"a": part.mean(), "b": torch.tensor(part.mean() ** 2)}, len(part))
    averages.add({"only here": 4.0}, 2)
    weights = [5, 7, 1, 10]
    squares = [part.mean() ** 2 for part in np.split(values, [5, 12, 13])]
    assert averages.means() == pytest.approx(
        {"a": values.mean(), "b": np.average(squares, weights=weights), "only here": 4.0}
    )
    assert engine.Averages().means() == {}


def test_an_epoch_makes_one_step_a_batch_in_training_mode_and_lowers_the_loss():
    model, batches, terms = line()
    schedule, modes = NoSchedule(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.eval()

    def watched(batch):
        modes.append((model.training, torch.is_grad_enabled()))
        return terms(batch)

    history = [engine.train_epoch(model, batches, watched, optimizer, schedule, RUNTIME, 0.0) for _ in range(20)]
    assert schedule.n_steps == 60 and set(modes) == {(True, True)}
    assert history[-1]["total"] < 0.01 * history[0]["total"]
    assert history[0]["half"] == pytest.approx(0.5 * history[0]["total"])


def test_an_epoch_without_steps_reports_the_loss_of_all_its_images():
    model, batches, terms = line()
    expected = np.mean([((model(x) - y) ** 2).item() for part in batches for x, y in zip(*part, strict=True)])
    got = engine.train_epoch(
        model, batches, terms, torch.optim.SGD(model.parameters(), lr=0.0), NoSchedule(), RUNTIME, 0.0
    )
    assert got["total"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_changes_nothing_and_weighs_images_alike():
    model, batches, terms = line()
    model = nn.Sequential(model, nn.BatchNorm1d(1)).train()
    before, modes = copy.deepcopy(model.state_dict()), []

    def watched(batch):
        modes.append((model.training, torch.is_grad_enabled()))
        model(batch[0])
        return terms(batch)

    got = engine.evaluate(model, batches, watched, RUNTIME)
    expected = np.mean([((model[0](x) - y) ** 2).item() for part in batches for x, y in zip(*part, strict=True)])
    assert got["total"] == pytest.approx(expected, rel=1e-5)
    assert set(modes) == {(False, False)}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# -------------------------------------------------------------------------------------- device and chance


def test_asking_for_cuda_without_one_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no usable CUDA device; use --device cpu"):
        engine.resolve_device("cuda")
    assert engine.resolve_device("auto").type == engine.resolve_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [str(engine.resolve_device(name)) for name in ("auto", "cuda", "cpu", "cuda:1", torch.device("cuda:1"))] == [
        "cuda",
        "cuda",
        "cpu",
        "cuda:1",
        "cuda:1",
    ]


def test_an_unknown_device_is_refused():
    with pytest.raises(InputError, match="no device 'gpu'; expected auto, cpu, cuda"):
        engine.resolve_device("gpu")


@pytest.mark.parametrize(("multiplies", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_cuda_card_that_only_emulates_bfloat16_takes_float16(monkeypatch, multiplies, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or multiplies
    )
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: enabled)
    runtime = engine.make_runtime("cuda")
    assert runtime.amp_dtype is expected and runtime.scaler is (expected is torch.float16)


@pytest.mark.parametrize(
    ("precision", "capabilities", "expected"),
    [
        ("float32", {"avx512_bf16": True}, torch.float32),
        ("bfloat16", {}, torch.bfloat16),
        ("auto", {"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ("auto", {"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ("auto", {"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ("auto", {}, torch.float32),
    ],
)
def test_on_cpu_auto_multiplies_in_bfloat16_where_the_processor_can(monkeypatch, precision, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    with engine.make_runtime("cpu", precision).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected


def test_where_torch_cannot_tell_what_the_processor_has_auto_is_full(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert engine.make_runtime("cpu").amp_dtype is None


def test_on_cpu_the_scaler_does_nothing_and_images_are_laid_out_for_convolutions():
    runtime = engine.make_runtime("cpu")
    assert not runtime.scaler.is_enabled() and not runtime.pin_memory
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(runtime.put(images), images) and runtime.put(images).is_contiguous(
        memory_format=torch.channels_last
    )


def line_run():
    """A training run of a linear model after one of two epochs, its optimizer and scheduler."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    so_far = {"history": [{"epoch": 1}], "best": 2.0, "best_epoch": 1, "epochs": 2, "sources": {}}
    return SimpleNamespace(settings=RunSettings(), runtime=RUNTIME, model=model, **so_far), optimizer, scheduler


def test_a_run_may_be_resumed_where_losses_are_scaled_but_not_with_fewer_epochs(tmp_path):
    plain, optimizer, scheduler = line_run()
    engine.save_training(plain, optimizer, scheduler, tmp_path / "last.pth", "line", tmp_path / "history.json")
    assert torch.load(tmp_path / "last.pth", weights_only=True)["epoch"] == 1
    scaled = SimpleNamespace(
        **{
            **vars(plain),
            "runtime": engine.Runtime(torch.device("cpu"), torch.float16, torch.amp.GradScaler("cpu")),
            "history": [],
            "best": 9.0,
        }
    )
    engine.resume_training(scaled, optimizer, scheduler, tmp_path / "last.pth", "line", set())
    assert scaled.history == plain.history and scaled.best == 2.0 and scaled.runtime.scaler.get_scale() > 1
    with pytest.raises(
        InputError, match=r"last\.pth has 1 epochs behind it; expected --epochs of 1 or more to resume, not 0"
    ):
        engine.resume_training(
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
    engine.save_training(run, optimizer, scheduler, tmp_path / "a.pth", "line", tmp_path / "a.json", {"more": 1})
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    torch.save({**state, key: value}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=words) as caught:
        engine.resume_training(run, optimizer, scheduler, tmp_path / "a.pth", "line", set(), ("more",))
    assert "\n" not in str(caught.value) and "a.pth" in str(caught.value)


def test_want_of_memory_is_no_damage():
    with pytest.raises(RuntimeError, match="can't allocate memory"), engine.reading_contents("a.pth"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def test_files_are_told_apart_by_what_they_hold_unless_a_checkpoint_says_nothing_of_it(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        path.write_bytes(b"1234")
    run, _, _ = line_run()
    run.sources = engine.describe_files(tmp_path, paths)
    paths[1].write_bytes(b"1243")
    now = engine.describe_files(tmp_path, paths)
    assert {key for key in now if now[key] != run.sources[key]} == {"training_contents"}
    engine.require_same_files("a.pth", run, {"sources": {"n_training_files": 2}}, "to resume")
    with pytest.raises(
        InputError, match=r"was trained with training_contents .*; expected the data of then to resume\."
    ):
        engine.require_same_files("a.pth", run, {"sources": now}, "to resume")


@pytest.fixture
def two_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_on_cpu_every_core_works_on_an_item_of_its_own_and_results_keep_their_order(two_cores):
    meeting = threading.Barrier(2, timeout=20)  # passed only by two at once

    def work(item):
        meeting.wait()
        time.sleep(0.02 * (item % 2 == 0))
        return item, torch.get_num_threads()

    assert list(engine.make_runtime("cpu").each(work, iter(range(6)))) == [(item, 1) for item in range(6)]
    assert torch.get_num_threads() == 2


def test_fewer_items_than_cores_are_worked_on_by_all_cores_and_a_failure_leaves_the_cores_as_they_were(two_cores):
    runtime = engine.make_runtime("cpu")
    assert list(runtime.each(lambda item: (item, torch.get_num_threads()), [7])) == [(7, 2)]
    with pytest.raises(ZeroDivisionError):
        list(runtime.each(lambda item: 1 // item, [1, 0, 1]))
    assert torch.get_num_threads() == 2


def test_a_seed_repeats_every_kind_of_draw():
    import random

    def draws(seed):
        engine.seed_everything(seed)
        return random.random(), np.random.random(), torch.rand(3).tolist()

    assert draws(5) == draws(5) != draws(6)
    engine.seed_everything(2**40)  # numpy takes 32 bits only


def test_restored_random_state_gives_the_same_draws_also_through_a_file(tmp_path):
    torch.manual_seed(1)
    torch.rand(3)
    engine.save_checkpoint(tmp_path / "a.pth", "state", {"random": engine.random_state()})
    expected = torch.rand(5)
    torch.manual_seed(2)
    engine.restore_random_state(engine.load_checkpoint(tmp_path / "a.pth", "state")["random"])
    assert torch.equal(torch.rand(5), expected)


# --------------------------------------------------------------------------------------------- checkpoints

CONTENTS = {"model": {"w": torch.arange(6.0).view(2, 3)}, "n": 3, "x": 0.5, "names": ["a", "b"], "none": None}


def saved(tmp_path, kind="kind"):
    path = tmp_path / "models" / "a.pth"
    engine.save_checkpoint(path, kind, CONTENTS)
    return path


def refusal(path, kind="kind"):
    with pytest.raises(InputError) as caught:
        engine.load_checkpoint(path, kind)
    message = str(caught.value)
    assert str(path) in message and message.endswith(".") and "\n" not in message and caught.value.exit_code == 1
    return message


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    contents = engine.load_checkpoint(saved(tmp_path), "kind")
    assert torch.equal(contents["model"]["w"], CONTENTS["model"]["w"])
    assert {key: contents[key] for key in ("n", "x", "names", "none")} == {
        "n": 3,
        "x": 0.5,
        "names": ["a", "b"],
        "none": None,
    }
    assert (contents["format"], contents["kind"]) == (engine.FORMAT, "kind")
    assert contents["versions"]["torch"] == torch.__version__ and type(contents["versions"]["torch"]) is str


def test_saving_leaves_one_file_with_the_usual_permissions(tmp_path):
    path = saved(tmp_path)
    engine.save_checkpoint(path, "kind", {"n": 4})
    assert [each.name for each in path.parent.iterdir()] == ["a.pth"]
    assert engine.load_checkpoint(path, "kind")["n"] == 4
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
        engine.save_checkpoint(path, "kind", {"n": 4})
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
            engine.save_checkpoint(path, "kind", {"model": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["a.pth"]


def test_a_folder_that_cannot_be_written_is_said_in_a_sentence(tmp_path):
    (tmp_path / "models").write_text("a file stands where the folder should")
    for path in (tmp_path / "models" / "a.pth", tmp_path / "models" / "deeper" / "a.pth"):
        with pytest.raises(InputError, match=r"Cannot write .*a\.pth: .*; expected a writable folder"):
            engine.save_checkpoint(path, "kind", CONTENTS)


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
            assert engine.load_checkpoint(path, "kind")["kind"] == "kind"
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
        {"format": engine.FORMAT + 1, "kind": "kind"},
        [1, 2],
        torch.zeros(3),
        {"format": torch.zeros(3), "kind": "kind"},
    ],
)
def test_other_formats_are_refused(tmp_path, contents):
    torch.save(contents, tmp_path / "other.pth")
    assert f"not a checkpoint of format {engine.FORMAT}" in refusal(tmp_path / "other.pth")


@pytest.mark.parametrize("contents", [{"a": 1}, {"a": 1, "b": None}])
def test_an_incomplete_file_is_refused_and_what_is_missing_named(tmp_path, contents):
    engine.save_checkpoint(tmp_path / "a.pth", "kind", contents)
    with pytest.raises(InputError, match="it lacks b, c;"):
        engine.load_checkpoint(tmp_path / "a.pth", "kind", ("a", "b", "c"))
    assert engine.load_checkpoint(tmp_path / "a.pth", "kind", ("a",))["a"] == 1


def test_another_kind_is_refused_and_both_are_named(tmp_path):
    assert "holds a 'classifier'; expected a 'detail_vae'" in refusal(saved(tmp_path, "classifier"), "detail_vae")


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_file_is_refused_and_never_run(tmp_path):
    mark, contents = tmp_path / "it ran", {"format": engine.FORMAT, "kind": "kind", "x": Harmful(tmp_path / "it ran")}
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
            engine.load_weights(model, state, "a.pth")
    state = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    assert torch.equal(engine.load_weights(model, state, "a.pth").weight, torch.ones(2, 2))
    with pytest.raises(InputError, match=r"a\.pth holds weights that are not finite; the file is damaged\."):
        engine.load_weights(model, {**state, "bias": torch.tensor([0.0, torch.nan])}, "a.pth")


def test_an_unknown_precision_is_refused():
    for precision in ("float64", "bf16"):
        with pytest.raises(InputError, match=f"precision is '{precision}'; expected auto, float32 or bfloat16"):
            engine.make_runtime("cpu", precision)
