"""DistributedDataParallel around the model, dense path:  torchrun --nproc-per-node 2 examples/ddp.py"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from relora_opt import JaggedSchedule, ReLoRAOptimizer


def main() -> None:
    torch.manual_seed(0)
    teacher = nn.Linear(32, 32)
    model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
    wrapped = DistributedDataParallel(model)
    schedule = JaggedSchedule(restart_every=20, restart_warmup=4, warm_start=10)
    optimizer = ReLoRAOptimizer(wrapped, rank=8, targets=["0", "2"], schedule=schedule, lr=3e-3)

    torch.manual_seed(1 + dist.get_rank())  # each rank has data of its own
    for _ in range(60):
        x = torch.randn(32, 32)
        loss = nn.functional.mse_loss(wrapped(x), teacher(x).detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for mine in (*model.parameters(), *optimizer.factors(model[0].weight)):  # every rank holds, and has drawn, the same
        first = mine.detach().clone()
        dist.broadcast(first, src=0)
        assert torch.equal(first, mine)
    print(f"rank {dist.get_rank()}: {optimizer.num_restarts} restarts, loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    main()
    dist.destroy_process_group()
