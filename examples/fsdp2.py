"""FSDP2 on the dense path, saved and loaded by torch.distributed.checkpoint:

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from relora_opt import JaggedSchedule, ReLoRAOptimizer


def main(folder: str, stop: int, clock: dict | None) -> dict:
    model = fully_shard(nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)))
    schedule = JaggedSchedule(restart_every=20, restart_warmup=4, warm_start=10)
    optimizer = ReLoRAOptimizer(model, rank=8, targets=["0", "2"], schedule=schedule, max_grad_norm=1.0, lr=3e-3)
    if clock is not None:  # go on, on any number of ranks: the clock gives the state the form of the saved one
        optimizer.set_clock(**clock)
        state = dict(zip("mo", get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["m"], optim_state_dict=state["o"])
    while optimizer.num_updates < stop:
        (loss := nn.functional.mse_loss(model(x := torch.randn(32, 32)), x.flip(1))).backward()
        optimizer.step()
        optimizer.zero_grad()
    dcp.save(dict(zip("mo", get_state_dict(model, optimizer), strict=True)), checkpoint_id=f"{folder}{stop}")
    print(f"{optimizer.num_restarts} restarts, A {optimizer.factors(model[0].weight)[0].placements}, {loss=:.3f}")
    return optimizer.clock


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    dist.broadcast_object_list(folder := [tempfile.mkdtemp()])
    main(f"{folder[0]}/35", 70, main(f"{folder[0]}/", 35, None))
    dist.destroy_process_group()
