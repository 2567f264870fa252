"""What happens to a factor's optimizer state at a restart.

    reset()       the next updates equal a fresh base optimizer's, bitwise
    magnitude(p)  the largest 1 - p of every same-shaped state tensor stays, by |first moment|; the rest is zero
    random(p)     a random 1 - p stays
    keep()        everything stays

One mask per factor serves all its same-shaped state tensors: independent masks leave m != 0 where v = 0, and Adam then
jumps by lr * m / eps. State tensors are found by shape, never by name, so any base optimizer will do. The first moment
is the first of them in alphabetical order (Adam's exp_avg, SGD's momentum_buffer). A state without such tensors
(Adafactor's rows and columns) cannot be masked by element and is reset as a whole. What is forgotten becomes zero:
where another value is the natural one (Rprop's step sizes), choose reset or keep.

Low-bit states are masked by value, where their tensors say what it is (torchao's do). Bare codes (bitsandbytes') are
refused: code 0 is not the value 0, but near the block's negative maximum.

Source: Lialin et al. 2023, arXiv 2307.05695, section 3 (optimizer resets).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sharding import full, laid_out_as

State = dict[str, Any]


class Pruned(NamedTuple):
    """How many elements of a state were forgotten, of how many."""

    num_forgotten: int
    num_elements: int


@dataclass(frozen=True)
class Reset:
    """Forget everything."""


@dataclass(frozen=True)
class Keep:
    """Forget nothing."""


@dataclass(frozen=True)
class Magnitude:
    """Zero the share `ratio` with the smallest |first moment|."""

    ratio: float

    def __post_init__(self) -> None:
        _check_ratio("prune.magnitude", self.ratio)


@dataclass(frozen=True)
class Random:
    """Zero a random share `ratio`, drawn from (seed, parameter name, restart)."""

    ratio: float

    def __post_init__(self) -> None:
        _check_ratio("prune.random", self.ratio)


Strategy = Reset | Keep | Magnitude | Random
STRATEGIES = (Reset, Keep, Magnitude, Random)


def reset() -> Strategy:
    """Forget the factors' state: their next updates equal a fresh base optimizer's, bitwise."""
    return Reset()


def keep() -> Strategy:
    """Keep the factors' state as it is."""
    return Keep()


def magnitude(ratio: float) -> Strategy:
    """Zero exactly the share `ratio` of the state with the smallest |first moment| (the paper prunes 0.9 and more)."""
    return Magnitude(ratio)


def random(ratio: float) -> Strategy:
    """Zero exactly a random share `ratio` of the state (the reference code: 0.999)."""
    return Random(ratio)


def prune_(
    state: State, shape: torch.Size, strategy: Strategy, *, reset_: Callable[[State], None], generator: torch.Generator
) -> Pruned:
    """Prune one factor's state in place; its tensors stay the same objects.

    Returns how much of its same-shaped tensors was forgotten; of all its tensors where none has the factor's shape.

    Args:
        state: the base optimizer's state of the factor.
        shape: the factor's shape.
        reset_: what makes this state a fresh base optimizer's, in place.
        generator: what `random` draws from.
    """
    moments = list(_moments(state, shape).values())
    num_elements = sum(t.numel() for t in (moments or state.values()) if isinstance(t, Tensor))
    if isinstance(strategy, Keep) or not state:
        return Pruned(0, num_elements)
    if isinstance(strategy, Reset) or not moments:
        reset_(state)
        return Pruned(num_elements, num_elements)
    if isinstance(strategy, Magnitude):
        scores = full(_value(moments[0]).detach().abs())
    else:
        drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")  # whatever the defaults are
        scores = drawn.to(moments[0].device)
    num_forgotten = round(strategy.ratio * shape.numel())
    kept = _largest(scores, shape.numel() - num_forgotten)
    for moment in moments:
        value = _value(moment)
        moment.copy_(value * laid_out_as(kept.to(value.dtype), moment))
    return Pruned(num_forgotten * len(moments), num_elements)


def check_maskable(state: State, shape: torch.Size, strategy: Strategy, base: str) -> None:
    """Refuse a strategy that masks for a state whose values are not to be had.

    Args:
        state: what the base optimizer, which is called `base`, keeps of a factor of this shape.

    Raises:
        ValueError: names the base and the tensor.
    """
    for key, moment in _moments(state, shape).items():
        if not moment.is_floating_point():
            raise ValueError(
                f"prune={strategy}: {base} keeps {key} in {moment.dtype} codes, of which 0 is not the value 0: use "
                "prune.reset() or prune.keep(), or a base with 32-bit states"
            )


def masks(strategy: Strategy) -> bool:
    """Say whether a strategy forgets some elements of a state and keeps others."""
    return isinstance(strategy, (Magnitude, Random))


def is_low_bit(tensor: object) -> bool:
    """Say whether a tensor holds codes and knows their values (torchao's states are of such classes)."""
    return isinstance(tensor, Tensor) and type(tensor).dequantize is not Tensor.dequantize


def _moments(state: State, shape: torch.Size) -> dict[str, Tensor]:
    """Return the tensors of a state that have their factor's shape, in alphabetical order."""
    tensors = {key: state[key] for key in sorted(state) if isinstance(state[key], Tensor)}
    return {key: tensor for key, tensor in tensors.items() if tensor.shape == shape}


def _value(moment: Tensor) -> Tensor:
    return moment.dequantize() if is_low_bit(moment) else moment


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return a boolean mask of the `count` largest scores; of equal ones the first. Any number of elements."""
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:count]] = True
    return mask.view(scores.shape)


def _check_ratio(name: str, ratio: Any) -> None:
    is_number = isinstance(ratio, Real) and not isinstance(ratio, bool)
    if not (is_number and 0.0 <= ratio <= 1.0):
        raise ValueError(f"{name}({ratio!r}): the share of the state to forget must be a number between 0 and 1")
