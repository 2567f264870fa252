"""Sharded runs (`--shard`): every process holds a part of the weights and of the optimizer's state (FSDP2).

    shard        a model whose processes each hold a part of every weight
    DenseStep    `step(tokens) -> loss` on it, on the dense path, as `make_step` gives on a whole model
    gather       weights and state as one process would hold them: what a checkpoint keeps
    WholeState   loads such a state into a sharded optimizer

Checkpoints are those of runs that are not sharded, so a run may go on either way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from relora_opt import Guard, ReLoRAOptimizer

from .model import Llama
from .parallel import World, noticing_losses

_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole on the first process, nothing elsewhere
_WHOLE = StateDictOptions(full_state_dict=True)


def shard(model: Llama, processes: World, *, compile: bool) -> None:
    """Shard the first process's model, layer by layer, in place; the others have one of its shape."""
    assert processes.group is not None
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), group=processes.group, group_src=0)
    mesh = DeviceMesh.from_group(processes.group, next(model.parameters()).device.type)
    for layer in model.model.layers:
        if compile:
            layer.compile()
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


class DenseStep:
    """One call, one micro-batch: forward and backward, and every `accumulate`-th time the update.

    An update that the guard refuses is skipped by all processes, uncounted.
    """

    def __init__(
        self,
        optimizer: ReLoRAOptimizer,
        model: Llama,
        loss_fn: Callable[..., Tensor],
        *,
        accumulate: int,
        guard: Guard,
        processes: World,
    ) -> None:
        self._optimizer, self._model, self._loss_fn = optimizer, model, loss_fn
        self._accumulate, self._guard, self._processes = accumulate, guard, processes
        self._losses: list[Tensor] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        """Train on one micro-batch of this process's share; return the detached loss."""
        loss = self._loss_fn(self._model, tokens)
        (loss / self._accumulate).backward()
        self._losses.append(loss.detach())
        if len(self._losses) == self._accumulate:
            (total,) = self._processes.sum(float(torch.stack(self._losses).mean()))
            self._guard.step(self._optimizer, total / self._processes.size)
            self._losses.clear()
            self._optimizer.zero_grad()
        return loss.detach()


def gather(model: Llama, optimizer: ReLoRAOptimizer) -> tuple[Llama, dict[str, Any]]:
    """Return the whole model and `optimizer.state_dict()` as a run that is not sharded has them.

    All processes must call; what all but the first get is of no use.
    """
    weights = get_model_state_dict(model, options=_GATHERED)
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_GATHERED)
    if not weights:
        return model, {}
    whole = Llama(model.config)
    whole.load_state_dict(weights)
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    return whole, {
        "state": {numbers[name]: entry for name, entry in state["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]
        ],
    }


class WholeState:
    """A sharded optimizer, to be loaded with the state that one process would hold."""

    def __init__(self, model: Llama, optimizer: ReLoRAOptimizer) -> None:
        self._model, self._optimizer = model, optimizer
        names = {id(p): name for name, p in model.named_parameters()}
        self._names = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that every process has read whole; each keeps its part.

        Raises:
            ValueError, KeyError: for a state that does not fit.
        """
        if not any(state_dict["state"].values()):  # torch finds no device in it; there is nothing to share out either
            self._optimizer.load_state_dict(state_dict)
            return
        first = state_dict["param_groups"][0]
        entries = {self._names[number]: entry for number, entry in state_dict["state"].items()}
        self._optimizer.set_clock(
            num_updates=first["num_updates"],
            num_restarts=first["num_restarts"],
            last_restart=first["last_restart"],
            fresh=[name for name, entry in entries.items() if "A" in entry and not entry["A_state"]],
        )
        groups = [
            {**group, "params": [self._names[number] for number in group["params"]]}
            for group in state_dict["param_groups"]
        ]
        named: Any = {"state": entries, "param_groups": groups}
        with noticing_losses():
            set_optimizer_state_dict(self._model, self._optimizer, named, options=_WHOLE)
