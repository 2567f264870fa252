"""What people watch: how far the low-rank weights move, and how many bytes the optimizer keeps for it.

    memory      sizes
    measure     what `optimizer.metrics()` returns

Nothing here is computed unless it is asked for, and nothing of a weight's size is made for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .factors import product_norm
from .optimizer import ReLoRAOptimizer
from .prune import Pruned
from .sharding import full, local
from .state import Entry, exact_weight, is_low_rank


@dataclass(frozen=True)
class Memory:
    """Exact sizes by kind, from the tensors that are there; of sharded tensors, what this rank holds.

    Args:
        num_parameters: elements of all parameters of the optimizer, on all ranks.
        num_trainable: elements that the coming update trains: factors and dense parameters.
        weight_bytes: the parameters themselves.
        gradient_bytes: the gradients of what the coming update trains, as the functional path makes them; on the dense
            path each low-rank weight has one of its own size instead, for as long as it lives.
        factor_bytes: A and B.
        base_bytes: what the base optimizer keeps: moments and counters, of factors and dense parameters.
        master_bytes: the float32 values of 16-bit weights.
        full_rank_adamw_bytes: what AdamW would keep for the same parameters at full rank: two moments in their dtype.
    """

    num_parameters: int
    num_trainable: int
    weight_bytes: int
    gradient_bytes: int
    factor_bytes: int
    base_bytes: int
    master_bytes: int
    full_rank_adamw_bytes: int

    @property
    def state_bytes(self) -> int:
        """Everything in `optimizer.state`: factors, the base's state, masters."""
        return self.factor_bytes + self.base_bytes + self.master_bytes

    @property
    def total_bytes(self) -> int:
        """Weights, gradients and state."""
        return self.weight_bytes + self.gradient_bytes + self.state_bytes

    @property
    def full_rank_total_bytes(self) -> int:
        """The same of full-rank AdamW: weights, a gradient of each trained one, two moments."""
        return self.weight_bytes + self.full_rank_adamw_bytes // 2 + self.full_rank_adamw_bytes


@dataclass(frozen=True)
class WeightMetrics:
    """What is to be seen of one low-rank weight W (m, n). None where there is no such number yet, or no finite one.

    Args:
        low_rank_ratio: |s B A| / |W|, in Frobenius norms: how much of W this cycle's update is. None in its warm start.
        update_rms: |s (B' A' - B A)| / sqrt(m n) of the last update; None where that was not measured (see
            `measures_updates`), or made in the warm start.
        pruned_share: how much of the moments of A and B the last restart set back; None before the first restart,
            after a switch between full and low rank, in a copy of the optimizer, and after loading a state.
    """

    low_rank_ratio: float | None
    update_rms: float | None
    pruned_share: float | None


@dataclass(frozen=True)
class Metrics:
    """What people watch of a run: plain numbers.

    Args:
        weights: of every low-rank weight, by name.
        low_rank_ratio, update_rms, pruned_share: as in `WeightMetrics`, of all these weights as one vector; the first
            two are None where one weight's is.
        num_restarts: restarts so far.
        updates_to_restart: updates from here to the next periodic restart; None where there will be none.
        lr_multiplier: the schedule's, for the coming update.
        memory: what is trained and what is held; with sharded weights, this rank's bytes.
    """

    weights: dict[str, WeightMetrics]
    low_rank_ratio: float | None
    update_rms: float | None
    pruned_share: float | None
    num_restarts: int
    updates_to_restart: int | None
    lr_multiplier: float
    memory: Memory


class Watched(NamedTuple):
    """A low-rank weight as the optimizer shows it.

    `entry` is its state, if any. `moved` is the norm of its last update, where that was measured; `pruned` is what the
    last restart forgot.
    """

    name: str
    W: Tensor
    entry: Entry | None
    scale: float
    has_factors: bool
    is_pointing: bool
    moved: Tensor | float | None
    pruned: Pruned | None


def memory(optimizer: ReLoRAOptimizer) -> Memory:
    """Measure an optimizer's memory. Before its first update it holds none."""
    if not isinstance(optimizer, ReLoRAOptimizer):
        raise TypeError(f"memory of a {type(optimizer).__name__}: give the ReLoRAOptimizer, memory(optimizer)")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trained: list[Tensor] = []
    for number, group in enumerate(optimizer.param_groups):
        has_factors = optimizer._has_factors(number)
        for p in (p for p in group["params"] if p.requires_grad):
            entry = optimizer.state.get(p)
            factors = (entry["A"], entry["B"]) if is_low_rank(entry) else optimizer.factors(p) if has_factors else (p,)
            trained += factors
    low_rank = [entry for entry in optimizer.state.values() if is_low_rank(entry)]
    factor_bytes = sum(_bytes(entry[name]) for entry in low_rank for name in ("A", "B"))
    master_bytes = sum(_bytes(entry["master"]) for entry in low_rank if "master" in entry)
    held = sum(map(_bytes, _tensors(list(optimizer.state.values()))))
    return Memory(
        num_parameters=sum(p.numel() for p in parameters),
        num_trainable=sum(p.numel() for p in trained),
        weight_bytes=sum(map(_bytes, parameters)),
        gradient_bytes=sum(map(_bytes, trained)),
        factor_bytes=factor_bytes,
        base_bytes=held - factor_bytes - master_bytes,
        master_bytes=master_bytes,
        full_rank_adamw_bytes=sum(2 * _bytes(p) for p in parameters if p.requires_grad),
    )


@torch.no_grad()
def measure(optimizer: ReLoRAOptimizer, watched: Sequence[Watched]) -> Metrics:
    """Return the metrics of an optimizer and its low-rank weights; the device is waited for once."""
    norms = _norms(watched)
    sizes = [weight.W.numel() for weight in watched]
    prunings = [weight.pruned for weight in watched]
    next_restart = optimizer.schedule.next_restart(optimizer.num_updates) if watched else None
    return Metrics(
        weights={
            weight.name: WeightMetrics(_ratio([norm]), _rms([norm], [size]), _share([pruned]))
            for weight, norm, size, pruned in zip(watched, norms, sizes, prunings, strict=True)
        },
        low_rank_ratio=_ratio(norms),
        update_rms=_rms(norms, sizes),
        pruned_share=_share(prunings),
        num_restarts=optimizer.num_restarts,
        updates_to_restart=None if next_restart is None else next_restart - optimizer.num_updates,
        lr_multiplier=optimizer.lr_multiplier,
        memory=memory(optimizer),
    )


class _Norms(NamedTuple):
    """|s B A|, |W| and the norm of the last update."""

    low_rank: float | None
    weight: float | None
    moved: float | None


def _norms(watched: Sequence[Watched]) -> list[_Norms]:
    """Return the norms of every weight. One list crosses from the device."""
    rows = [
        (_low_rank_norm(weight), _weight_norm(weight), weight.moved)
        if weight.has_factors
        else (None, None, weight.moved)
        for weight in watched
    ]
    scalars = [full(norm) for row in rows for norm in row if isinstance(norm, Tensor)]
    numbers = iter(torch.stack([norm.to(scalars[0].device) for norm in scalars]).tolist() if scalars else ())
    return [_Norms(*(next(numbers) if isinstance(norm, Tensor) else norm for norm in row)) for row in rows]


def _low_rank_norm(weight: Watched) -> Tensor | float:
    if not is_low_rank(weight.entry) or weight.is_pointing:  # B is 0, or holds what is not in W
        return 0.0
    return product_norm(weight.entry["A"], weight.entry["B"], weight.scale)


def _weight_norm(weight: Watched) -> Tensor:
    W = exact_weight(weight.W, weight.entry if is_low_rank(weight.entry) else None)
    norm: Tensor = torch.linalg.vector_norm(W, dtype=torch.promote_types(W.dtype, torch.float32))
    return norm


def _ratio(norms: Sequence[_Norms]) -> float | None:
    low_rank, weight = _length([norm.low_rank for norm in norms]), _length([norm.weight for norm in norms])
    return None if low_rank is None or not weight else _finite(low_rank / weight)


def _rms(norms: Sequence[_Norms], sizes: Sequence[int]) -> float | None:
    moved = _length([n.moved for n in norms])
    return None if moved is None else _finite(moved / math.sqrt(sum(sizes)))


def _share(prunings: Sequence[Pruned | None]) -> float | None:
    known = [pruned for pruned in prunings if pruned is not None]
    num_elements = sum(pruned.num_elements for pruned in known)
    return sum(pruned.num_forgotten for pruned in known) / num_elements if num_elements else None


def _length(values: Sequence[float | None]) -> float | None:
    """Return the length of the vector whose parts are this long; None where one is not known, or there is none."""
    known = [value for value in values if value is not None]
    return math.hypot(*known) if known and len(known) == len(values) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _bytes(tensor: Tensor) -> int:
    """Return the bytes that this rank holds of a tensor; of one that is made of others (torchao's low-bit), theirs."""
    held = local(tensor)
    if hasattr(held, "__tensor_flatten__"):
        names, _ = held.__tensor_flatten__()
        return sum(_bytes(getattr(held, name)) for name in names)
    return held.numel() * held.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
