"""Runs that are made together are the runs that the trainers of bench make one by one."""

import dataclasses

import pytest
import torch
from relora_opt_cli.model import Llama, LlamaConfig, init_weights

from bench.ensemble import Ensemble, Run, Settings, ticks
from bench.methods import BETAS, METHODS, is_matrix, loss_fn, outer
from relora_opt import JaggedSchedule, ReLoRAOptimizer

STEPS = 12
RUNS = [
    ("full", Settings(lr=1e-3, rest_lr=2e-3), 0),
    ("relora", Settings(lr=3e-3, rest_lr=1e-3, rank=4), 1),
    ("relora", Settings(lr=3e-3, rest_lr=1e-3, rank=8, restart_every=4, restart_warmup=2), 2),
]
MUON_RUNS = [
    ("muon" if method == "full" else method, dataclasses.replace(own, muon=True), seed) for method, own, seed in RUNS
]


def _model(seed: int) -> Llama:
    model = Llama(LlamaConfig(64, 32, 48, 4, 4, max_position_embeddings=16))
    init_weights(model, seed=seed)
    return model


def _alone(method: str, own: Settings, seed: int, tokens: torch.Tensor) -> tuple[list[float], Llama]:
    settings = dataclasses.asdict(own)
    clock = ("rank", "restart_every", "restart_warmup")
    wanted = {key: settings[key] for key in ("lr", "rest_lr", *(clock if method == "relora" else ()))}
    wanted |= {"base": "muon"} if method == "relora" and own.muon else {}
    model = _model(seed)
    trainer = METHODS[method](model, {"dtype": torch.float32, "compile": False, **wanted}, STEPS, seed)
    return [float(trainer.step(batch)) for batch in tokens], model


@pytest.mark.parametrize(("of", "tolerance"), [(RUNS, 1e-5), (MUON_RUNS, 1e-3)], ids=["adamw", "muon"])
def test_runs_together_are_the_runs_alone(of: list[tuple[str, Settings, int]], tolerance: float) -> None:
    tokens = torch.randint(64, (STEPS, len(of), 4, 17), generator=torch.Generator().manual_seed(0))
    runs = [Run(own, seed) for _, own, seed in of]
    together = Ensemble(
        [_model(seed) for _, _, seed in of], runs, STEPS, seq_len=16, dtype=torch.float32, compile=False
    )
    losses = torch.stack([together.step(batch) for batch in tokens])
    for i, (method, own, seed) in enumerate(of):
        alone, model = _alone(method, own, seed, tokens[:, i])
        torch.testing.assert_close(losses[:, i], torch.tensor(alone), rtol=tolerance, atol=tolerance)
        for name, p in model.named_parameters():
            torch.testing.assert_close(together.weights[name][i].detach(), p.detach(), rtol=1e-3, atol=2 * tolerance)


CHANGES: list[dict[str, float]] = [
    {"average": 0.9},
    {"cooling": 0.5},
    {"redraws": False},
    {"restart_until": 4},
    {"dense_from": 6, "dense_to": 9},
    {"dense_from": 2, "dense_to": 4, "dense_every": 5},
    {"dense_from": 5, "dense_to": 7, "dense_restarts": True},
    {"dense_from": 5, "dense_to": 9, "dense_warmup": 3},
    {"dense_from": 2, "dense_to": 4, "dense_turns": True},
    {"init_scale": 0.5},
    {"beta1": 0.5},
    {"beta2": 0.5},
]


def test_the_layers_turn_is_full_rank_in_that_layer() -> None:
    own = Settings(lr=3e-3, rest_lr=1e-3, rank=4, dense_to=STEPS, dense_turns=True)  # the first layer's, to the end
    tokens = torch.randint(64, (STEPS, 1, 4, 17), generator=torch.Generator().manual_seed(0))
    together = Ensemble([_model(2)], [Run(own, 2)], STEPS, seq_len=16, dtype=torch.float32, compile=False)
    model = _model(2)
    groups: dict[tuple[float, int], list[tuple[str, torch.nn.Parameter]]] = {}
    for name, p in model.named_parameters():
        options = (own.lr, own.rank * (".0." not in name)) if is_matrix(name) else (own.rest_lr, 0)
        groups.setdefault(options, []).append((name, p))
    optimizer = ReLoRAOptimizer(
        [{"params": some, "lr": lr, "rank": rank} for (lr, rank), some in groups.items()],
        schedule=JaggedSchedule(0, outer=outer(STEPS)),
        max_grad_norm=1.0,
        seed=2,
        betas=BETAS,
        weight_decay=0.0,
    )
    step = optimizer.make_step(model, lambda model, t: loss_fn(model, t, dtype=torch.float32), compile=False)
    for batch in tokens:
        torch.testing.assert_close(together.step(batch)[0], step(batch[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: "-".join(change))
def test_a_change_leaves_the_runs_beside_it_alone(change: dict[str, float]) -> None:
    tokens = torch.randint(64, (STEPS, 1, 4, 17), generator=torch.Generator().manual_seed(0)).expand(-1, 2, -1, -1)
    own = RUNS[2][1]
    changed = dataclasses.replace(own, **change)
    losses = []
    for runs in ([own, own], [own, changed]):
        together = Ensemble(
            [_model(2)] * 2, [Run(o, 2) for o in runs], STEPS, seq_len=16, dtype=torch.float32, compile=False
        )
        losses.append(torch.stack([together.step(batch) for batch in tokens]))
    torch.testing.assert_close(losses[1][:, 0], losses[0][:, 0], rtol=1e-5, atol=1e-6)
    assert (losses[1][-1, 1] - losses[1][-1, 0]).abs() > 1e-5


def test_the_clock_of_dense_spans() -> None:
    own = Settings(1.0, 1.0, rank=4, dense_from=2, dense_to=4, dense_every=5, dense_restarts=True, restart_warmup=2)
    clock = list(ticks(own, 12))
    assert [tick.update for tick in clock if tick.is_dense] == [3, 4, 8, 9]
    assert [tick.update for tick in clock if tick.restarts] == [4, 9]
    assert [tick.dense_age for tick in clock if tick.is_dense] == [1, 2, 1, 2]
    assert [tick.age for tick in clock[4:7]] == [1, 2, 3]
    assert clock[4].rate == pytest.approx(clock[5].rate / 2)
    turns = dataclasses.replace(own, dense_turns=True)
    assert [tick.update for tick in ticks(turns, 12, layer=1) if tick.is_dense] == [5, 6, 10, 11]
    assert [tick.rate for tick in ticks(turns, 12, layer=1)] == [tick.rate for tick in ticks(Settings(1.0, 1.0), 12)]
    eased = list(ticks(dataclasses.replace(own, dense_warmup=2), 12))
    assert eased[2].rate == pytest.approx(clock[3].rate / 2)
    assert eased[3] == clock[3]
