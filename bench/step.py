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
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from relora_opt_cli.machine import keep_freed_memory
from relora_opt_cli.model import Llama, LlamaConfig, init_weights
from torch import Tensor

from . import profiling
from .costs import Shape, bound
from .methods import METHODS

RESULTS = Path(__file__).resolve().parent / "results"
_WARM_UP = 3
_SHARED = ("width", "rank", "dtype", "threads", "tokens", "seq-len", "layers", "device")  # by processes for memory
_STEPS = 1000  # the length of the schedules; no restart or refresh falls into what is timed


@dataclass(frozen=True)
class Contender:
    """A row of the table: a method of methods.py, with the formula of costs.py that it is held against."""

    name: str
    method: str
    cost: str
    settings: dict[str, Any]

    def build(self, shape: Shape, rank: int, dtype: torch.dtype, *, accumulate: int = 1, device: str = "cpu") -> Any:
        """Return its trainer over a fresh model; every contender's has the same weights."""
        model = Llama(
            LlamaConfig(
                shape.vocab_size,
                shape.width,
                shape.inner,
                shape.num_layers,
                max(1, shape.width // 64),
                max_position_embeddings=shape.seq_len,
            )
        )
        init_weights(model, seed=0)
        model.to(device)
        given = {key: rank if value == "rank" else value for key, value in self.settings.items()}
        settings = {"lr": 1e-4, "rest_lr": 1e-4, "dtype": dtype, "accumulate": accumulate, **given}
        return METHODS[self.method](model, settings, _STEPS, 0)


_OURS = {"rank": "rank", "alpha": "matched", "init": "orthogonal"}
_PEFT = {"rank": "rank", "alpha": "rank", "restart_every": 0, "restart_warmup": 0}
_PROJECTED = {"rank": "rank", "update_proj_gap": 10**9, "scale": 0.25}
_EAGER = {"compile": False}
_GRAPHS = {"compile": {"mode": "reduce-overhead"}}  # on a GPU; elsewhere it is compiled like the others
_APART = {"compile": {"options": {"post_grad_custom_pre_pass": None}}}  # without relora_opt/fusion.py
CONTENDERS = {
    "full": Contender("full-rank AdamW, compiled", "full", "full", {}),
    "full-eager": Contender("full-rank AdamW", "full", "full", _EAGER),
    "full-graphs": Contender("full-rank AdamW, CUDA graphs", "full", "full", _GRAPHS),
    "ours": Contender("relora-opt, compiled", "relora", "functional", _OURS),
    "ours-graphs": Contender("relora-opt, CUDA graphs", "relora", "functional", {**_OURS, **_GRAPHS}),
    "ours-apart": Contender("relora-opt, thin products apart", "relora", "functional", {**_OURS, **_APART}),
    "ours-muon": Contender("relora-opt over Muon, compiled", "relora", "functional", {**_OURS, "base": "muon"}),
    "ours-eager": Contender("relora-opt", "relora", "functional", {**_OURS, **_EAGER}),
    "dense": Contender("relora-opt, dense path, compiled", "relora", "dense", {**_OURS, "path": "dense"}),
    "peft": Contender("PEFT LoRA, compiled", "peft", "peft", _PEFT),
    "peft-eager": Contender("PEFT LoRA", "peft", "peft", {**_PEFT, **_EAGER}),
    "galore": Contender("galore-torch, compiled", "galore", "galore", _PROJECTED),
    "apollo": Contender("APOLLO, compiled", "apollo", "apollo", _PROJECTED),
    "fira": Contender("Fira, compiled", "fira", "fira", _PROJECTED),
}
_USUAL = [key for key in CONTENDERS if not key.endswith(("-graphs", "-apart"))]


@dataclass(frozen=True)
class Row:
    """What was measured of a contender.

    Args:
        seconds: of every timed update, all its micro-batches together.
        ratio: median of full-rank AdamW's seconds / own, round by round.
        bound: the ratio that the products of matrices allow.
        peak_bytes: how far a step raises resident memory above what it is between steps: gradients, activations.
        state_bytes: persistent, beside the weights: optimizer state and factors.
        sent_bytes: gradients that a data-parallel step would send, and that lie there between backward and update.
        kept_bytes: what selected weights keep: themselves, factors, state and gradients.
        restart_seconds: a restart, or merge and reset; None where there is none.
        profile: milliseconds of a step by kind, under torch's profiler (profiling.py); empty where nobody asked.
    """

    name: str
    seconds: list[float]
    ratio: float
    bound: float
    peak_bytes: int
    state_bytes: int
    sent_bytes: int
    kept_bytes: int
    restart_seconds: float | None
    profile: dict[str, float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2


def batches(shape: Shape, device: str = "cpu") -> Iterator[Tensor]:
    """Yield random batches for ever; every call yields the same ones."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch_size, shape.seq_len + 1)
    while True:
        yield torch.randint(0, shape.vocab_size, size, generator=generator).to(device)


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


def state_bytes(trainer: Any, num_parameters: int) -> int:
    """Return the bytes that a trainer keeps beside the model's own parameters: state, and what else it trains."""
    added = sum(p.numel() for p in trainer.model.parameters()) - num_parameters  # PEFT's factors, in float32
    return sum(map(_bytes, _tensors(list(trainer.optimizer.state.values())))) + 4 * added


def sent_bytes(trainer: Any) -> int:
    """Return the bytes of the gradients of an update."""
    return sum(map(_bytes, trainer.trained()))


def kept_bytes(trainer: Any, shape: Shape, num_parameters: int) -> int:
    """Return the bytes of the selected weights in float32, of their factors, state and gradients."""
    num_rest = num_parameters - sum(m * n for m, n in shape.matrices)
    everything = 4 * num_parameters + state_bytes(trainer, num_parameters) + sent_bytes(trainer)
    return everything - 16 * num_rest  # weight, gradient and two moments, alike in all methods


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):  # the projector of a package
        yield from _tensors(vars(value))


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


def measure_peak(trainer: Any, source: Iterator[Tensor], device: str) -> int:
    """Return by how much a step raises memory above what it is between steps: allocated on a GPU, resident (Linux)."""
    for _ in range(2):  # compiling takes memory of its own, and state appears
        trainer.step(next(source))
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        trainer.step(next(source))
        return torch.cuda.max_memory_allocated() - allocated
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    trainer.step(next(source))
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


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


def measure(keys: list[str], shape: Shape, arguments: argparse.Namespace) -> list[Row]:
    """Time the contenders beside each other and return their rows; full rank is the first of them."""
    if not arguments.no_memory:
        print("measuring memory", file=sys.stderr)  # first: what fails there costs no timings
    peaks = dict.fromkeys(keys, 0) if arguments.no_memory else _peaks(keys, arguments)
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


def _restart_seconds(trainer: Any) -> float | None:
    return None if trainer.restart is None else statistics.median(_seconds(trainer.restart) for _ in range(3))


def table(rows: list[Row], num_tokens: int) -> str:
    """Return the table for a terminal, the fastest first; `kept` is in shares of the first row's, full rank.

    Args:
        num_tokens: of an update.
    """
    lines = [
        f"{'':36} {'ms':>8} {'±':>5} {'tokens/s':>9} {'ratio':>6} {'bound':>6} {'share':>6} "
        f"{'peak MB':>8} {'state MB':>8} {'sent MB':>8} {'kept':>6} {'restart ms':>10}"
    ]
    full = rows[0].kept_bytes
    for row in sorted(rows, key=lambda row: row.median):
        restart = "" if row.restart_seconds is None else f"{1000 * row.restart_seconds:.0f}"
        lines.append(
            f"{row.name:36} {1000 * row.median:8.0f} {1000 * row.spread:5.0f} {num_tokens / row.median:9.0f} "
            f"{row.ratio:6.3f} {row.bound:6.3f} {row.ratio / row.bound:6.3f} {row.peak_bytes / 1e6:8.0f} "
            f"{row.state_bytes / 1e6:8.1f} {row.sent_bytes / 1e6:8.1f} "
            f"{row.kept_bytes / full:6.3f} {restart:>10}"
        )
    return "\n".join(lines)


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Draw every method's ratio to full rank, with its bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ordered = sorted(rows, key=lambda row: row.ratio)
    figure, axes = plt.subplots(figsize=(9, 0.38 * len(rows) + 1.4), layout="constrained")
    colours = ["#1d4ed8" if row.name.startswith("relora") else "#94a3b8" for row in ordered]
    axes.barh([row.name for row in ordered], [row.ratio for row in ordered], color=colours)
    for y, row in enumerate(ordered):
        axes.plot([row.bound] * 2, [y - 0.4, y + 0.4], color="#c2410c", linewidth=2)
        axes.text(0.02, y, f"{row.ratio:.2f}", va="center", color="white", fontsize=9)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast as full-rank AdamW, compiled; in red what products of matrices allow")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768, help="feed-forward width is 8/3 of it")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    parser.add_argument("--tokens", type=int, default=2048, help="a step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu", help="cuda times a GPU, and counts the memory allocated on it")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of that many tokens an update")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--methods", nargs="+", choices=CONTENDERS, default=_USUAL, metavar="METHOD")
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS", help="say where the time of a step goes")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure the peak")
    parser.add_argument("--peak", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.accumulate > 1 and any(key.endswith("-graphs") for key in arguments.methods):
        parser.error("--accumulate with CUDA graphs: full rank's gradients would be overwritten between micro-batches")
    set_up(arguments.threads, arguments.dtype)
    if not arguments.peak:
        keep_freed_memory()
    inner = round(arguments.width * 8 / 3 / 16) * 16
    batch_size = max(1, arguments.tokens // arguments.seq_len)
    shape = Shape(arguments.width, inner, arguments.layers, 4096, batch_size, arguments.seq_len)
    if arguments.peak:
        dtype = getattr(torch, arguments.dtype)
        trainer = CONTENDERS[arguments.peak].build(shape, arguments.rank, dtype, device=arguments.device)
        print(measure_peak(trainer, batches(shape, arguments.device), arguments.device))
        return
    keys = ["full", *(key for key in arguments.methods if key != "full")]
    rows = measure(keys, shape, arguments)
    batch = f"{arguments.tokens}" if arguments.accumulate == 1 else f"{arguments.accumulate}x{arguments.tokens}"
    place = "" if arguments.device == "cpu" else f"{arguments.device}-"
    name = f"step-{place}w{arguments.width}-r{arguments.rank}-{arguments.dtype}-{batch}"
    title = f"width {arguments.width}, rank {arguments.rank}, {arguments.dtype}, {batch} tokens an update"
    title += "" if arguments.device == "cpu" else f", {torch.cuda.get_device_name(arguments.device)}"
    print(table(rows, arguments.accumulate * shape.num_tokens))
    if arguments.profile:
        print(profiling.table({row.name: row.profile for row in rows}))
    RESULTS.mkdir(exist_ok=True)
    result = {
        "command": sys.argv[1:],
        "environment": environment(arguments.threads, arguments.device),
        "shape": asdict(shape),
    }
    result["rows"] = [asdict(row) for row in rows]
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, title, RESULTS / f"{name}.png")
    print(f"written: results/{name}.json and .png")


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
