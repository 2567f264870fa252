"""Tables and pictures of the convergence runs, from the files that they left."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .convergence import RESULTS

Result = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One method with one choice of settings in one setting: its runs over seeds."""

    place: tuple[str, str, int]  # size, text, steps
    name: str
    settings: str
    losses: tuple[float, ...]
    num_trainable: int
    num_parameters: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def error(self) -> float:
        """The standard error of the mean; nan for one seed."""
        count = len(self.losses)
        return statistics.stdev(self.losses) / count**0.5 if count > 1 else float("nan")


def rows() -> list[Row]:
    """Return every method and its settings, best first within a place."""
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for result in results():
        spec = result["spec"]
        place = (spec["size"], spec["text"], spec["steps"])
        groups[place, spec["name"], _shown(spec["settings"])].append(result)
    found = [
        Row(
            place,
            name,
            settings,
            tuple(r["val_loss"] for r in runs),
            runs[0]["num_trainable"],
            runs[0]["num_parameters"],
        )
        for (place, name, settings), runs in groups.items()
    ]
    return sorted(found, key=lambda row: (row.place, row.mean))


def results() -> Iterator[Result]:
    for path in sorted(RESULTS.glob("*.json")):
        yield json.loads(path.read_text())


def write_report(path: Path) -> None:
    """Write all tables: first what each method reaches at its best, then every grid."""
    lines = ["# Convergence: all runs", "", "Written by `python -m bench.convergence report`; losses in nats.", ""]
    lines += ["The trainable share counts embeddings and head, which every method trains in full.", ""]
    every = rows()
    for place in sorted({row.place for row in every}):
        size, text, steps = place
        here = [row for row in every if row.place == place]
        lines += [f"## {size}, {text}, {steps} updates", "", "Best settings of each method:", ""]
        lines += _table(best_of_each(here), _reference(here))
        lines += ["", "All settings:", "", *_table(here, _reference(here)), ""]
    path.write_text("\n".join(lines))


def best_of_each(here: list[Row]) -> list[Row]:
    """Return every method's best settings, best first: of those with the most seeds, so that none wins by luck."""
    best: dict[str, Row] = {}
    for row in sorted(here, key=lambda row: (-len(row.losses), row.mean)):
        best.setdefault(row.name, row)
    return sorted(best.values(), key=lambda row: row.mean)


def _reference(here: list[Row]) -> float | None:
    """The best full-rank AdamW in a place, to which the others are compared."""
    return next((row.mean for row in best_of_each(here) if row.name == "full-rank AdamW"), None)


def _table(some: list[Row], reference: float | None) -> list[str]:
    lines = ["| method | settings | trainable | seeds | loss | s.e. | to full rank |", "|---|---|---|---|---|---|---|"]
    for row in some:
        error = "" if len(row.losses) == 1 else f"{row.error:.4f}"
        gap = "" if reference is None else f"{row.mean - reference:+.4f}"
        share = f"{row.num_trainable / row.num_parameters:.0%}"
        lines.append(
            f"| {row.name} | {row.settings} | {share} | {len(row.losses)} | {row.mean:.4f} | {error} | {gap} |"
        )
    return lines


def _shown(settings: dict[str, Any]) -> str:
    return " ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    )
