"""Reading a text in pieces is reading it at once."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from relora_opt_cli.model import KeyValueCache, LinearRope, Llama, LlamaConfig, init_weights

TINY = LlamaConfig(97, 24, 40, 2, 4, max_position_embeddings=64, initializer_range=0.3)
VARIANTS = {
    "plain": TINY,
    "grouped": dataclasses.replace(TINY, num_key_value_heads=2),
    "wide heads": dataclasses.replace(TINY, head_dim=10, num_key_value_heads=1),
    "scaled rope": dataclasses.replace(TINY, rope_scaling=LinearRope(4.0), rope_theta=500.0),
}
LENGTH = 24


def drawn(config: LlamaConfig) -> Llama:
    model = Llama(config)
    init_weights(model, seed=3)
    return model.double()


def tokens(*, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))


def in_pieces(model: Llama, text: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    cache = KeyValueCache(model.config, capacity=text.shape[1])
    places = [0, *sorted(cuts), text.shape[1]]
    return torch.cat([model(text[:, start:end], cache) for start, end in pairwise(places)], dim=1)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@given(cuts=st.sets(st.integers(1, LENGTH - 1)))
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_a_text_read_in_any_pieces_gives_the_logits_of_reading_it_at_once(config: LlamaConfig, cuts: set[int]) -> None:
    model = drawn(config)
    # float64: 1e-10 is far above its rounding, and far below what one token more or less would change.
    torch.testing.assert_close(in_pieces(model, tokens(), list(cuts)), model(tokens()), rtol=0, atol=1e-10)


@torch.no_grad()
def test_what_was_read_matters_to_what_is_read_next() -> None:
    model, first, second = drawn(TINY), tokens(), tokens(seed=1)
    second[:, 12:] = first[:, 12:]
    ends = [in_pieces(model, text, [12])[:, 12:] for text in (first, second)]
    assert not torch.allclose(*ends, atol=1e-2)


@torch.no_grad()
def test_a_full_cache_refuses_more_and_says_how_much_it_held() -> None:
    model = drawn(TINY)
    cache = KeyValueCache(TINY, capacity=LENGTH)
    model(tokens(), cache)
    with pytest.raises(ValueError, match=r"1 tokens after 24 exceed the cache's capacity=24"):
        model(tokens()[:, :1], cache)


@torch.no_grad()
def test_the_cache_takes_the_dtype_of_the_model() -> None:
    model = drawn(TINY).bfloat16()
    cache = KeyValueCache(TINY, capacity=LENGTH)
    model(tokens(), cache)
    keys, values = cache.layers[0].extend(*(torch.empty(2, 4, 0, 6, dtype=torch.bfloat16) for _ in range(2)))
    assert (keys.dtype, keys.shape, values.shape) == (torch.bfloat16, (2, 4, LENGTH, 6), (2, 4, LENGTH, 6))
