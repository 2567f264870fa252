"""What people do to a model leaves its factor gradients right: checkpointing, penalties, 16-bit weights, compiling.

The models and the oracle are those of test_models.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from materialised import factor_gradients, low_rank_parameters, oracle, sgd
from models import PATHS, stepper
from test_models import CASES, assert_close, two_lines
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from zoo import TORCH, Case
from zoo_transformers import GROUPED, TRANSFORMERS, embedded, for_runs, mixtral


def checkpointed(model: nn.Module, *, use_reentrant: bool) -> nn.Module:
    """Let a model, or every block of one of transformers, run its forward pass again in the backward pass."""
    if isinstance(model, PreTrainedModel):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        return model
    forward, anchor = model.forward, torch.zeros((), requires_grad=True)  # reentrant ones ask an input with a gradient
    model.forward = lambda x: checkpoint(lambda x, _: forward(x), x, anchor, use_reentrant=use_reentrant)  # type: ignore
    return model


# A spectral norm iterates in every forward pass, so the second one is another function, in plain torch too.
CHECKPOINTED = [name for name in CASES if name != "parametrized"]


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)  # by transformers 5.23
@pytest.mark.parametrize(
    ("path", "use_reentrant"),
    [
        ("dense", True),
        ("functional", False),
        ("step", True),
        *(
            pytest.param(*way, marks=pytest.mark.slow)
            for way in (("dense", False), ("functional", True), ("step", False))
        ),
    ],
)
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_has_the_factor_gradients_of_the_oracle_without(
    name: str, path: str, use_reentrant: bool
) -> None:
    case = CASES[name]
    model, twin = checkpointed(case.model(), use_reentrant=use_reentrant), case.model()
    expected = oracle(twin, sgd(twin, case.targets), case.loss_fn())
    assert_close(factor_gradients(path, model, sgd(model, case.targets), case.loss_fn()), expected)


def penalised(case: Case) -> Callable[[Any], Tensor]:
    """Return the loss plus the squared norm of its gradient by the inputs."""

    def loss_fn(call: Any) -> Tensor:
        torch.manual_seed(1)
        inputs = {name: value.clone() for name, value in case.inputs(torch.float64).items()}
        numbers = [value.requires_grad_() for value in inputs.values() if value.is_floating_point()]
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            loss = case.loss(call, **inputs)
            slopes = torch.autograd.grad(loss, numbers, create_graph=True)
        return loss + sum(slope.square().sum() for slope in slopes)

    return loss_fn


PENALISED = {
    **{name: case for name, case in TORCH.items() if name != "words"},  # whose input has no gradient
    **{
        name: case if name in ("ViT", "Whisper") else replace(case, inputs=embedded)
        for name, case in TRANSFORMERS.items()
        if case.is_default
    },
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", PENALISED)
def test_a_gradient_penalty_has_the_oracles_factor_gradients(name: str, path: str) -> None:
    case = PENALISED[name]
    model, twin = case.model(), case.model()
    expected = oracle(twin, sgd(twin, case.targets), penalised(case))
    assert_close(factor_gradients(path, model, sgd(model, case.targets), penalised(case)), expected)


HALF = {
    "Mixtral, grouped": GROUPED,
    **{name: case for name, case in CASES.items() if not case.full_precision_only},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", HALF)
def test_in_bfloat16_the_factor_gradients_are_the_oracles_to_rounding(name: str, path: str) -> None:
    case = HALF[name]
    model = case.model(torch.bfloat16)
    twin = (replace(case, build=mixtral) if case is GROUPED else case).model(torch.bfloat16).double()
    optimizer, exact = sgd(model, case.targets), sgd(twin, case.targets)
    for n, p in low_rank_parameters(model, optimizer).items():
        for ours, theirs in zip(optimizer.factors(p), exact.factors(twin.get_parameter(n)), strict=True):
            assert ours.dtype == torch.float32
            theirs.data.copy_(ours)
    expected = oracle(twin, exact, case.loss_fn())
    actual = factor_gradients(path, model, optimizer, case.loss_fn(torch.bfloat16))
    # Chains of some dozen operations that round by 2^-8 each; T5's scores, which it does not scale, are the worst.
    assert_close(actual, expected, tolerance=0.25)


@pytest.mark.parametrize("name", for_runs(HALF))
def test_in_bfloat16_two_lines_train_it_through_two_restarts(name: str) -> None:
    case = HALF[name]
    model, loss_fn = case.model(torch.bfloat16), case.loss_fn(torch.bfloat16)
    optimizer = two_lines(model, case)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    step = stepper("dense", optimizer, model, loss_fn)
    losses = [float(step()) for _ in range(10)]
    assert optimizer.num_restarts == 2
    assert losses[-1] < losses[0]
    for n, W in low_rank_parameters(model, optimizer).items():
        assert not torch.equal(W, start[n]), n
        assert torch.equal(W, optimizer.state[W]["master"].to(torch.bfloat16)), n


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# One model of every kind of fallback; the others differ by more products.
WITH_INDUCTOR = ("spellings", "convolutions", "experts", "parametrized", "GPT-2", "Mixtral, batched")
COMPILED = [(name, "aot_eager") for name, case in CASES.items() if not case.eager_only]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13's compiler uses what torch 2.13 deprecates
@pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"
)  # transformers' Mamba
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("name", "backend"), [*COMPILED, *((name, "inductor") for name in WITH_INDUCTOR)])
def test_the_compiled_step_trains_it_as_the_eager_one_does(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By aot_eager, which traces and derives as inductor does and draws the same dropout; by inductor without it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    case = CASES[name]
    runs = []
    for compile in (False, True):
        model = case.model()
        if backend == "inductor":
            without_dropout(model)
        optimizer = two_lines(model, case)
        step = optimizer.make_step(model, case.loss, compile=compile)
        runs.append([])
        for _ in range(10):
            torch.manual_seed(1)
            runs[-1].append(float(step(**case.inputs(torch.float64))))
        assert optimizer.num_restarts == 2
    # Kernels sum in another order, and transformers computes norms and losses in float32, whatever the weights are.
    assert runs[1] == pytest.approx(runs[0], rel=1e-6)


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
