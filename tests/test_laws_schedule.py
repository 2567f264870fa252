"""One clock: the multiplier is DESIGN's formula at every update, and the base optimizer sees exactly it.

The formula is written a second time, independently, in tests/reference.py.
"""

from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import mlp, relora
from reference import cosine as reference_cosine
from reference import jagged

from relora_opt import JaggedSchedule, ReLoRAOptimizer, cosine


@st.composite
def clocks(draw: st.DrawFn, most_turns: int = 3) -> dict[str, int]:
    q = draw(st.integers(0, 12))
    N = draw(st.integers(2, 60))
    ramp, warm_start = draw(st.integers(0, q if q else 8)), draw(st.integers(0, 15))
    return {
        "q": q,
        "ramp": ramp,
        "warm_start": warm_start,
        "at": draw(st.integers(0, 20)) if warm_start >= max(1, ramp) else 0,
        "turns": draw(st.integers(1, most_turns)) if warm_start >= max(1, ramp) else 1,
        "N": N,
        "warmup": draw(st.integers(0, N - 1)),
    }


def both(clock: dict[str, int]) -> tuple[JaggedSchedule, Any]:
    q, ramp, warm_start, at, turns, N, warmup = clock.values()
    lengths = {"restart_warmup": ramp, "warm_start": warm_start, "warm_start_at": at, "warm_start_turns": turns}
    schedule = JaggedSchedule(q, **lengths, outer=cosine(N, warmup=warmup, min_ratio=0.05))
    outer = lambda u: reference_cosine(u, N=N, warmup=warmup, minimum=0.05)  # noqa: E731
    return schedule, lambda u: jagged(u, q=q, ramp=ramp, warm_start=warm_start, at=at, turns=turns, outer=outer)


@settings(max_examples=200, deadline=None)
@given(clocks())
def test_the_multiplier_is_the_formula_at_every_update(clock: dict[str, int]) -> None:
    schedule, formula = both(clock)
    for u in range(1, 80):
        assert schedule(u) == pytest.approx(formula(u), rel=1e-13, abs=1e-15), u  # another order of operations


@settings(max_examples=200, deadline=None)
@given(clocks())
def test_restarts_fall_on_warm_start_plus_k_periods_and_the_switch_is_none(clock: dict[str, int]) -> None:
    schedule, _ = both(clock)
    q, warm_start, at, turns = clock["q"], clock["warm_start"], clock["at"], clock["turns"]
    switch, updates = at + turns * warm_start, range(1, 80)
    expected = {*range(q, at, q), *range(switch + q, 80, q)} if q else set()
    assert {u for u in updates if schedule.restarts_after(u)} == expected
    assert {u for u in updates if schedule.switches_after(u)} == ({switch} if switch else set())
    changes = {at + number * warm_start for number in range(turns + 1)} if warm_start else set()
    assert {u for u in updates if schedule.changes_after(u)} == {u for u in changes if 0 < u < 80}
    assert [schedule.turn(u) for u in range(at + 1, switch + 1)] == [k for k in range(turns) for _ in range(warm_start)]
    assert [u for u in updates if schedule.is_full_rank(u)] == list(range(at + 1, switch + 1))
    for u in updates:
        assert schedule.next_restart(u) == min((v for v in expected if v > u), default=schedule.next_restart(79))


class RecordingSGD(torch.optim.SGD):
    """Records the learning rate that each tensor is updated with."""

    seen: ClassVar[dict[int, float]] = {}

    def step(self, closure: Any = None) -> Any:
        self.seen.update({id(p): float(g["lr"]) for g in self.param_groups for p in g["params"]})
        return super().step(closure)


def update(optimizer: ReLoRAOptimizer, model: torch.nn.Module) -> dict[int, float]:
    """Make an update; return the rate of every tensor that the base has updated, by id."""
    RecordingSGD.seen.clear()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return dict(RecordingSGD.seen)


@settings(max_examples=25, deadline=None)
@given(clocks(most_turns=2))
def test_the_base_sees_group_lr_times_multiplier_times_factor_lr_at_every_update(clock: dict[str, int]) -> None:
    schedule, formula = both(clock)
    model = mlp()
    groups = [
        {"params": [model.first.weight], "rank": 2, "factor_lr": 2.0, "lr": 0.1},
        {"params": [model.second.weight], "rank": 3, "factor_lr": 0.5, "lr": 0.2},
        {"params": [model.head.weight, model.norm.weight], "lr": 0.3},
    ]
    optimizer = ReLoRAOptimizer(groups, RecordingSGD, rank=0, schedule=schedule, lr=1.0)
    turns = {model.first.weight: 0, model.second.weight: clock["turns"] - 1}
    for u in range(1, 40):
        factored = [p for p, turn in turns.items() if schedule.turn(u) != turn]
        factors = {id(p): tuple(map(id, optimizer.factors(p))) for p in factored}
        seen = update(optimizer, model)
        for weight, lr, factor_lr in ((model.first.weight, 0.1, 2.0), (model.second.weight, 0.2, 0.5)):
            expected = lr * formula(u) * (factor_lr if id(weight) in factors else 1.0)
            tensors = factors.get(id(weight), (id(weight),))
            assert [seen[t] for t in tensors] == pytest.approx([expected] * len(tensors), rel=1e-14)
        assert seen[id(model.head.weight)] == pytest.approx(0.3 * formula(u), rel=1e-14)


def test_a_restart_by_hand_starts_the_same_ramp() -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(100, restart_warmup=4))
    multipliers = []
    for u in range(1, 16):
        multipliers.append(optimizer.lr_multiplier)  # of the coming update
        update(optimizer, model)
        if u == 6:
            optimizer.restart()
    assert optimizer.num_restarts == 1
    assert multipliers == [1.0] * 6 + [0.25, 0.5, 0.75] + [1.0] * 6


def test_a_restart_by_hand_before_the_first_update_starts_the_same_ramp() -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(8, restart_warmup=4))
    optimizer.restart()
    multipliers = []
    for _ in range(14):
        multipliers.append(optimizer.lr_multiplier)
        update(optimizer, model)
    assert multipliers == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_learning_rate_scheduler_of_torch_multiplies_with_the_clock() -> None:
    model = mlp()
    optimizer = ReLoRAOptimizer(
        [{"params": [model.first.weight], "rank": 2}],
        RecordingSGD,
        rank=0,
        schedule=JaggedSchedule(5, restart_warmup=2),
        lr=1.0,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda index: 0.9**index)
    for u in range(1, 13):
        seen = update(optimizer, model)
        scheduler.step()
        rates = [seen[id(factor)] for factor in optimizer.factors(model.first.weight)]
        expected = 0.9 ** (u - 1) * jagged(u, q=5, ramp=2)
        assert rates == pytest.approx([expected] * 2, rel=1e-12), u


def test_the_outer_schedule_is_the_fourth_argument() -> None:
    assert JaggedSchedule(9, 2, 3, cosine(40), 5) == JaggedSchedule(
        restart_every=9, restart_warmup=2, warm_start=3, outer=cosine(40), warm_start_at=5
    )


def test_multipliers_are_plain_numbers_whatever_an_outer_schedule_returns() -> None:
    def outer(update: int) -> torch.Tensor:
        return torch.tensor(1 / update, dtype=torch.float64)

    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(4, restart_warmup=2, outer=outer))
    for u in range(1, 8):
        assert type(optimizer.lr_multiplier) is float
        assert optimizer.lr_multiplier == jagged(u, q=4, ramp=2, outer=lambda update: 1 / update)
        update(optimizer, model)
    assert all(type(rate) is float for rate in optimizer.last_lr())
    assert type(optimizer.metrics().lr_multiplier) is float
