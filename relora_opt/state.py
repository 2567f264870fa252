"""The layout of `optimizer.state` and of the clock in `param_groups`: what a checkpoint holds.

    state[W] of a low-rank weight   {"A", "B", "A_state": {base's state of A}, "B_state": {...}, "master"?}
    state[p] of any other           the base optimizer's own
    every group                     rank, scale, factor_lr, pointing, num_updates, num_restarts, last_restart,
                                    relora_format

Only tensors, numbers and dictionaries of them, so `torch.load(weights_only=True)` and torch.distributed.checkpoint read
it. "master" is the float32 value of a 16-bit weight, to which updates too small for 16 bits add up.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from .factors import draw_a, draw_b, draw_generator, factor_dtype, matrix_shape, move_
from .select import Slot
from .sharding import is_sharded, lay_out_factors

Entry = dict[str, Any]

FORMAT = 2
_READABLE = (1, 2)  # 1 had no "pointing" in its groups: no A was pointed by gradients
CLOCK = ("num_updates", "num_restarts", "last_restart")


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
    return entry is not None and "A" in entry


def new_entry(W: Tensor, slot: Slot, rank: int, *, init: str, seed: int, restart: int) -> Entry:
    """Return the state of a weight at the start of its first cycle: A and B drawn, nothing known of either."""
    A, B = _draw(W, slot, rank, init=init, seed=seed, restart=restart)
    entry: Entry = {"A": nn.Parameter(A), "B": nn.Parameter(B), "A_state": {}, "B_state": {}}
    if factor_dtype(W.dtype) != W.dtype:
        entry["master"] = W.detach().to(factor_dtype(W.dtype))
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


def move_weight_(W: Tensor, entry: Entry, old: tuple[Tensor, Tensor], scale: float) -> None:
    """Move W by what its factors have moved since `old` = (A, B); a 16-bit W by way of its master."""
    new = entry["A"], entry["B"]
    master = entry.get("master")
    if master is None:
        move_(W, old, new, scale)
        return
    # Where somebody has written into W since (loaded weights, say), their value counts.
    master.copy_(torch.where(master.to(W.dtype) == W, master, W.to(master.dtype)))
    move_(master, old, new, scale)
    W.copy_(master)


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


def check_layout(W: Tensor, saved: Entry, name: str) -> None:
    """Refuse the factors of a sharded weight for a whole one, and the other way round.

    Raises:
        ValueError: names the weight and what gathers or shards a state.
    """
    if is_sharded(W) != is_sharded(saved["A"]):
        have, want = ("sharded", "is not") if is_sharded(saved["A"]) else ("not sharded", "is")
        raise ValueError(
            f"the saved factors of {name} are {have}, but the weight {want}: save and load through "
            "torch.distributed.checkpoint, or its get_optimizer_state_dict and set_optimizer_state_dict with "
            "StateDictOptions(full_state_dict=True)"
        )


def detached(entry: Entry) -> Entry:
    """Return an entry for `state_dict`: the same memory, without the factors' autograd."""
    return {key: value.detach() if isinstance(value, Tensor) else value for key, value in entry.items()}


def loaded(saved: Entry, live: Entry | None, W: Tensor, *, moves_counters: bool) -> Entry:
    """Return a parameter's state with the saved values and dtypes; live factors stay the same objects.

    "step" stays where it was saved, as torch keeps it, unless the base wants it on the device (fused and capturable
    ones do). A 16-bit weight whose state has no master, saved when it had 32 bits, gets one.
    """
    entry: Entry = _to_device(saved, W.device, moves_counters)
    if not is_low_rank(saved):
        return entry
    for key in ("A", "B"):
        if is_low_rank(live) and live[key].shape == saved[key].shape:
            live[key].data.copy_(saved[key])
            entry[key] = live[key]
        else:
            entry[key] = nn.Parameter(entry[key])
    if factor_dtype(W.dtype) != W.dtype:
        entry.setdefault("master", W.detach().to(factor_dtype(W.dtype)))
    return entry


def check_loadable(saved: dict[str, Any], groups: list[dict[str, Any]], warm_start: int) -> None:
    """Refuse a state dictionary that would be misread.

    Raises:
        ValueError: for another optimizer's state, an unknown format, other ranks or shapes, groups that disagree, or
            counters that disagree with the state (past the switch without factors, or before it with them).
    """
    if not isinstance(saved, dict):
        raise TypeError(f"state_dict is a {type(saved).__name__}: it must be what optimizer.state_dict() gave")
    if not {"state", "param_groups"} <= saved.keys():
        raise ValueError(f"state_dict holds {sorted(saved)}: it must be what optimizer.state_dict() gave")
    _check_groups(saved["param_groups"], groups)
    num_updates = saved["param_groups"][0]["num_updates"]
    is_past = num_updates >= warm_start
    for group, own in zip(saved["param_groups"], groups, strict=True):
        for index, W in zip(group["params"], own["params"], strict=False):  # torch refuses other lengths
            entry = saved["state"].get(index)
            if not group["rank"] or (entry is None and num_updates == 0):
                continue
            if is_low_rank(entry) != is_past:
                where = "past the switch but has no factors" if is_past else "before the switch but has factors"
                raise ValueError(
                    f"the saved state is {where}: num_updates={num_updates} with warm_start={warm_start}; use the "
                    "schedule it was saved with, and restore the clock first (set_clock) where a template of the state "
                    "is needed"
                )
            if is_low_rank(entry):
                _check_entry(entry, W, group["rank"])


def _check_groups(saved: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    if any("relora_format" not in group for group in saved):
        raise ValueError("this state was not saved by ReLoRAOptimizer: load it into the base optimizer it came from")
    formats = {group["relora_format"] for group in saved} - set(_READABLE)
    if formats:
        raise ValueError(
            f"relora_format={formats.pop()} is not known here ({FORMAT} is): use the version that saved it"
        )
    for group in saved:
        missing = sorted({*CLOCK, "rank", "scale", "factor_lr"} - group.keys())
        if missing:
            raise ValueError(f"a group of the saved state lacks {missing}: it must be what optimizer.state_dict() gave")
    clocks = sorted({tuple(group[name] for name in CLOCK) for group in saved})
    if len(clocks) > 1:
        raise ValueError(f"the groups of the saved state disagree in {CLOCK}, {clocks}: one clock drives them all")
    ranks, own = [group["rank"] for group in saved], [group["rank"] for group in groups]
    if ranks != own:
        raise ValueError(f"the saved state has rank {ranks} by group and this optimizer {own}: construct it alike")


def _check_entry(entry: Entry, W: Tensor, rank: int) -> None:
    missing = sorted({"B", "A_state", "B_state"} - entry.keys())
    if missing:
        raise ValueError(f"the saved state of a low-rank weight lacks {missing}: it was cut, take another checkpoint")
    A, B = entry["A"], entry["B"]
    *stacked, m, n = matrix_shape(W, is_batch=A.dim() == 3 == W.dim())
    if (A.shape, B.shape) != ((*stacked, rank, n), (*stacked, m, rank)):
        raise ValueError(
            f"the saved A is {tuple(A.shape)} and B {tuple(B.shape)}, which does not fit a weight of shape "
            f"{tuple(W.shape)} at rank {rank}: load the state of the same model"
        )


def _to_device(value: Any, device: torch.device, moves_counters: bool, key: str = "") -> Any:
    """Copy a nested state, keeping every dtype."""
    if isinstance(value, dict):
        return {name: _to_device(item, device, moves_counters, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_to_device(item, device, moves_counters) for item in value]
    if hasattr(value, "__tensor_flatten__"):  # made of tensors; torchao's low-bit ones cannot be cloned as a whole
        names, context = value.__tensor_flatten__()
        parts = {name: _to_device(getattr(value, name), device, moves_counters) for name in names}
        return type(value).__tensor_unflatten__(parts, context, value.shape, value.stride())
    if isinstance(value, Tensor):
        moves = moves_counters or key != "step"
        return value.detach().to(device, copy=True) if moves else value.detach().clone()
    return value
