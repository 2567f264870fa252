"""Bases that keep more than the state of their parameters are reset as fresh ones, or refused where that cannot be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from models import batch, mlp, mse, selected_weights
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import SGD, AdamW, Optimizer

from relora_opt import JaggedSchedule, ReLoRAOptimizer, prune
from relora_opt.state import OPTIONS


class Plain(Optimizer):
    """SGD of a rate that it keeps in its group or its state, by `rate_of`, as adaptive optimizers do."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options})

    def rate_of(self, group: dict[str, Any]) -> float:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rate = self.rate_of(group)
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["moment"] = p.grad.clone()
                    p.sub_(p.grad, alpha=rate * group["lr"])


class Distance(Plain):
    """Its distance follows the gradients of all groups, after a few steps, as Prodigy's and D-Adaptation's do."""

    def rate_of(self, group: dict[str, Any]) -> float:
        gradients = [p.grad for own in self.param_groups for p in own["params"] if p.grad is not None]
        group["k"] = group.get("k", 0) + 1
        if group["k"] > 5:
            group["d"] = max(group.get("d", 1.0), 1.0 + float(sum(g.abs().sum() for g in gradients)))
        return float(group.get("d", 1.0))


class CountsAll(Plain):
    """It counts the steps of all parameters together, in its state, as MADGRAD does."""

    def rate_of(self, group: dict[str, Any]) -> float:
        if group is self.param_groups[0]:
            self.state["k"] = self.state.get("k", 0) + 1
        return float(self.state["k"])


class Grows(Plain):
    """Its rate grows with a sum in its group, from the fourth step on, whatever the gradients are."""

    def rate_of(self, group: dict[str, Any]) -> float:
        group["k"] = group.get("k", 0) + 1
        if group["k"] > 3:
            group["sum"] = group.get("sum", 0.0) + 0.5
        return 1.0 + float(group.get("sum", 0.0))


class Divides(SGD):
    """It divides by a number in its state, which is never 0, as SOAP does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if not state:
                state.update(every=3, count=0)
            state["count"] += 1
            state["due"] = state["count"] % state["every"]
        super().step()


def trained(base: Callable[..., Optimizer], steps: int, **options: Any) -> tuple[nn.Module, ReLoRAOptimizer]:
    model = mlp(torch.float64)
    optimizer = ReLoRAOptimizer(model, base, rank=2, alpha=2, lr=0.01, **options)
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model: nn.Module, optimizer: Optimizer, updates: Iterable[int]) -> None:
    for index in updates:
        optimizer.zero_grad()
        mse(model, *batch(index, torch.float64)).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("base", "named"), [(Distance, "keeps d of all"), (CountsAll, "keeps k of all")], ids=["distance", "count"]
)
@pytest.mark.parametrize("how", [prune.reset(), prune.magnitude(0.9), prune.random(0.9)], ids=str)
def test_what_a_base_keeps_of_all_it_trains_cannot_be_reset(base: Any, named: str, how: prune.Strategy) -> None:
    with pytest.raises(ValueError, match=f"{base.__name__} {named} that it trains together, .*: give prune.keep"):
        trained(base, 0, prune=how)
    trained(base, 9, prune=prune.keep(), schedule=JaggedSchedule(4, warm_start=2))


@pytest.mark.parametrize("base", [Grows, Divides, AdamW], ids=lambda base: base.__name__)
def test_after_a_reset_a_base_is_a_fresh_one(base: Any) -> None:
    model, optimizer = trained(base, 12, schedule=JaggedSchedule(12))
    other = copy.deepcopy(model)
    fresh = ReLoRAOptimizer(other, base, rank=2, alpha=2, lr=0.01, schedule=JaggedSchedule(0))
    weights = [(p, q) for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True)]
    low_rank = [
        (p, q) for (p, q), name in zip(weights, dict(model.named_parameters()), strict=True) if name in fresh.selected
    ]
    for p, q in low_rank:
        for ours, theirs in zip(optimizer.factors(p), fresh.factors(q), strict=True):
            theirs.data.copy_(ours)
    before = [p.detach().clone() for p, _ in low_rank]
    train(model, optimizer, range(12, 13))
    train(other, fresh, range(12, 13))
    for (p, q), start in zip(low_rank, before, strict=True):
        assert not torch.equal(p, start)
        assert torch.equal(p, q)


@pytest.mark.parametrize("base", [Grows, Divides, AdamW], ids=lambda base: base.__name__)
def test_in_a_later_warm_start_a_base_is_a_fresh_one(base: Any) -> None:
    model, optimizer = trained(base, 6, schedule=JaggedSchedule(0, warm_start=3, warm_start_at=6))
    other = copy.deepcopy(model)
    fresh = ReLoRAOptimizer(other, base, rank=0, lr=0.01, schedule=JaggedSchedule(0))
    before = selected_weights(copy.deepcopy(model))
    train(model, optimizer, range(6, 7))
    train(other, fresh, range(6, 7))
    theirs = selected_weights(other)
    for name, weight in selected_weights(model).items():
        assert not torch.equal(weight, before[name])
        assert torch.equal(weight, theirs[name])


@pytest.mark.parametrize("warm_start", [0, 2])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_taking_the_state_before_the_first_update_counts_nothing_in_the_groups(warm_start: int) -> None:
    ends = []
    for is_taken in (False, True):
        model, optimizer = trained(Grows, 0, schedule=JaggedSchedule(0, warm_start=warm_start))
        if is_taken:
            assert get_optimizer_state_dict(model, optimizer)["state"]
        train(model, optimizer, range(6))
        assert {group["k"] for group in optimizer.param_groups} == {6, 6 - warm_start}
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


class Around(Optimizer):
    """A Lookahead around another optimizer, which its own state does not hold."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        self.inner = AdamW(groups, **options)
        super().__init__(self.inner.param_groups, self.inner.defaults)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "inner": self.inner.state_dict()}


def test_a_base_with_state_beside_its_parameters_is_refused() -> None:
    with pytest.raises(
        ValueError, match="Around keeps inner beside the state of its parameters, which would be neither"
    ):
        trained(Around, 0)


def test_a_base_whose_step_would_not_be_the_one_that_is_called_is_refused() -> None:
    def hooked(groups: Any, **options: Any) -> Optimizer:
        base = AdamW(groups, **options)
        base.register_step_post_hook(lambda *_: None)
        return base

    def scheduled(groups: Any, **options: Any) -> Optimizer:
        base = AdamW(groups, **options)
        torch.optim.lr_scheduler.ConstantLR(base)
        return base

    for base in (hooked, scheduled):
        with pytest.raises(ValueError, match="base gave a AdamW with step hooks, or a step that was replaced"):
            trained(base, 0)


def test_a_restart_that_fails_leaves_the_cycle_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained(AdamW, 3)
    clock, factors = (
        optimizer.clock,
        [f.detach().clone() for p in low_rank_of(model, optimizer) for f in optimizer.factors(p)],
    )
    monkeypatch.setattr("relora_opt.optimizer.prune_states_", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        optimizer.restart()
    assert optimizer.clock == clock
    now = [f for p in low_rank_of(model, optimizer) for f in optimizer.factors(p)]
    assert all(torch.equal(one, other) for one, other in zip(factors, now, strict=True))


def low_rank_of(model: nn.Module, optimizer: ReLoRAOptimizer) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if name in optimizer.selected]


def test_a_rate_that_is_a_tensor_is_each_groups_own() -> None:
    optimizer = ReLoRAOptimizer(mlp(), AdamW, rank=2, lr=torch.tensor(0.01))
    optimizer.add_param_group(
        {"params": [("more.weight", nn.Linear(8, 8).weight), ("more.bias", nn.Linear(8, 8).bias)]}
    )
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx(
        [0.005] * len(optimizer.param_groups)
    )


def test_a_base_that_puts_an_option_by_a_name_of_ours_into_its_groups_is_refused() -> None:
    class Adds(SGD):
        def __init__(self, params: Iterable[Any], **options: Any) -> None:
            super().__init__(params, **options)
            self.param_groups[0]["scale"] = 0.7

    with pytest.raises(ValueError, match="Adds keeps scale in its groups, where that is ReLoRAOptimizer's own"):
        ReLoRAOptimizer(mlp(), Adds, rank=2, alpha=2, lr=0.1)


@pytest.mark.parametrize("name", ["scale", "rank", "factor_lr", "num_updates"])
def test_a_base_that_keeps_an_option_by_a_name_of_ours_is_refused(name: str) -> None:
    class Scaled(Plain):
        def __init__(self, params: Iterable[Any], **options: Any) -> None:
            super().__init__(params, **{name: 1.0, **options})

    with pytest.raises(ValueError, match=rf"Scaled keeps {name} in its groups, where that is ReLoRAOptimizer's own"):
        ReLoRAOptimizer(mlp(), Scaled, rank=2, alpha=2)


def test_a_base_sees_nothing_of_ours_in_its_groups_but_the_rank() -> None:
    seen = []

    class Looks(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            seen.extend(group.keys() for group in self.param_groups)
            super().step()

    model = mlp(torch.float64)
    train(model, ReLoRAOptimizer(model, Looks, rank=2, lr=0.01, schedule=JaggedSchedule(2)), range(4))
    assert seen
    assert all(keys & set(OPTIONS) == {"rank"} for keys in seen)


class LowersItsRate(SGD):
    """Halves the rate in its groups after every update, as a base with a schedule inside does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            group["lr"] /= 2


def test_a_rate_that_the_base_lowers_stays_lowered() -> None:
    model, plain_model = mlp(torch.float64), mlp(torch.float64)
    optimizer = ReLoRAOptimizer(model, LowersItsRate, rank=2, alpha=2, lr=0.01, schedule=JaggedSchedule(4, 2))
    train(model, optimizer, range(3))
    assert [group["lr"] for group in optimizer.param_groups] == [0.01 / 8] * len(optimizer.param_groups)
    plain_model.load_state_dict(model.state_dict())
    plain = ReLoRAOptimizer(model, LowersItsRate, rank=0, lr=0.01)
    alone = LowersItsRate(plain_model.parameters(), lr=0.01)
    train(model, plain, range(3))
    train(plain_model, alone, range(3))
    for p, q in zip(model.parameters(), plain_model.parameters(), strict=True):
        assert torch.equal(p, q)


class SetsItsRate(SGD):
    """Sets the rate in its groups by a schedule of its own, whatever it was told."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            group["lr"] = 0.1


def test_a_ramp_is_not_undone_by_a_base_that_sets_its_rate() -> None:
    model = mlp(torch.float64)
    optimizer = ReLoRAOptimizer(model, SetsItsRate, rank=2, alpha=2, lr=0.1, schedule=JaggedSchedule(4, 3))
    rates = []
    for update in range(7):
        train(model, optimizer, [update])
        rates.append(optimizer.last_lr()[0])
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1 / 3, 0.2 / 3, 0.1])
