"""Where a step's time goes: milliseconds of torch's own operations, in the kinds that bench.step's bound knows.

products    of matrices: what the bound counts, attention's and W's movement included
kernels     what the compiler generated: norms, activations, softmax, casts, cross-entropy
update      the base's fused update, and clipping
rest        everything else that torch does, and Python in between
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

KINDS = ("products", "kernels", "update", "rest")
_PARTS = {
    "products": ("mm", "linear", "matmul"),  # mm, addmm_, bmm, mkl_linear, _linear_pointwise
    "kernels": ("CompiledFxGraph", "cpp_fused", "triton"),
    "update": ("_fused_adam", "linalg_vector_norm", "mul_"),
}


def milliseconds(step: Callable[[Tensor], Any], source: Iterator[Tensor], *, repeats: int) -> dict[str, float]:
    """Return the mean milliseconds of a step by kind; they sum to the step's."""
    batches = [next(source) for _ in range(repeats)]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for tokens in batches:
            step(tokens)
        total = 1000 * (time.perf_counter() - start) / repeats
    found = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1000 / repeats
    found["rest"] = total - sum(found[kind] for kind in KINDS[:-1])
    return found


def kind_of(name: str) -> str:
    """Return the kind of an operation, by its name in the profiler."""
    for kind, parts in _PARTS.items():
        if any(part in name for part in parts):
            return kind
    return "rest"


def table(found: dict[str, dict[str, float]]) -> str:
    """Return a table of contenders by kind."""
    lines = [f"{'ms':36}" + "".join(f"{kind:>11}" for kind in (*KINDS, "step"))]
    for name, times in found.items():
        lines.append(f"{name:36}" + "".join(f"{times[kind]:11.0f}" for kind in KINDS) + f"{sum(times.values()):11.0f}")
    return "\n".join(lines)
