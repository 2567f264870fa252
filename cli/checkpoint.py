"""Checkpoints that resume exactly: weights, optimizer, progress, configuration and random numbers of one moment.

    checkpoints/00000120/model.safetensors       the effective weights
                         optimizer.safetensors   every tensor of ReLoRAOptimizer.state_dict(): factors, moments, masters
                         state.json              all else, and the checksums of both: see record.py

A checkpoint is written beside its place, flushed to the disk and moved there, so that a folder with that name is
complete; the latest one is the one with the highest number, so it changes by that move and no earlier. Older ones are
removed only after the newer stands. Nothing in one is code: safetensors and JSON.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .disk import flushed, new_folder, partial_of, remove_folder, sweep
from .errors import UserError
from .model import Llama, load_weights
from .nested import pack, unpack
from .progress import Progress, progress_of
from .randomness import random_state, set_random_state
from .record import RECORD, TENSORS, WEIGHTS, DamagedError, Record, check_files, read_record, unread, write_record

_FOLDER = "checkpoints"
Write = Callable[[dict[str, Tensor], Path], None]
Read = Callable[[Path, Callable[[Mapping[str, Tensor]], Any]], dict[str, Tensor]]


@dataclass(frozen=True)
class Snapshot:
    """A run at a moment, in memory of its own: training may go on while it is written.

    Args:
        progress: where the loop is.
        weights: the model's, by name, on the CPU; tied ones once. Of sharded ones, what this process holds.
        tensors: of the optimizer's state and of the random numbers, likewise.
        values: all else, as `nested.pack` has it: progress, config, identity, optimizer, random.
    """

    progress: Progress
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    values: dict[str, Any]


def snapshot(
    model: nn.Module,
    optimizer: dict[str, Any],
    progress: Progress,
    config: dict[str, Any],
    *,
    identity: dict[str, Any] | None = None,
) -> Snapshot:
    """Copy what a checkpoint holds.

    Args:
        optimizer: `ReLoRAOptimizer.state_dict()`.
        config: the options, by name.
        identity: what the run is beside them, see identity.py.
    """
    said = {"progress": asdict(progress), "config": config, "identity": identity or {}}
    values, tensors = pack({**said, "optimizer": optimizer, "random": random_state()})
    weights = model.state_dict()  # of a sharded model it gives back what a forward pass has gathered
    return Snapshot(
        progress, _copied({name: weights[name] for name, _ in model.named_parameters()}), _copied(tensors), values
    )


def write_whole(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file of tensors that this process holds whole.

    Raises:
        OSError, SafetensorError: where the disk refuses.
    """
    path.touch()
    mode = path.stat().st_mode  # as the user's umask has it; safetensors makes its own file, for the owner alone
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def save_checkpoint(
    run: Path, taken: Snapshot, *, keep: int, keep_every: int | None = None, write: Write = write_whole
) -> Path:
    """Write a checkpoint, and remove all but the newest `keep` and those of every `keep_every`-th update.

    Args:
        write: writes tensors to a file; the first of several processes gets there what the others hold of them.

    Raises:
        UserError: where the disk refuses (full, read-only, gone); the checkpoints that were there stay.
    """
    folder = checkpoint_of(run, taken.progress.update)
    with _refused(folder):
        if not run.is_dir():  # who removes a run's folder does not want it back
            raise FileNotFoundError(f"the folder {run} is gone")
        sweep(folder.parent)
        with new_folder(folder) as place:
            write(taken.weights, place / WEIGHTS)
            write_all_but_weights(place, taken.values, taken.tensors, write)
        for old in _superfluous(run, keep, keep_every):
            remove_folder(old)
    return folder


def save_share(run: Path, taken: Snapshot, *, write: Write) -> None:
    """Write what this process holds of a checkpoint, for the first one, which is in `save_checkpoint` meanwhile.

    Raises:
        UserError: where the disk refuses.
    """
    folder = checkpoint_of(run, taken.progress.update)
    with _refused(folder):
        write(taken.weights, partial_of(folder) / WEIGHTS)
        write(taken.tensors, partial_of(folder) / TENSORS)


def write_all_but_weights(
    checkpoint: Path, values: dict[str, Any], tensors: dict[str, Tensor], write: Write = write_whole
) -> None:
    """Make a checkpoint of a folder that has the weights."""
    write(tensors, checkpoint / TENSORS)
    files = {name: flushed(checkpoint / name) for name in (WEIGHTS, TENSORS)}
    write_record(checkpoint, Record(files, values))


def save_progress(checkpoint: Path, progress: Progress, config: dict[str, Any]) -> None:
    """Write the progress and configuration of a checkpoint anew: no update was made since, so all else is the same.

    Raises:
        UserError: where the disk refuses, or the checkpoint is damaged.
    """
    record = read_record(checkpoint)
    values, _ = pack({"progress": asdict(progress), "config": config})
    with _refused(checkpoint):
        write_record(checkpoint, replace(record, values={**record.values, **values}))


def checkpoint_of(run: Path, update: int) -> Path:
    """Return where a run's checkpoint of an update is, or would be."""
    return run / _FOLDER / f"{update:08d}"


def checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, oldest first."""
    folder = run / _FOLDER
    return sorted(path for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def latest_checkpoint(run: Path) -> Path:
    """Return a run's newest checkpoint.

    Raises:
        UserError: where there is none.
    """
    found = checkpoints(run)
    if not found:
        raise UserError(
            f"{str(run)!r} holds no checkpoint to resume or export: give the folder of a run that has saved one"
        )
    return found[-1]


def newest_whole(run: Path, said: Callable[[str], None]) -> Path:
    """Return the newest checkpoint that is as it was written; give damaged ones after it another name.

    Args:
        said: takes one sentence for each damaged one.

    Raises:
        UserError: where there is none, or one cannot be read; all stay as they are.
    """
    newest = latest_checkpoint(run)
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints(run)):
        damage = damage_of(checkpoint)
        if damage is None:
            for path, reason in damaged.items():
                said(f"{reason}; it is now {_set_aside(path).name}, and the checkpoint before it is used")
            return checkpoint
        damaged[checkpoint] = damage
    raise UserError(f"{str(run)!r} holds no checkpoint that is whole; of the newest, {damaged[newest]}")


def _set_aside(checkpoint: Path) -> Path:
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    with _refused(checkpoint):
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
    return aside


def weights_of(path: Path) -> Path:
    """Return where a path's weights are: a run's newest checkpoint, or the path itself."""
    return latest_checkpoint(path) if checkpoints(path) else path


def damage_of(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint; None where every byte is as it was written.

    Raises:
        UserError: for one of another format.
    """
    try:
        check_files(checkpoint, read_record(checkpoint))
        read_progress(checkpoint)
    except DamagedError as error:
        return error.damage
    return None


def read_progress(checkpoint: Path) -> Progress:
    """Read where the loop was.

    Raises:
        UserError: for a damaged file or another format.
    """
    try:
        return progress_of(_value(checkpoint, "progress"))
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedError(checkpoint / RECORD, str(error)) from error


def read_config(checkpoint: Path) -> dict[str, Any]:
    """Read the options that the run had, by name.

    Raises:
        UserError: for a damaged file or another format.
    """
    config = _value(checkpoint, "config")
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        raise DamagedError(checkpoint / RECORD, "its config is no table of options")
    return config


def read_identity(checkpoint: Path) -> dict[str, Any]:
    """Read what the run was beside its options, see identity.py; empty for a checkpoint of an older version.

    Raises:
        UserError: for a damaged file or another format.
    """
    if "identity" not in read_record(checkpoint).values:
        return {}
    identity = _value(checkpoint, "identity")
    if not isinstance(identity, dict) or not isinstance(identity.get("shape", {}), dict):
        raise DamagedError(checkpoint / RECORD, "its identity is no table with a shape")
    return identity


class Loadable(Protocol):
    """An optimizer, as far as loading goes."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def load_checkpoint(checkpoint: Path, model: Llama, optimizer: Loadable | None = None) -> Progress:
    """Load weights, and the optimizer where one is given, in place, after the whole checkpoint was verified.

    Raises:
        UserError: for damaged files or a state that does not fit.
    """
    check_files(checkpoint, read_record(checkpoint))
    load_weights(model, checkpoint)
    if optimizer is not None:
        load_state(checkpoint, optimizer)
    return read_progress(checkpoint)


def read_whole(path: Path, _: Callable[[Mapping[str, Tensor]], Any]) -> dict[str, Tensor]:
    """Read the tensors of a file."""
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def load_state(checkpoint: Path, optimizer: Loadable, read: Read = read_whole) -> None:
    """Load the optimizer's state in place, and set the random numbers.

    Args:
        read: reads the tensors of a file, or of sharded ones a part; it is also given what makes their state of them.

    Raises:
        UserError: for a damaged file or a state that does not fit.
    """
    path = checkpoint / TENSORS
    remedy = f"delete the folder {checkpoint} to go on from an earlier one"
    try:
        tensors = read(path, partial(_value, checkpoint, "optimizer"))
        optimizer.load_state_dict(_value(checkpoint, "optimizer", tensors))
        random = _value(checkpoint, "random", tensors)
        if random:  # a checkpoint of format 1 had none
            set_random_state(random)
    except UserError:
        raise
    except SafetensorError as error:
        raise DamagedError(path, str(error)) from error
    except OSError as error:
        raise unread(path, error) from error
    except Exception as error:  # torch's own loading raises whatever it likes, AssertionErrors too
        raise UserError(f"{path} cannot be loaded: {error or type(error).__name__}; {remedy}") from error


@contextmanager
def _refused(checkpoint: Path) -> Iterator[None]:
    """Turn what the disk refuses into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {checkpoint} could not be written: {error}; earlier checkpoints are untouched"
        ) from error


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _value(checkpoint: Path, name: str, tensors: Mapping[str, Tensor] | None = None) -> Any:
    path = checkpoint / RECORD
    try:
        return unpack(read_record(checkpoint).values[name], tensors or {})
    except KeyError as error:
        raise DamagedError(path, f"there is no {name} in it") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise DamagedError(path, str(error)) from error


def _superfluous(run: Path, keep: int, keep_every: int | None) -> list[Path]:
    older = checkpoints(run)[:-keep]
    return [path for path in older if keep_every is None or int(path.name) % keep_every]
