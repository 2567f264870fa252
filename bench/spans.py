"""Where full rank pays, and what else a restart could leave behind: runs that are made together.

    python -m bench.spans plans                       what there is, and how much of it is done
    python -m bench.spans run PLAN ... --device cuda  all runs of a plan as one computation (ensemble.py)
    python -m bench.spans report                      results/spans.md and its picture

A plan is a file in results/spans/: the losses of all its runs on the way, what was asked for, the commit. The text is
botocore's documentation where nothing else is said, and every trial has the seeds 1, 2 and 3. Validation losses are on
the same held-out sequences as in `bench.convergence`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .convergence import HERE, SIZES, Size, environment, new_model
from .ensemble import Settings

RESULTS = HERE / "results" / "spans"
SEEDS = (1, 2, 3)
_NUM_EVALUATIONS = 20


@dataclass(frozen=True)
class Trial:
    """What is run over the seeds."""

    name: str
    settings: Settings
    text: str = "botocore"
    seeds: tuple[int, ...] = SEEDS


@dataclass(frozen=True)
class Plan:
    """Trials of one size and length, which are made together; `reference` names the plan that has their full rank."""

    size: str
    steps: int
    trials: list[Trial]
    reference: str = ""


def run(plan: Plan, size: Size, *, device: str = "cpu", compile: bool = True, graphs: bool = False) -> dict[str, Any]:
    """Make all runs of a plan; return what their file holds."""
    import torch

    from .ensemble import Ensemble, Run

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    each = [(trial, seed) for trial in plan.trials for seed in trial.seeds]
    models = [new_model(size, seed) for _, seed in each]
    options = {"seq_len": size.seq_len, "device": device, "dtype": dtype, "compile": compile, "graphs": graphs}
    ensemble = Ensemble(models, [Run(trial.settings, seed) for trial, seed in each], plan.steps, **options)
    keys = sorted({(trial.text, seed) for trial, seed in each})
    where = torch.tensor([keys.index((trial.text, seed)) for trial, seed in each], device=device)
    train, held_out = _data(keys, size, plan.steps, device)
    every, updates, curve = max(1, plan.steps // _NUM_EVALUATIONS), list[int](), []
    start = time.monotonic()
    for index in range(plan.steps):
        ensemble.step(train[where, index].long())
        if (index + 1) % every == 0 or index + 1 == plan.steps:
            losses = [ensemble.evaluate(held_out[where, number].long()) for number in range(held_out.shape[1])]
            curve.append(torch.stack(losses).mean(0).tolist())
            updates.append(index + 1)
            print(f"update {index + 1} of {plan.steps}, {time.monotonic() - start:.0f} s", flush=True)
    usual = asdict(Settings(0.0, 0.0))
    runs = [
        {
            "name": trial.name,
            "settings": {key: value for key, value in asdict(trial.settings).items() if value != usual[key]},
            "text": trial.text,
            "seed": seed,
            "val_losses": [round(losses[i], 4) for losses in curve],
        }
        for i, (trial, seed) in enumerate(each)
    ]
    found = environment(device, is_compiled=compile, dtype=str(dtype).removeprefix("torch."))
    return {"size": plan.size, "steps": plan.steps, "updates": updates, "environment": found, "runs": runs}


def _data(keys: list[tuple[str, int]], size: Size, steps: int, device: str) -> tuple[Any, Any]:
    """Return the tokens of every (text, seed): (keys, steps, b, t + 1) to train on, and those held out."""
    import torch

    from .texts import batches_of

    train, held_out = [], []
    for text, seed in keys:
        batches, validation, _ = batches_of(size, text, seed)
        train.append(torch.stack([batches.batch(index).to(torch.int16) for index in range(steps)]))
        held_out.append(torch.stack(validation).to(torch.int16))
    fewest = min(map(len, held_out))
    return torch.stack(train).to(device), torch.stack([tokens[:fewest] for tokens in held_out]).to(device)


FULL = {"w128": Settings(2.8e-3, 16e-3), "w256": Settings(1e-3, 16e-3)}  # best of their grids, as the rates below


def low(rank: int, **own: Any) -> Settings:
    """Return the settings of low rank at width 128."""
    return Settings(**{"lr": 2e-3, "rest_lr": 8e-3, "rank": rank, **own})


def low_wide(rank: int, **own: Any) -> Settings:
    """Return the settings of low rank at width 256."""
    return Settings(**{"lr": 7e-4 if rank == 64 else 1e-3, "rest_lr": 16e-3, "rank": rank, **own})


def span(begin: int, end: int, *, ramp: int = 10, **own: Any) -> dict[str, Any]:
    """Return the settings of full rank from one update to another, as `JaggedSchedule`'s warm_start_at has it."""
    return {"dense_from": begin, "dense_to": end, "dense_restarts": True, "restart_warmup": ramp, **own}


def bare(begin: int, end: int, **own: Any) -> dict[str, Any]:
    """Return the same, after which the factors go on as they were."""
    return {"dense_from": begin, "dense_to": end, **own}


def _full(size: str, text: str = "botocore") -> Trial:
    return Trial("full rank", FULL[size], text)


def places() -> Plan:
    """When, how long and in how many pieces, at an eighth of width 128; and the best on three texts."""
    trials = [_full("w128"), Trial("full rank at low rank's rates", low(0)), Trial("rank 16", low(16))]
    trials += [Trial("rank 32", low(32))]
    for begin, end in ((100, 300), (300, 500), (400, 600), (500, 700)):
        trials += [Trial(f"rank 16, full {begin} to {end}, factors kept", low(16, **bare(begin, end)))]
    for begin, end in ((200, 400), (300, 500), (400, 600)):
        trials += [Trial(f"rank 16, full {begin} to {end}", low(16, **span(begin, end)))]
    trials += [Trial("rank 16, full 400 to 600, no ramp", low(16, **span(400, 600, ramp=0)))]
    trials += [Trial("rank 16, full 400 to 600, a ramp of 50", low(16, **span(400, 600, ramp=50)))]
    for begin, end in ((400, 500), (500, 550), (300, 600)):
        trials += [Trial(f"rank 16, full {begin} to {end}", low(16, **span(begin, end)))]
    pieces = ((300, 400, 300), (150, 200, 200), (80, 100, 100))
    for begin, end, every in pieces:
        count = len(range(begin, 1000, every))
        name = f"rank 16, full {count} times {end - begin}, factors kept"
        trials += [Trial(name, low(16, **bare(begin, end, dense_every=every)))]
    trials += [Trial("rank 16, full 10 times 20", low(16, **span(80, 100, ramp=5, dense_every=100)))]
    trials += [Trial("rank 8", low(8)), Trial("rank 8, full 400 to 600", low(8, **span(400, 600)))]
    trials += [Trial("rank 32, full 400 to 600", low(32, **span(400, 600)))]
    trials += [Trial("rank 32, full 450 to 550", low(32, **span(450, 550)))]
    trials += [Trial("rank 16, full 400 to 600, at 2.8e-3", low(16, lr=2.8e-3, **span(400, 600)))]
    trials += [Trial("rank 16, full 400 to 600, 16e-3 for the rest", low(16, rest_lr=16e-3, **span(400, 600)))]
    for text in ("sotu", "python"):
        trials += [_full("w128", text), Trial("full rank at low rank's rates", low(0), text)]
        trials += [Trial("rank 16", low(16), text), Trial("rank 16, full 400 to 600", low(16, **span(400, 600)), text)]
        trials += [Trial("rank 32, full 450 to 550", low(32, **span(450, 550)), text)]
    return Plan("w128", 1000, trials)


def eased() -> Plan:
    """With a ramp at the beginning of full rank too; in float32 on one core."""
    ramp = Trial("rank 16, full 400 to 600, a ramp of 20 into it", low(16, **span(400, 600, dense_warmup=20)))
    plain = Trial("rank 16, full 400 to 600", low(16, **span(400, 600)), seeds=(1,))
    return Plan("w128", 1000, [ramp, plain], reference="places")


def wide() -> Plan:
    """The same at an eighth of width 256, on three texts."""
    trials = []
    for text in ("botocore", "sotu", "python"):
        trials += [_full("w256", text), Trial("rank 32, full 400 to 600", low_wide(32, **span(400, 600)), text)]
    trials += [Trial("rank 32", low_wide(32)), Trial("rank 64, full 400 to 600", low_wide(64, **span(400, 600)))]
    return Plan("w256", 1000, trials)


def long() -> Plan:
    """And in runs four times as long."""
    trials = [_full("w256"), Trial("rank 32", low_wide(32))]
    for rank, begin, end in ((32, 1000, 1800), (32, 1600, 2400), (32, 1600, 2000), (16, 1600, 2400), (64, 1600, 2400)):
        own = low_wide(rank, **span(begin, end, ramp=25))
        trials += [Trial(f"rank {rank}, full {begin} to {end}", own)]
    trials += [Trial("rank 32, full 8 times 100", low_wide(32, **span(400, 500, ramp=25, dense_every=500)))]
    return Plan("w256", 4000, trials)


def restarts() -> Plan:
    """What a restart could leave behind, in long runs of width 128."""
    half = {"restart_every": 500, "restart_warmup": 25}
    tenth = {"restart_every": 100, "restart_warmup": 5}
    trials = [_full("w128")]
    for rank in (8, 16, 32):
        trials += [Trial(f"rank {rank}", low(rank)), Trial(f"rank {rank}, restarts every 500", low(rank, **half))]
    for rank in (16, 32):
        for words, own in _FORMS:
            trials += [Trial(f"rank {rank}, restarts every 500, {words}", low(rank, **half, **own))]
    trials += [Trial("rank 16, restarts every 100", low(16, **tenth))]
    trials += [Trial("rank 16, restarts every 100, W left at its mean (0.95)", low(16, average=0.95, **tenth))]
    trials += [Trial("rank 16, restarts every 100, cooled over half a cycle", low(16, cooling=0.5, **tenth))]
    trials += [Trial("rank 16, full 3200 to 4000, factors kept", low(16, **bare(3200, 4000)))]
    own = {**half, "restart_until": 3000}
    trials += [Trial("rank 16, restarts every 500 until 3000, full 3200 to 4000", low(16, **bare(3200, 4000), **own))]
    trials += [Trial("rank 16, full 1000 to 2000, factors kept", low(16, **bare(1000, 2000)))]
    trials += [Trial(f"rank 16, at {lr:g}", low(16, lr=lr), seeds=(1, 2)) for lr in (1e-3, 4e-3)]
    trials += [Trial(f"full rank, at {lr:g}", Settings(lr, 16e-3), seeds=(1, 2)) for lr in (1.4e-3, 5.6e-3)]
    return Plan("w128", 4000, trials)


_FORMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("W left at its mean (0.98)", {"average": 0.98}),
    ("W left at its mean (0.99)", {"average": 0.99}),
    ("cooled over a fifth of a cycle", {"cooling": 0.2}),
    ("cooled over half a cycle", {"cooling": 0.5}),
    ("A kept", {"redraws": False}),
)


def leads() -> Plan:
    """What else could help an eighth of width 128 in 1000 updates."""
    trials = [_full("w128"), Trial("rank 16", low(16)), Trial("rank 32", low(32))]
    trials += [Trial(f"rank 16, matrices begin {x:g} times as large", low(16, init_scale=x)) for x in (0.25, 0.5, 2.0)]
    trials += [Trial("full rank, matrices begin 0.5 times as large", Settings(2.8e-3, 16e-3, init_scale=0.5))]
    trials += [Trial(f"rank 16, beta2 of factors {x:g}", low(16, beta2=x)) for x in (0.9, 0.98, 0.99)]
    trials += [Trial("full rank, beta2 of matrices 0.98", Settings(2.8e-3, 16e-3, beta2=0.98))]
    trials += [Trial(f"rank 16, beta1 of factors {x:g}", low(16, beta1=x)) for x in (0.8, 0.95)]
    for begin, end in ((0, 200), (200, 400), (400, 600), (300, 800), (600, 1000)):
        trials += [Trial(f"rank 16, full {begin} to {end}, factors kept", low(16, **bare(begin, end)))]
    for every in (125, 250):
        cycle = {"restart_every": every, "restart_warmup": 6}
        for words, own in (("", {}), *_SHORT_FORMS):
            few = SEEDS if 3 * len(trials) <= 75 else SEEDS[:2]
            name = f"rank 16, restarts every {every}{words}"
            trials += [Trial(name, low(16, **cycle, **own), seeds=few)]
    return Plan("w128", 1000, trials)


_SHORT_FORMS: tuple[tuple[str, dict[str, Any]], ...] = (
    (", W left at its mean (0.95)", {"average": 0.95}),
    (", W left at its mean (0.98)", {"average": 0.98}),
    (", cooled over half a cycle", {"cooling": 0.5}),
)


def by_muon(rank: int, **own: Any) -> Settings:
    """Return the settings of Muon at width 128; rank 0 is full rank."""
    return Settings(**{"lr": 4e-3, "rest_lr": 8e-3, "rank": rank, "muon": True, **own})


def by_muon_wide(rank: int, **own: Any) -> Settings:
    """Return the settings of Muon at width 256."""
    return Settings(**{"lr": 2e-3, "rest_lr": 16e-3, "rank": rank, "muon": True, **own})


def muon() -> Plan:
    """By Muon, beside full-rank AdamW: an eighth and a quarter of width 128 on three texts."""
    trials = []
    for text in ("botocore", "sotu", "python"):
        trials += [Trial("full rank, Muon", by_muon(0), text)]
        for rank, begin, end in ((16, 400, 600), (32, 450, 550), (32, 400, 600)):
            own = by_muon(rank, **span(begin, end, dense_warmup=10))
            trials += [Trial(f"rank {rank}, Muon, full {begin} to {end}", own, text)]
        trials += [Trial("rank 16, Muon", by_muon(16), text)]
    trials += [Trial("rank 8, Muon, full 400 to 600", by_muon(8, **span(400, 600, dense_warmup=10)))]
    trials += [Trial("rank 16, Muon, full 400 to 500", by_muon(16, **span(400, 500, dense_warmup=10)))]
    trials += [Trial("rank 16, Muon, full 300 to 800", by_muon(16, **span(300, 800, dense_warmup=10)))]
    trials += [Trial("rank 16, Muon, full 400 to 600, no ramp into it", by_muon(16, **span(400, 600)))]
    return Plan("w128", 1000, trials, reference="places")


def turns() -> Plan:
    """The layers take turns at full rank, which needs the memory of one of them; at an eighth of width 128."""
    trials = []
    for text in ("botocore", "sotu", "python"):
        for begin, length in ((100, 200), (200, 200), (200, 100), (400, 100)):
            trials += [Trial(_turns(16, begin, length), low(16, **_by_turns(begin, length)), text)]
    for length, ramp in ((50, 5), (25, 2)):
        own = low(16, **_by_turns(200, length, every=4 * length, ramp=ramp))
        trials += [Trial(f"{_turns(16, 200, length)}, again and again", own)]
    trials += [Trial(f"{_turns(16, 200, 200)}, no ramp", low(16, **_by_turns(200, 200, ramp=0)))]
    trials += [Trial(_turns(8, 200, 200), low(8, **_by_turns(200, 200)))]
    trials += [Trial(_turns(32, 400, 100), low(32, **_by_turns(400, 100)))]
    for begin, end in ((400, 600), (300, 500), (500, 700)):
        own = low(16, **span(begin, end, dense_warmup=10))
        trials += [Trial(f"rank 16, full {begin} to {end}, a ramp into it", own, "python")]
    return Plan("w128", 1000, trials, reference="places")


def earlier() -> Plan:
    """From 300 on, with a ramp into it, as on Python sources in `turns`; in float32 on one core."""
    own = low(16, **span(300, 500, dense_warmup=10))
    return Plan("w128", 1000, [Trial("rank 16, full 300 to 500, a ramp into it", own, "sotu")], reference="places")


def long_muon() -> Plan:
    """By Muon in runs of 4000 updates of width 256."""
    trials = [Trial("full rank, Muon", by_muon_wide(0)), Trial("rank 32, Muon", by_muon_wide(32))]
    for rank in (16, 32, 64):
        own = by_muon_wide(rank, **span(1600, 2400, ramp=25, dense_warmup=25))
        trials += [Trial(f"rank {rank}, Muon, full 1600 to 2400", own)]
    trials += [Trial(f"{_turns(32, 400, 800)}, Muon", by_muon_wide(32, **_by_turns(400, 800, ramp=25)))]
    return Plan("w256", 4000, trials, reference="long")


def long_turns() -> Plan:
    """The layers take turns at full rank, in runs of 4000 updates of width 256."""
    trials = [Trial(_turns(32, begin, 800), low_wide(32, **_by_turns(begin, 800, ramp=25))) for begin in (0, 400, 800)]
    trials += [Trial(_turns(64, 400, 800), low_wide(64, **_by_turns(400, 800, ramp=25)))]
    return Plan("w256", 4000, trials, reference="long")


def _by_turns(begin: int, length: int, *, every: int = 10**9, ramp: int = 10) -> dict[str, Any]:
    """Return the settings of layers that are made at full rank in turn, each for a time."""
    return span(begin, begin + length, ramp=ramp, dense_warmup=ramp, dense_turns=True, dense_every=every)


def _turns(rank: int, begin: int, length: int) -> str:
    return f"rank {rank}, from {begin} on each layer {length} full"


PLANS: dict[str, Callable[[], Plan]] = {
    "places": places,
    "eased": eased,
    "wide": wide,
    "long": long,
    "restarts": restarts,
    "leads": leads,
    "muon": muon,
    "turns": turns,
    "earlier": earlier,
    "long-muon": long_muon,
    "long-turns": long_turns,
}


@dataclass(frozen=True)
class Row:
    """A trial's runs: their losses at the end, and differences to full rank at the same updates of the same seed."""

    name: str
    text: str
    losses: list[float]
    gaps: list[list[float]]  # by seed, then by evaluation

    @property
    def end(self) -> tuple[float, float]:
        """The mean difference at the end and its standard error."""
        last = [gaps[-1] for gaps in self.gaps]
        error = statistics.stdev(last) / len(last) ** 0.5 if len(last) > 1 else float("nan")
        return statistics.fmean(last), error

    def mean(self, place: int) -> float:
        return statistics.fmean(gaps[place] for gaps in self.gaps)


def rows(result: dict[str, Any], reference: dict[str, Any] | None = None) -> list[Row]:
    """Return a plan's trials in their order, beside the full rank of its own runs or of a reference's."""
    runs = (result if reference is None else reference)["runs"]
    full = {(run["text"], run["seed"]): run["val_losses"] for run in runs if run["name"] == "full rank"}
    by_trial: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in result["runs"]:
        by_trial.setdefault((run["text"], run["name"]), []).append(run)
    return [
        Row(
            name,
            text,
            [run["val_losses"][-1] for run in runs],
            [
                [loss - other for loss, other in zip(run["val_losses"], full[text, run["seed"]], strict=True)]
                for run in runs
            ],
        )
        for (text, name), runs in by_trial.items()
    ]


def write_report(path: Path) -> None:
    """Write a table a plan: differences to full rank on the way, and at the end with their standard error."""
    lines = ["# Spans of full rank: all runs", "", "Written by `python -m bench.spans report`; losses in nats.", ""]
    for name, plan in PLANS.items():
        file = RESULTS / f"{name}.json"
        if not file.is_file():
            continue
        result = json.loads(file.read_text())
        places = [len(result["updates"]) * tenths // 10 - 1 for tenths in (2, 4, 6, 8)]
        doc = (plan.__doc__ or "").strip()
        lines += [f"## {name}: {result['size']}, {result['steps']} updates", "", doc, ""]
        heads = " | ".join(f"after {result['updates'][place]}" for place in places)
        lines += [f"| text | trial | {heads} | at the end | losses |", "|---|---|" + "---|" * (len(places) + 2)]
        reference = plan().reference
        beside = json.loads((RESULTS / f"{reference}.json").read_text()) if reference else None
        for row in sorted(rows(result, beside), key=lambda row: (row.text, row.end[0])):
            gap, error = row.end
            cells = " | ".join(f"{row.mean(place):+.3f}" for place in places)
            losses = ", ".join(f"{loss:.3f}" for loss in row.losses)
            spread = f" ± {error:.3f}" if len(row.losses) > 1 else ""
            lines.append(f"| {row.text} | {row.name} | {cells} | {gap:+.3f}{spread} | {losses} |")
        lines.append("")
    path.write_text("\n".join(lines))


_SHOWN = {
    "places": ("rank 16", "rank 16, full 400 to 600", "rank 16, full 300 to 600", "rank 32, full 400 to 600"),
    "long": ("rank 32", "rank 32, full 1600 to 2400", "rank 32, full 1000 to 1800"),
}


def draw(path: Path) -> bool:
    """Draw how far from full rank the runs are on the way; False where a plan has not been run."""
    from .pictures import plt

    figure, panels = plt.subplots(1, len(_SHOWN), figsize=(11, 4), layout="constrained")
    for axes, (plan, names) in zip(panels, _SHOWN.items(), strict=True):
        if not (RESULTS / f"{plan}.json").is_file():
            plt.close(figure)
            return False
        result = json.loads((RESULTS / f"{plan}.json").read_text())
        shown = {row.name: row for row in rows(result) if row.text == "botocore"}
        for name in names:
            means = [shown[name].mean(place) for place in range(len(result["updates"]))]
            axes.plot(result["updates"], means, marker=".", label=name)
        axes.axhline(0, color="black", linewidth=0.8, linestyle="--")
        axes.set(xlabel="updates", title=f"{result['size']}, {result['steps']} updates")
        axes.legend(fontsize="small")
    panels[0].set_ylabel("validation loss beyond full rank's, nats")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("run", help="make the runs of plans that have no file yet")
    making.add_argument("plans", nargs="+", metavar="PLAN", choices=PLANS)
    making.add_argument("--device", default="cpu")
    making.add_argument("--eager", action="store_true", help="compile nothing")
    making.add_argument("--graphs", action="store_true", help="make updates as CUDA graphs")
    commands.add_parser("report", help="write the tables and the picture")
    commands.add_parser("plans", help="list the plans")
    arguments = parser.parse_args()
    if arguments.command == "run":
        RESULTS.mkdir(parents=True, exist_ok=True)
        for name in arguments.plans:
            file = RESULTS / f"{name}.json"
            if not file.is_file():
                plan = PLANS[name]()
                options = {"compile": not arguments.eager, "graphs": arguments.graphs}
                result = run(plan, SIZES[plan.size], device=arguments.device, **options)
                file.with_suffix(".part").write_text(json.dumps(result) + "\n")
                file.with_suffix(".part").rename(file)
    elif arguments.command == "report":
        write_report(RESULTS.parent / "spans.md")
        draw(RESULTS.parent / "spans.png")
    else:
        for name, plan in PLANS.items():
            count = sum(len(trial.seeds) for trial in plan().trials)
            is_done = (RESULTS / f"{name}.json").is_file()
            print(f"{name:10} {count:4} runs {'done' if is_done else 'to make'}: {(plan.__doc__ or '').strip()}")


if __name__ == "__main__":
    main()
