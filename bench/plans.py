"""Which runs there are to make: tuning grids, and confirmations of what they found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .convergence import Spec

Plan = Callable[[], list[Spec]]


def tune() -> list[Spec]:
    """Full rank over (matrix rate, rest rate)."""
    return [_small("full", "full", lr=lr, rest_lr=rest_lr) for rest_lr in (8e-3,) for lr in (2e-3,)]


def _small(name: str, method: str, *, steps: int = 1000, seed: int = 0, text: str = "sotu", **settings: Any) -> Spec:
    return Spec(name, method, settings, "w128", text, steps, seed)


def try_out() -> list[Spec]:
    common: dict[str, Any] = {"lr": 2e-3, "rest_lr": 8e-3, "rank": 32}
    return [
        _small("x", "full", lr=2e-3, rest_lr=8e-3, steps=40),
        _small("x", "muon", lr=2e-3, rest_lr=8e-3, steps=40),
        _small("x", "relora", alpha="matched", init="gradient", steps=40, **common),
        _small("x", "peft", alpha=32, restart_every=20, restart_warmup=2, steps=40, **common),
        _small("x", "galore", update_proj_gap=20, scale=0.25, steps=40, **common),
        _small("x", "apollo", update_proj_gap=20, scale=1.0, steps=40, **common),
    ]


PLANS: dict[str, Plan] = {"tune": tune, "try": try_out}
