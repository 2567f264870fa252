"""What a restart may do, when it pays, where A may point and how far a step may go; and the paper's ablation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from relora_opt_cli.config_file import load_config_file
from relora_opt_cli.model import PRESETS

from .convergence import SIZES, Spec
from .grids import MATCHED, SEEDS, STEPS


def variants() -> list[Spec]:
    """What a restart may do, where A may point, how far a step may go: a sixteenth of the width, 2000 updates."""
    common: dict[str, Any] = {"lr": 2e-3, "rest_lr": 8e-3, "rank": 8}
    cycle: dict[str, Any] = {"restart_every": 400}
    short: dict[str, Any] = {"restart_every": 100}
    ramped: dict[str, Any] = {**cycle, "restart_warmup": 40}
    trials: dict[str, dict[str, Any]] = {
        "no restart": {},
        "restarts": ramped,
        "restarts, state carried, no ramp": {**cycle, "state": "carry"},
        "restarts, A by gradient, state carried, no ramp": {**cycle, "state": "carry", "init": "gradient"},
        "restarts every 100, state carried, no ramp": {**short, "state": "carry"},
        "restarts every 100, A by gradient, state carried, no ramp": {**short, "state": "carry", "init": "gradient"},
        "restarts, state projected, no ramp": {**cycle, "state": "project"},
        "restarts, A by gradient": {**ramped, "init": "gradient"},
        "restarts, staggered, state carried, no ramp": {**cycle, "staggered": True, "state": "carry"},
        "no restart, A by gradient": {"init": "gradient"},
        "restarts, adaptive": {"restart_every": 200, "restart_warmup": 40, "adaptive": 0.5},
        "restarts, staggered": {**ramped, "staggered": True},
        "restarts without ramp": cycle,
        "restarts, state kept, no ramp": {**cycle, "state": "keep"},
        "no restart, A fixed": {"a_rate": 0.0},
        "no restart, A's rate x 0.3": {"a_rate": 0.3},
        "no restart, balanced rates": {"balanced": True},
        "no restart, decay of W 0.1": {"decay": 0.1},
        "warm start, no restart": {"warm_start": 200, "restart_warmup": 40},
        "warm start, A by gradient": {"warm_start": 200, "restart_warmup": 40, "init": "gradient"},
        "warm start, A by moment": {"warm_start": 200, "restart_warmup": 40, "init": "moment"},
        "warm start, A by update": {"warm_start": 200, "restart_warmup": 40, "init": "update"},
    }
    return [
        Spec("full-rank AdamW", "full", {"lr": 2e-3, "rest_lr": 8e-3}, "w128", "botocore", 2000, 0),
        *(Spec(name, "variant", {**common, **own}, "w128", "botocore", 2000, 0) for name, own in trials.items()),
    ]


def cycles() -> list[Spec]:
    """How long a cycle may be when nothing is lost at a restart: a sixteenth of the width, 1000 updates, both bases."""
    carried: dict[str, Any] = {"state": "carry"}
    trials: dict[str, dict[str, Any]] = {
        "no restart": {},
        "restarts every 100, state carried": {**carried, "restart_every": 100},
        "restarts every 25, state carried": {**carried, "restart_every": 25},
        "restarts every 100, A by gradient, state carried": {**carried, "restart_every": 100, "init": "gradient"},
        "restarts every 250, state carried": {**carried, "restart_every": 250},
    }
    bases: dict[str, dict[str, Any]] = {"Muon": {"lr": 4e-3, "base": "muon"}, "Adam": {"lr": 2e-3}}
    return [
        Spec(
            f"{base}, rank 8, {name}",
            "variant",
            {"rest_lr": 8e-3, "rank": 8, **own, **of_base},
            "w128",
            "sotu",
            STEPS,
            0,
        )
        for name, own in trials.items()
        for base, of_base in bases.items()
    ]


def leaks() -> list[Spec]:
    """B forgets a little at every update, instead of everything at a restart; B that does not start at zero."""
    trials: dict[str, dict[str, Any]] = {
        "leak 0.005": {"leak": 0.005},
        "leak 0.02": {"leak": 0.02},
        "B orthonormal": {"b_init": "orthogonal"},
        "leak 0.001": {"leak": 0.001},
        "B orthonormal, restarts every 100, state carried": {
            "b_init": "orthogonal",
            "restart_every": 100,
            "state": "carry",
        },
        "leak 0.1": {"leak": 0.1},
    }
    return [
        Spec(
            f"Adam, rank {rank}, {name}",
            "variant",
            {"rest_lr": 8e-3, "rank": rank, **own, "lr": 2e-3},
            "w128",
            "sotu",
            STEPS,
            0,
        )
        for name, own in trials.items()
        for rank in (8, 32)
    ]


def long() -> list[Spec]:
    """Long enough for a sixteenth of the width to be too little? Four times the updates of the grids."""
    carried: dict[str, Any] = {"state": "carry"}
    trials: list[tuple[str, dict[str, Any]]] = [
        ("no restart", {}),
        ("restarts every 1000, state carried", {"restart_every": 1000, **carried}),
        ("leak 0.002", {"leak": 0.002}),
        ("restarts every 1000", {"restart_every": 1000, "restart_warmup": 50}),
        ("leak 0.005", {"leak": 0.005}),
        ("restarts every 500, state carried", {"restart_every": 500, **carried}),
        ("leak 0.01", {"leak": 0.01}),
        ("restarts every 250, state carried", {"restart_every": 250, **carried}),
        ("no restart", {"lr": 2.8e-3}),
        ("restarts every 500, state carried", {"restart_every": 500, **carried, "lr": 2.8e-3}),
        ("no restart", {"lr": 1.4e-3}),
    ]
    ours: list[tuple[str, dict[str, Any]]] = [
        ("every 500", {"restart_every": 500, "restart_warmup": 25}),
        ("every 500, state kept, no ramp", {"restart_every": 500, "prune": "keep"}),
        ("every 250", {"restart_every": 250, "restart_warmup": 25}),
        ("every 500, ramp of 100", {"restart_every": 500, "restart_warmup": 100}),
    ]
    place = ("w128", "botocore", 4 * STEPS, 0)
    common: dict[str, Any] = {"rest_lr": 8e-3, "rank": 8, "lr": 2e-3}
    return [
        Spec("full-rank AdamW", "full", {"lr": 2e-3, "rest_lr": 8e-3}, *place),
        *(Spec(f"ReLoRA, rank 8, {name}", "relora", {**MATCHED, **common, **own}, *place) for name, own in ours),
        *(Spec(f"Adam, rank 8, {name}", "variant", {**common, **own}, *place) for name, own in trials),
    ]


def restarts() -> list[Spec]:
    """Do restarts earn their place, and from which length on? A sixteenth of the width, seeds not seen by `long`."""
    trials: list[tuple[str, dict[str, Any]]] = [
        ("LoRA, rank 8", {}),
        ("ReLoRA, rank 8, every 500", {"restart_every": 500, "restart_warmup": 25}),
    ]
    common: dict[str, Any] = {**MATCHED, "rank": 8, "lr": 2e-3, "rest_lr": 8e-3}
    return [
        Spec(name, "relora", {**common, **own}, "w128", "botocore", length * STEPS, seed)
        for length in (4, 2, 1, 8)
        for seed in SEEDS
        for name, own in trials
    ]


def short_cycles() -> list[Spec]:
    """How short a cycle may be where a restart loses nothing, what must be kept; and one seed's leads at others."""
    carried: dict[str, Any] = {"state": "carry"}
    trials: list[tuple[str, int, tuple[int, ...], dict[str, Any]]] = [
        ("every 100, state kept", 2, (0,), {"restart_every": 100, "state": "keep"}),
        ("every 50, state carried", 2, (0,), {"restart_every": 50, **carried}),
        ("every 100, scale kept", 2, (0,), {"restart_every": 100, "state": "scale"}),
        ("every 100, state carried", 4, (0,), {"restart_every": 100, **carried}),
        ("every 100, state carried", 2, SEEDS, {"restart_every": 100, **carried}),
        ("every 100, reset, ramp of 10", 2, (0,), {"restart_every": 100, "restart_warmup": 10}),
        ("every 400, half of B A kept, no ramp", 2, (0,), {"restart_every": 400, "kept": 0.5}),
        ("every 100, half of B A kept, ramp of 10", 2, (0,), {"restart_every": 100, "restart_warmup": 10, "kept": 0.5}),
        ("adaptive", 2, SEEDS, {"restart_every": 200, "restart_warmup": 40, "adaptive": 0.5}),
    ]
    common: dict[str, Any] = {"lr": 2e-3, "rest_lr": 8e-3, "rank": 8}
    pruned = {**MATCHED, **common, "restart_every": 500, "restart_warmup": 25}
    return [
        Spec(f"Adam, rank 8, {name}", "variant", {**common, **own}, "w128", "botocore", length * STEPS, seed)
        for name, length, seeds, own in trials
        for seed in seeds
    ] + [
        Spec(
            f"ReLoRA, rank 8, every 500, {how}", "relora", {**pruned, "prune": how}, "w128", "botocore", 2 * STEPS, seed
        )
        for seed in SEEDS
        for how in ("magnitude:0.9", "random:0.9")
    ]


def restarts_large() -> list[Spec]:
    """The same at width 256, again a sixteenth of the width: is the length the same from which on restarts pay?"""
    common: dict[str, Any] = {**MATCHED, "rank": 16, "lr": 1e-3, "rest_lr": 16e-3}
    return [
        Spec(name, "relora", {**common, **own}, "w256", "botocore", length * STEPS, seed)
        for length in (2, 4)
        for seed in SEEDS
        for name, own in (
            ("LoRA, rank 16", {}),
            ("ReLoRA, rank 16, every 500", {"restart_every": 500, "restart_warmup": 25}),
        )
    ]


def longer() -> list[Spec]:
    """Does low rank keep up in runs four times as long as those that confirmed it? A quarter and an eighth of 256."""
    quarter: dict[str, Any] = {"lr": 7e-4, **MATCHED, "rank": 64}
    eighth: dict[str, Any] = {"lr": 1e-3, **MATCHED, "rank": 32}
    cycle: dict[str, Any] = {"restart_every": 500, "restart_warmup": 25}
    trials: list[tuple[str, str, dict[str, Any]]] = [
        ("full-rank AdamW", "full", {"lr": 1e-3}),
        ("ReLoRA, rank 64, every 500", "relora", {**quarter, **cycle}),
        ("LoRA, rank 64", "relora", quarter),
        ("ReLoRA, rank 32, every 500", "relora", {**eighth, **cycle}),
        ("LoRA, rank 32", "relora", eighth),
    ]
    return [
        Spec(name, method, {"rest_lr": 16e-3, **own}, "w256", "botocore", 4 * STEPS, seed)
        for seed in SEEDS
        for name, method, own in trials
    ]


def longer_wide() -> list[Spec]:
    """And at width 512, where an eighth of the width did not end behind after 1000 updates; and with Muon."""
    wide: dict[str, Any] = {"lr": 5e-4, **MATCHED}
    cycle: dict[str, Any] = {"restart_every": 500, "restart_warmup": 25}
    full = ("full-rank AdamW", "full", {"lr": 5e-4, "rest_lr": 32e-3})
    quarter = ("LoRA, rank 128", "relora", {**wide, "rank": 128})
    eighth = ("LoRA, rank 64", "relora", {**wide, "rank": 64})
    trials: list[tuple[str, str, dict[str, Any], str, str]] = [
        ("LoRA, Muon, rank 64", "relora", {**MATCHED, "base": "muon", "lr": 2e-3, "rank": 64}, "w256", "botocore"),
        *((*trial, "w512", text) for text in ("botocore", "python") for trial in (full, quarter, eighth)),
        ("LoRA, rank 32", "relora", {**wide, "rank": 32}, "w512", "botocore"),
        ("ReLoRA, rank 32, every 500", "relora", {**wide, **cycle, "rank": 32}, "w512", "botocore"),
        ("LoRA, Muon, rank 128", "relora", {**MATCHED, "base": "muon", "lr": 1e-3, "rank": 128}, "w512", "botocore"),
    ]
    return [
        Spec(name, method, {"rest_lr": 16e-3, **own}, size, text, 4 * STEPS, seed)
        for name, method, own, size, text in trials
        for seed in SEEDS
    ]


def early_restarts() -> list[Spec]:
    """Do restarts pay that end halfway, while the rate is high? `longer` has those up to the end."""
    cycle = {"restart_every": 500, "restart_warmup": 25, "restart_until": 2000}
    settings: dict[str, Any] = {**MATCHED, "rank": 64, "lr": 7e-4, "rest_lr": 16e-3, **cycle}
    name = "ReLoRA, rank 64, every 500 until 2000"
    return [Spec(name, "relora", settings, "w256", "botocore", 4 * STEPS, seed) for seed in SEEDS[:2]]


def ablation() -> list[Spec]:
    """The paper's Table 6 from its recipes, every length scaled to this run's and the rank to this width."""
    return [
        Spec(name, "relora", {**settings, "lr": 2e-3, "rest_lr": 8e-3}, "w128", "sotu", STEPS, seed)
        for name, settings in table_6().items()
        for seed in SEEDS
    ] + [Spec("full-rank AdamW", "full", {"lr": 2e-3, "rest_lr": 8e-3}, "w128", "sotu", STEPS, seed) for seed in SEEDS]


def table_6() -> dict[str, dict[str, Any]]:
    """Return the settings of every low-rank row of the paper's ablation, from recipes/, at this size."""
    recipes = Path(__file__).resolve().parents[1] / "recipes"
    found = {}
    for path in sorted(recipes.glob("ablation-*.toml")):
        recipe = load_config_file(path)
        if recipe["rank"]:
            rank = round(recipe["rank"] * SIZES["w128"].width / PRESETS[recipe["preset"]].hidden_size)
            lengths = {
                key: round(recipe[key] * STEPS / recipe["steps"])
                for key in ("warm_start", "restart_every", "restart_warmup")
            }
            alpha = recipe["alpha"] / recipe["rank"] * rank
            own = {key: recipe[key] for key in ("init", "prune", "factor_lr")}
            found[path.stem] = {"rank": rank, "alpha": alpha, **lengths, **own}
    return found
