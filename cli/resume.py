"""Going on: a run as it was at a checkpoint, and its metrics without what will be made again."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from .checkpoint import (
    checkpoints,
    latest_checkpoint,
    load_state,
    newest_whole,
    read_config,
    read_identity,
    read_progress,
    read_whole,
)
from .config import Config
from .config_file import load_config_file
from .errors import UserError
from .export import MODEL_CONFIG
from .format1 import upgrade_checkpoint
from .identity import check_identity
from .log import remember
from .loop import is_evaluated
from .metrics import Row, read_metrics, truncate_metrics
from .model import load_config, load_weights
from .parallel import World
from .record import DamagedError, check_files, read_record
from .resolution import resolve
from .run import CONFIG, METRICS, Run, prepare_run, say
from .shard import read_state


def config_of(folder: Path) -> Config:
    """Read the settings of a run."""
    if not folder.exists():
        raise UserError(f"resume={str(folder)!r} is not there: name the folder of a run")
    if not (folder / CONFIG).is_file():
        raise UserError(f"resume={str(folder)!r} is not the folder of a run: there is no {CONFIG} in it")
    options = load_config_file(folder / CONFIG)
    options.setdefault("alpha", options.get("rank") or None)  # left out, it was the rank before it was "matched"
    return replace(resolve(options, has_begun=True), out=str(folder))


def in_place(folder: Path, config: Config) -> Config:
    """Return the settings with the run's own folder, however it is spelled.

    Raises:
        UserError: for another folder; what is in it would be lost.
    """
    if Path(config.out).resolve() != folder.resolve():
        raise UserError(
            f"out={config.out!r} is not resume={str(folder)!r}: a run goes on in its own folder; leave out away, or "
            "copy the folder first and resume the copy"
        )
    return replace(config, out=str(folder))


def config_at(checkpoint: Path, told: Config) -> Config:
    """Read the settings with which a checkpoint was made; one of format 1 does not say, and had what its run is told.

    Raises:
        UserError: for a damaged checkpoint, or options that are none.
    """
    options = read_config(checkpoint)
    return resolve(options, has_begun=True) if options else told


def main_checkpoint(folder: Path, processes: World) -> Path:
    """Return the main process's newest checkpoint that is whole, which all must see."""
    own = processes.on_main(lambda: _newest(folder, processes)) or latest_checkpoint(folder)
    checkpoint = own.with_name(processes.from_main(own.name))
    if not checkpoint.is_dir():
        raise UserError(
            f"{checkpoint}, from which rank 0 goes on, is not there, and the newest here is {own.name}: give all "
            "machines the same folder, or copy it"
        )
    if not processes.is_main:
        check_files(checkpoint, read_record(checkpoint))
    return checkpoint


def _newest(folder: Path, processes: World) -> Path:
    for checkpoint in checkpoints(folder):
        with suppress(DamagedError):  # newest_whole finds out which it is
            upgrade_checkpoint(checkpoint)
    return newest_whole(folder, partial(say, processes))


def restored_run(config: Config, checkpoint: Path, processes: World) -> Run:
    """Return a run as it was at a checkpoint."""
    identity = check_identity(Path(config.out), read_identity(checkpoint))
    shape = load_config(Path(config.out) / MODEL_CONFIG)
    run = prepare_run(config, shape, processes, lambda model: load_weights(model, checkpoint))
    run.progress = replace(read_progress(checkpoint), is_finished=False)
    run.saved, run.identity = run.progress.update, identity
    read = partial(read_state, optimizer=run.optimizer, processes=processes) if run.is_sharded else read_whole
    load_state(checkpoint, run.optimizer, read)
    if not run.corpus.is_known_as(run.progress.corpus):
        raise UserError(
            f"the texts are not those that {config.out} was trained on (data={list(config.data)}): restore them, or "
            "start a new run with --init-from"
        )
    return run


def cut_metrics(run: Run) -> Row | None:
    """Drop the rows of updates that will be made again; drop and return the checkpoint's own where it owes a loss.

    That is one whose evaluation a lost process cut off, and one at which the run is to end by now.
    """
    path, update = run.folder / METRICS, run.progress.update
    rows = read_metrics(path) if path.exists() else []
    own = next((row for row in rows if row.update == update), None)
    if own is not None and update > 0 and own.val_loss is None and is_evaluated(run.config, update):
        run.unevaluated = own
        rows.remove(own)
    if path.exists() and run.config.log:
        remember(run.folder, last=max((row.update for row in rows), default=-1))
    truncate_metrics(path, after_update=first_update(run) - 1)
    return run.unevaluated


def first_update(run: Run) -> int:
    """The update of the first row to write: a run that has made none evaluates again, and writes row 0 again."""
    return run.progress.update + (run.progress.update > 0 and run.unevaluated is None)
