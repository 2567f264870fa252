"""Whatever operation meets the weight, its factor gradients are those of a materialised W_frozen + s B A.

For products, which never form the dense gradient, and for everything else, which goes the universal way. The oracle is
tests/materialised.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from materialised import TOLERANCE, assert_equal_gradients, factor_gradients, oracle, sgd
from models import Kernel
from torch import Tensor, nn

from relora_opt import LowRankWeight
from relora_opt.weight import is_dense_cheaper


class Op(nn.Module):
    """One weight of a given shape and an expression of it."""

    def __init__(self, shape: tuple[int, ...], expression: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(shape[0]))
        self.expression = expression

    def forward(self, x: Tensor) -> Tensor:
        y = self.expression(x, self.w)
        return y + self.bias.sum()


class Tied(nn.Module):
    """An embedding and a head that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 5)
        self.head = nn.Linear(5, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)))


def experts(x: Tensor, w: Tensor) -> Tensor:
    return torch.bmm(x.unsqueeze(0).expand(len(w), -1, -1), w.mT)


def attention(x: Tensor, w: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x[None], F.linear(x, w.t() @ w)[None], x[None])


MATRIX: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # w is (4, 5), x is (7, 5)
    "F.linear": F.linear,
    "F.linear by keyword": lambda x, w: F.linear(input=x, weight=w, bias=w.sum(1)),
    "x @ w.t()": lambda x, w: x @ w.t(),
    "x @ w.T": lambda x, w: x @ w.T,
    "x @ w.mT": lambda x, w: x @ w.mT,
    "x @ w.transpose": lambda x, w: x @ w.transpose(-2, -1),
    "x[0] @ w.t()": lambda x, w: x[0] @ w.t(),
    "3-D x @ w.t()": lambda x, w: torch.stack([x, 2 * x]) @ w.t(),
    "expanded x @ w.t()": lambda x, w: x.expand(3, 7, 5) @ w.t(),
    "transposed x @ w.t()": lambda x, w: torch.stack([x, x], 1).transpose(0, 1) @ w.t(),
    "torch.matmul": lambda x, w: torch.matmul(x, w.t()),
    "torch.matmul by keyword": lambda x, w: torch.matmul(x, other=w.t()),
    "torch.mm": lambda x, w: torch.mm(x, w.t()),
    "x.mm": lambda x, w: x.mm(w.t()),
    "addmm": lambda x, w: torch.addmm(torch.ones(4, dtype=x.dtype), x, w.t()),
    "addmm with beta and alpha": lambda x, w: torch.addmm(x[:, :4], x, w.t(), beta=0.5, alpha=2.0),
    "w @ x.t()": lambda x, w: w @ x.t(),
    "w.matmul": lambda x, w: w.matmul(x[0]),
    "torch.mv": lambda x, w: torch.mv(w, x[0]),
    "einsum": lambda x, w: torch.einsum("ti,oi->to", x, w),
    "w.t().t()": lambda x, w: F.linear(x, w.t().t()),
    "a slice of w": lambda x, w: F.linear(x, w[1:3]),
    "w twice": lambda x, w: (x @ w.t()) @ w,
    "cat": lambda x, w: F.linear(x, torch.cat([w, w * 2])),
    "chunk": lambda x, w: F.linear(x, w.chunk(2)[1]),
    "normalised w": lambda x, w: F.linear(x, w / w.norm()),
    "2 * w": lambda x, w: F.linear(x, 2 * w),
    "w + w.detach": lambda x, w: F.linear(x, w + w.detach()),
    "to dtype": lambda x, w: F.linear(x, w.to(x.dtype)),
    "contiguous": lambda x, w: F.linear(x, w.contiguous()),
    "clone": lambda x, w: F.linear(x, w.clone()),
    "gather rows": lambda x, w: w[torch.tensor([0, 2, 2])],
    "w as input": lambda x, w: F.linear(w, x),
    "w is both operands": lambda x, w: F.linear(w, w),
    "attention": attention,
    "parameter of relu": lambda x, w: F.relu(w) @ x.t(),
    "inner": lambda x, w: torch.inner(x, w),
    "autograd function": Kernel.apply,
    "autograd function of a transpose": lambda x, w: Kernel.apply(x, w.t().contiguous().t()),
    "private function of torch": lambda x, w: F.linear(x, torch._weight_norm(w, w.sum(1, keepdim=True), 0)),
}


def check(model: nn.Module, x: Tensor, targets: Any, *, rank: int = 2) -> None:
    """Check the output, bitwise, and the factor gradients of every path against the oracle."""

    def loss_fn(call: Any) -> Tensor:
        y = call(x)
        y = y[0] if isinstance(y, tuple) else y
        return (torch.tanh(y) * torch.arange(1.0, 1 + y.numel(), dtype=y.dtype).view(y.shape)).sum()

    plain_output = model(x)
    optimizer = sgd(model, targets, rank=rank)
    torch.testing.assert_close(optimizer.functional(model)(x), plain_output, rtol=0, atol=0)
    expected = oracle(model, optimizer, loss_fn)
    assert_equal_gradients(factor_gradients("functional", model, optimizer, loss_fn), expected)
    optimizer.zero_grad()
    assert_equal_gradients(factor_gradients("dense", model, optimizer, loss_fn), expected)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", MATRIX)
def test_any_expression_of_a_matrix_has_the_oracles_factor_gradients(name: str, rank: int) -> None:
    torch.manual_seed(0)
    check(Op((4, 5), MATRIX[name]).double(), inputs(7, 5), ["w"], rank=rank)


def test_at_one_of_these_ranks_a_product_goes_by_the_dense_gradient_and_at_the_other_it_does_not() -> None:
    assert [is_dense_cheaper(7, 4, 5, rank) for rank in (1, 2)] == [False, True]


def convolution(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w, stride=2, padding=1)


TENSOR_CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, Any]] = {
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), inputs(2, 3, 6, 6), ["weight"]),
    "F.conv2d": (lambda: Op((4, 3, 3, 3), convolution), inputs(2, 3, 6, 6), ["w"]),
    "conv1d of torch": (lambda: nn.Conv1d(3, 4, 2, groups=1), inputs(2, 3, 6), ["weight"]),
    "grouped convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2), inputs(2, 4, 5, 5), ["weight"]),
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 5, 3), inputs(2, 4, 5, 5), ["weight"]),
    "embedding": (lambda: nn.Embedding(9, 5), torch.tensor([[0, 3, 3], [8, 1, 0]]), ["weight"]),
    "embedding bag": (lambda: nn.EmbeddingBag(9, 5), torch.tensor([[0, 3, 3], [8, 1, 0]]), ["weight"]),
    "LSTM": (lambda: nn.LSTM(5, 4, batch_first=True), inputs(2, 6, 5), ".*weight.*"),
    "spectral norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)).eval(),
        inputs(7, 5),
        ".*original$",
    ),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), inputs(7, 5), ".*original1$"),
    "tied weights": (Tied, torch.tensor([[0, 3, 3], [8, 1, 0]]), ["embed.weight"]),
    "stacked experts": (lambda: Op((3, 4, 5), experts), inputs(7, 5), ["w"]),
}


@pytest.mark.parametrize("name", TENSOR_CASES)
def test_any_module_has_the_oracles_factor_gradients(name: str) -> None:
    torch.manual_seed(0)
    build, x, targets = TENSOR_CASES[name]
    check(build().double(), x, targets)


def test_the_conv1d_of_transformers_is_selected_and_has_the_oracles_factor_gradients() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(6, 5), nn.Tanh(), Conv1D(7, 6)).double()
    check(model, inputs(3, 7, 5), None)


def test_multi_head_attention_has_the_oracles_factor_gradients() -> None:
    torch.manual_seed(0)
    attention_ = nn.MultiheadAttention(6, 2, batch_first=True)

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = attention_

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x, need_weights=False)[0]

    check(SelfAttention().double(), inputs(2, 5, 6), ["inner.in_proj_weight", "inner.out_proj.weight"])


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    m=st.integers(1, 6),
    n=st.integers(1, 6),
    r=st.integers(1, 4),
    has_bias=st.booleans(),
    is_contiguous=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_linear_map_of_any_shape_and_rank_is_bitwise_the_plain_one_with_the_oracles_gradients(
    lead: list[int], m: int, n: int, r: int, has_bias: bool, is_contiguous: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    W, A, B = (torch.randn(*shape, dtype=torch.float64) for shape in ((m, n), (r, n), (m, r)))
    x = torch.randn(*lead, n, dtype=torch.float64)
    bias = torch.randn(m, dtype=torch.float64) if has_bias else None
    if lead and not is_contiguous:
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    ours = [t.clone().requires_grad_() for t in (x, A, B, *([] if bias is None else [bias]))]
    theirs = [t.clone().requires_grad_() for t in ours]
    y = F.linear(ours[0], LowRankWeight.wrap(W, ours[1], ours[2], 0.7), *ours[3:])
    assert torch.equal(y, F.linear(x, W.clone().requires_grad_(), bias))  # torch may go another way for a constant
    materialised = W - 0.7 * B @ A + 0.7 * theirs[2] @ theirs[1]
    expected = F.linear(theirs[0], materialised, *theirs[3:])
    cotangent = torch.randn_like(y)
    gradients = torch.autograd.grad(y, ours, cotangent), torch.autograd.grad(expected, theirs, cotangent)
    for actual, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=TOLERANCE, atol=TOLERANCE)
