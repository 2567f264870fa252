"""Accelerate:  python examples/with_accelerate.py, or in two processes on a CPU (accelerate launch --cpu starts one):

ACCELERATE_USE_CPU=1 torchrun --nproc-per-node 2 examples/with_accelerate.py
"""

import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from relora_opt import JaggedSchedule, ReLoRAOptimizer

torch.manual_seed(0)
teacher = nn.Linear(32, 32)
model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
schedule = JaggedSchedule(restart_every=20, restart_warmup=4, warm_start=10)
optimizer = ReLoRAOptimizer(model, rank=8, targets=["0", "2"], schedule=schedule, lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)  # Accelerate makes a step of it for each process
x = torch.randn(3840, 32)
loader = DataLoader(TensorDataset(x, teacher(x).detach()), batch_size=32, shuffle=True)

accelerator = Accelerator(gradient_accumulation_steps=2)
model, prepared, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
for x, y in loader:
    with accelerator.accumulate(model):
        loss = nn.functional.mse_loss(model(x), y)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)  # dense gradients; max_grad_norm= clips the factors'
        prepared.step()
        scheduler.step()
        prepared.zero_grad()

accelerator.save_state(tempfile.mkdtemp())  # and load_state, to go on
counts = f"{accelerator.num_processes} processes, {optimizer.num_updates} updates, {optimizer.num_restarts} restarts"
accelerator.print(f"{counts}, loss {loss.item():.4f}")
accelerator.end_training()
