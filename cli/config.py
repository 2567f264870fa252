"""What a run is told: one flat list of options, from flags, a TOML file, a preset and what follows from the others.

`Config` declares every option once: its name, type and help make the flag `--restart-every`, the key `restart_every` of
`--config FILE.toml`, and the line of the run folder's config.toml (config_file.py reads and writes both). Options that
are not given are None in the raw dictionaries; `resolve` fills them, flags before file before preset, and checks the
whole before any work is done.

This file imports neither torch nor the library, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from dataclasses import dataclass, field
from typing import Any

Options = dict[str, Any]


class UserError(ValueError):
    """Something the user can mend: one sentence with the value and the remedy. The command ends with status 2."""


def _option(help: str, *, panel: str) -> Any:
    return field(metadata={"help": help, "panel": panel})


_DATA, _MODEL, _LENGTH, _RATES = "Data", "Model", "Length and batch", "Base optimizer and rates"
_LOW_RANK, _MACHINE, _RUN = "Low rank", "Machine", "Run"
_CYCLE, _LAST_CYCLE, _FEWEST_CYCLES = 500, 450, 3  # what is shorter gains nothing by a restart: bench/README.md


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
    lr: float = _option("Learning rate of the selected weights. (default: by preset)", panel=_RATES)
    rest_lr: float = _option("Learning rate of embeddings, head and norms. (default: by preset, or lr)", panel=_RATES)
    outer: str = _option("Schedule: cosine, linear, wsd or constant. (default: cosine)", panel=_RATES)
    warmup: int = _option("Updates of linear warm-up. (default: a twentieth of the run)", panel=_RATES)
    min_ratio: float = _option("The schedule's end, as a share of its peak. (default: 0.1)", panel=_RATES)
    weight_decay: float = _option("Weight decay of the base optimizer. (default: 0)", panel=_RATES)
    betas: tuple[float, float] = _option(
        "Betas of Adam; SGD's momentum is the first. (default: 0.9 0.95)", panel=_RATES
    )
    max_grad_norm: float = _option("Largest gradient norm; inf does not clip. (default: 1)", panel=_RATES)

    rank: int = _option("Rank of the factors; 0 trains at full rank. (default: by preset)", panel=_LOW_RANK)
    alpha: float | str | None = _option(
        'Scale alpha / rank, or "matched": updates as large as at full rank. (default: matched)', panel=_LOW_RANK
    )
    targets: str | None = _option(
        "Low-rank weights, a regular expression. (default: linear layers but the head)", panel=_LOW_RANK
    )
    factor_lr: float = _option("Multiplies the rate for factors. (default: 1)", panel=_LOW_RANK)
    init: str = _option("How A is drawn: kaiming, orthogonal or gradient. (default: orthogonal)", panel=_LOW_RANK)
    warm_start: int = _option("Full-rank updates before the first cycle. (default: 0)", panel=_LOW_RANK)
    restart_every: int = _option(
        f"Updates in a cycle; 0 is plain LoRA. (default: {_CYCLE} or a few more in runs of {_FEWEST_CYCLES * _CYCLE} "
        "and more, else 0)",
        panel=_LOW_RANK,
    )
    restart_warmup: int = _option(
        "Updates of the ramp after a restart. (default: a twentieth of a cycle)", panel=_LOW_RANK
    )
    prune: str = _option(
        "State at a restart: reset, keep, magnitude:0.9 or random:0.99. (default: reset)", panel=_LOW_RANK
    )

    dtype: str = _option("Matrix products in auto, float32 or bfloat16. (default: auto)", panel=_MACHINE)
    compile: bool | None = _option(
        "Compile the step. (default: on CUDA, and on a CPU where the run is long enough to pay for it)", panel=_MACHINE
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
    save_every: int = _option("Updates between checkpoints. (default: a fifth of the run)", panel=_RUN)
    keep: int = _option("Newest checkpoints to keep. (default: 2)", panel=_RUN)
    keep_every: int | None = _option("Keep those of every so many updates too. (default: none)", panel=_RUN)
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


FIELDS = {item.name: item for item in dataclasses.fields(Config)}

_GENERAL: Options = {
    "data": (),
    "allow_lossy": False,
    "seq_len": 256,
    "batch_size": 8,
    "base": "adamw",
    "outer": "cosine",
    "min_ratio": 0.1,
    "weight_decay": 0.0,
    "betas": (0.9, 0.95),
    "max_grad_norm": 1.0,
    "alpha": "matched",
    "init": "orthogonal",
    "factor_lr": 1.0,
    "prune": "reset",
    "dtype": "auto",
    "device": "auto",
    "checkpoint_activations": False,
    "shard": False,
    "keep": 2,
    "max_loss_jump": 10.0,
    "max_skips": 20,
    "log": (),
    "seed": 0,
}
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
_POSITIVE_COUNTS = (
    *("seq_len", "steps", "batch_size", "micro_batch_size"),
    *("eval_every", "save_every", "keep", "max_skips"),
)
_COUNTS = ("rank", "warmup", "warm_start", "restart_every", "restart_warmup")
_RATES_FINITE = ("lr", "rest_lr", "factor_lr", "weight_decay")


def resolve(options: Options) -> Config:
    """Fill what is not given and check the whole.

    Args:
        options: values by the names of `Config`; None means not given.

    Raises:
        UserError: for an unknown name, a value of the wrong kind, or values that do not go together.
    """
    check_names(options, "options")
    given = {name: _typed(name, value) for name, value in options.items() if value is not None}
    if sum(name in given for name in ("preset", "model", "init_from")) > 1:
        raise UserError("preset, model and init_from each say what the model is: give one of them")
    if "model" not in given and "init_from" not in given:
        given.setdefault("preset", DEFAULT_PRESET)
    filled = {**dict.fromkeys(FIELDS), **_GENERAL, **_preset_options(given.get("preset")), **given}
    if "lr" in given and "rest_lr" not in given:
        filled["rest_lr"] = filled["lr"]
    config = Config(**_follow(filled, given))
    _check(config)
    return config


def changed(config: Config, options: Options) -> Config:
    """Return a resolved configuration with some options changed; nothing else follows from them.

    Raises:
        UserError: as `resolve`.
    """
    given = {name: _typed(name, value) for name, value in options.items()}
    if "tokens" in given:
        if "steps" in given:
            raise UserError(f"steps={given['steps']} and tokens={given['tokens']} both say how long to train: give one")
        given["steps"] = _steps_of(given["tokens"], config.batch_size * config.seq_len)
    config = dataclasses.replace(config, **given)
    _check(config)
    return config


def _preset_options(preset: str | None) -> Options:
    if preset is None:
        return {"lr": 1e-3, "rank": 128, "steps": 1000}
    if preset not in PRESETS:
        raise UserError(f"preset={preset!r} is not known: choose one of {', '.join(PRESETS)}")
    return PRESETS[preset]


def _follow(filled: Options, given: Options) -> Options:
    """Derive what follows from other options: lengths are shares of the run or of the cycle."""
    if "steps" in given and "tokens" in given:
        raise UserError(f"steps={filled['steps']} and tokens={filled['tokens']} both say how long to train: give one")
    if filled["tokens"] is not None:
        filled["steps"] = _steps_of(filled["tokens"], filled["batch_size"] * filled["seq_len"])
    steps = filled["steps"]

    def default(name: str, value: Any) -> None:
        if filled[name] is None:
            filled[name] = value

    default("warmup", steps // 20)
    default("warm_start", 0)
    default("restart_every", _restart_every(steps - filled["warm_start"]))
    default("restart_warmup", filled["restart_every"] // 20)
    default("eval_every", max(1, steps // 10))
    default("save_every", max(1, steps // 5))
    default("micro_batch_size", filled["batch_size"])
    default("rest_lr", filled["lr"])
    default("out", "")
    return filled


def _restart_every(updates: int) -> int:
    """Return the shortest cycle whose restarts pay in so many low-rank updates; 0 where none does.

    Cycles are as equal as may be: the end of the run cuts the last one short, but leaves it `_LAST_CYCLE` updates.
    """
    for cycles in range(updates // _CYCLE, _FEWEST_CYCLES - 1, -1):
        length = updates // cycles + 1  # so that none ends at the end
        if updates - (cycles - 1) * length >= _LAST_CYCLE:
            return length
    return 0


def _steps_of(tokens: int, per_update: int) -> int:
    if tokens < per_update:
        raise UserError(f"tokens={tokens} is less than one update's {per_update}: give more")
    return tokens // max(1, per_update)


def _check(config: Config) -> None:
    for name in FIELDS:
        _check_text(name, getattr(config, name))
    for name in _POSITIVE_COUNTS:
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be a whole number of at least 1")
    for name in _COUNTS:
        if getattr(config, name) < 0:
            raise UserError(f"{name}={getattr(config, name)} must be a whole number, 0 or more")
    for name in _RATES_FINITE:
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{name}={value} must be a finite number, 0 or more")
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise UserError(f"{name}={getattr(config, name)!r} is not known: choose one of {', '.join(choices)}")
    for name in config.log:
        if name not in LOGS:
            raise UserError(f"log={name!r} is not known: choose among {', '.join(LOGS)}")
        if config.log.count(name) > 1:
            raise UserError(f"log={name!r} is given twice: once will do")
    is_number = isinstance(config.alpha, float) and math.isfinite(config.alpha) and config.alpha > 0
    if not (config.alpha is None or config.alpha == "matched" or is_number):
        raise UserError(f'alpha={config.alpha} must be a positive number, the scale is alpha / rank, or "matched"')
    if not all(0 <= beta < 1 for beta in config.betas):
        raise UserError(f"betas={config.betas} must lie between 0 and 1, 1 not included")
    if not 0 <= config.min_ratio <= 1:
        raise UserError(f"min_ratio={config.min_ratio} must lie between 0 and 1: it is a share of the peak rate")
    if config.val_share is not None and not 0 < config.val_share <= 0.5:
        raise UserError(f"val_share={config.val_share} must lie above 0 and not above 0.5: it is a share of the texts")
    if not config.max_grad_norm > 0:
        raise UserError(f"max_grad_norm={config.max_grad_norm} must be positive; inf does not clip")
    if not config.max_loss_jump > 0:
        raise UserError(f"max_loss_jump={config.max_loss_jump} must be positive; inf skips no loss that is finite")
    if config.warmup > config.steps:
        raise UserError(f"warmup={config.warmup} is longer than the run, steps={config.steps}: shorten it")
    if 0 < config.restart_every < config.restart_warmup:
        raise UserError(
            f"restart_warmup={config.restart_warmup} is longer than restart_every={config.restart_every}: "
            "the rate would never recover; shorten the ramp"
        )
    if config.rank > 0:
        _check_cycles(config)
    if config.batch_size % config.micro_batch_size:
        raise UserError(
            f"micro_batch_size={config.micro_batch_size} must divide batch_size={config.batch_size}, so that every "
            "update sees as many sequences"
        )
    for name in ("threads", "keep_every"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be a whole number of at least 1")
    if config.vocab_size is not None and config.vocab_size < 257:
        raise UserError(f"vocab_size={config.vocab_size} must be at least 257: 256 bytes and the end of text")
    parse_prune(config.prune)


def _check_text(name: str, value: Any) -> None:
    """Refuse what config.toml cannot say: a path of bytes that are no UTF-8 comes as text with surrogates."""
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{name}={text!r} is not UTF-8: rename the file or folder") from error


def _check_cycles(config: Config) -> None:
    """Refuse a run that would end before what it asks for begins."""
    if config.warm_start >= config.steps:
        raise UserError(
            f"warm_start={config.warm_start} leaves no low-rank update in steps={config.steps}: shorten it, or give "
            "rank 0 to train at full rank"
        )
    first = config.warm_start + config.restart_every
    if config.restart_every > 0 and first > config.steps:
        raise UserError(
            f"restart_every={config.restart_every} puts the first restart after update {first}, beyond "
            f"steps={config.steps}: shorten it, or give 0 for no restart"
        )


def parse_prune(text: str) -> tuple[str, float | None]:
    """Read "reset", "keep", "magnitude:0.9" or "random:0.99" as (name, ratio)."""
    name, _, ratio = text.partition(":")
    if name in ("reset", "keep") and not ratio:
        return name, None
    try:
        share = float(ratio)
    except ValueError:
        share = math.nan
    if name in ("magnitude", "random") and 0 <= share <= 1:
        return name, share
    raise UserError(f"prune={text!r} is not known: reset, keep, magnitude:0.9 or random:0.99, with a share of 0 to 1")


def check_names(options: Options, where: str) -> None:
    """Refuse names that are no options; `where` says whose they are."""
    for name in options:
        if name not in FIELDS:
            close = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(FIELDS)}"
            raise UserError(f"{where}: {name!r} is not an option; {hint}")


def _typed(name: str, value: Any) -> Any:
    """Return an option's value in its type; a TOML file may hold any."""
    kind = str(FIELDS[name].type).removesuffix(" | None")
    if kind.startswith("tuple"):
        items = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else None
        size, item_kind = (2, float) if kind == "tuple[float, float]" else (None, str)
        if items is not None and (size is None or len(items) == size):
            numbers = item_kind is float and all(_is_number(item) for item in items)
            if numbers or (item_kind is str and all(isinstance(item, str) for item in items)):
                return tuple(item_kind(item) for item in items)
    elif kind.startswith("float"):
        if _is_number(value):
            return float(value)
        if kind == "float | str" and isinstance(value, str):
            return _number_or_word(value)
    elif (kind == "bool") == isinstance(value, bool) and isinstance(value, {"int": int, "bool": bool}.get(kind, str)):
        return value
    raise UserError(f"{name}={value!r} is of the wrong kind: it must be {kind}")


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _is_number(value: Any) -> bool:
    is_whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return is_whole or isinstance(value, float)
