"""Train a run that is killed again and again, at random moments, and resumed.

    python tests/kills.py FOLDER KILLS SEED

Every process is forked here, so that it need not import torch. It is killed while it
begins, or is restored, in an update, and while it closes. Prints a line for each kill: when, the newest checkpoint and
whether a save was under way. `FOLDER/whole` is the run that was never killed, `FOLDER/run` the other.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from relora_opt_cli import train
from relora_opt_cli.checkpoint import checkpoints
from relora_opt_cli.metrics import read_metrics
from relora_opt_cli.train import resume_run
from tiny import train as run_tiny

UPDATES_A_KILL = 6
KILLS_AT_THE_END = 3
BEGINNING = 0.1  # seconds, about what it takes to build a run, or to restore one


def forked(work: Callable[[], object]) -> int:
    """Begin some work in a process of its own."""
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work()
        os._exit(0)
    return process


def num_rows(run: Path) -> int:
    """Return how many rows there are, without minding a torn one."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def begun(folder: Path, options: dict[str, Any]) -> int:
    """Begin or go on with the run; one that was killed before its first checkpoint is begun anew."""
    run = folder / "run"
    if checkpoints(run):
        return forked(lambda: resume_run(run))
    shutil.rmtree(run, ignore_errors=True)
    return forked(lambda: run_tiny(folder, **options))


def kill(process: int, run: Path, *, rows: int, seconds: float) -> bool:
    """Kill a process some seconds after there are so many rows, at any instruction; return whether it still lived."""
    while num_rows(run) < rows:
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1] == signal.SIGKILL


def report(number: int, moment: str, run: Path) -> None:
    saved = checkpoints(run)
    is_saving = any((run / "checkpoints").glob(".*.partial"))
    print(number, moment, saved[-1].name if saved else "-", "while saving" if is_saving else "", flush=True)


def main(folder: Path, num_kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    train.plot_runs = lambda *_: None  # type: ignore[assignment, return-value]
    moments, run = random.Random(seed), folder / "run"
    options = {"steps": num_kills * UPDATES_A_KILL + 20, "keep": 3}
    run_tiny(folder, out=str(folder / "whole"), **options)
    for number in range(num_kills):
        process, is_begun = begun(folder, options), number % 3 > 0
        ahead = moments.randint(1, UPDATES_A_KILL - 2) if is_begun else 0
        seconds = moments.uniform(0, 0.05 if is_begun else BEGINNING)
        if not kill(process, run, rows=num_rows(run) + ahead if is_begun else 0, seconds=seconds):
            sys.exit(f"the run ended by itself after {number} kills")
        report(number + 1, "in an update" if is_begun else "while it began", run)
    for number in range(KILLS_AT_THE_END):
        kill(begun(folder, options), run, rows=options["steps"] + 1, seconds=moments.uniform(0, 0.05))
        report(num_kills + number + 1, "while it closed", run)
    _, status = os.waitpid(begun(folder, options), 0)
    rows = read_metrics(run / "metrics.jsonl")
    sys.exit(status or [row.update for row in rows] != list(range(options["steps"] + 1)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
