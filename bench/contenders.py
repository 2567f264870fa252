"""What takes part in bench.step: every method with the formula of its bound, and the batches that all train on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from relora_opt_cli.model import Llama, LlamaConfig, init_weights
from torch import Tensor

from .costs import Shape
from .methods import METHODS

_STEPS = 1000  # the length of the schedules; no restart or refresh falls into what is timed


@dataclass(frozen=True)
class Contender:
    """A row of the table: a method of methods.py, with the formula of costs.py that it is held against."""

    name: str
    method: str
    cost: str
    settings: dict[str, Any]

    def build(self, shape: Shape, rank: int, dtype: torch.dtype, *, accumulate: int = 1, device: str = "cpu") -> Any:
        """Return its trainer over a fresh model; every contender's has the same weights."""
        model = Llama(
            LlamaConfig(
                shape.vocab_size,
                shape.width,
                shape.inner,
                shape.num_layers,
                max(1, shape.width // 64),
                max_position_embeddings=shape.seq_len,
            )
        )
        init_weights(model, seed=0)
        model.to(device)
        given = {key: rank if value == "rank" else value for key, value in self.settings.items()}
        settings = {"lr": 1e-4, "rest_lr": 1e-4, "dtype": dtype, "accumulate": accumulate, **given}
        return METHODS[self.method](model, settings, _STEPS, 0)


_OURS = {"rank": "rank", "alpha": "matched", "init": "orthogonal"}
_PEFT = {"rank": "rank", "alpha": "rank", "restart_every": 0, "restart_warmup": 0}
_PROJECTED = {"rank": "rank", "update_proj_gap": 10**9, "scale": 0.25}
_EAGER = {"compile": False}
_GRAPHS = {"compile": {"mode": "reduce-overhead"}}  # on a GPU; elsewhere it is compiled like the others
CONTENDERS = {
    "full": Contender("full-rank AdamW, compiled", "full", "full", {}),
    "full-eager": Contender("full-rank AdamW", "full", "full", _EAGER),
    "full-graphs": Contender("full-rank AdamW, CUDA graphs", "full", "full", _GRAPHS),
    "ours": Contender("relora-opt, compiled", "relora", "functional", _OURS),
    "ours-graphs": Contender("relora-opt, CUDA graphs", "relora", "functional", {**_OURS, **_GRAPHS}),
    "ours-muon": Contender("relora-opt over Muon, compiled", "relora", "functional", {**_OURS, "base": "muon"}),
    "ours-eager": Contender("relora-opt", "relora", "functional", {**_OURS, **_EAGER}),
    "dense": Contender("relora-opt, dense path, compiled", "relora", "dense", {**_OURS, "path": "dense"}),
    "peft": Contender("PEFT LoRA, compiled", "peft", "peft", _PEFT),
    "peft-eager": Contender("PEFT LoRA", "peft", "peft", {**_PEFT, **_EAGER}),
    "galore": Contender("galore-torch, compiled", "galore", "galore", _PROJECTED),
    "apollo": Contender("APOLLO, compiled", "apollo", "apollo", _PROJECTED),
    "fira": Contender("Fira, compiled", "fira", "fira", _PROJECTED),
}
USUAL = [key for key in CONTENDERS if not key.endswith("-graphs")]


def batches(shape: Shape, device: str = "cpu") -> Iterator[Tensor]:
    """Yield random batches for ever; every call yields the same ones."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch_size, shape.seq_len + 1)
    while True:
        yield torch.randint(0, shape.vocab_size, size, generator=generator).to(device)
