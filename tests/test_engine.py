"""The one step, the loops, the averages; device, precision and chance."""

from __future__ import annotations

import copy
import math
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import checkpoints
import engine
from config import InputError, TrainSettings

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


def steps_of_a_weight(weights=None, **changes):
    """A weight that was 1, after 20 steps of two rows each, numbers from 0 to 3 that pull it down; what it was before
    each step, the rows, and the gradients of all steps but the last.
    """
    torch.manual_seed(0)
    part = nn.Linear(1, 1, bias=False)
    nn.init.ones_(part.weight)
    before, rows, gradients = [], [], []

    def terms(batch):
        before.append(part.weight.item())
        rows.extend(batch.flatten().tolist())
        gradients.extend([] if part.weight.grad is None else [part.weight.grad.item()])
        return {"total": part(batch).mean()}

    settings = TrainSettings(**{"learning_rate": 0.01, "weight_decay": 0.0, "gradient_clip": 0.0, **changes})
    data = TensorDataset(torch.arange(4.0).view(-1, 1))
    engine.train_steps(part, data, 2, 20, terms, "steps", settings, RUNTIME, weights)
    return part, before, rows, gradients


def test_steps_of_a_part_fall_as_a_cosine_to_zero_and_leave_it_in_evaluation_mode():
    part, before, rows, _ = steps_of_a_weight()
    moves = np.abs(np.diff([*before, part.weight.item()]))
    assert moves[-1] < 0.1 * moves.max() and moves.argmax() < 10
    assert len(rows) == 40 and set(rows) == {0.0, 1.0, 2.0, 3.0} and not part.training


def test_steps_of_a_part_draw_rows_by_their_weights():
    assert set(steps_of_a_weight(torch.tensor([0.0, 1.0, 0.0, 1.0]))[2]) == {1.0, 3.0}


def test_steps_of_a_part_decay_weights_and_clip_gradients_as_asked():
    (plain, *_, gradients), (decayed, *_) = steps_of_a_weight(), steps_of_a_weight(weight_decay=1.0)
    assert decayed.weight < plain.weight and max(gradients) > 1
    assert max(steps_of_a_weight(gradient_clip=0.25)[3]) == pytest.approx(0.25, rel=1e-3)


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
    checkpoints.save_checkpoint(tmp_path / "a.pth", "state", {"random": engine.random_state()})
    expected = torch.rand(5)
    torch.manual_seed(2)
    engine.restore_random_state(checkpoints.load_checkpoint(tmp_path / "a.pth", "state")["random"])
    assert torch.equal(torch.rand(5), expected)


def test_an_unknown_precision_is_refused():
    for precision in ("float64", "bf16"):
        with pytest.raises(InputError, match=f"precision is '{precision}'; expected auto, float32 or bfloat16"):
            engine.make_runtime("cpu", precision)
