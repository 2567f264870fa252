"""The base optimizer inside is driven as torch drives one: its hooks, options and schedulers, once an update."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from models import SELECTED, batch, differences, jagged_schedule, mlp, mse, relora, snapshot, stepper
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from relora_opt import JaggedSchedule, ReLoRAOptimizer, constant

AdamW, SGD = torch.optim.AdamW, torch.optim.SGD


# ---- hooks


@pytest.fixture
def global_calls() -> Iterator[list[tuple[str, torch.optim.Optimizer]]]:
    """Global step hooks, and what they were called with."""
    calls: list[tuple[str, torch.optim.Optimizer]] = []
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, *_: calls.append(("pre", optimizer))),
        register_optimizer_step_post_hook(lambda optimizer, *_: calls.append(("post", optimizer))),
    ]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("path", ["dense", "functional", "step"])
def test_global_step_hooks_fire_once_an_update_in_every_phase(
    path: str, base: str, global_calls: list[tuple[str, torch.optim.Optimizer]]
) -> None:
    model = mlp()
    optimizer = relora(model, base, schedule=jagged_schedule(2, 1, 2))
    step = stepper(path, optimizer, model)
    for u in range(7):  # a warm start, the switch after 2, restarts after 4 and 6, and resets that try the base
        step(*batch(u))
        assert [name for name, _ in global_calls] == ["pre", "post"] * (u + 1)
    assert {id(seen) for _, seen in global_calls} == {id(optimizer)}


def test_hooks_registered_on_the_optimizer_fire_once() -> None:
    optimizer, calls = relora(mlp()), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step()
    assert calls == ["pre", "post"]


# ---- what a base may be


def test_a_base_may_be_a_factory_with_arguments_of_its_own() -> None:
    results = []
    for base, options in ((AdamW, {"lr": 0.01, "betas": (0.8, 0.9)}), (partial(AdamW, lr=0.01, betas=(0.8, 0.9)), {})):
        model = mlp()
        optimizer = ReLoRAOptimizer(model, base, rank=2, schedule=JaggedSchedule(2), **options)
        step = stepper("dense", optimizer, model)
        for u in range(5):
            step(*batch(u))
        results.append(snapshot(model, optimizer))
    assert not differences(*results)


def test_a_base_with_an_alpha_of_its_own_gets_it_through_partial() -> None:
    optimizer = ReLoRAOptimizer(mlp(), partial(torch.optim.RMSprop, alpha=0.5), rank=2, alpha=4.0)
    assert optimizer.param_groups[0]["alpha"] == 0.5
    assert optimizer.param_groups[0]["scale"] == 2.0


def test_an_instance_is_refused_with_its_class() -> None:
    model = mlp()
    with pytest.raises(TypeError, match="base is an instance of AdamW: pass the class itself"):
        ReLoRAOptimizer(model, AdamW(model.parameters()), rank=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("base", ["AdamW", None, 3, [AdamW]], ids=str)
def test_a_base_that_cannot_be_called_is_refused(base: Any) -> None:
    with pytest.raises(TypeError, match=r"base=.* must be an optimizer class or a factory"):
        ReLoRAOptimizer(mlp(), base, rank=2)


def test_a_factory_that_returns_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"base gave a list: it must return a torch\.optim\.Optimizer"):
        ReLoRAOptimizer(mlp(), lambda groups: [], rank=2)


@pytest.mark.parametrize(
    "factory",
    [
        lambda groups: SGD([p for group in groups for p in group["params"]], lr=0.1),
        lambda groups: SGD(groups[::-1], lr=0.1),
        lambda groups: SGD([{**group, "params": group["params"][::-1]} for group in groups], lr=0.1),
        lambda groups: SGD(groups[:1], lr=0.1),
    ],
    ids=["flattens", "reverses", "reorders", "drops"],
)
def test_a_factory_that_regroups_is_refused(factory: Callable[..., torch.optim.Optimizer]) -> None:
    with pytest.raises(ValueError, match="SGD rearranged its groups: a base must keep them"):
        ReLoRAOptimizer(mlp(), factory, rank=2)


class Waitless(SGD):
    """Steps without asking for the value of its rate."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * group["lr"])


@pytest.mark.parametrize("lr", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("base", [AdamW, SGD, torch.optim.Adagrad])
def test_a_rate_that_is_not_finite_is_refused(base: type[torch.optim.Optimizer], lr: float) -> None:
    with pytest.raises(ValueError, match=str(lr)):
        ReLoRAOptimizer(mlp(), base, rank=2, lr=lr)


@pytest.mark.parametrize("lr", [math.nan, math.inf])
def test_a_groups_own_rate_that_is_not_finite_is_refused(lr: float) -> None:
    with pytest.raises(ValueError, match=str(lr)):
        ReLoRAOptimizer([{"params": [mlp().first.weight], "rank": 2, "lr": lr}], AdamW)


def test_differentiable_is_refused() -> None:
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        ReLoRAOptimizer(mlp(), AdamW, rank=2, differentiable=True)


@pytest.mark.parametrize(
    "options",
    [{}, {"targets": r"weight$"}, {"max_grad_norm": 1.0, "rank": 0}, {"schedule": JaggedSchedule(5, warm_start=2)}],
)
def test_lbfgs_is_refused_with_a_selection_or_clipping(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(5, 5, bias=False))
    with pytest.raises(ValueError, match="LBFGS evaluates its closure many times an update: it works with rank=0"):
        ReLoRAOptimizer(model, torch.optim.LBFGS, **{"rank": 2, **options})


def test_lbfgs_is_refused_by_the_same_words_where_the_model_has_dense_parameters_too() -> None:
    with pytest.raises(ValueError, match="LBFGS evaluates its closure many times"):
        ReLoRAOptimizer(mlp(), torch.optim.LBFGS, rank=2)


def test_lbfgs_minimises_with_rank_0() -> None:
    model, (x, y) = mlp(torch.float64), batch(0, torch.float64)
    optimizer = ReLoRAOptimizer(model, torch.optim.LBFGS, rank=0, lr=0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = mse(model, x, y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).detach() for _ in range(5)]
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.num_updates == 5


# ---- options and rates


def test_options_changed_in_the_groups_reach_the_base_at_the_next_update() -> None:
    models = []
    for decay in (0.0, 0.5):
        model = mlp()
        optimizer = relora(model, "SGD", weight_decay=0.5 - decay)
        for group in optimizer.param_groups:
            group["weight_decay"] = decay
        stepper("dense", optimizer, model)(*batch(0))
        models.append(model)
    plain = mlp()
    stepper("dense", relora(plain, "SGD", weight_decay=0.0), plain)(*batch(0))
    assert not differences(models[0].state_dict(), plain.state_dict())
    assert differences(models[1].state_dict(), plain.state_dict())


def test_the_base_gets_the_groups_with_no_other_rate_written_into_the_outer_ones() -> None:
    model = mlp()
    optimizer = relora(model, lr=0.25, factor_lr=2.0, schedule=JaggedSchedule(4, restart_warmup=2, outer=constant(4)))
    step = stepper("dense", optimizer, model)
    for u in range(1, 7):
        step(*batch(u))
        assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
        multiplier = {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0, 5: 0.5, 6: 1.0}[u]
        assert optimizer.last_lr() == [0.5 * multiplier, 0.25 * multiplier]


def test_a_rate_may_be_a_tensor_and_stays_one() -> None:
    model = mlp()
    rate = torch.tensor(0.125)
    optimizer = ReLoRAOptimizer(
        model, AdamW, rank=2, lr=rate, schedule=JaggedSchedule(4, outer=constant(2)), foreach=False
    )
    step = stepper("dense", optimizer, model)
    for u in range(3):
        step(*batch(u))
    assert float(rate) == 0.125
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    assert optimizer.last_lr() == [0.125, 0.125]


class Watched(torch.Tensor):
    """A tensor that counts how often somebody waits for its value."""

    waits = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.__float__, torch.Tensor.item, torch.Tensor.__bool__):
            cls.waits += 1
        return super().__torch_function__(func, types, args, kwargs)


def test_a_rate_that_is_a_tensor_is_waited_for_by_last_lr_alone() -> None:
    model = mlp()
    rate = torch.tensor(0.125).as_subclass(Watched)
    schedule = JaggedSchedule(3, restart_warmup=2)
    optimizer = ReLoRAOptimizer(model, Waitless, rank=2, lr=rate, schedule=schedule)
    step = stepper("dense", optimizer, model)
    for u in range(3):
        step(*batch(u))
    Watched.waits = 0
    step(*batch(3))
    assert Watched.waits == 0
    assert optimizer.last_lr() == [0.0625, 0.0625]
    assert Watched.waits == 2


# ---- the contract of an Optimizer


def test_it_is_an_optimizer_whose_parameters_are_the_models_own() -> None:
    model = mlp()
    optimizer = relora(model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in model.parameters()}
    assert {id(model.get_submodule(name).weight) for name in SELECTED} <= owned
    assert repr(optimizer).startswith("ReLoRAOptimizer (")
    assert not optimizer.state


def test_a_step_without_gradients_moves_nothing_and_is_not_counted() -> None:
    model = mlp()
    optimizer = relora(model)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert not differences(before, model.state_dict())
    assert optimizer.num_updates == 0


def test_a_skipped_amp_update_leaves_weights_state_and_clock() -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    step = stepper("dense", optimizer, model)
    step(*batch(0))
    before = snapshot(model, optimizer)
    x, y = batch(1)
    scaler.scale(mse(model, x * math.inf, y)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not differences(before, snapshot(model, optimizer))
    assert scaler.get_scale() == 4.0


class Failing(torch.optim.SGD):
    """SGD whose every other step fails when it has moved some."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        if self.fails:
            raise RuntimeError("out of memory, say")


def test_a_weight_goes_with_its_factors_where_the_base_fails_after_it_moved_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mlp(torch.float64)
    optimizer = ReLoRAOptimizer(model, Failing, rank=2, lr=0.1, schedule=JaggedSchedule(0))
    frozen = optimizer.frozen_weight(model.first.weight)
    for index in range(3):
        monkeypatch.setattr(Failing, "fails", index == 1)
        mse(model, *batch(index, torch.float64)).backward()
        before = optimizer.factors(model.first.weight)[1].clone()
        with pytest.raises(RuntimeError, match="out of memory") if index == 1 else nullcontext():
            optimizer.step()
        assert not torch.equal(before, optimizer.factors(model.first.weight)[1])
        optimizer.zero_grad()
        torch.testing.assert_close(optimizer.frozen_weight(model.first.weight), frozen, rtol=0, atol=1e-12)
    assert optimizer.num_updates == 2


@pytest.mark.parametrize(
    "look",
    [
        lambda optimizer, model: optimizer.memory(),
        lambda optimizer, model: optimizer.frozen_weight(model.first.weight),
        lambda optimizer, model: optimizer.functional(model),
        lambda optimizer, model: optimizer.restart(),
    ],
    ids=["memory", "frozen_weight", "functional", "restart"],
)
def test_what_is_looked_at_in_inference_mode_trains_on(look: Callable[[ReLoRAOptimizer, Any], Any]) -> None:
    ends = []
    for mode in (nullcontext, torch.inference_mode):
        model = mlp(torch.float64)
        optimizer = relora(model)
        with mode():
            look(optimizer, model)
        for index in range(2):
            mse(model, *batch(index, torch.float64)).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(snapshot(model, optimizer))
    assert not differences(*ends)
