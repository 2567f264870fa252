"""Every mistake with the library is answered by one sentence that says what was wrong, the value and the remedy."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from models import MLP, batch, mlp, mse, relora
from torch import nn

from relora_opt import (
    Guard,
    JaggedSchedule,
    ReLoRAOptimizer,
    constant,
    cosine,
    default_targets,
    linear,
    memory,
    muon_beside_adamw,
    prune,
    save_merged,
    target_names,
    trainer_factory,
    wsd,
)

AdamW = torch.optim.AdamW
HERE = Path(__file__).parent
WEIGHT = nn.Parameter(torch.ones(3, 4))


class Mistake(NamedTuple):
    """A call that must fail, and what its message must hold: the value that was wrong, and what to do."""

    call: Callable[[], Any]
    error: type[Exception]
    value: str
    remedy: str


def low_rank(params: Any = None, base: Any = AdamW, **options: Any) -> ReLoRAOptimizer:
    return ReLoRAOptimizer(mlp() if params is None else params, base, **{"rank": 2, **options})


def frozen() -> MLP:
    model = mlp()
    model.first.weight.requires_grad_(False)
    return model


def saved_with(**clock: int) -> dict[str, Any]:
    state = relora(mlp()).state_dict()
    for group in state["param_groups"]:
        group.update(clock)
    return state


def used() -> ReLoRAOptimizer:
    model = mlp()
    optimizer = relora(model)
    mse(model, *batch(0)).backward()
    optimizer.step()
    return optimizer


def with_alpha(optimizer: ReLoRAOptimizer) -> ReLoRAOptimizer:
    optimizer.param_groups[0]["alpha"] = 64.0
    return optimizer


def of_group(**options: Any) -> ReLoRAOptimizer:
    return ReLoRAOptimizer([{"params": [nn.Parameter(torch.ones(6, 6))], "rank": 2, **options}], lr=0.1)


def of_stack(*, stacked: bool) -> ReLoRAOptimizer:
    optimizer = of_group(params=[nn.Parameter(torch.ones(3, 6, 5))], stacked=stacked)
    optimizer.restart()
    return optimizer


def warm() -> ReLoRAOptimizer:
    return relora(mlp(), schedule=JaggedSchedule(5, warm_start=3))


def late() -> ReLoRAOptimizer:
    return relora(mlp(), schedule=JaggedSchedule(5, warm_start=3, warm_start_at=2))


def factors_before_the_switch() -> None:
    model = mlp()
    relora(model, schedule=JaggedSchedule(5, warm_start=3)).factors(model.first.weight)


def stepped_with_loss(loss_fn: Callable[..., Any], **options: Any) -> None:
    model = mlp()
    relora(model).make_step(model, loss_fn, compile=False, **options)(*batch(0))


def functional(model: nn.Module) -> nn.Module:
    return relora(model).functional(model)


def functional_twice(*, steps: bool = False) -> None:
    model = mlp()
    optimizer = relora(model)
    f = optimizer.functional(model)
    if steps:
        optimizer.make_step(f, mse)
    else:
        optimizer.functional(f)


def loss_of_x(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def replaced_parameter(make: Callable[[ReLoRAOptimizer, nn.Module], Any], warm_start: int = 0) -> None:
    """Accelerate and FSDP replace parameters, say."""
    model = mlp()
    call = make(relora(model, schedule=JaggedSchedule(5, warm_start=warm_start)), model)
    model.first.weight = nn.Parameter(model.first.weight.detach().clone())
    call(batch(0)[0])


def clock_with(**changes: Any) -> None:
    relora(mlp()).set_clock(**{"num_updates": 9, "num_restarts": 1, "last_restart": 5, **changes})


def scaled_factor_gradients() -> None:
    model = mlp()
    optimizer = relora(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(mse(optimizer.functional(model), *batch(0))).backward()
    scaler.step(optimizer)


def compiled_with(options: dict[str, Any]) -> None:
    model = mlp()
    relora(model).make_step(model, mse, compile=options)


MISTAKES = {
    # ranks, scales and rates
    "negative rank": Mistake(lambda: low_rank(rank=-1), ValueError, "rank=-1", "0 trains everything densely"),
    "half a rank": Mistake(lambda: low_rank(rank=2.5), ValueError, "rank=2.5", "a whole number"),
    "rank as a truth": Mistake(lambda: low_rank(rank=True), ValueError, "rank=True", "a whole number"),
    "rank too large": Mistake(lambda: low_rank(rank=64), ValueError, "rank=64", "lower rank, or pass rank=0"),
    "rank too large for a name": Mistake(
        lambda: low_rank(rank=6, targets=["second"]), ValueError, "second.weight (8, 6)", "leave it out of targets"
    ),
    "rank too large for a group": Mistake(
        lambda: low_rank([{"params": [mlp().first.weight], "rank": 9}]), ValueError, "rank=9", "lower rank"
    ),
    "alpha 0": Mistake(lambda: low_rank(alpha=0), ValueError, "alpha=0", "a positive number"),
    "alpha nan": Mistake(lambda: low_rank(alpha=math.nan), ValueError, "alpha=nan", "a positive number"),
    "alpha in words": Mistake(lambda: low_rank(alpha="8"), (ValueError, TypeError), "alpha='8'", "number"),
    "a group's alpha": Mistake(
        lambda: low_rank([{"params": [mlp().first.weight], "rank": 2, "alpha": -1}]), ValueError, "alpha=-1", "positive"
    ),
    "alpha as a truth": Mistake(lambda: low_rank(alpha=True), ValueError, "alpha=True", "a positive number"),
    "RMSprop's alpha": Mistake(
        lambda: low_rank(base=torch.optim.RMSprop, rank=0, alpha=0.9),
        ValueError,
        "alpha=0.9",
        "functools.partial(torch.optim.RMSprop, alpha=0.9)",
    ),
    "ASGD's alpha in a group": Mistake(
        lambda: low_rank([{"params": [mlp().first.weight], "rank": 2, "alpha": 4}], torch.optim.ASGD),
        ValueError,
        "alpha=4",
        "functools.partial(torch.optim.ASGD, alpha=4)",
    ),
    "ASGD's alpha in an added group": Mistake(
        lambda: low_rank(base=torch.optim.ASGD).add_param_group({"params": [WEIGHT], "alpha": 0.5}),
        ValueError,
        "alpha=0.5",
        "functools.partial(torch.optim.ASGD, alpha=0.5)",
    ),
    "alpha set in the groups later": Mistake(
        lambda: with_alpha(used()).step(), ValueError, "param_groups[0] has alpha 64.0", "construct a new optimizer"
    ),
    "factor_lr as a truth": Mistake(lambda: low_rank(factor_lr=True), ValueError, "factor_lr=True", "multiplies lr"),
    "factor_lr negative": Mistake(lambda: low_rank(factor_lr=-1.0), ValueError, "factor_lr=-1.0", "0 or more"),
    "factor_lr infinite": Mistake(lambda: low_rank(factor_lr=math.inf), ValueError, "factor_lr=inf", "multiplies lr"),
    "factor_lr in words": Mistake(
        lambda: low_rank(factor_lr="2"), (ValueError, TypeError), "factor_lr='2'", "multiplies"
    ),
    "lr infinite": Mistake(lambda: low_rank(lr=math.inf), ValueError, "lr=inf", "must be a finite number"),
    "max_grad_norm 0": Mistake(lambda: low_rank(max_grad_norm=0.0), ValueError, "max_grad_norm=0.0", "None leaves"),
    "max_grad_norm as a truth": Mistake(
        lambda: low_rank(max_grad_norm=True), ValueError, "max_grad_norm=True", "a positive number"
    ),
    "max_grad_norm nan": Mistake(lambda: low_rank(max_grad_norm=math.nan), ValueError, "max_grad_norm=nan", "positive"),
    "max_grad_norm in words": Mistake(lambda: low_rank(max_grad_norm="1"), ValueError, "max_grad_norm='1'", "positive"),
    "lr in words": Mistake(lambda: low_rank(lr="0.1"), TypeError, "lr='0.1'", "must be a number"),
    "lr None": Mistake(lambda: low_rank(lr=None), TypeError, "lr=None", "must be a number"),
    "a group's lr in words": Mistake(
        lambda: low_rank([{"params": [WEIGHT], "rank": 2, "lr": "a"}]), TypeError, "lr='a'", "must be a number"
    ),
    "a group's lr None": Mistake(
        lambda: low_rank([{"params": [WEIGHT], "rank": 2, "lr": None}]), TypeError, "lr=None", "must be a number"
    ),
    "a group's lr of many numbers": Mistake(
        lambda: low_rank([{"params": [WEIGHT], "rank": 2, "lr": torch.ones(3)}]), TypeError, "(3,)", "a tensor of one"
    ),
    "restart_every without its schedule": Mistake(
        lambda: low_rank(restart_every=100), TypeError, "restart_every=100", "schedule=JaggedSchedule(restart_every="
    ),
    "restart_warmup without its schedule": Mistake(
        lambda: low_rank(restart_warmup=9), TypeError, "restart_warmup=9", "schedule=JaggedSchedule(1000, restart_war"
    ),
    "warm_start without its schedule": Mistake(
        lambda: low_rank(warm_start=9), TypeError, "warm_start=9", "schedule=JaggedSchedule(1000, warm_start="
    ),
    "a scheduler's warm-up": Mistake(
        lambda: low_rank(num_warmup_steps=9), TypeError, "num_warmup_steps=9", "outer=cosine(20_000, warmup="
    ),
    "PEFT's name": Mistake(lambda: low_rank(lora_alpha=9), TypeError, "lora_alpha=9", "here it is alpha="),
    "PEFT's dropout": Mistake(lambda: low_rank(lora_dropout=0.1), TypeError, "lora_dropout=0.1", "model's own dropout"),
    "PEFT's name in a group": Mistake(
        lambda: of_group(lora_alpha=9), TypeError, "lora_alpha=9 is PEFT's name", "here it is alpha="
    ),
    "GaLore's groups": Mistake(
        lambda: of_group(update_proj_gap=200, scale=0.25, proj_type="std"),
        TypeError,
        "update_proj_gap=200",
        "schedule=",
    ),
    "max_grad_norm in a group": Mistake(
        lambda: of_group(max_grad_norm=1.0), TypeError, "max_grad_norm=1.0", "ReLoRAOptimizer(..., max_grad_norm=...)"
    ),
    "init in an added group": Mistake(
        lambda: used().add_param_group({"params": [nn.Parameter(torch.ones(6, 6))], "init": "kaiming"}),
        TypeError,
        "init='kaiming'",
        "for all groups",
    ),
    "seed half": Mistake(lambda: low_rank(seed=0.5), TypeError, "seed=0.5", "a whole number"),
    # what is selected
    "targets unmatched": Mistake(lambda: low_rank(targets=["q_proj"]), ValueError, "'q_proj'", "there are stem.weight"),
    "targets no regex": Mistake(
        lambda: low_rank(targets="first("), ValueError, "targets='first('", "regular expression"
    ),
    "targets a number": Mistake(lambda: low_rank(targets=5), TypeError, "targets=5", "names"),
    "targets of parameters": Mistake(
        lambda: low_rank(targets=[WEIGHT]), TypeError, "targets holds a Parameter: ", "a list of names"
    ),
    "targets a parameter": Mistake(lambda: low_rank(targets=WEIGHT), TypeError, "a Parameter: ", "a list of names"),
    "targets a module": Mistake(lambda: low_rank(targets=mlp().first), TypeError, "a Linear", "a list of names"),
    "targets a class": Mistake(lambda: low_rank(targets=nn.Linear), TypeError, "Linear'> is a class", "a list of"),
    "target_names of nothing": Mistake(lambda: target_names(None), TypeError, "a NoneType", "give the module"),
    "target_names of a number": Mistake(lambda: target_names(mlp(), 5), TypeError, "targets=5", "a list of names"),
    "default_targets of an optimizer": Mistake(
        lambda: default_targets(used()), TypeError, "a ReLoRAOptimizer", "give the module"
    ),
    "target_names unmatched": Mistake(lambda: target_names(mlp(), "zzz"), ValueError, "'zzz'", "there are stem.weight"),
    "targets match nothing": Mistake(
        lambda: low_rank(targets=lambda name, p: False), ValueError, "rank=2", "name some with targets="
    ),
    "targets frozen": Mistake(
        lambda: low_rank(frozen(), targets=["first"]), ValueError, "first.weight", "set requires_grad, or leave it out"
    ),
    # parameters
    "nameless parameters": Mistake(lambda: low_rank(mlp().parameters()), ValueError, "rank=2", "pass the model itself"),
    "no parameters": Mistake(lambda: low_rank([]), ValueError, "params is empty", "nothing to optimize"),
    "one tensor": Mistake(lambda: low_rank(mlp().first.weight), TypeError, "single tensor", "pass a module"),
    "a number": Mistake(lambda: low_rank(5), TypeError, "params=5", "pass a module"),
    "names for parameters": Mistake(lambda: low_rank(["first"]), TypeError, "a str", "parameters or (name, parameter)"),
    "names twice": Mistake(lambda: low_rank([("a", "b")]), TypeError, "a str", "parameters or (name, parameter)"),
    "pairs the wrong way": Mistake(lambda: low_rank([(1, WEIGHT)]), TypeError, "(int, Parameter)", "(name, parameter)"),
    "triples": Mistake(
        lambda: low_rank([("a", WEIGHT, 3)]), TypeError, "(str, Parameter, int)", "(name, parameter) pairs"
    ),
    "parameters None": Mistake(lambda: low_rank([{"params": None}]), TypeError, "params=None", "give a list"),
    "a group with a module": Mistake(
        lambda: low_rank([{"params": mlp()}]), TypeError, "params is a MLP", "module.named_parameters()"
    ),
    "groups of nothing": Mistake(lambda: low_rank([{"params": []}]), ValueError, "params is empty", "nothing to"),
    "one name twice": Mistake(
        lambda: low_rank([("a", WEIGHT), ("a", nn.Parameter(torch.ones(3, 4)))], targets=["a"]),
        ValueError,
        "a is the name of 2 low-rank weights",
        "each needs its own",
    ),
    "a set": Mistake(lambda: low_rank([{"params": set(mlp().parameters())}]), TypeError, "a set", "give a list"),
    "a parameter twice": Mistake(
        lambda: low_rank([("a", WEIGHT), ("b", WEIGHT)], targets=["a"]), ValueError, "a and b", "give it once"
    ),
    "a group without parameters": Mistake(lambda: low_rank([{"lr": 0.1}]), ValueError, "['lr']", "give it its param"),
    "a parameter of integers": Mistake(
        lambda: low_rank([("a", torch.ones(3, 3, dtype=torch.int64))], targets=["a"]),
        ValueError,
        "torch.int64",
        "leave it out",
    ),
    "added, a list": Mistake(lambda: used().add_param_group([WEIGHT]), TypeError, "a list", "a dictionary with params"),
    "added, without parameters": Mistake(
        lambda: used().add_param_group({"rank": 2}), ValueError, "['rank']", "give it its parameters"
    ),
    "added, rank too large": Mistake(
        lambda: used().add_param_group({"params": [("other.first.weight", WEIGHT)], "rank": 3}),
        ValueError,
        "rank=3",
        "lower rank",
    ),
    "added, a name that is taken": Mistake(
        lambda: used().add_param_group({"params": [("first.weight", WEIGHT)]}),
        ValueError,
        "first.weight is the name of 2",
        "each needs its own",
    ),
    "added, a module": Mistake(
        lambda: used().add_param_group({"params": nn.Linear(4, 4)}), TypeError, "a Linear", "named_parameters()"
    ),
    "added, nothing": Mistake(lambda: used().add_param_group({"params": []}), ValueError, "params is empty", "nothing"),
    "added, rate": Mistake(
        lambda: used().add_param_group({"params": [WEIGHT], "rank": 0, "lr": math.nan}), ValueError, "lr=nan", "finite"
    ),
    # the base, the schedule and the rest
    "base by name": Mistake(lambda: low_rank(base="adamw"), TypeError, "base='adamw'", "torch.optim.AdamW, say"),
    "base an instance": Mistake(
        lambda: low_rank(base=AdamW(mlp().parameters())), TypeError, "instance of AdamW", "pass the class itself"
    ),
    "base not called": Mistake(
        lambda: low_rank(base=muon_beside_adamw), TypeError, "base=muon_beside_adamw", "call it, if it makes a base"
    ),
    "differentiable": Mistake(
        lambda: low_rank(differentiable=True), ValueError, "differentiable=True", "not supported"
    ),
    "base another class": Mistake(lambda: low_rank(base=nn.Linear), TypeError, "Linear", "torch.optim.AdamW, say"),
    "differentiable in a group": Mistake(
        lambda: low_rank([{"params": [WEIGHT], "rank": 2, "differentiable": True}]),
        ValueError,
        "differentiable=True",
        "not supported",
    ),
    "LBFGS with factors": Mistake(lambda: low_rank(base=torch.optim.LBFGS), ValueError, "LBFGS", "with rank=0"),
    "LBFGS with clipping": Mistake(
        lambda: low_rank(base=torch.optim.LBFGS, rank=0, max_grad_norm=1.0), ValueError, "LBFGS", "max_grad_norm=None"
    ),
    "sparse gradients": Mistake(lambda: low_rank(base=torch.optim.SparseAdam), ValueError, "SparseAdam", "with rank=0"),
    "init": Mistake(lambda: low_rank(init="zeros"), ValueError, "init='zeros'", "choose one of kaiming, orthogonal"),
    "prune by name": Mistake(lambda: low_rank(prune="reset"), TypeError, "prune='reset'", "prune.reset(), say"),
    "schedule a function": Mistake(lambda: low_rank(schedule=constant()), TypeError, "schedule=", "JaggedSchedule"),
    "prune share": Mistake(lambda: prune.magnitude(1.5), ValueError, "magnitude(1.5)", "between 0 and 1"),
    "prune share in words": Mistake(lambda: prune.magnitude("0.9"), ValueError, "magnitude('0.9')", "a number between"),
    "prune share None": Mistake(lambda: prune.random(None), ValueError, "random(None)", "a number between 0 and 1"),
    "prune share as a truth": Mistake(lambda: prune.magnitude(True), ValueError, "magnitude(True)", "a number between"),
    "prune nan": Mistake(lambda: prune.random(math.nan), ValueError, "random(nan)", "between 0 and 1"),
    "restart_every": Mistake(lambda: JaggedSchedule(-1), ValueError, "restart_every=-1", "0 or more"),
    "restart_warmup": Mistake(lambda: JaggedSchedule(5, 1.5), ValueError, "restart_warmup=1.5", "a whole number"),
    "warm_start": Mistake(lambda: JaggedSchedule(5, warm_start=-2), ValueError, "warm_start=-2", "0 or more"),
    "warm_start_at": Mistake(
        lambda: JaggedSchedule(5, warm_start_at=2), ValueError, "warm_start_at=2", "say how long with warm_start"
    ),
    "warm_start_at of the optimizer": Mistake(
        lambda: low_rank(warm_start_at=9), TypeError, "warm_start_at=9", "JaggedSchedule(1000, warm_start=..., warm_st"
    ),
    "warm_start_turns": Mistake(
        lambda: JaggedSchedule(5, warm_start=2, warm_start_turns=0), ValueError, "warm_start_turns=0", "1 or more"
    ),
    "warm_start_turns of none": Mistake(
        lambda: JaggedSchedule(5, warm_start_turns=2), ValueError, "warm_start_turns=2", "how long each is"
    ),
    "warm_start_turns with long ramps": Mistake(
        lambda: JaggedSchedule(5, 3, warm_start=2, warm_start_turns=2), ValueError, "restart_warmup=3", "shorten"
    ),
    "warm_start_turns of few weights": Mistake(
        lambda: low_rank(schedule=JaggedSchedule(5, warm_start=2, warm_start_turns=9)),
        ValueError,
        "warm_start_turns=9 of",
        "take no more",
    ),
    "warm_start_turns of the optimizer": Mistake(
        lambda: low_rank(warm_start_turns=2), TypeError, "warm_start_turns=2", "JaggedSchedule(1000, warm_start=..., w"
    ),
    "ramp": Mistake(lambda: JaggedSchedule(5, 6), ValueError, "restart_warmup=6", "shorten the ramp"),
    "outer": Mistake(lambda: JaggedSchedule(5, outer=0.5), TypeError, "outer=0.5", "cosine(20_000), say"),
    "outer not called": Mistake(
        lambda: JaggedSchedule(5, outer=cosine), TypeError, "outer=<function", "cosine(20_000)"
    ),
    "outer of words": Mistake(lambda: JaggedSchedule(5, outer=str), TypeError, "gave a str for update 1", "cosine("),
    "outer nan at first": Mistake(
        lambda: JaggedSchedule(5, outer=lambda u: math.nan), ValueError, "multiplier nan around update 1", "finite"
    ),
    "outer nan": Mistake(
        lambda: JaggedSchedule(5, outer=lambda u: math.nan if u == 7 else 1)(7),
        ValueError,
        "multiplier nan around update 7",
        "finite",
    ),
    "outer negative": Mistake(
        lambda: JaggedSchedule(5, outer=lambda u: 1 - u)(7), ValueError, "multiplier -6", "0 or more"
    ),
    "cosine length": Mistake(lambda: cosine(0), ValueError, "num_updates=0", "the length of the whole run"),
    "linear warmup": Mistake(lambda: linear(10, warmup=11), ValueError, "warmup=11", "between 0 and num_updates=10"),
    "min_ratio": Mistake(lambda: cosine(10, min_ratio=2), ValueError, "min_ratio=2", "a share of the peak rate"),
    "constant warmup": Mistake(lambda: constant(-1), ValueError, "warmup=-1", "0 means no warm-up"),
    "cosine length in words": Mistake(
        lambda: cosine("100"), ValueError, "num_updates='100'", "length of the whole run"
    ),
    "cosine length nan": Mistake(lambda: cosine(math.nan), ValueError, "num_updates=nan", "a number, at least 1"),
    "cosine warmup None": Mistake(lambda: cosine(100, warmup=None), ValueError, "warmup=None", "a number of updates"),
    "constant in words": Mistake(lambda: constant("5"), ValueError, "warmup='5'", "0 means no warm-up"),
    "min_ratio None": Mistake(lambda: linear(10, min_ratio=None), ValueError, "min_ratio=None", "of the peak rate"),
    "wsd decay in words": Mistake(lambda: wsd(100, decay="a"), ValueError, "decay='a'", "share of updates that decays"),
    "wsd decay": Mistake(lambda: wsd(10, decay=0.0), ValueError, "decay=0.0", "above 0 and at most at 1"),
    # the optimizer in use
    "restart at rank 0": Mistake(lambda: low_rank(rank=0).restart(), ValueError, "ranks [0]", "no weight is low-rank"),
    "restart while warm": Mistake(lambda: warm().restart(), ValueError, "after 0 updates", "warm_start=3"),
    "factors while warm": Mistake(factors_before_the_switch, ValueError, "first.weight", "the switch, update 3"),
    "factors of a dense weight": Mistake(
        lambda: used().factors(mlp().head.weight), KeyError, "shape (3, 8)", "not low-rank in this optimizer"
    ),
    "clock of a used one": Mistake(
        lambda: used().set_clock(num_updates=1, num_restarts=0, last_restart=0),
        ValueError,
        "has made updates",
        "construct a fresh one",
    ),
    "clock impossible": Mistake(
        lambda: relora(mlp()).set_clock(num_updates=1, num_restarts=0, last_restart=2),
        ValueError,
        "last_restart=2",
        "between 0 and num_updates",
    ),
    "clock in halves": Mistake(
        lambda: relora(mlp()).set_clock(num_updates=1.5, num_restarts=0, last_restart=0),
        ValueError,
        "num_updates=1.5",
        "whole numbers",
    ),
    "clock of other weights": Mistake(
        lambda: relora(mlp()).set_clock(num_updates=1, num_restarts=0, last_restart=0, fresh=["third.weight"]),
        ValueError,
        "['third.weight']",
        "construct it alike",
    ),
    "clock fresh a number": Mistake(lambda: clock_with(fresh=3), TypeError, "fresh=3", "a list of names"),
    "clock fresh one name": Mistake(
        lambda: clock_with(fresh="first.weight"), TypeError, "fresh='first.weight'", "a list of names"
    ),
    "clock fresh numbers": Mistake(lambda: clock_with(fresh=[3, "a"]), TypeError, "fresh=[3, 'a']", "a list of names"),
    "closure no function": Mistake(lambda: relora(mlp()).step(5), TypeError, "closure=5", "must be callable"),
    "state no dictionary": Mistake(
        lambda: relora(mlp()).load_state_dict(None), TypeError, "a NoneType", "must be what"
    ),
    "state of nothing": Mistake(
        lambda: relora(mlp()).load_state_dict({**used().state_dict(), "state": None}),
        TypeError,
        "state is a NoneType",
        "must be what optimizer.state_dict() gave",
    ),
    "state with groups of numbers": Mistake(
        lambda: relora(mlp()).load_state_dict({**used().state_dict(), "param_groups": [3, 4]}),
        TypeError,
        "param_groups holds a int",
        "must be what optimizer.state_dict() gave",
    ),
    "state with a number for groups": Mistake(
        lambda: relora(mlp()).load_state_dict({**used().state_dict(), "param_groups": 3}),
        TypeError,
        "param_groups holds a int",
        "must be what optimizer.state_dict() gave",
    ),
    "another optimizer's state": Mistake(
        lambda: relora(mlp()).load_state_dict(AdamW(mlp().parameters()).state_dict()),
        ValueError,
        "not saved by ReLoRAOptimizer",
        "load it into the base optimizer",
    ),
    "a later format": Mistake(
        lambda: relora(mlp()).load_state_dict(saved_with(relora_format=99)),
        ValueError,
        "relora_format=99",
        "use the version that saved it",
    ),
    "names that are none": Mistake(
        lambda: relora(mlp()).load_state_dict({**used().state_dict(), "low_rank": 3}),
        TypeError,
        "low_rank is a int",
        "must be what optimizer.state_dict() gave",
    ),
    "a scale that is none": Mistake(
        lambda: relora(mlp()).load_state_dict({**used().state_dict(), "low_rank": {"first.weight": 0.0}}),
        ValueError,
        "the scale of first.weight is 0.0",
        "must be a positive number, as it was saved",
    ),
    "another weight's state": Mistake(
        lambda: relora(mlp()).load_state_dict({**used().state_dict(), "low_rank": ["first.weight"]}),
        ValueError,
        "none where this optimizer has",
        "construct it alike",
    ),
    "another rank": Mistake(
        lambda: relora(mlp()).load_state_dict(relora(mlp(), rank=3).state_dict()),
        ValueError,
        "rank [3, 0]",
        "construct it alike",
    ),
    "factors of a stack for one matrix": Mistake(
        lambda: of_stack(stacked=False).load_state_dict(of_stack(stacked=True).state_dict()),
        ValueError,
        "factors of param0 were made with stacked=True",
        "has stacked=False: construct it alike",
    ),
    "factors of one matrix for a stack": Mistake(
        lambda: of_stack(stacked=True).load_state_dict(of_stack(stacked=False).state_dict()),
        ValueError,
        "factors of param0 were made with stacked=False",
        "has stacked=True: construct it alike",
    ),
    "another schedule": Mistake(
        lambda: warm().load_state_dict(used().state_dict()),
        ValueError,
        "warm_start=3",
        "use the schedule it was saved with",
    ),
    "another place of the warm start": Mistake(
        lambda: late().load_state_dict(
            {**used().state_dict(), "param_groups": saved_with(num_updates=2)["param_groups"]}
        ),
        ValueError,
        "in a warm start but has factors: num_updates=2 with warm_start=3 at 2",
        "use the schedule it was saved with",
    ),
    "a state without its factors": Mistake(
        lambda: relora(mlp()).load_state_dict(
            {**used().state_dict(), "state": {0: {}, 1: {}}, "param_groups": saved_with(num_updates=1)["param_groups"]}
        ),
        ValueError,
        "has no factors",
        "restore the clock first (set_clock)",
    ),
    "memory of a model": Mistake(lambda: memory(mlp()), TypeError, "memory of a MLP", "give the ReLoRAOptimizer"),
    "trainer_factory called": Mistake(
        lambda: trainer_factory()(), TypeError, "model=None", "without the brackets after trainer_factory"
    ),
    "the class for the Trainer": Mistake(
        lambda: ReLoRAOptimizer([{"params": list(mlp().parameters())}], lr=0.1, rank=2),
        ValueError,
        "rank=2",
        "(trainer_factory, options)",
    ),
    # the functional path
    "a stranger's model": Mistake(
        lambda: relora(mlp()).functional(nn.Linear(2, 2)), ValueError, "Linear", "pass the model it trains"
    ),
    "no model": Mistake(lambda: relora(mlp()).functional(None), TypeError, "model=None", "must be the nn.Module"),
    "no model to step": Mistake(lambda: relora(mlp()).make_step(None, mse), TypeError, "model=None", "the nn.Module"),
    "LBFGS in make_step": Mistake(
        lambda: low_rank(base=torch.optim.LBFGS, rank=0).make_step(mlp(), mse), ValueError, "LBFGS", "step(closure)"
    ),
    "compile in words": Mistake(
        lambda: relora(mlp()).make_step(mlp(), mse, compile="yes"),
        TypeError,
        "compile='yes'",
        "True, False, or options",
    ),
    "no option to compile with": Mistake(
        lambda: relora(mlp()).make_step(mlp(), mse, compile={}), TypeError, "compile={}", "True, False, or options"
    ),
    "an unknown mode": Mistake(
        lambda: compiled_with({"mode": "fast"}),
        ValueError,
        "compile={'mode': 'fast'}",
        "should be one of: default",
    ),
    "fullgraph given twice": Mistake(
        lambda: compiled_with({"fullgraph": False}),
        ValueError,
        "compile={'fullgraph': False}",
        "not for torch.compile(..., fullgraph=True)",
    ),
    "skip_nonfinite in words": Mistake(
        lambda: stepped_with_loss(mse, skip_nonfinite="x"), TypeError, "skip_nonfinite='x'", "True or False"
    ),
    "a number for a guard": Mistake(lambda: stepped_with_loss(mse, guard=10.0), TypeError, "guard=10.0", "be a Guard"),
    "no jump at all": Mistake(lambda: Guard(0.0), ValueError, "max_jump=0.0", "must be a positive number"),
    "a guard's losses": Mistake(lambda: Guard(losses=[math.nan]), ValueError, "[nan]", "give those of a guard"),
    "has_aux a number": Mistake(lambda: stepped_with_loss(mse, has_aux=1), TypeError, "has_aux=1", "True or False"),
    "process_group by name": Mistake(
        lambda: stepped_with_loss(mse, process_group="gloo"), TypeError, "process_group='gloo'", "group.WORLD"
    ),
    "loss detached": Mistake(
        lambda: stepped_with_loss(lambda *args: mse(*args).detach()),
        TypeError,
        "torch.float32",
        "do not detach it, and leave",
    ),
    "loss of integers": Mistake(
        lambda: stepped_with_loss(lambda *args: mse(*args).long()), TypeError, "torch.int64", "in floating point"
    ),
    "functional twice": Mistake(functional_twice, TypeError, "functional model already", "pass the model itself"),
    "a step of a functional model": Mistake(
        lambda: functional_twice(steps=True), TypeError, "functional model already", "pass the model itself"
    ),
    "a functional model saved": Mistake(
        lambda: save_merged(functional(mlp()), "x"), TypeError, "no state of its own", "save the model itself"
    ),
    "a functional model's state": Mistake(
        lambda: functional(mlp()).state_dict(), TypeError, "no state of its own", "save the model itself"
    ),
    "a parameter replaced": Mistake(
        lambda: replaced_parameter(lambda optimizer, model: optimizer.functional(model)),
        RuntimeError,
        "first.weight is no longer",
        "come first, then the optimizer",
    ),
    "a parameter replaced in a step": Mistake(
        lambda: replaced_parameter(lambda optimizer, model: optimizer.make_step(model, loss_of_x, compile=False)),
        RuntimeError,
        "first.weight is no longer",
        "come first, then the optimizer",
    ),
    "a parameter replaced in a compiled step": Mistake(
        lambda: replaced_parameter(lambda optimizer, model: optimizer.make_step(model, loss_of_x)),
        RuntimeError,
        "first.weight is no longer",
        "come first, then the optimizer",
    ),
    "a parameter replaced in the warm start": Mistake(
        lambda: replaced_parameter(lambda optimizer, model: optimizer.functional(model), warm_start=3),
        RuntimeError,
        "first.weight is no longer",
        "come first, then the optimizer",
    ),
    "accumulate 0": Mistake(lambda: stepped_with_loss(mse, accumulate=0), ValueError, "accumulate=0", "1 or more"),
    "loss_fn no function": Mistake(lambda: stepped_with_loss(3), TypeError, "loss_fn=3", "must be callable"),
    "loss no scalar": Mistake(
        lambda: stepped_with_loss(lambda model, x, y: model(x)), TypeError, "(12, 3)", "reduce it, or say has_aux=True"
    ),
    "loss no tensor": Mistake(
        lambda: stepped_with_loss(lambda model, x, y: (mse(model, x, y), 1)), TypeError, "tuple", "has_aux=True"
    ),
    "factor gradients scaled": Mistake(scaled_factor_gradients, RuntimeError, "GradScaler", "bfloat16"),
    # the export
    "max_shard_size": Mistake(
        lambda: save_merged(mlp(), "x", max_shard_size="5TB"), ValueError, "max_shard_size='5TB'", "'5GB', '200MB'"
    ),
    "max_shard_size as a truth": Mistake(
        lambda: save_merged(mlp(), "x", max_shard_size=True), ValueError, "max_shard_size=True", "'5GB', '200MB'"
    ),
    "path None": Mistake(lambda: save_merged(mlp(), None), TypeError, "path=None", "'model.safetensors', say"),
    "path a folder": Mistake(
        lambda: save_merged(mlp(), HERE), IsADirectoryError, f"path={HERE}", "model.safetensors say"
    ),
    "a model without values": Mistake(
        lambda: save_merged(mlp().to("meta"), "x"), ValueError, "stem.weight is on the meta device", "assign=True"
    ),
    "path": Mistake(lambda: save_merged(mlp(), "nowhere/x"), FileNotFoundError, "path=nowhere/x", "no folder nowhere"),
    "nothing to save": Mistake(lambda: save_merged(nn.ReLU(), "x"), ValueError, "ReLU", "no parameters or buffers"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_with_the_value_and_the_remedy(name: str) -> None:
    mistake = MISTAKES[name]
    with pytest.raises(mistake.error) as caught:
        mistake.call()
    message = str(caught.value.args[0])
    assert mistake.value in message
    assert mistake.remedy in message
    assert "\n" not in message
    assert ". " not in message  # one sentence
    assert not message.endswith(".")
    assert len(message) < 320


def test_the_table_is_long_enough() -> None:
    assert len(MISTAKES) >= 20


def test_a_step_inside_the_capture_of_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = used()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"a CUDA graph: .* counted in Python.*; capture forward and backward alone"):
        optimizer.step()
    assert optimizer.num_updates == 1


@pytest.mark.parametrize(
    "options", [{"rank": -1}, {"init": "zeros"}, {"prune": "reset"}, {"targets": ["zzz"]}, {"lr": math.inf}]
)
def test_a_refused_construction_leaves_the_model_as_it_was(options: dict[str, Any]) -> None:
    model, plain = mlp(), mlp()
    with pytest.raises((ValueError, TypeError)):
        low_rank(model, **options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    low_rank(model)


def test_a_state_that_is_refused_changes_nothing() -> None:
    model = mlp()
    optimizer = relora(model)
    mse(model, *batch(0)).backward()
    optimizer.step()
    before = [tensor.clone() for tensor in optimizer.factors(model.first.weight)]
    with pytest.raises(ValueError, match="relora_format"):
        optimizer.load_state_dict(saved_with(relora_format=99))
    assert all(torch.equal(a, b) for a, b in zip(optimizer.factors(model.first.weight), before, strict=True))
    assert optimizer.num_updates == 1


class Counting(torch.optim.SGD):
    """SGD that puts an alpha into its groups when it steps."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["alpha"] = group.get("alpha", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize("base", [torch.optim.RMSprop, torch.optim.ASGD, Counting])
def test_a_bases_own_alpha_in_the_groups_may_be_changed(base: type[torch.optim.Optimizer]) -> None:
    model = mlp()
    optimizer = low_rank(model, base, lr=0.01)
    for index in range(3):
        mse(model, *batch(index)).backward()
        optimizer.step()
        with_alpha(optimizer)
    copy.deepcopy(optimizer).step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
