"""What a run is told: one flat list of options, and the presets.

`Config` declares every option once: its name, type and help make the flag `--restart-every`, the key `restart_every` of
`--config FILE.toml`, and the line of the run folder's config.toml (config_file.py reads and writes both). Options that
are not given are None in the raw dictionaries; resolution.py fills them.

This file imports neither torch nor the library, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

Options = dict[str, Any]


def _option(help: str, *, panel: str) -> Any:
    return field(metadata={"help": help, "panel": panel})


_DATA, _MODEL, _LENGTH, _RATES = "Data", "Model", "Length and batch", "Base optimizer and rates"
_LOW_RANK, _MACHINE, _RUN = "Low rank", "Machine", "Run"
# What is shorter gains nothing by a restart, or loses: bench/README.md. A cycle is in updates for each rank.
CYCLE, FEWEST_CYCLES = 62.5, 3


@dataclass(frozen=True)
class Config:
    """A run, resolved. Lengths are in updates, unless a name says otherwise."""

    data: tuple[str, ...] = _option(
        "Texts: .txt (a document a file), .jsonl (.zst, .gz), .parquet, folders, patterns, NAME:CONFIG:SPLIT for the "
        "datasets library, or a folder made by relora-opt tokenize. (default: State of the Union messages)",
        panel=_DATA,
    )
    text_field: str | None = _option("Key of the text in lines and tables. (default: text)", panel=_DATA)
    val_share: float | None = _option("Share of the documents to hold out. (default: 0.05)", panel=_DATA)
    tokenizer: str | None = _option("A tokenizer.json, or a folder with one, instead of training one.", panel=_DATA)
    allow_lossy: bool = _option("Take a tokenizer that does not give every text back.", panel=_DATA)
    vocab_size: int | None = _option("Tokens of the vocabulary to train. (default: by preset)", panel=_DATA)
    seq_len: int = _option("Tokens in a sequence. (default: by preset)", panel=_DATA)

    preset: str | None = _option("Size by name: 5m, 60m, 130m, 250m, 350m or 1.3b. (default: 5m)", panel=_MODEL)
    model: str | None = _option("A Llama's config.json, instead of a preset.", panel=_MODEL)
    init_from: str | None = _option(
        "Weights to go on from: a run, a checkpoint, an export, or any Llama's folder.", panel=_MODEL
    )

    steps: int = _option("Updates to train for. (default: by preset)", panel=_LENGTH)
    tokens: int | None = _option("Tokens to train on, instead of --steps.", panel=_LENGTH)
    batch_size: int = _option("Sequences in an update. (default: by preset)", panel=_LENGTH)
    micro_batch_size: int = _option("Sequences in one pass. (default: the batch size)", panel=_LENGTH)

    base: str = _option("Base optimizer: adamw, sgd or muon. (default: adamw)", panel=_RATES)
    lr: float = _option("Learning rate of the selected weights. (default: by preset, or 0.001)", panel=_RATES)
    rest_lr: float = _option(
        "Learning rate of what is no target: embeddings, head, norms. (default: by preset, or lr)", panel=_RATES
    )
    outer: str = _option("Schedule: cosine, linear, wsd or constant. (default: cosine)", panel=_RATES)
    warmup: int = _option("Updates of linear warm-up. (default: a twentieth of the run)", panel=_RATES)
    min_ratio: float = _option("The schedule's end, as a share of its peak. (default: 0.1)", panel=_RATES)
    weight_decay: float = _option("Weight decay of the base optimizer. (default: 0)", panel=_RATES)
    betas: tuple[float, float] = _option(
        "Betas of Adam; SGD's momentum is the first. (default: 0.9 0.95)", panel=_RATES
    )
    max_grad_norm: float = _option("Largest gradient norm; inf does not clip. (default: 1)", panel=_RATES)

    rank: int = _option("Rank of the factors; 0 trains at full rank. (default: by preset, or 128)", panel=_LOW_RANK)
    alpha: float | str | None = _option(
        'Scale alpha / rank, or "matched": updates as large as at full rank. (default: matched)', panel=_LOW_RANK
    )
    targets: str | None = _option(
        "Low-rank weights, a regular expression. (default: linear layers but the head)", panel=_LOW_RANK
    )
    factor_lr: float = _option("Multiplies the rate for factors. (default: 1)", panel=_LOW_RANK)
    init: str = _option("How A is drawn: kaiming, orthogonal or gradient. (default: orthogonal)", panel=_LOW_RANK)
    warm_start: int = _option("Updates at full rank. (default: 0)", panel=_LOW_RANK)
    warm_start_at: int = _option(
        "Low-rank updates before those; at 0 they come first, as in the paper. (default: 0)", panel=_LOW_RANK
    )
    warm_start_turns: int = _option(
        "Parts of the low-rank weights that train at full rank one after the other, each for --warm-start updates, in "
        "a part's memory. (default: 1)",
        panel=_LOW_RANK,
    )
    restart_every: int = _option(
        f"Updates in a cycle; 0 is plain LoRA. (default: {CYCLE:g} times the rank or a few more, where the run has "
        f"{FEWEST_CYCLES} such cycles, else 0)",
        panel=_LOW_RANK,
    )
    restart_warmup: int = _option(
        "Updates of the ramp after a restart or a switch. (default: a twentieth of a cycle; where there is none, a "
        "tenth of a warm start in the middle or in turns)",
        panel=_LOW_RANK,
    )
    prune: str = _option(
        "State at a restart: reset, keep, magnitude:0.9 or random:0.99. (default: reset)", panel=_LOW_RANK
    )

    dtype: str = _option("Matrix products in auto, float32 or bfloat16. (default: auto)", panel=_MACHINE)
    compile: bool | None = _option(
        "Compile the step. (default: on CUDA, and on a CPU where the run is long enough to pay for it)", panel=_MACHINE
    )
    cuda_graphs: bool = _option(
        "Record the passes as CUDA graphs, for models so small that a GPU waits for Python. (default: no)",
        panel=_MACHINE,
    )
    checkpoint_activations: bool = _option(
        "Keep only the layers' inputs for the backward pass, and compute the rest again. (default: keep all)",
        panel=_MACHINE,
    )
    shard: bool = _option(
        "Share weights and optimizer state out over the processes (FSDP2). (default: every process has all)",
        panel=_MACHINE,
    )
    device: str = _option("auto, cpu, cuda, ... (default: auto)", panel=_MACHINE)
    threads: int | None = _option("CPU threads. (default: torch's choice)", panel=_MACHINE)

    out: str = _option("Folder of the run. (default: runs/ and the time)", panel=_RUN)
    eval_every: int = _option("Updates between evaluations. (default: a tenth of the run)", panel=_RUN)
    save_every: int = _option("Updates between checkpoints. (default: a fifth of the run, or --keep-every)", panel=_RUN)
    keep: int = _option("Newest checkpoints to keep. (default: 2)", panel=_RUN)
    keep_every: int | None = _option(
        "Keep those of every so many updates too, a multiple of --save-every. (default: none)", panel=_RUN
    )
    max_loss_jump: float = _option(
        "Skip updates whose loss is so many standard deviations, and 1 nat, above the last 50; inf skips none. "
        "(default: 10)",
        panel=_RUN,
    )
    max_skips: int = _option(
        "Updates in a row to skip, for a loss that jumps or is not finite, before the run ends. (default: 20)",
        panel=_RUN,
    )
    log: tuple[str, ...] = _option(
        "Write the metrics to tensorboard, trackio or wandb too; several by repeating. (default: metrics.jsonl alone)",
        panel=_RUN,
    )
    seed: int = _option("Of the weights, the order of the data and the draws. (default: 0)", panel=_RUN)

    @property
    def switch(self) -> int:
        """The last update of the warm start; 0 where there is none."""
        return self.warm_start_at + self.warm_start_turns * self.warm_start


FIELDS = {item.name: item for item in dataclasses.fields(Config)}

_SMALL: Options = {"steps": 600, "lr": 1e-3, "rest_lr": 8e-3, "rank": 64}
_PAPER: Options = {"seq_len": 512, "rank": 128, "batch_size": 64, "steps": 20_000}
PRESETS: dict[str, Options] = {
    "5m": _SMALL,
    "60m": {**_PAPER, "lr": 1e-3},  # the paper's full-rank rates (recipes/), which a matched scale carries over
    "130m": {**_PAPER, "lr": 1e-3},
    "250m": {**_PAPER, "lr": 5e-4},
    "350m": {**_PAPER, "lr": 5e-4},
    "1.3b": {**_PAPER, "lr": 2e-4},
}
DEFAULT_PRESET = "5m"

CHOICES = {
    "base": ("adamw", "sgd", "muon"),
    "outer": ("cosine", "linear", "wsd", "constant"),
    "init": ("kaiming", "orthogonal", "gradient"),
    "dtype": ("auto", "float32", "bfloat16"),
}
LOGS = ("tensorboard", "trackio", "wandb")
