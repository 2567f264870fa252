"""Where A points: along the leading right singular directions of the gradient G (m, n) of its weight.

    dense path       G is there: A = V_r^T of its singular value decomposition, before the factors' first update
    functional path  G is never formed. A random orthonormal Omega (m, r) stands in B's place, so that the backward pass
                     delivers dA ~ Omega^T G and dB ~ G A^T: both halves of a randomized range finder with one power
                     iteration, A <- rows of dA, B <- columns of dB, over NUM_SKETCHES updates that do not move W

The forward pass sees W alone, so nothing depends on what A and B hold meanwhile. Afterwards A has orthonormal rows, in
the order of their singular values, and B = 0.

`group["pointing"]` counts the sketches that are still to come. This file does not know clocks or base optimizers.
Source of the range finder: Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithms 4.3 and 4.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .release import is_dense
from .sharding import from_first_rank, full
from .state import LowRankState

NUM_SKETCHES = 2

Groups = Iterable[
    tuple[dict[str, Any], Sequence[LowRankState]]
]  # whose A's are still to be pointed, with their weights


def point_groups_(groups: Groups) -> None:
    """Point the A's of the groups to which dense gradients, and no others, have come."""
    for group, weights in groups:
        if any(is_dense(w.W.grad) for w in weights) and not any(w.has_gradient for w in weights):
            point_(weights)
            group["pointing"] = 0


def sketch_groups_(groups: Groups) -> None:
    """Take the factors' gradients for sketches, in the groups that have any."""
    for group, weights in groups:
        if any(weight.has_gradient for weight in weights):
            group["pointing"] -= 1
            sketch_(weights, is_last=group["pointing"] == 0)


def point_(weights: Sequence[LowRankState]) -> None:
    """Point every A at the leading right singular directions of W.grad; B becomes 0.

    Without W.grad, A stays; so does what was frozen.
    """
    for weight in weights:
        A, B, G = weight.A, weight.B, weight.W.grad
        if G is not None and A.requires_grad:
            G = full(G.to_dense() if G.is_sparse else G)
            _set_rows_(A, G.reshape(*B.shape[:-1], A.shape[-1]), A.shape[-2])
        if B.requires_grad:
            B.zero_()


def sketch_(weights: Sequence[LowRankState], *, is_last: bool) -> None:
    """Take the factors' gradients for sketches of the weights' gradients, and forget them.

    A becomes the right singular vectors of dA, B the left ones of dB, or 0 after the last sketch.
    """
    for weight in weights:
        A, B = weight.A, weight.B
        if A.grad is not None:
            _set_rows_(A, A.grad, A.shape[-2])
        if is_last and B.requires_grad:
            B.zero_()
        elif B.grad is not None:
            _set_rows_(B.mT, B.grad.mT, B.shape[-1])
        A.grad = B.grad = None


def _set_rows_(rows: Tensor, M: Tensor, count: int) -> None:
    """Set `rows` (count, n) to the leading right singular vectors of M (any, n), or batches; one by one.

    Where M is zero or not finite it says nothing, and the rows stay what they are.
    """
    speaks = M.isfinite().flatten(-2).all(-1) & (M != 0).flatten(-2).any(-1)
    speaks = speaks[..., None, None]
    if not speaks.any():
        return
    with torch.autocast(M.device.type, enabled=False):
        V = torch.linalg.svd(M.to(rows.dtype).where(speaks, 0.0), full_matrices=False).Vh[..., :count, :]
    # A singular vector's sign is arbitrary, and differs between libraries: its largest element is positive here.
    largest = V.gather(-1, V.abs().argmax(-1, keepdim=True))
    rows.copy_(from_first_rank(torch.where(speaks, V * largest.sign(), full(rows)), rows))
