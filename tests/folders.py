"""Folders that hold a model, for tests of what is done with one."""

import json
import shutil
from pathlib import Path

from relora_opt_cli.model import Llama, LlamaConfig, init_weights
from safetensors.torch import save_file
from tokenizer import END, byte_tokenizer

WINDOW = 8
CONFIG = LlamaConfig(257, 16, 32, 1, 2, max_position_embeddings=WINDOW, initializer_range=0.3, eos_token_id=END)


def small_model(config: LlamaConfig = CONFIG, *, seed: int = 0) -> Llama:
    model = Llama(config)
    init_weights(model, seed=seed)
    return model


def write_export(folder: Path, config: LlamaConfig = CONFIG, *, seed: int = 0) -> Path:
    """Write a small Llama with random weights and its tokenizer, as an export has them."""
    write_weights(folder, config, seed=seed)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_weights(folder: Path, config: LlamaConfig = CONFIG, *, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(small_model(config, seed=seed).state_dict())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_run(folder: Path, config: LlamaConfig = CONFIG, *, checkpoints: int = 2) -> Path:
    """Write what a run has of a model: checkpoint i has the weights of seed i, and its export those of the last."""
    write_export(folder / "export", config, seed=checkpoints - 1)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(folder / "export" / name, folder / name)
    (folder / "config.toml").touch()
    for i in range(checkpoints):
        write_weights(folder / "checkpoints" / f"{i * 100:08d}", config, seed=i)
    return folder
