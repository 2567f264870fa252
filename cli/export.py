"""An export: a folder that transformers' AutoModelForCausalLM and AutoTokenizer load.

config.json, generation_config.json, model.safetensors (or shards), tokenizer.json, tokenizer_config.json, and what else
the model that its run went on from has beside them: see companions.py
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer

from relora_opt import save_merged

from .checkpoint import latest_checkpoint, load_checkpoint
from .companions import all_companions
from .disk import partial_of
from .errors import UserError
from .model import Llama, LlamaConfig, load_config
from .place import run_of
from .record import WEIGHTS
from .tokens import load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER, MODEL_CONFIG = "tokenizer.json", "config.json"


def export_run(run: Path, out: Path, *, dtype: str | None = None) -> Path:
    """Export a run's newest checkpoint, or the one that is given.

    Args:
        run: the run folder, or that of one of its checkpoints. out: a folder that is new or empty.
        dtype: "float32", "bfloat16" or "float16"; None keeps float32.

    Raises:
        UserError: where the run has no checkpoint or tokenizer, `out` is not empty, or `dtype` is not known.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not known: choose one of {', '.join(DTYPES)}")
    owner = run_of(run)
    checkpoint, run = (latest_checkpoint(run), run) if owner is None else (run, owner)
    tokenizer = load_tokenizer(run / TOKENIZER)
    model = Llama(load_config(run / MODEL_CONFIG))
    load_checkpoint(checkpoint, model)
    return write_export(model, tokenizer, run, out, dtype=dtype)


def write_export(model: Llama, tokenizer: Tokenizer, run: Path, out: Path, *, dtype: str | None = None) -> Path:
    """Write a model and its tokenizer to a folder, whole or not at all.

    Args:
        run: the folder of the model's run, for what lies beside them.

    Raises:
        UserError: where the folder holds something already, or cannot be written.
    """
    name = dtype or "float32"
    return _write(lambda path: save_merged(model, path, DTYPES[name]), model.config, tokenizer, run, out, name)


def export_checkpoint(checkpoint: Path, shape: LlamaConfig, tokenizer: Tokenizer, run: Path, out: Path) -> Path:
    """Write an export whose weights are a checkpoint's file, without reading it into memory.

    Args:
        run: as in `write_export`.

    Raises:
        UserError: where the folder holds something already, or cannot be written.
    """
    return _write(partial(shutil.copyfile, checkpoint / WEIGHTS), shape, tokenizer, run, out, "float32")


def _write(
    write_weights: Callable[[Path], object], shape: LlamaConfig, tokenizer: Tokenizer, run: Path, out: Path, dtype: str
) -> Path:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={str(out)!r} is not empty: give a folder that is new or empty")
    place = partial_of(out.absolute())  # "." has no name
    try:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for name, content in all_companions(run, tokenizer, shape).items():
            (place / name).write_bytes(content)
        (place / MODEL_CONFIG).write_text(json.dumps(shape.to_dict(dtype), indent=2) + "\n")
        write_weights(place / WEIGHTS)
        (place / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        os.replace(place, out.absolute())
    except OSError as error:
        raise UserError(
            f"out={str(out)!r} cannot be written: {error.strerror or error}; give another folder, or make room"
        ) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return out
