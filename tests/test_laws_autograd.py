"""The factor gradients survive what people do to a backward: penalties, checkpointing, several forwards, autocast."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from materialised import TOLERANCE, assert_equal_gradients, factor_gradients, oracle, sgd
from models import DTYPES, MLP, PATHS, Kernel, batch, mlp, mse, randomise_b, relora, selected_weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from relora_opt import ReLoRAOptimizer

TARGETS = ["first.weight", "second.weight"]
DOUBLE = torch.float64


def model_and_sgd(use_reentrant: bool | None = None) -> tuple[MLP, ReLoRAOptimizer]:
    model = mlp(DOUBLE, use_reentrant=use_reentrant)
    return model, sgd(model, TARGETS)


def expected_gradients(loss_fn: Any) -> dict[str, list[Tensor]]:
    """Return the oracle's gradients, of the model without checkpointing."""
    return oracle(*model_and_sgd(), loss_fn)


def penalised(model: Any) -> Tensor:
    x, y = batch(0, DOUBLE)
    x.requires_grad_()
    output = model(x)
    (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    return F.mse_loss(output, y) + slope.square().sum()


@pytest.mark.parametrize("path", PATHS)
def test_a_gradient_penalty_has_the_oracles_factor_gradients(path: str) -> None:
    assert_equal_gradients(factor_gradients(path, *model_and_sgd(), penalised), expected_gradients(penalised))


def test_a_penalty_on_the_models_own_parameters_adds_to_the_functional_gradients() -> None:
    (model, optimizer), (twin, dense) = model_and_sgd(), model_and_sgd()
    data = batch(0, DOUBLE)
    (mse(optimizer.functional(model), *data) + sum(p.square().sum() for p in model.parameters())).backward()
    (mse(twin, *data) + sum(p.square().sum() for p in twin.parameters())).backward()
    optimizer.step()
    dense.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_activation_checkpointing_has_every_factor_gradient(path: str, use_reentrant: bool) -> None:
    def loss_fn(call: Any) -> Tensor:
        return mse(call, *batch(0, DOUBLE))

    model, optimizer = model_and_sgd(use_reentrant)
    assert_equal_gradients(factor_gradients(path, model, optimizer, loss_fn), expected_gradients(loss_fn))
    if path == "functional":
        assert {name for name, p in model.named_parameters() if p.grad is None} == set(TARGETS)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_two_forwards_and_one_backward_are_exact_and_leave_the_model_its_own_parameters(
    use_reentrant: bool | None,
) -> None:
    def loss_fn(call: Any) -> Tensor:
        return mse(call, *batch(0, DOUBLE)) + 2 * mse(call, *batch(1, DOUBLE))

    model, optimizer = model_and_sgd(use_reentrant)
    parameters = list(model.parameters())
    actual = factor_gradients("functional", model, optimizer, loss_fn)
    assert all(p is own for p, own in zip(model.parameters(), parameters, strict=True))
    assert_equal_gradients(actual, expected_gradients(loss_fn))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # checkpoint, under no_grad
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_evaluating_between_forward_and_backward_changes_nothing(use_reentrant: bool | None) -> None:
    model, optimizer = model_and_sgd(use_reentrant)
    f = optimizer.functional(model)
    x, y = batch(0, DOUBLE)
    loss = mse(f, x, y)
    with torch.no_grad():
        assert torch.equal(f(x), model(x))
    loss.backward()
    actual = {name: [t.grad for t in optimizer.factors(model.get_parameter(name))] for name in TARGETS}
    assert_equal_gradients(actual, expected_gradients(lambda call: mse(call, x, y)))


def test_a_backward_that_fails_leaves_the_model_its_own_parameters() -> None:
    model, optimizer = model_and_sgd()
    f = optimizer.functional(model)
    parameters = list(model.parameters())
    x, y = batch(0, DOUBLE)

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("a hook that fails")

    loss = mse(f, x, y)
    handle = model.head.bias.register_hook(fail)
    with pytest.raises(RuntimeError, match="a hook that fails"):
        loss.backward()
    handle.remove()
    mse(f, x, y).backward()
    assert all(p is own for p, own in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize(
    ("dtype", "half"), [*((dtype, torch.bfloat16) for dtype in DTYPES), (torch.float32, torch.float16)], ids=str
)
def test_under_autocast_the_functional_output_is_bitwise_the_plain_modules(
    dtype: torch.dtype, half: torch.dtype
) -> None:
    model, (x, _) = mlp(dtype), batch(0, dtype)
    optimizer = relora(model)
    randomise_b(optimizer, list(selected_weights(model).values()))
    with torch.autocast("cpu", half):
        expected, actual = model(x), optimizer.functional(model)(x)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


def test_under_autocast_the_factor_gradients_equal_the_oracles_to_bfloat16_rounding() -> None:
    model = mlp()
    optimizer = sgd(model, TARGETS)
    x, y = batch(0)

    def loss_fn(call: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = call(x)
        return F.mse_loss(output.float(), y)

    expected = oracle(model, optimizer, lambda call: F.mse_loss(call(x), y))
    actual = factor_gradients("functional", model, optimizer, loss_fn)
    for name, pair in expected.items():
        for ours, theirs in zip(actual[name], pair, strict=True):
            assert ours.dtype == torch.float32
            # A chain of a dozen bfloat16 operations, 2^-8 each.
            assert float((ours - theirs).abs().max()) < 0.06 * float(theirs.abs().max())


def test_the_gradient_of_the_input_and_of_what_lies_below_passes_through() -> None:
    model, optimizer = model_and_sgd()
    x, y = batch(0, DOUBLE)
    x.requires_grad_()
    twin = x.detach().clone().requires_grad_()
    mse(optimizer.functional(model), x, y).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    mse(model, twin, y).backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=TOLERANCE, atol=TOLERANCE)
    for name, p in model.named_parameters():
        if name not in TARGETS:
            torch.testing.assert_close(gradients[name], p.grad, rtol=TOLERANCE, atol=TOLERANCE)


class Answer:
    """An output of a type of one's own."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Answering(nn.Module):
    """A model that wraps its output."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.inner = mlp(DOUBLE, use_reentrant=use_reentrant)

    def forward(self, x: Tensor) -> Answer:
        return Answer(self.inner(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_under_an_output_of_ones_own_type_is_exact(use_reentrant: bool) -> None:
    def loss_fn(call: Any) -> Tensor:
        x, y = batch(0, DOUBLE)
        return F.mse_loss(call(x).logits, y)

    model, plain = Answering(use_reentrant), Answering(None)
    actual = factor_gradients("functional", model, sgd(model, TARGETS), loss_fn)
    assert_equal_gradients(actual, oracle(plain, sgd(plain, TARGETS), loss_fn))


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("path", PATHS)
def test_an_autograd_function_of_a_weight_has_the_oracles_gradients_under_checkpointing(
    path: str, use_reentrant: bool | None
) -> None:
    def loss_fn(call: Any) -> Tensor:
        return mse(call, *batch(0, DOUBLE))

    model, optimizer = model_and_sgd(use_reentrant)
    model.second.forward = lambda x: Kernel.apply(x, model.second.weight)  # type: ignore[method-assign]
    assert_equal_gradients(factor_gradients(path, model, optimizer, loss_fn), expected_gradients(loss_fn))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_weight_that_is_an_argument_of_a_checkpoint_has_the_oracles_gradients(path: str, use_reentrant: bool) -> None:
    def loss_fn(call: Any) -> Tensor:
        return mse(call, *batch(0, DOUBLE))

    model, optimizer = model_and_sgd()
    second = model.second
    second.forward = lambda x: checkpoint(F.linear, x, second.weight, use_reentrant=use_reentrant)  # type: ignore
    assert_equal_gradients(factor_gradients(path, model, optimizer, loss_fn), expected_gradients(loss_fn))
