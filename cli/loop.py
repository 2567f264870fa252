"""The loop: one attempt after another, and what is due after each update.

    attempt   one batch is served; its update is applied, or skipped where the guard refuses it (relora_opt/guard.py)
    finish    the update is evaluated where that is due, and its row written, logged and shown

Batches are a function of how many were served, so an attempt is counted whether or not its update was applied.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from relora_opt import Guard, Metrics, ReLoRAOptimizer

from .config import Config
from .data import Batches
from .device import autocast_dtype
from .errors import UserError
from .log import Log, numbers
from .loss import batch_loss
from .machine import allow_compilations, compile_options
from .metrics import Phase, Row
from .output import quoted
from .predicted import drawn_sequences
from .report import View
from .run import Run
from .saving import save
from .shard import DenseStep

_WORDS: dict[Phase, str] = {"full_rank": "run", "warm_start": "warm start", "low_rank": "low-rank phase"}


class Loop:
    """One attempt after another."""

    def __init__(self, run: Run, view: View, metrics: Any, log: Log) -> None:
        config = run.config
        self.run, self.view, self.metrics, self.log = run, view, metrics, log
        self.device = next(run.model.parameters()).device
        self.dtype = autocast_dtype(config.dtype, self.device)
        self.batches = Batches(run.corpus.train, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed)
        self.micro_batch_size = min(config.micro_batch_size, config.batch_size // run.processes.size)
        self.accumulate = config.batch_size // run.processes.size // self.micro_batch_size
        self.guard = Guard(config.max_loss_jump, losses=run.progress.losses)
        self.step = self._make_step()
        self.validation = drawn_sequences(run.corpus.val, seq_len=config.seq_len).to(self.device)
        self.compiled: set[str] = set()
        self.unfinished: Row | None = None  # of the update that is made but not reported yet

    def _make_step(self) -> Callable[[Tensor], Tensor]:
        run = self.run
        if run.is_sharded:
            return DenseStep(
                run.optimizer,
                run.model,
                self._loss,
                accumulate=self.accumulate,
                guard=self.guard,
                processes=run.processes,
            )
        if run.config.compile:
            allow_compilations(run.config.warm_start_turns + 1)
        return run.optimizer.make_step(
            run.model,
            self._loss,
            compile=compile_options(run.config),
            accumulate=self.accumulate,
            guard=self.guard,
            autocast=None if self.dtype == torch.float32 else self.dtype,
            process_group=run.processes.group,
        )

    def attempt(self) -> None:
        """Serve one batch, and do what is due after its update."""
        run, optimizer = self.run, self.run.optimizer
        before, phase = optimizer.num_updates, _phase(optimizer)
        optimizer.measures_updates = is_evaluated(run.config, before + 1)
        batch = self.batches.batch(run.progress.attempts)
        loss, seconds = self._train_on(batch, phase)
        if optimizer.num_updates != before:
            tokens_per_second = batch[:, 1:].numel() / seconds
            row = self._row(phase, loss=None, tokens_per_second=tokens_per_second)
            self.unfinished = replace(row, skips=run.progress.skips, skip_reason=run.progress.skip_reason)
        run.progress = replace(
            run.progress,
            update=optimizer.num_updates,
            attempts=run.progress.attempts + 1,
            seconds=run.progress.seconds + seconds,
            skips=0 if self.unfinished else run.progress.skips + 1,
            skip_reason=self.guard.reason,
            losses=tuple(self.guard.losses),
        )
        (loss,) = (total / run.processes.size for total in run.processes.sum(loss))
        if self.unfinished is None:
            self._say_skip(loss)
            return
        self.unfinished = replace(self.unfinished, loss=loss)
        self._finish(self.unfinished)

    def _train_on(self, batch: Tensor, phase: Phase) -> tuple[float, float]:
        """Return the mean loss of this process's share of a batch, and the seconds that it took."""
        step = self._name_of_step(phase)
        compiles = bool(self.run.config.compile) and step not in self.compiled
        if compiles:
            self.view.say(f"compiling the step of the {step}: a minute or two, less where it was done before")
        start = time.monotonic()
        share = self.run.processes.share(batch).to(self.device)
        losses = [self.step(part) for part in torch.split(share, self.micro_batch_size)]
        loss = float(torch.stack(losses).mean())  # waits for the device
        seconds = time.monotonic() - start
        if compiles:
            self.compiled.add(step)
            self.view.say(f"compiled, with its first update, in {seconds:.0f} s")
        return loss, seconds

    def _name_of_step(self, phase: Phase) -> str:
        """Name what is compiled for the coming update: every turn of a warm start has a step of its own."""
        optimizer, turns = self.run.optimizer, self.run.config.warm_start_turns
        turn = optimizer.schedule.turn(optimizer.num_updates + 1) if phase == "warm_start" and turns > 1 else None
        return _WORDS[phase] if turn is None else f"{_WORDS[phase]}, turn {turn + 1} of {turns}"

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
            save(self.run)  # the progress alone

    def report_unfinished(self) -> None:
        """Report an update as far as it is known, for a run that goes on from it; logs wait for its evaluation."""
        row = self.unfinished
        if row is None:
            return
        if not is_evaluated(self.run.config, row.update):
            self._report(row)
            return
        seen = self.run.optimizer.metrics()  # its update is known here alone
        self.metrics.write(replace(row, update_rms=_update_rms(row, seen)).to_json() + "\n")

    def _finish(self, row: Row) -> None:
        """Evaluate after an update where that is due, and report it."""
        config = self.run.config
        if is_evaluated(config, row.update):
            is_last = row.update == config.switch and _is_switch(config, row.update)
            row = replace(row, val_loss=self._validate(is_switch=is_last))
        self._report(row)

    def _loss(self, model: nn.Module, tokens: Tensor) -> Tensor:
        return batch_loss(model, tokens, dtype=self.dtype)

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
        update = self.run.optimizer.num_updates
        self.run.progress = replace(self.run.progress, val_loss=val_loss, val_update=update)
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

    def _say_skip(self, loss: float) -> None:
        """An update that was skipped is said, and too many in a row end the run."""
        config, progress = self.run.config, self.run.progress
        self.view.say(f"update {progress.update + 1} skipped: {progress.skip_reason}")
        if progress.skips >= config.max_skips:
            number = "1 update was" if progress.skips == 1 else f"{progress.skips} updates in a row were"
            remedy = "start again with lower rates"
            if math.isfinite(loss) and loss > self.guard.limit:
                remedy += f", or train on such losses too: --resume {quoted(self.run.folder)} --max-loss-jump inf"
            raise UserError(
                f"{number} skipped, the last one because {progress.skip_reason} "
                f"(lr={config.lr}, rest_lr={config.rest_lr}, max_skips={config.max_skips}): {remedy}"
            )


def is_evaluated(config: Config, update: int) -> bool:
    return update % config.eval_every == 0 or _is_switch(config, update) or update == config.steps


def _is_switch(config: Config, update: int) -> bool:
    """Say whether a warm start ends with this update, or one of its turns."""
    is_within = config.rank > 0 and config.warm_start_at < update <= config.switch
    return is_within and (update - config.warm_start_at) % config.warm_start == 0


def _update_rms(row: Row, seen: Metrics) -> float | None:
    """What an update moved the weights by; of one that was made before the run was resumed, its row knows."""
    return row.update_rms if seen.update_rms is None else seen.update_rms


def _phase(optimizer: ReLoRAOptimizer) -> Phase:
    """The phase of the coming update."""
    if not any(group["rank"] for group in optimizer.param_groups):
        return "full_rank"
    return "warm_start" if optimizer.schedule.is_full_rank(optimizer.num_updates + 1) else "low_rank"
