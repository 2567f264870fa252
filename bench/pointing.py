"""What it costs to point A by the gradient, in steps: `python -m bench.pointing [WIDTH]`, one thread, medians.

functional path   two updates that sketch (two singular value decompositions of factors' gradients) and a restart
dense path        one singular value decomposition of every gradient, at the first update of a cycle
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from relora_opt_cli.model import Llama, LlamaConfig, init_weights

from relora_opt import JaggedSchedule, ReLoRAOptimizer

from .methods import is_matrix, loss_fn

_REPEATS = 7


def main(width: int) -> None:
    torch.set_num_threads(1)
    model = Llama(LlamaConfig(4096, width, width * 43 // 16, 4, 4, max_position_embeddings=128))
    init_weights(model, seed=0)
    batches = [torch.randint(0, 4096, (16, 129), generator=torch.Generator().manual_seed(i)) for i in range(5)]
    names = [name for name, _ in model.named_parameters() if is_matrix(name)]
    optimizer = ReLoRAOptimizer(
        model, rank=width // 4, targets=names, init="gradient", schedule=JaggedSchedule(0), lr=1e-3
    )
    step = optimizer.make_step(model, loss_fn, compile=False)
    for tokens in batches:
        step(tokens)
    times: dict[str, list[float]] = {key: [] for key in ("restart", "sketch", "step", "first", "later")}
    for _ in range(_REPEATS):
        times["restart"].append(_seconds(optimizer.restart))
        times["sketch"] += [_seconds(step, tokens) for tokens in batches[:2]]
        times["step"] += [_seconds(step, tokens) for tokens in batches[2:]]
        optimizer.restart()
        times["first"].append(_seconds(_dense_step, model, optimizer, batches[0]))
        times["later"] += [_seconds(_dense_step, model, optimizer, tokens) for tokens in batches[1:3]]
    median = {key: statistics.median(values) for key, values in times.items()}
    print(", ".join(f"{key} {value * 1e3:.0f} ms" for key, value in median.items()))
    functional = (median["restart"] + 2 * (median["sketch"] - median["step"])) / median["step"]
    print(f"width {width}, rank {width // 4}: a restart costs {functional:.2f} steps on the functional path, besides")
    print("two updates of its low-rank weights, and on the dense path", end=" ")
    print(f"{(median['restart'] + median['first'] - median['later']) / median['later']:.2f} steps")


def _dense_step(model: Llama, optimizer: ReLoRAOptimizer, tokens: torch.Tensor) -> None:
    loss_fn(model, tokens).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def _seconds(call: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("width", type=int, nargs="?", default=256)
    main(parser.parse_args().width)
