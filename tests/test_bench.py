"""The bench measures what it says: variants that vary nothing are the optimizer, and the tables are the runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from relora_opt_cli.model import Llama, LlamaConfig, init_weights
from torch import Tensor, nn

from bench import convergence, grids, pictures, report
from bench.convergence import Spec
from bench.methods import BETAS, MAX_NORM, Dense, ReLoRA, is_matrix, loss_fn, outer
from bench.plans import PLANS
from bench.step_table import Row, table
from bench.variants import Variant, Weight
from relora_opt import JaggedSchedule, ReLoRAOptimizer
from relora_opt.factors import draw_a, draw_generator

STEPS = 9
CLOCK = {"warm_start": 2, "restart_every": 3, "restart_warmup": 2}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def llama() -> Llama:
    model = Llama(LlamaConfig(50, 16, 24, 2, 2, max_position_embeddings=8))
    init_weights(model, seed=0)
    return model


def tokens(index: int) -> Tensor:
    return torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(index))


@pytest.mark.usefixtures("eager")
def test_the_variant_that_varies_nothing_is_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"lr": 2e-3, "rest_lr": 8e-3, "rank": 4}
    model, twin = llama(), llama()
    trainer = ReLoRA(model, {**settings, **CLOCK, "alpha": "matched", "init": "orthogonal"}, STEPS, 0)
    plain = Variant(twin, {**settings, **CLOCK}, STEPS, 0)
    names = [name for name, _ in twin.named_parameters() if is_matrix(name)]
    draws: dict[int, int] = dict.fromkeys(range(len(names)), 0)

    def drawn(weight: Weight, *, first: bool) -> tuple[Tensor, float]:
        number = next(i for i, w in enumerate(plain.weights) if w is weight)
        generator = draw_generator(0, names[number], draws[number])
        draws[number] += 1
        shape = tuple(weight.W.shape)
        return draw_a(shape, 4, init="orthogonal", generator=generator, like=weight.W), (shape[1] / 4) ** 0.5

    monkeypatch.setattr(Weight, "_draw", drawn)
    for u in range(STEPS):
        ours, theirs = trainer.step(tokens(u)), plain.step(tokens(u))
        # Products of bfloat16 on one side go to factors directly, on the other to G first.
        assert float(ours) == pytest.approx(float(theirs), abs=2e-3), u
    assert trainer.optimizer.num_restarts == 2
    assert plain.num_restarts == 2 * len(names)
    assert trainer.num_trainable == plain.num_trainable


@pytest.mark.usefixtures("eager")
def test_full_rank_is_adamw_with_two_rates() -> None:
    model, twin = llama(), llama()
    trainer = Dense(model, {"lr": 2e-3, "rest_lr": 8e-3}, STEPS, 0)
    groups = [
        {"params": [p for name, p in twin.named_parameters() if is_matrix(name)], "lr": 2e-3},
        {"params": [p for name, p in twin.named_parameters() if not is_matrix(name)], "lr": 8e-3},
    ]
    schedule = JaggedSchedule(0, outer=outer(STEPS))
    ours = ReLoRAOptimizer(groups, rank=0, schedule=schedule, max_grad_norm=MAX_NORM, betas=BETAS, weight_decay=0.0)
    for u in range(STEPS):
        trainer.step(tokens(u))
        loss_fn(twin, tokens(u)).backward()
        ours.step()
        ours.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    "settings",
    [
        {"init": "gradient"},
        {"init": "kaiming", "scale": 1.0},
        {"init": "moment", "warm_start": 2},
        {"init": "update", "warm_start": 2},
        {"a_rate": 0.0},
        {"balanced": True},
        {"restart_every": 2, "state": "carry"},
        {"restart_every": 2, "state": "project"},
        {"restart_every": 2, "state": "keep"},
        {"restart_every": 2, "staggered": True},
        {"restart_every": 2, "adaptive": 0.99},
        {"decay": 0.1},
        {"leak": 0.1},
        {"b_init": "orthogonal"},
        {"base": "muon", "balanced": True},
        {"whiten": True},
        {"base": "muon", "whiten": True},
    ],
    ids=str,
)
def test_every_variant_learns_and_is_like_no_other(settings: dict[str, Any]) -> None:
    plain, varied = (Variant(llama(), {"lr": 5e-3, "rest_lr": 5e-3, "rank": 4, **own}, 30, 0) for own in ({}, settings))
    first = float(varied.evaluate(tokens(0)))
    for _ in range(30):
        plain.step(tokens(0))
        varied.step(tokens(0))
    assert float(varied.evaluate(tokens(0))) < first - 0.3
    weights = zip(plain.model.parameters(), varied.model.parameters(), strict=True)
    assert not all(torch.equal(p, q) for p, q in weights)


@pytest.mark.usefixtures("eager")
def test_ranks_may_differ_by_layer() -> None:
    settings = {"lr": 5e-3, "rest_lr": 5e-3, "rank": 4, "ranks": {"q_proj": 2, "down_proj": 6}}
    trainer = ReLoRA(llama(), settings, 30, 0)
    trainer.step(tokens(0))
    wanted = {"q_proj": 2, "down_proj": 6}
    for name, p in trainer.model.named_parameters():
        if is_matrix(name):
            assert len(trainer.optimizer.factors(p)[0]) == wanted.get(name.split(".")[-2], 4), name


@pytest.mark.parametrize("name", PLANS)
def test_the_runs_of_a_plan_have_files_of_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever a grid has found: confirmations wait for it.
    monkeypatch.setattr(
        grids,
        "_settled",
        lambda grid, twice=(): [(s.name, s.method, s.settings) for s in {s.name: s for s in grid}.values()],
    )
    specs = PLANS[name]()
    assert len({spec.path for spec in specs}) == len(specs)
    assert all(spec.size in convergence.SIZES for spec in specs)


def test_what_is_confirmed_is_the_best_of_a_whole_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "RESULTS", tmp_path)
    grid = grids.tune_large()
    for number, spec in enumerate(grid[:-1]):
        spec.path.write_text(json.dumps({"val_loss": 4.0 - number % 3}))
    with pytest.raises(LookupError, match="1 runs of the grid are missing"):
        grids.confirm_large()
    grid[-1].path.write_text(json.dumps({"val_loss": 1.0}))
    confirmed = {(spec.name, spec.settings["lr"], spec.settings["rest_lr"]) for spec in grids.confirm_large()}
    last = grid[-1]
    assert (last.name, last.settings["lr"], last.settings["rest_lr"]) in confirmed
    for twice in ("full-rank AdamW", "LoRA, matched scale, rank 32"):
        assert sum(name == twice for name, *_ in confirmed) == 2
    assert len(confirmed) == len({spec.name for spec in grid}) + 2


@pytest.mark.usefixtures("eager")
def test_a_carried_state_is_the_same_where_the_new_a_is_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Variant(llama(), {"lr": 5e-3, "rest_lr": 5e-3, "rank": 4, "state": "carry", "a_rate": 0.0}, 30, 0)
    for u in range(3):
        trainer.step(tokens(u))
    for weight in trainer.weights:
        m, v, A = weight.of_b.m.clone(), weight.of_b.v.clone(), weight.A.clone()
        weight.W.grad = torch.ones_like(weight.W)
        monkeypatch.setattr(weight, "_draw", lambda A=A, *, first: (A, 2.0))
        weight.restart(3)
        torch.testing.assert_close(weight.of_b.m, m, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(weight.of_b.v, v, rtol=1e-4, atol=1e-6)


def test_a_report_has_every_run_and_compares_with_the_best_full_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convergence, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    losses = {("full-rank AdamW", 1e-3): [4.0, 4.2], ("full-rank AdamW", 2e-3): [3.9, 4.1], ("LoRA", 1e-3): [4.05]}
    for (name, lr), values in losses.items():
        for seed, loss in enumerate(values):
            spec = Spec(name, "full", {"lr": lr, "name": name}, "w128", "sotu", 10, seed)
            result = {"spec": vars(spec), "val_loss": loss, "num_trainable": 1, "num_parameters": 2}
            spec.path.write_text(json.dumps(result))
    report.write_report(tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    best, every = text.split("All settings")
    assert best.count("| full-rank AdamW |") == 1
    assert every.count("| full-rank AdamW |") == 2
    assert "| 2 | 4.0000 | 0.1000 | +0.0000 |" in best
    assert "| 1 | 4.0500 |  | +0.1500 |" in best  # against full rank's loss on the same seed


def test_texts_with_several_seeds_come_into_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    losses = {
        ("full-rank AdamW", 1e-3, "sotu"): [4.0, 4.2],
        ("full-rank AdamW", 2e-3, "sotu"): [4.3, 4.5],
        ("full-rank AdamW", 1e-3, "python"): [3.0, 3.2],
        ("full-rank AdamW", 2e-3, "python"): [2.9, 3.1],
        ("LoRA", 1e-3, "sotu"): [3.8, 4.2],
        ("LoRA", 1e-3, "python"): [3.0, 3.2],
        ("LoRA", 2e-3, "sotu"): [3.8, 4.1],  # not on every text
        ("Muon", 1e-3, "sotu"): [3.0],  # one seed
        ("Muon", 1e-3, "python"): [3.0],
    }
    for (name, lr, text), values in losses.items():
        for seed, loss in enumerate(values, start=1):
            spec = Spec(name, "full", {"lr": lr, "name": name}, "w128", text, 10, seed)
            result = {"spec": vars(spec), "val_loss": loss, "num_trainable": 1, "num_parameters": 2}
            spec.path.write_text(json.dumps(result))
    tuned = Spec("LoRA", "full", {"lr": 1e-3, "name": "LoRA"}, "w128", "sotu", 10, convergence.TUNING_SEED)
    tuned.path.write_text(json.dumps({"spec": vars(tuned), "val_loss": 9.0, "num_trainable": 1, "num_parameters": 2}))
    report.write_report(tmp_path / "report.md")
    table = (tmp_path / "report.md").read_text().split("over texts and seeds")[1]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| method", "| LoRA", "| full-rank AdamW"]
    assert rows[1][1:4] == ["lr=0.001 name=LoRA", "2", "3.1000 (+0.1000 ± 0.0000)"]
    assert rows[1][4].startswith("4.0000 (-0.1000 ± 0.1000)")
    assert rows[2][3].startswith("3.1000 (+0.1000 ± 0.0000)")  # best over texts, while another is best on this one


def test_the_picture_of_restarts_shows_their_spikes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    plain = [4.0 - u / 1000 for u in range(600)]
    spiky = [loss + (0.5 if u % 200 < 20 and u >= 200 else 0.0) for u, loss in enumerate(plain)]
    for name, losses, settings in (("plain", plain, {}), ("spiky", spiky, {"restart_every": 200})):
        spec = Spec(name, "relora", {**settings, "name": name}, "w128", "sotu", 600, 1)
        result = {"spec": vars(spec), "val_loss": 1.0, "num_trainable": 1, "num_parameters": 2, "train_loss": losses}
        spec.path.write_text(json.dumps(result))
    height, updates = pictures.spikes(["spiky"], "plain")["spiky"]
    assert height == pytest.approx(0.5)
    assert updates == pytest.approx(20, abs=3)
    assert pictures.draw_restarts(tmp_path / "restarts.png", ["spiky"], "plain")
    assert not pictures.draw_restarts(tmp_path / "none.png", ["plain"], "plain")
    assert pictures.draw_methods(tmp_path / "methods.png", ("w128", "sotu", 600))
    assert {path.name for path in tmp_path.glob("*.png")} == {"restarts.png", "methods.png"}


def test_the_picture_of_rates_has_what_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "RESULTS", tmp_path)
    specs = grids.carry_over()
    assert not pictures.draw_rates(tmp_path / "none.png", specs)
    done = [spec for spec in specs if spec.size == "w128"]
    for spec in done:
        spec.path.write_text(json.dumps({"val_loss": 4.0 + spec.settings["lr"]}))
    assert pictures.draw_rates(tmp_path / "rates.png", specs)
    assert (tmp_path / "rates.png").stat().st_size > 0
    assert not (tmp_path / "none.png").exists()


def test_a_matrix_is_a_linear_layer_inside_the_trunk() -> None:
    model = llama()
    named = {name for name, p in model.named_parameters() if is_matrix(name)}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert named == linear - {"lm_head.weight"}


def test_a_peak_that_was_not_measured_has_no_number() -> None:
    rows = [Row(f"peak {peak}", [0.1, 0.2, 0.3], 1.0, 1.0, peak, 0, 0, 1, None, {}) for peak in (5_000_000, None)]
    head, *lines = table(rows, 64).splitlines()
    end = head.index("peak MB") + len("peak MB")
    assert [line[end - 7 : end].strip() for line in lines] == ["5", ""]
