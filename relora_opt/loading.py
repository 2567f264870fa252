"""Reading a saved state: what is refused, and what the live state becomes.

This file does not know base optimizers; the layout is state.py's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import zip_longest
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from .factors import factor_dtype, matrix_shape
from .groups import Selected
from .schedule import JaggedSchedule
from .sharding import is_sharded
from .state import CLOCK, FORMAT, NAMES, READABLE, Entry, is_low_rank

StateDict = dict[str, Any]


def check_loadable(
    saved: dict[str, Any], groups: list[dict[str, Any]], schedule: JaggedSchedule, turns: list[int]
) -> None:
    """Refuse a state dictionary that would be misread by groups with these turns of the warm start.

    Raises:
        ValueError: for another optimizer's state, an unknown format, other ranks or shapes, groups that disagree, or
            counters that disagree with the state (low rank without factors, or a warm start with them).
    """
    _check_form(saved)
    _check_groups(saved["param_groups"], groups)
    num_updates = saved["param_groups"][0]["num_updates"]
    for group, own, turn in zip(saved["param_groups"], groups, turns, strict=True):
        is_low = schedule.turn(num_updates + 1) != turn
        for index, W in zip(group["params"], own["params"], strict=False):  # torch refuses other lengths
            entry = saved["state"].get(index)
            if not group["rank"] or (entry is None and num_updates == 0):
                continue
            if is_low_rank(entry) != is_low:
                where = "at low rank but has no factors" if is_low else "in a warm start but has factors"
                raise ValueError(
                    f"the saved state is {where}: num_updates={num_updates} with {schedule.place}; use the schedule it "
                    "was saved with, and restore the clock first (set_clock) where a template of the state is needed"
                )
            if is_low_rank(entry):
                _check_entry(entry, W, group["rank"])


def check_names(saved: StateDict, names: list[str]) -> None:
    """Refuse the factors of other weights, which may have the same shapes; draws to come are keyed by these names too.

    A state that has come through torch.distributed.checkpoint has no list of them: it finds its weights by name itself.

    Raises:
        ValueError: names the first weight in which they differ.
    """
    theirs = saved.get(NAMES)
    if theirs is None or list(theirs) == names:
        return
    other, ours = next(pair for pair in zip_longest(theirs, names, fillvalue="none") if pair[0] != pair[1])
    raise ValueError(
        f"the saved state is of other low-rank weights ({other} where this optimizer has {ours}): construct it alike, "
        f'with the same targets and names; if nothing but names has changed, remove "{NAMES}" from the state dictionary'
    )


def saved_scales(saved: StateDict) -> dict[str, float]:
    """Return the scales of a saved state by its weights' names; none of a state that has no record of them."""
    theirs = saved.get(NAMES)
    return theirs if isinstance(theirs, dict) else {}


def check_scales(scales: dict[str, Any]) -> None:
    """Refuse scales of weights that are none.

    Raises:
        ValueError: names the first weight whose scale is none.
    """
    for name, scale in scales.items():
        is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not (is_number and 0 < scale < inf):
            raise ValueError(f"the scale of {name} is {scale!r}: it must be a positive number, as it was saved")


def check_layouts(saved: StateDict, weights: Iterable[Selected]) -> None:
    """Refuse the factors of a sharded weight for a whole one, of stacked matrices for one, and the other way round.

    Raises:
        ValueError: names the weight, and what gathers or shards a state, or how the group is made.
    """
    for weight, index in _indices(saved, weights):
        entry = saved["state"].get(index)
        if not is_low_rank(entry):
            continue
        if weight.slot.is_batch != (entry["A"].dim() == 3):
            raise ValueError(
                f"the saved factors of {weight.slot.name} were made with stacked={not weight.slot.is_batch}, and this "
                f"optimizer has stacked={weight.slot.is_batch}: construct it alike"
            )
        if is_sharded(weight.W) != is_sharded(entry["A"]):
            have, want = ("sharded", "is not") if is_sharded(entry["A"]) else ("not sharded", "is")
            raise ValueError(
                f"the saved factors of {weight.slot.name} are {have}, but the weight {want}: save and load through "
                "torch.distributed.checkpoint, or its get_optimizer_state_dict and set_optimizer_state_dict with "
                "StateDictOptions(full_state_dict=True)"
            )


def check_clock(num_updates: Any, num_restarts: Any, last_restart: Any, fresh: Any) -> None:
    """Refuse counters that no run has, and names that are none.

    Any number of restarts goes with any number of updates: by hand there may be many at one, and before the first.

    Raises:
        ValueError: gives the counters. TypeError: where `fresh` is no list of names.
    """
    are_names = isinstance(fresh, Collection) and all(isinstance(name, str) for name in fresh)
    if isinstance(fresh, str) or not (fresh is None or are_names):
        raise TypeError(f"fresh={fresh!r} must be a list of names, as the clock of the saved optimizer has it")
    counters = (num_updates, num_restarts, last_restart)
    are_whole = all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in counters)
    if not are_whole or last_restart > num_updates:
        raise ValueError(
            f"num_updates={num_updates}, num_restarts={num_restarts}, last_restart={last_restart}: they must be "
            "whole numbers, 0 or more, with last_restart between 0 and num_updates"
        )


def with_fresh_states(saved: StateDict, weights: Iterable[Selected], names: Collection[str]) -> StateDict:
    """Give these weights, of which the base held no state, the form that this has in an optimizer.

    torch.distributed.checkpoint drops empty dictionaries on its way from a full state dictionary, and makes others.
    """
    _check_form(saved)
    if not names:
        return saved
    state = dict(saved["state"])
    for weight, index in _indices(saved, weights):
        if weight.slot.name in names and is_low_rank(state.get(index)):
            state[index] = {"A_state": {}, "B_state": {}, **state[index]}
        elif weight.slot.name in names and state.get(index) == {}:
            del state[index]
    return {**saved, "state": state}


def loaded(saved: Entry, live: Entry | None, W: Tensor, *, moves_counters: bool) -> Entry:
    """Return a parameter's state with the saved values and dtypes; live factors stay the same objects.

    Factors have the dtype that those of W have now, and a float32 master goes where W itself has as many bits. "step"
    stays where it was saved, as torch keeps it, unless the base wants it on the device (fused and capturable ones do).
    """
    entry: Entry = _to_device(saved, W.device, moves_counters)
    if not is_low_rank(saved):
        return entry
    if factor_dtype(W.dtype) == W.dtype:
        entry.pop("master", None)
    for key in ("A", "B"):
        entry[key] = entry[key].to(factor_dtype(W.dtype))
        if is_low_rank(live) and (live[key].shape, live[key].dtype) == (entry[key].shape, entry[key].dtype):
            live[key].data.copy_(entry[key])
            entry[key] = live[key]
        else:
            entry[key] = nn.Parameter(entry[key])
    return entry


def _indices(saved: StateDict, weights: Iterable[Selected]) -> Iterator[tuple[Selected, int]]:
    """Yield the low-rank weights with their numbers in a saved state; torch refuses other numbers of them."""
    weights = list(weights)
    numbers = {weight.number for weight in weights}
    indices = [i for n, group in enumerate(saved["param_groups"]) if n in numbers for i in group["params"]]
    return zip(weights, indices, strict=False)


def _check_form(saved: Any) -> None:
    must = "it must be what optimizer.state_dict() gave"
    if not isinstance(saved, dict):
        raise TypeError(f"state_dict is a {type(saved).__name__}: {must}")
    if not {"state", "param_groups"} <= saved.keys():
        raise ValueError(f"state_dict holds {sorted(map(str, saved))}: {must}")
    if not isinstance(saved["state"], dict):
        raise TypeError(f"state_dict's state is a {type(saved['state']).__name__}: {must}")
    theirs = saved.get(NAMES, {})
    if not isinstance(theirs, (dict, list)):  # states of old have no scales
        raise TypeError(f"state_dict's {NAMES} is a {type(theirs).__name__}: {must}")
    check_scales(saved_scales(saved))
    groups = saved["param_groups"]
    wrong = [group for group in groups if not isinstance(group, dict)] if isinstance(groups, list) else [groups]
    if wrong:
        raise TypeError(f"state_dict's param_groups holds a {type(wrong[0]).__name__}: {must}")


def _check_groups(saved: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    if any("relora_format" not in group for group in saved):
        raise ValueError("this state was not saved by ReLoRAOptimizer: load it into the base optimizer it came from")
    formats = {group["relora_format"] for group in saved} - set(READABLE)
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
