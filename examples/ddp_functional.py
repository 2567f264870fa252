"""DDP around the functional model communicates factors and unselected parameters alone:

torchrun --nproc-per-node 2 examples/ddp_functional.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from relora_opt import JaggedSchedule, ReLoRAOptimizer


def main() -> None:
    torch.manual_seed(0)
    teacher = nn.Linear(32, 32)
    model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
    schedule = JaggedSchedule(restart_every=20, restart_warmup=4, warm_start=10)
    optimizer = ReLoRAOptimizer(model, rank=8, targets=["0", "2"], schedule=schedule, lr=3e-3)
    functional = optimizer.functional(model)
    wrapped = DistributedDataParallel(functional)

    data = torch.Generator().manual_seed(1 + dist.get_rank())  # each rank has data of its own
    for _ in range(60):
        x = torch.randn(32, 32, generator=data)
        loss = nn.functional.mse_loss(wrapped(x), teacher(x).detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.schedule.changes_after(optimizer.num_updates):  # other parameters are trained from here on
            wrapped = DistributedDataParallel(functional)
    numbers = [sum(p.numel() for p in each.parameters()) for each in (functional, model)]
    print(f"rank {dist.get_rank()}: {numbers[0]} of {numbers[1]} numbers an update, loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    main()
    dist.destroy_process_group()
