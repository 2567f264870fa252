"""What a run is going to do, before it takes its time: a line of what it reads, and one of its lengths, most of which
follow from others.
"""

from __future__ import annotations

from dataclasses import replace

from .config import Config
from .corpus import Corpus
from .counted import counted
from .resolution import resolve

_LOW_RANK = (
    "alpha",
    "factor_lr",
    "init",
    "warm_start",
    "warm_start_at",
    "warm_start_turns",
    "restart_every",
    "restart_warmup",
    "prune",
)  # targets have lr


def describe_texts(corpus: Corpus) -> str:
    """Say how many documents are for training and how many are held out, and of how many tokens."""
    held_out = counted(corpus.num_val_documents, "document")
    return (
        f"{counted(len(corpus.train), 'token')} of {counted(corpus.num_train_documents, 'document')} for training, "
        f"{len(corpus.val):,} of {held_out} held out"
    )


def describe_plan(config: Config) -> str:
    """Say how many updates a run makes, at which rank and rates, and when it switches and restarts."""
    rates = f"at a rate of {config.lr:g}, {config.rest_lr:g} for what is no target"
    if config.rank == 0:
        return f"{counted(config.steps, 'update')} at full rank, {rates} (--rank, --lr and --rest-lr say otherwise)"
    every, at, switch, turns = config.restart_every, config.warm_start_at, config.switch, config.warm_start_turns
    num_restarts = len(range(every, at, every)) + len(range(switch + every, config.steps + 1, every)) if every else 0
    warm_start = f"{turns * config.warm_start:,} of them a warm start" if config.warm_start else "no warm start"
    warm_start += f" in {turns} turns of {config.warm_start:,}" if turns > 1 else ""
    warm_start += f" after the first {at:,}" if at else ""
    ended = ("each ended" if at else "all but the first ended") if turns > 1 else "ended" if at else ""
    warm_start += f", {ended} by a restart" if ended else ""
    none = "no other restart" if at or turns > 1 else "no restart"
    restarts = f"a restart every {every:,}: {num_restarts:,}" if num_restarts else none
    return (
        f"{counted(config.steps, 'update')} at rank {config.rank}, {warm_start}, {restarts}, {rates} "
        "(--rank, --warm-start, --restart-every, --lr and --rest-lr say otherwise)"
    )


def describe_idle(config: Config) -> str | None:
    """Say which options differ from their defaults and cannot count; recipes state everything, so none is refused."""
    usual = resolve({"steps": config.steps, "rank": config.rank, "warm_start": config.warm_start})
    usual = replace(usual, warm_start=0, restart_warmup=config.restart_every // 20)
    idle = [
        f"{name} ({reason})"
        for name, reason in _reasons(config).items()
        if getattr(config, name) != getattr(usual, name)
    ]
    if config.base == "sgd" and config.betas[1] != usual.betas[1]:
        idle.append("the second of betas (base=sgd)")
    return f"without effect here: {', '.join(idle)}" if idle else None


def _reasons(config: Config) -> dict[str, str]:
    """Return the options that cannot count, and why."""
    reasons = {"min_ratio": "outer=constant"} if config.outer == "constant" else {}
    if config.rank == 0:
        return reasons | dict.fromkeys(_LOW_RANK, "rank=0")
    if config.restart_every == 0:
        reasons["prune"] = "no restart"
        if config.warm_start == 0:
            reasons["restart_warmup"] = "neither restart nor warm start"
    return reasons
