"""Save, load and continue equals never stopped, bitwise: at every update, on the switch and on every restart."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import MLP, batch, differences, jagged_schedule, mlp, mse, relora, snapshot, stepper, through_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from relora_opt import JaggedSchedule, ReLoRAOptimizer, prune

LAST = 14
SCHEDULE = jagged_schedule(restart_every=4, restart_warmup=2, warm_start=4)  # switch after 4; restarts after 8 and 12
LATE = jagged_schedule(restart_every=4, restart_warmup=2, warm_start=3, at=6)  # restarts after 4 and 13; switch after 9
# Switches after 4, 7 and 10; restarts after 3 and 13:
TURNS = jagged_schedule(restart_every=3, restart_warmup=2, warm_start=3, at=4, turns=2)
STRATEGIES = {
    "reset": prune.reset(),
    "magnitude": prune.magnitude(0.5),
    "random": prune.random(0.5),
    "keep": prune.keep(),
}


def build(
    dtype: torch.dtype,
    base: str,
    strategy: str = "reset",
    *,
    init: str = "kaiming",
    schedule: JaggedSchedule = SCHEDULE,
    seed: int = 0,
) -> tuple[MLP, ReLoRAOptimizer]:
    model = mlp(dtype, seed=seed)
    changes: dict[str, Any] = {"init": init} | ({"alpha": "matched"} if init == "gradient" else {})
    changes |= {"schedule": schedule, "prune": STRATEGIES[strategy], "max_grad_norm": 0.5, "factor_lr": 2.0}
    return model, relora(model, base, **changes)


def updates(path: str, model: MLP, optimizer: ReLoRAOptimizer, first: int, last: int = LAST) -> Iterator[Tensor]:
    """Make the updates first + 1, ..., last, one at a time, and yield their losses."""
    step = stepper(path, optimizer, model)
    for u in range(first + 1, last + 1):
        yield step(*batch(u, model.head.weight.dtype))


def run(path: str, model: MLP, optimizer: ReLoRAOptimizer, first: int, last: int = LAST) -> list[dict[str, Any]]:
    """Run the updates first + 1, ..., last and return the snapshot after each."""
    return [snapshot(model, optimizer) for _ in updates(path, model, optimizer, first, last)]


CASES = [
    (path, dtype, base, "reset", init)
    for init in ("kaiming", "gradient")
    for path in ("dense", "step")
    for dtype in (torch.float32, torch.bfloat16)
    for base in ("SGD", "AdamW")
] + [("functional", torch.float32, "AdamW", strategy, "kaiming") for strategy in STRATEGIES]


@pytest.mark.parametrize(("path", "dtype", "base", "strategy", "init"), CASES, ids=str)
def test_continuing_from_a_file_after_any_update_equals_never_having_stopped(
    path: str, dtype: torch.dtype, base: str, strategy: str, init: str
) -> None:
    model, optimizer = build(dtype, base, strategy, init=init)
    snapshots = [snapshot(model, optimizer), *run(path, model, optimizer, 0)]
    assert optimizer.num_restarts == 2
    for u in range(LAST + 1):
        resumed, fresh = build(dtype, base, strategy, init=init, seed=u + 1)
        saved = through_file(snapshots[u])
        resumed.load_state_dict(saved["model"])
        fresh.load_state_dict(saved["optimizer"])
        assert not differences(snapshot(resumed, fresh), snapshots[u]), f"loading the state of update {u} changes it"
        assert (fresh.num_updates, fresh.num_restarts) == (u, max(0, u - 4) // 4)
        last = min(LAST, u + 5)  # over the next event, whichever it is
        if u < last:
            for _ in updates(path, resumed, fresh, u, last):
                pass
            assert not differences(snapshot(resumed, fresh), snapshots[last]), f"from update {u} to {last}"


def later_warm_starts() -> Iterator[Any]:
    """Yield all ways to have one, together and in turns; of the latter two are fast."""
    for dtype in (torch.float32, torch.bfloat16):
        for init in ("kaiming", "gradient"):
            for path in ("dense", "step"):
                yield pytest.param(LATE, 3, dtype, init, path, id=f"together-{dtype}-{init}-{path}")
                is_fast = (dtype, init, path) in (
                    (torch.float32, "gradient", "step"),
                    (torch.bfloat16, "kaiming", "dense"),
                )
                marks = () if is_fast else pytest.mark.slow
                yield pytest.param(TURNS, 4, dtype, init, path, id=f"turns-{dtype}-{init}-{path}", marks=marks)


@pytest.mark.parametrize(("schedule", "num_restarts", "dtype", "init", "path"), [*later_warm_starts()])
def test_continuing_with_a_warm_start_in_the_middle_is_bitwise_too(
    schedule: JaggedSchedule, num_restarts: int, dtype: torch.dtype, init: str, path: str
) -> None:
    model, optimizer = build(dtype, "AdamW", init=init, schedule=schedule)
    snapshots = [snapshot(model, optimizer), *run(path, model, optimizer, 0)]
    assert optimizer.num_restarts == num_restarts  # the later switches among them
    for u in range(LAST + 1):
        resumed, fresh = build(dtype, "AdamW", init=init, schedule=schedule, seed=u + 1)
        saved = through_file(snapshots[u])
        resumed.load_state_dict(saved["model"])
        fresh.load_state_dict(saved["optimizer"])
        last = min(LAST, u + 5)
        assert not differences(
            [*run(path, resumed, fresh, u, last)][-1:], snapshots[last : last + 1] if u < last else []
        )


@pytest.mark.parametrize("stop", [0, 2, 4, 6, 8, 10, 12])
@pytest.mark.parametrize("copier", ["deepcopy", "pickle"])
def test_a_copy_of_model_and_optimizer_continues_bitwise(copier: str, stop: int) -> None:
    model, optimizer = build(torch.bfloat16, "AdamW")
    run("dense", model, optimizer, 0, stop)
    pair = (model, optimizer)
    twin_model, twin = copy.deepcopy(pair) if copier == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert twin.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]
    assert not differences(run("dense", twin_model, twin, stop), run("dense", model, optimizer, stop))


def test_loading_into_a_live_optimizer_goes_back_to_the_saved_moment() -> None:
    model, optimizer = build(torch.float32, "AdamW")
    run("step", model, optimizer, 0, 10)
    saved = snapshot(model, optimizer)
    expected = run("step", model, optimizer, 10, 14)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert not differences(run("step", model, optimizer, 10, 14), expected)


def test_the_state_holds_tensors_and_plain_numbers_only_and_keeps_every_dtype() -> None:
    model, optimizer = build(torch.bfloat16, "AdamW")
    run("dense", model, optimizer, 0, 15)
    saved = optimizer.state_dict()
    _fresh_model, fresh = build(torch.bfloat16, "AdamW", seed=1)
    fresh.load_state_dict(state_dict=copy.deepcopy(saved))
    assert not differences(saved["state"], fresh.state_dict()["state"])
    plain = (int, float, str, bool, type(None), tuple, list)
    for group in saved["param_groups"]:
        assert all(isinstance(value, plain) for value in group.values()), group


def test_the_phantom_step_of_distributed_checkpoint_changes_nothing_and_does_not_count() -> None:
    """On a fresh optimizer it sets every rate to 0 and every gradient to zero, and calls step.

    Without weight decay it leaves SGD a momentum of zero, from which a run goes on as if it had never been.
    """
    runs = []
    for has_phantom in (True, False):
        model = mlp()
        optimizer = relora(model, "SGD", schedule=jagged_schedule(4, 2, 0), weight_decay=0.0)
        if has_phantom:
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            assert optimizer.num_updates == 0
            assert set(optimizer.state) == set(model.parameters())
            assert not differences(before, {name: p.detach() for name, p in model.named_parameters()})
        runs.append(run("dense", model, optimizer, 0, 10))
        assert optimizer.num_restarts == 2
    assert not differences(*runs)


def test_a_first_update_at_rate_0_that_only_factors_have_gradients_for_is_counted() -> None:
    model = mlp()
    optimizer = relora(model, lr=0.0)
    f = optimizer.functional(model)
    mse(f, *batch(0)).backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.num_updates == 1
    assert optimizer.state[model.first.weight]["B_state"]["exp_avg"].any()


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("stop", [0, 2, 4, 5, 8, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_continuing_through_the_state_dict_of_distributed_checkpoint_is_bitwise(
    dtype: torch.dtype, stop: int, is_flat: bool
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    model, optimizer = build(dtype, "AdamW")
    run("dense", model, optimizer, 0, stop)
    saved = through_file(get_optimizer_state_dict(model, optimizer, options=options))
    weights = through_file(model.state_dict())
    clock = {key: optimizer.param_groups[0][key] for key in ("num_updates", "num_restarts", "last_restart")}
    expected = run("dense", model, optimizer, stop)
    resumed, fresh = build(dtype, "AdamW", seed=stop + 1)
    resumed.load_state_dict(weights)
    fresh.set_clock(**clock)
    set_optimizer_state_dict(resumed, fresh, saved, options=options)
    assert (fresh.num_updates, fresh.num_restarts) == (clock["num_updates"], clock["num_restarts"])
    assert not differences(run("dense", resumed, fresh, stop), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_first", [True, False])
def test_model_and_optimizer_load_in_either_order(model_first: bool, dtype: torch.dtype) -> None:
    model, schedule = mlp(dtype), jagged_schedule(4, 1, 3)
    optimizer = relora(model, schedule=schedule)
    step = stepper("dense", optimizer, model)
    for index in range(6):
        step(*batch(index, dtype))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = mlp(dtype, seed=3)
    fresh = relora(other, schedule=schedule)
    pairs = list(zip((other, fresh), saved, strict=True))
    for target, state in pairs if model_first else reversed(pairs):
        target.load_state_dict(state)
    other_step = stepper("dense", fresh, other)
    for index in range(6, 12):
        step(*batch(index, dtype))
        other_step(*batch(index, dtype))
    assert not differences(snapshot(model, optimizer), snapshot(other, fresh))


class Counting(torch.optim.SGD):
    """SGD that keeps a number of its own under a key that is no parameter."""

    def step(self, closure: Any = None) -> Any:
        count = self.state["of the whole"]["count"] = self.state.setdefault("of the whole", {}).get("count", 0) + 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(1 / count)
        return super().step(closure)


@pytest.mark.parametrize("rank", [0, 2])
def test_what_a_base_keeps_of_no_parameter_is_saved_and_outlasts_the_switch(rank: int) -> None:
    def build() -> tuple[nn.Module, ReLoRAOptimizer]:
        model = mlp(torch.float64)
        schedule = JaggedSchedule(3, warm_start=2)
        return model, ReLoRAOptimizer(model, Counting, rank=rank, lr=0.1, schedule=schedule, prune=prune.keep())

    def train(model: nn.Module, optimizer: ReLoRAOptimizer, updates: range) -> None:
        for index in updates:
            mse(model, *batch(index, torch.float64)).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = build()
    train(model, optimizer, range(6))
    assert optimizer.state["of the whole"] == {"count": 6}
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(6, 9))
    other, fresh = build()
    other.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    train(other, fresh, range(6, 9))
    assert differences(snapshot(model, optimizer), snapshot(other, fresh)) == []


def test_what_a_hook_puts_into_the_state_after_loading_stays_there() -> None:
    model, optimizer = build(torch.float32, "AdamW")
    run("dense", model, optimizer, 0, 9)
    saved = copy.deepcopy(optimizer.state_dict())
    bias, W = model.head.bias, model.first.weight

    def put(loaded: Any) -> None:
        loaded.state[bias]["exp_avg"] = torch.full_like(bias, 0.25)
        loaded.state[W]["A_state"]["exp_avg"].fill_(0.5)
        loaded.param_groups[0]["pointing"] = 7

    optimizer.register_load_state_dict_post_hook(put)
    optimizer.load_state_dict(saved)
    assert optimizer.state[bias]["exp_avg"].eq(0.25).all()
    assert optimizer.state[W]["A_state"]["exp_avg"].eq(0.5).all()
    assert optimizer.param_groups[0]["pointing"] == 7
