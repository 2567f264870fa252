"""Where a model lies, from any folder that holds one.

RUN                      its newest checkpoint; where none is left, its export/
RUN/checkpoints/NUMBER   that checkpoint, with the shape and the tokenizer of its run
FOLDER                   an export, or any Llama of Hugging Face's with safetensors weights and a tokenizer.json
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .checkpoint import checkpoints
from .errors import UserError
from .record import RECORD, check_files, read_record

RUN_CONFIG = "config.toml"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Place:
    """Where a model lies: the folder of its weights, that of its shape and tokenizer, and the run that made it."""

    weights: Path
    shape: Path
    run: Path | None = None

    def check(self) -> None:
        """Hold a checkpoint's weights against the checksum that they were written with; other folders have none.

        Raises:
            UserError: where they are damaged.
        """
        if (self.weights / RECORD).is_file():
            record = read_record(self.weights)
            own = {name: entry for name, entry in record.files.items() if name in _WEIGHTS}
            check_files(self.weights, replace(record, files=own))


def find_trained(folder: Path) -> Place:
    """Say where the model that a folder stands for lies.

    Raises:
        UserError: where there is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give a run, an export or another folder with a model's weights")
    if (folder / RUN_CONFIG).is_file():
        return _of_run(folder)
    if not _has_weights(folder):
        raise UserError(f"{folder} holds no {_WEIGHTS[0]}: give a run, an export or another folder that does")
    run = run_of(folder)
    return Place(folder, folder) if run is None else Place(folder, run, run)


def run_of(folder: Path) -> Path | None:
    """Return the run that a folder is a checkpoint of; None where it is none."""
    place = folder.absolute().parent
    run = place.parent
    return run if place.name == "checkpoints" and (run / RUN_CONFIG).is_file() else None


def _of_run(run: Path) -> Place:
    saved = checkpoints(run)
    if saved:
        return Place(saved[-1], run, run)
    if _has_weights(run / "export"):
        return Place(run / "export", run / "export", run)
    raise UserError(f"run {run} has no checkpoint yet: wait for its first one, or start it again")


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _WEIGHTS)
