"""The processes of one run, as torchrun starts them: who they are, and what they tell each other.

    torchrun --nproc-per-node 2 -m relora_opt_cli pretrain

Every process trains its share of each batch on a model of its own, and they average their gradients (see
`ReLoRAOptimizer.make_step`). The first one alone reads texts anew, prints and writes. Batches and their order do not
depend on how many processes there are.

What goes wrong in one process ends all of them and is said once: by that process, before it leaves. The others notice
that it is gone and leave in silence; where it could not say anything, killed say, one of them does. What processes tell
each other goes by gloo, which notices a loss at once; gradients between GPUs go by NCCL.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError
from .launch import launched
from .report import print_error

T = TypeVar("T")
_TIMEOUT = timedelta(minutes=10)  # who has not joined by then, or brought its gradients, never will
_PATIENCE = timedelta(hours=12)  # while texts are tokenized and checkpoints written
_WRITING = timedelta(hours=1)  # until all have written their share of a checkpoint
_UNTIL_SAID = timedelta(seconds=10)
_ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LostProcessError(UserError):
    """Another process of the run is gone."""


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Args:
        rank, local_rank, size: as torchrun counts them.
        group: averages gradients; None where there is one process.
        patient: waits for long work.
        beside: is for threads beside the training, which has the other groups.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    patient: dist.ProcessGroup | None = None
    beside: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's share of a batch; in order, the shares make up the batch."""
        return batch.tensor_split(self.size)[self.rank]

    def sum(self, *values: float) -> list[float]:
        """Return the sums over all processes, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total)
        return [float(value) for value in total]

    def from_main(self, value: T) -> T:
        """Return the first process's value."""
        held: list[Any] = [value]
        if self.size > 1:
            dist.broadcast_object_list(held, src=0)
        received: T = held[0]
        return received

    def check_alike(self, value: T, message: Callable[[T], str]) -> None:
        """Refuse a value that is not the first process's, with the message about that one."""
        other = self.from_main(value)
        if other != value:
            raise UserError(message(other))

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do some work in the main process alone, and return its result there; the others wait until it is done."""
        result = work() if self.is_main else None
        self.wait()
        return result

    def main_first(self, work: Callable[[], T]) -> T:
        """Do the same work in every process, first in the main one: what it has put into a cache the others find."""
        if self.is_main:
            result = work()
            self.wait()
        else:
            self.wait()
            result = work()
        self.wait()
        return result

    def on_device(self, device: str) -> World:
        """Return the processes as they train on a device, each on a GPU of its own where there are any: all must call.

        Raises:
            UserError: where a machine has fewer GPUs than processes, or some machines have none.
        """
        has_cuda = device in ("auto", "cuda") and torch.cuda.is_available()
        (num_with_cuda,) = self.sum(float(has_cuda))
        if self.size == 1 or num_with_cuda == 0:
            return self
        if num_with_cuda < self.size:
            raise UserError(
                f"{num_with_cuda:.0f} of {self.size} processes have a GPU (device={device!r}): give --device cpu, or "
                "leave out the machines without one"
            )
        num_here, num_gpus = launched("LOCAL_WORLD_SIZE", self.local_rank + 1), torch.cuda.device_count()
        if num_here > num_gpus:
            raise UserError(
                f"{num_here} processes on a machine with {num_gpus} GPU{'s' * (num_gpus != 1)}, and each needs its "
                f"own: start torchrun with --nproc-per-node {num_gpus}, or give --device cpu"
            )
        self.wait()  # until no machine has refused
        torch.cuda.set_device(self.local_rank)
        return replace(self, group=dist.new_group(backend="nccl", timeout=_TIMEOUT))

    def wait(self) -> None:
        """Wait for all processes, however long it takes."""
        if self.size > 1:
            dist.barrier(group=self.patient)


@contextmanager
def world() -> Iterator[World]:
    """Join the run's other processes, where torchrun has started several, and leave them in the end.

    Raises:
        UserError: where its environment is incomplete, or no launcher's.
        SystemExit: for whatever is raised in here by one of several processes, after it was said.
    """
    if launched("WORLD_SIZE") == 1:
        yield World()
        return
    missing = [name for name in _ENVIRONMENT if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {missing[0]}: start the processes with torchrun"
        )
    rank, local_rank, size = (launched(name) for name in _ENVIRONMENT[:3])
    notes: Any = dist.HashStore()  # type: ignore[attr-defined]  # of its own, until all have met
    signal.signal(signal.SIGTERM, _leave)
    try:
        with _joining(size):
            store, *_ = next(dist.rendezvous("env://", timeout=_TIMEOUT))  # type: ignore[attr-defined]
            notes = dist.PrefixStore("relora_opt", store)  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
            patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
            beside = dist.new_group(backend="gloo", timeout=_WRITING)
        with noticing_losses():
            yield World(rank, local_rank, size, dist.group.WORLD, patient, beside)
    except (Exception, KeyboardInterrupt) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it when another process has left
        _say_once(error, rank, notes)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from error
    dist.destroy_process_group()


@contextmanager
def _joining(size: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise LostProcessError(f"the {size} processes have not all met within {_minutes()} ({reason})") from error


@contextmanager
def noticing_losses() -> Iterator[None]:
    """Turn what collectives raise when another process is gone, or hangs, into one sentence."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(sign in str(error) for sign in _SIGNS)):
            raise
        what = (
            f"has not answered for {_minutes()}"
            if "imed out" in str(error)
            else "has ended without a word, killed perhaps"
        )
        raise LostProcessError(f"another process of this run {what}") from error


def _say_once(error: BaseException, rank: int, notes: Any) -> None:
    """Say what ends the run, unless another process does; then return when it has: the first that leaves ends all.

    Who has lost another process leaves the word to one that has failed.
    """
    kind, says = "failed", True
    with suppress(RuntimeError):  # who kept the notes may be gone
        if isinstance(error, LostProcessError) and notes.add("failed", 0) == 0:
            kind = "lost"
        says = notes.add(kind, 1) == 1
    if says:
        _say(error, rank)
    with suppress(RuntimeError):  # the other may have been killed before it was done
        if says:
            notes.set(f"{kind}, said", "")
        else:
            notes.wait([f"{kind}, said"], _UNTIL_SAID)


def _say(error: BaseException, rank: int) -> None:
    if isinstance(error, KeyboardInterrupt):
        print_error(f"rank {rank}: interrupted")
    elif isinstance(error, UserError):
        print_error(f"rank {rank}: {error}")
    else:
        print_error(f"rank {rank}: {type(error).__name__}: {error}", error)


def _leave(number: int, _: object) -> NoReturn:
    raise LostProcessError("told to end (SIGTERM)")


def _minutes() -> str:
    return f"{_TIMEOUT.total_seconds() / 60:g} minutes"


_SIGNS = ("gloo/", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
