"""How much memory a method takes: what it keeps beside the model's weights, what it sends, and a step's peak."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .costs import Shape


def state_bytes(trainer: Any, num_parameters: int) -> int:
    """Return the bytes that a trainer keeps beside the model's own parameters: state, and what else it trains."""
    added = sum(p.numel() for p in trainer.model.parameters()) - num_parameters  # PEFT's factors, in float32
    return sum(map(_bytes, _tensors(list(trainer.optimizer.state.values())))) + 4 * added


def sent_bytes(trainer: Any) -> int:
    """Return the bytes of the gradients of an update."""
    return sum(map(_bytes, trainer.trained()))


def kept_bytes(trainer: Any, shape: Shape, num_parameters: int) -> int:
    """Return the bytes of the selected weights in float32, of their factors, state and gradients."""
    num_rest = num_parameters - sum(m * n for m, n in shape.matrices)
    everything = 4 * num_parameters + state_bytes(trainer, num_parameters) + sent_bytes(trainer)
    return everything - 16 * num_rest  # weight, gradient and two moments, alike in all methods


def measure_peak(trainer: Any, source: Iterator[Tensor], device: str) -> int:
    """Return by how much a step raises memory above what it is between steps: allocated on a GPU, resident (Linux)."""
    for _ in range(2):  # compiling takes memory of its own, and state appears
        trainer.step(next(source))
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        trainer.step(next(source))
        return torch.cuda.max_memory_allocated() - allocated
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    trainer.step(next(source))
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):  # the projector of a package
        yield from _tensors(vars(value))
