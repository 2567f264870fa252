"""How time and memory of a step grow with rank, width, tokens and layers, beside what the formulas predict.

    python -m bench.scaling                    all four, float32, eager
    python -m bench.scaling --axes rank width --dtype bfloat16

One number varies at a time around a Llama of width 512, 4 layers, rank 32 and 1024 tokens a step. At every point
full-rank AdamW and the functional path take turns in one process. An exponent is the slope of log(y) over log(x), by
least squares; the predicted one is that of the operations, or the bytes, of costs.py over the same points. Prints a
table and writes results/scaling-*.json and its picture.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from relora_opt_cli.machine import keep_freed_memory

from .contenders import CONTENDERS, batches
from .costs import Shape, flops, kept
from .footprint import kept_bytes
from .step import RESULTS, alternate, environment, set_up

_BASE, _RANK, _SEQ_LEN = Shape(512, 1360, 4, 4096, 4, 256), 32, 256
AXES: dict[str, tuple[int, ...]] = {
    "rank": (8, 16, 32, 64, 128),
    "width": (256, 384, 512, 768, 1024),
    "tokens": (512, 1024, 2048, 4096),
    "layers": (1, 2, 4, 8),
}


@dataclass(frozen=True)
class Point:
    """What was measured at one place of an axis.

    Args:
        value: of what varies.
        seconds, full_seconds: medians of a step on the functional path, and of full-rank AdamW's.
        kept_bytes: what the selected weights keep: themselves, factors, state and gradients.
        flops, predicted_bytes: what costs.py says of them.
    """

    value: int
    seconds: float
    full_seconds: float
    kept_bytes: int
    flops: int
    predicted_bytes: int


def place(axis: str, value: int) -> tuple[Shape, int]:
    """Return the model and the rank at a place of an axis."""
    if axis == "rank":
        return _BASE, value
    if axis == "width":
        return replace(_BASE, width=value, inner=round(value * 8 / 3 / 16) * 16), _RANK
    if axis == "tokens":
        return replace(_BASE, batch_size=value // _SEQ_LEN), _RANK
    return replace(_BASE, num_layers=value), _RANK


def measure(axis: str, value: int, *, dtype: torch.dtype, repeats: int) -> Point:
    shape, rank = place(axis, value)
    trainers = {key: CONTENDERS[key].build(shape, rank, dtype) for key in ("full-eager", "ours-eager")}
    num_parameters = sum(p.numel() for p in trainers["full-eager"].model.parameters())
    times = alternate({key: trainer.step for key, trainer in trainers.items()}, batches(shape), repeats)
    full, ours = (statistics.median(times[key]) for key in trainers)
    return Point(
        value,
        ours,
        full,
        kept_bytes(trainers["ours-eager"], shape, num_parameters),
        flops("functional", shape, rank),
        kept(shape, rank),
    )


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the slope of log(y) over log(x), by least squares."""
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def exponents(points: Sequence[Point]) -> dict[str, float]:
    """Return the fitted and predicted exponents of an axis."""
    xs = [point.value for point in points]
    ys = {
        "time": [point.seconds for point in points],
        "time, predicted": [point.flops for point in points],
        "full rank's time": [point.full_seconds for point in points],
        "memory": [point.kept_bytes for point in points],
        "memory, predicted": [point.predicted_bytes for point in points],
    }
    return {name: exponent(xs, values) for name, values in ys.items()}


def table(found: dict[str, list[Point]]) -> str:
    lines = []
    for axis, points in found.items():
        lines.append(f"{axis:>8} {'ms':>8} {'full ms':>8} {'ratio':>6} {'kept MB':>8} {'GFLOP':>8}")
        for point in points:
            lines.append(
                f"{point.value:8} {1000 * point.seconds:8.1f} {1000 * point.full_seconds:8.1f} "
                f"{point.full_seconds / point.seconds:6.3f} {point.kept_bytes / 1e6:8.1f} {point.flops / 1e9:8.1f}"
            )
        fitted = ", ".join(f"{name} {value:.2f}" for name, value in exponents(points).items())
        lines.append(f"exponents: {fitted}\n")
    return "\n".join(lines)


def draw(found: dict[str, list[Point]], title: str, path: Path) -> None:
    """Draw time and memory over every axis, logarithmic, with the predictions through their middle points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, len(found), figsize=(3.2 * len(found), 5.6), layout="constrained", squeeze=False)
    for column, (axis, points) in enumerate(found.items()):
        xs, fitted = [point.value for point in points], exponents(points)
        rows = (
            ("time", [1000 * p.seconds for p in points], [p.flops for p in points], "ms"),
            ("memory", [p.kept_bytes / 1e6 for p in points], [p.predicted_bytes for p in points], "kept, MB"),
        )
        for axes, (name, measured, predicted, unit) in zip(grid[:, column], rows, strict=True):
            factor = statistics.median(m / p for m, p in zip(measured, predicted, strict=True))
            axes.plot(xs, [factor * p for p in predicted], color="#c2410c", linewidth=1, label="predicted")
            axes.plot(xs, measured, "o", color="#1d4ed8", label="measured")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(xs, [str(x) for x in xs])
            ends = sorted({min(measured), max(measured)})
            axes.set_yticks(ends, [f"{end:.0f}" for end in ends])
            axes.minorticks_off()
            axes.set_title(f"exponent {fitted[name]:.2f}, predicted {fitted[f'{name}, predicted']:.2f}", fontsize=9)
            axes.set_xlabel(axis)
            axes.spines[["top", "right"]].set_visible(False)
            if not column:
                axes.set_ylabel(unit)
    grid[0, 0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    set_up(arguments.threads, arguments.dtype)
    keep_freed_memory()
    dtype, found = getattr(torch, arguments.dtype), {}
    for axis in arguments.axes:
        found[axis] = [measure(axis, value, dtype=dtype, repeats=arguments.repeats) for value in AXES[axis]]
        print(table({axis: found[axis]}), flush=True)
    result = {"command": sys.argv[1:], "environment": environment(arguments.threads), "base": asdict(_BASE)}
    result["points"] = {axis: [asdict(point) for point in points] for axis, points in found.items()}
    result["exponents"] = {axis: exponents(points) for axis, points in found.items()}
    RESULTS.mkdir(exist_ok=True)
    name = f"scaling-{arguments.dtype}"
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(found, f"A step on the functional path, {arguments.dtype}: what varies is below", RESULTS / f"{name}.png")
    print(f"written: results/{name}.json and .png")


if __name__ == "__main__":
    main()
