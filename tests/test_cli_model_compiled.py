"""A compiled step in bfloat16 has the gradients of the eager one, at the sizes that pretrain trains.

The compiler's kernels depend on sizes, and so have its errors: at small ones, where other tests look, there was none.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from relora_opt_cli.loss import batch_loss
from relora_opt_cli.model import Llama, LlamaConfig, init_weights

from relora_opt import JaggedSchedule, ReLoRAOptimizer


def gradients(rank: int, *, width: int, compile: Any) -> dict[str, torch.Tensor]:
    """Return what a step hands to the base: the gradients of factors and unselected parameters."""
    model = Llama(LlamaConfig(2048, width, width * 43 // 16, 1, 4, max_position_embeddings=128))
    init_weights(model, seed=1)
    optimizer = ReLoRAOptimizer(model, torch.optim.SGD, rank=rank, lr=0.0, schedule=JaggedSchedule(0), alpha=rank)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if name in optimizer.selected:  # at B = 0 dA is 0, and hides its errors
            _, B = optimizer.factors(p)
            B.data.normal_(std=0.02, generator=generator)
    found: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        for name, p in model.named_parameters():
            pair = optimizer.factors(p) if name in optimizer.selected else (p,)
            found.update({f"{name} {i}": one.grad.clone() for i, one in enumerate(pair) if one.grad is not None})

    optimizer.register_step_pre_hook(keep)
    step = optimizer.make_step(
        model, lambda model, tokens: batch_loss(model, tokens, dtype=torch.bfloat16), compile=compile
    )
    step(torch.randint(0, 2048, (16, 129), generator=generator))
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13's compiler uses what torch 2.13 deprecates
@pytest.mark.parametrize(
    ("width", "rank", "compile"),
    [
        (128, 32, {"backend": "aot_eager"}),  # without the kernels, which take most of a minute to build
        *(
            pytest.param(*sizes, True, marks=pytest.mark.slow)
            for sizes in ((128, 32), (256, 16), (256, 32), (256, 64), (384, 96))
        ),
    ],
)
def test_a_compiled_step_in_bfloat16_has_the_gradients_of_the_eager_one(width: int, rank: int, compile: Any) -> None:
    eager, compiled = (gradients(rank, width=width, compile=how) for how in (False, compile))
    assert eager.keys() == compiled.keys()
    assert len(eager) == 2 * 7 + 5
    for name, gradient in eager.items():
        error = float((compiled[name] - gradient).norm() / gradient.norm())
        assert error < 0.03, f"{name}: {error}"  # two orders of rounding to 8 bits, through one layer
