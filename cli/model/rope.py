"""Rotary positions: every pair of a head's channels is turned by an angle that grows with the token's position.

    angle(position, i) = position * scaling(theta ** (-2 i / head_size)),   i = 0 ... head_size / 2 - 1

Channel i is turned together with channel i + head_size / 2, Hugging Face's layout. `scaling` is one of the two ways
of stretching a model over longer texts that its Llamas use, or none.
"""

from __future__ import annotations

import math
import reprlib
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True)
class LinearRope:
    """Rotary scaling of type "linear": every frequency is divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        check_positive("factor", self.factor)

    def __call__(self, frequencies: Tensor) -> Tensor:
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Rope:
    """Rotary scaling of type "llama3": long wavelengths are divided by `factor`, short ones kept, a ramp in between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_positive(name, value)
        if self.high_freq_factor <= self.low_freq_factor:
            low, high = self.low_freq_factor, self.high_freq_factor
            raise UserError(f"high_freq_factor={high} must exceed low_freq_factor={low}: correct rope_scaling")

    def __call__(self, frequencies: Tensor) -> Tensor:
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def check_positive(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise UserError(f"{name}={reprlib.repr(value)} must be a positive finite number: correct the model's config")


def angles(positions: Tensor, *, head_size: int, theta: float, scaling: LinearRope | Llama3Rope | None) -> Tensor:
    """Return rotary angles (t, head_size / 2) of positions (t,), both in float32: positions do not fit 16 bits."""
    exponents = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size
    frequencies = 1.0 / theta**exponents
    return torch.outer(positions, frequencies if scaling is None else scaling(frequencies))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (b, heads, t, head_size) by angles whose cosines and sines are (t, head_size / 2); the dtype stays x's."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
