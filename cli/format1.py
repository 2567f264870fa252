"""Checkpoints of format 1, which had no checksums: model.safetensors, optimizer.pt, progress.json.

A run that has such ones is resumed by writing them in today's format, in their place. optimizer.pt is read with
weights_only, so that it runs no code.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from .checkpoint import write_all_but_weights
from .nested import pack
from .progress import progress_of
from .record import RECORD, DamagedError

_OPTIMIZER, _PROGRESS = "optimizer.pt", "progress.json"


def upgrade_checkpoint(checkpoint: Path) -> None:
    """Write a checkpoint of format 1 in today's; leave any other alone.

    Raises:
        DamagedError: for one that cannot be read; it stays as it is.
    """
    old = [checkpoint / name for name in (_PROGRESS, _OPTIMIZER)]
    if not old[0].exists():
        return
    if not (checkpoint / RECORD).exists():
        try:
            values = json.loads(old[0].read_text())
            if values.pop("format") != 1:
                raise ValueError("its format is not 1")
            progress = progress_of(values)
            state = torch.load(old[1], map_location="cpu", weights_only=True)
            packed, tensors = pack({"progress": asdict(progress), "config": {}, "optimizer": state, "random": {}})
        except Exception as error:  # a damaged file raises whatever its bytes suggest
            raise DamagedError(old[0], f"{type(error).__name__} of it or {_OPTIMIZER}") from error
        write_all_but_weights(checkpoint, packed, tensors)
    for path in old:
        path.unlink(missing_ok=True)
