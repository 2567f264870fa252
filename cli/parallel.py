"""The processes of one run, as torchrun starts them: who they are, and what they tell each other.

    torchrun --nproc-per-node 2 -m relora_opt_cli pretrain

Every process trains its share of each batch on a model of its own, and they average their gradients (see
`ReLoRAOptimizer.make_step`). The first one alone reads texts anew, prints and writes. Batches and their order do not
depend on how many processes there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .config import ProcessError, UserError

T = TypeVar("T")
_TIMEOUT = timedelta(hours=12)  # the others wait while the first process tokenizes; one that dies is noticed at once
_ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LostProcessError(UserError):
    """Another process of the run is gone."""


@dataclass(frozen=True)
class World:
    """The processes of a run; `group` is None where there is one."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's share of a batch; in order, the shares make up the batch."""
        return batch.tensor_split(self.size)[self.rank]

    def sum(self, *values: float) -> list[float]:
        """Return the sums over all processes, in float64."""
        if self.group is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._device())
        with noticing_losses():
            dist.all_reduce(total, group=self.group)
        return [float(value) for value in total]

    def from_main(self, value: T) -> T:
        """Return the first process's value."""
        if self.group is None:
            return value
        held: list[Any] = [value]
        with noticing_losses():
            dist.broadcast_object_list(held, src=0, group=self.group)
        received: T = held[0]
        return received

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do some work in the main process alone, and return its result there; the others wait until it is done.

        Raises:
            Whatever it raises, in the main process; the others end with it, in silence.
        """
        result: list[T] = []
        try:
            if self.is_main:
                result.append(work())
        finally:
            went_well = self.from_main(bool(result))
        if not went_well:
            raise SystemExit(2)
        return result[0] if result else None

    def main_first(self, work: Callable[[], T]) -> T:
        """Do the same work in every process, first in the main one: what it has put into a cache the others find.

        Raises:
            Whatever it raises, as `on_main` does; ProcessError for what fails in another process alone.
        """
        result = self.on_main(work)
        if self.is_main:
            return result  # type: ignore[return-value]
        try:
            return work()
        except UserError as error:
            raise ProcessError(f"rank {self.rank}: {error}") from error

    def _device(self) -> torch.device:
        return torch.device("cpu") if dist.get_backend(self.group) == "gloo" else torch.device("cuda", self.local_rank)


@contextmanager
def world(device: str) -> Iterator[World]:
    """Join the run's other processes, where torchrun has started several, and leave them in the end.

    Raises:
        UserError: where its environment is incomplete or the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    missing = [name for name in _ENVIRONMENT if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {missing[0]}: start the processes with torchrun"
        )
    rank, local_rank, size = (int(os.environ[name]) for name in _ENVIRONMENT[:3])
    uses_cuda = torch.cuda.is_available() and device in ("auto", "cuda")
    if uses_cuda:
        torch.cuda.set_device(local_rank)
    try:
        dist.init_process_group("nccl" if uses_cuda else "gloo", timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(f"rank {rank} of {size} cannot reach the others: {str(error).splitlines()[0]}") from error
    try:
        yield World(rank, local_rank, size, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


@contextmanager
def noticing_losses() -> Iterator[None]:
    """Turn what collectives raise when another process is gone into one sentence."""
    try:
        yield
    except RuntimeError as error:
        if not _is_of_a_lost_process(error):
            raise
        raise LostProcessError("another process of this run has ended: its own message says why") from error


def _is_of_a_lost_process(error: Exception) -> bool:
    kinds = (dist.DistBackendError, dist.DistNetworkError)
    return isinstance(error, kinds) or any(word in str(error) for word in _SIGNS)


_SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
