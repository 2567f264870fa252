"""What a save of a sharded model takes, when every process writes its share, and when the first one gathers all.

    python -m bench.saving_shares                        preset 60m on 2 and 4 processes, gloo, in a temporary folder
    python -m bench.saving_shares --folder /mnt/disk     on another disk

The two take turns. Timed are the stall (until all could train on) and the whole (until the checkpoint is in its place);
the memory of each process is the highest that its own pages, not a file's, have been at during a save, less what they
were before. Prints a table and writes results/saving_shares.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from relora_opt_cli.checkpoint import Snapshot, save_checkpoint, save_share, snapshot
from relora_opt_cli.model import PRESETS, Llama, LlamaConfig, init_weights
from relora_opt_cli.nested import pack
from relora_opt_cli.parallel import World
from relora_opt_cli.progress import Progress
from relora_opt_cli.shard import shard
from relora_opt_cli.shares import write_shares
from relora_opt_cli.writer import Writer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from relora_opt import JaggedSchedule, ReLoRAOptimizer

from .step import RESULTS, environment

_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole on the first process, nothing elsewhere


@dataclass(frozen=True)
class Row:
    """Medians of one way of saving: seconds, and bytes of every process."""

    way: str
    processes: int
    stall: float
    whole: float
    memory: list[float]


@dataclass(frozen=True)
class Trained:
    """What a process holds of a model after its first low-rank update: every tensor of a checkpoint is there."""

    model: Llama
    optimizer: ReLoRAOptimizer
    processes: World

    @classmethod
    def of(cls, shape: LlamaConfig, rank: int, processes: World) -> Trained:
        model = shard(shape, torch.device("cpu"), processes, compile=False)
        init_weights(model, seed=0)
        optimizer = ReLoRAOptimizer(model, torch.optim.AdamW, rank=rank, schedule=JaggedSchedule(100), lr=1e-3)
        model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return cls(model, optimizer, processes)


def in_shares(trained: Trained, folder: Path, update: int) -> Callable[[], object]:
    """Copy what this process holds; return what is to be done in a thread."""
    taken = snapshot(trained.model, trained.optimizer.state_dict(), Progress(update, update, 0.0), {})
    write = partial(write_shares, processes=trained.processes)
    if trained.processes.is_main:
        return partial(save_checkpoint, folder, taken, keep=1, write=write)
    return partial(save_share, folder, taken, write=write)


def gathered(trained: Trained, folder: Path, update: int) -> Callable[[], object]:
    """Gather all on the first process, in one copy; return what is to be done in a thread."""
    weights = get_model_state_dict(trained.model, options=_GATHERED)
    state = get_optimizer_state_dict(trained.model, trained.optimizer, options=_GATHERED)
    progress = Progress(update, update, 0.0)
    values, tensors = pack({"progress": asdict(progress), "optimizer": state})
    taken = Snapshot(progress, weights, tensors, values)
    return partial(save_checkpoint, folder, taken, keep=1) if trained.processes.is_main else lambda: None


WAYS = {"gathered": gathered, "in shares": in_shares}


@contextmanager
def watched() -> Iterator[list[float]]:
    """Give a list whose one number becomes the bytes by which this process has grown at most."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier saves have freed goes back to the system (glibc)
    before, peak, is_over = _own_bytes(), [0.0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.005):
            peak[0] = max(peak[0], _own_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        is_over.set()
        thread.join()


def measure(shape: LlamaConfig, folder: Path, *, rank: int, size: int, repeats: int) -> list[Row]:
    """Time both ways in turns, on `size` processes; the first save of each is not counted."""
    with tempfile.TemporaryDirectory() as meeting:
        work = (size, Path(meeting), shape, folder, rank, repeats)
        mp.spawn(_serve, work, nprocs=size)
        return [Row(**row) for row in json.loads((Path(meeting) / "rows").read_text())]


def table(rows: list[Row]) -> str:
    lines = [f"{'':>10} {'processes':>9} {'stall ms':>9} {'whole ms':>9}  MB more in each process"]
    for row in rows:
        memory = "  ".join(f"{num_bytes / 1e6:.0f}" for num_bytes in row.memory)
        lines.append(f"{row.way:>10} {row.processes:>9} {1e3 * row.stall:9.0f} {1e3 * row.whole:9.0f}  {memory}")
    return "\n".join(lines)


def _serve(number: int, size: int, meeting: Path, shape: LlamaConfig, folder: Path, rank: int, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=number, world_size=size)
    processes = World(number, number, size, dist.group.WORLD, patient=dist.new_group(), beside=dist.new_group())
    trained, found = Trained.of(shape, rank, processes), {way: [] for way in WAYS}  # type: dict[str, list[Any]]
    for update in range(repeats + 1):
        for way, begin in WAYS.items():
            processes.wait()
            found[way].append(_save(partial(begin, trained, folder / way, update), folder / way, processes))
    rows = [_row(way, saves[1:], processes) for way, saves in found.items()]
    if processes.is_main:
        (meeting / "rows").write_text(json.dumps([asdict(row) for row in rows]))
    dist.destroy_process_group()


def _save(begin: Callable[[], Callable[[], object]], folder: Path, processes: World) -> tuple[float, float, float]:
    folder.mkdir(exist_ok=True)
    writer, start = Writer(), time.perf_counter()
    with watched() as peak:
        writer.start(begin())
        processes.wait()
        stall = time.perf_counter() - start
        writer.wait()
        processes.wait()
        whole = time.perf_counter() - start
    return stall, whole, peak[0]


def _row(way: str, saves: list[tuple[float, float, float]], processes: World) -> Row:
    stall, whole, memory = (statistics.median(values) for values in zip(*saves, strict=True))
    own = [memory * (number == processes.rank) for number in range(processes.size)]
    return Row(way, processes.size, stall, whole, processes.sum(*own))


def _own_bytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="60m")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; a folder of its own is made there")
    arguments = parser.parse_args()
    rows = []
    for size in arguments.processes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            shape = PRESETS[arguments.preset]
            rows += measure(shape, Path(folder), rank=arguments.rank, size=size, repeats=arguments.repeats)
    print(table(rows))
    result = {"command": sys.argv[1:], "environment": environment(1), "rows": [asdict(row) for row in rows]}
    (RESULTS / "saving_shares.json").write_text(json.dumps(result, indent=1) + "\n")
    print("written: results/saving_shares.json")


if __name__ == "__main__":
    main()
