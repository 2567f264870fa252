"""Where a step's time goes: milliseconds of torch's own operations, in the kinds that bench.step's bound knows.

products    of matrices: what the bound counts, attention's and W's movement included
kernels     what the compiler generated: norms, activations, softmax, casts, cross-entropy
update      the base's fused update, and clipping
rest        everything else that torch does, and Python in between

On a GPU these are the times of its kernels, by name; the rest is its other kernels, and the time it had nothing to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS = ("products", "kernels", "update", "rest")
_PARTS = {
    "products": ("mm", "linear", "matmul"),  # mm, addmm_, bmm, mkl_linear, _linear_pointwise
    "kernels": ("CompiledFxGraph", "cpp_fused", "triton"),
    "update": ("_fused_adam", "linalg_vector_norm", "mul_"),
}
_PARTS_ON_GPU = {
    "kernels": ("triton",),
    "products": ("gemm", "gemv", "nvjet", "cutlass", "splitK", "flash", "fmha", "cudnn"),
    "update": ("multi_tensor", "Adam", "LpNorm", "lpnorm"),
}


def milliseconds(step: Callable[[Tensor], Any], source: Iterator[Tensor], *, repeats: int) -> dict[str, float]:
    """Return the mean milliseconds of a step by kind; they sum to the step's."""
    batches = [next(source) for _ in range(repeats)]
    is_on_gpu = torch.cuda.is_initialized()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * is_on_gpu]) as profiler:
        start = time.perf_counter()
        for tokens in batches:
            step(tokens)
        if is_on_gpu:
            torch.cuda.synchronize()
        total = 1000 * (time.perf_counter() - start) / repeats
    found = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        if is_on_gpu and event.device_type == DeviceType.CUDA:
            found[kind_of(event.key, _PARTS_ON_GPU)] += event.self_device_time_total / 1000 / repeats
        elif not is_on_gpu:
            found[kind_of(event.key)] += event.self_cpu_time_total / 1000 / repeats
    found["rest"] = total - sum(found[kind] for kind in KINDS[:-1])
    return found


def kind_of(name: str, parts_of: dict[str, tuple[str, ...]] = _PARTS) -> str:
    """Return the kind of an operation, or of a kernel on a GPU, by its name in the profiler."""
    for kind, parts in parts_of.items():
        if any(part in name for part in parts):
            return kind
    return "rest"


def table(found: dict[str, dict[str, float]]) -> str:
    """Return a table of contenders by kind."""
    lines = [f"{'ms':36}" + "".join(f"{kind:>11}" for kind in (*KINDS, "step"))]
    for name, times in found.items():
        lines.append(f"{name:36}" + "".join(f"{times[kind]:11.1f}" for kind in KINDS) + f"{sum(times.values()):11.1f}")
    return "\n".join(lines)
