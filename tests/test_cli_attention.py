"""Attention is the formula's, by whichever kernel, and what is materialised for the compiler is what it was."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from relora_opt_cli.loss import batch_loss
from relora_opt_cli.model import Llama, LlamaConfig, attention, init_weights
from relora_opt_cli.model.attention import attend, once
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def heads(t: int, s: int, *, dtype: torch.dtype, kv_heads: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(t + s)
    shapes = (2, 3, t, 8), (2, kv_heads, s, 8), (2, kv_heads, s, 8)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    is_after = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
    return scores.masked_fill(is_after, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("kv_heads", [3, 1])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (2, 2), (7, 7), (256, 256), (257, 257), (1, 9), (4, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_values_and_gradients_are_the_formulas(dtype: torch.dtype, t: int, s: int, kv_heads: int) -> None:
    own, other = heads(t, s, dtype=dtype, kv_heads=kv_heads), heads(t, s, dtype=dtype, kv_heads=kv_heads)
    found, expected = attend(*own), exact(*other)
    assert found.dtype == dtype
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(found.shape, generator=generator)
    found.backward(g.to(dtype))
    expected.backward(g.double())
    close = {"rtol": 0, "atol": {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 0.1}[dtype]}
    torch.testing.assert_close(found.double(), expected, **close)
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **close)


@pytest.mark.parametrize("dtype", HALF)
def test_a_token_sees_nothing_that_comes_after_it(dtype: torch.dtype) -> None:
    q, k, v = heads(9, 9, dtype=dtype)
    before = attend(q, k, v)[:, :, :5]
    with torch.no_grad():
        k[:, :, 5:], v[:, :, 5:] = 100, 100
    assert torch.equal(attend(q, k, v)[:, :, :5], before)


def test_short_texts_in_16_bits_are_no_business_of_torchs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[torch.dtype] = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F,
        "scaled_dot_product_attention",
        lambda q, *rest, **named: called.append(q.dtype) or kernel(q, *rest, **named),
    )
    for dtype, length in ((torch.bfloat16, 256), (torch.bfloat16, 257), (torch.float32, 256)):
        attend(*heads(length, length, dtype=dtype))
    assert called == [torch.bfloat16, torch.float32]


def test_what_is_computed_once_is_what_it_was() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(once(x), x)
    torch.library.opcheck(torch.ops.relora_opt_cli.once, (x,))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13's compiler uses what torch 2.13 deprecates
@pytest.mark.parametrize("length", [64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_has_the_gradients_of_the_model(dtype: torch.dtype, length: int) -> None:
    model = Llama(
        LlamaConfig(64, 128, 96, 2, 2, max_position_embeddings=300)
    )  # heads wide enough for a compiler's tiles
    init_weights(model, seed=0)
    tokens = torch.randint(0, 64, (2, length + 1), generator=torch.Generator().manual_seed(0))

    def gradients(function: Callable[..., Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        function(model, tokens, dtype=dtype).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(batch_loss), gradients(torch.compile(batch_loss, fullgraph=True))
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < (1e-5 if dtype == torch.float32 else 3e-2), name
