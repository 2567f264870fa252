"""A base optimizer with 8-bit state, torchao's AdamW8bit:  python examples/with_torchao.py

Restarts may forget any share of its state: what is kept is read as numbers and rounded to codes again.
"""

import torch
from torch import nn
from torchao.optim import AdamW8bit

from relora_opt import JaggedSchedule, ReLoRAOptimizer, memory, prune

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
teacher = nn.Linear(64, 64).to(device)
model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64)).to(device)
schedule = JaggedSchedule(restart_every=20, restart_warmup=4, warm_start=10)
options = {"rank": 16, "targets": ["0", "2"], "schedule": schedule, "lr": 3e-3}
optimizer = ReLoRAOptimizer(model, AdamW8bit, prune=prune.magnitude(0.9), **options)

for _ in range(65):
    x = torch.randn(32, 64, device=device)
    loss = nn.functional.mse_loss(model(x), teacher(x).detach())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

kinds = {type(value).__name__ for value in optimizer.state[model[0].weight]["B_state"].values()}
print(
    f"{optimizer.num_restarts} restarts, loss {loss.item():.4f}, {memory(optimizer).state_bytes} bytes, {sorted(kinds)}"
)
