"""What lies beside a model's weights for transformers alone: how its tokenizer is used, a chat written, a text drawn.

A run that goes on from weights keeps copies, so that its exports have them, whatever becomes of the folder that it went
on from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .model import LlamaConfig
from .tokens import end_of_text_id

TOKENIZER_CONFIG, _GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
_NAMES = (TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja", _GENERATION_CONFIG)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def companions(folder: Path) -> dict[str, bytes]:
    """Return the files of that kind that lie in a folder, by their names."""
    return {name: (folder / name).read_bytes() for name in _NAMES if (folder / name).is_file()}


def tokenizer_config(tokenizer: Tokenizer, shape: LlamaConfig, *, end: int | None = None) -> bytes:
    """Return a tokenizer_config.json.

    Args:
        end: the token that texts end with; None is the one that they end with by the rule of tokens.py.
    """
    end = end_of_text_id(tokenizer, shape.ends) if end is None else end
    return _json(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": shape.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            "eos_token": tokenizer.id_to_token(end),
        }
    )


def all_companions(folder: Path, tokenizer: Tokenizer, shape: LlamaConfig) -> dict[str, bytes]:
    """Return the files of that kind for an export: those of a folder, and what it has none of made from the model."""
    own = companions(folder)
    if TOKENIZER_CONFIG not in own:
        own[TOKENIZER_CONFIG] = tokenizer_config(tokenizer, shape)
    ids = {key: value for key, value in shape.to_dict().items() if key in _IDS and value is not None}
    return {_GENERATION_CONFIG: _json(ids), **own}


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"
