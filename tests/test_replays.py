"""CUDA graphs on a CPU: a compiler whose every output lies where its next call writes, as a replayed graph's does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import relora_opt_cli.run
import torch
from functorch.compile import make_boxed_func
from models import MLP, batch, jagged_schedule, mlp, mse, relora
from tiny import rows
from tiny import train as run_tiny
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config

from relora_opt import ReLoRAOptimizer
from relora_opt.step import _takes_graphs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

GRAPHS = {"mode": "reduce-overhead"}
Run = tuple[list[Any], list[Tensor]]


def _replaying(graph: Any, _example: Any) -> Any:
    buffers: dict[int, Tensor] = {}

    def run(*args: Any) -> list[Any]:
        given: list[Any] = []
        for number, output in enumerate(graph(*args)):
            if isinstance(output, Tensor):
                buffer = buffers.setdefault(number, torch.empty_like(output))
                buffer.copy_(output.detach())
                storage, where = buffer.untyped_storage(), (buffer.storage_offset(), buffer.shape, buffer.stride())
                output = torch.empty(0, dtype=buffer.dtype).set_(storage, *where)  # so that a gradient takes it over
            given.append(output)
        return given

    return make_boxed_func(run)


@pytest.fixture(autouse=True)
def _replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    compile, backend = torch.compile, aot_autograd(fw_compiler=_replaying, bw_compiler=_replaying)
    monkeypatch.setattr(torch, "compile", lambda function, mode=None, **options: compile(function, backend=backend))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _run(
    compile: Any,
    *,
    accumulate: int,
    model: Callable[[], nn.Module] = lambda: mlp(torch.float64),
    loss_fn: Callable[..., Any] = mse,
    has_aux: bool = False,
    zeroes: bool = False,
) -> Run:
    trained = model()
    optimizer = relora(trained, schedule=jagged_schedule())
    step = optimizer.make_step(trained, loss_fn, compile=compile, accumulate=accumulate, has_aux=has_aux)
    given = []
    for index in range(24 * accumulate):
        given.append(step(*batch(index, torch.float64)))
        if zeroes and index % accumulate == 0:
            optimizer.zero_grad()
    assert optimizer.num_restarts == 1
    return given, list(trained.parameters())


def _with_aux(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Any]]:
    output = model(x)
    return (output - y).square().mean(), {"output": output, "count": 3}


class _Alias(MLP):
    """Reads a low-rank weight past its module."""

    def __init__(self) -> None:
        super().__init__()
        self.aliases = [self.first.weight]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * self.aliases[0].square().sum()


def _alias() -> nn.Module:
    torch.manual_seed(0)
    return _Alias().double()


@pytest.mark.parametrize(
    "case",
    [
        pytest.param({"accumulate": 1}, marks=pytest.mark.slow),
        {"accumulate": 3},
        {"accumulate": 2, "loss_fn": _with_aux, "has_aux": True},
        {"accumulate": 3, "model": _alias},
        {"accumulate": 4, "zeroes": True},
    ],
    ids=["one", "three", "aux", "alias", "zeroed"],
)
def test_replays_train_as_without(case: dict[str, Any]) -> None:
    torch.testing.assert_close(_run(GRAPHS, **case), _run(False, **case), rtol=1e-10, atol=1e-10)


def test_the_emulation_overwrites_what_nobody_copied() -> None:
    with pytest.raises(AssertionError):
        torch.testing.assert_close(_run(True, accumulate=3), _run(False, accumulate=3), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_of_another_optimizer_outlast_a_replay(accumulate: int) -> None:
    runs = []
    for compile in (GRAPHS, False):
        model = mlp(torch.float64)
        own = [(name, p) for name, p in model.named_parameters() if not name.startswith("head")]
        optimizer = ReLoRAOptimizer(own, torch.optim.AdamW, rank=2, alpha=3, targets=["first.weight"], lr=1e-2)
        other = torch.optim.SGD(model.head.parameters(), lr=0.1)
        step = optimizer.make_step(model, mse, compile=compile, accumulate=accumulate)
        losses = []
        for index in range(18):
            losses.append(step(*batch(index, torch.float64)))
            if index % 3 == 2:
                other.step()
                other.zero_grad()
        runs.append((losses, list(model.parameters())))
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-10)


def test_a_gradient_that_comes_late_in_an_update_outlasts_a_replay() -> None:
    def loss_fn(model: Any, x: Tensor, y: Tensor, *, with_head: bool) -> Tensor:
        h = model.body(torch.tanh(model.stem(x)))
        return mse(model.head, h, y) if with_head else h.square().mean()

    runs = []
    for compile in (GRAPHS, False):
        model = mlp(torch.float64)
        step = relora(model).make_step(model, loss_fn, compile=compile, accumulate=3)
        losses = [step(*batch(index, torch.float64), with_head=index % 3 > 0) for index in range(18)]
        runs.append((losses, list(model.parameters())))
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-10)


def test_what_cannot_be_copied_is_refused() -> None:
    @dataclass
    class Output:
        logits: Tensor

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Output]:
        output = model(x)
        return (output - y).square().mean(), Output(output)

    model = mlp()
    step = relora(model).make_step(model, loss_fn, compile=GRAPHS, has_aux=True)
    with pytest.raises(TypeError, match=r"gave a Output beside the loss.*CUDA graph.*: give tensors"):
        step(*batch(0))


@pytest.mark.parametrize(
    ("options", "takes"),
    [
        ({}, False),
        ({"mode": "default"}, False),
        ({"mode": "max-autotune-no-cudagraphs"}, False),
        ({"mode": "reduce-overhead"}, True),
        ({"mode": "max-autotune"}, True),
        ({"backend": "cudagraphs"}, True),
        ({"options": {"triton.cudagraphs": True}}, True),
        ({"options": [1]}, False),
    ],
    ids=str,
)
def test_what_records_graphs_is_known(options: dict[str, Any], takes: bool) -> None:
    assert _takes_graphs(options) == takes


def test_graphs_for_everything_are_known() -> None:
    with config.patch({"triton.cudagraphs": True}):
        assert _takes_graphs({})


def test_a_run_that_is_replayed_trains_as_one_that_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches an update, evaluations between, the switch and three restarts."""
    monkeypatch.setattr(relora_opt_cli.run, "check_graphs", lambda config, **_: None)  # which wants a GPU
    options = {"base": "sgd", "lr": 0.5}
    replayed = run_tiny(tmp_path, out=str(tmp_path / "replayed"), compile=True, cuda_graphs=True, **options)
    eager = run_tiny(tmp_path, out=str(tmp_path / "eager"), compile=False, **options)
    found = [
        ([row.loss for row in rows(run)[1:]], [row.val_loss for row in rows(run) if row.val_loss is not None])
        for run in (replayed, eager)
    ]
    assert rows(replayed)[-1].restarts == 3
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)  # sums in another order
