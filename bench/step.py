"""How long a training step takes, beside the rivals and beside the bound.

    python -m bench.step                                  width 768, rank 32, float32
    python -m bench.step --width 512 --rank 32 --dtype bfloat16
    python -m bench.step --methods full ours peft         these alone
    python -m bench.step --accumulate 8                   eight micro-batches an update
    python -m bench.step --device cuda --methods full full-graphs ours ours-graphs

All methods live in one process and take turns, in an order that changes every round, on the same batches and threads;
times are medians. Methods with `, compiled` compile forward and backward; the others run eagerly. All have AdamW's
fused kernel, where they have AdamW, and an allocator that keeps what is freed. The bound is how many times as fast as
full rank a method would be if products of matrices were all there is (costs.py). Memory is measured in a process for
each method. Prints a table and writes results/step-*.json and its picture.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from relora_opt_cli.machine import keep_freed_memory
from torch import Tensor

from . import profiling
from .contenders import CONTENDERS, USUAL, batches
from .costs import Shape, bound
from .footprint import kept_bytes, measure_peak, sent_bytes, state_bytes
from .step_table import Row, draw, table

RESULTS = Path(__file__).resolve().parent / "results"
_WARM_UP = 3
_SHARED = ("width", "rank", "dtype", "threads", "tokens", "seq-len", "layers", "device")  # by processes for memory


def main() -> None:
    arguments = _parse()
    set_up(arguments.threads, arguments.dtype)
    if not arguments.peak:
        keep_freed_memory()
    shape = shape_of(arguments)
    if arguments.peak:
        dtype = getattr(torch, arguments.dtype)
        trainer = CONTENDERS[arguments.peak].build(shape, arguments.rank, dtype, device=arguments.device)
        print(measure_peak(trainer, batches(shape, arguments.device), arguments.device))
        return
    keys = ["full", *(key for key in arguments.methods if key != "full")]
    rows = measure(keys, shape, arguments)
    print(table(rows, arguments.accumulate * shape.num_tokens))
    if arguments.profile:
        print(profiling.table({row.name: row.profile for row in rows}))
    _write(rows, shape, arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size(parser)
    parser.add_argument("--device", default="cpu", help="cuda times a GPU, and counts the memory allocated on it")
    parser.add_argument("--methods", nargs="+", choices=CONTENDERS, default=USUAL, metavar="METHOD")
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS", help="say where the time of a step goes")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure the peak")
    parser.add_argument("--peak", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.accumulate > 1 and any(key.endswith("-graphs") for key in arguments.methods):
        parser.error("--accumulate with CUDA graphs: full rank's gradients would be overwritten between micro-batches")
    return arguments


def add_size(parser: argparse.ArgumentParser) -> None:
    """Add what says how large a step is, and how often it is timed."""
    parser.add_argument("--width", type=int, default=768, help="feed-forward width is 8/3 of it")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    parser.add_argument("--tokens", type=int, default=2048, help="a micro-batch")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of that many tokens an update")
    parser.add_argument("--repeats", type=int, default=15, help="timed updates of each")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)


def shape_of(arguments: argparse.Namespace) -> Shape:
    inner = round(arguments.width * 8 / 3 / 16) * 16
    batch_size = max(1, arguments.tokens // arguments.seq_len)
    return Shape(arguments.width, inner, arguments.layers, 4096, batch_size, arguments.seq_len)


def batch_of(arguments: argparse.Namespace) -> str:
    """Return the tokens of an update, in words for names."""
    return f"{arguments.tokens}" if arguments.accumulate == 1 else f"{arguments.accumulate}x{arguments.tokens}"


def _write(rows: list[Row], shape: Shape, arguments: argparse.Namespace) -> None:
    """Write what was measured, and its picture."""
    batch = batch_of(arguments)
    place = "" if arguments.device == "cpu" else f"{arguments.device}-"
    name = f"step-{place}w{arguments.width}-r{arguments.rank}-{arguments.dtype}-{batch}"
    title = f"width {arguments.width}, rank {arguments.rank}, {arguments.dtype}, {batch} tokens an update"
    title += "" if arguments.device == "cpu" else f", {torch.cuda.get_device_name(arguments.device)}"
    RESULTS.mkdir(exist_ok=True)
    result = {
        "command": sys.argv[1:],
        "environment": environment(arguments.threads, arguments.device),
        "shape": asdict(shape),
        "rows": [asdict(row) for row in rows],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, title, RESULTS / f"{name}.png")
    print(f"written: results/{name}.json and .png")


def measure(keys: list[str], shape: Shape, arguments: argparse.Namespace) -> list[Row]:
    """Time the contenders beside each other and return their rows; full rank is the first of them."""
    if not arguments.no_memory:
        print("measuring memory", file=sys.stderr)  # first: what fails there costs no timings
    peaks = dict.fromkeys(keys) if arguments.no_memory else _peaks(keys, arguments)
    trainers, num_parameters = {}, 0
    for key in keys:
        print(f"building {CONTENDERS[key].name}", file=sys.stderr)
        dtype = getattr(torch, arguments.dtype)
        trainers[key] = CONTENDERS[key].build(
            shape, arguments.rank, dtype, accumulate=arguments.accumulate, device=arguments.device
        )
        num_parameters = num_parameters or sum(p.numel() for p in trainers[key].model.parameters())
    steps = {key: trainer.step for key, trainer in trainers.items()}
    source = batches(shape, arguments.device)
    for step in steps.values():  # compiling is over before anything is timed
        _update(step, list(islice(source, arguments.accumulate)))
    print(f"timing {arguments.repeats} updates of each", file=sys.stderr)
    times = alternate(steps, source, arguments.repeats, accumulate=arguments.accumulate)
    profiles = {
        key: profiling.milliseconds(step, source, repeats=arguments.profile) if arguments.profile else {}
        for key, step in steps.items()
    }
    rows = []
    kept = {key: (state_bytes(trainer, num_parameters), sent_bytes(trainer)) for key, trainer in trainers.items()}
    of_selected = {key: kept_bytes(trainer, shape, num_parameters) for key, trainer in trainers.items()}
    restarts = {key: _restart_seconds(trainer) for key, trainer in trainers.items()}  # they drop state
    for key in trainers:
        contender = CONTENDERS[key]
        rows.append(
            Row(
                contender.name,
                times[key],
                statistics.median(full / own for full, own in zip(times[keys[0]], times[key], strict=True)),
                bound(contender.cost, shape, arguments.rank, accumulate=arguments.accumulate),
                peaks[key],
                *kept[key],
                of_selected[key],
                restarts[key],
                profiles[key],
            )
        )
    return rows


def alternate(
    steps: dict[str, Callable[[Tensor], Any]], source: Iterator[Tensor], repeats: int, *, accumulate: int = 1
) -> dict[str, list[float]]:
    """Time every update on the same micro-batches, in rounds, in an order that changes."""
    times: dict[str, list[float]] = {key: [] for key in steps}
    shuffled, order = list(steps), random.Random(0)
    for number in range(_WARM_UP + repeats):
        micro_batches = list(islice(source, accumulate))
        order.shuffle(shuffled)
        for key in shuffled:
            seconds = _seconds(partial(_update, steps[key], micro_batches))
            if number >= _WARM_UP:
                times[key].append(seconds)
    return times


def _update(step: Callable[[Tensor], Any], micro_batches: list[Tensor]) -> None:
    for tokens in micro_batches:
        step(tokens)


def _seconds(function: Callable[[], Any]) -> float:
    """Time a call, and what it leaves for the accelerator to do."""
    _wait()
    start = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _restart_seconds(trainer: Any) -> float | None:
    return None if trainer.restart is None else statistics.median(_seconds(trainer.restart) for _ in range(3))


def _peaks(keys: list[str], arguments: argparse.Namespace) -> dict[str, int]:
    """Measure every contender's peak; on a GPU all at once, for torch counts what each process has taken there."""
    with ThreadPoolExecutor(1 if arguments.device == "cpu" else len(keys)) as pool:
        return dict(zip(keys, pool.map(partial(_peak_in_process, arguments=arguments), keys), strict=True))


def _peak_in_process(key: str, arguments: argparse.Namespace) -> int:
    """Measure a contender's peak in a process of its own, in which large blocks go back to the system when freed."""
    own = [f"--{name}={getattr(arguments, name.replace('-', '_'))}" for name in _SHARED]
    command = [sys.executable, "-m", "bench.step", "--peak", key, *own]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def set_up(threads: int, dtype: str) -> None:
    torch.set_num_threads(threads)
    if dtype == "bfloat16":
        torch.set_float32_matmul_precision("medium")  # as `pretrain` does: W's movement rounds as other products do


def environment(threads: int, device: str = "cpu") -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip() or os.environ.get("BENCH_COMMIT", "unknown"),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "threads": threads,
        "machine": platform.machine() if device == "cpu" else torch.cuda.get_device_name(device),
    }


if __name__ == "__main__":
    main()
