"""The line that says what a run is going to do agrees with the schedule that it will have."""

from typing import Any

import pytest
from relora_opt_cli.build import make_schedule
from relora_opt_cli.plan import describe_plan
from relora_opt_cli.resolution import resolve


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "600 updates at rank 64, no warm start, no restart (--rank, "),
        ({"steps": 2000}, "2,000 updates at rank 64, no warm start, a restart every 501: 3 (--rank, "),
        ({"preset": "60m"}, "20,000 updates at rank 128, no warm start, a restart every 501: 39 (--rank, "),
        (
            {"warm_start": 30, "restart_every": 143},
            "600 updates at rank 64, 30 of them a warm start, a restart every 143: 3 (--rank, ",
        ),
        ({"rank": 0, "steps": 2000}, "2,000 updates at full rank (--rank says otherwise)"),
    ],
    ids=str,
)
def test_the_plan_is_a_line_with_every_length_that_was_derived(options: dict[str, Any], words: str) -> None:
    assert describe_plan(resolve(options)).startswith(words)


@pytest.mark.parametrize("warm_start", [0, 7])
@pytest.mark.parametrize("restart_every", [None, 0, 10, 12, 600])
def test_the_plan_counts_the_restarts_that_the_schedule_makes(warm_start: int, restart_every: int | None) -> None:
    config = resolve({"steps": 1607, "warm_start": warm_start, "restart_every": restart_every})
    num_restarts = sum(make_schedule(config).restarts_after(update) for update in range(1, config.steps + 1))
    words = f"a restart every {config.restart_every}: {num_restarts} (" if num_restarts else "no restart ("
    assert words in describe_plan(config)
