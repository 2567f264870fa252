"""The training loop: what a configuration says, from text to an exported model.

    prepare   texts, tokenizer, model, optimizer, step
    loop      update, and where due: evaluate, write metrics, save a checkpoint
    close     export, picture, closing table

A run can be stopped at any moment (Ctrl-C saves first) and goes on from its newest checkpoint exactly: batches are a
function of how many were served, and everything else is in the checkpoint.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from relora_opt import ReLoRAOptimizer, memory

from .build import autocast_dtype, find_device, make_optimizer, model_config, with_vocabulary
from .checkpoint import Progress, latest_checkpoint, load_checkpoint, read_progress, save_checkpoint
from .config import Config, UserError, load_config_file, resolve, to_toml
from .data import Batches, Corpus, prepare
from .export import MODEL_CONFIG, TOKENIZER, write_export
from .metrics import Phase, Row, truncate_metrics
from .model import Llama, LlamaConfig, init_weights, load_config, load_weights
from .plot import plot_runs
from .report import Summary, View, print_summary

_METRICS, _CONFIG = "metrics.jsonl", "config.toml"
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


def start_run(config: Config) -> None:
    """Train from the beginning, or from `init_from`, in a new folder."""
    console = Console()
    config = replace(config, out=config.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    folder = Path(config.out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"out={config.out!r} is in use: give a new folder, or go on with --resume {config.out}")
    _set_threads(config)
    shape = model_config(config)
    with torch.device("meta"):  # what cannot be low-rank is found before the texts are read
        make_optimizer(Llama(shape), config)
    run = _prepare(config, folder, shape, console)
    if config.init_from:
        load_weights(run.model, config.init_from)
    else:
        init_weights(run.model, seed=config.seed)
    _write_folder(run)
    train(run)


def resume_run(folder: Path) -> None:
    """Go on with a run from its newest checkpoint; a finished one is left alone."""
    console = Console()
    if not (folder / _CONFIG).is_file():
        raise UserError(f"resume={str(folder)!r} is not the folder of a run: there is no {_CONFIG} in it")
    options = load_config_file(folder / _CONFIG)
    options.setdefault("alpha", options.get("rank") or None)  # left out, it was the rank before it was "matched"
    config = replace(resolve(options), out=str(folder))
    checkpoint = latest_checkpoint(folder)
    progress = read_progress(checkpoint)
    if progress.is_finished:
        console.print(
            f"{folder} is finished: {progress.update} updates; nothing to resume", markup=False, highlight=False
        )
        return
    _set_threads(config)
    run = _prepare(config, folder, load_config(folder / MODEL_CONFIG), console)
    run.progress = load_checkpoint(checkpoint, run.model, run.optimizer)
    if run.progress.corpus != run.corpus.fingerprint:
        raise UserError(
            f"the texts are not those that {folder} was trained on (data={list(config.data)}): restore them, or start "
            "a new run with --init-from"
        )
    # A run that has made no update evaluates again, and writes its first row again.
    truncate_metrics(folder / _METRICS, after_update=run.progress.update or -1)
    console.print(f"resuming {folder} after update {run.progress.update}", markup=False, highlight=False)
    train(run)


def train(run: Run) -> None:
    """Train to the end of the run, and close it."""
    config, optimizer = run.config, run.optimizer
    with View(config.steps, console=run.console) as view, _Interrupts() as interrupts, _metrics_file(run) as metrics:
        loop = _Loop(run, view, metrics)
        if run.progress.update == 0:
            loop.evaluate()
        while optimizer.num_updates < config.steps:
            loop.attempt()
            is_last = optimizer.num_updates == config.steps
            if optimizer.num_updates % config.save_every == 0 or is_last or interrupts.is_stopped:
                _save(run, is_finished=False)
            if interrupts.is_stopped and not is_last:
                view.say(f"stopped; to go on: relora-opt pretrain --resume {run.folder}")
                raise SystemExit(130)
    _close(run)


class _Loop:
    """One attempt after another."""

    def __init__(self, run: Run, view: View, metrics: Any) -> None:
        config = run.config
        self.run, self.view, self.metrics = run, view, metrics
        self.device = next(run.model.parameters()).device
        self.dtype = autocast_dtype(config, self.device)
        self.batches = Batches(run.corpus.train, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed)
        self.accumulate = config.batch_size // config.micro_batch_size
        self.step = run.optimizer.make_step(
            run.model, self._loss, compile=config.compile, accumulate=self.accumulate, skip_nonfinite=True
        )
        self.validation = _validation_set(run.corpus, config).to(self.device)
        self.num_skips = 0

    def attempt(self) -> None:
        """Serve one batch, and do what is due after its update."""
        run, config, optimizer = self.run, self.run.config, self.run.optimizer
        before, phase, start = optimizer.num_updates, _phase(optimizer), time.monotonic()
        batch = self.batches.batch(run.progress.attempts).to(self.device)
        losses = [self.step(part) for part in torch.split(batch, config.micro_batch_size)]
        loss = float(torch.stack(losses).mean())
        seconds = time.monotonic() - start
        run.progress = replace(
            run.progress,
            update=optimizer.num_updates,
            attempts=run.progress.attempts + 1,
            seconds=run.progress.seconds + seconds,
        )
        if optimizer.num_updates == before:
            self._count_skip(loss)
            return
        self.num_skips = 0
        tokens_per_second = batch[:, 1:].numel() / seconds
        row = self._row(phase, loss=loss, tokens_per_second=tokens_per_second)
        is_switch = optimizer.num_updates == config.warm_start and config.rank > 0
        if optimizer.num_updates % config.eval_every == 0 or is_switch or optimizer.num_updates == config.steps:
            row = replace(row, val_loss=self._validate(is_switch=is_switch))
        self._report(row)

    def evaluate(self) -> None:
        """Report the validation loss before training."""
        val_loss = self._validate(is_switch=False)
        self.run.progress = replace(self.run.progress, val_loss_start=val_loss)
        row = self._row(_phase(self.run.optimizer), loss=None, tokens_per_second=None)
        self._report(replace(row, val_loss=val_loss))

    def _loss(self, model: nn.Module, tokens: Tensor) -> Tensor:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    @torch.no_grad()
    def _validate(self, *, is_switch: bool) -> float:
        model = self.run.model.eval()
        parts = torch.split(self.validation, self.run.config.micro_batch_size)
        total = sum(float(self._loss(model, part)) * len(part) for part in parts)
        model.train()
        val_loss = total / len(self.validation)
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
        self.metrics.write(row.to_json() + "\n")
        optimizer = self.run.optimizer
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
def _metrics_file(run: Run) -> Iterator[Any]:
    with open(run.folder / _METRICS, "a", buffering=1, encoding="utf-8") as file:
        yield file


def _prepare(config: Config, folder: Path, shape: LlamaConfig, console: Console) -> Run:
    """Read the texts and build what the loop works on; the model's weights are not set yet."""
    with console.status("reading and tokenizing the texts"):
        corpus = prepare(
            config.data,
            text_field=config.text_field,
            vocab_size=config.vocab_size or shape.vocab_size,
            tokenizer=_tokenizer_file(config, folder),
            seq_len=config.seq_len,
        )
    shape = with_vocabulary(shape, corpus, config)
    device = find_device(config)
    model = Llama(shape).to(device)
    optimizer = make_optimizer(model, config)
    progress = Progress(update=0, attempts=0, seconds=0.0, corpus=corpus.fingerprint)
    return Run(config, folder, console, corpus, model, optimizer, progress)


def _close(run: Run) -> None:
    """Export, draw and say how it went."""
    config, folder, progress = run.config, run.folder, run.progress
    shutil.rmtree(folder / "export", ignore_errors=True)  # of a run that was killed right here
    export = write_export(run.model, run.corpus.tokenizer, folder / "export")
    curves = plot_runs([folder], None)
    _save(run, is_finished=True)
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


def _save(run: Run, *, is_finished: bool) -> None:
    run.progress = replace(run.progress, is_finished=is_finished)
    save_checkpoint(run.folder, run.model, run.optimizer, run.progress, keep=run.config.keep)


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
    _save(run, is_finished=False)


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


def _set_threads(config: Config) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
