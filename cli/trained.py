"""A trained model and its tokenizer, from any folder that holds one.

RUN                      its newest checkpoint; where none is left, its export/
RUN/checkpoints/NUMBER   that checkpoint, with the shape and the tokenizer of its run
FOLDER                   an export, or any Llama of Hugging Face's with safetensors weights and a tokenizer.json
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from .checkpoint import checkpoints
from .config import UserError
from .device import find_device
from .export import MODEL_CONFIG, TOKENIZER
from .model import Llama, load_config, load_weights
from .record import RECORD, check_files, read_record
from .tokens import load_tokenizer, vocabulary_size

RUN_CONFIG = "config.toml"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Place:
    """Where a model lies: the folder of its weights, that of its shape and tokenizer, and the run that made it."""

    weights: Path
    shape: Path
    run: Path | None = None


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, with float32 weights, and what it takes to use it."""

    model: Llama
    tokenizer: Tokenizer
    place: Place

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        end = self.model.config.eos_token_id
        return end if isinstance(end, tuple) else () if end is None else (end,)


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
    run = folder.absolute().parent.parent
    is_checkpoint = folder.absolute().parent.name == "checkpoints" and (run / RUN_CONFIG).is_file()
    return Place(folder, run, run) if is_checkpoint else Place(folder, folder)


def _of_run(run: Path) -> Place:
    saved = checkpoints(run)
    if saved:
        return Place(saved[-1], run, run)
    if _has_weights(run / "export"):
        return Place(run / "export", run / "export", run)
    raise UserError(f"run {run} has no checkpoint yet: wait for its first one, or start it again")


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _WEIGHTS)


def load_trained(folder: Path, *, device: str) -> Trained:
    """Load the model that a folder stands for, and its tokenizer.

    Args:
        folder: a run, an export, a checkpoint, or any other folder with a Llama's weights, config.json and
            tokenizer.json.
        device: where the model goes, such as "cpu" or "cuda"; "auto" takes an accelerator where there is one.

    Raises:
        UserError: for what is missing, torn or does not fit together, and for a device that is not there.
    """
    where, place = find_device(device), find_trained(folder)
    tokenizer = _tokenizer(place.shape / TOKENIZER)
    model = Llama(load_config(place.shape / MODEL_CONFIG))
    size, vocab_size = vocabulary_size(tokenizer), model.config.vocab_size
    if size > vocab_size:
        raise UserError(
            f"{place.shape / TOKENIZER} has {size} tokens, the model vocab_size={vocab_size}: use the model's own"
        )
    _check_whole(place.weights)
    load_weights(model, place.weights)
    return Trained(model.to(where).eval(), tokenizer, place)


def _check_whole(weights: Path) -> None:
    """Hold a checkpoint's weights against the checksum that they were written with; other folders have none."""
    if (weights / RECORD).is_file():
        record = read_record(weights)
        own = {name: entry for name, entry in record.files.items() if name in _WEIGHTS}
        check_files(weights, replace(record, files=own))


def _tokenizer(file: Path) -> Tokenizer:
    if not file.is_file():
        raise UserError(f"{file} does not exist: copy the model's tokenizer there, or export the model again")
    return load_tokenizer(file)
