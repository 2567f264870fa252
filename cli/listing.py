"""A run's checkpoints as a table: `relora-opt checkpoints RUN`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .checkpoint import checkpoints, damage_of, read_progress
from .errors import UserError
from .report import show_bytes


@dataclass(frozen=True)
class Listed:
    """A line of the table.

    Args:
        update: updates applied when it was written.
        val_loss: the latest validation loss then, nats per token; None where there was none yet, or it cannot be read.
        val_update: the update after which it was measured; None where there is none, or an older run has not noted it.
        size: of all its files, in bytes.
        damage: what is wrong with it; None where every byte is as it was written.
    """

    update: int
    val_loss: float | None
    val_update: int | None
    size: int
    damage: str | None


def list_checkpoints(run: Path) -> list[Listed]:
    """Verify a run's checkpoints, oldest first; what a running run removes meanwhile is left out.

    Raises:
        UserError: where there are none.
    """
    found = checkpoints(run)
    if not found:
        raise UserError(f"{str(run)!r} holds no checkpoint: give the folder of a run that has saved one")
    return [line for line in map(_listed, found) if line is not None]


def print_checkpoints(listed: list[Listed], *, console: Console) -> None:
    """Print the table."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("update", justify="right", no_wrap=True)
    table.add_column("val loss", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("state", overflow="fold")
    for line in listed:
        table.add_row(f"{line.update:,}", _loss(line), show_bytes(line.size), Text(line.damage or "whole"))
    console.print(table)


def _loss(line: Listed) -> str:
    """Return the loss, and when it was measured where that is not when the checkpoint was written."""
    if line.val_loss is None:
        return "-"
    when = "?" if line.val_update is None else f"{line.val_update:,}"
    return f"{line.val_loss:.4f}" + (f" at {when}" if line.val_update != line.update else "")


def _listed(checkpoint: Path) -> Listed | None:
    val_loss = val_update = damage = None
    try:
        size = sum(path.stat().st_size for path in checkpoint.iterdir() if path.is_file())
        damage = damage_of(checkpoint)
        if damage is None:
            progress = read_progress(checkpoint)
            val_loss, val_update = progress.val_loss, progress.val_update
    except FileNotFoundError:
        return None
    except UserError as error:  # of another format
        damage = str(error)
    return Listed(int(checkpoint.name), val_loss, val_update, size, damage) if checkpoint.exists() else None
