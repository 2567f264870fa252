"""`make_step` on several processes: only gradients of factors and unselected parameters travel, once an update:

torchrun --nproc-per-node 2 examples/step_processes.py
"""

import torch
import torch.distributed as dist
from torch import nn

from relora_opt import JaggedSchedule, ReLoRAOptimizer


def loss_fn(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(model(x), y)


def main() -> None:
    torch.manual_seed(0)  # the same weights on every rank
    teacher = nn.Linear(32, 32)
    model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
    schedule = JaggedSchedule(restart_every=20, restart_warmup=4, warm_start=10)
    optimizer = ReLoRAOptimizer(model, rank=8, targets=["0", "2"], schedule=schedule, lr=3e-3)
    step = optimizer.make_step(model, loss_fn, compile=False, process_group=dist.group.WORLD)

    data = torch.Generator().manual_seed(1 + dist.get_rank())  # each rank has data of its own
    for _ in range(60):  # the switch needs nothing from you: make_step looks after it
        x = torch.randn(32, 32, generator=data)
        loss = step(x, teacher(x).detach())

    first = model[0].weight.detach().clone()
    dist.broadcast(first, src=0)
    assert torch.equal(first, model[0].weight)  # every rank holds the same
    print(f"rank {dist.get_rank()}: {optimizer.num_restarts} restarts, loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    main()
    dist.destroy_process_group()
