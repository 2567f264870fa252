"""Where a run's numbers go besides metrics.jsonl: TensorBoard, trackio, Weights & Biases (`--log`).

    check_logs   refuses what is not installed, before any work is done
    open_logs    one log for all that are asked for
    numbers      what they get of an update: its row, and what the optimizer says of itself

A resumed run goes on where it was. TensorBoard drops what lies beyond the restored update. The other two cannot, so
updates whose numbers they have are not written again; a file in the run's folder, log.json, has the id that they know
the run by and the last such update. What they had not stored yet when a run was killed outright is missing there;
metrics.jsonl has every row. Whether anything leaves the machine is for their environment to say (WANDB_MODE,
TRACKIO_SPACE_ID, ...).
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from relora_opt import Metrics

from .config import Config
from .errors import UserError
from .metrics import Row
from .output import quoted

_FILE, _PROJECT = "log.json", "relora-opt"


class Log(Protocol):
    """Takes numbers by name, update after update."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of an update."""

    def close(self) -> None:
        """Hand everything over, and end."""


def check_logs(names: Sequence[str]) -> None:
    """Import what is to be logged to.

    Raises:
        UserError: names what is missing, and what installs it.
    """
    for name in names:
        try:
            _KINDS[name].load()
        except ImportError as error:
            raise UserError(f'log={name!r} cannot be imported ({error}): pip install "relora-opt[{name}]"') from error


def open_logs(config: Config, folder: Path, *, first: int) -> Log:
    """Open all logs that a configuration asks for, as one.

    Args:
        folder: of the run.
        first: the first update that will be written.

    Raises:
        UserError: for one that cannot be opened; the others are closed again.
    """
    with ExitStack() as stack:
        logs = [stack.enter_context(closing(_open(name, config, folder, first))) for name in config.log]
        return _All(logs, stack.pop_all())


def remember(folder: Path, *, last: int) -> None:
    """Note, before a run goes on from an earlier update, that its numbers up to `last` were written."""
    identity = _identity(folder)
    _note(folder, {**identity, "last": max(identity["last"], last)})


def numbers(row: Row, seen: Metrics | None) -> dict[str, float]:
    """Return the finite numbers of an update by name."""
    words = ("update", "phase", "skip_reason")
    found: dict[str, Any] = {name: value for name, value in asdict(row).items() if name not in words}
    if seen is not None:
        found |= {
            "pruned_share": seen.pruned_share,
            "updates_to_restart": seen.updates_to_restart,
            "lr_multiplier": seen.lr_multiplier,
            "num_trainable": seen.memory.num_trainable,
            "state_bytes": seen.memory.state_bytes,
            "full_rank_adamw_bytes": seen.memory.full_rank_adamw_bytes,
            **{f"low_rank_ratio/{name}": weight.low_rank_ratio for name, weight in seen.weights.items()},
        }
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


class _All:
    """Several logs, each of which is closed whatever happens to the others."""

    def __init__(self, logs: Sequence[Log], stack: ExitStack) -> None:
        self._logs, self._stack = logs, stack

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for log in self._logs:
            log.write(step, numbers)

    def close(self) -> None:
        self._stack.close()


class _TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, config: Config, folder: Path, first: int) -> None:
        self._writer = self.load()(str(folder / "tensorboard"), purge_step=first, flush_secs=10)

    @staticmethod
    def load() -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    """A run of trackio, in the user's trackio folder."""

    def __init__(self, config: Config, folder: Path, first: int) -> None:
        identity = _identity(folder)
        self._last = identity["last"]
        self._trackio = self.load()
        name = f"{folder.name}-{identity['id']}"
        self._trackio.init(project=_PROJECT, name=name, config=asdict(config), resume="allow")

    @staticmethod
    def load() -> Any:
        import trackio

        return trackio

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if step > self._last:
            self._trackio.log(dict(numbers), step=step)

    def close(self) -> None:
        self._trackio.finish()


class _WandB:
    """A run of Weights & Biases, whose files lie in the run's folder."""

    def __init__(self, config: Config, folder: Path, first: int) -> None:
        identity = _identity(folder)
        self._last = identity["last"]
        self._run = self.load()(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=folder.name,
            id=identity["id"],
            dir=os.environ.get("WANDB_DIR", str(folder)),
            config=asdict(config),
            resume="allow" if self._last >= 0 else None,
        )

    @staticmethod
    def load() -> Any:
        from wandb import init  # a folder wandb/ in the working directory would pass for the module

        return init

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if step > self._last:
            self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


_KINDS: dict[str, type[_TensorBoard] | type[_Trackio] | type[_WandB]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _WandB,
}


def _open(name: str, config: Config, folder: Path, first: int) -> Log:
    try:
        return _KINDS[name](config, folder, first)
    except Exception as error:  # whatever theirs raise: no login, no network, no space
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"log={name!r} cannot be opened: {reason}; mend that and go on with --resume {quoted(folder)}"
        ) from error


def _identity(folder: Path) -> dict[str, Any]:
    """Return the id that trackio and W&B know a run by, and the last update whose numbers they have."""
    path = folder / _FILE
    if not path.exists():
        _note(folder, {"id": secrets.token_hex(4), "last": -1})
    try:
        identity: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(identity["id"], str) or type(identity["last"]) is not int:
            raise TypeError("an id and the last update were written")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it to log as a new run") from error
    return identity


def _note(folder: Path, identity: dict[str, Any]) -> None:
    partial = folder / f"{_FILE}.partial"
    partial.write_text(json.dumps(identity) + "\n", encoding="utf-8")
    partial.replace(folder / _FILE)
