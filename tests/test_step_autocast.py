"""`make_step(autocast=...)` trains as an autocast inside the loss function does, and casts W once an update."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import COMPILES, SELECTED, batch, jagged_schedule, mlp, mse, relora
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

from relora_opt.step import Step

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # which torch.compile uses

HALF = torch.bfloat16
WEIGHTS = [f"{name}.weight" for name in SELECTED]


def _in_autocast(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=HALF):
        return mse(model, x, y)


def _train(step: Callable[..., Tensor], num_updates: int, accumulate: int) -> list[Tensor]:
    return [step(*batch(index)) for index in range(num_updates * accumulate)]


def _stepped(**options: Any) -> tuple[nn.Module, Step]:
    """Return a model and its step: a switch after 3 updates, and restarts after 7 and 11."""
    model = mlp()
    optimizer = relora(model, schedule=jagged_schedule(4, 2, 3))
    return model, optimizer.make_step(model, options.pop("loss_fn", mse), **options)


class _Casts(TorchDispatchMode):
    """Count by shape what is cast from float32 to 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and (args[0].dtype, result.dtype) == (torch.float32, HALF):
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("compile", COMPILES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_trains_bitwise_as_an_autocast_inside_the_loss_function_does(
    compile: bool | dict[str, Any], accumulate: int
) -> None:
    options = {"compile": compile, "accumulate": accumulate}
    theirs, reference = _stepped(loss_fn=_in_autocast, **options)
    ours, step = _stepped(autocast=HALF, **options)
    losses = _train(step, 9, accumulate)  # over a switch and restarts
    for loss, other in zip(losses, _train(reference, 9, accumulate), strict=True):
        assert torch.equal(loss, other)
    assert losses[0] != mse(mlp(), *batch(0))  # which no autocast would have given
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_weight_is_cast_once_an_update(accumulate: int) -> None:
    model, step = _stepped(compile=False, autocast=HALF, accumulate=accumulate)
    _train(step, 4, accumulate)
    assert step.optimizer.is_low_rank
    wanted = [tuple(model.get_parameter(name).shape) for name in WEIGHTS]
    for index in range(2):
        with _Casts() as casts:
            _train(step, 1, accumulate)
        for shape in set(wanted):
            assert casts.shapes.count(shape) == wanted.count(shape), (index, shape)


def test_what_is_compiled_casts_no_weight() -> None:
    casts: list[tuple[int, ...]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        for node in graph.graph.nodes:
            if node.op == "call_function" and node.target is torch.ops.aten._to_copy.default:
                source, made = node.args[0].meta["val"], node.meta["val"]
                if (source.dtype, made.dtype) == (torch.float32, HALF):
                    casts.append(tuple(made.shape))
        return make_boxed_func(graph.forward)

    compiler = aot_autograd(fw_compiler=backend)
    model, step = _stepped(compile={"backend": compiler}, autocast=HALF, accumulate=2)
    _train(step, 4, 2)
    num_compiled = len(casts)
    assert num_compiled > 0  # inputs, factors
    wide = {tuple(model.get_parameter(name).shape) for name in WEIGHTS}
    of_low_rank = casts[num_compiled // 2 :]
    assert of_low_rank
    assert not wide & set(of_low_rank)
    _train(step, 5, 2)
    assert len(casts) == num_compiled  # neither restarts nor new casts compile anything


@pytest.mark.parametrize("compile", COMPILES)
def test_what_is_written_into_a_weight_between_micro_batches_is_seen(compile: bool | dict[str, Any]) -> None:
    losses = []
    for options in ({"loss_fn": _in_autocast}, {"autocast": HALF}):
        model, step = _stepped(compile=compile, accumulate=2, **options)
        _train(step, 5, 2)
        found = [step(*batch(20))]
        with torch.no_grad():
            model.get_parameter(WEIGHTS[0]).mul_(1.5)
        found.append(step(*batch(21)))
        W = model.get_parameter(WEIGHTS[1])
        W.data = torch.ones_like(W)
        found += _train(step, 2, 2)
        losses.append(found)
    assert losses[0] == losses[1]


def test_no_cast_outlasts_its_update() -> None:
    model, step = _stepped(compile=False, autocast=HALF, accumulate=2)
    _train(step, 5, 2)
    assert not step._functional._casts
    step(*batch(0))
    assert set(step._functional._casts) == set(step._functional.A)
    with pytest.raises(RuntimeError):
        step(torch.ones(1, 7), torch.ones(1, 3))
    assert not step._functional._casts
    assert not step._functional._cast_of
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_float64_weights_are_left_alone() -> None:
    model = mlp(torch.float64)
    step = relora(model).make_step(model, mse, compile=False, accumulate=2, autocast=HALF)
    before = [p.detach().clone() for p in model.parameters()]
    for index in range(12):
        step(*batch(index, torch.float64))
    assert not any(cast.dtype == HALF for cast in step._functional._casts.values())
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_forward_pass_that_is_made_again_sees_the_cast(use_reentrant: bool) -> None:
    found = []
    for model in (mlp(), mlp(use_reentrant=use_reentrant)):
        step = relora(model).make_step(model, mse, compile=False, accumulate=2, autocast=HALF)
        found.append(_train(step, 6, 2))
    assert found[0] == found[1]


def test_a_transpose_takes_the_cast_along() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.W = nn.Parameter(torch.randn(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.W.t()

    found = []
    for options in ({"loss_fn": _in_autocast}, {"autocast": HALF}):
        model = Transposed()
        optimizer = relora(model, targets=["W"])
        loss_fn = options.pop("loss_fn", mse)
        step = optimizer.make_step(model, loss_fn, compile=False, accumulate=2, **options)
        found.append(_train(step, 8, 2))
    assert found[0] == found[1]


@pytest.mark.parametrize("autocast", [torch.float16, torch.float32, "bfloat16", True])
def test_other_dtypes_are_refused(autocast: Any) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=f"autocast={autocast!r} must be torch.bfloat16 or None"):
        relora(model).make_step(model, mse, autocast=autocast)
