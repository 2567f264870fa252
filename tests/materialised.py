"""The oracle of factor gradients: the model with W_frozen + s B A formed as an ordinary tensor and differentiated.

Beside it, what the paths deliver: `factor_gradients(path, ...)` returns their dA and dB by parameter name. All is
checked in float64 at random non-zero B.
"""

from collections.abc import Callable
from typing import Any

import torch
from models import randomise_b
from torch import Tensor, nn

from relora_opt import ReLoRAOptimizer

TOLERANCE = 1e-9  # sums of a few dozen float64 products of size one

Gradients = dict[str, list[Tensor]]
Loss = Callable[[Any], Tensor]  # of anything that is called as the model is


def sgd(model: nn.Module, targets: Any, *, rank: int = 2) -> ReLoRAOptimizer:
    """Return plain SGD of rate 1, with which a step subtracts exactly the gradient; B is random, s = 1.5."""
    optimizer = ReLoRAOptimizer(model, torch.optim.SGD, rank=rank, alpha=1.5 * rank, targets=targets, lr=1.0)
    randomise_b(optimizer, list(low_rank_parameters(model, optimizer).values()))
    return optimizer


def low_rank_parameters(model: nn.Module, optimizer: ReLoRAOptimizer) -> dict[str, nn.Parameter]:
    selected = {id(p) for group in optimizer.param_groups if group["rank"] for p in group["params"]}
    return {name: p for name, p in model.named_parameters() if id(p) in selected}


def oracle(model: nn.Module, optimizer: ReLoRAOptimizer, loss_fn: Loss) -> Gradients:
    """Return the factor gradients of the model in which every selected weight is materialised."""
    replaced: dict[str, Tensor] = {}
    leaves: dict[str, list[Tensor]] = {}
    for name, p in low_rank_parameters(model, optimizer).items():
        A, B = leaves[name] = [factor.detach().clone().requires_grad_() for factor in optimizer.factors(p)]
        replaced[name] = optimizer.frozen_weight(p).detach() + 1.5 * (B @ A).view(p.shape)
    loss = loss_fn(lambda *args, **kwargs: torch.func.functional_call(model, replaced, args, kwargs))
    gradients = iter(torch.autograd.grad(loss, [leaf for pair in leaves.values() for leaf in pair]))
    return {name: [next(gradients), next(gradients)] for name in leaves}


def factor_gradients(path: str, model: nn.Module, optimizer: ReLoRAOptimizer, loss_fn: Loss) -> Gradients:
    """Return the factor gradients of a path; those of `dense` and `step` are read off what an update subtracts."""
    pairs = {name: optimizer.factors(p) for name, p in low_rank_parameters(model, optimizer).items()}
    if path == "functional":
        loss_fn(optimizer.functional(model)).backward()
        return {name: [factor.grad for factor in pair] for name, pair in pairs.items()}
    before = {name: [factor.detach().clone() for factor in pair] for name, pair in pairs.items()}
    if path == "dense":
        loss_fn(model).backward()
        optimizer.step()
    else:
        optimizer.make_step(model, loss_fn, compile=False)()
    return {name: [old - new.detach() for old, new in zip(before[name], pairs[name], strict=True)] for name in pairs}


def assert_equal_gradients(actual: Gradients, expected: Gradients) -> None:
    assert actual.keys() == expected.keys()
    assert expected
    for name, pair in expected.items():
        for factor, ours, theirs in zip("AB", actual[name], pair, strict=True):
            assert ours is not None, f"{name}: no gradient of {factor}"
            message = f"{name}: d{factor} is {ours}, not {theirs}"
            torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, msg=message)
