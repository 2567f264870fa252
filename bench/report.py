"""Tables and pictures of the convergence runs, from the files that they left."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .convergence import RESULTS, TUNING_SEED

FULL = "full-rank AdamW"
Result = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One method with one choice of settings in one setting: its runs over seeds."""

    place: tuple[str, str, int]  # size, text, steps
    name: str
    settings: str
    by_seed: dict[int, float]  # validation losses
    num_trainable: int
    num_parameters: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed.values())

    @property
    def error(self) -> float:
        return _standard_error(list(self.by_seed.values()))

    def beyond(self, other: Row) -> tuple[float, float]:
        """Return the mean difference to another row and its standard error: over shared seeds, where there are any."""
        pairs = [loss - other.by_seed[seed] for seed, loss in self.by_seed.items() if seed in other.by_seed]
        return statistics.fmean(pairs or [self.mean - other.mean]), _standard_error(pairs)


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
            {r["spec"]["seed"]: r["val_loss"] for r in runs},
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
    for size, steps in sorted({(row.place[0], row.place[2]) for row in every}):
        lines += _over_texts([row for row in every if (row.place[0], row.place[2]) == (size, steps)])
    path.write_text("\n".join(lines))


def _over_texts(here: list[Row]) -> list[str]:
    """Return one table over all texts of a size and length: what each method reaches on several seeds it was not tuned
    on, with the settings that are best over the texts, beside the full-rank AdamW that is best on each text."""
    unseen = [
        replace(row, by_seed={seed: loss for seed, loss in row.by_seed.items() if seed != TUNING_SEED}) for row in here
    ]
    settled = sorted((row for row in unseen if len(row.by_seed) > 1), key=lambda row: (row.place, row.mean))
    texts = sorted({row.place[1] for row in settled})
    full = {row.place[1]: row for row in reversed(settled) if row.name == FULL}  # rows are best first
    on_texts: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in settled:  # sorted by place: in the order of the texts
        on_texts[row.name, row.settings].append(row)
    whole = [some for some in on_texts.values() if len(some) == len(texts)]
    if len(texts) < 2 or len(full) < len(texts):
        return []
    best: dict[str, list[Row]] = {}
    for some in sorted(whole, key=lambda some: statistics.fmean(row.mean for row in some)):
        best.setdefault(some[0].name, some)
    size, _, steps = here[0].place
    lines = [f"## {size}, {steps} updates, over texts and seeds", ""]
    lines += [
        "In brackets: the difference to the full-rank AdamW that is best on that text, with its standard error.",
        "",
    ]
    lines += [f"| method | settings | seeds | {' | '.join(texts)} |", "|---|---|---|" + "---|" * len(texts)]
    for name, some in best.items():
        gaps = [row.beyond(full[row.place[1]]) for row in some]
        cells = [f"{row.mean:.4f} ({gap:+.4f} ± {error:.4f})" for row, (gap, error) in zip(some, gaps, strict=True)]
        seeds = min(len(row.by_seed) for row in some)
        lines.append(f"| {name} | {some[0].settings} | {seeds} | {' | '.join(cells)} |")
    return [*lines, ""]


def best_of_each(here: list[Row]) -> list[Row]:
    """Return every method's best settings, best first: of those with the most seeds, so that none wins by luck."""
    best: dict[str, Row] = {}
    for row in sorted(here, key=lambda row: (-len(row.by_seed), row.mean)):
        best.setdefault(row.name, row)
    return sorted(best.values(), key=lambda row: row.mean)


def _reference(here: list[Row]) -> Row | None:
    """The best full-rank AdamW in a place, to which the others are compared."""
    return next((row for row in best_of_each(here) if row.name == FULL), None)


def _table(some: list[Row], reference: Row | None) -> list[str]:
    lines = ["| method | settings | trainable | seeds | loss | s.e. | to full rank |", "|---|---|---|---|---|---|---|"]
    for row in some:
        error = "" if len(row.by_seed) == 1 else f"{row.error:.4f}"
        gap = "" if reference is None else f"{row.beyond(reference)[0]:+.4f}"
        share = f"{row.num_trainable / row.num_parameters:.0%}"
        lines.append(
            f"| {row.name} | {row.settings} | {share} | {len(row.by_seed)} | {row.mean:.4f} | {error} | {gap} |"
        )
    return lines


def _standard_error(values: list[float]) -> float:
    """Of the mean; nan for fewer than two values."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def _shown(settings: dict[str, Any]) -> str:
    return " ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    )
