"""How many floating-point operations a training step has: the bound that bench.step holds its times against.

For a weight (m, n), T tokens and rank r, multiplications and additions counted apart:

    full rank                    6 T m n                                forward, both halves of the backward pass
    projecting its gradient      6 T m n + 4 m n r                      GaLore, there and back; APOLLO 2 m n r, Fira 6
    ours, dense path             6 T m n + 8 m n r                      both projections, and the update of rank 2 r
    ours, functional path        4 T m n + 4 T r (m + n) + 4 m n r      no g^T x; g B, x A^T, theirs; update
                                                                        (never more than the dense path)
    LoRA as modules              4 T m n + 6 T r (m + n)

The output head costs 6 T V d in all of them, and attention 12 T t d a layer for sequences of t tokens. What is not a
product of matrices (norms, softmax, AdamW) is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Llama and its batch.

    Args:
        width, inner, num_layers, vocab_size: of the model; as many key and value heads as query heads.
        batch_size, seq_len: sequences a step, and tokens in each.
    """

    width: int
    inner: int
    num_layers: int
    vocab_size: int
    batch_size: int
    seq_len: int

    @property
    def num_tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(m, n) of every low-rank weight."""
        d, inner = self.width, self.inner
        return ([(d, d)] * 4 + [(inner, d)] * 2 + [(d, inner)]) * self.num_layers


Cost = Callable[[int, int, int, int], int]

COSTS: dict[str, Cost] = {
    "full": lambda T, m, n, r: 6 * T * m * n,
    "galore": lambda T, m, n, r: 6 * T * m * n + 4 * m * n * r,
    "apollo": lambda T, m, n, r: 6 * T * m * n + 2 * m * n * r,
    "fira": lambda T, m, n, r: 6 * T * m * n + 6 * m * n * r,
    "dense": lambda T, m, n, r: 6 * T * m * n + 8 * m * n * r,
    "functional": lambda T, m, n, r: (
        4 * T * m * n + min(4 * T * r * (m + n), 2 * T * m * n + 4 * m * n * r) + 4 * m * n * r
    ),
    "peft": lambda T, m, n, r: 4 * T * m * n + 6 * T * r * (m + n),
}


def flops(kind: str, shape: Shape, rank: int, *, accumulate: int = 1) -> int:
    """Return the operations of a step, in micro-batches or not: what does not depend on T is done once."""
    cost, T = COSTS[kind], shape.num_tokens
    once = sum(cost(0, m, n, rank) for m, n in shape.matrices)
    weights = sum(cost(T, m, n, rank) for m, n in shape.matrices)
    head = 6 * T * shape.vocab_size * shape.width
    attention = 12 * T * shape.seq_len * shape.width * shape.num_layers
    return (weights - once + head + attention) * accumulate + once


def bound(kind: str, shape: Shape, rank: int, *, accumulate: int = 1) -> float:
    """Return how many times as fast as full rank a method would be if products of matrices were all there is."""
    full = flops("full", shape, rank, accumulate=accumulate)
    return full / flops(kind, shape, rank, accumulate=accumulate)


def kept(shape: Shape, rank: int) -> int:
    """Return the bytes of the selected weights in float32, and of their factors with gradients and AdamW's moments."""
    return sum(4 * m * n + 16 * rank * (m + n) for m, n in shape.matrices)
