"""Causal attention over heads: each token looks back at itself and all before it.

    y = softmax(q k^T / sqrt(d) + mask) v,   the mask -inf where a key comes after the query

torch's own kernels do it, but for short texts in 16 bits on a CPU: there the formula itself is faster than the flash
kernel up to 256 tokens (bench/README.md), and torch's plain kernel computes in float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

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
    # torch's own causal mask starts in the upper left corner, which is right where there is nothing before.
    mask = None if t in (1, s) else torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    y: Tensor = F.scaled_dot_product_attention(q, k, v, mask, is_causal=t == s, enable_gqa=q.shape[1] != k.shape[1])
    return y


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t, d = q.shape[2:]
    mask = once(torch.full((t, t), -math.inf, dtype=q.dtype, device=q.device).triu(1))
    scores = (q / math.sqrt(d)) @ k.mT + mask
    y: Tensor = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    return y
