"""A row of bench.step's table, the table and its picture."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """What was measured of a contender.

    Args:
        seconds: of every timed update, all its micro-batches together.
        ratio: median of full-rank AdamW's seconds / own, round by round.
        bound: the ratio that the products of matrices allow.
        peak_bytes: how far a step raises resident memory above what it is between steps: gradients, activations;
            None where that was not measured.
        state_bytes: persistent, beside the weights: optimizer state and factors.
        sent_bytes: gradients that a data-parallel step would send, and that lie there between backward and update.
        kept_bytes: what selected weights keep: themselves, factors, state and gradients.
        restart_seconds: a restart, or merge and reset; None where there is none.
        profile: milliseconds of a step by kind, under torch's profiler (profiling.py); empty where nobody asked.
    """

    name: str
    seconds: list[float]
    ratio: float
    bound: float
    peak_bytes: int | None
    state_bytes: int
    sent_bytes: int
    kept_bytes: int
    restart_seconds: float | None
    profile: dict[str, float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2


def table(rows: list[Row], num_tokens: int) -> str:
    """Return the table for a terminal, the fastest first; `kept` is in shares of the first row's, full rank.

    Args:
        num_tokens: of an update.
    """
    lines = [
        f"{'':36} {'ms':>8} {'±':>5} {'tokens/s':>9} {'ratio':>6} {'bound':>6} {'share':>6} "
        f"{'peak MB':>8} {'state MB':>8} {'sent MB':>8} {'kept':>6} {'restart ms':>10}"
    ]
    full = rows[0].kept_bytes
    for row in sorted(rows, key=lambda row: row.median):
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
        restart = "" if row.restart_seconds is None else f"{1000 * row.restart_seconds:.0f}"
        lines.append(
            f"{row.name:36} {1000 * row.median:8.0f} {1000 * row.spread:5.0f} {num_tokens / row.median:9.0f} "
            f"{row.ratio:6.3f} {row.bound:6.3f} {row.ratio / row.bound:6.3f} {peak:>8} "
            f"{row.state_bytes / 1e6:8.1f} {row.sent_bytes / 1e6:8.1f} "
            f"{row.kept_bytes / full:6.3f} {restart:>10}"
        )
    return "\n".join(lines)


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Draw every method's ratio to full rank, with its bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ordered = sorted(rows, key=lambda row: row.ratio)
    figure, axes = plt.subplots(figsize=(9, 0.38 * len(rows) + 1.4), layout="constrained")
    colours = ["#1d4ed8" if row.name.startswith("relora") else "#94a3b8" for row in ordered]
    axes.barh([row.name for row in ordered], [row.ratio for row in ordered], color=colours)
    for y, row in enumerate(ordered):
        axes.plot([row.bound] * 2, [y - 0.4, y + 0.4], color="#c2410c", linewidth=2)
        axes.text(0.02, y, f"{row.ratio:.2f}", va="center", color="white", fontsize=9)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast as full-rank AdamW, compiled; in red what products of matrices allow")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)
