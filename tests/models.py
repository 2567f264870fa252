"""Toy problems: models, data and the training loops of the paths, kept apart from the assertions.

Sizes differ in every dimension, so that a transposed or mistaken shape cannot pass.
"""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from relora_opt import JaggedSchedule, ReLoRAOptimizer, cosine

PATHS = ("dense", "functional", "step")
# What make_step(compile=) is tried with: aot_eager traces and derives as inductor does, which takes seconds to build.
COMPILES = (
    pytest.param(False, id="eager"),
    pytest.param({"backend": "aot_eager"}, id="aot_eager"),
    pytest.param(True, id="inductor", marks=pytest.mark.slow),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}),
}
SELECTED = ("first", "second")  # what DESIGN's default selection takes of an MLP


class MLP(nn.Module):
    """Two selected linear layers, a norm between them and a head that stays dense."""

    def __init__(self, *, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 7)
        self.first = nn.Linear(7, 6)
        self.norm = nn.LayerNorm(6)
        self.second = nn.Linear(6, 8, bias=False)
        self.head = nn.Linear(8, 3)
        self.use_reentrant = use_reentrant

    def body(self, h: Tensor) -> Tensor:
        return torch.tanh(self.second(self.norm(torch.tanh(self.first(h)))))

    def forward(self, x: Tensor) -> Tensor:
        # The stem is excluded from the selection by name where a test needs it; checkpointing starts after it.
        h = torch.tanh(self.stem(x))
        if self.use_reentrant is None:
            return self.head(self.body(h))
        return self.head(checkpoint(self.body, h, use_reentrant=self.use_reentrant))


def mlp(dtype: torch.dtype = torch.float32, *, seed: int = 0, use_reentrant: bool | None = None) -> MLP:
    torch.manual_seed(seed)
    return MLP(use_reentrant=use_reentrant).to(dtype)


def batch(index: int, dtype: torch.dtype = torch.float32, *, size: int = 12) -> tuple[Tensor, Tensor]:
    """Return batch `index`, (x, y), a pure function of the index."""
    generator = torch.Generator().manual_seed(1000 + index)
    x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def mse(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def relora(model: nn.Module, base: str = "AdamW", **changes: Any) -> ReLoRAOptimizer:
    """Return an optimizer with the suite's usual settings: rank 2, alpha 3, the layers of SELECTED."""
    optimizer_class, hyperparameters = BASES[base]
    settings: dict[str, Any] = {"rank": 2, "alpha": 3.0, "targets": [f"{name}.weight" for name in SELECTED]}
    return ReLoRAOptimizer(model, optimizer_class, **{**settings, **hyperparameters, **changes})


def jagged_schedule(
    restart_every: int = 11, restart_warmup: int = 3, warm_start: int = 8, at: int = 0, turns: int = 1
) -> JaggedSchedule:
    """Return a schedule with every feature: with the defaults, a switch after 8 and restarts after 19 and 30."""
    lengths = {
        "restart_warmup": restart_warmup,
        "warm_start": warm_start,
        "warm_start_at": at,
        "warm_start_turns": turns,
    }
    return JaggedSchedule(restart_every, **lengths, outer=cosine(40, warmup=4, min_ratio=0.1))


def stepper(
    path: str, optimizer: ReLoRAOptimizer, model: nn.Module, loss_fn: Callable[..., Tensor] = mse
) -> Callable[..., Tensor]:
    """Return `step(*batch) -> loss` for a path: dense, functional, step (make_step uncompiled) or compiled."""
    if path in ("step", "compiled"):
        return optimizer.make_step(model, loss_fn, compile=path == "compiled")
    trained = optimizer.functional(model) if path == "functional" else model

    def step(*data: Tensor) -> Tensor:
        loss = loss_fn(trained, *data)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def selected_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: model.get_submodule(name).weight for name in SELECTED}


def randomise_b(optimizer: ReLoRAOptimizer, parameters: Iterator[nn.Parameter] | list[nn.Parameter]) -> None:
    """Fill B with random numbers in place; W, the effective weight, stays."""
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters:
        B = optimizer.factors(parameter)[1]
        with torch.no_grad():
            B.copy_(torch.randn(B.shape, generator=generator, dtype=B.dtype))


def through_file(value: Any) -> Any:
    """Return `value` saved by torch.save and loaded with weights_only=True."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Return the places in which two trees of dicts, lists, tensors and numbers differ, bitwise and in dtype."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: keys {sorted(map(str, a))} != {sorted(map(str, b))}"]
        return [line for key in a for line in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{where}: lengths {len(a)} != {len(b)}"]
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{where}/{i}")]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
    else:
        same = type(a) is type(b) and a == b
    return [] if same else [f"{where}: {a} != {b}"]


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return everything a run consists of, copied."""
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


class Kernel(torch.autograd.Function):
    """A linear map as somebody's kernel, which asks no `__torch_function__`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x
