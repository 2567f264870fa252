"""One clock: when the warm start ends, when a cycle restarts, and what multiplies the learning rate.

Updates are counted u = 1, 2, ... With R the last restart before u, or switch to full or to low rank, and k = u - R:

    multiplier(u) = k / restart_warmup * outer(R + restart_warmup)    for k < restart_warmup, if there is an R (ramp)
    multiplier(u) = outer(u)                                          otherwise

This is the paper's jagged cosine (Lialin et al. 2023, arXiv 2307.05695, section 3) for any outer schedule. The outer
schedules are plain callables u -> multiplier; any picklable callable of one's own serves.

This file does not know optimizers: it neither holds a counter nor sets a rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import SupportsFloat

OuterSchedule = Callable[[int], float]


@dataclass(frozen=True)
class _Decay:
    """Linear warm-up over `warmup` updates, then `shape` falls from 1 to 0 over the rest, scaled onto [min_ratio,
    1]."""

    num_updates: int
    warmup: int
    min_ratio: float
    shape: Callable[[float], float]

    def __post_init__(self) -> None:
        if not _is_number(self.num_updates) or self.num_updates < 1:
            raise ValueError(
                f"num_updates={self.num_updates!r} must be a number, at least 1: give the length of the whole run"
            )
        if not _is_number(self.warmup) or not 0 <= self.warmup <= self.num_updates:
            raise ValueError(
                f"warmup={self.warmup!r} must be a number of updates and lie between 0 and num_updates="
                f"{self.num_updates}"
            )
        if not _is_number(self.min_ratio) or not 0.0 <= self.min_ratio <= 1.0:
            raise ValueError(
                f"min_ratio={self.min_ratio!r} must be a number between 0 and 1: it is a share of the peak rate"
            )

    def __call__(self, update: int) -> float:
        if update <= self.warmup and self.warmup > 0:
            return update / self.warmup
        if update >= self.num_updates:
            return self.min_ratio
        progress = (update - self.warmup) / (self.num_updates - self.warmup)
        return self.min_ratio + (1 - self.min_ratio) * self.shape(progress)


def constant(warmup: int = 0) -> OuterSchedule:
    """Return the schedule that stays at 1, after a linear warm-up of `warmup` updates."""
    if not _is_number(warmup) or warmup < 0:
        raise ValueError(f"warmup={warmup!r} must be a number of updates, 0 or more: 0 means no warm-up")
    return partial(_constant, warmup)


def cosine(num_updates: int, warmup: int = 0, min_ratio: float = 0.0) -> OuterSchedule:
    """Return half a cosine from 1 after `warmup` to `min_ratio` at `num_updates`, and `min_ratio` from there on.

    >>> schedule = cosine(100, warmup=10, min_ratio=0.1)
    >>> schedule(5), schedule(10), schedule(55), schedule(100)
    (0.5, 1.0, 0.55, 0.1)
    """
    return _Decay(num_updates, warmup, min_ratio, _half_cosine)


def linear(num_updates: int, warmup: int = 0, min_ratio: float = 0.0) -> OuterSchedule:
    """Return a straight line from 1 after `warmup` to `min_ratio` at `num_updates`."""
    return _Decay(num_updates, warmup, min_ratio, _line)


def wsd(num_updates: int, warmup: int = 0, min_ratio: float = 0.0, decay: float = 0.2) -> OuterSchedule:
    """Return warmup-stable-decay: 1 after `warmup`, and a straight line to `min_ratio` over the last share `decay`."""
    if not _is_number(decay) or not 0.0 < decay <= 1.0:
        raise ValueError(
            f"decay={decay!r} must be a number above 0 and at most at 1: it is the share of updates that decays"
        )
    return _Decay(num_updates, warmup, min_ratio, partial(_plateau, decay))


@dataclass(frozen=True)
class JaggedSchedule:
    """The clock of ReLoRA.

    Args:
        restart_every: updates in a cycle; 0 means no restart (plain LoRA).
        restart_warmup: updates over which the rate climbs back from 0 after a restart or a switch.
        warm_start: updates of full-rank training.
        outer: the schedule that the ramps are cut out of, u -> multiplier.
        warm_start_at: updates of low rank before the warm start; 0, as in the paper, puts it first. The cycle that it
            cuts off begins anew after it.
        warm_start_turns: in how many turns the low-rank weights have their warm start: the first part of them, in the
            order of the groups and in these of the model, for `warm_start` updates, then the next, of as many weights,
            while the others are low-rank. So only one part at a time has gradients and optimizer state of its own size.

    Raises:
        ValueError: for a negative count, a ramp longer than its cycle, a place or turns for no warm start, or an outer
            schedule that starts with no number.

    >>> schedule = JaggedSchedule(restart_every=100, restart_warmup=10, warm_start=50)
    >>> schedule(50), schedule(55), schedule(60), schedule(155)
    (1.0, 0.5, 1.0, 0.5)
    >>> schedule.switches_after(50), schedule.restarts_after(50), schedule.restarts_after(150)
    (True, False, True)
    """

    restart_every: int
    restart_warmup: int = 0
    warm_start: int = 0
    outer: OuterSchedule = field(default_factory=constant)
    warm_start_at: int = 0
    warm_start_turns: int = 1

    def __post_init__(self) -> None:
        for name in ("restart_every", "restart_warmup", "warm_start", "warm_start_at"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r} must be a whole number of updates, 0 or more")
        turns = self.warm_start_turns
        if isinstance(turns, bool) or not isinstance(turns, int) or turns < 1:
            raise ValueError(f"warm_start_turns={turns!r} must be a whole number, 1 or more: 1 is all weights together")
        if 0 < self.restart_every < self.restart_warmup:
            raise ValueError(
                f"restart_warmup={self.restart_warmup} is longer than restart_every={self.restart_every}: "
                "the rate would never recover; shorten the ramp"
            )
        if self.warm_start_at and not self.warm_start:
            raise ValueError(f"warm_start_at={self.warm_start_at} of no warm start: say how long with warm_start")
        if turns > 1 and not self.warm_start:
            raise ValueError(f"warm_start_turns={turns} of no warm start: say how long each is with warm_start")
        if (self.warm_start_at > 0 or turns > 1) and self.warm_start < self.restart_warmup:
            raise ValueError(
                f"restart_warmup={self.restart_warmup} is longer than warm_start={self.warm_start}, in which the rate "
                "would never recover; shorten the ramp"
            )
        if not callable(self.outer):
            raise TypeError(f"outer={self.outer!r} must be callable, update -> multiplier: cosine(20_000), say")
        first = self.outer(1)
        if not isinstance(first, SupportsFloat):
            raise TypeError(
                f"outer={self.outer!r} gave a {type(first).__name__} for update 1 and no multiplier: give a schedule, "
                "cosine(20_000) say, and not what makes one"
            )
        _check_multiplier(first, 1)

    def __call__(self, update: int, last_restart: int | None = None, *, num_restarts: int = 0) -> float:
        """Return the multiplier of update u = 1, 2, ...

        `last_restart` is the last restart or switch before u; left out, the periodic one. 0 means none, unless there
        were `num_restarts` of them: then it is one by hand before the first update, which is followed by a ramp too.
        """
        start = self._cycle_start(update) if last_restart is None else last_restart
        since = update - start
        ramps = (start > 0 or num_restarts > 0) and since < self.restart_warmup
        outer = float(self.outer(start + self.restart_warmup if ramps else update))  # which may give a tensor
        value = since / self.restart_warmup * outer if ramps else outer
        _check_multiplier(value, update)
        return value

    @property
    def switch(self) -> int:
        """The last update of the warm start; 0 where there is none."""
        return self.warm_start_at + self.warm_start_turns * self.warm_start

    @property
    def place(self) -> str:
        """The warm start's length and place, for messages."""
        at = f" at {self.warm_start_at}" if self.warm_start_at else ""
        turns = f" in {self.warm_start_turns} turns" if self.warm_start_turns > 1 else ""
        return f"warm_start={self.warm_start}{at}{turns}"

    def turn(self, update: int) -> int | None:
        """Return the turn of the warm start, 0, 1, ..., that this update is one of; None outside it."""
        is_within = self.warm_start_at < update <= self.switch
        return (update - 1 - self.warm_start_at) // self.warm_start if is_within else None

    def is_full_rank(self, update: int) -> bool:
        """Say whether this update is one of the warm start, of the weights whose turn it is."""
        return self.turn(update) is not None

    def switches_after(self, update: int) -> bool:
        """Say whether the warm start ends with this update (a first switch is not counted as a restart)."""
        return update == self.switch > 0

    def changes_after(self, update: int) -> bool:
        """Say whether some weights change between low and full rank after this update."""
        return update > 0 and self.turn(update) != self.turn(update + 1)

    def restarts_after(self, update: int) -> bool:
        """Say whether a cycle ends with this update: u = k * restart_every before the warm start, k = 1, 2, ...

        Or u = switch + k * restart_every after it.
        """
        return update > 0 and self.next_restart(update - 1) == update

    def next_restart(self, update: int) -> int | None:
        """Return the first update after `update` that a restart follows, or None where there is none."""
        if self.restart_every == 0:
            return None
        coming = (max(0, update) // self.restart_every + 1) * self.restart_every
        if coming < self.warm_start_at:
            return coming
        cycles = max(0, update - self.switch) // self.restart_every + 1
        return self.switch + cycles * self.restart_every

    def _cycle_start(self, update: int) -> int:
        """Return the last restart or switch before an update of the periodic clock."""
        turn = self.turn(update)
        if turn is not None:
            return self.warm_start_at + turn * self.warm_start
        start = self.switch if update > self.switch else 0
        cycles = (update - 1 - start) // self.restart_every if self.restart_every else 0
        return start + cycles * self.restart_every


def _check_multiplier(value: SupportsFloat, update: int) -> None:
    if not (math.isfinite(value) and float(value) >= 0.0):
        raise ValueError(f"outer gave the multiplier {value} around update {update}: it must be finite, 0 or more")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _constant(warmup: int, update: int) -> float:
    return update / warmup if update < warmup else 1.0


def _half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _line(progress: float) -> float:
    return 1 - progress


def _plateau(decay: float, progress: float) -> float:
    return min(1.0, (1 - progress) / decay)
