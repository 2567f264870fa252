"""The training loop: what a configuration says, from text to an exported model.

    prepare   texts, tokenizer, model, optimizer, step
    loop      update, and where due: evaluate, write metrics, save a checkpoint
    close     export, picture, closing table

A run can be stopped at any moment (Ctrl-C saves first) and goes on from its newest checkpoint exactly: batches are a
function of how many were served, and everything else is in the checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from relora_opt import Metrics, ReLoRAOptimizer, memory

from .build import autocast_dtype, find_device, make_optimizer, model_config, with_vocabulary
from .checkpoint import Progress, latest_checkpoint, load_state, read_progress, save_checkpoint
from .config import FIELDS, Config, UserError, load_config_file, resolve, to_toml
from .data import Batches, Corpus, prepare
from .export import MODEL_CONFIG, TOKENIZER, write_export
from .log import Log, check_logs, numbers, open_logs, remember
from .metrics import MetricsFile, Phase, Row, read_metrics, truncate_metrics
from .model import Llama, LlamaConfig, init_weights, load_config, load_weights
from .parallel import LostProcessError, World, noticing_losses
from .plot import plot_runs
from .report import Summary, View, print_summary
from .shard import DenseStep, WholeState, gather, shard

_METRICS, _CONFIG = "metrics.jsonl", "config.toml"
_PLACES = ("data", "tokenizer", "model", "init_from", "out", "device", "threads")  # these may differ by machine
_EVAL_SEQUENCES = 256  # drawn once from the held-out documents
_SKIPS_TO_STOP = 20


@dataclass
class Run:
    """A run in the making: what the loop works on."""

    config: Config
    folder: Path
    console: Console
    corpus: Corpus
    model: Llama
    optimizer: ReLoRAOptimizer
    progress: Progress
    processes: World
    unevaluated: Row | None = None  # what a lost process kept from being evaluated, before the run was resumed

    @property
    def is_sharded(self) -> bool:
        return _is_sharded(self.config, self.processes)


def start_run(config: Config, processes: World | None = None) -> None:
    """Train from the beginning, or from `init_from`, in a new folder; `processes` are several that all call."""
    processes = _on_device(config, processes)
    out = processes.from_main(config.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    config = replace(config, out=out)
    processes.on_main(lambda: check_logs(config.log))
    processes.on_main(lambda: _check_new(Path(out)))
    run = _begin(config, processes)
    processes.on_main(lambda: _write_folder(run))
    _save(run)
    train(run)


def resume_run(folder: Path, processes: World | None = None) -> None:
    """Go on with a run from its newest checkpoint; a finished one is left alone. `processes` as in `start_run`."""
    if not (folder / _CONFIG).is_file():
        raise UserError(f"resume={str(folder)!r} is not the folder of a run: there is no {_CONFIG} in it")
    options = load_config_file(folder / _CONFIG)
    options.setdefault("alpha", options.get("rank") or None)  # left out, it was the rank before it was "matched"
    config = replace(resolve(options), out=str(folder))
    processes = _on_device(config, processes)
    checkpoint = _main_checkpoint(folder, processes)
    progress = read_progress(checkpoint)
    processes.check_alike(
        progress, lambda other: f"{checkpoint} is not that of rank 0 ({progress} here, {other} there): copy that one"
    )
    if progress.is_finished:
        _say(processes, f"{folder} is finished: {progress.update} updates; nothing to resume")
        return
    processes.on_main(lambda: check_logs(config.log))
    run = _restore(config, checkpoint, processes)
    run.unevaluated = processes.from_main(processes.on_main(lambda: _cut_metrics(run)))
    _say(processes, f"resuming {folder} after update {progress.update}")
    train(run)


def train(run: Run) -> None:
    """Train to the end of the run, and close it."""
    config, optimizer, processes = run.config, run.optimizer, run.processes
    with (
        closing(_open_logs(run)) as log,
        View(config.steps, console=run.console) as view,
        _Interrupts() as interrupts,
        _metrics_file(run) as metrics,
    ):
        loop = _Loop(run, view, metrics, log)
        try:
            with noticing_losses():
                loop.begin()
                while optimizer.num_updates < config.steps:
                    loop.attempt()
                    is_last = optimizer.num_updates == config.steps
                    is_stopped = processes.sum(float(interrupts.is_stopped)) != [0.0]
                    if optimizer.num_updates % config.save_every == 0 or is_last or is_stopped:
                        _save(run)
                    if is_stopped and not is_last:
                        text = f"stopped; to go on: relora-opt pretrain --resume {run.folder}"
                        processes.on_main(partial(view.say, text))
                        raise SystemExit(130)
        except LostProcessError as error:
            if processes.is_main:
                if not run.is_sharded:  # what others held of a sharded run is gone
                    loop.report_unfinished()
                    _write_checkpoint(run, run.model, optimizer.state_dict())
                saved = read_progress(latest_checkpoint(run.folder)).update
                view.say(f"saved after update {saved}")
            raise LostProcessError(f"{error}; to go on: relora-opt pretrain --resume {run.folder}") from error
    _close(run)


class _Loop:
    """One attempt after another."""

    def __init__(self, run: Run, view: View, metrics: Any, log: Log) -> None:
        config = run.config
        self.run, self.view, self.metrics, self.log = run, view, metrics, log
        self.device = next(run.model.parameters()).device
        self.dtype = autocast_dtype(config, self.device)
        self.batches = Batches(run.corpus.train, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed)
        self.micro_batch_size = min(config.micro_batch_size, config.batch_size // run.processes.size)
        self.accumulate = config.batch_size // run.processes.size // self.micro_batch_size
        self.step = self._make_step()
        self.validation = _validation_set(run.corpus, config).to(self.device)
        self.num_skips = 0
        self.unfinished: Row | None = None  # of the update that is made but not reported yet

    def _make_step(self) -> Callable[[Tensor], Tensor]:
        run = self.run
        if run.is_sharded:
            return DenseStep(run.optimizer, run.model, self._loss, accumulate=self.accumulate, processes=run.processes)
        return run.optimizer.make_step(
            run.model,
            self._loss,
            compile=run.config.compile,
            accumulate=self.accumulate,
            skip_nonfinite=True,
            process_group=run.processes.group,
        )

    def attempt(self) -> None:
        """Serve one batch, and do what is due after its update."""
        run, optimizer = self.run, self.run.optimizer
        before, phase, start = optimizer.num_updates, _phase(optimizer), time.monotonic()
        optimizer.measures_updates = _is_evaluated(run.config, before + 1)
        batch = self.batches.batch(run.progress.attempts)
        share = run.processes.share(batch).to(self.device)
        losses = [self.step(part) for part in torch.split(share, self.micro_batch_size)]
        loss = float(torch.stack(losses).mean())
        seconds = time.monotonic() - start
        run.progress = replace(
            run.progress,
            update=optimizer.num_updates,
            attempts=run.progress.attempts + 1,
            seconds=run.progress.seconds + seconds,
        )
        if optimizer.num_updates != before:
            tokens_per_second = batch[:, 1:].numel() / seconds
            self.unfinished = self._row(phase, loss=None, tokens_per_second=tokens_per_second)
        (loss,) = (total / run.processes.size for total in run.processes.sum(loss))
        if self.unfinished is None:
            self._count_skip(loss)
            return
        self.num_skips = 0
        self.unfinished = replace(self.unfinished, loss=loss)
        self._finish(self.unfinished)

    def begin(self) -> None:
        """Report the validation loss before training, or the one that a resumed run still owes."""
        if self.run.progress.update == 0:
            val_loss = self._validate(is_switch=False)
            self.run.progress = replace(self.run.progress, val_loss_start=val_loss)
            row = self._row(_phase(self.run.optimizer), loss=None, tokens_per_second=None)
            self._report(replace(row, val_loss=val_loss))
        elif self.run.unevaluated is not None:
            self.unfinished = self.run.unevaluated
            self._finish(self.unfinished)
            _save(self.run)  # the progress alone

    def report_unfinished(self) -> None:
        """Report an update as far as it is known, for a run that goes on from it; logs wait for its evaluation."""
        row = self.unfinished
        if row is None:
            return
        if not _is_evaluated(self.run.config, row.update):
            self._report(row)
            return
        seen = self.run.optimizer.metrics()  # its update is known here alone
        self.metrics.write(replace(row, update_rms=_update_rms(row, seen)).to_json() + "\n")

    def _finish(self, row: Row) -> None:
        """Evaluate after an update where that is due, and report it."""
        if _is_evaluated(self.run.config, row.update):
            row = replace(row, val_loss=self._validate(is_switch=_is_switch(self.run.config, row.update)))
        self._report(row)

    def _loss(self, model: nn.Module, tokens: Tensor) -> Tensor:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    @torch.no_grad()
    def _validate(self, *, is_switch: bool) -> float:
        model, processes = self.run.model.eval(), self.run.processes
        own = 0.0
        for part in torch.split(self.validation, self.micro_batch_size * processes.size):
            share = processes.share(part)
            if len(share) or self.run.is_sharded:  # sharded models are called by all processes or none
                loss = float(self._loss(model, share if len(share) else part[:1]))
                own += loss * len(share)
        model.train()
        val_loss = processes.sum(own)[0] / len(self.validation)
        self.run.progress = replace(self.run.progress, val_loss=val_loss)
        if is_switch:
            self.run.progress = replace(self.run.progress, val_loss_switch=val_loss)
        return val_loss

    def _row(self, phase: Phase, *, loss: float | None, tokens_per_second: float | None) -> Row:
        optimizer, config = self.run.optimizer, self.run.config
        norm = optimizer.grad_norm
        return Row(
            update=optimizer.num_updates,
            tokens=optimizer.num_updates * config.batch_size * config.seq_len,
            loss=loss,
            val_loss=None,
            lr=optimizer.last_lr()[0],
            grad_norm=None if norm is None else float(norm),
            tokens_per_second=tokens_per_second,
            restarts=optimizer.num_restarts,
            phase=phase,
        )

    def _report(self, row: Row) -> None:
        """Write a row, and what the optimizer says of itself where it was evaluated: all processes must call."""
        optimizer, seen = self.run.optimizer, None
        if row.val_loss is not None:
            seen = optimizer.metrics()
            row = replace(row, low_rank_ratio=seen.low_rank_ratio, update_rms=_update_rms(row, seen))
        self.metrics.write(row.to_json() + "\n")
        self.unfinished = None
        self.log.write(row.update, numbers(row, seen))
        has_restarts = self.run.config.rank > 0
        next_restart = optimizer.schedule.next_restart(optimizer.num_updates) if has_restarts else None
        is_coming = next_restart is not None and next_restart <= self.run.config.steps
        self.view.row(row, next_restart=next_restart if is_coming else None)

    def _count_skip(self, loss: float) -> None:
        """An update that was skipped is said, and too many in a row end the run."""
        self.num_skips += 1
        update = self.run.optimizer.num_updates + 1
        self.view.say(f"update {update} skipped: loss {loss} or its gradient is not finite")
        if self.num_skips >= _SKIPS_TO_STOP:
            raise UserError(
                f"{self.num_skips} updates in a row had no finite loss or gradient (lr={self.run.config.lr}, "
                f"rest_lr={self.run.config.rest_lr}): start again with lower rates"
            )


class _Interrupts:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the update; the second one stops at once."""

    def __init__(self) -> None:
        self.is_stopped = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _: object) -> None:
        if self.is_stopped:
            raise KeyboardInterrupt
        self.is_stopped = True


@contextmanager
def _metrics_file(run: Run) -> Iterator[MetricsFile]:
    file = MetricsFile(run.folder / _METRICS if run.processes.is_main else Path(os.devnull))
    with closing(file):
        yield file


def _first_update(run: Run) -> int:
    """The update of the first row to write: a run that has made none evaluates again, and writes row 0 again."""
    return run.progress.update + (run.progress.update > 0 and run.unevaluated is None)


def _cut_metrics(run: Run) -> Row | None:
    """Drop the rows of updates that will be made again; drop and return one whose evaluation a lost process cut off."""
    path, update = run.folder / _METRICS, run.progress.update
    rows = read_metrics(path) if path.exists() else []
    last = rows[-1] if rows else None
    if last is not None and last.update == update > 0 and last.val_loss is None and _is_evaluated(run.config, update):
        run.unevaluated = rows.pop()
    if path.exists() and run.config.log:
        remember(run.folder, last=max((row.update for row in rows), default=-1))
    truncate_metrics(path, after_update=_first_update(run) - 1)
    return run.unevaluated


def _open_logs(run: Run) -> Log:
    """Open what `log` names in the main process; the others write nowhere."""
    opened = run.processes.on_main(lambda: open_logs(run.config, run.folder, first=_first_update(run)))
    return opened or open_logs(replace(run.config, log=()), run.folder, first=0)


def _update_rms(row: Row, seen: Metrics) -> float | None:
    """What an update moved the weights by; of one that was made before the run was resumed, its row knows."""
    return row.update_rms if seen.update_rms is None else seen.update_rms


def _is_evaluated(config: Config, update: int) -> bool:
    return update % config.eval_every == 0 or _is_switch(config, update) or update == config.steps


def _is_switch(config: Config, update: int) -> bool:
    return update == config.warm_start and config.rank > 0


def _on_device(config: Config, processes: World | None) -> World:
    """Return the processes on their devices; refuse other options than the first one's, but for places."""
    if processes is None:
        return World()
    names = [name for name in FIELDS if name not in _PLACES]

    def message(other: list[Any]) -> str:
        name, theirs = next((n, v) for n, v in zip(names, other, strict=True) if v != getattr(config, n))
        return f"{name}={getattr(config, name)!r}, and {theirs!r} on rank 0: give all processes the same options"

    processes.check_alike([getattr(config, name) for name in names], message)
    return processes.on_device(config.device)


def _main_checkpoint(folder: Path, processes: World) -> Path:
    """Return the main process's newest checkpoint, which all must see."""
    own = latest_checkpoint(folder)
    checkpoint = own.with_name(processes.from_main(own.name))
    if not checkpoint.is_dir():
        raise UserError(
            f"{checkpoint}, from which rank 0 goes on, is not there, and the newest here is {own.name}: give all "
            "machines the same folder, or copy it"
        )
    return checkpoint


def _check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"out={str(folder)!r} is in use: give a new folder, or go on with --resume {folder}")


def _begin(config: Config, processes: World) -> Run:
    """Return a run at its beginning."""
    if config.shard and processes.size == 1:
        raise UserError("shard=True, but there is one process: start several with torchrun, or leave it out")
    shape = model_config(config)
    with torch.device("meta"):  # what cannot be low-rank is found before the texts are read
        make_optimizer(Llama(shape), config)

    def set_weights(model: Llama) -> None:
        if config.init_from:
            load_weights(model, config.init_from)
        else:
            init_weights(model, seed=config.seed)

    return _prepare(config, shape, processes, set_weights)


def _restore(config: Config, checkpoint: Path, processes: World) -> Run:
    """Return a run as it was at a checkpoint."""
    shape = load_config(Path(config.out) / MODEL_CONFIG)
    run = _prepare(config, shape, processes, lambda model: load_weights(model, checkpoint))
    run.progress = read_progress(checkpoint)
    load_state(checkpoint, WholeState(run.model, run.optimizer) if run.is_sharded else run.optimizer)
    if run.progress.corpus != run.corpus.fingerprint:
        raise UserError(
            f"the texts are not those that {config.out} was trained on (data={list(config.data)}): restore them, or "
            "start a new run with --init-from"
        )
    return run


def _prepare(config: Config, shape: LlamaConfig, processes: World, set_weights: Callable[[Llama], None]) -> Run:
    """Read the texts and build what the loop works on."""
    _check_shares(config, processes)
    _set_threads(config)
    folder, console = Path(config.out), Console(quiet=not processes.is_main)
    with console.status("reading and tokenizing the texts"):
        corpus = processes.main_first(
            lambda: prepare(
                config.data,
                text_field=config.text_field,
                vocab_size=config.vocab_size or shape.vocab_size,
                tokenizer=_tokenizer_file(config, folder),
                seq_len=config.seq_len,
            )
        )
    processes.check_alike(
        corpus.fingerprint, lambda _: f"the texts are not those of rank 0 (data={list(config.data)}): copy those"
    )
    shape = with_vocabulary(shape, corpus, config)
    processes.check_alike(shape, lambda other: f"the model is {shape}, and {other} on rank 0: give all the same")
    device = find_device(config)
    model = Llama(shape).to(device)
    set_weights(model)
    if _is_sharded(config, processes):
        shard(model, processes, compile=config.compile)
    optimizer = make_optimizer(model, config)
    progress = Progress(update=0, attempts=0, seconds=0.0, corpus=corpus.fingerprint)
    return Run(config, folder, console, corpus, model, optimizer, progress, processes)


def _is_sharded(config: Config, processes: World) -> bool:
    return config.shard and processes.size > 1


def _check_shares(config: Config, processes: World) -> None:
    """Refuse a batch that cannot be shared evenly."""
    if config.batch_size % processes.size:
        raise UserError(
            f"batch_size={config.batch_size} does not divide among {processes.size} processes: make it a multiple"
        )
    share = config.batch_size // processes.size
    if share % min(config.micro_batch_size, share):
        raise UserError(
            f"micro_batch_size={config.micro_batch_size} must divide what each of {processes.size} processes has of "
            f"batch_size={config.batch_size}, which is {share}"
        )


def _close(run: Run) -> None:
    """Export, draw, say how it went, and save for the last time: a run without that is closed again by resuming."""
    model, state = _gathered(run)
    run.processes.on_main(lambda: _close_on_main(run, model, state))


def _close_on_main(run: Run, model: Llama, state: dict[str, Any]) -> None:
    config, folder, progress = run.config, run.folder, run.progress
    shutil.rmtree(folder / "export", ignore_errors=True)  # of a run that was killed right here
    export = write_export(model, run.corpus.tokenizer, folder / "export")
    curves = plot_runs([folder], None)
    run.progress = replace(run.progress, is_finished=True)
    _write_checkpoint(run, model, state)
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
        next_command=f'relora-opt generate {folder} --prompt "The state of the union is"',
    )
    print_summary(summary, console=run.console)


def _save(run: Run) -> None:
    """Write a checkpoint: all processes must call."""
    model, state = _gathered(run)
    run.processes.on_main(lambda: _write_checkpoint(run, model, state))


def _gathered(run: Run) -> tuple[Llama, dict[str, Any]]:
    """Return the whole model and the optimizer's state; of sharded runs, on the main process alone."""
    return gather(run.model, run.optimizer) if run.is_sharded else (run.model, run.optimizer.state_dict())


def _write_checkpoint(run: Run, model: Llama, state: dict[str, Any]) -> None:
    save_checkpoint(run.folder, model, state, run.progress, keep=run.config.keep)


def _write_folder(run: Run) -> None:
    """Write what a run is, before it begins."""
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / _CONFIG).write_text(to_toml(run.config), encoding="utf-8")
        (run.folder / MODEL_CONFIG).write_text(
            json.dumps(run.model.config.to_dict(), indent=2) + "\n", encoding="utf-8"
        )
        run.corpus.tokenizer.save(str(run.folder / TOKENIZER))
    except OSError as error:
        raise UserError(f"out={str(run.folder)!r} cannot be written: {error.strerror or error}") from error


def _validation_set(corpus: Corpus, config: Config) -> Tensor:
    """Return the held-out sequences that are evaluated, (at most _EVAL_SEQUENCES, seq_len + 1): always the same."""
    held_out = Batches(corpus.val, seq_len=config.seq_len, batch_size=1)
    count = min(held_out.num_blocks, _EVAL_SEQUENCES)
    return Batches(corpus.val, seq_len=config.seq_len, batch_size=count).batch(0)


def _phase(optimizer: ReLoRAOptimizer) -> Phase:
    """The phase of the coming update."""
    if optimizer.is_low_rank:
        return "low_rank"
    return "warm_start" if any(group["rank"] for group in optimizer.param_groups) else "full_rank"


def _tokenizer_file(config: Config, folder: Path) -> Path | None:
    """Return the tokenizer that need not be trained: the run's own, the one named, or the one beside the weights."""
    if (folder / TOKENIZER).is_file():
        return folder / TOKENIZER
    if config.tokenizer is not None:
        return Path(config.tokenizer)
    return None if config.init_from is None else Path(config.init_from) / TOKENIZER


def _say(processes: World, text: str) -> None:
    Console(quiet=not processes.is_main).print(text, markup=False, highlight=False, soft_wrap=True)


def _set_threads(config: Config) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
