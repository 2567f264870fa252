"""The loss of a batch, the same in training and in evaluation: mean cross-entropy, in nats per predicted token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def batch_loss(model: nn.Module, tokens: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return the mean loss, a float32 scalar, of predicting every token but the first from those before it.

    Args:
        model: token ids (b, t) to logits (b, t, vocab_size).
        tokens: (b, t + 1) int64, on the model's device.
        dtype: of matrix products, by autocast; float32 leaves them as they are.
    """
    with torch.autocast(tokens.device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
