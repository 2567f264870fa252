"""From a configuration to what is trained: the model's shape and the optimizer.

The selected matrices train at `lr`, with factors or without; all else, embeddings, head and norms, trains at `rest_lr`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from relora_opt import JaggedSchedule, ReLoRAOptimizer, constant, cosine, linear, prune, target_names, wsd

from .bases import base_optimizer
from .config import Config
from .corpus import Corpus
from .errors import UserError
from .export import MODEL_CONFIG
from .limits import parse_prune
from .model import PRESETS, LlamaConfig, load_config
from .origin import too_many_tokens
from .place import find_trained
from .tokens import own_ends

_OUTER = {"cosine": cosine, "linear": linear, "wsd": wsd}
_PRUNE: dict[str, Callable[..., prune.Strategy]] = {
    "reset": prune.reset,
    "keep": prune.keep,
    "magnitude": prune.magnitude,
    "random": prune.random,
}


def model_config(config: Config) -> LlamaConfig:
    if config.init_from is not None:
        return load_config(find_trained(Path(config.init_from)).shape / MODEL_CONFIG)
    if config.model is not None:
        return load_config(Path(config.model))
    assert config.preset is not None
    return PRESETS[config.preset]


def with_vocabulary(shape: LlamaConfig, corpus: Corpus, config: Config) -> LlamaConfig:
    """Give a preset the tokenizer's vocabulary; hold any other model against it.

    Texts end with what the corpus ends them with, unless the weights of the model have learned another end already:
    that of a shape without weights is of the tokenizer that it was written for.
    """
    size = corpus.vocab_size
    if config.preset is not None:
        longest = max(shape.max_position_embeddings, config.seq_len)
        return replace(shape, vocab_size=size, max_position_embeddings=longest, eos_token_id=corpus.eos_id)
    if shape.vocab_size < size:
        raise too_many_tokens(size, shape.vocab_size)
    if shape.max_position_embeddings < config.seq_len:
        raise UserError(
            f"seq_len={config.seq_len} is longer than the model's max_position_embeddings="
            f"{shape.max_position_embeddings}: shorten it"
        )
    if config.init_from is None:
        return replace(shape, bos_token_id=None, eos_token_id=corpus.eos_id, pad_token_id=None)
    if not shape.ends:
        return replace(shape, eos_token_id=corpus.eos_id)
    ends = own_ends(corpus.tokenizer, shape.ends)
    if ends and corpus.eos_id not in ends:
        raise UserError(
            f"the texts end with {_shown(corpus.eos_id, corpus)}, and those of init_from={config.init_from!r} with "
            f"{', '.join(_shown(end, corpus) for end in ends)}: tokenize them with that model's folder as "
            "--tokenizer, or correct its eos_token_id"
        )
    return shape


def _shown(token: int, corpus: Corpus) -> str:
    return f"token {token} ({corpus.tokenizer.id_to_token(token)!r})"


def make_optimizer(model: nn.Module, config: Config) -> ReLoRAOptimizer:
    """Return the optimizer of a configuration: low-rank weights, matrices too small for them, the rest.

    Raises:
        UserError: where no weight is selected or the rank fits none.
    """
    try:
        return ReLoRAOptimizer(
            _groups(model, config),
            base_optimizer(config, next(model.parameters()).device),
            rank=config.rank,
            alpha=config.alpha,
            schedule=make_schedule(config),
            init=config.init,
            prune=_prune(config),
            factor_lr=config.factor_lr,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Split the parameters: matrices with factors, matrices too small for them, everything else."""
    parameters = dict(model.named_parameters())
    matrices = target_names(model, config.targets)
    smaller = {name: min(parameters[name].shape[0], parameters[name][0].numel()) for name in matrices}
    low_rank = [name for name in matrices if smaller[name] > config.rank] if config.rank else []
    if config.rank and not low_rank:
        largest = max(smaller.values(), default=0)
        raise UserError(
            f"rank={config.rank} is not below the smaller side of any selected weight (the largest is {largest}): "
            "lower rank, or give rank 0 to train at full rank"
        )
    dense = [name for name in matrices if name not in low_rank]
    rest = [name for name in parameters if name not in matrices]
    groups = (
        (low_rank, {"rank": config.rank, "lr": config.lr, "is_matrices": True}),
        (dense, {"rank": 0, "lr": config.lr, "is_matrices": True}),
        (rest, {"rank": 0, "lr": config.rest_lr, "is_matrices": False}),
    )
    return [{"params": [(name, parameters[name]) for name in names], **own} for names, own in groups if names]


def make_schedule(config: Config) -> JaggedSchedule:
    """Return the clock of a configuration."""
    if config.outer == "constant":
        outer = constant(config.warmup)
    else:
        outer = _OUTER[config.outer](config.steps, warmup=config.warmup, min_ratio=config.min_ratio)
    has_warm_start = bool(config.rank and config.warm_start)  # else its place has no effect
    return JaggedSchedule(
        config.restart_every,
        restart_warmup=config.restart_warmup,
        warm_start=config.warm_start,
        warm_start_at=config.warm_start_at if has_warm_start else 0,
        warm_start_turns=config.warm_start_turns if has_warm_start else 1,
        outer=outer,
    )


def _prune(config: Config) -> prune.Strategy:
    name, ratio = parse_prune(config.prune)
    return _PRUNE[name]() if ratio is None else _PRUNE[name](ratio)
