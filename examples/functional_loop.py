"""The functional path: no dense gradient of a low-rank weight is formed:  python examples/functional_loop.py"""

import torch
from torch import nn

from relora_opt import JaggedSchedule, ReLoRAOptimizer

torch.manual_seed(0)
teacher = nn.Linear(32, 32)
model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
schedule = JaggedSchedule(restart_every=20, restart_warmup=4)
optimizer = ReLoRAOptimizer(model, rank=8, targets=["0", "2"], schedule=schedule, lr=3e-3)


def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(model(x), teacher(x).detach())


# With make_step; compile=True, the default, is faster in long runs.
step = optimizer.make_step(model, loss_fn, compile=False, accumulate=2)
for _ in range(60):
    loss = step(torch.randn(32, 32))

# With a loop of one's own, in bfloat16.
f = optimizer.functional(model)
for _ in range(30):
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_fn(f, torch.randn(32, 32))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

assert model[0].weight.grad is None
print(f"{optimizer.num_updates} updates, {optimizer.num_restarts} restarts, loss {loss_fn(model, torch.eye(32)):.4f}")
