"""The line that says what a run is going to do agrees with the schedule that it will have."""

from pathlib import Path
from typing import Any

import pytest
from documents import sentences, write
from relora_opt_cli.build import make_schedule
from relora_opt_cli.corpus import Settings, tokenize
from relora_opt_cli.plan import describe_idle, describe_plan, describe_texts
from relora_opt_cli.resolution import resolve


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {},
            "600 updates at rank 64, no warm start, no restart, at a rate of 0.001, 0.008 for what is no target (--",
        ),
        (
            {"steps": 2000, "rank": 8},
            "2,000 updates at rank 8, no warm start, a restart every 501: 3, at a rate of 0.001, 0.008 for ",
        ),
        (
            {"preset": "60m"},
            "20,000 updates at rank 128, no warm start, no restart, at a rate of 0.001, 0.001 for ",
        ),
        (
            {"warm_start": 30, "restart_every": 143},
            "600 updates at rank 64, 30 of them a warm start, a restart every 143: 3, at a rate of 0.001, 0.008 for ",
        ),
        (
            {"warm_start": 120, "warm_start_at": 240},
            "600 updates at rank 64, 120 of them a warm start after the first 240, ended by a restart, no other "
            "restart, at a rate of 0.001, ",
        ),
        (
            {"warm_start": 100, "warm_start_at": 50, "warm_start_turns": 4},
            "600 updates at rank 64, 400 of them a warm start in 4 turns of 100 after the first 50, each ended by a "
            "restart, no other restart, at a rate of 0.001, ",
        ),
        (
            {"warm_start": 100, "warm_start_turns": 4},
            "600 updates at rank 64, 400 of them a warm start in 4 turns of 100, all but the first ended by a restart, "
            "no other restart, at a rate of 0.001, ",
        ),
        ({"lr": 1e-3}, "600 updates at rank 64, no warm start, no restart, at a rate of 0.001, 0.001 for "),
        (
            {"rank": 0, "steps": 2000},
            "2,000 updates at full rank, at a rate of 0.001, 0.008 for what is no target (--rank, --lr and ",
        ),
        ({"rank": 0, "steps": 1}, "1 update at full rank, "),
    ],
    ids=str,
)
def test_the_plan_is_a_line_with_every_length_that_was_derived(options: dict[str, Any], words: str) -> None:
    assert describe_plan(resolve(options)).startswith(words)


@pytest.mark.parametrize(
    ("warm_start", "at", "turns"),
    [(0, 0, 1), (7, 0, 1), (7, 30, 1), (7, 36, 1), (7, 900, 1), (7, 0, 3), (7, 36, 3), (7, 900, 2)],
)
@pytest.mark.parametrize("restart_every", [None, 0, 10, 12, 600])
def test_the_plan_counts_the_restarts_that_the_schedule_makes(
    warm_start: int, at: int, turns: int, restart_every: int | None
) -> None:
    given: dict[str, Any] = {"warm_start": warm_start, "warm_start_at": at, "warm_start_turns": turns}
    given |= {"steps": 1607, "restart_every": restart_every, "rank": 8}
    config = resolve(given)
    num_restarts = sum(make_schedule(config).restarts_after(update) for update in range(1, config.steps + 1))
    none = "no other restart, at" if at or turns > 1 else "no restart, at"
    words = f"a restart every {config.restart_every}: {num_restarts}, at" if num_restarts else none
    assert words in describe_plan(config)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prune": "keep", "restart_warmup": 3}, "prune (no restart), restart_warmup (neither restart nor warm start)"),
        ({"warm_start": 9, "restart_warmup": 3, "prune": "keep"}, "prune (no restart)"),
        ({"rank": 0, "warm_start": 9, "warm_start_at": 5}, "warm_start (rank=0), warm_start_at (rank=0)"),
        ({"outer": "constant", "min_ratio": 0.5}, "min_ratio (outer=constant)"),
        ({"base": "sgd", "betas": [0.5, 0.99]}, "the second of betas (base=sgd)"),
        (
            {"rank": 0, "steps": 2000, "alpha": 32, "factor_lr": 2, "init": "kaiming", "prune": "keep"},
            "alpha (rank=0), factor_lr (rank=0), init (rank=0), prune (rank=0)",
        ),
        (
            {"rank": 0, "warm_start": 9, "restart_every": 50, "restart_warmup": 7},
            "warm_start (rank=0), restart_every (rank=0), restart_warmup (rank=0)",
        ),
    ],
    ids=str,
)
def test_options_that_were_given_and_cannot_count_are_named(options: dict[str, Any], words: str) -> None:
    assert describe_idle(resolve(options)) == f"without effect here: {words}"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 0},
        {"rank": 0, "steps": 20_000},
        {"rank": 0, "targets": "q_proj"},  # it says which weights train at lr
        {"restart_every": 100, "prune": "keep", "restart_warmup": 3, "factor_lr": 2, "alpha": 32, "init": "kaiming"},
        {"warm_start": 9, "restart_warmup": 3},
        {"base": "sgd", "betas": [0.5, 0.95]},
        {"outer": "constant"},
    ],
    ids=str,
)
def test_nothing_is_said_of_what_counts_or_was_not_given(options: dict[str, Any]) -> None:
    assert describe_idle(resolve(options)) is None


def test_what_is_read_is_a_line_with_documents_and_tokens_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = [write(tmp_path / "texts" / f"{i}.txt", text) for i, text in enumerate(sentences(2))]
    corpus = tokenize(texts, Settings(vocab_size=257), tmp_path / "out")
    sizes = [len(side) for side in (corpus.train, corpus.val)]
    words = f"{sizes[0]} tokens of 1 document for training, {sizes[1]} of 1 document held out"
    assert describe_texts(corpus) == words


@pytest.mark.parametrize("warm_start", [0, 3])
def test_where_the_place_of_a_warm_start_cannot_count_no_ramp_is_refused_for_it(warm_start: int) -> None:
    given = {"warm_start": warm_start, "warm_start_at": 5, "restart_every": 20, "restart_warmup": 10}
    config = resolve({"rank": 0, "steps": 40, **given})
    assert make_schedule(config)(7, last_restart=0) > 0.0
