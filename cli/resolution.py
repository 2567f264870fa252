"""From the options that are given to those of a run: what presets say, and what follows from the others.

Flags win over a file, a file over a preset, a preset over what holds for all runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from typing import Any

from .config import CYCLE, DEFAULT_PRESET, FEWEST_CYCLES, FIELDS, PRESETS, Config, Options
from .errors import UserError
from .limits import check, check_kept

_FEWEST_RAMP = 10  # updates into full rank in the middle of a run, where no cycle says how many
_LAST_CYCLE = 0.9  # of a cycle: what the end of a run leaves the last one at least
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
    "cuda_graphs": False,
    "checkpoint_activations": False,
    "shard": False,
    "keep": 2,
    "max_loss_jump": 10.0,
    "max_skips": 20,
    "log": (),
    "seed": 0,
}


def resolve(options: Options, *, has_begun: bool = False) -> Config:
    """Fill what is not given and check the whole.

    Args:
        options: values by the names of `Config`; None means not given.
        has_begun: they are those of a run that is there, see limits.py.

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
    check(config, has_begun=has_begun)
    return config


def changed(config: Config, options: Options) -> Config:
    """Return the configuration of a run that has begun with some options changed; nothing else follows from them.

    Raises:
        UserError: as `resolve`.
    """
    given = {name: _typed(name, value) for name, value in options.items()}
    if "tokens" in given:
        if "steps" in given:
            raise UserError(f"steps={given['steps']} and tokens={given['tokens']} both say how long to train: give one")
        given["steps"] = _steps_of(given["tokens"], config.batch_size * config.seq_len)
    config = dataclasses.replace(config, **given)
    check(config, has_begun=True)
    if given.keys() & {"keep_every", "save_every"}:
        check_kept(config)
    return config


_SPOKEN = ("config", "resume", "help")  # options of `pretrain` that no file has


def check_names(options: Options, where: str) -> None:
    """Refuse names that are no options; `where` says whose they are."""
    for name in options:
        if name not in FIELDS:
            if name in _SPOKEN:
                raise UserError(f"{where}: {name!r} is no key: give it on the command line, --{name}")
            close = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(FIELDS)}"
            raise UserError(f"{where}: {name!r} is not an option; {hint}")


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
    default("warm_start_at", 0)
    default("warm_start_turns", 1)
    switch = filled["warm_start_at"] + filled["warm_start_turns"] * filled["warm_start"]
    low_rank = steps - switch, filled["warm_start_at"]
    default("restart_every", _restart_every(max(low_rank), filled["rank"]))
    default("restart_warmup", _ramp(filled))
    default("eval_every", max(1, steps // 10))
    default("save_every", min(max(1, steps // 5), max(1, filled["keep_every"] or steps)))  # what is kept is saved
    default("micro_batch_size", filled["batch_size"])
    default("rest_lr", filled["lr"])
    default("out", "")
    return filled


def _ramp(filled: Options) -> int:
    """Return a twentieth of a cycle; without cycles, a tenth of a warm start that is not the paper's, at least a few.

    bench/README.md: a base that begins full rank anew at the whole rate may throw the loss up.
    """
    is_first = not filled["warm_start_at"] and filled["warm_start_turns"] == 1
    every, length = filled["restart_every"], 0 if is_first else filled["warm_start"]
    if not length:
        return int(every // 20)
    return int(min(length, every // 20 if every else max(_FEWEST_RAMP, length // 10)))


def _restart_every(updates: int, rank: int) -> int:
    """Return the shortest cycle whose restarts pay in so many low-rank updates; 0 where none does.

    Cycles are as equal as may be: the end of the run cuts the last one short, but leaves it `_LAST_CYCLE`.
    """
    shortest = math.ceil(CYCLE * rank)
    for cycles in range(updates // max(1, shortest), FEWEST_CYCLES - 1, -1):
        length = updates // cycles + 1  # so that none ends at the end
        if updates - (cycles - 1) * length >= _LAST_CYCLE * shortest:
            return length
    return 0


def _steps_of(tokens: int, per_update: int) -> int:
    if tokens < per_update:
        raise UserError(f"tokens={tokens} is less than one update's {per_update}: give more")
    return tokens // max(1, per_update)


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
