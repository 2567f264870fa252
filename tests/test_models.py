"""Any model trains as it stands: on every path its loss and factor gradients are those of the materialised model.

The models are those of zoo.py and zoo_transformers.py, the oracle is tests/materialised.py, all in float64. The oracle
and every path get models of their own with the same numbers, because buffers change in every forward pass.
transformers computes some norms, softmaxes and losses in float32 all the same; both sides round alike there.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from materialised import TOLERANCE, Gradients, factor_gradients, oracle, sgd
from models import PATHS, stepper
from torch import Tensor, nn
from zoo import TORCH, Case
from zoo_transformers import TRANSFORMERS, for_runs

from relora_opt import JaggedSchedule, ReLoRAOptimizer

CASES = {**TORCH, **TRANSFORMERS}
RANK = 2


def assert_close(actual: Gradients, expected: Gradients, tolerance: float = TOLERANCE) -> None:
    """Compare factor gradients relative to the norm of each, or of each expert's, none of which is zero."""
    assert actual.keys() == expected.keys()
    for name, pair in expected.items():
        for factor, ours, theirs in zip("AB", actual[name], pair, strict=True):
            assert ours is not None, f"{name}: no gradient of {factor}"
            size = torch.linalg.matrix_norm(theirs)
            assert (size > 0).all(), f"{name}: d{factor} is zero and shows nothing"
            error = torch.linalg.matrix_norm(ours - theirs) / size
            assert (error <= tolerance).all(), f"{name}: d{factor} is off by {error}"


def recorded(loss_fn: Callable[[Any], Tensor], losses: list[float]) -> Callable[[Any], Tensor]:
    """Return a loss function that notes down what it gives."""

    def recording(call: Any) -> Tensor:
        loss = loss_fn(call)
        losses.append(float(loss.detach()))
        return loss

    return recording


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_factor_gradients_are_the_oracles(name: str, path: str) -> None:
    case = CASES[name]
    model, twin = case.model(), case.model()
    losses: list[float] = []
    loss_fn = recorded(case.loss_fn(), losses)
    expected = oracle(twin, sgd(twin, case.targets), loss_fn)
    random_state = torch.get_rng_state()
    optimizer = sgd(model, case.targets)
    actual = factor_gradients(path, model, optimizer, loss_fn)
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE)
    assert_close(actual, expected)
    assert torch.equal(torch.get_rng_state(), random_state)
    for (buffer, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, msg=buffer)


@pytest.mark.parametrize("name", CASES)
def test_exactly_the_named_weights_are_low_rank(name: str) -> None:
    case = CASES[name]
    model = case.model()
    optimizer = ReLoRAOptimizer(model, rank=RANK, targets=case.targets, lr=0.01)
    assert sorted(optimizer.selected) == sorted(case.names(model))


@pytest.mark.parametrize("name", for_runs(CASES))
def test_two_lines_train_it_through_two_restarts_with_updates_of_the_rank(name: str) -> None:
    case = CASES[name]
    model, loss_fn = case.model(), case.loss_fn()
    low_rank = case.names(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = ReLoRAOptimizer(
        model, torch.optim.AdamW, rank=RANK, targets=case.targets, schedule=JaggedSchedule(4), lr=0.01
    )
    losses = []
    for cycle in range(3):
        assert optimizer.num_restarts == cycle
        start = {n: model.get_parameter(n).detach().clone() for n in low_rank}
        for _ in range(4):
            optimizer.zero_grad()
            loss = loss_fn(model)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        for n in low_rank:
            assert_rank(optimizer, model.get_parameter(n), start[n], n)
    assert losses[-1] < losses[0]
    for n, p in model.named_parameters():
        has_gradient = p.grad is not None and bool(p.grad.any())
        assert torch.equal(p, before[n]) != (has_gradient or n in low_rank), n


def assert_rank(optimizer: ReLoRAOptimizer, W: Tensor, start: Tensor, name: str) -> None:
    """Check that every matrix in W has moved since `start`, by a change of rank 2 at most."""
    A, B = optimizer.factors(W)
    change = (W.detach() - start).view(*B.shape[:-1], A.shape[-1])
    sizes = torch.linalg.svdvals(change)
    assert (sizes[..., 0] > 0).all(), name
    # Four updates round a weight of size one to float64.
    assert (sizes[..., RANK] <= 1e-10 * sizes[..., 0]).all(), f"{name}: singular values {sizes}"


@pytest.mark.parametrize("name", for_runs(CASES))
def test_the_functional_paths_train_it_as_the_dense_one_does(name: str) -> None:
    (losses, dense), *others = (trained(CASES[name], path) for path in PATHS)
    for other_losses, other in others:
        # Ten updates of AdamW, in which a rounding of 1e-16 of a gradient of 1e-8 may count 1e-8 of the rate.
        assert other_losses == pytest.approx(losses, rel=1e-8)
        for (n, ours), theirs in zip(other.named_parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8, msg=n)


def trained(case: Case, path: str) -> tuple[list[float], nn.Module]:
    """Return the losses of ten updates with a switch and two restarts, and the model."""
    model = case.model()
    optimizer = two_lines(model, case)
    step = stepper(path, optimizer, model, case.loss_fn())
    losses = [float(step()) for _ in range(10)]
    assert optimizer.num_restarts == 2
    return losses, model


def two_lines(model: nn.Module, case: Case) -> ReLoRAOptimizer:
    """Return an optimizer with a switch after 2 updates and restarts after 5 and 8."""
    schedule = JaggedSchedule(3, restart_warmup=2, warm_start=2)
    return ReLoRAOptimizer(
        model, torch.optim.AdamW, rank=RANK, targets=case.targets, schedule=schedule, lr=0.01, eps=1e-6
    )
