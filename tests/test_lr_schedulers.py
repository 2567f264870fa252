"""Every scheduler of torch drives the groups' rates, and the clock multiplies whatever it sets, on every path."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from models import MLP, batch, differences, jagged_schedule, mlp, relora, snapshot, stepper
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

from relora_opt import JaggedSchedule, ReLoRAOptimizer


def schedulers() -> dict[str, Callable[[Optimizer], Any]]:
    """Return a factory for every scheduler of torch, so that one which torch adds is noticed."""
    s = lr_scheduler
    return {
        "ConstantLR": partial(s.ConstantLR, factor=0.5, total_iters=3),
        "CosineAnnealingLR": partial(s.CosineAnnealingLR, T_max=5),
        "CosineAnnealingWarmRestarts": partial(s.CosineAnnealingWarmRestarts, T_0=3),
        "CyclicLR": partial(s.CyclicLR, base_lr=0.01, max_lr=0.1),
        "ExponentialLR": partial(s.ExponentialLR, gamma=0.9),
        "LambdaLR": partial(s.LambdaLR, lr_lambda=lambda epoch: 0.9**epoch),
        "LinearLR": partial(s.LinearLR, total_iters=4),
        "MultiStepLR": partial(s.MultiStepLR, milestones=[2, 4]),
        "MultiplicativeLR": partial(s.MultiplicativeLR, lr_lambda=lambda epoch: 0.8),
        "OneCycleLR": partial(s.OneCycleLR, max_lr=0.1, total_steps=12),
        "PolynomialLR": partial(s.PolynomialLR, total_iters=6),
        "ReduceLROnPlateau": partial(s.ReduceLROnPlateau, patience=0),
        "StepLR": partial(s.StepLR, step_size=2),
        "SWALR": partial(SWALR, swa_lr=0.02, anneal_epochs=4),
        "ChainedScheduler": lambda o: s.ChainedScheduler([s.StepLR(o, 2), s.ExponentialLR(o, 0.9)]),
        "SequentialLR": lambda o: s.SequentialLR(o, [s.ConstantLR(o), s.ExponentialLR(o, 0.9)], milestones=[3]),
    }


NAMES = tuple(schedulers())


def arguments(name: str) -> tuple[float, ...]:
    """Return what `step` takes: a loss that does not improve, where it looks at losses."""
    return (1.0,) if name == "ReduceLROnPlateau" else ()


def test_every_scheduler_of_torch_is_tried() -> None:
    kinds = {name for name in lr_scheduler.__all__ if isinstance(getattr(lr_scheduler, name), type)}
    assert kinds - {"LRScheduler"} == set(NAMES) - {"SWALR"}  # the first is abstract, the second lives in swa_utils


@pytest.mark.parametrize("path", ["dense", "step"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("base", [partial(AdamW, betas=(0.9, 0.99)), partial(SGD, momentum=0.9)], ids=["AdamW", "SGD"])
def test_a_scheduler_drives_the_groups_and_the_clock_multiplies(
    base: Callable[..., Optimizer], name: str, path: str
) -> None:
    model, plain = mlp(), mlp()
    schedule = JaggedSchedule(4, restart_warmup=2, warm_start=2)
    optimizer = ReLoRAOptimizer(model, base, rank=2, schedule=schedule, factor_lr=3.0, lr=0.1)
    alone = base([{"params": list(plain.parameters())}], lr=0.1)
    scheduler, expected = schedulers()[name](optimizer), schedulers()[name](alone)
    step = stepper(path, optimizer, model)
    for u in range(1, 12):
        rate = alone.param_groups[0]["lr"]
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate]
        step(*batch(u))
        alone.step()
        multiplier, factor_lr = schedule(u), 3.0 if u > 2 else 1.0
        assert optimizer.last_lr() == pytest.approx([rate * multiplier * factor_lr, rate * multiplier], rel=1e-12)
        scheduler.step(*arguments(name))
        expected.step(*arguments(name))
    assert optimizer.num_restarts == 2


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_a_scheduler_that_cycles_momentum_reaches_the_base(name: str) -> None:
    runs = []
    for cycles in (True, False):
        model = mlp()
        optimizer = relora(model, "AdamW", max_grad_norm=1.0)
        make = schedulers()[name]
        scheduler = make(optimizer, cycle_momentum=cycles)
        step = stepper("dense", optimizer, model)
        for u in range(3):
            step(*batch(u))
            scheduler.step()
        runs.append(model.state_dict())
    assert differences(*runs)


@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_resumes_beside_the_optimizer(name: str) -> None:
    """Stopped before the switch, within a ramp and at a restart, on the path that is not the dense one."""

    def build() -> tuple[MLP, ReLoRAOptimizer, Any]:
        model = mlp()
        optimizer = relora(model, schedule=jagged_schedule(3, 2, 2))
        return model, optimizer, schedulers()[name](optimizer)

    def run(model: MLP, optimizer: ReLoRAOptimizer, scheduler: Any, updates: range) -> None:
        step = stepper("step", optimizer, model)
        for u in updates:
            step(*batch(u))
            scheduler.step(*arguments(name))

    for stop in (1, 3, 5):
        model, optimizer, scheduler = build()
        run(model, optimizer, scheduler, range(stop))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
        run(model, optimizer, scheduler, range(stop, 9))
        other = build()
        for part, state in zip(other, saved, strict=True):
            part.load_state_dict(state)
        run(*other, range(stop, 9))
        assert not differences(snapshot(other[0], other[1]), snapshot(model, optimizer)), stop
