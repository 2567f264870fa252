"""release_grads=True trains what release_grads=False trains, with one dense gradient at a time.

Every model of the zoos, with accumulation, clipping, a warm start and two restarts, in float64; the largest number of
dense gradients alive, and the bytes of the backward pass, are counted.
"""

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import DTYPES, batch, differences, jagged_schedule, mlp, mse, relora, selected_weights, snapshot, stepper
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from zoo import TORCH
from zoo_transformers import TRANSFORMERS

from relora_opt import JaggedSchedule, ReLoRAOptimizer, muon_beside_adamw

DOUBLE = torch.float64
CASES = {**TORCH, **TRANSFORMERS}
SCHEDULE = JaggedSchedule(3, restart_warmup=2, warm_start=2)  # a switch after 2, restarts after 5 and 8


def train(model: nn.Module, optimizer: ReLoRAOptimizer, loss_fn: Callable[[Any], Tensor], updates: int) -> None:
    """Train with two micro-batches an update, which differ by a factor."""
    for _ in range(updates):
        for weight in (0.25, 0.75):
            (weight * loss_fn(model)).backward()
        optimizer.step()
        optimizer.zero_grad()


def close(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    """Compare two state dictionaries, relative to the norm of each tensor."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            close(value, b[key], tolerance)
        elif isinstance(value, Tensor) and value.is_floating_point():
            assert (value - b[key]).norm() <= tolerance * (1e-3 + value.norm()), key


# ---- the same training


@pytest.mark.parametrize("name", CASES)
def test_every_model_trains_as_without(name: str) -> None:
    case = CASES[name]
    runs = []
    for release_grads in (True, False):
        model, loss_fn = case.model(), case.loss_fn()
        # Not Adam, which makes a gradient of 1e-20 as large as any other.
        optimizer = ReLoRAOptimizer(
            model,
            torch.optim.SGD,
            rank=2,
            targets=case.targets,
            schedule=SCHEDULE,
            max_grad_norm=0.5,
            release_grads=release_grads,
            lr=0.05,
            momentum=0.9,
        )
        train(model, optimizer, loss_fn, 9)
        assert optimizer.num_restarts == 2
        runs.append(snapshot(model, optimizer))
    close(*(run["model"] for run in runs))
    close(*(run["optimizer"]["state"] for run in runs))


@pytest.mark.parametrize("base", [torch.optim.AdamW, muon_beside_adamw()], ids=["AdamW", "Muon"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_base_trains_near_without(dtype: torch.dtype, base: Any) -> None:
    runs = []
    for release_grads in (True, False):
        model = mlp(dtype)
        targets = ["first.weight", "second.weight"]
        optimizer = ReLoRAOptimizer(
            model, base, rank=2, targets=targets, schedule=SCHEDULE, release_grads=release_grads, lr=0.01
        )
        train(model, optimizer, lambda model: mse(model, *batch(0, dtype)), 9)
        runs.append(model.state_dict())
    close(*runs, tolerance={torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype])


def test_with_one_micro_batch_it_is_bitwise_the_same() -> None:
    runs = []
    for release_grads in (True, False):
        model = mlp()
        optimizer = relora(model, schedule=jagged_schedule(4, 2, 3), max_grad_norm=0.1, release_grads=release_grads)
        step = stepper("dense", optimizer, model)
        for u in range(12):
            step(*batch(u))
        runs.append(snapshot(model, optimizer))
    assert not differences(*runs)


def test_a_points_along_the_gradient_by_sketches_as_on_the_functional_path() -> None:
    runs = []
    for path in ("dense", "functional"):
        model = mlp(DOUBLE)
        optimizer = relora(model, init="gradient", schedule=JaggedSchedule(4), release_grads=path == "dense")
        step = stepper(path, optimizer, model)
        for u in range(7):
            step(*batch(u, DOUBLE))
        runs.append(model.state_dict())
    close(*runs)
    with pytest.raises(ValueError, match='restart_every=2 with init="gradient": with release_grads=True the first 2'):
        relora(mlp(), init="gradient", schedule=JaggedSchedule(2), release_grads=True)


def test_a_penalty_beside_the_functional_path_counts() -> None:
    runs = []
    for release_grads in (True, False):
        model = mlp(DOUBLE)
        optimizer = relora(model, schedule=JaggedSchedule(4), release_grads=release_grads)
        functional = optimizer.functional(model)
        for u in range(6):
            mse(functional, *batch(u, DOUBLE)).backward()
            (0.1 * sum(p.square().sum() for p in model.parameters())).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model.state_dict())
    close(*runs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13's compiler uses what torch 2.13 deprecates
def test_a_compiled_model_trains_as_without() -> None:
    runs = []
    for release_grads in (True, False):
        model = mlp(DOUBLE)
        optimizer = relora(model, schedule=JaggedSchedule(4), release_grads=release_grads)
        step = stepper("dense", optimizer, torch.compile(model, backend="aot_eager", fullgraph=True))
        for u in range(6):
            step(*batch(u, DOUBLE))
        runs.append(model.state_dict())
    close(*runs)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_activations_train_as_without(use_reentrant: bool) -> None:
    runs = []
    for release_grads in (True, False):
        model = mlp(DOUBLE, use_reentrant=use_reentrant)
        optimizer = relora(model, schedule=JaggedSchedule(4), release_grads=release_grads)
        train(model, optimizer, lambda model: mse(model, *batch(0, DOUBLE)), 6)
        runs.append(model.state_dict())
    close(*runs)


# ---- one dense gradient at a time


class Deep(nn.Sequential):
    """Eight square layers, whose weights are much larger than the activations of a batch of one."""

    def __init__(self) -> None:
        super().__init__(*(nn.Linear(256, 256, bias=False) for _ in range(8)))


def deep(*, release_grads: bool) -> tuple[Deep, ReLoRAOptimizer]:
    torch.manual_seed(0)
    model = Deep()
    return model, ReLoRAOptimizer(model, rank=2, targets="weight", release_grads=release_grads, lr=1e-3)


@pytest.mark.parametrize(("release_grads", "most"), [(True, 1), (False, 8)])
def test_one_dense_gradient_lives_at_a_time(release_grads: bool, most: int) -> None:
    model, counts = Deep(), []
    for W in model.parameters():
        W.register_post_accumulate_grad_hook(
            lambda _: counts.append(sum(p.grad is not None for p in model.parameters()))
        )
    optimizer = ReLoRAOptimizer(model, rank=2, targets="weight", release_grads=release_grads, lr=1e-3)
    for _ in range(2):
        model(torch.ones(1, 256)).sum().backward()
    assert max(counts) == most
    assert all((p.grad is None) == release_grads for p in model.parameters())
    optimizer.step()
    assert all((p.grad is None) == release_grads for p in model.parameters())


def peak(model: nn.Module) -> int:
    """Return how many bytes a backward pass allocates at most."""
    loss = model(torch.ones(1, 256)).sum()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss.backward()
    total = most = 0
    results: Any = profiler.profiler
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return most


def test_the_backward_pass_takes_the_bytes_of_one_dense_gradient() -> None:
    size = 256 * 256 * 4
    made = [deep(release_grads=release_grads) for release_grads in (True, False)]
    released, kept = (peak(model) for model, _ in made)
    assert kept >= 8 * size
    assert released < 2 * size  # the gradient, the factors' gradients, and activations of one row


# ---- whose gradients they are


def test_before_the_switch_the_base_gets_dense_gradients() -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(4, warm_start=1), release_grads=True)
    mse(model, *batch(0)).backward()
    assert all(W.grad is not None for W in selected_weights(model).values())
    optimizer.step()
    optimizer.zero_grad()
    mse(model, *batch(1)).backward()
    assert all(W.grad is None for W in selected_weights(model).values())
    assert all(factor.grad is not None for W in selected_weights(model).values() for factor in optimizer.factors(W))


def test_zero_grad_forgets_what_was_released() -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(4), release_grads=True)
    mse(model, *batch(0)).backward()
    optimizer.zero_grad()
    assert all(factor.grad is None for W in selected_weights(model).values() for factor in optimizer.factors(W))


def copies(model: nn.Module, optimizer: ReLoRAOptimizer) -> Iterator[tuple[nn.Module, ReLoRAOptimizer]]:
    yield copy.deepcopy((model, optimizer))
    yield pickle.loads(pickle.dumps((model, optimizer)))


@pytest.mark.parametrize("updates", [0, 2])
def test_copies_release_their_own(updates: int) -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(4), release_grads=True)
    train(model, optimizer, lambda model: mse(model, *batch(0)), updates)
    for twin, copied in copies(model, optimizer):
        mse(twin, *batch(1)).backward()
        assert all(W.grad is None for W in selected_weights(twin).values())
        assert all(factor.grad is not None for W in selected_weights(twin).values() for factor in copied.factors(W))
        assert all(factor.grad is None for W in selected_weights(model).values() for factor in optimizer.factors(W))


def test_a_loaded_state_goes_on_bitwise() -> None:
    made, resumed = ((model, relora(model, schedule=SCHEDULE, release_grads=True)) for model in (mlp(), mlp(seed=1)))
    step = stepper("dense", made[1], made[0])
    for u in range(4):
        step(*batch(u))
    saved = snapshot(*made)
    resumed[0].load_state_dict(saved["model"])
    resumed[1].load_state_dict(saved["optimizer"])
    for model, optimizer in (made, resumed):
        step = stepper("dense", optimizer, model)
        for u in range(4, 10):
            step(*batch(u))
            assert all(W.grad is None for W in selected_weights(model).values())
    assert not differences(snapshot(*made), snapshot(*resumed))


def test_the_last_optimizer_that_asks_gets_the_gradients() -> None:
    """Of the optimizers that a notebook's cell leaves alive, the first would take them all, and nothing would train."""
    model = mlp()
    first = relora(model, schedule=JaggedSchedule(4), release_grads=True)
    second = relora(model, schedule=JaggedSchedule(4), release_grads=True)
    mse(model, *batch(0)).backward()
    for W in selected_weights(model).values():
        assert all(factor.grad is None for factor in first.factors(W))
        assert all(factor.grad is not None for factor in second.factors(W))
    del first, second
    gc.collect()
    model.zero_grad()
    mse(model, *batch(0)).backward()
    assert all(W.grad is not None for W in selected_weights(model).values())


def test_parameters_put_in_the_place_of_others_are_released_from_their_first_update_on() -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(4), release_grads=True)
    for group in optimizer.param_groups:
        for place, p in enumerate(group["params"]):
            name = next(name for name, q in model.named_parameters() if q is p)
            module = model.get_submodule(name.rpartition(".")[0])
            group["params"][place] = replaced = nn.Parameter(p.detach().clone())
            setattr(module, name.rpartition(".")[2], replaced)
    for u in range(2):
        before = {name: W.detach().clone() for name, W in selected_weights(model).items()}
        mse(model, *batch(u)).backward()
        assert all((W.grad is None) == (u > 0) for W in selected_weights(model).values())
        optimizer.step()
        assert not any(torch.equal(W, before[name]) for name, W in selected_weights(model).items())
        optimizer.zero_grad()


def test_added_groups_are_released() -> None:
    model = mlp()
    optimizer = relora(model, targets="first|extra", schedule=JaggedSchedule(4), release_grads=True)
    extra = nn.Linear(9, 9)
    optimizer.add_param_group({"params": [("extra.weight", extra.weight)]})
    assert optimizer.selected == ["first.weight", "extra.weight"]
    extra(torch.ones(1, 9)).sum().backward()
    assert extra.weight.grad is None


# ---- what is refused


def test_a_scaler_is_refused_because_it_cannot_unscale_factor_gradients() -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(4), release_grads=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(mse(model, *batch(0))).backward()
    with pytest.raises(RuntimeError, match=r"released, under a GradScaler.*release_grads=False"):
        scaler.step(optimizer)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_it_is_true_or_false(value: Any) -> None:
    with pytest.raises(TypeError, match=f"release_grads={value!r} must be True or False"):
        relora(mlp(), release_grads=value)


def refused_among_two(rank: int) -> None:
    with pytest.raises(ValueError, match=r"release_grads=True in one of 2 processes.*make_step.*process_group"):
        relora(mlp(), release_grads=True)
    model = mlp()
    for module in (*model.children(), model):
        fully_shard(module)
    with pytest.raises(ValueError, match=r"first\.weight is a DTensor: FSDP2 shards its gradient already"):
        relora(model, release_grads=True)


def test_several_processes_are_refused_and_so_are_sharded_weights() -> None:
    group = Ranks(2)
    try:
        group.run(refused_among_two)
    finally:
        group.stop()


def test_processes_that_join_later_are_refused_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(4), release_grads=True)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="in one of 2 processes"):
        mse(model, *batch(0)).backward()
    assert optimizer.num_updates == 0
