"""Where a training loop is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_type_hints

from relora_opt import Guard


@dataclass(frozen=True)
class Progress:
    """Where a training loop is.

    Args:
        update: updates applied.
        attempts: batches served, and so the place in the data; more than updates where some were skipped.
        seconds: time spent in updates.
        val_loss_start: validation loss before training, nats per token.
        val_loss_switch: the same after the warm start; None before it or without one.
        val_loss: the latest; and
        val_update: the update after which it was measured; None where nobody has noted it, as of older runs.
        is_finished: whether the run has reached its end.
        corpus: fingerprint of the texts that it trains on.
        skips: updates skipped in a row, up to now.
        skip_reason: why the last of them was; None where there is none.
        losses: what the guard knows, see `relora_opt.Guard`.
    """

    update: int
    attempts: int
    seconds: float
    val_loss_start: float | None = None
    val_loss_switch: float | None = None
    val_loss: float | None = None
    is_finished: bool = False
    corpus: str = ""
    skips: int = 0
    skip_reason: str | None = None
    losses: tuple[float, ...] = ()
    val_update: int | None = None


def progress_of(values: Any) -> Progress:
    """Return the progress that these values are.

    Raises:
        TypeError, ValueError: for values that no loop has.
    """
    progress = Progress(**dict(values))
    kinds = {**get_type_hints(Progress), "losses": tuple}
    for name, kind in kinds.items():
        value = getattr(progress, name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{name}={value!r} is not {kind}")
        if isinstance(value, int) and value < 0:
            raise ValueError(f"{name}={value} is negative")
    Guard(losses=progress.losses)
    return progress
