"""Sharded weights: how factors lie on a device mesh, given how their weight does (FSDP2's fully_shard).

    W (m, n) sharded by rows       B (m, r) by rows,       A (r, n) on every rank
    W sharded by columns           A by columns,           B on every rank
    a batch of matrices sharded    both by matrices

Factors of a DTensor are DTensors on its mesh, so that base optimizers, clipping and torch.distributed.checkpoint treat
them as they treat any weight. The gradient of a factor that lies on every rank is a sum over the ranks: `laid_out_as`
reduces it. A tensor that is no DTensor passes through everything here as it is.

A DTensor is known by its mesh: torch.distributed.tensor takes half a second to import, and some builds lack it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def mesh_of(tensor: Tensor) -> Any:
    """Return the mesh that a DTensor lies on; None for any other tensor."""
    return getattr(tensor, "device_mesh", None)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Say whether a tensor is a DTensor."""
    return mesh_of(tensor) is not None


def full(tensor: Tensor) -> Tensor:
    """Return a tensor whole, gathered on every rank: all ranks must call."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def laid_out_as(tensor: Tensor, other: Tensor) -> Tensor:
    """Lay a tensor out as another of its shape: a DTensor is redistributed, a whole one (the same on all ranks) cut."""
    if not is_sharded(other):
        return tensor
    if is_sharded(tensor):
        return tensor.redistribute(placements=other.placements)
    return _cut(tensor, other, other.placements)


def from_first_rank(tensor: Tensor, other: Tensor) -> Tensor:
    """Lay a whole tensor out as another, with the values that the mesh's first rank has: all ranks must call."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import Replicate

    everywhere = [Replicate()] * mesh_of(other).ndim
    return laid_out_as(_cut(tensor, other, everywhere, source=0), other)


def lay_out_factors(A: Tensor, B: Tensor, W: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Lay the whole factors A (r, n) and B (m, r), or batches of them, out by the layout of their weight.

    Raises:
        ValueError: for a layout that the factors cannot follow.
    """
    if not is_sharded(W):
        return A, B
    from torch.distributed.tensor import Replicate

    rows, columns = A.dim() - 2, A.dim() - 1
    placements: tuple[Any, ...] = W.placements
    if any(p.is_partial() or ((_dim(p) or 0) > 0 and W.dim() != A.dim()) for p in placements):
        raise ValueError(
            f"{name} of shape {tuple(W.shape)} is laid out as {placements}: a weight that is read as a matrix can be "
            "sharded along dimension 0 alone; shard it so, or leave it out of targets"
        )

    def without(dim: int) -> list[Any]:
        return [Replicate() if _dim(p) == dim else p for p in placements]

    return _cut(A, W, without(rows)), _cut(B, W, without(columns))


def _dim(placement: Any) -> int | None:
    """Return which dimension a placement shards, strided ones (tensor parallelism below FSDP2) too; None for no one."""
    return getattr(placement, "dim", None)


def _cut(tensor: Tensor, other: Tensor, placements: Any, *, source: int | None = None) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, mesh_of(other), placements, src_data_rank=source)
