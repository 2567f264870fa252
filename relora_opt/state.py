"""The layout of `optimizer.state` and of the clock in `param_groups`: what a checkpoint holds.

    state[W] of a low-rank weight   {"A", "B", "A_state": {base's state of A}, "B_state": {...}, "master"?}
    state[p] of any other           the base optimizer's own
    every group                     rank, scale, factor_lr, pointing, num_updates, num_restarts, last_restart,
                                    relora_format
low_rank                            the names of the low-rank weights with their scales s, in `state_dict()` alone

Only tensors, numbers and dictionaries of them, so `torch.load(weights_only=True)` and torch.distributed.checkpoint read
it. "master" is the float32 value of a 16-bit weight, to which updates too small for 16 bits add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .factors import draw_a, draw_b, draw_generator, factor_dtype, matrix_shape, move_, movements
from .groups import Slot
from .sharding import full, is_sharded, lay_out_factors

Entry = dict[str, Any]

FORMAT = 2
READABLE = (1, 2)  # 1 had no "pointing" in its groups: no A was pointed by gradients
NAMES = "low_rank"
CLOCK = ("num_updates", "num_restarts", "last_restart")
OPTIONS = ("rank", "scale", "factor_lr", "pointing", *CLOCK, "relora_format")  # of every group, beside the base's


class LowRankState(NamedTuple):
    """A low-rank weight W with its state and its scale s."""

    W: Tensor
    entry: Entry
    scale: float

    @property
    def A(self) -> Tensor:  # noqa: N802
        """(r, n)"""
        A: Tensor = self.entry["A"]
        return A

    @property
    def B(self) -> Tensor:  # noqa: N802
        """(m, r)"""
        B: Tensor = self.entry["B"]
        return B

    @property
    def has_gradient(self) -> bool:
        """Whether a factor has a gradient, so that the base will move it."""
        return self.A.grad is not None or self.B.grad is not None


def new_clock() -> dict[str, int]:
    """Return the counters of a run that has not begun, with the format's number."""
    return {**dict.fromkeys(CLOCK, 0), "relora_format": FORMAT}


def is_low_rank(entry: Entry | None) -> TypeGuard[Entry]:
    """Say whether a parameter's state holds factors."""
    return isinstance(entry, dict) and "A" in entry


def new_entry(W: Tensor, slot: Slot, rank: int, *, init: str, seed: int, restart: int) -> Entry:
    """Return the state of a weight at the start of its first cycle: A and B drawn, nothing known of either."""
    A, B = _draw(W, slot, rank, init=init, seed=seed, restart=restart)
    entry: Entry = {"A": nn.Parameter(A), "B": nn.Parameter(B), "A_state": {}, "B_state": {}}
    add_master_(entry, W)
    return entry


def redraw_(entry: Entry, W: Tensor, slot: Slot, *, init: str, seed: int, restart: int) -> None:
    """Start a weight's next cycle: A and B re-drawn in place, their gradients forgotten. W is not touched."""
    A, B = _draw(W, slot, entry["A"].shape[-2], init=init, seed=seed, restart=restart)
    entry["A"].copy_(A)
    entry["B"].copy_(B)
    entry["A"].grad = entry["B"].grad = None


def _draw(W: Tensor, slot: Slot, rank: int, *, init: str, seed: int, restart: int) -> tuple[Tensor, Tensor]:
    shape, generator = matrix_shape(W, is_batch=slot.is_batch), draw_generator(seed, slot.name, restart)
    A = draw_a(shape, rank, init=init, generator=generator, like=W)
    B = draw_b(shape, rank, init=init, generator=generator, like=W)
    return lay_out_factors(A, B, W, slot.name)


def factors_of(weights: Iterable[LowRankState]) -> list[Tensor]:
    """Return A and B of the first weight, of the second, and so on."""
    return [factor for weight in weights for factor in (weight.A, weight.B)]


class Before:
    """What the factors of weights are before the step of a base, to find out which of them it moves, and how far."""

    def __init__(self, weights: Sequence[LowRankState], base: Optimizer) -> None:
        self._weights = weights
        self._copies = copies(factors_of(weights))
        self._moves_idle = not type(base).__module__.startswith("torch.optim.")

    def moved(self) -> tuple[list[LowRankState], list[Tensor]]:
        """Return the weights that have gradients or other factors now, and what their factors were.

        Torch's optimizers leave alone what has no gradient; others may not (a Lookahead, which pulls all of its
        parameters back). Torch would count what they write, but not through `.data`: so values are compared.
        """
        pairs = zip(self._copies[::2], self._copies[1::2], strict=True)
        places = list(zip(self._weights, pairs, strict=True))
        idle = [place for place in places if self._moves_idle and not place[0].has_gradient]
        written = _written(idle)
        moved = [place for place in places if place[0].has_gradient or place[0].W in written]
        return [weight for weight, _ in moved], [copy for _, pair in moved for copy in pair]


def _written(places: Sequence[tuple[LowRankState, tuple[Tensor, Tensor]]]) -> set[Tensor]:
    """Return the weights whose A and B are no longer these; the device is waited for once."""
    flags = [full((weight.A != A).any()) | full((weight.B != B).any()) for weight, (A, B) in places]
    differ = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
    return {weight.W for (weight, _), is_other in zip(places, differ, strict=True) if is_other}


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies of tensors; on a GPU in one launch, or few."""
    if not tensors or any(is_sharded(tensor) or tensor.is_sparse for tensor in tensors):
        return [tensor.clone() for tensor in tensors]
    made = [torch.empty_like(tensor) for tensor in tensors]
    torch._foreach_copy_(made, tensors)
    return made


def move_weights_(weights: Sequence[LowRankState], before: list[Tensor]) -> None:
    """Move weights by what their factors have moved since they were `before`; 16-bit ones by way of their masters."""
    for (W, entry, scale), movement in zip(weights, movements(factors_of(weights), before), strict=True):
        master = entry.get("master")
        if master is None:
            move_(W, movement, scale)
        else:
            master.copy_(exact_weight(W, entry))
            move_(master, movement, scale)
            W.copy_(master)


def exact_weight(W: Tensor, entry: Entry | None) -> Tensor:
    """Return W as its state has it: a 16-bit W's float32 value, except where somebody has written into W since."""
    master: Tensor | None = (entry or {}).get("master")
    return W if master is None else torch.where(master.to(W.dtype) == W, master, W.to(master.dtype))


def add_master_(entry: Entry, W: Tensor) -> None:
    """Give a weight that has 16 bits now, and had more when its factors were made or saved, its float32 value."""
    if factor_dtype(W.dtype) != W.dtype:
        entry.setdefault("master", W.detach().to(factor_dtype(W.dtype)))


def check_fits(W: Tensor, entry: Entry, name: str) -> None:
    """Refuse a weight that was moved or cast after its factors were made.

    Raises:
        ValueError: names the weight and both dtypes and devices.
    """
    A = entry["A"]
    if (A.dtype, A.device) != (factor_dtype(W.dtype), W.device):
        raise ValueError(
            f"{name} is {W.dtype} on {W.device}, but its factors were made for {A.dtype} on {A.device}: move or cast "
            "the model before its optimizer makes the first update, or load a state dictionary into a new optimizer"
        )


def detached(entry: Entry) -> Entry:
    """Return an entry for `state_dict`: the same memory, without the factors' autograd."""
    return {key: value.detach() if isinstance(value, Tensor) else value for key, value in entry.items()}
