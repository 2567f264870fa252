"""Causal attention over heads: each token looks back at itself and all before it.

    y = softmax(q k^T / sqrt(d) + mask) v,   the mask -inf where a key comes after the query

torch's own kernels do it, but for short texts in 16 bits on a CPU: there the formula itself is faster than the flash
kernel up to 256 tokens (bench/README.md), and torch's plain kernel computes in float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_LONGEST_SHORT = 256  # tokens; from 512 on the flash kernel is the faster one


@torch.library.custom_op("relora_opt_cli::once", mutates_args=())
def once(x: Tensor) -> Tensor:
    """Return x, computed once: a compiler computes anew, in every kernel that reads it, what it can look into."""
    return x.clone()


@once.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let the last t of s tokens look back, q (b, heads, t, d) at k and v (b, kv_heads, s, d): (b, heads, t, d)."""
    t, s = q.shape[2], k.shape[2]
    if q.device.type == "cpu" and q.dtype.itemsize == 2 and q.shape[1] == k.shape[1] and 1 < t == s <= _LONGEST_SHORT:
        return _attend_plainly(q, k, v)
    is_grouped = q.shape[1] != k.shape[1]
    if t == s:  # a branch, and no argument: a compiler may not know the lengths
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
    else:  # torch's own causal mask starts in the upper left corner, which is right where there is nothing before
        mask = None if t == 1 else torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
        y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=is_grouped)
    return y


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q.shape[2]
    mask = once(torch.full((t, t), -math.inf, dtype=q.dtype, device=q.device).triu(1))
    y: Tensor = _Plain.apply(q, k, v, mask)  # type: ignore[no-untyped-call]
    return y


class _Plain(torch.autograd.Function):
    """The formula, and its gradient in the layout of q, k and v.

    Left to autograd, k's gradient comes transposed, and torch 2.13's compiler reads transposed blocks of bfloat16
    wrong: NaN, without an error.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q / math.sqrt(q.shape[-1])) @ k.mT + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    @once_differentiable  # the weights are saved as numbers
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, weights = ctx.saved_tensors
        of_weights = (g @ v.mT).float()
        shares = weights.float()
        of_scores = shares * (of_weights - (of_weights * shares).sum(-1, keepdim=True))
        of_scores = (of_scores / math.sqrt(q.shape[-1])).to(q.dtype)
        return of_scores @ k, of_scores.mT @ q, weights.mT @ g, None
