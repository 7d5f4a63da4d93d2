"""How to run: device, precision, seeds, the one optimizer step, the train and evaluate loops.

``Runtime`` is made once at the top of a stage; below it no line asks which device or precision is in use.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler
from tqdm import tqdm

from config import InputError, OptimiserSettings, TrainClassifierSettings
from streams import ahead

LEAST_LOSS_SCALE = 2.0**-14
"""Below this loss scale, training in float16 has diverged: the scaler starts at 2**16 and halves it at every step with
an infinite gradient.
"""


class DivergedError(InputError):
    """The loss or its gradient became infinite or not a number."""


# -------------------------------------------------------------------------------------------- runtime


@dataclass
class Runtime:
    """Where and in which precision to compute.

    Attributes:
        device: "cpu" or "cuda".
        amp_dtype: reduced precision of the forward pass, None for float32.
        scaler: gradient scaler, a no-op unless the precision is float16.
    """

    device: torch.device
    amp_dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))

    @property
    def pin_memory(self) -> bool:
        return self.device.type == "cuda"

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def batch_size(self, asked: int) -> int:
        """Images in one forward pass, where 0 is asked for: few on a CPU, so that they fit its caches, more on CUDA."""
        return asked or (2 if self.device.type == "cpu" else 16)

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; images and maps in channels-last order, which convolutions like."""
        layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
        return tensor.to(self.device, non_blocking=True, memory_format=layout)

    def each(self, work: Callable, items: Iterable) -> Iterator:
        """``work(item)`` for every item, in order. On a CPU every core works on an item of its own, as far as items go.

        All cores on one batch of a small network wait for each other, and for the threads that read the next one.
        """
        n_cores = torch.get_num_threads() if self.device.type == "cpu" else 1
        items = iter(items)
        first = list(islice(items, n_cores))
        if n_cores == 1 or len(first) < n_cores:
            yield from map(work, chain(first, items))
            return
        torch.set_num_threads(1)
        try:
            yield from (result for _, result in ahead(work, chain(first, items), n_cores, n_cores))
        finally:
            torch.set_num_threads(n_cores)

    def put_model(self, model: nn.Module) -> nn.Module:
        return model.to(self.device, memory_format=torch.channels_last)


def resolve_device(device: str | torch.device) -> torch.device:
    """The device, or the one of that name: "auto" (CUDA where there is any), "cpu", "cuda", or one of several, as
    "cuda:1".

    Raises:
        InputError: there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise InputError(f"There is no device {device!r}; expected auto, cpu, cuda or, of several, cuda:1.") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError("CUDA was asked for but this machine has no usable CUDA device; use --device cpu or auto.")
    return found


def make_runtime(device: str | torch.device, precision: str = "auto") -> Runtime:
    """The runtime for a device, as ``resolve_device`` takes it, and a precision: "float32", "bfloat16", or "auto".

    That is bfloat16 where the device multiplies it faster than float32, else float32; on older CUDA cards float16 with
    scaling.

    Raises:
        InputError: there is no such device, or the precision is another.
    """
    where = resolve_device(device)
    if precision not in ("auto", "float32", "bfloat16"):
        raise InputError(f"The precision is {precision!r}; expected auto, float32 or bfloat16.")
    if precision != "auto":
        return Runtime(where, torch.bfloat16 if precision == "bfloat16" else None)
    if where.type == "cpu":
        return Runtime(where, torch.bfloat16 if cpu_multiplies_bfloat16() else None)
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return Runtime(where, dtype, torch.amp.GradScaler("cuda", enabled=dtype is torch.float16))


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it (AVX-512 BF16, or AMX); False where torch cannot tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict:
    """The state of torch's generators (data draws from generators of their own, keyed by epoch and index)."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"][: torch.cuda.device_count()]])


# --------------------------------------------------------------------------------- the step and the loops


def warmup_cosine(n_steps: int, warmup_frac: float = 0.1) -> Callable[[int], float]:
    """Factor of the peak learning rate at a step: linear rise, then a cosine to zero (Loshchilov & Hutter 2017).

    >>> factor = warmup_cosine(100)
    >>> round(factor(0), 2), round(factor(10), 2), round(factor(55), 2), round(factor(100), 2)
    (0.1, 1.0, 0.5, 0.0)
    """
    n_warmup = max(1, round(warmup_frac * n_steps))

    def factor(step: int) -> float:
        if step < n_warmup:
            return (step + 1) / n_warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - n_warmup) / max(1, n_steps - n_warmup))))

    return factor


def optimizer_step(
    loss: Tensor, optimizer: torch.optim.Optimizer, scheduler, runtime: Runtime, gradient_clip: float
) -> None:
    """Backward, clip, step: the only optimizer step in the repository.

    Raises:
        DivergedError: the loss or the gradient is not finite; weights are left as they were.
    """
    if not torch.isfinite(loss):
        raise DivergedError(f"The loss became {loss.item()}; training stops (try a lower --learning-rate).")
    optimizer.zero_grad(set_to_none=True)
    runtime.scaler.scale(loss).backward()
    runtime.scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, gradient_clip or math.inf)
    if not runtime.scaler.is_enabled() and not torch.isfinite(norm):  # an enabled scaler skips such a step itself
        raise DivergedError("The gradient became infinite; training stops (try a lower --learning-rate).")
    runtime.scaler.step(optimizer)
    runtime.scaler.update()
    if runtime.scaler.is_enabled() and runtime.scaler.get_scale() < LEAST_LOSS_SCALE:
        raise DivergedError(
            "The gradient stays infinite in float16; training stops (try a lower --learning-rate or --precision "
            "float32)."
        )
    scheduler.step()


class Averages:
    """Means of named values weighted by counts: sums and counts, divided once, exact for ragged batches.

    >>> averages = Averages()
    >>> averages.add({"loss": 1.0}, 3); averages.add({"loss": 5.0}, 1)
    >>> averages.means()
    {'loss': 2.0}
    """

    def __init__(self):
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def add(self, values: dict, count: float) -> None:
        for name, value in values.items():
            number = value.item() if isinstance(value, Tensor) else float(value)
            self.sums[name] = self.sums.get(name, 0.0) + number * count
            self.counts[name] = self.counts.get(name, 0.0) + count

    def means(self) -> dict[str, float]:
        return {name: self.sums[name] / self.counts[name] for name in self.sums}


def train_epoch(
    model: nn.Module,
    batches: Iterable,
    loss_terms: Callable,
    optimizer,
    scheduler,
    runtime: Runtime,
    gradient_clip: float,
) -> dict[str, float]:
    """One pass over the training batches; returns the mean of every named loss term.

    Args:
        loss_terms: maps a batch to (dict of scalar tensors with the key "total", number of images).
    """
    model.train()
    averages = Averages()
    for batch in batches:
        with runtime.autocast():
            terms, count = loss_terms(batch)
        optimizer_step(terms["total"], optimizer, scheduler, runtime, gradient_clip)
        averages.add({name: term.detach() for name, term in terms.items()}, count)
    return averages.means()


def make_optimizer(
    parameters: Iterable, settings: OptimiserSettings | TrainClassifierSettings, n_steps: int, warmup_frac: float = 0.1
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW on parameters, or groups of them, and its learning rate over so many steps, as ``warmup_cosine`` has it."""
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(n_steps, warmup_frac))


def train_steps(
    part: nn.Module,
    data: TensorDataset,
    batch_size: int,
    n_steps: int,
    loss_terms: Callable[..., dict[str, Tensor]],
    title: str,
    settings: OptimiserSettings,
    runtime: Runtime,
    weights: Tensor | None = None,
) -> float:
    """So many steps of a part of a model, each with rows of the data drawn at random, by weights where given; the mean
    of "total" among its terms. The part is left in evaluation mode.

    Args:
        loss_terms: maps the tensors of a batch, as float32, to a dict of scalar tensors with the key "total".
        title: of the progress bar.
    """
    optimizer, scheduler = make_optimizer(part.parameters(), settings, n_steps)
    n = n_steps * batch_size
    sampler = (
        RandomSampler(data, replacement=True, num_samples=n) if weights is None else WeightedRandomSampler(weights, n)
    )
    loader = DataLoader(data, batch_size, sampler=sampler, pin_memory=runtime.pin_memory)

    def of_batch(batch: list[Tensor]) -> tuple[dict[str, Tensor], int]:
        return loss_terms(*(runtime.put(each).float() for each in batch)), len(batch[0])

    bar = tqdm(loader, unit="step", desc=title, leave=False)
    mean = train_epoch(part, bar, of_batch, optimizer, scheduler, runtime, settings.gradient_clip)["total"]
    part.eval()
    return mean


def evaluate(model: nn.Module, batches: Iterable, loss_terms: Callable, runtime: Runtime) -> dict[str, float]:
    """Mean of every named loss term over the batches, without gradients and in evaluation mode."""
    model.eval()
    averages = Averages()
    with torch.inference_mode():
        for batch in batches:
            with runtime.autocast():
                terms, count = loss_terms(batch)
            averages.add(terms, count)
    return averages.means()


def prefixed(prefix: str, values: dict[str, float]) -> dict[str, float]:
    """The same values under ``prefix/name``, as a history holds them."""
    return {f"{prefix}/{name}": value for name, value in values.items()}
