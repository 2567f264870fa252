"""Which options a run may have: every check of a resolved configuration, before any work is done."""

from __future__ import annotations

import math
from typing import Any

from .config import CHOICES, FIELDS, LOGS, Config
from .errors import UserError

_POSITIVE_COUNTS = (
    *("seq_len", "steps", "batch_size", "micro_batch_size"),
    *("eval_every", "save_every", "keep", "max_skips", "warm_start_turns"),
)
_COUNTS = ("rank", "warmup", "warm_start", "warm_start_at", "restart_every", "restart_warmup")
_MOST_THREADS = 1024  # far more than a step has work for, and than most systems let a process have
_SEEDS = 1 << 63  # what torch's generators take
_MOST_TOKENS = 1 << 31  # in an update, a hundred times as many as anybody trains with
_RATES_FINITE = ("lr", "rest_lr", "factor_lr", "weight_decay")


def check(config: Config, *, has_begun: bool = False) -> None:
    """Refuse values that are impossible, or do not go together.

    Args:
        has_begun: the run has made updates; it may end before the switch or a restart comes, which cannot be moved.

    Raises:
        UserError: names the option, its value and the remedy.
    """
    _check_each(config)
    _check_ranges(config)
    _check_together(config, has_begun=has_begun)
    parse_prune(config.prune)


def _check_each(config: Config) -> None:
    """Refuse texts, counts, rates and choices that are none."""
    for name in FIELDS:
        _check_text(name, getattr(config, name))
    for name in _POSITIVE_COUNTS:
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be a whole number of at least 1")
    for name in _COUNTS:
        if getattr(config, name) < 0:
            raise UserError(f"{name}={getattr(config, name)} must be a whole number, 0 or more")
    for name in _RATES_FINITE:
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{name}={value} must be a finite number, 0 or more")
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise UserError(f"{name}={getattr(config, name)!r} is not known: choose one of {', '.join(choices)}")
    for name in config.log:
        if name not in LOGS:
            raise UserError(f"log={name!r} is not known: choose among {', '.join(LOGS)}")
        if config.log.count(name) > 1:
            raise UserError(f"log={name!r} is given twice: once will do")


def _check_ranges(config: Config) -> None:
    """Refuse numbers that lie outside of their own ranges."""
    is_number = isinstance(config.alpha, float) and math.isfinite(config.alpha) and config.alpha > 0
    if not (config.alpha is None or config.alpha == "matched" or is_number):
        raise UserError(f'alpha={config.alpha} must be a positive number, the scale is alpha / rank, or "matched"')
    if not all(0 <= beta < 1 for beta in config.betas):
        raise UserError(f"betas={config.betas} must lie between 0 and 1, 1 not included")
    if not 0 <= config.min_ratio <= 1:
        raise UserError(f"min_ratio={config.min_ratio} must lie between 0 and 1: it is a share of the peak rate")
    if config.val_share is not None and not 0 < config.val_share <= 0.5:
        raise UserError(f"val_share={config.val_share} must lie above 0 and not above 0.5: it is a share of the texts")
    if not config.max_grad_norm > 0:
        raise UserError(f"max_grad_norm={config.max_grad_norm} must be positive; inf does not clip")
    if not config.max_loss_jump > 0:
        raise UserError(f"max_loss_jump={config.max_loss_jump} must be positive; inf skips no loss that is finite")


def _check_together(config: Config, *, has_begun: bool) -> None:
    """Refuse lengths, batches and sizes that do not go together, or are more than any machine has."""
    if config.warmup > config.steps:
        remedy = "give at least so many steps" if has_begun else "shorten it"
        raise UserError(f"warmup={config.warmup} is longer than the run, steps={config.steps}: {remedy}")
    if 0 < config.restart_every < config.restart_warmup:
        raise UserError(
            f"restart_warmup={config.restart_warmup} is longer than restart_every={config.restart_every}: "
            "the rate would never recover; shorten the ramp"
        )
    if config.rank > 0 and not has_begun:
        _check_cycles(config)
    if config.batch_size % config.micro_batch_size:
        raise UserError(
            f"micro_batch_size={config.micro_batch_size} must divide batch_size={config.batch_size}, so that every "
            "update sees as many sequences"
        )
    for name in ("threads", "keep_every"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be a whole number of at least 1")
    if not has_begun:
        check_kept(config)
    if config.threads is not None and config.threads > _MOST_THREADS:
        raise UserError(f"threads={config.threads} must be at most {_MOST_THREADS}: give as many as there are cores")
    if not 0 <= config.seed < _SEEDS:
        raise UserError(f"seed={config.seed} must be a whole number, at least 0 and below 2^63: choose another")
    if config.batch_size * config.seq_len > _MOST_TOKENS:
        raise UserError(
            f"batch_size={config.batch_size} sequences of seq_len={config.seq_len} tokens are more than "
            f"{_MOST_TOKENS:,} tokens in an update: give fewer"
        )
    if config.vocab_size is not None and config.vocab_size < 257:
        raise UserError(f"vocab_size={config.vocab_size} must be at least 257: 256 bytes and the end of text")


def _check_text(name: str, value: Any) -> None:
    """Refuse what config.toml cannot say: a path of bytes that are no UTF-8 comes as text with surrogates."""
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{name}={text!r} is not UTF-8: rename the file or folder") from error


def _check_cycles(config: Config) -> None:
    """Refuse a run that would end before what it asks for begins."""
    for name, usual in (("warm_start_at", 0), ("warm_start_turns", 1)):
        if getattr(config, name) != usual and not config.warm_start:
            raise UserError(f"{name}={getattr(config, name)} of no warm start: say how long, warm_start")
    every, switch = config.restart_every, config.switch
    if switch >= config.steps:
        place = f" at {config.warm_start_at}" if config.warm_start_at else ""
        place += f" in {config.warm_start_turns} turns" if config.warm_start_turns > 1 else ""
        raise UserError(
            f"warm_start={config.warm_start}{place} leaves no low-rank update in steps={config.steps}: shorten it, or "
            "give rank 0 to train at full rank"
        )
    if (config.warm_start_at > 0 or config.warm_start_turns > 1) and config.warm_start < config.restart_warmup:
        raise UserError(
            f"restart_warmup={config.restart_warmup} is longer than warm_start={config.warm_start}, in which the rate "
            "would never recover; shorten the ramp"
        )
    first = every if every < config.warm_start_at else switch + every
    if every > 0 and first > config.steps:
        apart = ", but for those that end a warm start," if config.warm_start_at or config.warm_start_turns > 1 else ""
        raise UserError(
            f"restart_every={config.restart_every} puts the first restart{apart} after update {first}, beyond "
            f"steps={config.steps}: shorten it, or give 0 for no restart"
        )


def check_kept(config: Config) -> None:
    """Refuse to keep checkpoints of updates that have none."""
    if config.keep_every is not None and config.keep_every % config.save_every:
        raise UserError(
            f"keep_every={config.keep_every} is no multiple of save_every={config.save_every}, so that updates to keep "
            "have no checkpoint: give a multiple, or a save_every that divides it"
        )


def parse_prune(text: str) -> tuple[str, float | None]:
    """Read "reset", "keep", "magnitude:0.9" or "random:0.99" as (name, ratio)."""
    name, _, ratio = text.partition(":")
    if name in ("reset", "keep") and not ratio:
        return name, None
    try:
        share = float(ratio)
    except ValueError:
        share = math.nan
    if name in ("magnitude", "random") and 0 <= share <= 1:
        return name, share
    raise UserError(f"prune={text!r} is not known: reset, keep, magnitude:0.9 or random:0.99, with a share of 0 to 1")
