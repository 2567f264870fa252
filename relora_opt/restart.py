"""What a restart leaves of the base optimizer's state of the factors.

    check_prunable   refuse at construction what a strategy could not prune, by trying the base
    prune_states_    prune the state of every factor, in place
    reset_counters_  start anew what the base counts in the groups of the factors
    Counters         what that is, found by trying the base
    FreshState       turns a used state of one factor into what a fresh base optimizer would start from

This file does not know clocks or models; the strategies are in prune.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import prune
from .factors import draw_generator, factor_dtype, matrix_shape
from .groups import Selected
from .inner import Base, Group, State, step, used_state
from .state import OPTIONS

_TRIALS = 8  # steps: some bases begin to adapt after a few


def check_prunable(weights: Iterable[Selected], base: Base, options: Sequence[Group], strategy: prune.Strategy) -> None:
    """Refuse a strategy that could not prune what the base will keep of the factors, by trying the base.

    That is where a mask would meet codes, and where the base holds what a restart of the factors must not throw back.

    Args:
        options: the base's options, by number of group.

    Raises:
        ValueError: names the base, the state and the remedy.
    """
    weights = list(weights)
    for number in {weight.number for weight in weights} if not isinstance(strategy, prune.Keep) else ():
        shared: set[str] = set()
        with suppress(Exception):  # a base that cannot be tried says so by itself
            shared = Counters(base, options[number], torch.zeros(2, 2)).shared
        if shared:
            raise ValueError(
                f"prune={strategy}: {base.name} keeps {', '.join(sorted(shared))} of all that it trains "
                "together, which the restarts of some would throw back: give prune.keep()"
            )
    seen: set[tuple[int, torch.Size]] = set()
    for W, slot, group, number in weights if prune.masks(strategy) else ():
        *stacked, m, n = matrix_shape(W, is_batch=slot.is_batch)
        for shape in ((*stacked, group["rank"], n), (*stacked, m, group["rank"])):
            factor = torch.empty(shape, dtype=factor_dtype(W.dtype), device="cpu" if W.is_meta else W.device)
            if (number, factor.shape) not in seen:
                seen.add((number, factor.shape))
                prune.check_maskable(used_state(base, options[number], factor), factor.shape, strategy, base.name)


def prune_states_(
    weights: Iterable[Selected],
    state: Any,
    base: Base,
    options: Sequence[Group],
    strategy: prune.Strategy,
    *,
    seed: int,
    restart: int,
) -> dict[Tensor, prune.Pruned]:
    """Prune the base's state of every factor, in place; what is drawn is keyed by (seed, name, restart).

    Returns how much was forgotten of every weight's.
    """
    pruned: dict[Tensor, prune.Pruned] = {}
    fresh: dict[tuple[int, torch.Size], FreshState] = {}
    counters: dict[int, Counters] = {}
    for W, slot, group, number in weights:
        entry, counts = state[W], []
        if number not in counters and not isinstance(strategy, prune.Keep):
            counters[number] = Counters(base, options[number], entry["A"])
            if isinstance(strategy, prune.Reset):
                counters[number].reset_(group)
        for key in ("A", "B"):
            factor, kind = entry[key], (number, entry[key].shape)
            if kind not in fresh and not isinstance(strategy, prune.Keep):
                fresh[kind] = FreshState(base, group, factor, counters[number])
            generator = draw_generator(seed, f"{slot.name}.{key}_state", restart)
            own, reset_ = entry[f"{key}_state"], fresh[kind].reset_ if kind in fresh else dict.clear
            counts.append(prune.prune_(own, factor.shape, strategy, reset_=reset_, generator=generator))
        pruned[W] = prune.Pruned(*map(sum, zip(*counts, strict=True)))
    return pruned


def reset_counters_(
    weights: Iterable[Selected], base: Base, options: Sequence[Group], trained: Mapping[Tensor, Tensor]
) -> None:
    """Start anew what the base counts in the groups of low-rank weights: what is trained of them has just come.

    That is a factor of each, or the weight.
    """
    groups = {weight.number: weight for weight in weights}
    for number, (W, _, group, _) in groups.items():
        Counters(base, options[number], trained[W]).reset_(group)


class Counters:
    """The numbers that a base's steps change in its group (step counts of Adan and of apex's optimizers).

    `shared` are those that are not the group's own, and stay: what follows the gradients of other groups (the distance
    of Prodigy and D-Adaptation), and what the state holds under no parameter's key (MADGRAD's count).
    """

    def __init__(self, base: Base, options: Group, factor: Tensor) -> None:
        """Try `base` with the options that it was made with over small tensors like the factor."""
        generator, shape = torch.Generator().manual_seed(0), (_TRIALS, *(2 for _ in factor.shape))
        random = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        random = random.to(factor.device, factor.dtype)
        optimizer, self._fresh = _tried(base, options, torch.ones_like(random))
        other, _ = _tried(base, options, random)
        after, idle, other_idle = map(numbers, (*optimizer.param_groups, other.param_groups[1]))
        followed = changed(idle, other_idle)
        self.shared = followed | {str(key) for key in optimizer.state if not isinstance(key, Tensor)}
        self._names = changed(self._fresh, after) - followed - {*OPTIONS}

    def reset_(self, group: Group) -> None:
        """Give a group the numbers of a fresh base's, in place."""
        for key in self._names & group.keys():
            if key in self._fresh:
                group[key] = numbers(self._fresh)[key]
            else:
                del group[key]


class FreshState:
    """What a fresh base optimizer's state of one factor is, found by trying it.

    A state whose initial value is zero (Adam's, `step` included) is zeroed in place, so that its tensors survive. A
    state that a base makes when it is constructed (Adagrad's) is copied from there. Any other (Rprop's step sizes,
    NAdam's product, SGD's first momentum under dampening) is cleared, and the base makes it anew at its next update.
    So is one that remembers values of the factor itself (a Lookahead's), to which it may return after many updates.
    """

    def __init__(self, base: Base, group: Group, factor: Tensor, counters: Counters) -> None:
        """Try `base` with a group's options over scratch tensors of the factor's shape; the factor is left alone."""
        group, self._counters = dict(group), counters
        counters.reset_(group)
        self._build: Callable[[Tensor], Optimizer] = lambda scratch: base.build(
            [{**group, "params": [scratch], "lr": 0.01}]
        )
        scratch = torch.zeros_like(factor)
        self._initial: State = dict(self._build(scratch).state.get(scratch, {}))
        try:
            self._zero_is_fresh = not self._initial and self._behaves_as_fresh(factor)
        except Exception:  # whatever it raises over such a state: SOAP divides by a number in it
            self._zero_is_fresh = False

    def reset_(self, state: State) -> None:
        """Make a used state a fresh one, in place."""
        if self._zero_is_fresh:
            _zero_(state)
        elif self._initial and self._initial.keys() == state.keys():
            for key, value in self._initial.items():
                state[key] = state[key].copy_(value) if isinstance(value, Tensor) else value
        else:
            state.clear()

    def _behaves_as_fresh(self, factor: Tensor) -> bool:
        """Say whether a used state set to zero gives the same two updates as no state at all."""
        generator = torch.Generator(factor.device).manual_seed(0)  # there: it is as many numbers as the factor has
        drawn = (torch.randn(factor.shape, generator=generator, device=factor.device) for _ in range(4))
        start, *gradients = (numbers.to(factor.dtype) for numbers in drawn)
        used, fresh = start.clone(), start.clone()
        used_base, fresh_base = self._build(used), self._build(fresh)
        used.grad = gradients[0]
        step(used_base)
        state = used_base.state[used].values()
        if any(prune.is_low_bit(value) for value in state):
            return False  # its codes may have none for 0
        if any(_is_equal(value, remembered) for value in state for remembered in (start, used)):
            return False
        self._counters.reset_(used_base.param_groups[0])
        used.copy_(start)
        _zero_(used_base.state[used])
        for gradient in gradients[1:]:
            used.grad, fresh.grad = gradient.clone(), gradient.clone()
            step(used_base)
            step(fresh_base)
        return torch.equal(used, fresh)


def numbers(group: Group) -> dict[str, Any]:
    """Return the numbers in a group, but its rate: copies of those in tensors."""
    found = {key: value for key, value in group.items() if isinstance(value, (int, float, Tensor)) and key != "lr"}
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in found.items()}


def _tried(base: Base, options: Group, gradients: Tensor) -> tuple[Optimizer, dict[str, Any]]:
    """Return a base that has made a step with each of these gradients in its first group, and zeros in its second.

    And the numbers of the first group before them.
    """
    scratch, idle = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
    optimizer = base.build([{**options, "params": [p], "lr": 1.0} for p in (scratch, idle)])
    fresh = numbers(optimizer.param_groups[0])
    for gradient in gradients:
        scratch.grad, idle.grad = gradient.clone(), torch.zeros_like(gradient)
        step(optimizer)
    return optimizer, fresh


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Return the keys whose values are others than before, or new."""
    return {key for key in after if key not in before or not _is_equal(after[key], before[key])}


def _is_equal(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.shape == other.shape and torch.equal(value.to(other), other)
    return type(value) is type(other) and bool(value == other)


def _zero_(state: State) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor):
            value.zero_()
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            state[key] = type(value)(0)
