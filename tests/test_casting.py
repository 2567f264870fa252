"""A run goes on in another dtype: what follows the parameter's follows it, and what the base keeps otherwise stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import MLP, batch, mlp, mse, selected_weights
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, Adagrad, AdamW, NAdam, Optimizer

from relora_opt import JaggedSchedule, ReLoRAOptimizer

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
CHANGES = [(BF16, F32), (F32, BF16), (F32, F64), (F64, F32)]
Made = tuple[MLP, ReLoRAOptimizer]


class InFloat32(Optimizer):
    """Momentum in float32 beside parameters of any dtype, a count of one element, and a product that follows them."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["moment"] = torch.zeros_like(p, dtype=torch.float32)
                    state["count"], state["norm"] = torch.zeros(1), torch.zeros((), dtype=p.dtype)
                    state["pair"] = [torch.zeros_like(p), torch.zeros(2)]
                state["moment"].mul_(0.9).add_(p.grad.float())
                state["norm"].lerp_(p.grad.norm(), 0.5)
                state["pair"][0].lerp_(p.grad, 0.5)
                state["count"] += 1
                p.sub_(state["moment"].to(p.dtype), alpha=group["lr"])


BASES: dict[str, Callable[..., Optimizer]] = {
    "AdamW": AdamW,
    "fused AdamW": partial(AdamW, fused=True),
    "SGD": partial(SGD, momentum=0.9),
    "NAdam": NAdam,
    "Adagrad": Adagrad,
    "in float32": InFloat32,
}


def build(dtype: torch.dtype, base: str, rank: int, seed: int = 0) -> Made:
    model = mlp(dtype, seed=seed)
    options: dict[str, Any] = {"targets": ["first", "second"], "init": "kaiming"} if rank else {}
    return model, ReLoRAOptimizer(model, BASES[base], rank=rank, lr=1e-3, schedule=JaggedSchedule(3, 1), **options)


def train(made: Made, first: int, last: int) -> None:
    for u in range(first, last):
        mse(made[0], *batch(u, made[0].head.weight.dtype)).backward()
        made[1].step()
        made[1].zero_grad()


def dtypes(state: Any) -> Any:
    """Return the dtypes of a nested state in its places."""
    if isinstance(state, dict):
        return {key: dtypes(value) for key, value in state.items()}
    return [dtypes(value) for value in state] if isinstance(state, list) else getattr(state, "dtype", None)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("was", "dtype"), CHANGES, ids=str)
def test_a_run_goes_on_in_another_dtype_as_if_it_had_begun_in_it(
    was: torch.dtype, dtype: torch.dtype, base: str, rank: int
) -> None:
    made, other, native = build(was, base, rank), build(dtype, base, rank, seed=1), build(dtype, base, rank)
    train(made, 0, 4)
    train(native, 0, 4)
    other[0].load_state_dict(made[0].state_dict())
    other[1].load_state_dict(copy.deepcopy(made[1].state_dict()))
    for p, q in zip(other[0].parameters(), native[0].parameters(), strict=True):
        state, own = (dict(made[1].state[x]) for made, x in ((other, p), (native, q)))
        own.pop("master", None)  # which the first update makes
        assert dtypes(state) == dtypes(own)
    train(made, 4, 6)
    train(other, 4, 6)
    for p, q in zip(made[0].parameters(), other[0].parameters(), strict=True):
        assert torch.allclose(p.double(), q.double(), rtol=0.02, atol=0.005)


@pytest.mark.parametrize("is_full", [False, True])
def test_so_it_does_by_way_of_the_state_dictionaries_of_torch_distributed(is_full: bool) -> None:
    options = StateDictOptions(full_state_dict=is_full)
    made, other = build(F32, "AdamW", 2), build(BF16, "AdamW", 2, seed=1)
    train(made, 0, 4)
    other[0].load_state_dict(made[0].state_dict())
    set_optimizer_state_dict(*other, get_optimizer_state_dict(*made, options=options), options=options)
    train(other, 4, 6)
    assert other[1].state[other[0].head.weight]["exp_avg"].dtype == BF16


def test_a_base_that_cannot_be_tried_keeps_what_was_saved() -> None:
    made, other = build(BF16, "in float32", 0), build(F32, "in float32", 0)
    train(made, 0, 2)
    saved = copy.deepcopy(made[1].state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InFloat32, "step", lambda self: 1 / 0)
        other[1].load_state_dict(saved)
    assert dtypes(other[1].state[other[0].head.bias]) == dtypes(made[1].state[made[0].head.bias])


def test_a_float32_master_goes_where_the_weight_has_as_many_bits_itself() -> None:
    made, other = build(BF16, "AdamW", 2), build(F32, "AdamW", 2)
    train(made, 0, 2)
    other[1].load_state_dict(made[1].state_dict())
    for W, X in zip(selected_weights(made[0]).values(), selected_weights(other[0]).values(), strict=True):
        assert "master" in made[1].state[W]
        assert "master" not in other[1].state[X]
