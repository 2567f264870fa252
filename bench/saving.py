"""How long a save keeps training waiting, beside a plain copy of the same bytes to the disk.

    python -m bench.saving                       presets 5m and 60m, in a temporary folder
    python -m bench.saving --folder /mnt/disk    on another disk

Three things take turns: a save while nothing trains, of which the stall (until training could go on) and the whole
(until the checkpoint is in its place) are timed; and a copy with fsync of every file of that checkpoint. Prints a table
and writes results/saving.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from relora_opt_cli.checkpoint import checkpoint_of, save_checkpoint, snapshot
from relora_opt_cli.disk import flush_folder, flushed
from relora_opt_cli.machine import keep_freed_memory
from relora_opt_cli.model import PRESETS, Llama, init_weights
from relora_opt_cli.progress import Progress
from relora_opt_cli.writer import Writer

from relora_opt import JaggedSchedule, ReLoRAOptimizer

from .step import RESULTS, environment

_RANKS = {"5m": 64, "60m": 128}


@dataclass(frozen=True)
class Row:
    """Seconds of one preset, as (quartile, median, quartile).

    Args:
        num_bytes: of a checkpoint.
        stall: until training could go on. whole: until the checkpoint is in its place.
        copy: of the same files, flushed to the same disk.
        ratio: of the medians of stall and copy.
    """

    preset: str
    num_bytes: int
    stall: tuple[float, float, float]
    whole: tuple[float, float, float]
    copy: tuple[float, float, float]
    ratio: float


def trained(preset: str) -> tuple[Llama, ReLoRAOptimizer]:
    """Return a model after its first low-rank update: every tensor of a checkpoint is there."""
    model = Llama(PRESETS[preset])
    init_weights(model, seed=0)
    optimizer = ReLoRAOptimizer(model, torch.optim.AdamW, rank=_RANKS[preset], schedule=JaggedSchedule(100), lr=1e-3)
    model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def copy(source: Path, target: Path) -> None:
    """Copy a folder's files plainly, and flush them."""
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())
    flush_folder(target)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(preset: str, folder: Path, *, repeats: int) -> Row:
    """Time saves and copies in turns; the first of each is not counted."""
    model, optimizer = trained(preset)
    writer, times = Writer(), {"stall": [], "whole": [], "copy": []}  # type: dict[str, list[float]]
    flushed_bytes = 0

    def save(update: int) -> None:
        taken = snapshot(model, optimizer.state_dict(), Progress(update, update, 0.0), {})
        writer.start(partial(save_checkpoint, folder, taken, keep=1))

    for update in range(repeats + 1):
        stall = seconds(partial(save, update))
        times["whole"].append(stall + seconds(writer.wait))
        times["stall"].append(stall)
        saved = checkpoint_of(folder, update)
        times["copy"].append(seconds(partial(copy, saved, folder / "copy")))
        flushed_bytes = sum(flushed(path)[0] for path in saved.iterdir())
        shutil.rmtree(folder / "copy")
    quartiles = {name: _quartiles(values[1:]) for name, values in times.items()}
    return Row(preset, flushed_bytes, **quartiles, ratio=quartiles["stall"][1] / quartiles["copy"][1])


def table(rows: list[Row]) -> str:
    lines = [f"{'':>6} {'MB':>7} {'stall ms':>22} {'whole ms':>22} {'copy ms':>22} {'stall/copy':>10}"]
    for row in rows:
        shown = [
            f"{1e3 * m:.0f} ({1e3 * low:.0f}-{1e3 * high:.0f})" for low, m, high in (row.stall, row.whole, row.copy)
        ]
        cells = " ".join(f"{text:>22}" for text in shown)
        lines.append(f"{row.preset:>6} {row.num_bytes / 1e6:7.1f} {cells} {row.ratio:10.2f}")
    return "\n".join(lines)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return low, median, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=_RANKS, default=list(_RANKS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="where to write; a folder of its own is made there")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    rows = []
    for preset in arguments.presets:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            rows.append(measure(preset, Path(folder), repeats=arguments.repeats))
        print(table(rows[-1:]), flush=True)
    result = {"command": sys.argv[1:], "environment": environment(arguments.threads), "rows": [asdict(r) for r in rows]}
    (RESULTS / "saving.json").write_text(json.dumps(result, indent=1) + "\n")
    print("written: results/saving.json")


if __name__ == "__main__":
    main()
