"""Runs of a few thousand parameters, which take less than a second: for what happens to runs."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from relora_opt_cli.checkpoint import checkpoints
from relora_opt_cli.metrics import Row, read_metrics
from relora_opt_cli.resolution import resolve
from relora_opt_cli.train import start_run

SHAPE = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
STEPS, WARM_START, CYCLE = 20, 4, 5  # the switch after 4, restarts after 9, 14 and 19


def write_texts(folder: Path) -> Path:
    """Write some documents, of which training reads the last in the middle of a run and then begins again."""
    folder.mkdir(exist_ok=True)
    source = random.Random(0)
    for number in range(8):
        (folder / f"{number}.txt").write_text("".join(source.choices("abcdefgh ", k=150)))
    return folder


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the options of a tiny run in two micro-batches an update."""
    (folder / "shape.json").write_text(json.dumps(SHAPE))
    defaults = {
        "data": [str(write_texts(folder / "texts"))],
        "model": str(folder / "shape.json"),
        "out": str(folder / "run"),
        "vocab_size": 257,
        "seq_len": 16,
        "batch_size": 4,
        "micro_batch_size": 2,
        "steps": STEPS,
        "warm_start": WARM_START,
        "restart_every": CYCLE,
        "restart_warmup": 2,
        "rank": 4,
        "lr": 1e-2,
        "dtype": "float32",
        "eval_every": 6,
        "save_every": 1,
    }
    return {**defaults, **changes}


def train(folder: Path, **changes: Any) -> Path:
    """Train from the same random numbers each time: they are saved, and what is saved is compared."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    start_run(resolve(options(folder, **changes)))
    return Path(changes.get("out", folder / "run"))


def rows(run: Path) -> list[Row]:
    """Return a run's metrics without the one that depends on the clock on the wall."""
    return [replace(row, tokens_per_second=None) for row in read_metrics(run / "metrics.jsonl")]


def end_of(run: Path) -> dict[str, bytes]:
    """Return every byte of the weights and of the optimizer's state at a run's end."""
    last = checkpoints(run)[-1]
    paths = [last / "model.safetensors", last / "optimizer.safetensors", run / "export" / "model.safetensors"]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}
