"""Draws follow the tempered softmax over the likeliest tokens, which transformers cuts off at the same places."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from relora_opt_cli.errors import UserError
from relora_opt_cli.sampling import Sampling
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

LOGITS = [0.0, 2.0, 1.0, -1.0]
NUM_DRAWS = 4000


def shares(logits: list[float], **options: Any) -> Tensor:
    """Return how often each token came in NUM_DRAWS draws."""
    sampling = Sampling(**{"top_k": 0, **options})
    generator = sampling.generator()
    tokens = torch.tensor([sampling.draw(torch.tensor(logits), generator) for _ in range(NUM_DRAWS)])
    return torch.bincount(tokens, minlength=len(logits)) / NUM_DRAWS


def transformers_shares(logits: list[float], *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Return the probabilities that transformers draws from."""
    warpers = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]
    if top_k:
        warpers.insert(1, TopKLogitsWarper(top_k))
    scores = torch.tensor([logits])
    for warper in warpers:
        scores = warper(None, scores)
    return scores[0].softmax(0)


def combinations() -> Iterator[Any]:
    """Yield all combinations; in the fast ones every two values meet once."""
    choices = [enumerate(values) for values in ([0.5, 1.0, 2.0], [0, 2, 100], [1.0, 0.9, 0.6])]
    for chosen in itertools.product(*choices):
        places, values = zip(*chosen, strict=True)
        yield pytest.param(*values, marks=pytest.mark.slow if sum(places) % 3 else ())


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [*combinations()])
def test_draws_follow_transformers_probabilities(temperature: float, top_k: int, top_p: float) -> None:
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    expected, seen = transformers_shares(LOGITS, **options), shares(LOGITS, **options)
    # Three standard deviations of a share of 4,000 draws are at most 0.024.
    torch.testing.assert_close(seen, expected, atol=0.024, rtol=0)
    assert (seen[expected == 0] == 0).all()


def test_draws_follow_the_tempered_softmax_itself() -> None:
    expected = (torch.tensor(LOGITS) / 1.5).softmax(0)
    torch.testing.assert_close(shares(LOGITS, temperature=1.5), expected, atol=0.024, rtol=0)


@given(
    logits=st.lists(st.integers(-60, 60).map(lambda number: number / 10), min_size=1, max_size=12, unique=True),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.05, 0.3, 0.7, 0.95, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)
def test_no_token_comes_that_transformers_excludes(logits: list[float], top_k: int, top_p: float, seed: int) -> None:
    sampling = Sampling(temperature=1.0, top_k=top_k, top_p=top_p, seed=seed)
    allowed = transformers_shares(logits, temperature=1.0, top_k=top_k, top_p=top_p) > 0
    generator = sampling.generator()
    assert all(allowed[sampling.draw(torch.tensor(logits), generator)] for _ in range(20))


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_no_temperature_and_nearly_none_take_the_likeliest(temperature: float) -> None:
    assert shares([0.0, 2.0, 1.0], temperature=temperature).tolist() == [0, 1, 0]


def test_the_smallest_top_p_leaves_the_likeliest() -> None:
    assert shares([0.0, 2.0, 1.0], temperature=100.0, top_p=1e-300).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0\.1 must be a number of at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_p": 0.0}, r"top_p=0\.0 must be above 0 and at most 1"),
        ({"top_p": 1.1}, r"top_p=1\.1 must be above 0"),
        ({"top_p": float("nan")}, r"top_p=nan must be above 0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seed": 1 << 64}, r"seed=18446744073709551616 must be at least 0 and below 2\^64"),
    ],
)
def test_bad_values_are_refused_by_name(option: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**option)
