"""memory() equals a count by hand, in every phase and precision."""

from typing import Any

import pytest
import torch
from models import MLP, batch, jagged_schedule, mlp, relora, stepper
from torch import nn

from relora_opt import Memory, ReLoRAOptimizer, memory

# The MLP of models.py: stem (7, 5) + 7; first (6, 7) + 6 and second (8, 6), selected; norm 6 + 6; head (3, 8) + 3.
SELECTED = 6 * 7 + 8 * 6
DENSE = 7 * 5 + 7 + 6 + 6 + 6 + 3 * 8 + 3
FACTORS = 2 * (6 + 7) + 2 * (8 + 6)  # rank 2
NUM_DENSE_TENSORS = 7
STEP = 4  # bytes of AdamW's counter, one a trained tensor


def trained(
    num_updates: int, dtype: torch.dtype = torch.float32, base: str = "AdamW", **changes: Any
) -> tuple[MLP, ReLoRAOptimizer]:
    """Return a model and its optimizer after updates of a schedule that switches after 3 and restarts after 7."""
    model = mlp(dtype)
    optimizer = relora(model, base, schedule=jagged_schedule(4, 1, 3), **changes)
    step = stepper("dense", optimizer, model)
    for u in range(num_updates):
        step(*batch(u, dtype))
    return model, optimizer


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.float64, 8), (torch.bfloat16, 2)], ids=str)
def test_in_the_warm_start_everything_is_trained_at_full_rank(dtype: torch.dtype, width: int) -> None:
    _, optimizer = trained(2, dtype)
    moments = 2 * (SELECTED + DENSE) * width
    assert memory(optimizer) == Memory(
        num_parameters=SELECTED + DENSE,
        num_trainable=SELECTED + DENSE,
        state_bytes=moments + (NUM_DENSE_TENSORS + 2) * STEP,
        full_rank_adamw_bytes=moments,
    )


@pytest.mark.parametrize("num_updates", [3, 4, 7, 12], ids=lambda u: f"after {u}")
@pytest.mark.parametrize(
    ("dtype", "width", "factor_width", "master_width"),
    [(torch.float32, 4, 4, 0), (torch.float64, 8, 8, 0), (torch.bfloat16, 2, 4, 4), (torch.float16, 2, 4, 4)],
    ids=str,
)
def test_in_the_low_rank_phase_there_are_factors_their_moments_and_the_masters_of_16_bit_weights(
    dtype: torch.dtype, width: int, factor_width: int, master_width: int, num_updates: int
) -> None:
    _, optimizer = trained(num_updates, dtype, lr=1e-4)
    has_stepped = num_updates > 3  # right after the switch the base has not made its state of the factors yet
    copies = 3 if has_stepped else 1  # a factor and its two moments
    num_counters = NUM_DENSE_TENSORS + (4 if has_stepped else 0)
    assert memory(optimizer) == Memory(
        num_parameters=SELECTED + DENSE,
        num_trainable=FACTORS + DENSE,
        state_bytes=copies * FACTORS * factor_width + SELECTED * master_width + 2 * DENSE * width + num_counters * STEP,
        full_rank_adamw_bytes=2 * (SELECTED + DENSE) * width,
    )


def test_sgd_with_momentum_keeps_one_tensor_a_parameter() -> None:
    _, optimizer = trained(5, base="SGD")
    assert memory(optimizer).state_bytes == 2 * FACTORS * 4 + DENSE * 4


def test_before_the_first_update_nothing_is_held() -> None:
    _, optimizer = trained(0)
    assert memory(optimizer).state_bytes == 0
    assert memory(optimizer).num_trainable == SELECTED + DENSE


@pytest.mark.parametrize("draws_early", [False, True])
def test_without_a_warm_start_the_coming_update_trains_factors_from_the_beginning(draws_early: bool) -> None:
    model = mlp()
    optimizer = relora(model)
    if draws_early:
        optimizer.factors(model.first.weight)
    assert memory(optimizer).num_trainable == FACTORS + DENSE


def test_frozen_parameters_are_not_trained_and_cost_adamw_nothing() -> None:
    model = mlp()
    model.stem.requires_grad_(False)
    optimizer = relora(model)
    stepper("dense", optimizer, model)(*batch(0))
    frozen = 7 * 5 + 7
    assert memory(optimizer) == Memory(
        num_parameters=SELECTED + DENSE,
        num_trainable=FACTORS + DENSE - frozen,
        state_bytes=3 * FACTORS * 4 + 2 * (DENSE - frozen) * 4 + (NUM_DENSE_TENSORS - 2 + 4) * STEP,
        full_rank_adamw_bytes=2 * (SELECTED + DENSE - frozen) * 4,
    )


def test_tied_weights_count_once_and_rank_0_is_full_rank() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9, bias=False))
    model[1].weight = model[0].weight
    optimizer = ReLoRAOptimizer(model, torch.optim.AdamW, rank=0)
    model(torch.arange(9)).sum().backward()
    optimizer.step()
    assert memory(optimizer) == Memory(72, 72, 2 * 72 * 4 + STEP, 2 * 72 * 4)


def test_batches_of_matrices_are_counted_whole() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stacked = nn.Parameter(torch.randn(3, 6, 5))

    model = Experts()
    optimizer = ReLoRAOptimizer(model, torch.optim.SGD, rank=2, targets=["stacked"], lr=0.1)
    model.stacked.square().sum().backward()
    optimizer.step()
    assert memory(optimizer) == Memory(90, 3 * 2 * (6 + 5), 3 * 2 * (6 + 5) * 4, 2 * 90 * 4)
