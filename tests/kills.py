"""Train a run that is killed again and again, at random moments, and resumed.

    python tests/kills.py FOLDER KILLS SEED

Every process is forked here, so that it need not import torch. Prints a line for each kill: the newest checkpoint and
whether a save was under way. `FOLDER/whole` is the run that was never killed, `FOLDER/run` the other.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from relora_opt_cli import train
from relora_opt_cli.checkpoint import checkpoints
from relora_opt_cli.metrics import read_metrics
from relora_opt_cli.train import resume_run
from tiny import train as run_tiny

UPDATES_A_KILL = 6


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


def kill(process: int, run: Path, moments: random.Random) -> bool:
    """Kill a process some updates from where it begins, at any instruction; return whether it was still alive."""
    until = num_rows(run) + moments.randint(1, UPDATES_A_KILL - 2)
    while num_rows(run) < until:
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.05))
    os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1] == signal.SIGKILL


def main(folder: Path, num_kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    train.plot_runs = lambda *_: None  # type: ignore[assignment, return-value]
    moments, run = random.Random(seed), folder / "run"
    options = {"steps": num_kills * UPDATES_A_KILL + 20, "keep": 3}
    run_tiny(folder, out=str(folder / "whole"), **options)
    process = forked(lambda: run_tiny(folder, **options))
    for number in range(num_kills):
        if not kill(process, run, moments):
            sys.exit(f"the run ended by itself after {number} kills")
        saved = checkpoints(run)
        is_saving = any((run / "checkpoints").glob(".*.partial"))
        print(number + 1, saved[-1].name if saved else "-", "while saving" if is_saving else "", flush=True)
        process = forked(lambda: resume_run(run))
    _, status = os.waitpid(process, 0)
    rows = read_metrics(run / "metrics.jsonl")
    sys.exit(status or [row.update for row in rows] != list(range(options["steps"] + 1)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
