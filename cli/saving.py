"""What is saved of a run, and when it is called by all its processes."""

from __future__ import annotations

from typing import Any

from .checkpoint import save_checkpoint
from .model import Llama
from .run import Run
from .shard import gather


def save(run: Run) -> None:
    """Write a checkpoint: all processes must call."""
    model, state = gathered(run)
    run.processes.on_main(lambda: write_checkpoint(run, model, state))


def gathered(run: Run) -> tuple[Llama, dict[str, Any]]:
    """Return the whole model and the optimizer's state; of sharded runs, on the main process alone."""
    return gather(run.model, run.optimizer) if run.is_sharded else (run.model, run.optimizer.state_dict())


def write_checkpoint(run: Run, model: Llama, state: dict[str, Any]) -> None:
    save_checkpoint(run.folder, model, state, run.progress, keep=run.config.keep)
