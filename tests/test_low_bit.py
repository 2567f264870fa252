"""Bases with low-bit states: torchao's are pruned by value; bitsandbytes' codes are reset or kept, and never masked.

Zeroing codes is what others did: code 0 is near the negative maximum of its block.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from models import differences, snapshot, through_file
from torch import nn

from relora_opt import JaggedSchedule, ReLoRAOptimizer, prune

Base = Callable[..., torch.optim.Optimizer]
RANK, SHAPE = 8, (512, 640)  # torchao keeps 4096 elements and more in few bits: A has 5120, B 4096


@pytest.fixture
def torchao() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optim = pytest.importorskip("torchao.optim", reason="torchao is not installed: pip install --no-deps torchao")
        with torch.compiler.set_stance("force_eager"):  # it compiles every update, which would take a minute here
            yield optim


@pytest.fixture
def bitsandbytes() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")


def build(base: Base, *, seed: int = 0, every: int = 3, **changes: Any) -> tuple[nn.Linear, ReLoRAOptimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(SHAPE[1], SHAPE[0])
    settings: dict[str, Any] = {"rank": RANK, "targets": ["weight"], "schedule": JaggedSchedule(every), "lr": 1e-2}
    return model, ReLoRAOptimizer(model, base, **{**settings, **changes})


def train(model: nn.Linear, optimizer: ReLoRAOptimizer, first: int, last: int) -> dict[str, Any]:
    for u in range(first, last):
        x = torch.randn(4, SHAPE[1], generator=torch.Generator().manual_seed(u))
        model.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return {"model": model.state_dict(), "clock": optimizer.clock}


MOMENTS = ("exp_avg", "exp_avg_sq")
TORCHAO = ("AdamW8bit", "AdamW4bit", "AdamWFp8")
BITSANDBYTES = ("AdamW8bit", "Lion8bit", "SGD8bit")
SGD8BIT = {"momentum": 0.9}


def codes_of(bitsandbytes: Any, name: str) -> Base:
    return partial(getattr(bitsandbytes.optim, name), min_8bit_size=0, **(SGD8BIT if name == "SGD8bit" else {}))


@pytest.mark.parametrize("name", TORCHAO)
def test_torchaos_states_are_pruned_by_value(torchao: Any, name: str) -> None:
    """What stays is what it was, up to one step of the codes: the largest value of a block may have gone."""
    model, optimizer = build(getattr(torchao, name), every=0, prune=prune.magnitude(0.75))
    train(model, optimizer, 0, 3)
    states = [optimizer.state[model.weight][key] for key in ("A_state", "B_state")]
    before = [{key: state[key].dequantize() for key in MOMENTS} for state in states]
    optimizer.restart()
    for state, old in zip(states, before, strict=True):
        size = old["exp_avg"].abs()
        kept = state["exp_avg"].dequantize() != 0
        assert int(kept.sum()) <= size.numel() // 4
        assert kept.sum() > size.numel() // 5  # few of the kept round to zero
        assert size[kept].min() >= size[~kept].median()
        for key, values in old.items():
            new = state[key].dequantize()
            assert new.dtype == torch.float32
            step = 0.2 * values.abs().max()  # 4 bits: 16 codes between the extremes
            assert (new - values)[kept].abs().max() < step
            assert new[~kept].abs().max() < step
    train(model, optimizer, 3, 8)
    assert model.weight.isfinite().all()


@pytest.mark.parametrize("name", TORCHAO)
def test_after_a_reset_torchaos_next_updates_equal_a_fresh_ones_bitwise(torchao: Any, name: str) -> None:
    base = getattr(torchao, name)
    model, optimizer = build(base, every=3)
    train(model, optimizer, 0, 3)
    assert optimizer.num_restarts == 1
    twins = [factor.detach().clone().requires_grad_() for factor in optimizer.factors(model.weight)]
    fresh = base(twins, lr=1e-2)
    for u in range(2):
        for factor, twin in zip(optimizer.factors(model.weight), twins, strict=True):
            factor.grad = torch.randn(factor.shape, generator=torch.Generator().manual_seed(u))
            twin.grad = factor.grad.clone()
        model.zero_grad()
        optimizer.step()
        fresh.step()
        for factor, twin in zip(optimizer.factors(model.weight), twins, strict=True):
            assert torch.equal(factor, twin)


def test_torchaos_states_are_as_large_as_their_codes_and_scales(torchao: Any) -> None:
    model, optimizer = build(torchao.AdamW8bit)
    train(model, optimizer, 0, 1)
    states = [optimizer.state[model.weight][key][moment] for key in ("A_state", "B_state") for moment in MOMENTS]
    parts = [getattr(state, name) for state in states for name in state.__tensor_flatten__()[0]]
    num_codes = 2 * RANK * sum(SHAPE)
    assert num_codes < sum(part.numel() * part.element_size() for part in parts) < 1.3 * num_codes
    dense = 2 * SHAPE[0] * 4 + 3 * 4  # the bias's moments, too small for codes, and three counters
    assert optimizer.memory().base_bytes == sum(part.numel() * part.element_size() for part in parts) + dense


def assert_continues(base: Base, **changes: Any) -> None:
    model, optimizer = build(base, **changes)
    train(model, optimizer, 0, 2)
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed, fresh = build(base, seed=1, **changes)
    resumed.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    expected = train(model, optimizer, 2, 6)
    assert not differences(train(resumed, fresh, 2, 6), expected)
    # What was loaded is a copy: training on has not changed it, and it serves again.
    resumed.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    assert not differences(train(resumed, fresh, 2, 6), expected)


@pytest.mark.parametrize("name", TORCHAO)
@pytest.mark.parametrize("strategy", [prune.reset(), prune.random(0.5), prune.keep()], ids=str)
def test_torchaos_states_continue_bitwise_from_a_file(torchao: Any, name: str, strategy: Any) -> None:
    assert_continues(getattr(torchao, name), prune=strategy)


@pytest.mark.parametrize("name", BITSANDBYTES)
@pytest.mark.parametrize("strategy", [prune.reset(), prune.keep()], ids=str)
def test_bitsandbytes_codes_continue_bitwise_from_a_file(bitsandbytes: Any, name: str, strategy: Any) -> None:
    assert_continues(codes_of(bitsandbytes, name), prune=strategy)


@pytest.mark.parametrize("name", BITSANDBYTES)
@pytest.mark.parametrize("strategy", [prune.magnitude(0.5), prune.random(0.5)], ids=str)
def test_masking_bitsandbytes_codes_is_refused_by_name_at_once(bitsandbytes: Any, name: str, strategy: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} keeps state1 in torch.uint8 codes, of which 0 is not the value 0"):
        build(codes_of(bitsandbytes, name), prune=strategy)


def test_a_group_added_later_is_refused_alike(bitsandbytes: Any) -> None:
    model, optimizer = build(bitsandbytes.optim.AdamW8bit, prune=prune.magnitude(0.5), rank=6)  # too small for codes
    with pytest.raises(ValueError, match="AdamW8bit keeps state1 in"):
        optimizer.add_param_group({"params": [("more.weight", nn.Parameter(torch.zeros(640, 640)))], "rank": 64})
    assert len(optimizer.param_groups) == 2
    train(model, optimizer, 0, 4)


@pytest.mark.parametrize("strategy", [prune.magnitude(0.5), prune.random(0.5), prune.reset()], ids=str)
def test_bitsandbytes_32_bit_states_are_pruned_like_any(bitsandbytes: Any, strategy: Any) -> None:
    model, optimizer = build(bitsandbytes.optim.AdamW32bit, prune=strategy)
    train(model, optimizer, 0, 3)
    state = optimizer.state[model.weight]["A_state"]
    share = 0 if strategy == prune.reset() else 0.5
    kept = int((state["state1"] != 0).sum()) if state else 0
    assert kept == pytest.approx(share * RANK * SHAPE[1], abs=20)
    train(model, optimizer, 3, 8)
    assert model.weight.isfinite().all()


def test_bitsandbytes_dense_states_keep_their_dtypes_in_a_16_bit_model(bitsandbytes: Any) -> None:
    """torch's own loading would cast the maxima of the blocks, and 32-bit states, to bfloat16."""
    model, optimizer = build(codes_of(bitsandbytes, "AdamW8bit"), rank=0, targets=None)
    model.to(torch.bfloat16)
    x = torch.ones(2, SHAPE[1], dtype=torch.bfloat16)
    model(x).square().mean().backward()
    optimizer.step()
    saved = snapshot(model, optimizer)
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.state[model.weight]["absmax1"].dtype == torch.float32
    assert not differences(snapshot(model, optimizer), saved)
