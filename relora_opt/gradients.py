"""Gradients on their way into an update: averaged over processes, projected, found to be finite or not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .release import ProjectedGradient, numbers_of
from .sharding import full, laid_out_as, mesh_of
from .state import LowRankState, copies
from .weight import project


def check_factors(weights: Iterable[LowRankState]) -> None:
    """Refuse a dense gradient of a weight both of whose factors were frozen: it would move nothing, without a word."""
    for W, (A, B) in ((weight.W, (weight.A, weight.B)) for weight in weights):
        if W.grad is not None and not (A.requires_grad or B.requires_grad):
            raise RuntimeError(
                f"a gradient for a weight of shape {tuple(W.shape)}, both of whose factors were frozen: freeze the "
                "model's own weight, or unfreeze a factor (optimizer.factors(weight))"
            )


@contextmanager
def projected(weights: Iterable[LowRankState]) -> Iterator[None]:
    """Add the projection of every dense gradient W.grad to the factors' gradients, and leave these used up.

    A trainer may zero the gradients of the model alone (transformers' does), which does not reach the factors: no
    gradient of theirs, from either path, outlasts the step that it was for. Dense ones do, as everywhere in torch.
    A factor that was frozen gets none.
    """
    weights = list(weights)
    for weight in weights:
        for factor, projection in zip((weight.A, weight.B), _projections(weight), strict=False):
            if factor.requires_grad:
                gradient = laid_out_as(projection, factor)
                factor.grad = gradient if factor.grad is None else factor.grad + gradient
    try:
        yield
    finally:
        for weight in weights:
            weight.A.grad = weight.B.grad = None


def _projections(weight: LowRankState) -> tuple[Tensor, ...]:
    """Return what W.grad, where there is one, gives to the gradients of A and B."""
    gradient = weight.W.grad
    if isinstance(gradient, ProjectedGradient):
        return gradient.use(weight.A, weight.B)
    return () if gradient is None else project(gradient, weight.A, weight.B, weight.scale)


def are_finite(parameters: Iterable[Tensor]) -> bool:
    """Say whether the norm of all gradients together is finite; this waits for the device."""
    by_mesh: dict[object, list[Tensor]] = defaultdict(list)
    for gradient in (part for p in parameters for part in numbers_of(p.grad)):
        by_mesh[mesh_of(gradient)].append(gradient)
    return bool(_total_norm(by_mesh.values()).isfinite())


def clip_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Clip the norm of all gradients together, in place, and return what it was, as `nn.utils.clip_grad_norm_` does.

    Sharded gradients count whole, and may lie on several meshes, or beside others that are not sharded. Of sparse ones
    their values count.
    """
    by_mesh: dict[object, list[Tensor]] = defaultdict(list)
    sparse: list[Tensor] = []
    for p in parameters:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()
            sparse.append(p.grad.values())
        elif p.grad is not None:
            by_mesh[mesh_of(p)].append(p)
    dense = [[p.grad for p in part if p.grad is not None] for part in by_mesh.values()]
    norm = _total_norm([*dense, sparse] if sparse else dense)
    for part in by_mesh.values():
        nn.utils.clip_grads_with_norm_(part, max_norm, norm)
    for values in sparse:
        values.mul_((max_norm / (norm + _CLIP_EPS)).clamp(max=1.0).to(values.device))
    return norm


def _total_norm(parts: Iterable[list[Tensor]]) -> Tensor:
    """Return the norm of gradients together, in lists that one operation can take."""
    norms = [full(nn.utils.get_total_norm(part)) for part in parts]
    return norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms)


def keep_(parameters: Iterable[Tensor]) -> None:
    """Copy the gradients that these have: they lie where the next replay of a CUDA graph writes."""
    given = [(p, p.grad) for p in parameters if p.grad is not None]
    for (p, _), copy in zip(given, copies([gradient for _, gradient in given]), strict=True):
        p.grad = copy


def average_(parameters: Iterable[Tensor], process_group: dist.ProcessGroup) -> None:
    """Replace every gradient by its mean over the processes, which hold the same parameters in the same order.

    A parameter whose gradient is missing on some processes counts as zero there; where all lack it, it stays missing.
    Gradients travel in buckets of one dtype, each with a flag for every parameter in it; they are divided before they
    are summed, so that 16 bits hold the sum. Frozen parameters stay at home.
    """
    world_size = dist.get_world_size(process_group)
    for bucket in _buckets(p for p in parameters if p.requires_grad):
        flags = torch.tensor([float(p.grad is not None) for p in bucket])
        for p in bucket:
            if p.grad is not None and p.grad.is_sparse:
                p.grad = p.grad.to_dense()
        pieces = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in bucket]
        flat = torch.cat([*pieces, flags.to(bucket[0], non_blocking=True)]).div_(world_size)
        dist.all_reduce(flat, group=process_group)
        flat, flags_sum = flat[: -len(bucket)], flat[-len(bucket) :]
        for place, (p, mean) in enumerate(zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True)):
            if p.grad is not None:
                p.grad.copy_(mean.view_as(p))
            elif bool(flags_sum[place]):  # only here does a process wait for its device
                p.grad = mean.view_as(p).clone()


def _buckets(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the parameters in lists of one dtype and device, of about _BUCKET_SIZE elements each."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in parameters:
        bucket = by_kind.setdefault((p.dtype, p.device), [])
        bucket.append(p)
        if sum(other.numel() for other in bucket) >= _BUCKET_SIZE:
            yield by_kind.pop((p.dtype, p.device))
    yield from by_kind.values()


_BUCKET_SIZE = 2**24
_CLIP_EPS = 1e-6  # torch's, in clip_grads_with_norm_
