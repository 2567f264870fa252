"""What is saved of a run, and when: all its processes call, the first one writes.

Training goes on as soon as weights and state are copied in memory; a thread writes the copy (writer.py). Of a sharded
run every process copies and writes what it holds, and the first one joins the parts (shares.py).
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from .checkpoint import (
    Snapshot,
    Write,
    checkpoint_of,
    save_checkpoint,
    save_progress,
    save_share,
    snapshot,
    write_whole,
)
from .config import Config
from .disk import flushed
from .errors import UserError
from .parallel import noticing_losses
from .run import METRICS, Run
from .shares import write_shares


def save(run: Run) -> None:
    """Begin to write a checkpoint of where the run is; where it has one already, its progress alone, at once."""
    wait(run)  # one copy in memory at a time; a save may take longer than what else processes tell each other
    if run.processes.from_main(_is_saved(run)):
        run.processes.on_main(lambda: write_progress(run))
    elif run.is_sharded:
        _begin(run)
    else:
        run.processes.on_main(lambda: _begin(run))


def save_alone(run: Run) -> None:
    """Do what `save` does, in the main process alone, which holds all of a run that is not sharded."""
    run.writer.wait()
    if _is_saved(run):
        write_progress(run)
    else:
        _begin(run)


def write_progress(run: Run) -> None:
    """Write the progress of a checkpoint that is there, in the main process."""
    run.check_folder()
    save_progress(checkpoint_of(run.folder, run.progress.update), run.progress, _options(run.config))


def wait(run: Run) -> None:
    """Return when what was begun to be saved is written: all must call, and none goes on where one could not write."""
    run.writer.wait()
    run.processes.wait()


def _begin(run: Run) -> None:
    options = _options(run.config)
    taken = snapshot(run.model, run.optimizer.state_dict(), run.progress, options, identity=run.identity)
    run.writer.start(partial(_write, run, taken))


def _is_saved(run: Run) -> bool:
    return run.saved == run.progress.update and checkpoint_of(run.folder, run.progress.update).is_dir()


def _options(config: Config) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name != "tokens"}  # steps say it already


def _write(run: Run, taken: Snapshot) -> None:
    write = partial(write_shares, processes=run.processes) if run.is_sharded else write_whole
    with noticing_losses():
        if run.processes.is_main:
            _write_on_main(run, taken, write)
        else:
            save_share(run.folder, taken, write=write)
    run.saved = taken.progress.update


def _write_on_main(run: Run, taken: Snapshot, write: Write) -> None:
    run.check_folder()
    metrics = run.folder / METRICS
    try:
        if metrics.exists():
            flushed(metrics)  # a power cut leaves no checkpoint without its rows
    except OSError as error:
        raise UserError(f"{metrics} cannot be written: {error.strerror or error}") from error
    save_checkpoint(run.folder, taken, keep=run.config.keep, keep_every=run.config.keep_every, write=write)
