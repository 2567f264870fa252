"""A step's gradients are its own, a frozen factor stays, and a schedule that is replaced goes on as the other."""

import copy
from typing import Any

import pytest
import torch
from models import COMPILES, batch, jagged_schedule, mlp, mse, relora, selected_weights, stepper
from torch import Tensor, nn

from relora_opt import JaggedSchedule, ReLoRAOptimizer, cosine

# ---- gradients of other losses


class Game:
    """A generator whose loss goes through a discriminator, which has an optimizer of its own."""

    def __init__(self, accumulate: int, compile: Any) -> None:
        self.models = [mlp(seed=seed) for seed in (0, 1)]
        self.optimizers = [relora(model) for model in self.models]
        generator, discriminator = self.models

        def loss_of_generator(generator: nn.Module, x: Tensor) -> Tensor:
            return -discriminator(torch.cat((generator(x), x[:, 3:]), 1)).mean()

        def loss_of_discriminator(discriminator: nn.Module, x: Tensor) -> Tensor:
            return discriminator(torch.cat((generator(x).detach(), x[:, 3:]), 1)).mean()

        losses = (loss_of_generator, loss_of_discriminator)
        self.steps = [
            optimizer.make_step(model, loss, accumulate=accumulate, compile=compile)
            for model, optimizer, loss in zip(self.models, self.optimizers, losses, strict=True)
        ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13's compiler uses what torch 2.13 deprecates
@pytest.mark.parametrize("compile", COMPILES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_of_other_losses_do_not_count(accumulate: int, compile: Any) -> None:
    played, zeroed = Game(accumulate, compile), Game(accumulate, compile)
    for update in range(4):
        for player in (1, 0):
            zeroed.optimizers[player].zero_grad()
            for micro_batch in range(accumulate):
                x, _ = batch(update * accumulate + micro_batch)
                for game in (played, zeroed):
                    game.steps[player](x)
    for seed, (own, expected) in enumerate(zip(played.models, zeroed.models, strict=True)):
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), expected.parameters(), strict=True))
        assert not torch.equal(own.first.weight, mlp(seed=seed).first.weight)


def test_a_loop_that_zeroes_at_its_top_leaves_nothing_to_a_step() -> None:
    models = [mlp(), mlp()]
    for number, model in enumerate(models):
        optimizer = relora(model)
        for u in range(3):
            optimizer.zero_grad()
            mse(model, *batch(u)).backward()
            optimizer.step()
        if number == 0:
            optimizer.zero_grad()
        optimizer.make_step(model, mse, compile=False)(*batch(3))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_the_number_of_micro_batches_is_fixed() -> None:
    model = mlp()
    step = relora(model).make_step(model, mse, compile=False, accumulate=3)
    assert step.accumulate == 3
    with pytest.raises(AttributeError, match="accumulate"):
        step.accumulate = 2  # type: ignore[misc]


class CountingSGD(torch.optim.SGD):
    """Counts its steps in its groups, with gradients or without, and moves by that count, as schedule-free ones do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["num_steps"] = group.get("num_steps", 0) + 1
            group["momentum"] = 0.9 / group["num_steps"]
        return super().step(closure)


@pytest.mark.parametrize("base", [torch.optim.AdamW, CountingSGD])
@pytest.mark.parametrize("path", ["dense", "functional", "step"])
def test_a_step_without_a_gradient_is_no_update(path: str, base: type[torch.optim.Optimizer]) -> None:
    models = [mlp(), mlp()]
    targets, schedule = list(selected_weights(models[0])), jagged_schedule(5, 2, 3)
    optimizers = [
        ReLoRAOptimizer(model, base, rank=2, alpha=3.0, targets=targets, schedule=schedule, max_grad_norm=1.0, lr=0.01)
        for model in models
    ]
    steps = [stepper(path, optimizer, model) for optimizer, model in zip(optimizers, models, strict=True)]
    for u in range(14):
        for step in steps:
            step(*batch(u))
        optimizers[0].step()  # left over, in a loop that has another one
    assert optimizers[0].grad_norm is not None
    assert float(optimizers[0].grad_norm) > 0
    assert (optimizers[0].num_updates, optimizers[0].num_restarts) == (14, 2)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


# ---- factors that were frozen

WAYS = [("dense", {}), ("dense", {"release_grads": True}), ("functional", {}), ("step", {})]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(("path", "changes"), WAYS)
def test_a_frozen_factor_stays_on_every_path(path: str, changes: dict[str, Any], number: int) -> None:
    model, expected = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    optimizer = relora(model, **changes)
    reference = relora(expected)
    of_reference = stepper("functional" if path == "dense" else "dense", reference, expected)
    step = stepper(path, optimizer, model)
    for u in range(2):  # so that both factors have moved
        step(*batch(u, torch.float64))
        of_reference(*batch(u, torch.float64))
    frozen = [o.factors(m.first.weight)[number] for o, m in ((optimizer, model), (reference, expected))]
    for factor in frozen:
        factor.requires_grad_(False)
    before = frozen[0].clone()
    for u in range(2, 5):
        step(*batch(u, torch.float64))
        of_reference(*batch(u, torch.float64))
    assert torch.equal(frozen[0], before)
    for own, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("path", ["dense", "functional"])
def test_a_frozen_factor_is_not_pointed(path: str, number: int) -> None:
    model = mlp(dtype=torch.float64)
    optimizer = relora(model, init="gradient", schedule=JaggedSchedule(100))
    factor = optimizer.factors(model.first.weight)[number].requires_grad_(False)
    before = factor.clone()
    step = stepper(path, optimizer, model)
    for u in range(4):
        step(*batch(u, torch.float64))
    assert torch.equal(factor, before)


@pytest.mark.parametrize("number", [0, 1])
def test_the_state_of_the_other_factor_is_not_fresh(number: int) -> None:
    model = mlp()
    optimizer = relora(model)
    for weight in selected_weights(model).values():
        optimizer.factors(weight)[number].requires_grad_(False)
    stepper("dense", optimizer, model)(*batch(0))
    assert optimizer.clock["fresh"] == []


@pytest.mark.parametrize("release", [False, True])
def test_a_gradient_for_two_frozen_factors_is_refused(release: bool) -> None:
    model = mlp()
    optimizer = relora(model, release_grads=release)
    expected = mlp()
    unfrozen = relora(expected, release_grads=release)
    factors = optimizer.factors(model.second.weight)
    for factor in factors:
        factor.requires_grad_(False)
    mse(model, *batch(0)).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"shape \(8, 6\), both of whose factors were frozen: freeze"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for factor in factors:
        factor.requires_grad_(True)
    mse(expected, *batch(0)).backward()
    for each in (optimizer, unfrozen):
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


# ---- schedules in the place of others


def ranks_of_updates(optimizer: ReLoRAOptimizer, model: nn.Module, numbers: range) -> list[int]:
    found = []
    for u in numbers:
        before = selected_weights(model)["first"].detach().clone()
        stepper("dense", optimizer, model)(*batch(u, torch.float64))
        moved = selected_weights(model)["first"].detach() - before
        found.append(int(torch.linalg.matrix_rank(moved, tol=1e-10)))
    return found


def test_a_schedule_with_a_warm_start_to_come_is_followed() -> None:
    model = mlp(dtype=torch.float64)
    optimizer = relora(model, schedule=JaggedSchedule(100))
    ranks_of_updates(optimizer, model, range(3))
    optimizer.schedule = JaggedSchedule(100, warm_start=3, warm_start_at=4)
    assert [rank > 4 for rank in ranks_of_updates(optimizer, model, range(3, 8))] == [False, True, True, True, False]


@pytest.mark.parametrize("path", ["dense", "functional", "step"])
def test_before_anything_is_trained_any_schedule_is_followed(path: str) -> None:
    model = mlp(dtype=torch.float64)
    optimizer = relora(model, schedule=JaggedSchedule(100))
    step = stepper(path, optimizer, model)  # which knows factors
    optimizer.schedule = JaggedSchedule(100, warm_start=3)
    found = []
    for u in range(5):
        before = model.first.weight.detach().clone()
        step(*batch(u, torch.float64))
        found.append(int(torch.linalg.matrix_rank((model.first.weight - before).detach(), tol=1e-10)) > 4)
    assert found == [True, True, True, False, False]


def test_a_state_is_loaded_by_a_fresh_optimizer_whose_schedule_was_replaced() -> None:
    model, schedule = mlp(), JaggedSchedule(100, warm_start=8)
    optimizer = relora(model, schedule=schedule)
    stepper("dense", optimizer, model)(*batch(0))
    other = relora(model, schedule=JaggedSchedule(100))
    other.schedule = schedule
    other.load_state_dict(optimizer.state_dict())
    stepper("dense", other, model)(*batch(1))
    assert other.num_updates == 2


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        (JaggedSchedule(100, warm_start=3, warm_start_at=4), 4),  # a warm start that would begin now
        (JaggedSchedule(100, warm_start=8), 3),  # and one that would have begun
        (JaggedSchedule(100, warm_start=2, warm_start_at=9, warm_start_turns=2), 3),  # other turns
    ],
)
def test_a_schedule_that_has_other_weights_at_full_rank_now_is_refused(schedule: JaggedSchedule, after: int) -> None:
    model = mlp(dtype=torch.float64)
    optimizer = relora(model, schedule=JaggedSchedule(100))
    ranks_of_updates(optimizer, model, range(after))
    first, state = optimizer.schedule, optimizer.state_dict()
    optimizer.schedule = schedule
    mse(model, *batch(0, torch.float64)).backward()
    for use in (optimizer.step, optimizer.restart, lambda: optimizer.load_state_dict(state)):
        with pytest.raises(ValueError, match=rf"schedule was replaced before update {after + 1} by one of warm_start="):
            use()
    optimizer.schedule = first
    optimizer.step()
    assert optimizer.num_updates == after + 1


def test_a_schedule_that_ends_a_warm_start_at_once_is_refused() -> None:
    model = mlp(dtype=torch.float64)
    optimizer = relora(model, schedule=jagged_schedule())
    ranks_of_updates(optimizer, model, range(4))
    optimizer.schedule = JaggedSchedule(11)
    mse(model, *batch(4, torch.float64)).backward()
    with pytest.raises(ValueError, match="that of warm_start=8 has other weights at full rank"):
        optimizer.step()


def test_another_rate_is_followed_and_copied() -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(100))
    optimizer.schedule = JaggedSchedule(100, outer=cosine(10, min_ratio=0.5))
    model, optimizer = copy.deepcopy((model, optimizer))
    stepper("dense", optimizer, model)(*batch(0))
    assert optimizer.last_lr() == [0.01 * optimizer.schedule(1)] * 2


def test_what_is_no_schedule_is_refused() -> None:
    model = mlp()
    optimizer = relora(model)
    optimizer.schedule = cosine(10)  # type: ignore[assignment]
    mse(model, *batch(0)).backward()
    with pytest.raises(TypeError, match="must be a JaggedSchedule"):
        optimizer.step()


def test_nothing_low_rank_takes_any_schedule() -> None:
    model = mlp()
    optimizer = relora(model, rank=0, targets=None, alpha="matched")
    optimizer.schedule = JaggedSchedule(100, warm_start=8, warm_start_turns=2)
    stepper("dense", optimizer, model)(*batch(0))
    assert optimizer.num_updates == 1
