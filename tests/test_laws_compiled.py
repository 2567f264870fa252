"""torch.compile changes nothing but speed: same gradients, same updates, at most one compilation a phase.

A compilation takes seconds, so the fast tests compile with the aot_eager backend, which traces the forward and
derives the backward as inductor does and then runs them uncompiled; the slow ones repeat the laws with inductor.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from materialised import sgd
from models import DTYPES, batch, jagged_schedule, mlp, mse, randomise_b, relora, selected_weights, stepper
from test_laws_ops import MATRIX, Op
from torch import nn
from torch._dynamo.utils import counters

from relora_opt import JaggedSchedule

# torch 2.13 trips over its own deprecations: Dynamo instantiates an autograd function that it traces, inductor imports
# torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

BACKENDS = ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}  # a rounding per operation of the model


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=request.param))
    return request.param


def test_what_torch_cannot_trace_is_refused_with_the_remedy() -> None:
    model = nn.LSTM(5, 6)
    step = relora(model, targets=["weight_ih_l0"]).make_step(model, lambda model, x: model(x)[0].square().mean())
    with pytest.raises(
        RuntimeError, match=r"make_step cannot compile this model and loss_fn \(.*say compile=False"
    ) as e:
        step(torch.ones(2, 3, 5))
    assert isinstance(e.value.__cause__, torch._dynamo.exc.TorchDynamoException)
    assert "\n" not in str(e.value)
    assert not isinstance(e.value, torch._dynamo.exc.TorchDynamoException)


class Named(nn.Module):
    """A module of a user's, not torch.compile's, whose child has the name of one of torch.compile's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 7, dtype=torch.float64), requires_grad=False)
        self._orig_mod = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._orig_mod(x) + nn.functional.linear(x, self.weight)


@pytest.mark.parametrize("part", ["", pytest.param("first", marks=pytest.mark.slow), "second", "a user's"])
@pytest.mark.usefixtures("backend")
def test_a_model_that_was_compiled_already_is_compiled_as_a_whole(part: str) -> None:
    runs = []
    for compile in (True, False):
        model: Any = mlp(torch.float64)
        if part == "a user's":
            model.first = Named(model.first)
        elif part and compile:
            setattr(model, part, torch.compile(getattr(model, part)))
        seen = torch.compile(model) if compile and not part else model
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        optimizer = relora(trained, schedule=jagged_schedule(), targets=["first.weight", "second.weight"])
        step = optimizer.make_step(seen, mse, compile=compile, accumulate=2)
        losses = []
        for index in range(48):
            losses.append(step(*batch(index, torch.float64)))
            if optimizer.is_low_rank and index % 2 == 0:  # in the middle of an update
                for W in [p for name, p in trained if name.endswith("weight") and name.startswith(("first", "second"))]:
                    assert W.grad is None
                    assert optimizer.factors(W)[0].grad is not None
        assert optimizer.num_restarts == 1
        runs.append((losses, list(model.parameters())))
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", [pytest.param("default", marks=pytest.mark.slow), "max-autotune"])
def test_options_are_torch_compiles_own(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    compile = torch.compile

    def traced(function: Any, **options: Any) -> Any:
        given.append(options)
        return compile(function, fullgraph=True, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    runs = []
    for chosen in ({"mode": mode, "dynamic": False}, False):
        model = mlp(torch.float64)
        optimizer = relora(model, schedule=jagged_schedule())
        step = optimizer.make_step(model, mse, compile=chosen)
        losses = [step(*batch(index, torch.float64)) for index in range(24)]
        runs.append((losses, list(model.parameters())))
    (options,) = given
    assert options == {"fullgraph": True, "dynamic": False, "mode": mode}
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("backend")
def test_compiled_factor_gradients_equal_eager_ones_at_random_b(dtype: torch.dtype) -> None:
    gradients = []
    for compiled in (False, True):
        model = mlp(dtype)
        optimizer = relora(model)
        weights = list(selected_weights(model).values())
        randomise_b(optimizer, weights)
        f = optimizer.functional(model)
        call = torch.compile(f, fullgraph=True) if compiled else f
        mse(call, *batch(0, dtype)).backward()
        gradients.append([factor.grad for weight in weights for factor in optimizer.factors(weight)])
        assert all(weight.grad is None for weight in weights)
    for eager, compiled_ in zip(*gradients, strict=True):
        assert eager.any()
        scale = float(eager.abs().max())
        assert float((eager - compiled_).abs().max()) <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize(
    ("base", "dtype"),
    [
        ("SGD", torch.float32),
        ("SGD", torch.bfloat16),
        ("AdamW", torch.float64),
        pytest.param("SGD", torch.float64, marks=pytest.mark.slow),
        pytest.param("AdamW", torch.float32, marks=pytest.mark.slow),
        pytest.param("AdamW", torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.usefixtures("backend")
def test_the_compiled_step_equals_the_eager_one_through_the_switch_and_restarts(dtype: torch.dtype, base: str) -> None:
    """One update after each event in bfloat16, where roundings differ; all 24 updates otherwise."""
    eager, compiled = mlp(dtype), mlp(dtype)
    changes: dict[str, Any] = {"schedule": jagged_schedule(6, 2, 5)}
    if base == "AdamW":
        changes["eps"] = 0.01  # or Adam's first updates would be the bare sign of the gradient
    steps = [stepper("step", relora(eager, base, **changes), eager)]
    steps.append(stepper("compiled", relora(compiled, base, **changes), compiled))
    for u in range(24 if dtype != torch.bfloat16 else 6):
        losses = [step(*batch(u, dtype)) for step in steps]
        assert float(losses[0]) == pytest.approx(float(losses[1]), abs=TOLERANCE[dtype])
        for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
            assert float((ours - theirs).detach().abs().max()) <= TOLERANCE[dtype], u


@pytest.mark.usefixtures("backend")
def test_a_process_compiles_one_scale_after_another() -> None:
    """A number that is another the second time, torch.compile takes for a variable of the graph."""
    for alpha in (3.0, 5.0, 1 / 3):
        eager, compiled = mlp(), mlp()
        steps = [stepper("step", relora(eager, alpha=alpha), eager)]
        steps.append(stepper("compiled", relora(compiled, alpha=alpha), compiled))
        for u in range(3):
            for step in steps:
                step(*batch(u))
        for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("backend")
def test_wrapping_and_a_restart_leave_the_compiled_output_as_it_was() -> None:
    model = mlp()
    x, y = batch(0)
    optimizer = relora(model)
    step = stepper("compiled", optimizer, model)
    with torch.no_grad():
        before = mse(model, x, y)
    assert float(step(x, y)) == pytest.approx(float(before), rel=1e-6)  # the loss before the update
    with torch.no_grad():
        before = mse(model, x, y)
    optimizer.restart()
    assert float(step(x, y)) == pytest.approx(float(before), rel=1e-6)
    for weight in selected_weights(model).values():
        assert optimizer.factors(weight)[1].any()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("accumulate", "init"), [(1, "kaiming"), (2, "kaiming"), (1, "gradient")])
def test_warm_start_and_low_rank_compile_once_each_over_rates_restarts_and_accumulation(
    accumulate: int, init: str
) -> None:
    model = mlp()
    schedule = jagged_schedule(restart_every=4, restart_warmup=2, warm_start=4)
    optimizer = relora(model, schedule=schedule, max_grad_norm=1.0, init=init)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    step = optimizer.make_step(model, mse, compile=True, accumulate=accumulate)
    graphs = []
    for u in range(18):
        for _ in range(accumulate):
            step(*batch(u))
        scheduler.step()
        with torch.no_grad():
            mse(model, *batch(u))
        graphs.append(counters["stats"]["unique_graphs"])
    assert optimizer.num_restarts == 3
    assert graphs == [1] * 4 + [2] * 14


@pytest.mark.usefixtures("backend")
def test_low_rank_after_a_later_warm_start_is_compiled_already() -> None:
    model = mlp()
    optimizer = relora(model, schedule=jagged_schedule(restart_every=3, restart_warmup=2, warm_start=3, at=4))
    step = optimizer.make_step(model, mse, compile=True)
    graphs = []
    for u in range(12):
        step(*batch(u))
        graphs.append(counters["stats"]["unique_graphs"])
    assert optimizer.num_restarts == 3  # after 3, the switch after 7, and after 10
    assert graphs == [1] * 4 + [2] * 8


@pytest.mark.usefixtures("backend")
def test_every_turn_of_a_warm_start_is_compiled_once() -> None:
    model = mlp()
    schedule = jagged_schedule(restart_every=3, restart_warmup=2, warm_start=3, at=4, turns=2)
    optimizer = relora(model, schedule=schedule)
    step = optimizer.make_step(model, mse, compile=True)
    graphs = []
    for u in range(15):
        step(*batch(u))
        graphs.append(counters["stats"]["unique_graphs"])
    assert optimizer.num_restarts == 4  # after 3, switches after 7 and 10, and after 13
    assert graphs == [1] * 4 + [2] * 3 + [3] * 8


@pytest.mark.usefixtures("backend")
def test_the_compiled_step_never_forms_a_dense_gradient() -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(3))
    weights = list(selected_weights(model).values())
    formed: list[Any] = []
    optimizer.register_step_pre_hook(lambda *_: formed.extend(weight.grad for weight in weights))
    step = stepper("compiled", optimizer, model)
    for u in range(5):
        step(*batch(u))
    assert formed == [None] * 10
    assert all(weight.grad is None for weight in weights)


@pytest.mark.usefixtures("backend")
def test_a_compiled_model_trains_on_the_dense_path() -> None:
    models = [mlp(torch.float64), mlp(torch.float64)]
    runs: list[nn.Module] = [models[0], torch.compile(models[1])]
    for model, called in zip(models, runs, strict=True):
        optimizer = relora(called, schedule=jagged_schedule(6, 2, 5), targets=None)
        for u in range(14):
            mse(called, *batch(u, torch.float64)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.num_restarts == 1
        assert optimizer.factors(model.first.weight)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("backend")
def test_the_compiled_step_with_activation_checkpointing_equals_the_eager_one_without() -> None:
    plain, checkpointed = mlp(torch.float64), mlp(torch.float64, use_reentrant=False)
    optimizers = [relora(model, "SGD", schedule=JaggedSchedule(3)) for model in (plain, checkpointed)]
    steps = [stepper("step", optimizers[0], plain), stepper("compiled", optimizers[1], checkpointed)]
    for u in range(5):
        for step in steps:
            step(*batch(u, torch.float64))
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "function" in name else pytest.mark.slow) for name in MATRIX]
)
def test_a_compiled_expression_of_a_matrix_has_the_eager_factor_gradients(name: str) -> None:
    """Some are fast tests: those whose function torch.compile does not send to `__torch_function__`."""
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Op((4, 5), MATRIX[name]).double()
        optimizer = sgd(model, ["w"], rank=1)
        f = optimizer.functional(model)
        (torch.compile(f, fullgraph=True) if compiled else f)(x).square().sum().backward()
        gradients.append([factor.grad for factor in optimizer.factors(model.w)])
    for ours, theirs in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_more_models_than_torch_compiles_in_a_process_are_refused_with_the_remedy() -> None:
    def step(width: int) -> Any:
        model = nn.Linear(4, width)
        optimizer = relora(model, targets=["weight"])
        return optimizer.make_step(model, lambda f, x: f(x).square().mean(), compile={"backend": "aot_eager"})

    with torch._dynamo.config.patch(recompile_limit=2):
        for width in (5, 6):
            step(width)(torch.ones(3, 4))
        with pytest.raises(
            RuntimeError, match=r"torch stops after 2 of them in a process: call torch\.compiler\.reset"
        ):
            step(7)(torch.ones(3, 4))
        torch.compiler.reset()
        step(7)(torch.ones(3, 4))
