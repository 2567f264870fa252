"""What the person sees: a view of a run while it trains, and the table that closes it.

On a terminal, `View` shows a live panel; elsewhere (a pipe, a file, TERM=dumb) it prints about thirty lines a run, and
one for every evaluation, restart and change of phase. Nothing is decided here, and nothing but the peak memory is
measured here: the numbers are the caller's.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .counted import counted
from .metrics import Row


class View:
    """Shows a run of `total_updates` updates on a rich console, as a context manager around the training loop.

    Example:
        >>> with View(600, console=Console()) as view:  # doctest: +SKIP
        ...     view.row(row, next_restart=200)
    """

    def __init__(self, total_updates: int, *, console: Console) -> None:
        self._total = total_updates
        self._console = console
        self._started = time.monotonic()
        self._marks: deque[tuple[float, int]] = deque()
        self._latest: Row | None = None
        self._facts: dict[str, str] = dict.fromkeys(_FACTS, "-")
        self._smoothed: float | None = None
        self._lines_due = 0
        is_live = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, get_renderable=self._panel, refresh_per_second=4) if is_live else None

    def __enter__(self) -> View:
        self._started = time.monotonic()
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def row(self, metrics: Row, *, next_restart: int | None) -> None:
        """Show the newest numbers. A number that the row lacks stays what it was.

        Args:
            metrics: the row, not earlier than the row before it.
            next_restart: the update after which the next restart comes; None when no other will come.
        """
        before, self._latest = self._latest, metrics
        self._mark(metrics.update)
        if metrics.loss is not None:
            self._smoothed = _smooth(self._smoothed, metrics.loss)
        self._facts |= _row_facts(metrics, smoothed=self._smoothed, next_restart=next_restart)
        event = "" if before is None else _event(metrics, before)
        is_worth_a_line = self._take_turn(metrics) or metrics.val_loss is not None or bool(event) or before is None
        if self._live is None and is_worth_a_line:
            self.say(self._line(metrics, event=event))

    def say(self, text: str) -> None:
        """Print a message, above the panel where there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=self._live is None)

    def _mark(self, update: int) -> None:
        """Remember when the update was reached: the time left follows from the last minute, or rows if they are few."""
        now = time.monotonic()
        self._marks.append((now, update))
        while len(self._marks) > _ETA_ROWS and now - self._marks[0][0] > _ETA_SECONDS:
            self._marks.popleft()

    def _eta(self) -> str:
        (start, first), (end, last) = (self._marks[0], self._marks[-1]) if self._marks else ((0.0, 0), (0.0, 0))
        return _duration((end - start) / (last - first) * max(0, self._total - last)) if last > first else "-"

    def _take_turn(self, row: Row) -> bool:
        """Return whether a plain line is due: _LINES times a run, the last update included."""
        due = row.update * _LINES // max(1, self._total)
        is_due = row.loss is not None and due > self._lines_due
        self._lines_due = due if is_due else self._lines_due
        return is_due

    def _line(self, row: Row, *, event: str) -> str:
        numbers = {
            "loss": _maybe(row.loss, ".4f"),
            "val loss": _maybe(row.val_loss, ".4f"),
            "lr": f"{row.lr:.2e}",
            "grad norm": _maybe(row.grad_norm, ".3g"),
            "tokens/s": _maybe(row.tokens_per_second, ",.0f"),
            "memory": _peak_memory(),
            "eta": self._eta(),
        }
        parts = [f"update {row.update:>{len(str(self._total))}}/{self._total}", f"{_PHASES[row.phase]:<10}"]
        parts += [f"{name} {text}" for name, text in numbers.items() if text is not None]
        return "  ".join([*parts, event]).rstrip()

    def _panel(self) -> RenderableType:
        # The last column stays free, because some terminals wrap at it.
        width = min(self._console.width, _PANEL_WIDTH) - 1
        self._facts |= {"memory": _peak_memory(), "elapsed": _duration(time.monotonic() - self._started)}
        return Group(self._bar(width), _grid(self._facts, width=width))

    def _bar(self, width: int) -> RenderableType:
        update, phase = (self._latest.update, _PHASES[self._latest.phase]) if self._latest else (0, "starting")
        numbers = f"update {update:,}/{self._total:,}  eta {self._eta()}"
        bar = ProgressBar(max(1, self._total), update, width=max(4, width - len(phase) - len(numbers) - 4))
        table = Table.grid(padding=(0, 2, 0, 0))
        table.width = width
        table.add_row(Text(phase, style="bold", no_wrap=True), bar, Text(numbers, no_wrap=True, overflow="ellipsis"))
        return table


@dataclass(frozen=True)
class Summary:
    """What a finished run closes with.

    Args:
        val_loss_start: validation loss before training, nats per token; None where it was not measured (all three).
        val_loss_switch: the same after the warm start; None without a warm start.
        val_loss_end: the same after the last update.
        updates: updates applied.
        tokens: tokens trained on.
        restarts: restarts made.
        trainable: parameters trained in the low-rank phase: factors and unselected parameters.
        parameters: parameters of the model.
        optimizer_bytes: bytes of the optimizer's state in the low-rank phase.
        full_rank_bytes: bytes of AdamW's state on the same model at full rank.
        seconds: time spent in updates; reading, evaluations, checkpoints and the close are left out.
        tokens_per_second: mean over that time.
        run: the run folder.
        export: the exported model; None where there is none.
        curves: the picture; None where there is none.
        next_command: what to type next.
        skips: updates skipped, whose loss or gradient was not finite.
    """

    val_loss_start: float | None
    val_loss_switch: float | None
    val_loss_end: float | None
    updates: int
    tokens: int
    restarts: int
    trainable: int
    parameters: int
    optimizer_bytes: int
    full_rank_bytes: int
    seconds: float
    tokens_per_second: float
    run: Path
    export: Path | None
    curves: Path | None
    next_command: str
    skips: int = 0


def print_summary(summary: Summary, *, console: Console) -> None:
    """Print the closing table, then where things are and the next command, unwrapped so that they can be copied."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in _summary_rows(summary).items():
        table.add_row(name, Text(value, style="bold"))
    console.print(table)
    places = {"run": summary.run, "export": summary.export, "curves": summary.curves}
    for name, text in [*places.items(), ("next", summary.next_command)]:
        if text is not None:
            console.print(f"{name:<8}{text}", markup=False, highlight=False, soft_wrap=True)


def print_error(text: str, unexpected: BaseException | None = None) -> None:
    """Say what ends the command, on one line of stderr, unwrapped; with a traceback where it was not foreseen."""
    if unexpected is not None:
        traceback.print_exception(unexpected)
    Console(stderr=True, soft_wrap=True).print(f"relora-opt: {text}", markup=False, highlight=False)


def _summary_rows(summary: Summary) -> dict[str, str]:
    losses = {
        "at the start": summary.val_loss_start,
        "at the switch": summary.val_loss_switch,
        "at the end": summary.val_loss_end,
    }
    share = summary.trainable / max(1, summary.parameters)
    bytes_share = summary.optimizer_bytes / max(1, summary.full_rank_bytes)
    ours, full_rank = show_bytes(summary.optimizer_bytes), show_bytes(summary.full_rank_bytes)
    return {
        **{f"validation loss {when}": _loss_and_perplexity(loss) for when, loss in losses.items() if loss is not None},
        "restarts": f"{summary.restarts:,}",
        "trainable parameters": f"{summary.trainable:,} of {summary.parameters:,} ({share:.1%})",
        "optimizer state": f"{ours} ({bytes_share:.1%} of full-rank AdamW's {full_rank})",
        "trained on": f"{counted(summary.tokens, 'token')} in {counted(summary.updates, 'update')}",
        **({"skipped updates": f"{summary.skips:,}"} if summary.skips else {}),
        "tokens/s": f"{summary.tokens_per_second:,.0f}",
        "time in updates": _duration(summary.seconds),
    }


def _smooth(mean: float | None, value: float) -> float:
    """Return the moving average after one more value; it starts again after a value that is not finite."""
    return value if mean is None or not math.isfinite(mean) else 0.9 * mean + 0.1 * value


def _event(row: Row, before: Row) -> str:
    """Return what happened between two rows that deserves a line: a restart, or another phase."""
    if row.restarts > before.restarts:
        return f"restart {row.restarts}"
    return "" if row.phase == before.phase else f"{_PHASES[row.phase]} begins"


def _row_facts(row: Row, *, smoothed: float | None, next_restart: int | None) -> dict[str, str]:
    """Return the panel's facts that the row knows."""
    facts = {
        "loss (smoothed)": _maybe(smoothed, ".4f"),
        "val loss": None if row.val_loss is None else f"{row.val_loss:.4f} at {row.update:,}",
        "learning rate": f"{row.lr:.2e}",
        "gradient norm": _maybe(row.grad_norm, ".3g"),
        "tokens/s": _maybe(row.tokens_per_second, ",.0f"),
        "cycle": str(row.restarts + 1) if row.phase == "low_rank" else "-",
        "restart in": "-" if next_restart is None else counted(next_restart - row.update, "update"),
    }
    return {name: text for name, text in facts.items() if text is not None}


def _grid(facts: dict[str, str], *, width: int) -> Table:
    """Lay the facts out in as many equal columns as fit."""
    num_columns = max(1, width // _FACT_WIDTH)
    table = Table.grid(padding=(0, 1, 0, 0))
    for _ in range(num_columns):
        table.add_column(width=min(width, _FACT_WIDTH) - 1, no_wrap=True, overflow="ellipsis")
    cells = [Text.assemble((f"{name} ", "cyan"), (text, "bold")) for name, text in facts.items()]
    for start in range(0, len(cells), num_columns):
        table.add_row(*cells[start : start + num_columns])
    return table


def _peak_memory() -> str:
    """Return the peak of CUDA memory where CUDA is in use, else of the process's resident memory."""
    torch = sys.modules.get("torch")  # in use only if somebody else imported it
    if torch is not None and torch.cuda.is_initialized():
        return f"{show_bytes(torch.cuda.max_memory_allocated())} CUDA"
    try:
        import resource
    except ImportError:  # Windows
        return "-"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return show_bytes(peak if sys.platform == "darwin" else peak * 1024)


def _maybe(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _loss_and_perplexity(loss: float) -> str:
    perplexity = math.exp(loss) if loss < 700 else math.inf  # exp(710) overflows
    return f"{loss:.4f}  (perplexity {perplexity:,.2f})"


def show_bytes(number: float) -> str:
    """Return a number of bytes in units of 1000, as disks and memory profilers print them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} PB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02}:{rest:02}" if hours or days else f"{minutes}:{rest:02}"
    return f"{days}d {clock}" if days else clock


_FACTS = (
    *("loss (smoothed)", "val loss", "learning rate"),
    *("gradient norm", "tokens/s", "memory"),
    *("cycle", "restart in", "elapsed"),
)
_FACT_WIDTH = 29  # "restart in 10,000 updates" and a gap
_PANEL_WIDTH = 100
_LINES = 30
_ETA_SECONDS, _ETA_ROWS = 60.0, 50
_PHASES = {"warm_start": "warm start", "low_rank": "low rank", "full_rank": "full rank"}
