"""What `make_step` and the loops around it promise: no dense gradient, accumulation, skipped updates, GradScaler."""

import copy
from typing import Any

import pytest
import torch
from models import batch, differences, jagged_schedule, mlp, mse, relora, selected_weights, snapshot, stepper
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from relora_opt import JaggedSchedule
from relora_opt.factors import movements

DOUBLE = torch.float64
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


class Products(TorchDispatchMode):
    """Records the shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("path", ["functional", "step"])
def test_a_backward_of_the_functional_path_never_forms_the_dense_gradient(path: str) -> None:
    model = mlp()
    optimizer = relora(model)
    spied: list[Any] = []
    formed: list[Tensor] = []

    def loss_fn(called: nn.Module, *data: Tensor) -> Tensor:  # a hook that is there earlier is refused
        for weight in spied:
            handles.append(weight.register_post_accumulate_grad_hook(formed.append))
        return mse(called, *data)

    handles: list[Any] = []
    step = stepper(path, optimizer, model, loss_fn)
    step(*batch(0))
    shapes = {tuple(weight.shape) for weight in selected_weights(model).values()}
    shapes |= {shape[::-1] for shape in shapes}
    if path == "step":
        spied += selected_weights(model).values()
        step(*batch(1))
        assert len(handles) == 2
        assert not formed
        for handle in handles:
            handle.remove()
    else:
        loss = mse(optimizer.functional(model), *batch(1))
        with Products() as products:
            loss.backward()
        assert products.shapes
        assert not shapes & set(products.shapes)
    assert all(weight.grad is None for weight in selected_weights(model).values())
    dense = mse(model, *batch(1))
    with Products() as products:
        dense.backward()
    assert shapes & set(products.shapes)  # the recorder sees it where it is formed


@pytest.mark.parametrize("k", [1, 2, 4])
def test_accumulating_k_micro_batches_equals_the_full_batch(k: int) -> None:
    """To 1e-12 in float64: the mean of means is the mean, summed in another order."""
    whole, parts = mlp(DOUBLE), mlp(DOUBLE)
    whole_optimizer = relora(whole, schedule=jagged_schedule(), max_grad_norm=0.3)
    parts_optimizer = relora(parts, schedule=jagged_schedule(), max_grad_norm=0.3)
    full = whole_optimizer.make_step(whole, mse, compile=False)
    micro = parts_optimizer.make_step(parts, mse, compile=False, accumulate=k)
    for u in range(24):
        x, y = batch(u, DOUBLE)
        loss = full(x, y)
        losses = []
        for index, (some_x, some_y) in enumerate(zip(x.chunk(k), y.chunk(k), strict=True)):
            assert parts_optimizer.num_updates == u, index
            losses.append(micro(some_x, some_y))
        assert parts_optimizer.num_updates == u + 1
        assert float(loss - sum(losses) / k) == pytest.approx(0, abs=1e-12)
        for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_skip_nonfinite_skips_the_update_and_does_not_count_it(bad: float, accumulate: int) -> None:
    """The run with bad batches in between equals, bitwise, the run that never saw them."""
    runs = []
    for bad_after in ((), (0, 4, 5, 9)):
        model = mlp()
        optimizer = relora(model, schedule=jagged_schedule(restart_every=4, restart_warmup=2, warm_start=3))
        step = optimizer.make_step(model, mse, compile=False, skip_nonfinite=True, accumulate=accumulate)
        for u in range(13):
            for _ in range(accumulate):
                step(*batch(u))
            if u in bad_after:
                before = optimizer.num_updates
                for index in range(accumulate):
                    x, y = batch(100)
                    step(x, y * bad if index == 0 else y)
                assert optimizer.num_updates == before == u + 1
        runs.append({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        assert optimizer.num_restarts == 2
    assert not differences(*runs)


def test_make_step_returns_the_detached_loss_and_aux_before_the_update() -> None:
    model = mlp(DOUBLE)
    optimizer = relora(model)
    x, y = batch(0, DOUBLE)

    def with_output(model: nn.Module, x: Tensor, *, y: Tensor) -> tuple[Tensor, Tensor]:
        output = model(x)
        return torch.nn.functional.mse_loss(output, y), output

    expected_output = model(x).detach()
    expected = mse(model, x, y).detach()
    loss, output = optimizer.make_step(model, with_output, compile=False, has_aux=True)(x, y=y)
    assert not loss.requires_grad
    assert torch.equal(loss, expected)
    assert torch.equal(output.detach(), expected_output)
    assert not torch.equal(model(x), expected_output)


def test_batch_norm_statistics_and_dropout_work_on_the_functional_path() -> None:
    runs = []
    for path in ("dense", "functional", "step"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3)).double()
        optimizer = relora(model, "SGD", targets=["0.weight"])
        step = stepper(path, optimizer, model)
        torch.manual_seed(1)
        for u in range(4):
            step(*batch(u, DOUBLE))
        runs.append(model.state_dict())
    assert int(runs[0]["1.num_batches_tracked"]) == 4
    for other in runs[1:]:
        for key, value in runs[0].items():
            torch.testing.assert_close(other[key], value, rtol=0, atol=1e-12)


def test_the_functional_module_exposes_exactly_what_is_trained() -> None:
    model = mlp()
    optimizer = relora(model)
    f = optimizer.functional(model)
    selected = selected_weights(model).values()
    expected = {id(p) for p in model.parameters()} - {id(weight) for weight in selected}
    expected |= {id(factor) for weight in selected for factor in optimizer.factors(weight)}
    assert {id(p) for p in f.parameters()} == expected
    assert all(p.requires_grad for p in model.parameters())


def scaled_run(scaler: torch.amp.GradScaler | None, infinite: tuple[int, ...] = ()) -> dict[str, Any]:
    model = mlp()
    schedule = jagged_schedule(restart_every=4, restart_warmup=2, warm_start=3)
    optimizer = relora(model, schedule=schedule, max_grad_norm=0.5)
    for u in range(12):
        for factor in (1.0, float("inf")) if u in infinite else (1.0,):
            loss = mse(model, *batch(u)) * factor
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        assert optimizer.num_updates == u + 1
    assert optimizer.num_restarts == 2
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def test_under_a_grad_scaler_the_dense_path_is_bitwise_the_unscaled_one_and_skips_do_not_count() -> None:
    """Bitwise, because scales are powers of two and nothing here overflows or underflows."""
    assert not differences(scaled_run(torch.amp.GradScaler("cpu", init_scale=2.0**10)), scaled_run(None))
    skipping = scaled_run(torch.amp.GradScaler("cpu", init_scale=2.0**10), infinite=(1, 3, 6, 7))
    assert not differences(skipping, scaled_run(None))


def test_a_grad_scaler_that_unscales_by_itself_before_clipping_is_not_unscaled_twice() -> None:
    runs = []
    for scaled in (True, False):
        model = mlp()
        optimizer = relora(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled)
        for u in range(3):
            scaler.scale(mse(model, *batch(u))).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        runs.append(model.state_dict())
    assert not differences(*runs)


def test_factor_gradients_of_the_functional_path_under_a_grad_scaler_are_refused_by_name() -> None:
    model = mlp()
    optimizer = relora(model)
    f = optimizer.functional(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(mse(f, *batch(0))).backward()
    with pytest.raises(RuntimeError, match="bfloat16"):
        scaler.step(optimizer)


def test_a_manual_restart_counts_and_the_periodic_ones_stay_in_place() -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(6, restart_warmup=2))
    step = stepper("step", optimizer, model)
    restarts = []
    for u in range(1, 15):
        step(*batch(u))
        if u == 3:
            optimizer.restart()
        restarts.append(optimizer.num_restarts)
    assert restarts == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3]


def test_hooks_and_schedulers_see_every_update_of_make_step_once() -> None:
    model = mlp()
    optimizer = relora(model)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    handle = register_optimizer_step_post_hook(lambda *_: seen.append("global"))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    step = optimizer.make_step(model, mse, compile=False)
    step(*batch(0))
    handle.remove()
    scheduler.step()
    assert sorted(seen) == ["after", "before", "global"]


def test_a_closure_runs_once_with_gradients_enabled_and_its_loss_is_returned() -> None:
    runs = []
    for with_closure in (True, False):
        model = mlp()
        optimizer = relora(model, schedule=jagged_schedule(3, 1, 2))
        calls = []
        for u in range(7):

            def closure(u: int = u, model: nn.Module = model, optimizer: Any = optimizer, calls: Any = calls) -> Tensor:
                assert torch.is_grad_enabled()
                calls.append(u)
                optimizer.zero_grad()
                loss = mse(model, *batch(u))
                loss.backward()
                return loss

            expected = mse(model, *batch(u)).detach()
            if with_closure:
                with torch.no_grad():
                    assert torch.equal(optimizer.step(closure).detach(), expected)
            else:
                closure()
                assert optimizer.step() is None
        assert calls == list(range(7))
        runs.append({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert not differences(*runs)


def test_a_small_step_of_large_factors_moves_the_weight_to_the_last_digits() -> None:
    """Late in a cycle B A is a thousand movements large; what a product rounds, it must round of the movement."""
    model = nn.Linear(48, 32, bias=False)
    optimizer = relora(model, "SGD", lr=1e-5, rank=4, targets=["weight"])
    A, B = optimizer.factors(model.weight)
    with torch.no_grad():
        A.normal_(), B.normal_(), model.weight.zero_()
    before = [factor.detach().double() for factor in (A, B)]
    model.weight.grad = torch.randn(32, 48)
    optimizer.step()
    exact = 3.0 / 4 * (B.detach().double() @ A.detach().double() - before[1] @ before[0])
    assert float((model.weight.detach() - exact).norm() / exact.norm()) < 1e-4


def test_every_pair_of_factors_has_its_own_movement() -> None:
    """Of matrices and batches of them, in float32 and float64, of some sizes."""
    shapes = [(6, 5), (7, 4), (3, 6, 5), (5, 5), (2, 4, 6), (6, 5), (8, 3), (3, 6, 5), (9, 9)]
    factors, before = (
        [
            torch.randn(*batch, *size, dtype=DOUBLE if number % 3 else torch.float32)
            for number, (*batch, m, n) in enumerate(shapes)
            for size in ((2, n), (m, 2))
        ]
        for _ in range(2)
    )
    moved = list(movements(factors, before))
    pairs = zip(factors[::2], factors[1::2], before[::2], before[1::2], strict=True)
    for (left, right), (new_A, new_B, A, B) in zip(moved, pairs, strict=True):
        torch.testing.assert_close(left @ right, new_B @ new_A - B @ A)
    with pytest.raises(ValueError, match="zip"):
        list(movements(factors, before[:-2]))


def test_a_restart_leaves_the_global_random_numbers_alone() -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(100))
    optimizer.make_step(model, mse, compile=False)(*batch(0))
    before = torch.get_rng_state()
    optimizer.restart()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_that_is_loaded_in_the_middle_of_an_update_begins_it_anew() -> None:
    ends = []
    for loads in (False, True):
        model = mlp(torch.float64)
        optimizer = relora(model, schedule=JaggedSchedule(3, 1))
        step = optimizer.make_step(model, mse, compile=False, accumulate=2, skip_nonfinite=True)
        for index in range(4):
            step(*batch(index, torch.float64))
        if loads:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            for _ in range(2):  # once more: the step sees every load
                step(*batch(9, torch.float64))
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
        for index in range(4, 8):
            step(*batch(index, torch.float64))
        assert optimizer.num_updates == 4
        assert step.num_micro_batches == 8
        ends.append(snapshot(model, optimizer))
    assert differences(*ends) == []
