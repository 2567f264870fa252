"""Dense gradients freed early: each is kept as its factors' gradients as soon as the backward pass has made it.

    loss.backward()    for one weight after the other:  G = dL/dW  ->  (s B^T G, s G A^T)

so that one dense gradient of a low-rank weight lives at a time (of a weight that is used several times, from its first
use in the backward pass to its last). `W.grad` stays the one place of a gradient: a `ProjectedGradient` of W's shape
takes part in accumulation, in scaling, in clipping by norm (that of the factors' gradients) and in being zeroed or
dropped, and refuses everything that wants its numbers, so that no penalty or other optimizer takes it for nothing.

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

from .groups import Selected
from .sharding import is_sharded
from .state import LowRankState
from .weight import project

Find = Callable[[int, int], LowRankState | None]

aten = torch.ops.aten


class ProjectedGradient(Tensor):
    """The gradient G of a low-rank weight, without its numbers: of its shape, kept as (s B^T G, s G A^T)."""

    parts: tuple[Tensor, Tensor] | None  # None once a step has used them
    factors: tuple[Tensor, Tensor]
    scale: float

    @staticmethod
    def __new__(
        cls, like: Tensor, parts: tuple[Tensor, Tensor] | None, factors: tuple[Tensor, Tensor], scale: float
    ) -> ProjectedGradient:
        """Return the gradient of a weight of `like`'s shape."""
        make: Any = torch.Tensor._make_wrapper_subclass
        gradient: ProjectedGradient = make(cls, like.shape, dtype=like.dtype, device=like.device)
        gradient.parts, gradient.factors, gradient.scale = parts, factors, scale
        return gradient

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        gradient, *rest = args
        if isinstance(gradient, cls):
            if func is aten.detach.default:
                return cls(gradient, gradient.parts, gradient.factors, gradient.scale)
            if func in (aten.add_.Tensor, aten.add.Tensor) and not kwargs and not isinstance(rest[0], cls):
                return gradient._plus(rest[0], in_place=func is aten.add_.Tensor)
            if func is aten.zero_.default:
                return gradient._zero()
            if func in _LINEAR and not any(isinstance(value, Tensor) and value.dim() for value in rest):
                for part in gradient._unused():
                    func(part, *rest)
                return gradient
            if func is aten.linalg_vector_norm.default and not kwargs and rest[1:2] in ([], [None]):
                norms = [func(part, *rest) for part in gradient._unused()]
                return func(torch.stack(norms), *rest)
        if func is aten._foreach_zero_.default:
            for one in gradient:
                one.zero_()
            return None
        if func in _LINEAR_LISTS:
            for one in gradient:  # each by itself: they need not be of one dtype
                for tensor in one._unused() if isinstance(one, cls) else (one,):
                    func([tensor], *rest)
            return None
        raise RuntimeError(
            f"{func} on the gradient of a low-rank weight, which has no numbers: it was projected onto its factors and "
            "freed (release_grads=True); let no other optimizer train this weight, or construct with "
            "release_grads=False"
        )

    def use(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of these factors, and hold them no longer."""
        if self.factors[0] is not A or self.factors[1] is not B:
            raise RuntimeError(
                "a gradient was projected onto the factors of another optimizer, or onto factors that were replaced, "
                "with release_grads=True: call zero_grad() before the next backward()"
            )
        parts, self.parts = self._unused(), None
        return parts

    def _zero(self) -> ProjectedGradient:
        A, B = self.factors
        self.parts = (torch.zeros_like(A), torch.zeros_like(B))
        return self

    def _plus(self, dense: Tensor, *, in_place: bool) -> ProjectedGradient:
        with torch.no_grad():
            sums = [
                part + new for part, new in zip(self._unused(), project(dense, *self.factors, self.scale), strict=True)
            ]
        if in_place:
            self.parts = (sums[0], sums[1])
            return self
        return ProjectedGradient(self, (sums[0], sums[1]), self.factors, self.scale)

    def _unused(self) -> tuple[Tensor, Tensor]:
        if self.parts is None:
            raise RuntimeError(
                "a gradient that a step has used, with release_grads=True: call zero_grad() between step() and the "
                "next backward()"
            )
        return self.parts

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ProjectedGradient({tuple(self.shape)}, {'used' if self.parts is None else 'kept as those of factors'})"


_LINEAR = (aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar)
_LINEAR_LISTS = (
    aten._foreach_mul_.Scalar,
    aten._foreach_mul_.Tensor,
    aten._foreach_div_.Scalar,
    aten._foreach_div_.Tensor,
    aten._amp_foreach_non_finite_check_and_unscale_.default,
)


def numbers_of(gradient: Tensor | None) -> tuple[Tensor, ...]:
    """Return what there is of a gradient: itself, or its projections; nothing where there is none."""
    if isinstance(gradient, ProjectedGradient):
        return gradient.parts or ()
    if gradient is not None and gradient.is_sparse:
        return (gradient.coalesce().values(),)
    return () if gradient is None else (gradient,)


def is_dense(gradient: Tensor | None) -> bool:
    """Say whether a weight has a gradient that was not projected."""
    return gradient is not None and not isinstance(gradient, ProjectedGradient)


_HANDLES: Any = WeakTensorKeyDictionary()  # of every weight's hook: it has one, whoever asked for it


def attach(weights: Iterable[Selected], find: Find, *, takes_over: bool) -> None:
    """Project the gradient of every weight whenever a backward pass has made it, and free it.

    Args:
        find: a bound method, held weakly: (number of group, place in it) -> the weight, or None in a warm start.
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
            detach(weight.W)
            hook = _hook(WeakMethod(find), weight.number, place, weight.slot.name)
            register: Callable[..., Any] = weight.W.register_post_accumulate_grad_hook
            _HANDLES[weight.W] = register(hook)


def detach(W: Tensor) -> None:
    """Let a weight's gradient be, if an optimizer had asked for it."""
    if W in _HANDLES:
        _HANDLES.pop(W).remove()


def has_foreign_hook(W: Tensor) -> bool:
    """Say whether somebody else waits for a weight's dense gradient."""
    hooks = W._post_accumulate_grad_hooks or {}
    own = _HANDLES[W].id if W in _HANDLES else None
    return bool(W._backward_hooks) or any(number != own for number in hooks)


def _hook(method: WeakMethod[Find], number: int, place: int, name: str) -> Callable[[Tensor], None]:
    def release(W: Tensor) -> None:
        find = method()
        if find is None or not is_dense(W.grad):  # what a ProjectedGradient was added to it has projected itself
            return
        _check(W, name)
        with torch.no_grad():
            weight = find(number, place)
            if weight is not None:
                assert W.grad is not None
                factors = (weight.A, weight.B)
                W.grad = ProjectedGradient(W, project(W.grad, *factors, weight.scale), factors, weight.scale)

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
