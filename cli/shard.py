"""Sharded runs (`--shard`): every process holds a part of the weights and of the optimizer's state (FSDP2).

    shard        a model whose processes each hold a part of every weight
    DenseStep    `step(tokens) -> loss` on it, on the dense path, as `make_step` gives on a whole model
    read_state   reads of a saved optimizer what this process is to hold

Checkpoints are those of runs that are not sharded (shares.py), so a run may go on either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.tensor as sharded
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate

from relora_opt import Guard, ReLoRAOptimizer

from .model import Llama, LlamaConfig
from .parallel import World, noticing_losses
from .shares import read_shares


def shard(shape: LlamaConfig, device: torch.device, processes: World, *, compile: bool) -> Llama:
    """Return a model that is sharded layer by layer, and whole nowhere; its weights are still to be set."""
    assert processes.group is not None
    with torch.device("meta"):
        model = Llama(shape)
    mesh = DeviceMesh.from_group(processes.group, device.type)
    for layer in model.model.layers:
        if compile:
            layer.compile()
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.to_empty(device=device)


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


def read_state(
    path: Path, nested: Callable[[Mapping[str, Tensor]], Any], optimizer: ReLoRAOptimizer, processes: World
) -> dict[str, Tensor]:
    """Read the file of a saved optimizer's tensors, each process what it is to hold of them: all must call.

    Args:
        nested: gives `state_dict()` back as it was saved, from the tensors by their names in the file.
    """
    with safe_open(str(path), framework="pt") as file:
        saved = {name: torch.empty_like(file.get_tensor(name), device="meta") for name in file.keys()}  # noqa: SIM118
    parts = {id(tensor): part for tensor, part in _parts(nested(saved), optimizer)}
    tensors = {name: parts.get(id(tensor), torch.empty_like(tensor, device="cpu")) for name, tensor in saved.items()}
    with noticing_losses():  # or a process that is gone would be taken for a damaged file
        read_shares(tensors, path.parent, processes)
    return tensors


def _parts(state: dict[str, Any], optimizer: ReLoRAOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tensors of a state that are to be sharded, each with what is to hold its numbers.

    Whatever has the shape of a weight W or a factor lies as that does: W and B by rows, A in every process.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, W in enumerate(parameters):
        entry = state["state"].get(number, {})
        layouts = {W.shape: W.placements}
        if "A" in entry:
            layouts |= {entry["A"].shape: [Replicate()], entry["B"].shape: W.placements}
        for tensor in _tensors(entry):
            if tensor.shape in layouts:
                layout = {"device_mesh": W.device_mesh, "placements": layouts[tensor.shape]}
                yield tensor, sharded.empty(tensor.shape, dtype=tensor.dtype, **layout)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
