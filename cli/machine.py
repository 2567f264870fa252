"""What a run makes of the machine it is on: device, precision, threads, compilation, memory.

What is left open is settled once, when a run begins, and kept in its config.toml, so that it goes on with the same
arithmetic. Compiling pays where its minute or two is little beside the run; freed memory that stays with the process is
not fetched from the system anew at every update, which takes a third of the time of a small run.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from .config import Config
from .device import autocast_dtype, find_device
from .errors import UserError
from .launch import launched
from .tokens import default_cache_folder

_FLOPS = {torch.float32: 1e11, torch.bfloat16: 3e11}  # of a CPU's core in a second, roughly
_LONG = 600  # seconds of training from which on compiling pays on a CPU
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def settle(config: Config, *, num_parameters: int) -> Config:
    """Return the configuration with device, threads, precision and compilation decided for this machine."""
    device = find_device(config.device)
    dtype = autocast_dtype(config.dtype, device)
    is_compiled = config.compile
    if is_compiled is None:
        is_compiled = _pays(config, device, dtype, num_parameters=num_parameters)
    return replace(
        config,
        device=device.type if config.device == "auto" else config.device,
        threads=config.threads or torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        compile=is_compiled,
    )


def describe(config: Config) -> str:
    """Say in a line what a settled configuration makes of this machine."""
    device = find_device(config.device)
    products = f"{config.dtype} products" if config.dtype != "float32" else "float32"
    number = torch.get_num_threads()
    threads = f"{number} thread{'s' * (number > 1)}, " if device.type == "cpu" else ""
    compiled = "step compiled" if config.compile else "step not compiled"
    compiled += " and replayed" if config.cuda_graphs else ""
    options = "--threads, --dtype" + (", --compile and --cuda-graphs" if config.cuda_graphs else " and --compile")
    return f"{device}: {threads}{products}, {compiled} ({options} say otherwise)"


def check_graphs(config: Config, *, is_sharded: bool = False) -> None:
    """Refuse to replay a step that cannot be recorded.

    Raises:
        UserError: names what is in the way.
    """
    device = find_device(config.device)
    if config.cuda_graphs and device.type != "cuda":
        raise UserError(f"cuda_graphs=True, but the run is on {device}: say --no-cuda-graphs, or --device cuda")
    if config.cuda_graphs and config.compile is False:
        raise UserError(
            "cuda_graphs=True, but compile=False: it is the compiled step that is recorded; say --compile, or "
            "--no-cuda-graphs"
        )
    if config.cuda_graphs and is_sharded:
        raise UserError(
            "cuda_graphs=True, but shard=True: it is the step of a whole model that is recorded; say --no-shard, or "
            "--no-cuda-graphs"
        )


def compile_options(config: Config) -> bool | dict[str, str]:
    """Return a settled configuration's `compile` of make_step."""
    return {"mode": "reduce-overhead"} if config.cuda_graphs else bool(config.compile)


def allow_compilations(num: int) -> None:
    """Let torch compile so many steps, and a few more, where it would stop earlier."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * num)


def set_threads(threads: int | None) -> None:
    """Use that many threads; None takes torch's choice, but not more than the process may run on."""
    own = torch.get_num_threads()
    torch.set_num_threads(min(own, num_cores()) if threads is None else threads)


def shared_threads(threads: int | None) -> int | None:
    """Return how many of a process's threads each of several on this machine may have, torchrun's LOCAL_WORLD_SIZE."""
    num_processes = launched("LOCAL_WORLD_SIZE")
    if threads is None or num_processes <= 1:
        return threads
    return min(threads, max(1, num_cores() // num_processes))


def num_cores() -> int:
    """Return how many cores this process may use: those it is bound to, as far as a container's quota lets it."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(bound, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such group, or no quota: "max"
        return bound


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for the next update; return whether that could be had (glibc only).

    A step on a CPU allocates and frees the same hundreds of megabytes at every update, and glibc by default takes each
    large block from the system and gives it back, page by page.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


@contextmanager
def rounded_products(dtype: str) -> Iterator[None]:
    """Let products of float32 matrices round as those of autocast do, while something in bfloat16 lasts.

    The one that counts is the movement of every low-rank weight, B'A' - BA: the larger the rank, the more of a step it
    takes (bench/README.md). What is rounded, to three digits, is the movement and not the weight. They are TF32 on a
    GPU, bfloat16 on a CPU that has it, and float32 elsewhere.
    """
    before = torch.get_float32_matmul_precision()
    try:
        if dtype != "float32":
            torch.set_float32_matmul_precision("medium")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def keep_compiled() -> None:
    """Let what is compiled be kept for other runs beside the tokens, unless TORCHINDUCTOR_CACHE_DIR says where."""
    folder = default_cache_folder()
    if folder is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "compiled"))


def _pays(config: Config, device: torch.device, dtype: torch.dtype, *, num_parameters: int) -> bool:
    """Say whether a run is long enough to earn back what compiling costs."""
    if device.type != "cpu":
        return device.type == "cuda"
    flops = 6.0 * num_parameters * config.steps * config.batch_size * config.seq_len
    seconds = flops / (_FLOPS[dtype] * (config.threads or num_cores()))
    return seconds >= _LONG and _has_compiler()


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))
