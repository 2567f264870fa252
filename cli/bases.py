"""The base optimizers that `--base` names, as factories groups -> Optimizer.

adamw   torch.optim.AdamW with the betas and the weight decay
sgd     torch.optim.SGD whose momentum is the first beta
muon    Muon for the selected weights and their factors beside AdamW for the rest (relora_opt.muon_beside_adamw)

AdamW's update is one kernel where torch has one, on CPUs and CUDA: on a CPU it takes a fifth of the time of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.optim import SGD, AdamW, Optimizer

from relora_opt import muon_beside_adamw

from .config import Config


def base_optimizer(config: Config, device: torch.device) -> Callable[..., Optimizer]:
    """Return the factory of the base optimizer that a configuration names, for parameters on a device."""
    fused = True if device.type in ("cpu", "cuda") else None
    if config.base == "sgd":
        return partial(SGD, momentum=config.betas[0], weight_decay=config.weight_decay)
    if config.base == "muon":
        return muon_beside_adamw(betas=config.betas, weight_decay=config.weight_decay, fused=fused)
    return partial(AdamW, betas=config.betas, weight_decay=config.weight_decay, fused=fused)
