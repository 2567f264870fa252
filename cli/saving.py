"""What is saved of a run, and when: all its processes call, the first one writes.

Training goes on as soon as weights and state are copied in memory; a thread writes the copy (writer.py).
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from .checkpoint import Snapshot, checkpoint_of, save_checkpoint, save_progress, snapshot
from .config import Config, UserError
from .disk import flushed
from .model import Llama
from .run import METRICS, Run
from .shard import gather


def save(run: Run) -> None:
    """Begin to write a checkpoint of where the run is."""
    model, state = gathered(run)
    run.processes.on_main(lambda: save_on_main(run, model, state))


def save_on_main(run: Run, model: Llama, state: dict[str, Any]) -> None:
    """Begin to write a checkpoint; where the run has one of this update, its progress alone is written, at once."""
    config, folder = run.config, checkpoint_of(run.folder, run.progress.update)
    run.writer.wait()  # one copy in memory at a time
    if run.saved == run.progress.update and folder.is_dir():
        run.check_folder()
        save_progress(folder, run.progress, _options(config))
        return
    taken = snapshot(model, state, run.progress, _options(config), identity=run.identity)
    run.writer.start(partial(_write, run, taken))


def _options(config: Config) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name != "tokens"}  # steps say it already


def _write(run: Run, taken: Snapshot) -> None:
    run.check_folder()
    metrics = run.folder / METRICS
    try:
        if metrics.exists():
            flushed(metrics)  # a power cut leaves no checkpoint without its rows
    except OSError as error:
        raise UserError(f"{metrics} cannot be written: {error.strerror or error}") from error
    save_checkpoint(run.folder, taken, keep=run.config.keep, keep_every=run.config.keep_every)
    run.saved = taken.progress.update


def gathered(run: Run) -> tuple[Llama, dict[str, Any]]:
    """Return the whole model and the optimizer's state; of sharded runs, on the main process alone."""
    return gather(run.model, run.optimizer) if run.is_sharded else (run.model, run.optimizer.state_dict())
