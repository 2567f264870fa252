"""What the bound of bench.step can be here: the products of a step by themselves, at the rates that they reach.

    python -m bench.products                              width 768, rank 32, float32
    python -m bench.products --width 512 --accumulate 8   eight micro-batches an update

The bound counts operations as if each took the same time. Thin products, with r rows or columns, reach fewer operations
a second than those with whole weights, so that a method that has many of them cannot come up to its bound, whatever it
does besides. Here the products of full rank, of ours and of PEFT's LoRA are made in the order of a step, on operands of
their own, without anything between them: methods take turns, times are medians. Prints a table and writes
results/products-*.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import repeat

import torch
import torch.nn.functional as F
from relora_opt_cli.machine import keep_freed_memory
from torch import Tensor

from relora_opt.weight import is_dense_cheaper

from .costs import Shape, bound
from .step import RESULTS, add_size, alternate, batch_of, environment, set_up, shape_of

KINDS = {"full": "full rank", "functional": "relora-opt", "peft": "LoRA as modules"}
_HEAD_WIDTH = 64


@dataclass(frozen=True)
class Operands:
    """Of one weight W (m, n): x (T, n) comes in, p (T, r) is x A^T, g (T, m) the gradient of what goes out.

    In float32, whatever the dtype of products: W once more, and what moves it, left (m, 2r) and right (2r, n).
    """

    x: Tensor
    p: Tensor
    g: Tensor
    W: Tensor
    A: Tensor
    B: Tensor
    master: Tensor
    left: Tensor
    right: Tensor

    def forward(self, kind: str) -> None:
        y = F.linear(self.x, self.W)
        if kind == "peft":
            y.addmm_(F.linear(self.x, self.A), self.B.mT)

    def backward(self, kind: str) -> None:
        """Make the gradient of x, and those of what is trained."""
        x, g, A, B = self.x, self.g, self.A, self.B
        dx = g @ self.W
        if kind == "full":
            g.mT @ x
        elif kind == "functional" and is_dense_cheaper(len(x), *self.W.shape, len(A)):
            G = g.mT @ x
            B.mT @ G
            G @ A.mT
        else:
            q = g @ B
            q.mT @ x
            g.mT @ (self.p if kind == "peft" else x @ A.mT)  # which a LoRA layer has made in its forward pass
            if kind == "peft":
                dx.addmm_(q, A)

    def update(self, kind: str) -> None:
        if kind == "functional":
            self.master.addmm_(self.left, self.right)


class Products:
    """The products of a step, in the order of its forward and backward pass; all kinds have the same operands."""

    def __init__(self, shape: Shape, rank: int, dtype: torch.dtype) -> None:
        T, d = shape.num_tokens, shape.width
        self.weights = [_operands(T, m, n, rank, dtype) for m, n in shape.matrices]
        self.head = _operands(T, shape.vocab_size, d, 1, dtype)
        self.num_layers, heads = shape.num_layers, max(1, d // _HEAD_WIDTH)
        self.q, self.k, self.v = torch.randn(3, shape.batch_size * heads, shape.seq_len, d // heads).to(dtype)
        self.scores = self.q @ self.k.mT

    def micro_batch(self, kind: str) -> None:
        for weight in self.weights:
            weight.forward(kind)
        for _ in range(self.num_layers):
            self._attend_forward()
        self.head.forward("full")
        self.head.backward("full")
        for _ in range(self.num_layers):
            self._attend_backward()
        for weight in reversed(self.weights):
            weight.backward(kind)

    def update(self, kind: str) -> None:
        for weight in self.weights:
            weight.update(kind)

    def _attend_forward(self) -> None:
        self.q @ self.k.mT
        self.scores @ self.v

    def _attend_backward(self) -> None:
        g = self.q  # of what goes out: of q's shape
        g @ self.v.mT
        self.scores.mT @ g
        self.scores @ self.k
        self.scores.mT @ self.q


def _operands(T: int, m: int, n: int, rank: int, dtype: torch.dtype) -> Operands:
    shapes = (T, n), (T, rank), (T, m), (m, n), (rank, n), (m, rank)
    x, p, g, W, A, B = (torch.randn(shape).to(dtype) for shape in shapes)
    return Operands(x, p, g, W, A, B, torch.randn(m, n), 1e-6 * torch.randn(m, 2 * rank), torch.randn(2 * rank, n))


def _step(products: Products, kind: str, accumulate: int) -> Callable[[Tensor], None]:
    """Return a step that takes what a batch would be, and makes an update after as many of them."""
    num_micro_batches = 0

    def step(_: Tensor) -> None:
        nonlocal num_micro_batches
        num_micro_batches += 1
        products.micro_batch(kind)
        if num_micro_batches % accumulate == 0:
            products.update(kind)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size(parser)
    arguments = parser.parse_args()
    set_up(arguments.threads, arguments.dtype)
    keep_freed_memory()
    shape, accumulate = shape_of(arguments), arguments.accumulate
    products = Products(shape, arguments.rank, getattr(torch, arguments.dtype))
    steps = {kind: _step(products, kind, accumulate) for kind in KINDS}
    times = alternate(steps, repeat(torch.empty(0)), arguments.repeats, accumulate=accumulate)
    rows = {kind: _row(times, kind, bound(kind, shape, arguments.rank, accumulate=accumulate)) for kind in KINDS}
    print(f"{'products alone':20}{'ms':>9}{'±':>6}{'ratio':>8}{'bound':>8}{'share':>8}")
    for kind, row in rows.items():
        share = row["ratio"] / row["bound"]
        print(f"{KINDS[kind]:20}{row['ms']:9.0f}{row['spread']:6.0f}{row['ratio']:8.3f}{row['bound']:8.3f}{share:8.3f}")
    name = f"products-w{shape.width}-r{arguments.rank}-{arguments.dtype}-{batch_of(arguments)}"
    result = {
        "command": sys.argv[1:],
        "environment": environment(arguments.threads),
        "shape": asdict(shape),
        "rows": rows,
        "seconds": times,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: results/{name}.json")


def _row(times: dict[str, list[float]], kind: str, own_bound: float) -> dict[str, float]:
    low, median, high = statistics.quantiles(times[kind], n=4)
    ratio = statistics.median(full / own for full, own in zip(times["full"], times[kind], strict=True))
    return {"ms": 1e3 * median, "spread": 500 * (high - low), "ratio": ratio, "bound": own_bound}


if __name__ == "__main__":
    main()
