"""Pictures of runs from their metrics.jsonl: one run's losses over its jagged learning rate, or several runs compared.

Nothing is measured here, and nothing is hidden in silence: where the first losses are so high that they would flatten
the rest, the axis ends lower and a note on it says how high they went.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .metrics import Row, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

# Okabe and Ito's palette without its yellow, which is too faint for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plot_runs(runs: Sequence[Path], out: Path | None) -> Path:
    """Draw one run's curves, or the validation losses of several against tokens, and return the picture's path.

    Args:
        runs: run folders, each with a metrics.jsonl.
        out: the picture; its suffix says the format. None: curves.png in the run's folder, or for several runs
            comparison.png in the current folder.

    Raises:
        UserError: no run, a run without metrics or (of several) without validation losses, or a picture that cannot
            be written.
    """
    if not runs:
        raise UserError("no run to plot (runs is empty); give at least one run folder")
    runs = list(dict.fromkeys(runs))
    rows = [_metrics(run) for run in runs]
    if len(runs) == 1:
        return save_figure(_curves(rows[0], title=_names(runs)[0]), out or runs[0] / "curves.png")
    for run, metrics in zip(runs, rows, strict=True):
        if not _series(metrics, "val_loss")[0]:
            raise UserError(f"run {str(run)!r} has no validation loss to compare; leave it out, or set eval_every")
    return save_figure(_comparison(_names(runs), rows), out or Path("comparison.png"))


def new_figure() -> Figure:
    """Return an empty figure of 1200 x 800 pixels that touches neither matplotlib's global state nor a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), dpi=100)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, out: Path) -> Path:
    """Write a figure and return its path.

    Raises:
        UserError: matplotlib does not know the suffix, or the file cannot be written.
    """
    known = figure.canvas.get_supported_filetypes()
    if out.suffix.lstrip(".").lower() not in known:
        raise UserError(f"cannot draw {str(out)!r} (out): end its name in one of {', '.join(sorted(known))}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    except OSError as error:
        raise UserError(f"cannot write {str(out)!r} (out): {error.strerror}; choose another path") from error
    return out


def style_axes(axes: Axes) -> None:
    """Give axes the house look: a faint grid, no box, little air."""
    axes.grid(color="0.9", linewidth=0.8)
    axes.margins(x=0.01)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_text(text: str) -> str:
    """Return a name as matplotlib shows it literally: `$` would start a formula, a leading `_` hide it from legends."""
    return ("./" + text if text.startswith("_") else text).replace("$", r"\$")


def _metrics(run: Path) -> list[Row]:
    rows = read_metrics(run / "metrics.jsonl")
    if not any(row.loss is not None or row.val_loss is not None for row in rows):
        raise UserError(f"run {str(run)!r} has no losses in its metrics.jsonl yet; plot it after its first updates")
    return rows


def _curves(rows: list[Row], *, title: str) -> Figure:
    """One run: losses above, the jagged learning rate below, restarts and switches across both."""
    figure = new_figure()
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    _draw_losses(losses, rows)
    trained = [row for row in rows if row.update > 0]  # nothing was trained at the rate of update 0
    rates.plot(*_series(trained, "lr"), color=COLOURS[2], linewidth=1.4)
    rates.set(xlabel="updates", ylabel="effective learning rate", ylim=(0, None))
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates.xaxis.set_major_locator(_whole_updates())
    rates.xaxis.set_major_formatter("{x:,.0f}")
    for axes in (losses, rates):
        style_axes(axes)
        _mark_events(axes, rows)
    _label_switches(losses, rows)
    _add_token_axis(losses, rows)
    losses.legend(loc="upper right", framealpha=0.95)
    losses.set_title(title, loc="left", fontweight="bold")
    return figure


def _whole_updates() -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True)


def _draw_losses(axes: Axes, rows: list[Row]) -> None:
    updates, losses = _series(rows, "loss")
    window = 2 * (len(losses) // 60) + 1
    faint: dict[str, Any] = {"linewidth": 0.6, "alpha": 0.4} if window > 1 else {"linewidth": 1.4}
    if losses:
        axes.plot(updates, losses, color=COLOURS[0], label="training loss", **faint)
    if window > 1:
        smooth = _smoothed(losses, window=window)
        axes.plot(updates, smooth, color=COLOURS[0], linewidth=1.6, label="training loss, smoothed")
    axes.plot(*_series(rows, "val_loss"), "o-", color=COLOURS[1], markersize=5, linewidth=1, label="validation loss")
    axes.set(ylabel="loss (nats per token)")
    _crop(axes, [_series(rows, "loss"), _series(rows, "val_loss")])


def _comparison(names: list[str], runs: list[list[Row]]) -> Figure:
    """Several runs: validation loss against tokens, the last loss in the legend below the axes."""
    figure = new_figure()
    axes = figure.subplots()
    for number, (name, rows) in enumerate(zip(names, runs, strict=True)):
        tokens, losses = _series(rows, "val_loss", against="tokens")
        look: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": _LINES[number // len(COLOURS) % len(_LINES)],
        }
        label = f"{name} ({losses[-1]:.4f})"
        axes.plot(tokens, losses, marker=_MARKERS[number % len(_MARKERS)], markersize=5, label=label, **look)
    axes.set(xlabel="tokens trained on", ylabel="validation loss (nats per token)")
    axes.xaxis.set_major_formatter(_short_count)
    style_axes(axes)
    _crop(axes, [_series(rows, "val_loss", against="tokens") for rows in runs])
    widest = max(len(name) for name in names)
    num_columns = max(1, min(len(names), 120 // (widest + 18)))
    figure.legend(loc="outside lower left", ncols=num_columns, title="run (last validation loss)", alignment="left")
    return figure


def _series(rows: list[Row], key: str, *, against: str = "update") -> tuple[list[int], list[float]]:
    """Return the x and y of the rows that have the number."""
    known = [row for row in rows if getattr(row, key) is not None]
    return [getattr(row, against) for row in known], [getattr(row, key) for row in known]


def _smoothed(values: list[float], *, window: int) -> list[float]:
    """Return the mean of the `window` (odd) values around each.

    At the start, where losses fall steeply, the window stays centred and shrinks; at the end it is cut off.
    """
    sums = [0.0, *accumulate(values)]
    means = []
    for i in range(len(values)):
        reach = min(window // 2, i)
        end = min(i + reach + 1, len(values))
        means.append((sums[end] - sums[i - reach]) / (end - i + reach))
    return means


def _mark_events(axes: Axes, rows: list[Row]) -> None:
    label = "restart"
    for update in _restarts(rows):
        axes.axvline(update, color="0.55", linewidth=0.8, zorder=1, label=label)
        label = "_"  # one entry in the legend for all
    for switch in _switches(rows):
        axes.axvline(switch, color="black", linewidth=1.2, linestyle="--", zorder=1.1)


def _restarts(rows: list[Row]) -> list[int]:
    return [row.update for before, row in pairwise(rows) if row.restarts > before.restarts]


def _switches(rows: list[Row]) -> dict[int, str]:
    """Return the last update of every phase that the run has left, and what came then."""
    return {a.update: b.phase for a, b in pairwise(rows) if a.phase != b.phase}


def _label_switches(axes: Axes, rows: list[Row]) -> None:
    place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    for switch, phase in _switches(rows).items():
        low = phase == "low_rank"
        text, height = ("switch to low rank", 0.97) if low else ("switch to full rank", 0.9)
        axes.annotate(text, (switch, height), xytext=(5, 0), va="top", bbox=_BACKDROP, **place)


def _add_token_axis(axes: Axes, rows: list[Row]) -> None:
    """Say tokens along the top; every update has as many."""
    last = rows[-1]
    if last.update == 0 or last.tokens == 0:
        return
    per_update = last.tokens / last.update

    def to_tokens(updates: Any) -> Any:
        return updates * per_update

    def to_updates(tokens: Any) -> Any:
        return tokens / per_update

    tokens = axes.secondary_xaxis("top", functions=(to_tokens, to_updates))
    tokens.set_xlabel("tokens trained on")
    tokens.xaxis.set_major_formatter(_short_count)


def _short_count(count: float, position: float = 0) -> str:
    """Return 1500000 as 1.5M; `position` is what matplotlib passes to a formatter."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


def _crop(axes: Axes, curves: list[tuple[list[int], list[float]]]) -> None:
    """End the axis below the first losses where they would flatten the rest, and say so."""
    points = [(x, y) for xs, ys in curves for x, y in zip(xs, ys, strict=True)]
    begin = _SETTLED * max(x for x, _ in points)
    settled = [y for x, y in points if x >= begin]
    low, high, top = min(settled), max(y for _, y in points), max(settled)
    if len(settled) < _MANY or top == low or high - low <= _FLATTENED * (top - low):
        return
    margin = 0.05 * (top - low)
    axes.set_ylim(low - margin, top + 3 * margin)  # room for the labels of the switches
    note = f"not shown: the first losses, up to {high:.2f}"
    axes.text(0.01, 0.02, note, transform=axes.transAxes, color="0.35", fontsize="small", bbox=_BACKDROP)


def _names(runs: Sequence[Path]) -> list[str]:
    """Return the folders' names; their whole paths where two would read the same."""
    names = [run.resolve().name for run in runs]
    taken = Counter(names)
    return [label_text(name if taken[name] == 1 else str(run)) for name, run in zip(names, runs, strict=True)]


_LINES = ("-", "--", ":")
_MARKERS = ("o", "s", "^", "D", "v")
_SETTLED = 0.05
_FLATTENED = 2.5
_MANY = 10
_BACKDROP: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
