"""Processes of a gloo group that stay alive over many tests: `Ranks(2).run(function, *arguments)`.

The function is one of a test module's own; it runs on every rank, and what it returns comes back in a list. Warnings
are errors there too. A rank that fails or hangs takes the group down; the next call starts a new one.
"""

import datetime
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 240  # the machine may be busy, and the first call imports torch in every process


class Ranks:
    """A group of `size` processes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(rank, *arguments)` on every rank; raise what the first rank that failed says."""
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send((function, arguments))
        answers = [pipe.recv() if pipe.poll(SECONDS) else (False, "it hung") for _, pipe in self._workers]
        failed = [f"rank {rank}: {text}" for rank, (is_well, text) in enumerate(answers) if not is_well]
        if failed:
            self.stop()
            raise AssertionError("\n".join(failed))
        return [answer for _, answer in answers]

    def stop(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.terminate()
            process.join(SECONDS)
        self._workers = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        meeting = Path(tempfile.mkdtemp()) / "meeting"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, str(meeting), theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))


def reset_accelerate() -> None:
    """Forget Accelerate's process-wide state, in which the settings of one Trainer would live on in the next."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _serve(rank: int, size: int, meeting: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ["OMP_NUM_THREADS"] = "1"  # Accelerate warns where it must choose
    limit = datetime.timedelta(seconds=SECONDS / 2)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=limit)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                pipe.send((True, function(rank, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc(limit=-8)))
