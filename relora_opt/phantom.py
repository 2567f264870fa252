"""The phantom step: torch.distributed.checkpoint makes the state that it loads into by a step that changes nothing.

On an optimizer without state it sets every rate to 0 and every gradient to zero, calls step() once, and puts the rates
back. Such a step counts no update, restarts nothing and draws from no generator of torch's. The base optimizer makes
state in it, step counts for instance, that no update has made and that loading does not always overwrite: `forget_`
takes it from weights that have made no update in their phase, and `forget_all_` from everything where the first update
is made on what was only to be a template.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .groups import Selected
from .release import numbers_of
from .sharding import full
from .state import is_low_rank


def is_phantom(groups: list[dict[str, Any]], state: Any, factors: Iterable[Tensor]) -> bool:
    """Say whether a step is the phantom one: no state yet, every rate 0, gradients, and every one of them zero.

    Those of the factors, which the phantom step does not know of, must be zero too where there are any.
    """
    if state or any(float(group["lr"]) != 0.0 for group in groups):
        return False
    found = [part for group in groups for p in group["params"] for part in numbers_of(p.grad)]
    others = [factor.grad for factor in factors if factor.grad is not None]
    return bool(found) and not any(bool(full(gradient.any())) for gradient in (*found, *others))


def forget_(state: Any, weights: Iterable[Selected]) -> None:
    """Take from the state what the phantom step has made up for these weights or their factors; factors stay."""
    _forget_(state, [weight.W for weight in weights if weight.W in state])


def forget_all_(state: Any) -> None:
    """Take from the state all that the phantom step has made up; factors stay."""
    _forget_(state, list(state))


def _forget_(state: Any, parameters: Iterable[Tensor]) -> None:
    for p in parameters:
        if is_low_rank(state[p]):
            state[p].update(A_state={}, B_state={})
        else:
            del state[p]
