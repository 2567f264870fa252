"""The optimizer's groups: a user's parameters, split into those that are low-rank and those that are dense.

    LowRank           what a group gets where it does not say its own rank, alpha and factor_lr
    ResolvedGroup     a group for torch.optim, with what the optimizer knows of its parameters
    resolve_groups    a module, parameters, pairs or groups -> resolved groups

Each user's group becomes at most two groups for the optimizer, the low-rank part first, or one more for each further
turn of the warm start; `group["rank"]` tells them apart (0: dense). Nothing is dropped in silence: a rank that fits no
weight and parameters from which nothing can be selected are errors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .factors import factor_dtype, matrix_shape
from .select import Choice, Targets, canonical_name, check_targets, parallel_paths

Params = nn.Module | Iterable[Any]

MATCHED = "matched"  # alpha, and a group's scale, where each weight's own is found by matched.matched_scale


class Slot(NamedTuple):
    """What the optimizer knows of a parameter beside its tensor."""

    name: str
    is_batch: bool  # a 3-D weight that stacks matrices along dimension 0


class Selected(NamedTuple):
    """A low-rank weight as the optimizer meets it, in group `number`."""

    W: Tensor
    slot: Slot
    group: dict[str, Any]
    number: int


class ResolvedGroup(NamedTuple):
    """A group as the optimizer keeps it: `options` for torch.optim, with params, rank, scale and factor_lr."""

    options: dict[str, Any]
    slots: list[Slot]
    turn: int = 0  # of the warm start
    part: int = 0  # of those that a group was split into by turns, as which it has the same options

    def seen_by_base(self, *, is_warm: bool) -> dict[str, Any]:
        """Return the options with parameters as the base sees them: without a warm start, factors in place of weights.

        They are matrices, those of a convolution too. Here they stand for them without memory or values.
        """

        def seen(p: Tensor, slot: Slot) -> Tensor:
            if is_warm or not self.options["rank"] or p.dim() == 2:
                return p
            shape = matrix_shape(p, is_batch=slot.is_batch)
            return torch.empty((1,) * len(shape), dtype=factor_dtype(p.dtype), device=p.device).expand(shape)

        parameters = [seen(p, slot) for p, slot in zip(self.options["params"], self.slots, strict=True)]
        return {**self.options, "params": parameters}


@dataclass(frozen=True)
class LowRank:
    """What a group gets where it does not say its own.

    Args:
        rank: r; 0 selects nothing.
        alpha: scale s = alpha / rank; None means alpha = rank; "matched" leaves s to each weight's shape.
        factor_lr: multiplies the learning rate for factors only.
        targets: which parameters; None for the default.
        base_with_alpha: the base, where it has an alpha of its own, for which a number could be meant.
    """

    rank: int
    alpha: float | str | None
    factor_lr: float
    targets: Targets
    base_with_alpha: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 0:
            raise ValueError(f"rank={self.rank!r} must be a whole number, 0 or more: 0 trains everything densely")
        is_positive = not isinstance(self.alpha, str) and _is_finite(self.alpha) and float(self.alpha or 0) > 0
        if not (self.alpha is None or self.alpha == MATCHED or is_positive):
            raise ValueError(
                f"alpha={self.alpha!r} must be a positive number (the scale is alpha / rank), or {MATCHED!r}"
            )
        if is_positive and self.base_with_alpha:
            raise ValueError(
                f"alpha={self.alpha} is the scale's here, alpha / rank, and {self.base_with_alpha} has its own: "
                f"bind that, base=functools.partial({self.base_with_alpha}, alpha={self.alpha}), after which alpha= "
                "means the scale's"
            )
        if not (_is_finite(self.factor_lr) and self.factor_lr >= 0):
            raise ValueError(f"factor_lr={self.factor_lr!r} must be 0 or more: it multiplies lr for the factors")
        check_targets(self.targets)

    @property
    def scale(self) -> float | str:
        """s = alpha / rank, or 0 for rank 0, or "matched"."""
        if self.rank == 0:
            return 0.0
        if isinstance(self.alpha, str):
            return self.alpha
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def merged_with(self, group: dict[str, Any]) -> LowRank:
        """Return these settings with a group's own; what the group says is removed from it."""
        return replace(self, **{key: group.pop(key) for key in ("rank", "alpha", "factor_lr") if key in group})


def check_foreign_names(options: Mapping[str, Any], *, known: Mapping[str, Any] | None = None) -> None:
    """Refuse options by the names that others have for them, and in a group those of the whole optimizer.

    Args:
        options: keywords of the optimizer; or a group's, beside what is `known` to the base.

    Raises:
        TypeError: names the option and what it is called here.
    """
    names = _FOREIGN_NAMES if known is None else {**_FOREIGN_NAMES, **_OF_ALL_GROUPS}
    for theirs in names:
        if theirs in options and theirs not in (known or ()):
            owner, ours = names[theirs]
            raise TypeError(f"{theirs}={options[theirs]!r} is {owner}: here it is {ours}")


def resolve_groups(params: Params, low_rank: LowRank, *, num_turns: int = 1) -> list[ResolvedGroup]:
    """Split a user's parameters into the optimizer's groups.

    Args:
        params: a module, parameters, (name, parameter) pairs, or group dictionaries of either.
        low_rank: what a group gets where it does not say its own rank, alpha or factor_lr.
        num_turns: in which the low-rank weights have their warm start; parts of a group that differ in it are groups.

    Raises:
        TypeError: for what is none of these.
        ValueError: where nothing can be selected, a target matches nothing, a named weight cannot be low-rank, or there
            are more turns than low-rank weights.
    """
    model = params if isinstance(params, nn.Module) else None
    raw = _raw_groups(params)
    chosen = Choice(model, low_rank.targets)
    resolved = [part for group in raw for part in _split(group, low_rank, chosen)]
    _check_names(resolved, ())
    chosen.check_all_matched()
    _check_selection(resolved, raw, model, low_rank)
    num_weights = _num_low_rank(resolved)
    if num_turns > num_weights > 0:
        raise ValueError(f"warm_start_turns={num_turns} of {num_weights} low-rank weights: take no more than these")
    return _in_turns(resolved, num_turns)


def resolve_added_group(
    group: dict[str, Any], low_rank: LowRank, *, num_before: int, taken: Iterable[str], num_turns: int = 1
) -> list[ResolvedGroup]:
    """Split a group that is added to an optimizer; nothing in it need be selected.

    Args:
        num_before: how many parameters the optimizer has. taken: the names of its low-rank weights.
        num_turns: as in `resolve_groups`.
    """
    (raw,) = _raw_groups([group], num_before)
    resolved = list(_split(raw, low_rank, Choice(None, low_rank.targets)))
    _check_names(resolved, taken)
    return _in_turns(resolved, num_turns)


def _num_low_rank(groups: Iterable[ResolvedGroup]) -> int:
    return sum(len(group.slots) for group in groups if group.options["rank"])


def _in_turns(groups: list[ResolvedGroup], num_turns: int) -> list[ResolvedGroup]:
    """Return the groups with their low-rank weights in so many parts, of as many weights each, in their order."""
    num_weights, done, found = _num_low_rank(groups), 0, []
    for group in groups:
        if not group.options["rank"]:
            found.append(group)
            continue
        turns = [(done + place) * num_turns // num_weights for place in range(len(group.slots))]
        done += len(turns)
        for part, turn in enumerate(sorted({*turns})):
            mine = [place for place, its in enumerate(turns) if its == turn]
            params = [group.options["params"][place] for place in mine]
            found.append(
                ResolvedGroup({**group.options, "params": params}, [group.slots[place] for place in mine], turn, part)
            )
    return found


def _check_names(groups: Iterable[ResolvedGroup], taken: Iterable[str]) -> None:
    """Refuse low-rank weights of one name; a dense parameter may have that of another, a head's that it replaces."""
    names = Counter((*taken, *(slot.name for group in groups if group.options["rank"] for slot in group.slots)))
    for name, times in names.most_common(1):
        if times > 1:
            raise ValueError(
                f"{name} is the name of {times} low-rank weights: each needs its own, by which its factors are drawn"
            )


def _split(group: dict[str, Any], low_rank: LowRank, chosen: Choice) -> Iterator[ResolvedGroup]:
    """Yield a group's low-rank part and its dense part, where they are not empty."""
    options = dict(group)
    says_rank, stacked = "rank" in options, options.pop("stacked", None)
    if stacked not in (None, True, False):
        raise TypeError(f"stacked={stacked!r} must be True or False: whether the group's 3-D weights stack matrices")
    settings = low_rank.merged_with(options)
    parts: dict[bool, tuple[list[Tensor], list[Slot]]] = {True: ([], []), False: ([], [])}
    for name, parameter in options.pop("params"):
        slot = Slot(name, (bool(stacked) and parameter.dim() == 3) or id(parameter) in chosen.batch_ids)
        is_selected = _is_selected(slot, parameter, settings, chosen, says_rank=says_rank)
        if is_selected and parameter.dim() == 3 and stacked is None and not chosen.knows_modules:
            raise ValueError(
                f"{name} {tuple(parameter.shape)} may stack matrices (experts) or be a convolution's, which parameters "
                "without their module do not tell: pass the model itself, or say stacked=True or stacked=False in the "
                "group"
            )
        parameters, slots = parts[is_selected]
        parameters.append(parameter)
        slots.append(slot)
    if says_rank and settings.rank and not parts[True][0]:
        raise ValueError(
            f"a group says rank={settings.rank}, and none of its {len(parts[False][0])} parameters is a matrix that "
            f"targets={chosen.targets!r} name: name some, or leave rank out"
        )
    for is_selected, (parameters, slots) in parts.items():
        if parameters:
            rank, scale = (settings.rank, settings.scale) if is_selected else (0, 0.0)
            factor_lr = settings.factor_lr if is_selected else 1.0
            yield ResolvedGroup(
                {**options, "params": parameters, "rank": rank, "scale": scale, "factor_lr": factor_lr}, slots
            )


def _is_selected(slot: Slot, parameter: Tensor, settings: LowRank, chosen: Choice, *, says_rank: bool) -> bool:
    if is_lazy(parameter):
        raise ValueError(f"{slot.name} has no shape yet: call the model on a batch before its optimizer is made")
    if parameter.dim() < 2:
        return False
    is_explicit = says_rank if chosen.targets is None else chosen.takes(slot.name, parameter)
    is_default = chosen.targets is None and slot.name in chosen.defaults
    if settings.rank == 0 or not (is_explicit or is_default):
        return False
    if not parameter.is_floating_point():
        if is_explicit:
            raise ValueError(f"{slot.name} is named as low-rank but {parameter.dtype}: leave it out of targets")
        return False
    smaller = min(matrix_shape(parameter, is_batch=slot.is_batch)[-2:])
    if not is_explicit:
        return smaller > settings.rank
    if not parameter.requires_grad:
        raise ValueError(f"{slot.name} is named as low-rank but frozen: set requires_grad, or leave it out of targets")
    if smaller <= settings.rank:
        raise ValueError(
            f"rank={settings.rank} is not below the smaller side {smaller} of {slot.name} {tuple(parameter.shape)}: "
            "lower rank, or leave it out of targets"
        )
    return True


def _raw_groups(params: Params, num_before: int = 0) -> list[dict[str, Any]]:
    """Return group dictionaries whose "params" are (name, parameter) pairs; parameters without a name are numbered.

    `num_before` parameters were numbered before.
    """
    groups = _groups_of_pairs(params, count(num_before))
    if not any(group["params"] for group in groups):
        raise ValueError("params is empty: there is nothing to optimize")
    return groups


def _groups_of_pairs(params: Params, numbers: Iterator[int]) -> list[dict[str, Any]]:
    if isinstance(params, nn.Module):
        parallel = parallel_paths(params)
        return [{"params": [(canonical_name(name, parallel), p) for name, p in params.named_parameters()]}]
    if isinstance(params, Tensor):
        raise TypeError("params is a single tensor: pass a module, an iterable of parameters, or group dictionaries")
    if not isinstance(params, Iterable):
        raise TypeError(f"params={params!r}: pass a module, an iterable of parameters, or group dictionaries")
    items = list(params)
    if items and all(isinstance(item, Mapping) for item in items):
        for item in items:
            if "params" not in item:
                raise ValueError(f"a group has {sorted(item)} and no params: give it its parameters")
        return [{**item, "params": _pairs(item["params"], numbers)} for item in items]
    return [{"params": _pairs(items, numbers)}]


def _pairs(items: Any, numbers: Iterator[int]) -> list[tuple[str, Tensor]]:
    pairs: list[tuple[str, Tensor]] = []
    names: dict[int, str] = {}
    if isinstance(items, Set):
        raise TypeError("params is a set, which has no order: give a list")
    if isinstance(items, nn.Module):
        raise TypeError(f"a group's params is a {type(items).__name__}: give its parameters, module.named_parameters()")
    if not isinstance(items, Iterable):
        raise TypeError(f"a group's params={items!r}: give a list of parameters or (name, parameter) pairs")
    for item in [items] if isinstance(items, Tensor) else items:
        if isinstance(item, tuple) and not (len(item) == 2 and isinstance(item[0], str)):
            kinds = ", ".join(type(part).__name__ for part in item)
            raise TypeError(f"params holds a tuple ({kinds}): parameters or (name, parameter) pairs go there")
        name, parameter = item if isinstance(item, tuple) else (None, item)
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"params holds a {type(parameter).__name__}: parameters or (name, parameter) pairs go there"
            )
        number = next(numbers)
        name = f"param{number}" if name is None else canonical_name(name)
        if id(parameter) in names:
            raise ValueError(f"{names[id(parameter)]} and {name} are the same parameter: give it once")
        names[id(parameter)] = name
        pairs.append((name, parameter))
    return pairs


def _check_selection(
    resolved: list[ResolvedGroup], raw: list[dict[str, Any]], model: nn.Module | None, low_rank: LowRank
) -> None:
    """Refuse to train everything densely where a rank was asked for."""
    targets = low_rank.targets
    if low_rank.rank == 0 or any(group.options["rank"] for group in resolved):
        return
    remedy = "pass rank=0 to train everything densely"
    if model is None and targets is None:
        if all("rank" in group for group in raw):
            return
        raise ValueError(
            f"rank={low_rank.rank}, but parameters without their module tell no linear layer from an embedding: pass "
            "the model itself (to transformers' Trainer (trainer_factory, options)), (name, parameter) pairs with "
            f"targets=default_targets(model), or groups with their own rank, for all their matrices; or {remedy}"
        )
    largest = max((min(matrix_shape(p)) for group in raw for _, p in group["params"] if p.dim() >= 2), default=0)
    if largest <= low_rank.rank:
        raise ValueError(
            f"rank={low_rank.rank} is not below the smaller side of any weight (the largest is {largest}): lower rank, "
            f"or {remedy}"
        )
    raise ValueError(
        f"rank={low_rank.rank}, targets={targets!r}: no weight is selected; name some with targets=, or {remedy}"
    )


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_FOREIGN_NAMES = {
    "r": ("PEFT's name", "rank="),
    "lora_alpha": ("PEFT's name", "alpha="),
    "target_modules": ("PEFT's name", "targets="),
    "lora_dropout": ("PEFT's", "the model's own dropout, before its linear layers"),
    "modules_to_save": ("PEFT's", "what is not selected and not frozen: all of it is trained"),
    "update_proj_gap": ("GaLore's", "schedule=JaggedSchedule(restart_every=...)"),
    "proj_type": ("GaLore's", "init="),
    "restart_every": ("the schedule's", "schedule=JaggedSchedule(restart_every=...)"),
    "restart_warmup": ("the schedule's", "schedule=JaggedSchedule(1000, restart_warmup=...)"),
    "warm_start": ("the schedule's", "schedule=JaggedSchedule(1000, warm_start=...)"),
    "warm_start_at": ("the schedule's", "schedule=JaggedSchedule(1000, warm_start=..., warm_start_at=...)"),
    "warm_start_turns": ("the schedule's", "schedule=JaggedSchedule(1000, warm_start=..., warm_start_turns=...)"),
    "num_warmup_steps": ("a scheduler's", "schedule=JaggedSchedule(1000, outer=cosine(20_000, warmup=...))"),
}
_OF_ALL_GROUPS = {
    name: ("the whole optimizer's", f"ReLoRAOptimizer(..., {name}=...), for all groups")
    for name in ("targets", "schedule", "init", "prune", "max_grad_norm", "release_grads", "seed")
}
