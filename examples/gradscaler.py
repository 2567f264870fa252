"""float16 autocast with a GradScaler, on the dense path:  python examples/gradscaler.py

The functional path refuses a scaler, which cannot reach its gradients: use bfloat16 autocast there, without one.
"""

import torch
from torch import nn

from relora_opt import JaggedSchedule, ReLoRAOptimizer

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
teacher = nn.Linear(32, 32).to(device)
model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)).to(device)
schedule = JaggedSchedule(restart_every=20, restart_warmup=4)
optimizer = ReLoRAOptimizer(model, rank=8, targets=["0", "2"], schedule=schedule, lr=3e-3)
scaler = torch.amp.GradScaler(device, init_scale=2.0**24)  # too large at first: updates are skipped, and not counted

for _ in range(70):
    x = torch.randn(32, 32, device=device)
    with torch.autocast(device, torch.float16):
        loss = nn.functional.mse_loss(model(x), teacher(x).detach())
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # the dense gradients; max_grad_norm= clips the factors'
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()

print(f"{optimizer.num_updates} updates of 70, {optimizer.num_restarts} restarts, loss {loss.item():.4f}")
