"""Dense gradients freed early: each becomes its factors' gradients as soon as the backward pass has made it.

    loss.backward()    for one weight after the other:  A.grad += s B^T G,  B.grad += s G A^T,  W.grad <- None

so that at most one dense gradient of a low-rank weight lives at a time. Micro-batches add up in the factors' gradients,
where clipping finds them too.

A hook sees the gradient of its own process. Where processes train together (DistributedDataParallel) gradients are
reduced later, and the processes would drift apart: that is refused. This file does not know clocks or base optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakMethod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .select import Selected
from .sharding import is_sharded

_HANDLES: Any = WeakTensorKeyDictionary()  # of every weight's hook: it has one, whoever asked for it


def attach(weights: Iterable[Selected], release: Callable[[int, int], None], *, takes_over: bool) -> None:
    """Have `release(number of group, place in it)` called whenever a backward pass has made a weight's gradient.

    Args:
        release: a bound method, held weakly: it turns the gradient into the factors' and drops it.
        takes_over: whether a weight is taken from an optimizer that still lives, in a notebook say. If not, only
            weights without a hook get one: parameters that a trainer has put in the place of others.

    Raises:
        ValueError: for a sharded weight, or one of several processes.
    """
    places: dict[int, int] = {}
    for weight in weights:
        place = places[weight.number] = places.get(weight.number, -1) + 1
        if weight.W.requires_grad and (takes_over or weight.W not in _HANDLES):
            _check(weight.W, weight.slot.name)
            if weight.W in _HANDLES:
                _HANDLES[weight.W].remove()
            hook = _hook(WeakMethod(release), weight.number, place, weight.slot.name)
            register: Callable[..., Any] = weight.W.register_post_accumulate_grad_hook
            _HANDLES[weight.W] = register(hook)


def _hook(
    method: WeakMethod[Callable[[int, int], None]], number: int, place: int, name: str
) -> Callable[[Tensor], None]:
    def release(W: Tensor) -> None:
        bound = method()
        if bound is not None and W.grad is not None:
            _check(W, name)
            with torch.no_grad():
                bound(number, place)

    return release


def _check(W: Tensor, name: str) -> None:
    if is_sharded(W):
        raise ValueError(
            f"release_grads=True, but {name} is a DTensor: FSDP2 shards its gradient already; leave release_grads out"
        )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"release_grads=True in one of {dist.get_world_size()} processes: gradients would be released before "
            "DistributedDataParallel reduces them, and the processes would drift apart; use "
            "make_step(..., process_group=...), which forms no dense gradient, or leave release_grads out"
        )
