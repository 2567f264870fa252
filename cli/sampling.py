"""How the next token is chosen from a model's logits.

    softmax(logits / temperature), over the `top_k` likeliest tokens, and of those over the fewest likeliest ones whose
    shares sum to `top_p` or more; temperature 0 takes the likeliest token

The order is that of transformers: temperature, top_k, top_p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UserError


@dataclass(frozen=True)
class Sampling:
    """What decides a draw. Checked at construction: UserError names the field.

    Args:
        temperature: at least 0; 0 is greedy, whatever the others say.
        top_k: choose among that many tokens; 0, or more than there are, means all.
        top_p: choose among the likeliest tokens that have this share together; above 0, and 1 means all.
        seed: of the draws, which are made on the CPU: the same on every device.
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(
                f"temperature={self.temperature} must be a number of at least 0: 0 takes the likeliest token"
            )
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} must be at least 0: 0 means all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1: 1 means all tokens")
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"seed={self.seed} must be at least 0 and below 2^64: choose another")

    def generator(self) -> torch.Generator:
        """Return a new source of draws: a text needs one, from its start to its end."""
        return torch.Generator().manual_seed(self.seed)

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """Return a token, given logits (vocab,) on the CPU, all of them finite."""
        if self.temperature == 0:
            return int(logits.argmax())
        values, tokens = logits.double().topk(min(self.top_k or len(logits), len(logits)))
        # Relative to the largest, so that a tiny temperature gives -inf and not nan.
        shares = ((values - values[0]) / self.temperature).softmax(0)
        if self.top_p < 1:
            shares = shares * (shares.cumsum(0) - shares < self.top_p)  # what comes before is not enough
        return int(tokens[torch.multinomial(shares, 1, generator=generator)])
