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
from models import (
    DTYPES,
    batch,
    differences,
    jagged_schedule,
    mlp,
    mse,
    randomise_b,
    relora,
    selected_weights,
    snapshot,
    stepper,
)
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from zoo import TORCH
from zoo_transformers import TRANSFORMERS, for_runs

from relora_opt import JaggedSchedule, ReLoRAOptimizer, muon_beside_adamw
from relora_opt.release import ProjectedGradient, numbers_of

DOUBLE = torch.float64
CASES = {**TORCH, **TRANSFORMERS}


def is_released(W: Tensor) -> bool:
    return isinstance(W.grad, ProjectedGradient)


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


@pytest.mark.parametrize("name", for_runs(CASES))
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
            lambda _: counts.append(sum(not is_released(p) and p.grad is not None for p in model.parameters()))
        )
    optimizer = ReLoRAOptimizer(model, rank=2, targets="weight", release_grads=release_grads, lr=1e-3)
    for _ in range(2):
        model(torch.ones(1, 256)).sum().backward()
    assert max(counts) == most
    assert all(is_released(p) == release_grads for p in model.parameters())
    optimizer.step()
    assert all(is_released(p) == release_grads for p in model.parameters())


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
    for u in range(2):
        mse(model, *batch(u)).backward()
        assert all(is_released(W) == (u == 1) for W in selected_weights(model).values())
        optimizer.step()
        optimizer.zero_grad()


DISCARDS: dict[str, Callable[[nn.Module, ReLoRAOptimizer], None]] = {
    "optimizer.zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer.zero_grad to zero": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model.zero_grad": lambda model, optimizer: model.zero_grad(),
    "model.zero_grad to zero": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "parameters": lambda model, optimizer: [setattr(p, "grad", None) for p in model.parameters()],  # type: ignore
}


@pytest.mark.parametrize("discard", DISCARDS)
def test_gradients_that_are_discarded_train_nothing(discard: str) -> None:
    """A bad batch that a loop skips, or a generator's gradients that reach the discriminator's weights."""
    runs = []
    for is_disturbed in (True, False):
        model = mlp()
        optimizer = relora(model, schedule=JaggedSchedule(4), release_grads=True)
        for u in range(6):
            if is_disturbed:
                (1e9 * mse(model, *batch(50 + u))).backward()
                DISCARDS[discard](model, optimizer)
            mse(model, *batch(u)).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(snapshot(model, optimizer))
    assert not differences(*runs)


SCALINGS: dict[str, Callable[[nn.Parameter], Any]] = {
    "mul_": lambda p: p.grad.mul_(0.25),
    "div_": lambda p: p.grad.div_(4),
    "by a tensor": lambda p: p.grad.mul_(torch.tensor(0.25)),
    "together": lambda p: torch._foreach_mul_([p.grad], 0.25),
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_gradients_train_as_dense_ones_do(scaling: str) -> None:
    runs = []
    for release_grads in (True, False):
        model = mlp(DOUBLE)
        optimizer = relora(model, "SGD", schedule=JaggedSchedule(4), release_grads=release_grads)
        for u in range(6):
            mse(model, *batch(u, DOUBLE)).backward()
            for p in model.parameters():
                SCALINGS[scaling](p)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model.state_dict())
    close(*runs)


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_scaler_trains_as_without_and_skips_what_is_not_finite(by_hand: bool) -> None:
    runs = []
    for release_grads in (True, False):
        model = mlp()
        optimizer = relora(model, "SGD", schedule=JaggedSchedule(4), release_grads=release_grads)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for u in range(8):
            factor = float("inf") if u == 3 else 1.0
            scaler.scale(factor * mse(model, *batch(u))).backward()
            if by_hand:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert optimizer.num_updates == 7
        runs.append(model.state_dict())
    close(*runs, tolerance=1e-5)


def adamw(model: nn.Module) -> None:
    torch.optim.AdamW(model.parameters(), lr=0.1).step()


WANTS: dict[str, Callable[[nn.Module], Any]] = {
    "clipping of values": lambda model: nn.utils.clip_grad_value_(model.parameters(), 1.0),
    "another optimizer": adamw,
    "norms of rows": lambda model: [p.grad.norm(dim=-1) for p in model.parameters()],  # type: ignore[union-attr]
    "a product": lambda model: [p.grad * p for p in model.parameters()],
    "noise": lambda model: [p.grad.add_(p.grad.clone()) for p in model.parameters()],  # type: ignore[union-attr]
    "a mask": lambda model: [p.grad.mul_(p.detach() > 0) for p in model.parameters()],  # type: ignore[union-attr]
}


@pytest.mark.parametrize("want", WANTS)
def test_what_wants_the_numbers_of_a_gradient_is_refused(want: str) -> None:
    """It would take them for zero, or pass the weight over, in silence."""
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(4), release_grads=True)
    mse(model, *batch(0)).backward()
    with pytest.raises(RuntimeError, match=r"has no numbers: it was projected onto its factors and freed"):
        WANTS[want](model)
    assert optimizer.num_updates == 0


@pytest.mark.parametrize("norm", [1.0, 2.0, float("inf")])
def test_clipping_by_norm_is_that_of_the_factors_gradients(norm: float) -> None:
    model = mlp(DOUBLE)
    optimizer = relora(model, schedule=JaggedSchedule(4), release_grads=True)
    randomise_b(optimizer, list(selected_weights(model).values()))
    functional = optimizer.functional(model)
    mse(functional, *batch(0, DOUBLE)).backward()
    expected = nn.utils.clip_grad_norm_(functional.parameters(), 0.01, norm_type=norm)
    gradients = [p.grad.clone() for W in selected_weights(model).values() for p in optimizer.factors(W)]  # type: ignore
    optimizer.zero_grad()
    mse(model, *batch(0, DOUBLE)).backward()
    found = nn.utils.clip_grad_norm_(model.parameters(), 0.01, norm_type=norm)
    torch.testing.assert_close(found, expected)
    clipped = [part for W in selected_weights(model).values() for part in numbers_of(W.grad)]
    for ours, theirs in zip(clipped, gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_clipping_by_norm_is_what_max_grad_norm_does() -> None:
    runs = []
    for max_grad_norm in (None, 0.05):
        model = mlp(DOUBLE)
        optimizer = relora(model, schedule=JaggedSchedule(4), release_grads=True, max_grad_norm=max_grad_norm)
        for u in range(6):
            mse(model, *batch(u, DOUBLE)).backward()
            if max_grad_norm is None:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model.state_dict())
    close(*runs)


def test_a_gradient_serves_one_step() -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(4), release_grads=True)
    mse(model, *batch(0)).backward()
    assert repr(model.first.weight.grad) == "ProjectedGradient((6, 7), kept as those of factors)"
    optimizer.step()
    assert repr(model.first.weight.grad) == "ProjectedGradient((6, 7), used)"
    with pytest.raises(RuntimeError, match=r"call zero_grad\(\) between step\(\) and the next backward\(\)"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"call zero_grad\(\) between step\(\) and the next backward\(\)"):
        mse(model, *batch(0)).backward()
    optimizer.zero_grad(set_to_none=False)
    mse(model, *batch(0)).backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_graph_of_the_gradient_is_accumulated_too() -> None:
    runs = []
    for create_graph in (True, False):
        model = mlp()
        optimizer = relora(model, schedule=JaggedSchedule(4), release_grads=True)
        for u in range(2):
            torch.autograd.backward(mse(model, *batch(u)), create_graph=create_graph)
        optimizer.step()
        runs.append({name: p.detach().clone() for name, p in model.named_parameters()})
        optimizer.zero_grad()
    close(*runs, tolerance=1e-5)


def test_gradients_are_looked_at_for_whether_they_are_finite() -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(4), release_grads=True)
    for factor, is_finite in ((1.0, True), (float("nan"), False)):
        (factor * mse(model, *batch(0))).backward()
        assert optimizer.has_finite_gradients() == is_finite
        optimizer.zero_grad()


def test_a_restart_by_hand_forgets_what_was_projected_onto_the_old_factors() -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(0), release_grads=True)
    mse(model, *batch(0)).backward()
    optimizer.restart()
    assert all(W.grad is None for W in selected_weights(model).values())


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
        assert all(is_released(W) for W in selected_weights(twin).values())
        assert not any(is_released(W) for W in selected_weights(model).values())
        copied.step()


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
    assert not differences(snapshot(*made), snapshot(*resumed))


@pytest.mark.parametrize("release_grads", [True, False])
def test_the_last_optimizer_gets_the_gradients(release_grads: bool) -> None:
    """Of the optimizers that a notebook's cells leave alive."""
    model = mlp()
    first = relora(model, schedule=JaggedSchedule(4), release_grads=True)
    mse(model, *batch(0)).backward()
    second = relora(model, schedule=JaggedSchedule(4), release_grads=release_grads)
    with pytest.raises(RuntimeError, match=r"onto the factors of another optimizer.*call zero_grad\(\)"):
        second.step()
    second.zero_grad()
    before = {name: W.detach().clone() for name, W in selected_weights(model).items()}
    mse(model, *batch(0)).backward()
    assert all(is_released(W) == release_grads for W in selected_weights(model).values())
    second.step()
    assert not any(torch.equal(W, before[name]) for name, W in selected_weights(model).items())
    del first, second
    gc.collect()
    model.zero_grad()
    mse(model, *batch(0)).backward()
    assert all(W.grad is not None and not is_released(W) for W in selected_weights(model).values())


def test_a_shallow_copy_takes_nothing_away() -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(4), release_grads=True)
    step = stepper("dense", optimizer, model)
    step(*batch(0))
    copied = copy.copy(optimizer)
    before = {name: W.detach().clone() for name, W in selected_weights(model).items()}
    step(*batch(1))
    assert not any(torch.equal(W, before[name]) for name, W in selected_weights(model).items())
    del copied


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
        assert all(is_released(W) == (u > 0) for W in selected_weights(model).values())
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
    assert is_released(extra.weight)


# ---- what is refused


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


def test_several_processes_are_refused_and_so_are_sharded_weights(ranks: Ranks) -> None:
    ranks.run(refused_among_two)


def test_processes_that_join_later_are_refused_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(4), release_grads=True)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="in one of 2 processes"):
        mse(model, *batch(0)).backward()
    assert optimizer.num_updates == 0
