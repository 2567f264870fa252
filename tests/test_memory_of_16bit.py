"""A 16-bit weight remembers what it cannot show: a float32 master collects moves far below its rounding step."""

from typing import Any

import pytest
import torch
from models import BASES, batch, mlp, mse, relora, selected_weights, stepper
from torch import Tensor, nn

from relora_opt import JaggedSchedule, ReLoRAOptimizer, prune

NUM_UPDATES = 2_000


def recorded_gradients(shape: torch.Size) -> Tensor:
    """Return gradients with a drift in a fixed direction, exact in bfloat16 and in float16."""
    generator = torch.Generator().manual_seed(3)
    drift = torch.randn(shape, generator=generator)
    noise = torch.randn(NUM_UPDATES, *shape, generator=generator)
    return (drift + noise).to(torch.float8_e4m3fn).to(torch.float32)


def trained(dtype: torch.dtype, weight: Tensor, gradients: Tensor, base: str, lr: float) -> tuple[Tensor, float]:
    """Return the weight after the recorded gradients, and the largest single move it was asked for."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(dtype)
    layer.weight = nn.Parameter(weight.to(dtype, copy=True))
    base_class, hyperparameters = BASES[base]
    optimizer = ReLoRAOptimizer(
        {"layer.weight": layer.weight}.items(),
        base_class,
        rank=3,
        alpha=3,
        init="kaiming",
        targets=["layer.weight"],
        schedule=JaggedSchedule(400, restart_warmup=20),
        **{**hyperparameters, "lr": lr},
    )
    largest = 0.0
    for gradient in gradients:
        before = layer.weight.detach().clone()
        layer.weight.grad = gradient.to(dtype)
        optimizer.step()
        largest = max(largest, float((layer.weight.detach() - before).abs().max()))
    return layer.weight.detach(), largest


@pytest.mark.parametrize(
    ("dtype", "base", "lr"),
    [
        (torch.bfloat16, "AdamW", 5e-5),
        (torch.float16, "SGD", 2e-5),
        pytest.param(torch.bfloat16, "SGD", 2e-5, marks=pytest.mark.slow),
        pytest.param(torch.float16, "AdamW", 5e-5, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_2000_recorded_gradients_move_a_16_bit_weight_as_a_float32_one_to_one_rounding(
    dtype: torch.dtype, base: str, lr: float
) -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(4)).bfloat16().half().float()
    gradients = recorded_gradients(weight.shape)
    expected, largest = trained(torch.float32, weight, gradients, base, lr)
    actual, _ = trained(dtype, weight, gradients, base, lr)
    # The law has something to prove: every move is under half a step of the median weight, their sum is many steps.
    step = torch.finfo(dtype).eps * weight.abs().median()
    assert largest < step / 2
    assert float((expected - weight).abs().max()) > 3 * step
    assert torch.equal(actual, expected.to(dtype))


@pytest.mark.parametrize("path", ["dense", "functional"])
def test_a_bfloat16_parameter_is_always_the_rounding_of_its_master(path: str) -> None:
    model = mlp(torch.bfloat16)
    optimizer = relora(model, schedule=JaggedSchedule(4, warm_start=3), prune=prune.magnitude(0.5))
    step = stepper(path, optimizer, model)
    for u in range(12):
        step(*batch(u, torch.bfloat16))
        if u >= 3:
            for weight in selected_weights(model).values():
                state: dict[str, Any] = optimizer.state[weight]
                assert state["master"].dtype == torch.float32
                assert torch.equal(weight.detach(), state["master"].bfloat16())
                assert all(factor.dtype == torch.float32 for factor in optimizer.factors(weight))


@pytest.mark.parametrize("write", ["copy_", "data", "load_state_dict"])
def test_a_value_written_into_a_16_bit_weight_is_kept(write: str) -> None:
    model, other = mlp(torch.bfloat16), mlp(torch.bfloat16, seed=1)
    optimizer = relora(model, "SGD", lr=1e-6, momentum=0.0)
    step = stepper("dense", optimizer, model)
    step(*batch(0, torch.bfloat16))
    if write == "load_state_dict":
        model.load_state_dict(other.state_dict())
    else:
        with torch.no_grad():
            for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
                (ours.data if write == "data" else ours).copy_(theirs)
    step(*batch(1, torch.bfloat16))  # too small to be seen
    for name, weight in selected_weights(model).items():
        assert torch.equal(weight, selected_weights(other)[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_weight_that_is_cast_after_its_factors_were_drawn_remembers_too(dtype: torch.dtype) -> None:
    ends = []
    for casts_first in (True, False):
        model = nn.Sequential(nn.Conv2d(4, 4, 3))
        with torch.no_grad():
            model[0].weight.copy_(torch.linspace(0.5, 1, 144).view(4, 4, 3, 3).to(dtype))
        model.to(dtype if casts_first else torch.float32)
        optimizer = ReLoRAOptimizer(model, torch.optim.SGD, rank=2, targets=["0"], lr=1e-4)
        optimizer.functional(model)
        model.to(dtype)
        step = optimizer.make_step(model, lambda model, x: model(x).float().sum(), compile=False)
        for _ in range(20):
            step(torch.ones(1, 4, 3, 3, dtype=dtype))
        assert "master" in optimizer.state[model[0].weight]
        ends.append(optimizer.state[model[0].weight]["master"])
    assert not torch.equal(ends[0], ends[0].to(dtype).float())
    assert torch.equal(*ends)


def test_the_frozen_weight_and_the_metrics_are_of_what_somebody_has_written() -> None:
    model = mlp(torch.bfloat16)
    optimizer = relora(model)
    mse(model, *batch(0, torch.bfloat16)).backward()
    optimizer.step()
    name, weight = next(iter(selected_weights(model).items()))
    with torch.no_grad():
        weight.fill_(5.0)
    A, B = optimizer.factors(weight)
    torch.testing.assert_close(
        optimizer.frozen_weight(weight), (5.0 - optimizer.scale(weight) * (B @ A)).bfloat16(), rtol=0, atol=0
    )
    expected = optimizer.scale(weight) * float((B @ A).detach().norm()) / (5.0 * weight.numel() ** 0.5)
    assert optimizer.metrics().weights[f"{name}.weight"].low_rank_ratio == pytest.approx(expected, rel=1e-4)
