"""What a run is going to do, in a line: its lengths, most of which follow from others, before they take their time."""

from __future__ import annotations

from .config import Config


def describe_plan(config: Config) -> str:
    """Say how many updates a run makes, at which rank, and when it switches and restarts."""
    if config.rank == 0:
        return f"{config.steps:,} updates at full rank (--rank says otherwise)"
    first, every = config.warm_start + config.restart_every, config.restart_every
    num_restarts = len(range(first, config.steps + 1, every)) if every else 0
    warm_start = f"{config.warm_start:,} of them a warm start" if config.warm_start else "no warm start"
    restarts = f"a restart every {every:,}: {num_restarts:,}" if num_restarts else "no restart"
    return (
        f"{config.steps:,} updates at rank {config.rank}, {warm_start}, {restarts} "
        "(--rank, --warm-start and --restart-every say otherwise)"
    )
