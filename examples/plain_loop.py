"""The loop that you have, with accumulation, clipping and a scheduler of torch:  python examples/plain_loop.py"""

import torch
from torch import nn

from relora_opt import JaggedSchedule, ReLoRAOptimizer

STEPS = 60

torch.manual_seed(0)
teacher = nn.Linear(32, 32)
model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
optimizer = ReLoRAOptimizer(
    model,
    torch.optim.AdamW,
    rank=8,
    targets=["0", "2"],  # the last layer is no output head here
    schedule=JaggedSchedule(restart_every=20, restart_warmup=4, warm_start=10),
    max_grad_norm=1.0,  # clips factors and dense gradients together
    lr=3e-3,
)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)  # restarts ramp what it sets

for step in range(STEPS):
    for _ in range(2):  # two micro-batches an update
        x = torch.randn(32, 32)
        loss = nn.functional.mse_loss(model(x), teacher(x).detach()) / 2
        loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        print(f"update {step + 1}: loss {2 * loss.item():.4f}, rate {optimizer.last_lr()[0]:.2e}")

print(f"{optimizer.num_updates} updates, {optimizer.num_restarts} restarts")
