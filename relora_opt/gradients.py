"""Gradients on their way into an update: dense ones projected, scaled ones unscaled, bad ones found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .state import LowRankState
from .weight import project


@contextmanager
def projected(weights: Iterable[LowRankState]) -> Iterator[None]:
    """Add the projection of every dense gradient W.grad to the factors' gradients, for as long as this is open.

    What the functional path has put into the factors' gradients stays in them afterwards; the projections do not, so
    that a gradient which accumulates over several calls counts once in each.
    """
    before: list[tuple[Tensor, Tensor | None]] = []
    for W, entry, scale in weights:
        if W.grad is None:
            continue
        A, B = entry["A"], entry["B"]
        before += [(A, A.grad), (B, B.grad)]
        for factor, gradient in zip((A, B), project(W.grad, A, B, scale), strict=True):
            factor.grad = gradient if factor.grad is None else factor.grad + gradient
    try:
        yield
    finally:
        for factor, own in before:
            factor.grad = own


def unscale_(parameters: Iterable[Tensor], grad_scale: Tensor | None) -> None:
    """Divide the gradients by a GradScaler's scale, in place; None means that they are unscaled already."""
    for p in parameters if grad_scale is not None else ():
        if p.grad is not None:
            p.grad.div_(grad_scale.to(p.grad.device))  # type: ignore[union-attr]


def are_finite(parameters: Iterable[Tensor]) -> bool:
    """Say whether the norm of all gradients together is finite; this waits for the device."""
    return bool(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).isfinite())
