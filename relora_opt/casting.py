"""In which dtypes a base keeps its state of a parameter: found by trying it, where a saved state has others.

A run may go on in another dtype. What follows the parameter's then follows it (moments), and what does not stays as it
is (NAdam's product, codes and their tables, float32 moments beside 16-bit weights); which is which, the base shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .inner import Base, used_state
from .sharding import is_sharded
from .state import Entry, is_low_rank

Group = dict[str, Any]


class StateDtypes:
    """The dtypes in which a base keeps its state, for parameters of every kind that is asked for.

    Args:
        groups: the base's options, group by group.
    """

    def __init__(self, base: Base, groups: list[Group]) -> None:
        self._base, self._groups = base, groups
        self._tried: dict[tuple[Any, ...], Any] = {}

    def cast_entry(self, entry: Entry, number: int, W: Tensor) -> Entry:
        """Return what is known of a parameter of group `number`, the base's state of it or of its factors cast."""
        if not is_low_rank(entry):
            cast: Entry = self._cast_state(entry, number, W)
            return cast
        states = {f"{key}_state": self._cast_state(entry[f"{key}_state"], number, entry[key]) for key in ("A", "B")}
        return {**entry, **states}

    def _cast_state(self, state: Any, number: int, parameter: Tensor) -> Any:
        if all(leaf.dtype == parameter.dtype for leaf in _leaves(state)):
            return state
        kind = number, parameter.dtype, parameter.dim(), parameter.device
        if kind not in self._tried:
            self._tried[kind] = self._try(*kind)
        return _cast(state, self._tried[kind])

    def _try(self, number: int, dtype: torch.dtype, dim: int, device: torch.device) -> Any:
        """Return the state of a small parameter after an update; none where the base cannot be tried."""
        try:
            return used_state(self._base, self._groups[number], torch.empty((2,) * dim, dtype=dtype, device=device))
        except Exception:  # whatever it raises: the state stays as it was saved
            return None


def _cast(value: Any, like: Any) -> Any:
    """Return a nested state whose tensors have the dtypes of another one's, wherever both are floating point."""
    if isinstance(value, dict):
        return {name: _cast(item, like.get(name) if isinstance(like, dict) else None) for name, item in value.items()}
    if isinstance(value, list):
        likes = like if isinstance(like, list) and len(like) == len(value) else [None] * len(value)
        return [_cast(item, other) for item, other in zip(value, likes, strict=True)]
    is_both = _is_plain(value) and _is_plain(like)
    return value.to(like.dtype) if is_both else value


def _leaves(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nested state whose dtypes may be others now."""
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if _is_plain(item):
            yield item
        yield from _leaves(item)


def _is_plain(value: Any) -> bool:
    """Say whether a value is a tensor of floating point, whole or sharded, and not made of others (low-bit ones)."""
    is_tensor = isinstance(value, Tensor) and (is_sharded(value) or not hasattr(value, "__tensor_flatten__"))
    return is_tensor and value.is_floating_point()
