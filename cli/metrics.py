"""The rows of metrics.jsonl: what a run records of itself, one JSON object a line."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import UserError

Phase = Literal["warm_start", "low_rank", "full_rank"]


@dataclass(frozen=True)
class Row:
    """One line of metrics.jsonl. None where a row has no such number: not measured at this update.

    Args:
        update: updates applied so far; the row at 0 holds the validation loss before training.
        tokens: tokens trained on so far.
        loss: training loss, nats per token.
        val_loss: validation loss, nats per token.
        lr: effective learning rate of the selected weights, or of their factors.
        grad_norm: gradient norm before clipping.
        tokens_per_second: tokens trained on per second.
        restarts: restarts so far.
        phase: "warm_start", "low_rank" or "full_rank".
        low_rank_ratio: |s B A| / |W| of all low-rank weights, where there is a validation loss; and
        update_rms: the root mean square of what this update moved them by. Both as in `ReLoRAOptimizer.metrics`.
        skips: updates skipped right before this one; and
        skip_reason: why the last of them was.
    """

    update: int
    tokens: int
    loss: float | None
    val_loss: float | None
    lr: float
    grad_norm: float | None
    tokens_per_second: float | None
    restarts: int
    phase: Phase
    low_rank_ratio: float | None = None
    update_rms: float | None = None
    skips: int = 0
    skip_reason: str | None = None

    def to_json(self) -> str:
        """Return the row as one line of JSON, without the newline. JSON has no nan or infinity: they become null."""
        numbers = {key: _finite(value) for key, value in asdict(self).items()}
        return json.dumps(numbers, allow_nan=False)


class MetricsFile:
    """Appends lines, each at once: when the disk is full or the process killed, nothing is left to be written.

    Raises:
        UserError: where the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with _named(path):
            self._file = path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        """Append a line."""
        data = line.encode()
        with _named(self._path):
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self._file.close()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn an error of the disk's into one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}; checkpoints are untouched") from error


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of a metrics.jsonl. A last line that a killed run left torn is dropped.

    Raises:
        UserError: the file is missing, or a line is not a row (names the file and the line).
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read metrics {str(path)!r}: {error.strerror}; give the folder of a run") from error
    rows = [_row(line, where=f"{path}, line {number}") for number, line in enumerate(lines[:-1], start=1)]
    try:
        last = [_row(lines[-1], where=str(path))]
    except UserError:  # only a line without its newline gets here: empty, or torn
        last = []
    return rows + last


def truncate_metrics(path: Path, *, after_update: int) -> None:
    """Drop the rows after an update, so that a resumed run writes none twice. The file is replaced whole or not at all.

    A missing file stays missing.

    Raises:
        UserError: a line is not a row, or the disk refuses.
    """
    if not path.exists():
        return
    kept = [row.to_json() + "\n" for row in read_metrics(path) if row.update <= after_update]
    partial = path.with_name(path.name + ".partial")
    with _named(path):
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def _row(line: bytes, *, where: str) -> Row:
    """Read one line of metrics.jsonl."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {_excerpt(line)}; remove the line") from error
    if not isinstance(values, dict) or not _KINDS.keys() - _LATER <= values.keys() <= _KINDS.keys():
        raise UserError(f"{where} does not have the keys {', '.join(_KINDS)}: {_excerpt(line)}; remove the line")
    for key, value in values.items():
        if type(value) not in _KINDS[key] or (key == "phase" and value not in get_args(Phase)):
            raise UserError(f"{where} has {key} = {json.dumps(value)}, which is no such number; remove the line")
    return Row(**values)


def _excerpt(line: bytes) -> str:
    return repr(line[:60].decode(errors="replace"))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


_NUMBER_OR_NULL = (int, float, type(None))
_KINDS: dict[str, tuple[type, ...]] = {
    "update": (int,),
    "tokens": (int,),
    "loss": _NUMBER_OR_NULL,
    "val_loss": _NUMBER_OR_NULL,
    "lr": (int, float),
    "grad_norm": _NUMBER_OR_NULL,
    "tokens_per_second": _NUMBER_OR_NULL,
    "restarts": (int,),
    "phase": (str,),
    "low_rank_ratio": _NUMBER_OR_NULL,
    "update_rms": _NUMBER_OR_NULL,
    "skips": (int,),
    "skip_reason": (str, type(None)),
}
_LATER = {"low_rank_ratio", "update_rms", "skips", "skip_reason"}  # older runs have no such keys
