"""Every optimizer of torch, on every input by which torch tests it, is a base like any other.

torch's own inventory is driven (torch_inventory.py). Proven for each: with nothing selected the wrapper is the base,
bitwise, state included; with weights selected the dense and the functional path agree, and continuing from a file is
never having stopped; what torch's constructor refuses is refused in its words. What cannot be a base is refused by
name.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from models import batch, differences, mlp, snapshot, stepper, through_file
from torch import Tensor, nn
from torch_inventory import Case, bad_options, cases, optimizers, supports

from relora_opt import JaggedSchedule, ReLoRAOptimizer

DOUBLE = torch.float64
ALONE = (torch.optim.LBFGS, torch.optim.SparseAdam)  # they work with nothing selected
DENSE = [case for case in cases() if case.optimizer not in ALONE]
SCHEDULE = JaggedSchedule(4, restart_warmup=2, warm_start=2)  # a switch after 2, a restart after 6


def is_of_its_own(case: Case) -> bool:
    """Whether a case has a path or a state of its own: other rates, and the other sign, go the way of the default."""
    words = case.description
    return words == "default" or not (case.implementation or "default lr" in words or words.startswith("maximize"))


SAMPLED = [pytest.param(case, marks=() if is_of_its_own(case) else pytest.mark.slow) for case in DENSE]
each_case = pytest.mark.parametrize("case", DENSE, ids=str)
each_closure_case = pytest.mark.parametrize("case", [c for c in cases() if c.optimizer is torch.optim.LBFGS], ids=str)
each_sparse_case = pytest.mark.parametrize(
    "case", [c for c in cases() if c.optimizer is torch.optim.SparseAdam], ids=str
)


class Matrices(nn.Module):
    """A network of matrices alone, which is what Muon trains; the first two are selected, the head stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7, bias=False)
        self.second = nn.Linear(7, 6, bias=False)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def network(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return (Matrices() if case.optimizer is torch.optim.Muon else mlp()).to(DOUBLE)


def gradients(model: nn.Module, u: int) -> None:
    model.zero_grad()
    F.mse_loss(model(batch(u, DOUBLE)[0]), batch(u, DOUBLE)[1]).backward()


def wrapped(case: Case, model: nn.Module, **changes: Any) -> ReLoRAOptimizer:
    settings: dict[str, Any] = {"rank": 2, "targets": ["first", "second"], "schedule": SCHEDULE}
    if case.optimizer is torch.optim.Adafactor:  # which no scale matches
        settings["alpha"] = None
    options = {key: value for key, value in case.options.items() if key != "alpha"}
    return ReLoRAOptimizer(model, case.optimizer, **{**settings, **changes}, **options)


# ---- the inventory


def test_the_inventory_holds_every_optimizer_of_torch() -> None:
    public = {getattr(torch.optim, name) for name in torch.optim.__all__} - {torch.optim.Optimizer}
    assert {kind for kind in public if isinstance(kind, type)} == set(optimizers())
    assert {case.optimizer for case in cases()} == set(optimizers())
    assert len(DENSE) > 150


def test_reading_the_inventory_leaves_hypothesis_a_profile_of_its_own() -> None:
    name = hypothesis.settings.get_current_profile_name()
    assert name in ("default", "ci")
    assert str(hypothesis.settings()) == str(hypothesis.settings.get_profile(name))


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, {"CI": "true"}], ids=["as it is", "CI"])
def test_reading_the_inventory_leaves_hypothesis_as_it_was(variables: dict[str, str]) -> None:
    """Hypothesis chooses a profile by the environment, torch's module sets its own; a new process sees the import."""
    script = (
        "import hypothesis as h; seen = lambda: (h.settings.get_current_profile_name(), str(h.settings()))\n"
        "before = seen(); import torch_inventory; assert seen() == before, (before, seen())"
    )
    environment = os.environ | variables
    folder = Path(__file__).parent
    ran = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@each_case
def test_with_nothing_selected_the_wrapper_is_the_base_bitwise(case: Case) -> None:
    model, plain = network(case), network(case)
    optimizer = wrapped(case, model, rank=0, targets=None)
    base = case.optimizer(plain.parameters(), **case.options)
    for u in range(5):
        for m, o in ((model, optimizer), (plain, base)):
            gradients(m, u)
            o.step()
        assert not differences(model.state_dict(), plain.state_dict()), f"update {u}"
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert not differences(dict(optimizer.state[ours]), dict(base.state[theirs]))


@each_closure_case
def test_with_nothing_selected_lbfgs_and_its_closure_are_the_base_bitwise(case: Case) -> None:
    model, plain = network(case), network(case)
    optimizer = wrapped(case, model, rank=0, targets=None)
    base = case.optimizer(plain.parameters(), **case.options)
    for u in range(2):
        losses = []
        for m, o in ((model, optimizer), (plain, base)):

            def closure(m: nn.Module = m, u: int = u) -> Tensor:
                gradients(m, u)
                return F.mse_loss(m(batch(u, DOUBLE)[0]), batch(u, DOUBLE)[1])

            losses.append(o.step(closure).detach())
        assert torch.equal(*losses)
        assert not differences(model.state_dict(), plain.state_dict())


@each_sparse_case
def test_with_nothing_selected_sparse_adam_is_the_base_bitwise(case: Case) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(9, 4, sparse=True)
    plain = nn.Embedding.from_pretrained(table.weight.detach().clone(), freeze=False, sparse=True)
    optimizer = wrapped(case, table, rank=0, targets=None)
    base = case.optimizer(plain.parameters(), **case.options)
    for u in range(4):
        for m, o in ((table, optimizer), (plain, base)):
            m.zero_grad()
            m(torch.tensor([u, u + 2])).square().sum().backward()
            o.step()
        assert torch.equal(table.weight, plain.weight)


@pytest.mark.parametrize("case", SAMPLED, ids=str)
def test_with_weights_selected_both_paths_agree_and_move_the_weights(case: Case) -> None:
    """Across the switch and a restart. To 1e-9 in float64: sums of a few dozen products in another order, which
    optimizers that divide by a root of a small second moment enlarge."""
    models = []
    for path in ("dense", "functional"):
        model = network(case)
        optimizer = wrapped(case, model)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        step = stepper(path, optimizer, model)
        for u in range(8):
            step(*batch(u, DOUBLE))
        assert (optimizer.num_updates, optimizer.num_restarts) == (8, 1)
        assert all(p.isfinite().all() for p in model.parameters())
        assert all(not torch.equal(p, start[name]) for name, p in model.named_parameters())
        models.append(model.state_dict())
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("case", [case for case in SAMPLED if not case.values[0].implementation], ids=str)
def test_continuing_from_a_file_equals_never_having_stopped(case: Case) -> None:
    model = network(case)
    optimizer = wrapped(case, model)
    step = stepper("dense", optimizer, model)
    snapshots = [snapshot(model, optimizer)]
    for u in range(9):
        step(*batch(u, DOUBLE))
        snapshots.append(snapshot(model, optimizer))
    for stop in (0, 1, 2, 6, 7):  # before the first step, in the warm start, at the switch, at and after a restart
        resumed = network(case)
        fresh = wrapped(case, resumed)
        saved = through_file(snapshots[stop])
        resumed.load_state_dict(saved["model"])
        fresh.load_state_dict(saved["optimizer"])
        assert not differences(snapshot(resumed, fresh), snapshots[stop])
        resumed_step = stepper("dense", fresh, resumed)
        for u in range(stop, stop + 2):
            resumed_step(*batch(u, DOUBLE))
        assert not differences(snapshot(resumed, fresh), snapshots[stop + 2]), f"stopped after {stop}"


# ---- what is refused


@pytest.mark.parametrize(("kind", "options", "words"), bad_options(), ids=lambda value: str(value)[:40])
def test_what_torch_refuses_is_refused_in_its_words(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], words: str
) -> None:
    for rank in (0,) if kind in ALONE else (0, 2):
        with pytest.raises(ValueError, match=words):
            ReLoRAOptimizer(Matrices(), kind, rank=rank, **options)


@pytest.mark.parametrize("kind", [k for k in optimizers() if supports(k, "differentiable")])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("as_group", [False, True])
def test_differentiable_is_refused_clearly(kind: type[torch.optim.Optimizer], rank: int, as_group: bool) -> None:
    own, options = ({"differentiable": True}, {}) if as_group else ({}, {"differentiable": True})
    groups = [{"params": list(Matrices().parameters()), "rank": rank, **own}]
    with pytest.raises(ValueError, match="differentiable=True is not supported: the update of W is made in place"):
        ReLoRAOptimizer(groups, kind, rank=rank, **options)


def as_factory(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    return lambda groups: kind(groups)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (torch.optim.LBFGS, "LBFGS evaluates its closure many times an update: it works with rank=0"),
        (
            torch.optim.SparseAdam,
            "SparseAdam takes sparse gradients, and those of factors are dense: it works with rank=0",
        ),
    ],
    ids=["LBFGS", "SparseAdam"],
)
@pytest.mark.parametrize(
    "wrap", [lambda kind: kind, functools.partial, as_factory], ids=["class", "partial", "factory"]
)
def test_a_base_that_cannot_move_factors_is_refused_by_name(
    kind: type[torch.optim.Optimizer], why: str, wrap: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=why):
        ReLoRAOptimizer(Matrices(), wrap(kind), rank=2, targets=r"weight$")


def test_muon_gets_the_factors_as_the_matrices_they_are() -> None:
    seen: list[torch.Size] = []

    class Recording(torch.optim.Muon):
        def step(self, closure: Any = None) -> None:
            seen.extend(p.shape for group in self.param_groups for p in group["params"])
            super().step(closure)

    model = Matrices()
    optimizer = ReLoRAOptimizer(model, Recording, rank=2, alpha=2, targets=["first", "second"])
    seen.clear()  # of trials
    stepper("dense", optimizer, model)(*batch(0))
    assert seen[:4] == [(2, 5), (7, 2), (2, 7), (6, 2)]


def test_muon_refuses_by_name_what_is_not_a_matrix() -> None:
    with pytest.raises(ValueError, match=r"stem\.bias \(7,\) is no matrix, and Muon takes nothing else: "):
        ReLoRAOptimizer(mlp(), torch.optim.Muon, rank=2)
