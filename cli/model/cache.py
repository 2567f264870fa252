"""Keys and values of the tokens that a model has read, so that a text that grows is not read again from its start.

    cache = KeyValueCache(config, capacity=100)
    logits = model(prompt, cache)   # (b, t) tokens
    logits = model(token, cache)    # (b, 1): the same numbers as model(prompt and token)[:, -1:]

Keys are stored turned by their positions. Those, and everything above the first layer, depend on all tokens before:
a cache is of one text from its first token on, and a text whose start is cut off needs a new one.
"""

from __future__ import annotations

from torch import Tensor

from .shape import LlamaConfig


class LayerCache:
    """Keys and values of one layer: (b, kv_heads, capacity, head_size), filled from the left."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._length = 0
        self._stored: tuple[Tensor, Tensor] | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (b, kv_heads, t, head_size), and return all keys and values so far."""
        if self._stored is None:  # only now batch, dtype and device are known
            shape = (*keys.shape[:2], self._capacity, keys.shape[3])
            self._stored = keys.new_empty(shape), values.new_empty(shape)
        start, self._length = self._length, self._length + keys.shape[2]
        for stored, new in zip(self._stored, (keys, values), strict=True):
            stored[:, :, start : self._length] = new
        stored_keys, stored_values = self._stored
        return stored_keys[:, :, : self._length], stored_values[:, :, : self._length]


class KeyValueCache:
    """What `Llama.forward` has read of a text, for at most `capacity` tokens.

    Args:
        config: the model's shape.
        capacity: tokens for which there is room, prompt included.
    """

    def __init__(self, config: LlamaConfig, *, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(config.num_hidden_layers)]
        self.capacity = capacity
        self.length = 0

    def advance(self, num_tokens: int) -> int:
        """Count tokens that are about to be read, and return the position of the first one."""
        position = self.length
        if position + num_tokens > self.capacity:
            raise ValueError(
                f"{num_tokens} tokens after {position} exceed the cache's capacity={self.capacity}: make a larger one"
            )
        self.length += num_tokens
        return position
