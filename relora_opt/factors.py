"""The factors of one weight: their shapes, how A is drawn, and how a step of the factors moves the weight.

    W is read as a matrix (m, n) or a batch of them;   A is (r, n), B is (m, r);   W <- W + s (B' A' - B A).

Pure mathematics on tensors: no optimizer, no module, no clock.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .sharding import is_sharded

INITS = ("kaiming", "orthogonal", "gradient")
_PAIRS_TOGETHER = 4  # of factors, whose movements are made at one time: a GPU waits less, and little memory is taken


def matrix_shape(weight: Tensor, *, is_batch: bool = False) -> tuple[int, ...]:
    """Return the matrix shape that a weight is read in: (m, n), or (batch, m, n) for stacked matrices.

    A convolution (out, in, *kernel) is read as (out, in * kernel).
    """
    if is_batch:
        return tuple(weight.shape)
    return (weight.shape[0], math.prod(weight.shape[1:]))


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the factors: float32, or float64 where the weight is."""
    return torch.promote_types(dtype, torch.float32)


def draw_generator(seed: int, name: str, restart: int) -> torch.Generator:
    """Return a CPU generator keyed by (seed, parameter name, restart): the same on every rank, device and resume."""
    digest = hashlib.sha256(f"{seed}:{restart}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def draw_a(shape: tuple[int, ...], rank: int, *, init: str, generator: torch.Generator, like: Tensor) -> Tensor:
    """Draw A (r, n), or (batch, r, n), for a weight of this matrix shape, on `like`'s device.

    "kaiming" is the paper's: uniform on (-1/sqrt(n), 1/sqrt(n)), as `nn.init.kaiming_uniform_(A, a=sqrt(5))`.
    "orthogonal" has orthonormal rows, as `nn.init.orthogonal_`; "gradient" starts from there.
    """
    *batch, _, n = shape
    A = torch.empty(*batch, rank, n, dtype=factor_dtype(like.dtype), device="cpu")  # whatever the default is
    if init == "kaiming":
        A.uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n), generator=generator)
    else:
        A = _orthonormal_rows(A.normal_(generator=generator), like.device)
    return A.to(like.device)


def draw_b(shape: tuple[int, ...], rank: int, *, init: str, generator: torch.Generator, like: Tensor) -> Tensor:
    """Return B of shape (m, r), or (batch, m, r): 0, or orthonormal columns to sketch with for init "gradient"."""
    *batch, m, _ = shape
    dtype = factor_dtype(like.dtype)
    if init != "gradient":
        return torch.zeros(*batch, m, rank, dtype=dtype, device=like.device)
    B = torch.empty(*batch, m, rank, dtype=dtype, device="cpu").normal_(generator=generator)
    return _orthonormal_rows(B.mT, like.device).mT.contiguous().to(like.device)


def _orthonormal_rows(drawn: Tensor, device: torch.device) -> Tensor:
    """Return the orthonormal rows that Gram and Schmidt make of a drawn matrix's, by Cholesky's factor.

    In float64, so that what processors round differently is rounded away; twice, for what the first time leaves. On the
    device that they are for, where it is known to have float64: on one core it is most of a restart. The device is not
    waited for: of numbers drawn from a normal distribution, no fewer columns than rows, the rows are independent.
    """
    rows = drawn.to(device if device.type == "cuda" else "cpu").to(torch.float64)
    for _ in range(2):
        lower = torch.linalg.cholesky_ex(rows @ rows.mT).L
        rows = torch.linalg.solve_triangular(lower, rows, upper=False)
    return rows.to(drawn.dtype).contiguous()


def product(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return s B A, (m, n) or (batch, m, n)."""
    with torch.autocast(A.device.type, enabled=False):
        return (B @ A) * scale


def product_norm(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return the Frobenius norm of s B A as a scalar tensor: |B A|^2 = tr(B^T B A A^T), so nothing of W's size is made.

    Batches of matrices have one norm together.
    """
    with torch.autocast(A.device.type, enabled=False):
        squared = ((B.mT @ B) * (A @ A.mT)).sum()
    return squared.clamp(min=0.0).sqrt() * scale


class Movement(NamedTuple):
    """The factors, of rank 2r, of B' A' - B A = [B' - B, B] [A'; A' - A].

    The small differences come first: a product that rounds (float32 in TF32 or bfloat16, where torch is allowed to)
    then rounds the movement. Of [B', -B] [A'; A] it would round B' A' and B A, a thousand times as large.
    """

    left: Tensor
    right: Tensor


def movements(factors: list[Tensor], before: list[Tensor]) -> Iterator[Movement]:
    """Yield how far each pair of factors has moved, made when it is asked for, its differences with those of others.

    Args:
        factors: A', B' of the first pair, of the second, and so on. before: copies of them before the step.
    """
    starts = range(0, max(len(factors), len(before)), 2 * _PAIRS_TOGETHER)
    for new, old in ((factors[i : i + starts.step], before[i : i + starts.step]) for i in starts):
        moved = _differences(new, old)
        for new_A, B, moved_A, moved_B in zip(new[::2], old[1::2], moved[::2], moved[1::2], strict=True):
            yield Movement(torch.cat((moved_B, B), dim=-1), torch.cat((new_A, moved_A), dim=-2))


def _differences(new: list[Tensor], old: list[Tensor]) -> Sequence[Tensor]:
    """Return the differences of tensors; on a GPU in one launch, or few."""
    if len(new) != len(old) or any(is_sharded(tensor) for tensor in new):
        return [a - b for a, b in zip(new, old, strict=True)]
    return torch._foreach_sub(new, old)


def move_(W: Tensor, movement: Movement, scale: float) -> None:
    """Move W by s (B' A' - B A) in place, as one product of rank 2r.

    Args:
        W: (m, n), (batch, m, n), or n-D with the factors of its matrix; floating point, contiguous or not.
    """
    left, right = movement
    if W.dim() == 2:
        W.addmm_(left, right, alpha=scale)
    else:
        W.add_(product(right, left, scale).view(W.shape))
