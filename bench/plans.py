"""Which runs there are to make, by the name that `python -m bench.convergence run` knows them by."""

from __future__ import annotations

from collections.abc import Callable

from . import grids, restarts
from .convergence import Spec

Plan = Callable[[], list[Spec]]

PLANS: dict[str, Plan] = {
    "tune-full": grids.tune_full,
    "tune-ours": grids.tune_ours,
    "tune-muon": grids.tune_muon,
    "tune-rivals": grids.tune_rivals,
    "tune-eighth": grids.tune_eighth,
    "ranks": grids.ranks,
    "balance": grids.balance,
    "variants": restarts.variants,
    "cycles": restarts.cycles,
    "leaks": restarts.leaks,
    "long": restarts.long,
    "restarts": restarts.restarts,
    "short-cycles": restarts.short_cycles,
    "restarts-large": restarts.restarts_large,
    "longer": restarts.longer,
    "longer-wide": restarts.longer_wide,
    "early-restarts": restarts.early_restarts,
    "confirm": grids.confirm,
    "confirm-rivals": grids.confirm_rivals,
    "tune-large": grids.tune_large,
    "tune-unit": grids.tune_unit,
    "confirm-unit": grids.confirm_unit,
    "confirm-large": grids.confirm_large,
    "tune-wide": grids.tune_wide,
    "confirm-wide": grids.confirm_wide,
    "ablation": restarts.ablation,
    "default-run": grids.default_run,
    "carry-over": grids.carry_over,
}
