"""Does low rank learn as well as full rank? Runs of many methods, resumable and unattended, and their tables.

    python -m bench.convergence run PLAN ...     make the runs of these plans that have no result yet
    python -m bench.convergence report           write results/convergence.md and its picture from what is there
    python -m bench.convergence plans            say what there is and how much of it is done

A run is a file in results/convergence/: what was asked for, the validation losses on the way, the time, the machine. It
is written when the run ends, so a bench that was stopped goes on where it was. Every worker is a process with one
thread; with `--device cuda` they share an accelerator. The same run ends within rounding of itself on another device.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "convergence"


@dataclass(frozen=True)
class Size:
    """A Llama of 4 layers and 4 heads, and its batches of 16 sequences."""

    width: int
    inner: int
    vocab_size: int
    seq_len: int = 128
    batch_size: int = 16


SIZES = {
    "w128": Size(128, 344, 2048),
    "w256": Size(256, 688, 4096),
    "w512": Size(512, 1376, 4096),
}
TUNING_SEED = 0  # of grids and trials; confirmations have others
_SHAPE = ("width", "inner")  # of a smaller model, among a spec's settings
_NUM_EVALUATIONS = 10


@dataclass(frozen=True)
class Spec:
    """One run. `name` is what tables call the method; `method` and `settings` are what is run."""

    name: str
    method: str
    settings: dict[str, Any]
    size: str
    text: str
    steps: int
    seed: int

    @property
    def path(self) -> Path:
        """The result's file: named for people, and by a digest of everything that decides the result."""
        decisive = {key: value for key, value in asdict(self).items() if key != "name"}
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
        return RESULTS / f"{self.size}-{self.text}-{self.steps}-{self.method}-s{self.seed}-{digest}.json"


def run(spec: Spec, *, device: str = "cpu", compile: bool = True) -> dict[str, Any]:
    """Train as a spec says; return the result."""
    import torch

    from . import methods, variants
    from .texts import batches_of

    torch.set_num_threads(1)
    torch.compiler.reset()  # a worker makes many runs, each with a model of its own
    size = SIZES[spec.size]
    model = new_model(replace(size, **{key: spec.settings[key] for key in _SHAPE if key in spec.settings}), spec.seed)
    model.to(device)
    num_parameters = model.num_parameters()
    batches, held_out, num_tokens = batches_of(size, spec.text, spec.seed)
    validation = [tokens.to(device) for tokens in held_out]
    settings = {key: value for key, value in spec.settings.items() if key not in _SHAPE}
    trainer = {**methods.METHODS, **variants.METHODS}[spec.method](
        model, {"compile": compile, **settings}, spec.steps, spec.seed
    )
    curve: list[tuple[int, float]] = []
    losses: list[float] = []
    seconds = 0.0
    every = max(1, spec.steps // _NUM_EVALUATIONS)
    for begin in range(0, spec.steps, every):
        updates = range(begin, min(begin + every, spec.steps))
        start = time.monotonic()
        new = [trainer.step(batches.batch(update).to(device)) for update in updates]
        losses += torch.stack(new).tolist()  # waits for the device
        seconds += time.monotonic() - start
        held = torch.stack([trainer.evaluate(tokens) for tokens in validation])
        curve.append((updates[-1] + 1, float(held.mean())))
    return {
        "spec": asdict(spec),
        "val_loss": curve[-1][1],
        "curve": curve,
        "train_loss": [round(loss, 4) for loss in losses],
        "seconds": round(seconds, 1),
        "num_parameters": num_parameters,
        "num_trainable": trainer.num_trainable,
        "num_tokens": num_tokens,
        "environment": environment(device, is_compiled=compile),
    }


def new_model(size: Size, seed: int) -> Any:
    """Return a Llama of a size with the weights of a seed."""
    from relora_opt_cli.model import Llama, LlamaConfig, init_weights

    config = LlamaConfig(size.vocab_size, size.width, size.inner, 4, 4, max_position_embeddings=size.seq_len)
    model = Llama(config)
    init_weights(model, seed=seed)
    return model


def environment(device: str, *, is_compiled: bool, dtype: str = "bfloat16 autocast") -> dict[str, Any]:
    """Return what a result must say of where it was made."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip() or os.environ.get("BENCH_COMMIT", "unknown"),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "threads": 1,
        "machine": platform.machine() if device == "cpu" else torch.cuda.get_device_name(),
        "dtype": dtype,
        "compiled": is_compiled,
    }


def run_all(specs: list[Spec], *, workers: int, device: str = "cpu", compile: bool = True) -> int:
    """Make the runs without a result, in so many processes; return how many failed."""
    from .texts import source

    RESULTS.mkdir(parents=True, exist_ok=True)
    for text, size in {(spec.text, spec.size) for spec in specs}:
        source(text, SIZES[size].vocab_size)  # written once, before several processes want it
    unique = {spec.path: spec for spec in specs}
    missing = [spec for path, spec in unique.items() if not path.is_file()]
    print(f"{len(unique)} runs, {len(missing)} to make, {workers} at a time", flush=True)
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TORCHINDUCTOR_COMPILE_THREADS="1")
    num_failed = 0
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        made = [pool.submit(_make, spec, device=device, compile=compile) for spec in missing]
        for line in (future.result() for future in as_completed(made)):
            num_failed += line.startswith("FAILED")
            print(line, flush=True)
    return num_failed


def _make(spec: Spec, *, device: str, compile: bool) -> str:
    """Make a run and write its result; return a line about it."""
    start = time.monotonic()
    try:
        result = run(spec, device=device, compile=compile)
    except Exception:
        return f"FAILED {spec}\n{traceback.format_exc()[-2000:]}"
    unfinished = spec.path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(result) + "\n")
    unfinished.rename(spec.path)
    minutes = (time.monotonic() - start) / 60
    place = f"{spec.name} {spec.size} {spec.text} s{spec.seed} {spec.settings}"
    return f"{result['val_loss']:.4f} {place} ({minutes:.1f} min)"


def _report() -> None:
    from .grids import carry_over
    from .pictures import draw_methods, draw_rates, draw_restarts
    from .report import rows, write_report
    from .restarts import table_6

    folder = RESULTS.parent
    write_report(folder / "convergence.md")
    for size, text, steps in sorted({row.place for row in rows()}):
        draw_methods(folder / f"convergence-{size}-{text}-{steps}.png", (size, text, steps))
    draw_restarts(folder / "restarts.png", list(table_6()), "ablation-lora")
    draw_rates(folder / "rates.png", carry_over())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("run", help="make the runs of plans")
    making.add_argument("plans", nargs="+", metavar="PLAN")
    making.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    making.add_argument("--device", default="cpu")
    making.add_argument("--eager", action="store_true", help="compile nothing")
    commands.add_parser("report", help="write tables and picture")
    commands.add_parser("plans", help="list the plans")
    arguments = parser.parse_args()
    from .plans import PLANS

    if arguments.command == "report":
        _report()
        return
    if arguments.command == "run":
        unknown = [name for name in arguments.plans if name not in PLANS]
        if unknown:
            parser.error(f"plan {unknown[0]!r} is not known: choose of {', '.join(PLANS)}")
        try:
            specs = [spec for name in arguments.plans for spec in PLANS[name]()]
        except LookupError as error:
            sys.exit(str(error))
        num_failed = run_all(specs, workers=arguments.workers, device=arguments.device, compile=not arguments.eager)
        sys.exit(num_failed > 0)
    for name, plan in PLANS.items():
        try:
            specs = plan()
        except LookupError as error:
            print(f"{name:14} waits: {error}")
            continue
        print(f"{name:14} {sum(spec.path.is_file() for spec in specs):4} of {len(specs):4} runs done")


if __name__ == "__main__":
    main()
