"""Muon for the factors, AdamW for everything else, as one base optimizer:  python examples/muon_beside_adamw.py

Muon takes matrices alone, and factors are matrices. One rate suits both: Muon's updates are given AdamW's size.
"""

import torch
from torch import nn

from relora_opt import JaggedSchedule, ReLoRAOptimizer, muon_beside_adamw

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32), nn.LayerNorm(32))
model.append(nn.Linear(32, 64))
optimizer = ReLoRAOptimizer(
    model,
    muon_beside_adamw(weight_decay=0.0),
    rank=8,
    targets=["1", "3"],  # the head stays dense
    schedule=JaggedSchedule(restart_every=25, restart_warmup=5),
    lr=1e-2,
)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)  # drives both

for step in range(100):
    tokens = torch.randint(0, 64, (16, 24))
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), (5 * tokens + 1).flatten() % 64)
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if step % 25 == 24:
        print(f"update {step + 1}: loss {loss.item():.4f}, restarts {optimizer.num_restarts}")
