"""A run from its beginning, or from where it stopped, to an exported model.

    prepare   texts, tokenizer, model, optimizer           run.py, resume.py
    loop      update, and where due: evaluate, save        loop.py, saving.py, signals.py
    close     export, picture, closing table

A run can be stopped at any moment (Ctrl-C saves first) and goes on from its newest checkpoint exactly: batches are a
function of how many were served, and everything else is in the checkpoint.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from relora_opt import memory

from .changes import changes, settled
from .checkpoint import checkpoint_of, latest_checkpoint, read_progress
from .config import Config, Options
from .counted import counted
from .device import available_device
from .export import export_checkpoint
from .lock import locked
from .log import Log, check_logs, open_logs
from .loop import Loop
from .machine import rounded_products, shared_threads
from .metrics import MetricsFile
from .origin import check_given_again
from .output import quoted
from .parallel import LostProcessError, World, noticing_losses
from .plan import describe_idle, describe_plan
from .plot import plot_runs
from .record import read_record
from .report import Summary, View, print_summary
from .resolution import changed
from .resume import config_at, config_of, cut_metrics, first_update, in_place, main_checkpoint, restored_run
from .run import METRICS, Run, check_new, claimed, new_run, on_device, say, write_config, write_folder
from .saving import save, save_alone, wait, write_progress
from .signals import Interrupts
from .sources import located_sources


def start_run(config: Config, processes: World | None = None) -> None:
    """Train from the beginning, or from `init_from`, in a new folder; `processes` are several that all call."""
    processes = on_device(config, processes)
    out = processes.from_main(config.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    config = replace(config, out=out)
    processes.on_main(lambda: check_logs(config.log))
    processes.on_main(lambda: check_new(Path(out)))
    run = new_run(config, processes)
    say(processes, "\n".join(filter(None, (describe_plan(run.config), describe_idle(run.config)))))
    with ExitStack() as held:
        run.lock = processes.on_main(lambda: held.enter_context(claimed(run.folder)))
        processes.on_main(lambda: write_folder(run))
        held.enter_context(run.writer)
        save(run)
        wait(run)  # from here on the run can be resumed
        train(run)


def resume_run(folder: Path, options: Options | None = None, processes: World | None = None) -> None:
    """Go on with a run from its newest whole checkpoint; a finished one is left alone.

    Args:
        options: settings to change (see changes.py). processes: as in `start_run`.
    """
    told = config_of(folder)
    config = in_place(folder, changed(told, options or {}))
    if "data" in (options or {}):
        config = replace(config, data=located_sources(config.data))
    check_given_again(options or {}, config)
    if (options or {}).get("device", "auto") == "auto":
        device = available_device(told.device)
        is_replayed = config.cuda_graphs and (device == told.device or "cuda_graphs" in (options or {}))
        config = replace(config, device=device, cuda_graphs=is_replayed)
    processes = on_device(config, processes)
    processes.on_main(lambda: latest_checkpoint(folder))  # a folder without one stays as it is
    with ExitStack() as held:
        lock = processes.on_main(lambda: held.enter_context(locked(folder, partial(say, processes))))
        checkpoint = main_checkpoint(folder, processes)
        progress = read_progress(checkpoint)
        processes.check_alike(
            progress,
            lambda other: f"{checkpoint} is not that of rank 0 ({progress} here, {other} there): copy that one",
        )
        processes.check_alike(
            read_record(checkpoint).files, lambda _: f"{checkpoint} has other files than that of rank 0: copy that one"
        )
        before = config_at(checkpoint, told)
        config = settled(before, config)
        here = config
        if "threads" not in (options or {}):
            here = replace(config, threads=shared_threads(config.threads))
        lines = changes(before, here, update=progress.update)
        if progress.is_finished and progress.update == config.steps:
            say(processes, _finished(folder, progress.update, options or {}))
            return
        processes.on_main(lambda: check_logs(config.log))
        run = restored_run(here, checkpoint, processes)
        run.config = replace(run.config, threads=config.threads or run.config.threads)  # a share is not for good
        run.lock = lock
        run.unevaluated = processes.from_main(processes.on_main(lambda: cut_metrics(run)))
        processes.on_main(lambda: write_config(run))
        if progress.is_finished:
            lines += processes.on_main(lambda: _reopen(run)) or []
        held.enter_context(run.writer)
        say(processes, "\n  ".join([f"resuming {folder} after update {progress.update}", *lines]))
        train(run)


def _finished(folder: Path, update: int, options: Options) -> str:
    """Say that a run has made its updates, and which of the options that are given find nothing to do."""
    idle = [f"--{name.replace('_', '-')}" for name in options if name not in ("steps", "tokens")]
    nothing = f", and {', '.join(idle)} would change nothing" if idle else ""
    return f"{folder} is finished: {counted(update, 'update')}{nothing}; give more --steps to go on"


def _reopen(run: Run) -> list[str]:
    """Take a finished run's end back: an export must not pass for that of a run that has gone on, and was stopped."""
    export = run.folder / "export"
    lines = [f"export: removed, it was of update {run.progress.update}; the new end makes one"] * export.exists()
    shutil.rmtree(export, ignore_errors=True)
    write_progress(run)
    return lines


def train(run: Run) -> None:
    """Train to the end of the run, and close it."""
    try:
        _train(run)
        _close(run)
    except KeyboardInterrupt as error:
        run.writer.abandon()
        if run.processes.size > 1:  # it is said once for all of them
            raise
        say(run.processes, f"aborted; {_how_to_go_on(run)}")
        raise SystemExit(128 + signal.SIGINT) from error


def _train(run: Run) -> None:
    with (
        rounded_products(run.config.dtype),
        closing(_open_logs(run)) as log,
        View(run.config.steps, console=run.console) as view,
        Interrupts(run.processes) as interrupts,
        _metrics_file(run) as metrics,
    ):
        loop = Loop(run, view, metrics, log)
        try:
            with noticing_losses():
                _update(run, loop, interrupts)
        except LostProcessError as error:
            if run.processes.is_main:
                view.say(f"saved after update {_save_what_is_left(run, loop)}")
            raise LostProcessError(f"{error}; {_how_to_go_on(run)}") from error


def _update(run: Run, loop: Loop, interrupts: Interrupts) -> None:
    """Make all updates, and save where that is due.

    Raises:
        SystemExit: after a signal, once a checkpoint is written.
    """
    config, optimizer = run.config, run.optimizer
    loop.begin()
    while optimizer.num_updates < config.steps:
        loop.attempt()
        run.writer.check()  # a disk that is full ends the run now, not at the next save
        is_last = optimizer.num_updates == config.steps
        number = interrupts.agreed()
        if optimizer.num_updates % config.save_every == 0 or is_last or number:
            save(run)
        if number and not is_last:
            wait(run)
            run.processes.on_main(lambda: loop.view.say(f"stopped; {_how_to_go_on(run)}"))
            raise SystemExit(128 + number)
    wait(run)  # the last checkpoint is whole before a Ctrl-C ends the run at once


def _save_what_is_left(run: Run, loop: Loop) -> int:
    """Save in the first process when another is lost; return the newest checkpoint's update."""
    if not run.is_sharded:  # what others held of a sharded run is gone
        loop.report_unfinished()
        save_alone(run)
    with suppress(LostProcessError):  # the other may have been lost when it had written its part, or before
        run.writer.wait()
    return read_progress(latest_checkpoint(run.folder)).update


def _how_to_go_on(run: Run) -> str:
    return f"to go on: relora-opt pretrain --resume {quoted(run.folder)}"


@contextmanager
def _metrics_file(run: Run) -> Iterator[MetricsFile]:
    file = MetricsFile(run.folder / METRICS if run.processes.is_main else Path(os.devnull))
    with closing(file):
        yield file


def _open_logs(run: Run) -> Log:
    """Open what `log` names in the main process; the others write nowhere."""
    opened = run.processes.on_main(lambda: open_logs(run.config, run.folder, first=first_update(run)))
    return opened or open_logs(replace(run.config, log=()), run.folder, first=0)


def _close(run: Run) -> None:
    """Export, draw, say how it went, and save for the last time: a run without that is closed again by resuming."""
    save(run)  # the last checkpoint is there, unless somebody has taken it away
    wait(run)
    run.processes.on_main(lambda: _close_on_main(run))


def _close_on_main(run: Run) -> None:
    config, folder, progress = run.config, run.folder, run.progress
    run.check_folder()
    shutil.rmtree(folder / "export", ignore_errors=True)  # of a run that was killed right here
    export = export_checkpoint(
        checkpoint_of(folder, progress.update), run.model.config, run.corpus.tokenizer, folder, folder / "export"
    )
    curves = plot_runs([folder], None)
    run.progress = replace(run.progress, is_finished=True)
    write_progress(run)
    sizes = memory(run.optimizer)
    tokens = progress.update * config.batch_size * config.seq_len
    summary = Summary(
        val_loss_start=progress.val_loss_start,
        val_loss_switch=progress.val_loss_switch,
        val_loss_end=progress.val_loss,
        updates=progress.update,
        tokens=tokens,
        restarts=run.optimizer.num_restarts,
        trainable=sizes.num_trainable,
        parameters=sizes.num_parameters,
        optimizer_bytes=sizes.state_bytes,
        full_rank_bytes=sizes.full_rank_adamw_bytes,
        tokens_per_second=tokens / progress.seconds,
        seconds=progress.seconds,
        run=folder,
        export=export,
        curves=curves,
        skips=progress.attempts - progress.update,
        next_command=f'relora-opt generate {quoted(folder)} --prompt "The state of the union is"',
    )
    print_summary(summary, console=run.console)
