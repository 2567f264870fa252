"""DistributedDataParallel around the model, dense path:  torchrun --nproc-per-node 2 examples/ddp.py"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from relora_opt import JaggedSchedule, ReLoRAOptimizer

dist.init_process_group("gloo")  # "nccl" on GPUs
torch.manual_seed(0)
teacher = nn.Linear(32, 32)
model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
wrapped = DistributedDataParallel(model)
schedule = JaggedSchedule(restart_every=20, restart_warmup=4, warm_start=10)
optimizer = ReLoRAOptimizer(wrapped, rank=8, alpha="matched", targets=["0", "2"], schedule=schedule, lr=3e-3)

torch.manual_seed(1 + dist.get_rank())  # each rank has data of its own
for _ in range(60):
    x = torch.randn(32, 32)
    loss = nn.functional.mse_loss(wrapped(x), teacher(x).detach())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

# Every rank has drawn the same factors, and holds the same weights.
first = [p.detach().clone() for p in (*model.parameters(), *optimizer.factors(model[0].weight))]
for tensor, mine in zip(first, (*model.parameters(), *optimizer.factors(model[0].weight)), strict=True):
    dist.broadcast(tensor, src=0)
    assert torch.equal(tensor, mine)
print(f"rank {dist.get_rank()}: {optimizer.num_restarts} restarts, loss {loss.item():.4f}", flush=True)
dist.destroy_process_group()
