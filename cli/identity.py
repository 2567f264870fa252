"""What a run is beside its options: its model's shape and its tokenizer, which lie in its folder for anybody to edit.

Checkpoints keep both, the tokenizer as a digest, and a run goes on with what it began with.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from .errors import UserError
from .export import MODEL_CONFIG, TOKENIZER
from .model import load_config


def identity_of(folder: Path) -> dict[str, Any]:
    """Return the shape, as config.json has it, and the SHA-256 of tokenizer.json; None where that is missing."""
    path = folder / TOKENIZER
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return {"shape": load_config(folder / MODEL_CONFIG).to_dict(), "tokenizer": digest}


def check_identity(folder: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Return the identity of a run, held against what a checkpoint keeps of it; one of an older version keeps nothing.

    Raises:
        UserError: names what has changed.
    """
    own = identity_of(folder)
    for name, value in saved.get("shape", {}).items():
        if own["shape"].get(name) != value:
            raise UserError(
                f"{name}={own['shape'].get(name)!r} in {folder / MODEL_CONFIG}, but {folder} was trained with "
                f"{value!r}: restore it, or start a new run"
            )
    if saved.get("tokenizer", own["tokenizer"]) != own["tokenizer"]:
        raise UserError(
            f"{folder / TOKENIZER} is not the tokenizer that {folder} was trained with: restore it, or start a new run"
        )
    return own
