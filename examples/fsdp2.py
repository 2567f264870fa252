"""FSDP2 on the dense path, saved and loaded by torch.distributed.checkpoint:

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from relora_opt import JaggedSchedule, ReLoRAOptimizer

dist.init_process_group("gloo")  # "nccl" on GPUs
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
teacher = nn.Linear(32, 32)
for attempt in range(2):  # the second one goes on where the first one stopped; on any number of ranks, or on one
    model = fully_shard(nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)))
    schedule = JaggedSchedule(restart_every=20, restart_warmup=4, warm_start=10)
    optimizer = ReLoRAOptimizer(model, rank=8, targets=["0", "2"], schedule=schedule, max_grad_norm=1.0, lr=3e-3)
    if attempt:
        optimizer.set_clock(num_updates=35, num_restarts=1, last_restart=30)  # the form that the saved state has
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=folder[0])
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    while optimizer.num_updates < 35 * (attempt + 1):
        x = torch.randn(32, 32)
        loss = nn.functional.mse_loss(model(x), teacher(x).detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=folder[0])
A, B = optimizer.factors(model[0].weight)
print(f"rank {os.environ['RANK']}: A {A.placements}, B {B.placements}, loss {loss.item():.4f}", flush=True)
dist.destroy_process_group()
