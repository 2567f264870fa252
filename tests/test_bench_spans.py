"""The plans of spans are what their files hold, a plan is run as it says, and tables compare runs of the same seed."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import spans, texts
from bench.convergence import Size, new_model
from bench.ensemble import Settings
from bench.methods import METHODS
from bench.spans import PLANS, RESULTS, Plan, Trial, rows

SIZE = Size(32, 48, 64, seq_len=16, batch_size=4)
STEPS = 12


@pytest.mark.parametrize("name", PLANS)
def test_a_file_holds_the_runs_of_its_plan(name: str) -> None:
    result, plan = json.loads((RESULTS / f"{name}.json").read_text()), PLANS[name]()
    assert (result["size"], result["steps"], result["updates"][-1]) == (plan.size, plan.steps, plan.steps)
    asked = [(trial.name, trial.settings, trial.text, seed) for trial in plan.trials for seed in trial.seeds]
    made = [
        (run["name"], Settings(**{"lr": 0, "rest_lr": 0, **run["settings"]}), run["text"], run["seed"])
        for run in result["runs"]
    ]
    assert made == asked
    assert len({(name, text, seed) for name, _, text, seed in asked}) == len(asked)


class Data:
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def batch(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        return torch.randint(SIZE.vocab_size, (SIZE.batch_size, SIZE.seq_len + 1), generator=generator)


@pytest.mark.parametrize("muon", [False, True])
def test_a_plan_makes_the_runs_that_trainers_make(muon: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = [Data(9).batch(0), Data(9).batch(1)]
    monkeypatch.setattr(texts, "batches_of", lambda size, text, seed: (Data(seed), held_out, 0))
    late: dict[str, Any] = {"lr": 3e-3, "rest_lr": 1e-3, "rank": 4}
    own = Settings(**late, muon=muon, dense_from=4, dense_to=8, dense_restarts=True, dense_warmup=2, restart_warmup=2)
    plan = Plan("tiny", STEPS, [Trial("full rank", Settings(1e-3, 2e-3, muon=muon)), Trial("late", own, seeds=(2, 3))])
    result = spans.run(plan, SIZE, compile=False)
    assert [(run["name"], run["seed"]) for run in result["runs"]] == [
        ("full rank", 1),
        ("full rank", 2),
        ("full rank", 3),
        ("late", 2),
        ("late", 3),
    ]
    clock = {"warm_start": 4, "warm_start_at": 4, "restart_warmup": 2}
    settings = {"full rank": {"lr": 1e-3, "rest_lr": 2e-3}, "late": {**late, **clock, "alpha": "matched"}}
    settings["late"] |= {"base": "muon"} if muon else {}
    full = "muon" if muon else "full"
    for run in result["runs"]:
        model, seed = new_model(SIZE, run["seed"]), run["seed"]
        method = METHODS[full if run["name"] == "full rank" else "relora"]
        trainer = method(model, {"dtype": torch.float32, "compile": False, **settings[run["name"]]}, STEPS, seed)
        losses = []
        for index in range(STEPS):
            trainer.step(Data(seed).batch(index))
            losses.append(sum(float(trainer.evaluate(tokens)) for tokens in held_out) / len(held_out))
        assert run["val_losses"] == pytest.approx(losses, abs=2e-3 if muon else 2e-4)  # Muon's is in bfloat16


def test_differences_are_to_full_rank_at_the_same_update_of_the_same_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {
        ("full rank", 1): [4.0, 3.0],
        ("full rank", 2): [5.0, 3.5],
        ("low", 1): [3.9, 3.2],
        ("low", 2): [4.7, 3.6],
    }
    runs = [
        {"name": name, "text": "sotu", "seed": seed, "settings": {}, "val_losses": own}
        for (name, seed), own in losses.items()
    ]
    result = {"size": "w128", "steps": 20, "updates": [10, 20], "environment": {}, "runs": runs}
    low = rows(result)[1]
    assert low.mean(0) == pytest.approx(-0.2)
    assert low.end == pytest.approx((0.15, 0.05))
    monkeypatch.setattr(spans, "RESULTS", tmp_path)
    monkeypatch.setattr(spans, "PLANS", {"some": lambda: Plan("w128", 20, [])})
    (tmp_path / "some.json").write_text(json.dumps(result))
    spans.write_report(tmp_path / "spans.md")
    assert "| sotu | low | " in (tmp_path / "spans.md").read_text()
    assert "| +0.150 ± 0.050 | 3.200, 3.600 |" in (tmp_path / "spans.md").read_text()
    assert not spans.draw(tmp_path / "none.png")
    assert asdict(Settings(1.0, 1.0))["rank"] == 0
