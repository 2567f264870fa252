"""W goes with its factors whatever moves them: a base that writes to factors without gradients, in any way."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relora_opt import JaggedSchedule, ReLoRAOptimizer


class PullsBack(torch.optim.SGD):
    """SGD that pulls every parameter halfway back to where it began, whether it has a gradient or not."""

    def write(self, p: Tensor, value: Tensor) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.detach().clone())
                self.write(p, slow.lerp(p, 0.5))


class ByCopy(PullsBack):
    def write(self, p: Tensor, value: Tensor) -> None:
        p.copy_(value)


class ByData(PullsBack):
    def write(self, p: Tensor, value: Tensor) -> None:
        p.data.copy_(value)


class ByNewData(PullsBack):
    def write(self, p: Tensor, value: Tensor) -> None:
        p.data = value.clone()


def two_layers(base: type[torch.optim.Optimizer]) -> tuple[nn.ModuleDict, ReLoRAOptimizer]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(6, 5), "idle": nn.Linear(6, 5)}).double()
    schedule = JaggedSchedule(0)
    return model, ReLoRAOptimizer(model, base, rank=2, lr=0.01, targets=["used", "idle"], schedule=schedule)


def train(model: nn.ModuleDict, optimizer: ReLoRAOptimizer, names: list[str]) -> None:
    x = torch.ones(3, 6, dtype=torch.float64)
    torch.stack([model[name](x).square().sum() for name in names]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("base", [ByCopy, ByData, ByNewData], ids=lambda base: base.__name__)
def test_w_goes_with_factors_that_a_base_moves_without_gradients_however_it_writes(base: type[PullsBack]) -> None:
    model, optimizer = two_layers(base)
    for _ in range(3):
        train(model, optimizer, ["used", "idle"])
    frozen = {name: optimizer.frozen_weight(model[name].weight) for name in model}
    before = model["idle"].weight.detach().clone()
    for _ in range(4):
        train(model, optimizer, ["used"])
    for name in model:
        torch.testing.assert_close(optimizer.frozen_weight(model[name].weight), frozen[name], rtol=0, atol=1e-14)
    assert not torch.allclose(model["idle"].weight, before, rtol=0, atol=1e-4)
