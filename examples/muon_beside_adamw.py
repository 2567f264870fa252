"""Muon for the factors, AdamW for everything else, as one optimizer:  python examples/muon_beside_adamw.py

Muon takes matrices alone, and factors are matrices. Each optimizer has its parameters; a scheduler drives each.
"""

import torch
from torch import nn

from relora_opt import JaggedSchedule, ReLoRAOptimizer, default_targets

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32), nn.LayerNorm(32))
model.append(nn.Linear(32, 64))
names = [name for name in default_targets(model) if name != "5.weight"]  # the head stays dense
matrices = [(name, p) for name, p in model.named_parameters() if name in names]
others = [p for name, p in model.named_parameters() if name not in names]

schedule = JaggedSchedule(restart_every=25, restart_warmup=5)
muon = ReLoRAOptimizer(matrices, torch.optim.Muon, rank=8, targets=names, schedule=schedule, lr=0.02, weight_decay=0.0)
adamw = torch.optim.AdamW(others, lr=3e-3)

for step in range(100):
    tokens = torch.randint(0, 64, (16, 24))
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), (5 * tokens + 1).flatten() % 64)
    loss.backward()
    for optimizer in (muon, adamw):
        optimizer.step()
        optimizer.zero_grad()
    if step % 25 == 24:
        print(f"update {step + 1}: loss {loss.item():.4f}, restarts {muon.num_restarts}")
