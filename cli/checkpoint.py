"""Checkpoints that resume exactly: weights, optimizer and progress of one moment, in one folder.

    checkpoints/00000120/model.safetensors   the effective weights
                         optimizer.pt        ReLoRAOptimizer.state_dict(): factors, moments, clock
                         progress.json       where the loop was

A checkpoint is written beside its place, flushed to the disk and renamed, so that a folder with that name is complete;
the latest one is the one with the highest number. Older ones are deleted only after the newer stands.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import torch
from torch import nn

from relora_opt import save_merged

from .config import UserError
from .model import Llama, load_weights

FORMAT = 1
_FOLDER = "checkpoints"
_WEIGHTS, _OPTIMIZER, _PROGRESS = "model.safetensors", "optimizer.pt", "progress.json"


@dataclass(frozen=True)
class Progress:
    """Where a training loop is.

    Args:
        update: updates applied.
        attempts: batches served; more than updates where one was skipped.
        seconds: time spent training.
        val_loss_start: validation loss before training, nats per token.
        val_loss_switch: the same after the warm start; None before it or without one.
        val_loss: the latest.
        is_finished: whether the run has reached its end.
        corpus: fingerprint of the texts that it trains on.
    """

    update: int
    attempts: int
    seconds: float
    val_loss_start: float | None = None
    val_loss_switch: float | None = None
    val_loss: float | None = None
    is_finished: bool = False
    corpus: str = ""


def save_checkpoint(run: Path, model: nn.Module, state: dict[str, Any], progress: Progress, *, keep: int) -> Path:
    """Write a checkpoint of a model and its optimizer's state, and delete all but the newest `keep`.

    Where this update has one already, only its progress is written again: weights and optimizer are the same.

    Raises:
        UserError: where the disk refuses (full, read-only); the checkpoints that were there stay.
    """
    folder = run / _FOLDER / f"{progress.update:08d}"
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if folder.is_dir():
            _write_progress(folder, progress)
            return folder
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_merged(model, partial / _WEIGHTS, max_shard_size="1000000GB")
        torch.save(state, partial / _OPTIMIZER)
        _write_progress(partial, progress)
        _flush(partial)
        os.replace(partial, folder)
        _flush_folder(folder.parent)
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    except (OSError, RuntimeError) as error:  # torch.save's own on a full disk is a RuntimeError, of a wrong position
        shutil.rmtree(partial, ignore_errors=True)
        hint = "" if isinstance(error, OSError) else " (is the disk full?)"
        raise UserError(
            f"checkpoint {folder} could not be written: {error}{hint}; earlier checkpoints are untouched"
        ) from error
    return folder


def _write_progress(folder: Path, progress: Progress) -> None:
    partial = folder / f".{_PROGRESS}.partial"
    try:
        partial.write_text(json.dumps({"format": FORMAT, **asdict(progress)}) + "\n", encoding="utf-8")
        _flush_file(partial)
        os.replace(partial, folder / _PROGRESS)
    finally:
        partial.unlink(missing_ok=True)


def checkpoints(run: Path) -> list[Path]:
    """Return a run's complete checkpoints, oldest first."""
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


def weights_of(path: Path) -> Path:
    """Return where a path's weights are: a run's newest checkpoint, or the path itself."""
    return latest_checkpoint(path) if checkpoints(path) else path


def read_progress(checkpoint: Path) -> Progress:
    """Read where the loop was.

    Raises:
        UserError: for a damaged file or another format.
    """
    path = checkpoint / _PROGRESS
    try:
        content: dict[str, Any] = dict(json.loads(path.read_text()))
        version = content.pop("format")
        if version != FORMAT:
            raise UserError(
                f"{path} has format {version} and not {FORMAT}: use the version of relora-opt that wrote it"
            )
        progress = Progress(**content)
        _check_types(progress)
        return progress
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is damaged ({error}): delete the folder {checkpoint} to go on from an earlier one"
        ) from error


class Loadable(Protocol):
    """An optimizer, as far as loading goes."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def load_checkpoint(checkpoint: Path, model: Llama, optimizer: Loadable | None = None) -> Progress:
    """Load weights, and the optimizer where one is given, in place.

    Raises:
        UserError: for damaged files or a state that does not fit.
    """
    progress = read_progress(checkpoint)
    load_weights(model, checkpoint)
    if optimizer is not None:
        load_state(checkpoint, optimizer)
    return progress


def load_state(checkpoint: Path, optimizer: Loadable) -> None:
    """Load the optimizer's state, in place.

    Raises:
        UserError: for a damaged file or a state that does not fit.
    """
    path = checkpoint / _OPTIMIZER
    remedy = f"delete the folder {checkpoint} to go on from an earlier one"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its bytes suggest; torch's advice is not for it
        raise UserError(
            f"{path} cannot be loaded: it is damaged, or no optimizer's state ({type(error).__name__}); {remedy}"
        ) from error
    try:
        optimizer.load_state_dict(state)
    except UserError:
        raise
    except Exception as error:  # torch's own loading raises whatever it likes, AssertionErrors too
        raise UserError(f"{path} cannot be loaded: {error or type(error).__name__}; {remedy}") from error


def _check_types(progress: Progress) -> None:
    """Raise a TypeError for a field of the wrong kind."""
    for name, kind in get_type_hints(Progress).items():
        value = getattr(progress, name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{name}={value!r} is not {kind}")


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        _flush_file(path)
    _flush_folder(folder)


def _flush_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
