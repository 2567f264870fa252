"""Averages of weights (EMA here, SWA alike) and torch.compile around the model:  python examples/ema.py

The model's parameters are the effective weights at every moment, so an average of them needs no merging.
"""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from relora_opt import JaggedSchedule, ReLoRAOptimizer

torch.manual_seed(0)
teacher = nn.Linear(32, 32)
model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
compiled = torch.compile(model, backend="aot_eager")  # leave the backend out for speed
schedule = JaggedSchedule(restart_every=20, restart_warmup=4, warm_start=10)
optimizer = ReLoRAOptimizer(compiled, rank=8, targets=["0", "2"], schedule=schedule, lr=3e-3)

for _ in range(100):
    x = torch.randn(32, 32)
    loss = nn.functional.mse_loss(compiled(x), teacher(x).detach())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    average.update_parameters(model)

x = torch.randn(512, 32)
for name, each in (("model", model), ("average", average)):
    print(f"{name}: loss {nn.functional.mse_loss(each(x), teacher(x)).item():.4f}")
