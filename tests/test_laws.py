"""The laws that make ReLoRA an optimizer with a low-rank update: it never changes the model but by an update.

Proven here: wrapping, drawing and restarting leave the output bitwise as it was; learning starts at once; k cycles
reach rank k r and no more; with nothing selected the base optimizer is left; the unselected parameters do not notice
a restart.
"""

import copy
from typing import Any

import pytest
import torch
from models import (
    BASES,
    DTYPES,
    PATHS,
    batch,
    differences,
    jagged_schedule,
    mlp,
    mse,
    relora,
    selected_weights,
    stepper,
)

from relora_opt import JaggedSchedule, ReLoRAOptimizer

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_path = pytest.mark.parametrize("path", PATHS)
each_base = pytest.mark.parametrize("base", BASES)


@each_dtype
def test_wrapping_leaves_the_output_bitwise_unchanged(dtype: torch.dtype) -> None:
    model, (x, _) = mlp(dtype), batch(0, dtype)
    before = model(x)
    optimizer = relora(model)
    for weight in selected_weights(model).values():
        optimizer.factors(weight)
    f = optimizer.functional(model)
    assert torch.equal(f(x), before)
    assert torch.equal(model(x), before)


@each_dtype
@each_path
@each_base
def test_a_restart_leaves_the_output_bitwise_unchanged(dtype: torch.dtype, path: str, base: str) -> None:
    model, (x, _) = mlp(dtype), batch(0, dtype)
    optimizer = relora(model, base)
    step = stepper(path, optimizer, model)
    for u in range(3):
        step(*batch(u, dtype))
    before = model(x)
    optimizer.restart()
    assert torch.equal(model(x), before)
    assert torch.equal(optimizer.functional(model)(x), before)
    for weight in selected_weights(model).values():
        A, B = optimizer.factors(weight)
        assert not B.any()
        assert A.any()


@each_dtype
@each_path
def test_the_update_that_a_restart_follows_is_the_update_without_it(dtype: torch.dtype, path: str) -> None:
    runs = []
    for restart_every in (5, 0):
        model = mlp(dtype)
        optimizer = relora(model, schedule=JaggedSchedule(restart_every))
        step = stepper(path, optimizer, model)
        for u in range(5):
            step(*batch(u, dtype))
        runs.append((optimizer.num_restarts, model.state_dict()))
    assert [num_restarts for num_restarts, _ in runs] == [1, 0]
    assert not differences(runs[0][1], runs[1][1])


@each_path
@each_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_warm_start_is_the_base_optimizer_bitwise_up_to_and_including_the_switch(
    dtype: torch.dtype, path: str, base: str
) -> None:
    model, plain = mlp(dtype), mlp(dtype)
    optimizer = relora(model, base, schedule=JaggedSchedule(0, warm_start=4))
    step = stepper(path, optimizer, model)
    base_class, hyperparameters = BASES[base]
    base_optimizer = base_class(plain.parameters(), **hyperparameters)
    for u in range(4):
        step(*batch(u, dtype))
        base_optimizer.zero_grad()
        mse(plain, *batch(u, dtype)).backward()
        base_optimizer.step()
        assert not differences(model.state_dict(), plain.state_dict())


@each_dtype
@each_path
@pytest.mark.parametrize("warm_start", [0, 3])
def test_the_first_update_after_wrapping_the_switch_and_each_restart_moves_every_b(
    dtype: torch.dtype, path: str, warm_start: int
) -> None:
    model = mlp(dtype)
    optimizer = relora(model, "SGD", schedule=JaggedSchedule(4, restart_warmup=2, warm_start=warm_start))
    step = stepper(path, optimizer, model)
    for u in range(1, warm_start + 10):
        step(*batch(u, dtype))
        if u - 1 >= warm_start and (u - 1 - warm_start) % 4 == 0:  # u is the first update of a cycle
            for weight in selected_weights(model).values():
                assert optimizer.factors(weight)[1].any(), f"update {u}"


@each_path
def test_each_cycle_adds_at_most_r_to_the_rank_of_the_change_and_two_cycles_exceed_r(path: str) -> None:
    model = mlp(torch.float64)
    start = {name: weight.detach().clone() for name, weight in selected_weights(model).items()}
    optimizer = relora(model, "SGD", schedule=JaggedSchedule(5))
    step = stepper(path, optimizer, model)
    for u in range(1, 15):
        cycles = optimizer.num_restarts + 1
        step(*batch(u, torch.float64))
        for name, weight in selected_weights(model).items():
            # 1e-9 of the largest: a true direction moves by more than 1e-4 of it here, rounding by 1e-15.
            rank = int(torch.linalg.matrix_rank(weight.detach() - start[name], rtol=1e-9))
            assert rank <= 2 * cycles, f"{name}, update {u}"
            assert rank > 2 or u < 10, f"{name}, update {u}"


PLAIN_BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    **BASES,
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.01}),
    "AMSGrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "foreach": True}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PLAIN_BASES)
def test_with_nothing_selected_the_wrapper_is_the_base_optimizer_bitwise(name: str, dtype: torch.dtype) -> None:
    base_class, hyperparameters = PLAIN_BASES[name]
    model, plain = mlp(dtype), mlp(dtype)
    optimizer = ReLoRAOptimizer(model, base_class, schedule=JaggedSchedule(4), rank=0, **hyperparameters)
    base = base_class(plain.parameters(), **hyperparameters)
    step = stepper("dense", optimizer, model)
    for u in range(9):
        step(*batch(u, dtype))
        base.zero_grad()
        mse(plain, *batch(u, dtype)).backward()
        base.step()
    assert not differences(model.state_dict(), plain.state_dict())
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert not differences(dict(optimizer.state[ours]), dict(base.state[theirs]))


def test_with_nothing_selected_lbfgs_and_its_closure_work_bitwise_as_alone() -> None:
    runs = []
    for wrap in (True, False):
        model = mlp(torch.float64)
        if wrap:
            optimizer: torch.optim.Optimizer = ReLoRAOptimizer(model, torch.optim.LBFGS, rank=0, lr=0.5)
        else:
            optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5)
        for u in range(3):

            def closure(u: int = u, model: torch.nn.Module = model, optimizer: Any = optimizer) -> torch.Tensor:
                optimizer.zero_grad()
                loss = mse(model, *batch(u, torch.float64))
                loss.backward()
                return loss

            loss = optimizer.step(closure)
        runs.append({"loss": loss.detach(), **model.state_dict()})
    assert not differences(*runs)


@each_dtype
@each_path
@each_base
def test_unselected_parameters_and_their_state_are_untouched_by_a_restart(
    dtype: torch.dtype, path: str, base: str
) -> None:
    model = mlp(dtype)
    optimizer = relora(model, base)
    step = stepper(path, optimizer, model)
    for u in range(3):
        step(*batch(u, dtype))
    selected = {id(weight) for weight in selected_weights(model).values()}
    unselected = {name: p for name, p in model.named_parameters() if id(p) not in selected}
    before = copy.deepcopy({name: (p.detach(), dict(optimizer.state[p])) for name, p in unselected.items()})
    optimizer.restart()
    after = {name: (p.detach(), dict(optimizer.state[p])) for name, p in unselected.items()}
    assert not differences(before, after)
    assert any(state for _, state in before.values())


@each_path
def test_unselected_state_survives_the_switch_and_every_scheduled_restart(path: str) -> None:
    """Adam's step counts every update of an unselected parameter; a factor's counts since its restart."""
    model = mlp()
    optimizer = relora(model, schedule=jagged_schedule())
    step = stepper(path, optimizer, model)
    for u in range(1, 35):
        step(*batch(u))
        assert int(optimizer.state[model.head.weight]["step"]) == u
    for weight in selected_weights(model).values():
        for key in ("A_state", "B_state"):
            assert int(optimizer.state[weight][key]["step"]) == 34 - 30
