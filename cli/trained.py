"""A trained model and its tokenizer, from any folder that holds one: see place.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from .device import find_device
from .errors import UserError
from .export import MODEL_CONFIG, TOKENIZER
from .model import Llama, load_config, load_weights
from .place import Place, find_trained
from .tokens import load_tokenizer, vocabulary_size


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, with float32 weights, and what it takes to use it."""

    model: Llama
    tokenizer: Tokenizer
    place: Place

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return self.model.config.ends


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
    place.check()
    load_weights(model, place.weights)
    return Trained(model.to(where).eval(), tokenizer, place)


def _tokenizer(file: Path) -> Tokenizer:
    if not file.is_file():
        raise UserError(f"{file} does not exist: copy the model's tokenizer there, or export the model again")
    return load_tokenizer(file)
