"""What people watch: how much is trained, and how many bytes the optimizer keeps for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .optimizer import ReLoRAOptimizer
from .sharding import local


@dataclass(frozen=True)
class Memory:
    """Exact sizes, from the tensors that are there.

    Args:
        num_parameters: elements of all parameters of the optimizer.
        num_trainable: elements that the coming update trains: factors and dense parameters.
        state_bytes: everything in `optimizer.state`: factors, the base's state, masters. Of sharded tensors, what this
            rank holds.
        full_rank_adamw_bytes: what AdamW would keep for the same parameters at full rank: two moments in their dtype;
            on this rank.
    """

    num_parameters: int
    num_trainable: int
    state_bytes: int
    full_rank_adamw_bytes: int


def memory(optimizer: ReLoRAOptimizer) -> Memory:
    """Measure an optimizer's memory. Before its first update it holds none."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    num_trainable = 0
    for group in optimizer.param_groups:
        has_factors = group["rank"] > 0 and optimizer.is_low_rank
        for p in group["params"]:
            trained = optimizer.factors(p) if has_factors else (p,)
            num_trainable += sum(t.numel() for t in trained if t.requires_grad)
    return Memory(
        num_parameters=sum(p.numel() for p in parameters),
        num_trainable=num_trainable,
        state_bytes=sum(map(_bytes, _tensors(list(optimizer.state.values())))),
        full_rank_adamw_bytes=sum(2 * _bytes(p) for p in parameters if p.requires_grad),
    )


def _bytes(tensor: Tensor) -> int:
    held = local(tensor)
    return held.numel() * held.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
