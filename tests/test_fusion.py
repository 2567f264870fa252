"""Thin products that share an operand are made as one, and nothing else about a graph changes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import mse
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from relora_opt import ReLoRAOptimizer, fusion
from relora_opt.fusion import ThinProducts, fuse_thin_products, with_fusion

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

T, N, R = 6, 16, 2
HOOK = "post_grad_custom_pre_pass"


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def graph_of(function: Callable[..., Any], *args: Tensor) -> GraphModule:
    return make_fx(function, tracing_mode="fake")(*args)


def products(module: GraphModule) -> list[Any]:
    return module.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)


def fused(function: Callable[..., Any], *args: Tensor) -> tuple[int, int]:
    """Return the numbers of products before and after, of a graph that still computes the same."""
    module = graph_of(function, *args)
    before = len(products(module))
    saved = fuse_thin_products(module.graph)
    module.graph.lint()
    module.recompile()
    torch.testing.assert_close(module(*args), function(*args), rtol=1e-13, atol=1e-13)
    assert len(products(module)) == before - saved
    return before, before - saved


def test_products_of_one_x_on_either_side_become_one_whatever_their_ranks() -> None:
    def backward(x: Tensor, a: Tensor, b: Tensor, c: Tensor, g: Tensor) -> list[Tensor]:
        return [x @ a.T, x @ b.T, g.T @ x, x @ c.T, g.T.cos() @ x]

    args = numbers(T, N), numbers(R, N, seed=1), numbers(1, N, seed=2), numbers(3, N, seed=3), numbers(T, R, seed=4)
    assert fused(backward, *args) == (5, 2)


def test_products_of_other_xs_and_of_wide_operands_stay_apart() -> None:
    def backward(x: Tensor, y: Tensor, a: Tensor, W: Tensor) -> list[Tensor]:
        return [x @ a.T, y @ a.T, x @ W, x @ W.T]

    assert fused(backward, numbers(T, N), numbers(T, N, seed=1), numbers(R, N, seed=2), numbers(N, N, seed=3)) == (4, 4)


def test_a_product_that_waits_for_another_stays_behind_it() -> None:
    def chain(x: Tensor, a: Tensor) -> list[Tensor]:
        first = x @ a.T
        return [first, x @ (first.T @ x).T, x @ a.sin().T]

    assert fused(chain, numbers(T, N), numbers(R, N, seed=1)) == (4, 3)


def test_two_fusions_do_not_wait_for_each_other() -> None:
    def crossed(x: Tensor, y: Tensor, a: Tensor) -> list[Tensor]:
        first, second = x @ a.T, y @ a.T
        return [first, second, y @ (first.sum() * a).T, x @ (second.sum() * a).T]

    assert fused(crossed, numbers(T, N), numbers(T, N, seed=1), numbers(R, N, seed=2)) == (4, 3)


class Block(nn.Module):
    """Queries, keys and values read one x, gate and up another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(N, N, bias=False, dtype=torch.float64) for _ in range(4))
        self.gate, self.up = (nn.Linear(N, 2 * N, bias=False, dtype=torch.float64) for _ in range(2))
        self.down = nn.Linear(2 * N, N, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)
        x = x + self.o(mixed)
        return x + self.down(torch.relu(self.gate(x)) * self.up(x))


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many products each graph that is compiled now has saved, from an empty cache."""
    counted: list[int] = []

    def counting(graph: Any) -> int:
        counted.append(fuse_thin_products(graph))
        return counted[-1]

    monkeypatch.setattr(fusion, "fuse_thin_products", counting)
    torch._dynamo.reset()
    with config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield counted
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options",
    [
        True,
        pytest.param({"dynamic": True}, marks=pytest.mark.slow),
        pytest.param({"options": {"epilogue_fusion": True}}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_compiled_step_makes_the_products_of_q_k_v_and_of_gate_up_as_one(saved: list[int], options: Any) -> None:
    losses = []
    for compile in (options, False):
        model = Block()
        optimizer = ReLoRAOptimizer(model, torch.optim.SGD, rank=R, lr=0.1)
        step = optimizer.make_step(model, mse, compile=compile)
        losses.append([step(numbers(3, T, N, seed=u), numbers(3, T, N, seed=9)) for u in range(3)])
    assert saved == [2 * 2 + 2 * 1]  # of x A^T and of (g B)^T x; no forward graph is looked at
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)


def test_options_of_torch_compile_are_kept() -> None:
    assert with_fusion({})["options"].keys() == {HOOK}
    graphs = with_fusion({"mode": "reduce-overhead", "dynamic": False})
    assert "mode" not in graphs
    assert graphs["dynamic"] is False
    assert graphs["options"]["triton.cudagraphs"] is True
    assert with_fusion({"options": {"max_autotune": True}})["options"]["max_autotune"] is True


@pytest.mark.parametrize(
    "options",
    [{"backend": "eager"}, {"options": {HOOK: None}}, {"options": 5}, {"mode": "default", "options": {1: 2}}],
)
def test_what_is_not_for_this_pass_is_left_alone(options: dict[str, Any]) -> None:
    assert with_fusion(options) is options


def test_a_pass_that_is_set_for_all_compilations_is_not_replaced() -> None:
    class Other(CustomGraphPass):
        def __call__(self, graph: Any) -> None:
            pass

        def uuid(self) -> Any:
            return "other"

    with config.patch({HOOK: Other()}):
        assert with_fusion({}) == {}


def test_compiled_graphs_are_cached_by_the_text_of_the_pass() -> None:
    assert isinstance(ThinProducts().uuid(), bytes)
    assert ThinProducts().uuid() == ThinProducts().uuid()
