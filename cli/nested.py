"""Nested values as JSON and a flat set of tensors, and back exactly: what an optimizer's state is made of.

    {"lr": 0.1, "betas": (0.9, inf), "state": {0: {"step": tensor}}}

    {"lr": 0.1, "betas": {"$tuple": [0.9, {"$float": "inf"}]},
     "state": {"$dict": [[0, {"step": {"$tensor": "0.state.0.step"}}]]}}       and {"0.state.0.step": tensor}

None, booleans, whole numbers, floats, strings, lists, tuples, dictionaries and tensors; nothing else, so that reading
one runs no code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def pack(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return a value as JSON has it, and its tensors by name.

    Raises:
        TypeError: for anything that could not be read back, with its place.
    """
    tensors: dict[str, Tensor] = {}
    return _pack(value, "", tensors), tensors


def unpack(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value that `pack` was given.

    Raises:
        ValueError: for what `pack` does not write.
    """
    if isinstance(plain, list):
        return [unpack(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if not any(key.startswith("$") for key in plain):
        return {key: unpack(item, tensors) for key, item in plain.items()}
    (tag, content), *others = plain.items()
    if others or tag not in _TAGS:
        raise ValueError(f"{', '.join(plain)} is no kind of value: one of {', '.join(_TAGS)} stands alone")
    try:
        return _TAGS[tag](content, tensors)
    except (TypeError, KeyError) as error:  # an unhashable key, a number for a list, a tensor that is not there
        raise ValueError(f"{tag} of {str(content)[:60]!r} makes no sense: {error}") from error


def _pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"{len(tensors)}{place}"  # the number keeps apart what keys may spell alike, 1 and "1"
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _pack(item, f"{place}.{key}", tensors) for key, item in value.items()}
        pairs = value.items()
        return {"$dict": [[_pack(key, place, tensors), _pack(item, f"{place}.{key}", tensors)] for key, item in pairs]}
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{place}.{number}", tensors) for number, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, float) and not math.isfinite(value):  # JSON has no such numbers
        return {"$float": repr(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{place.lstrip('.') or 'the value'} is a {type(value).__name__}, which a checkpoint cannot hold")


def _float(content: Any, _: Mapping[str, Tensor]) -> float:
    if content not in ("nan", "inf", "-inf"):
        raise KeyError(content)
    return float(content)


def _dict(content: Any, tensors: Mapping[str, Tensor]) -> dict[Any, Any]:
    pairs = [unpack(pair, tensors) for pair in content]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise TypeError("not pairs of a key and a value")
    return dict(pairs)


_TAGS = {
    "$tensor": lambda name, tensors: tensors[name],
    "$float": _float,
    "$tuple": lambda items, tensors: tuple([unpack(item, tensors) for item in items]),
    "$dict": _dict,
}
