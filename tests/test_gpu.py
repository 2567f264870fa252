"""On an accelerator: the same draws, the same training, a checkpoint that moves between devices. Run with -m gpu."""

import pytest
import torch
from models import batch, mlp, selected_weights
from torch import nn

from relora_opt import JaggedSchedule, ReLoRAOptimizer

pytestmark = pytest.mark.gpu


def _train(device: str, *, compile: bool, num_updates: int = 20) -> tuple[nn.Module, ReLoRAOptimizer]:
    model = mlp(torch.float64).to(device)
    schedule = JaggedSchedule(6, restart_warmup=2, warm_start=4)
    optimizer = ReLoRAOptimizer(
        model, torch.optim.AdamW, rank=2, alpha=2, schedule=schedule, max_grad_norm=1.0, lr=1e-2
    )
    step = optimizer.make_step(model, lambda model, x: model(x).square().mean(), compile=compile)
    for index in range(num_updates):
        step(batch(index, torch.float64)[0].to(device))
    return model, optimizer


@pytest.mark.parametrize("compile", [False, True])
def test_an_accelerator_trains_as_the_cpu_does(compile: bool) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None, "no accelerator: these tests need one"
    ours, _ = _train(str(device), compile=compile)
    theirs, _ = _train("cpu", compile=False)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-8, atol=1e-10)  # float64; other kernels over 20 updates of Adam


@pytest.mark.parametrize("options", [{"capturable": True}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("release_grads", [False, True])
def test_the_implementations_of_a_base_train_alike_there(options: dict[str, bool], release_grads: bool) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None, "no accelerator: these tests need one"
    runs = []
    for own in (options, {}):
        model = mlp(torch.float64).to(device)
        schedule = JaggedSchedule(6, restart_warmup=2, warm_start=4)
        optimizer = ReLoRAOptimizer(
            model, torch.optim.AdamW, rank=2, alpha=2, schedule=schedule, lr=1e-2, release_grads=release_grads, **own
        )
        for index in range(20):
            model(batch(index, torch.float64)[0].to(device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.num_restarts == 2
        runs.append(model.state_dict())
    # A capturable base counts its steps in float32 on the device, and corrects its moments by powers of that.
    rtol, atol = (1e-4, 1e-5) if "capturable" in options else (1e-8, 1e-10)
    for name, ours in runs[0].items():
        torch.testing.assert_close(ours, runs[1][name], rtol=rtol, atol=atol)


def test_a_state_moves_between_devices() -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None, "no accelerator: these tests need one"
    model, optimizer = _train("cpu", compile=False)
    moved, other = _train(str(device), compile=False, num_updates=1)
    moved.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for W, theirs in zip(selected_weights(moved).values(), selected_weights(model).values(), strict=True):
        for ours, cpu in zip(other.factors(W), optimizer.factors(theirs), strict=True):
            assert ours.device.type == device.type
            assert torch.equal(ours.cpu(), cpu)
