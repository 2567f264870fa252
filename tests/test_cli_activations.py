"""Activations that are computed again are the same ones, and take less room while they wait."""

import pytest
import torch
import torch.nn.functional as F
from relora_opt_cli.model import Llama, LlamaConfig, init_weights
from torch import Tensor, nn

from relora_opt import ReLoRAOptimizer

TOKENS = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(0))


def llama(*, checkpoints: bool) -> Llama:
    model = Llama(LlamaConfig(64, 32, 96, 3, 2, max_position_embeddings=16))
    init_weights(model, seed=0)
    model.model.checkpoints_activations = checkpoints
    return model


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def trained(model: Llama, *, compile: bool) -> dict[str, Tensor]:
    optimizer = ReLoRAOptimizer(model, torch.optim.AdamW, rank=4, lr=1e-2)
    step = optimizer.make_step(model, loss_of, compile=compile)
    for _ in range(3):
        step(TOKENS)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def kept_bytes(model: Llama) -> int:
    """Bytes that autograd keeps for the backward pass, the parameters left out."""
    parameters, kept = {p.data_ptr() for p in model.parameters()}, {}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in parameters:
            kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = loss_of(model, TOKENS)
    loss.backward()
    return sum(kept.values())


def test_gradients_are_the_same_bit_for_bit() -> None:
    models = [llama(checkpoints=checkpoints) for checkpoints in (False, True)]
    for model in models:
        loss_of(model, TOKENS).backward()
    for plain, checkpointed in zip(*(model.parameters() for model in models), strict=True):
        assert plain.grad is not None
        assert torch.equal(plain.grad, checkpointed.grad)


def test_training_is_the_same_bit_for_bit() -> None:
    plain, checkpointed = (trained(llama(checkpoints=own), compile=False) for own in (False, True))
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_less_is_kept_for_the_backward_pass() -> None:
    assert kept_bytes(llama(checkpoints=True)) < kept_bytes(llama(checkpoints=False)) / 3


def test_evaluation_checkpoints_nothing() -> None:
    model = llama(checkpoints=True).eval()
    assert kept_bytes(model) == kept_bytes(llama(checkpoints=False))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13's compiler uses what torch 2.13 deprecates
def test_a_compiled_step_moves_every_low_rank_weight_as_an_eager_one_does() -> None:
    eager, compiled = (trained(llama(checkpoints=True), compile=own) for own in (False, True))
    before = dict(llama(checkpoints=True).named_parameters())
    for name in eager:
        assert not torch.equal(compiled[name], before[name]), name
        torch.testing.assert_close(compiled[name], eager[name], rtol=0, atol=2e-4)
