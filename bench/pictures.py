"""Pictures of the convergence runs: what every method reaches, and what a restart does to the loss around it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .convergence import Spec
from .report import FULL, Result, best_of_each, results, rows

_BEFORE, _AFTER = 30, 120  # updates around a restart
_SMOOTH = 5


def draw_methods(path: Path, place: tuple[str, str, int]) -> bool:
    """Draw the best settings of every method in a place, a dot a seed; False where fewer than two methods ran there."""
    ordered = best_of_each([row for row in rows() if row.place == place])[::-1]
    if len(ordered) < 2:
        return False
    figure, axes = plt.subplots(figsize=(9, 0.3 * len(ordered) + 1.6), layout="constrained")
    for y, row in enumerate(ordered):
        is_full, losses = row.name == FULL, list(row.by_seed.values())
        axes.plot(losses, [y] * len(losses), "o", color="#c2410c" if is_full else "#1d4ed8", alpha=0.5)
        axes.plot([row.mean], [y], "|", color="black", markersize=16)
        if is_full:
            axes.axvline(row.mean, color="#c2410c", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(ordered)), [row.name for row in ordered])
    size, text, steps = place
    axes.set_xlabel("validation loss, nats per token")
    figure.suptitle(
        f"{text}, {size}, {steps} updates: best settings of each; a dot a seed, a bar their mean", x=0.01, ha="left"
    )
    _finish(figure, axes, path)
    return True


def draw_restarts(path: Path, names: Sequence[str], reference: str) -> bool:
    """Draw the training loss around restarts, beyond that of `reference` on the same batches."""
    by_key = {_key(result): result for result in results()}
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    has_lines = False
    for name in names:
        windows = _all_windows(name, by_key, reference)
        if windows:
            has_lines = True
            mean = np.convolve(np.mean(windows, axis=0), np.ones(_SMOOTH) / _SMOOTH, mode="same")
            axes.plot(
                np.arange(-_BEFORE, _AFTER)[_SMOOTH:-_SMOOTH], mean[_SMOOTH:-_SMOOTH], label=f"{name} ({len(windows)})"
            )
    if has_lines:
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_xlabel("updates after a restart")
        axes.set_ylabel("loss beyond its level before, nats")
        axes.set_title(f"Restarts against {reference} on the same batches (mean over restarts and seeds)", loc="left")
        axes.legend(fontsize=8, frameon=False)
        _finish(figure, axes, path)
    plt.close(figure)
    return has_lines


def draw_rates(path: Path, specs: Sequence[Spec]) -> bool:
    """Draw the loss of runs against their rate, a panel a size, a line a method and rank; False where there is none."""
    lines: dict[str, dict[tuple[str, int], list[tuple[float, float]]]] = {}
    for spec in specs:
        if spec.path.is_file():
            loss = json.loads(spec.path.read_text())["val_loss"]
            line = lines.setdefault(spec.size, {}).setdefault((spec.name, spec.settings.get("rank", 0)), [])
            line.append((spec.settings["lr"], loss))
    if not lines:
        return False
    figure, panels = plt.subplots(1, len(lines), figsize=(4 * len(lines), 5), layout="constrained", squeeze=False)
    for axes, (size, of_size) in zip(panels[0], lines.items(), strict=True):
        ranks = sorted({rank for _, rank in of_size if rank})
        for (name, rank), points in of_size.items():
            colour = "black" if name == FULL else f"C{ranks.index(rank)}"
            style = ":" if "s = 1" in name else "-"
            label = name if name == FULL else f"{name}, rank {rank}"
            axes.plot(*zip(*sorted(points), strict=True), style, marker=".", color=colour, label=label)
        lowest = min(loss for points in of_size.values() for _, loss in points)
        axes.set_ylim(lowest - 0.03, lowest + 0.5)  # what lies above has diverged
        axes.set_xscale("log")
        rates = sorted({rate for points in of_size.values() for rate, _ in points})
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=8)
        axes.minorticks_off()
        axes.set_title(size, loc="left")
        axes.set_xlabel("rate of the matrices")
        axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    panels[0][0].set_ylabel("validation loss, nats per token")
    _finish(figure, panels[0], path)
    return True


def spikes(names: Sequence[str], reference: str) -> dict[str, tuple[float, int]]:
    """Return the height of the spike after a restart, in nats, and after how many updates the loss is back."""
    by_key = {_key(result): result for result in results()}
    found = {}
    for name in names:
        windows = _all_windows(name, by_key, reference)
        if windows:
            after = np.convolve(np.mean(windows, axis=0)[_BEFORE:], np.ones(_SMOOTH) / _SMOOTH, mode="valid")
            peak = int(after.argmax())
            below = np.flatnonzero(after[peak:] <= 0.0)
            found[name] = float(after[peak]), int(peak + below[0]) if len(below) else -1
    return found


def _key(result: Result) -> tuple[Any, ...]:
    spec = result["spec"]
    return spec["name"], spec["size"], spec["text"], spec["steps"], spec["seed"]


def _all_windows(name: str, by_key: dict[tuple[Any, ...], Result], reference: str) -> list[Any]:
    return [window for key, run in by_key.items() if key[0] == name for window in _windows(run, by_key, reference)]


def _windows(run: Result, by_key: dict[tuple[Any, ...], Result], reference: str) -> list[Any]:
    """Return the loss around each of a run's restarts, minus the reference's there, minus its mean before."""
    settings, steps = run["spec"]["settings"], run["spec"]["steps"]
    other = by_key.get((reference, *_key(run)[1:]))
    every = settings.get("restart_every", 0)
    if other is None or not every:
        return []
    gap = np.array(run["train_loss"]) - np.array(other["train_loss"])
    found = []
    for restart in range(settings.get("warm_start", 0) + every, steps - _AFTER, every):
        window = gap[restart - _BEFORE : restart + _AFTER]
        found.append(window - fmean(window[:_BEFORE]))
    return found


def _finish(figure: Any, axes: Any, path: Path) -> None:
    for each in np.atleast_1d(axes):
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
