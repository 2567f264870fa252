"""Both paths walk with the reference, update by update, through a warm start, a switch, ramps and restarts.

The reference (tests/reference.py) holds W_frozen and s B A apart and merges; the library holds their sum and never
merges. It is fed the library's draws of A, and nothing else.
"""

from typing import Any

import pytest
import torch
from models import BASES, PATHS, SELECTED, batch, jagged_schedule, mlp, mse, relora, selected_weights, stepper
from reference import ReferenceLinear, ReferenceReLoRA, cosine
from torch import Tensor

from relora_opt import JaggedSchedule, ReLoRAOptimizer

# The rounding of one update, times what 40 updates of a smooth problem make of it. Measured: see the assertion message.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-4}


def reference_of(base: str, model: torch.nn.Module, **changes: Any) -> ReferenceReLoRA:
    base_class, hyperparameters = BASES[base]
    return ReferenceReLoRA(model, list(SELECTED), base_class, **{**hyperparameters, **changes})


def drawn_by(optimizer: ReLoRAOptimizer, model: torch.nn.Module) -> Any:
    return lambda name: optimizer.factors(model.get_submodule(name).weight)[0].detach().clone()


def distance(model: torch.nn.Module, optimizer: ReLoRAOptimizer, reference: ReferenceReLoRA) -> float:
    """Return the largest difference of any effective weight, frozen weight, factor or unselected parameter."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, weight in selected_weights(model).items():
        pairs.append((weight, reference.effective_weight(name)))
        layer = reference.layer(name)
        if isinstance(layer, ReferenceLinear):
            pairs += zip(optimizer.factors(weight), (layer.A, layer.B), strict=True)
            pairs.append((optimizer.frozen_weight(weight), layer.W_frozen))
    theirs = dict(reference.model.named_parameters())
    skipped = {f"{name}.weight" for name in SELECTED}
    pairs += [(p, theirs[name]) for name, p in model.named_parameters() if name not in skipped]
    return max(float((ours.detach() - other.detach()).abs().max()) for ours, other in pairs)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("warm_start", "at", "turns", "switches", "restarts"),
    [
        (0, 0, 1, [], [11, 22, 33]),
        (8, 0, 1, [8], [19, 30]),
        (8, 14, 1, [14, 22], [11, 33]),
        (8, 0, 2, [8, 16], [27, 38]),
        (8, 14, 2, [14, 22, 30], [11]),
    ],
)
def test_every_path_equals_the_reference_at_each_of_40_updates(
    dtype: torch.dtype, path: str, base: str, warm_start: int, at: int, turns: int, switches: Any, restarts: Any
) -> None:
    model, twin = mlp(dtype), mlp(dtype)
    common: dict[str, Any] = {"factor_lr": 2.0, "max_grad_norm": 0.5}
    optimizer = relora(model, base, schedule=jagged_schedule(warm_start=warm_start, at=at, turns=turns), **common)
    outer = lambda u: cosine(u, N=40, warmup=4, minimum=0.1)  # noqa: E731
    clock: dict[str, Any] = {"q": 11, "ramp": 3, "warm_start": warm_start, "at": at, "turns": turns, "outer": outer}
    reference = reference_of(base, twin, scale=1.5, **clock, **common)
    draw = drawn_by(optimizer, model)
    reference.begin(draw)
    step = stepper(path, optimizer, model)
    events = []
    for u in range(1, 41):
        loss = step(*batch(u, dtype))
        expected = reference.update(lambda u=u: mse(twin, *batch(u, dtype)))
        events += [u] if reference.restart_if_due(draw) else []
        assert abs(float(loss - expected)) < TOLERANCE[dtype], f"loss of update {u}"
        assert (gap := distance(model, optimizer, reference)) < TOLERANCE[dtype], f"update {u}: {gap}"
    assert events == sorted([*switches, *restarts])
    assert optimizer.num_updates == 40
    assert optimizer.num_restarts == len(restarts) + len(switches[1:])  # the first one has no A before it


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_paths_agree_with_each_other_at_each_of_40_updates(dtype: torch.dtype, base: str) -> None:
    models = {path: mlp(dtype) for path in PATHS}
    optimizers = {path: relora(model, base, schedule=jagged_schedule()) for path, model in models.items()}
    steps = {path: stepper(path, optimizers[path], models[path]) for path in PATHS}
    for u in range(1, 41):
        for step in steps.values():
            step(*batch(u, dtype))
        dense = dict(models["dense"].named_parameters())
        for path in ("functional", "step"):
            for name, p in models[path].named_parameters():
                assert float((p - dense[name]).detach().abs().max()) < TOLERANCE[dtype], f"{path}, {name}, update {u}"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("cycle", ["first", "after a restart"])
def test_one_bfloat16_update_equals_the_float64_reference_to_rounding(path: str, base: str, cycle: str) -> None:
    """W is rounded by up to 2^-8 of itself; the gradients, chains of a dozen bfloat16 operations, are off by some 2^-5.

    AdamW's eps is large here, so that its first update is a smooth function of the gradient and not its bare sign.
    """
    changes = {"eps": 0.1} if base == "AdamW" else {"momentum": 0.0}
    model = mlp(torch.bfloat16)
    schedule = JaggedSchedule(restart_every=1 if cycle == "after a restart" else 0)
    optimizer = relora(model, base, schedule=schedule, **changes)
    step = stepper(path, optimizer, model)
    if cycle == "after a restart":
        step(*batch(0, torch.bfloat16))
    twin = mlp(torch.float64)
    twin.load_state_dict(model.state_dict())
    reference = reference_of(base, twin, scale=1.5, q=0, **changes)
    reference.switch(lambda name: drawn_by(optimizer, model)(name).double())
    before = {name: weight.detach().double().clone() for name, weight in selected_weights(model).items()}
    x, y = batch(1, torch.bfloat16)
    step(x, y)
    reference.update(lambda: mse(twin, x.double(), y.double()))
    for name, weight in selected_weights(model).items():
        move = weight.detach().double() - before[name]
        expected = reference.effective_weight(name) - before[name]
        # After a restart the master holds more than the reference starts from: a second rounding.
        roundings = 2**-8 * before[name].abs() * (1 if cycle == "first" else 2)
        assert ((move - expected).abs() <= 1.01 * roundings + 0.05 * expected.abs().max()).all()
