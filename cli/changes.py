"""What of a run's settings may change when it goes on, and what that means.

nothing changes for the training    evaluation, saving, logging, the places of the texts (their contents are checked)
the last bits may change            device, threads, compile and the like: sums are taken in another order
the rates change from there on      steps: schedules end where the run ends
refused                             all else, seed and lr and rank among it: that would be another run
"""

from __future__ import annotations

from dataclasses import replace

from .build import make_schedule
from .config import FIELDS, Config
from .counted import counted
from .errors import UserError

_FREE = (
    *("eval_every", "save_every", "keep", "keep_every", "max_loss_jump", "max_skips", "log"),
    *("data", "text_field", "allow_lossy"),
)
_ROUNDING = ("device", "threads", "compile", "cuda_graphs", "micro_batch_size", "shard", "checkpoint_activations")
_UNSEEN = ("out", "tokens")  # a folder may be moved; steps say it already


def settled(before: Config, after: Config) -> Config:
    """Return the settings with those that are left open as they were settled when the run began (machine.py)."""
    return replace(
        after,
        dtype=before.dtype if after.dtype == "auto" else after.dtype,
        compile=before.compile if after.compile is None else after.compile,
        threads=before.threads if after.threads is None else after.threads,
    )


def changes(before: Config, after: Config, *, update: int) -> list[str]:
    """Return a line for each setting that has changed since a checkpoint.

    Args:
        before: the settings with which the checkpoint was made.
        after: those with which its run is to go on.
        update: the checkpoint's.

    Raises:
        UserError: for a setting that may not change, or fewer steps than were made.
    """
    names = [name for name in FIELDS if name not in _UNSEEN and getattr(before, name) != getattr(after, name)]
    for name in names:
        if name not in (*_FREE, *_ROUNDING, "steps"):
            raise UserError(
                f"{name}={getattr(after, name)!r}, but {after.out} was trained with {getattr(before, name)!r}: go on "
                "with that, or start a new run"
            )
    if after.steps < update:
        raise UserError(
            f"steps={after.steps}, but {after.out} has made {counted(update, 'update')}: give at least as many"
        )
    return [_line(name, before, after, update) for name in names]


def _line(name: str, before: Config, after: Config, update: int) -> str:
    line = f"{name}: {_shown(getattr(before, name))} -> {_shown(getattr(after, name))}"
    if name == "steps":
        rates = [_rate(config, update + 1) for config in (before, after)]
        return f"{line}; the rate of update {update + 1} is {rates[1]:.3g}, and was to be {rates[0]:.3g}"
    if name in _ROUNDING:
        return f"{line}; sums may round differently: equal to the run so far, but not in the last bits"
    return line


def _rate(config: Config, update: int) -> float:
    """Return the rate of the selected weights, or of their factors, as the optimizer has it and metrics.jsonl says."""
    if config.rank == 0:  # there is no restart, and no ramp
        return config.lr * make_schedule(config)(update, last_restart=0)
    schedule = make_schedule(config)
    return config.lr * schedule(update) * (1.0 if schedule.turn(update) == 0 else config.factor_lr)


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else "none" if value is None else str(value)
