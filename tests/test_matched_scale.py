"""alpha "matched": an update of the factors moves W as far, in RMS, as the base's own update would at the same rate."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import mlp, relora, selected_weights
from torch import nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)
from torch.optim.lr_scheduler import LambdaLR
from torch_inventory import Case, cases

from relora_opt import JaggedSchedule, ReLoRAOptimizer, memory
from relora_opt.matched import trial_shape

M, N, R = 24, 96, 6
LIKE_ADAM = math.sqrt(N / R)
DIGITS = 5e-4  # a scale has four of them
EXPECTED: dict[str, tuple[Callable[..., Optimizer], float, float]] = {
    # base, s, and what its trial may be off by: its eps (Adadelta) or the spread of singular values (Muon)
    "AdamW": (AdamW, LIKE_ADAM, 1e-6),
    "AdamW foreach": (partial(AdamW, foreach=True), LIKE_ADAM, 1e-6),
    "Adadelta": (Adadelta, LIKE_ADAM, 0.01),
    "Adagrad": (Adagrad, LIKE_ADAM, 1e-6),
    "Adamax": (Adamax, LIKE_ADAM, 1e-6),
    "NAdam": (NAdam, LIKE_ADAM, 1e-6),
    "RAdam": (RAdam, LIKE_ADAM, 1e-6),
    "RMSprop": (RMSprop, LIKE_ADAM, 1e-6),
    "Rprop": (Rprop, LIKE_ADAM, 1e-6),
    "SGD": (SGD, 1.0, 1e-5),
    "SGD with momentum": (partial(SGD, momentum=0.9), 1.0, 1e-5),
    "Muon": (Muon, 1.0, 0.2),
    "Muon as AdamW": (partial(Muon, adjust_lr_fn="match_rms_adamw"), LIKE_ADAM, 0.2),
}


def matched(base: Callable[..., Optimizer], shape: tuple[int, int] = (M, N), **changes: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    settings = {"rank": R, "lr": 0.01, "weight_decay": 0.0, **changes}
    if base is Rprop:
        del settings["weight_decay"]
    return model[0].weight, ReLoRAOptimizer(model, base, targets=["0"], **settings)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_scale_is_what_the_base_calls_for(name: str) -> None:
    base, expected, tolerance = EXPECTED[name]
    W, optimizer = matched(base)
    assert optimizer.scale(W) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("init", ["kaiming", "orthogonal", "gradient"])
@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (32, 32)])
def test_the_first_update_moves_w_as_far_as_adamw_would(init: str, shape: tuple[int, int]) -> None:
    W, optimizer = matched(AdamW, shape, init=init)
    before = W.detach().clone()
    W.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    moved = (W.detach() - before).square().mean().sqrt()
    # Kaiming's rows are matched by another draw of them, and are not orthogonal: measured 0.82 and more at these sizes.
    assert float(moved) == pytest.approx(0.01, rel=0.25 if init == "kaiming" else DIGITS)


@pytest.mark.parametrize("rank", [1, 2, 8, 16])
def test_sgd_moves_w_by_its_own_update_projected_onto_the_span_of_a(rank: int) -> None:
    W, optimizer = matched(SGD, rank=rank, init="gradient")
    before = W.detach().clone()
    G = torch.randn(M, N, generator=torch.Generator().manual_seed(1))
    W.grad = G.clone()
    optimizer.step()
    A, _ = optimizer.factors(W)
    expected = -0.01 * (G @ A.mT) @ A
    assert torch.allclose(W.detach() - before, expected.detach(), rtol=1e-3, atol=1e-7)


def test_sgd_is_matched_for_a_draw_that_is_not_orthonormal_too() -> None:
    W, optimizer = matched(SGD, init="kaiming")
    before, A = W.detach().clone(), optimizer.factors(W)[0].detach()
    G = torch.randn(M, R, generator=torch.Generator().manual_seed(1)) @ torch.linalg.qr(A.mT)[0].mT
    W.grad = G.clone()
    optimizer.step()
    # The draw that the scale was found with is another than the weight's.
    assert float((W.detach() - before).norm()) == pytest.approx(0.01 * float(G.norm()), rel=0.25)


def test_weights_of_different_widths_have_different_scales_and_numbers_stay_what_they_are() -> None:
    model = mlp()
    optimizer = relora(model, alpha="matched")
    first, second = selected_weights(model).values()
    assert optimizer.scale(first) == pytest.approx(math.sqrt(7 / 2), rel=DIGITS)
    assert optimizer.scale(second) == pytest.approx(math.sqrt(6 / 2), rel=DIGITS)
    assert relora(model, alpha=3.0).scale(first) == 1.5
    assert relora(model, alpha=None).scale(first) == 1.0
    with pytest.raises(KeyError, match="not low-rank in this optimizer"):
        optimizer.scale(model.head.weight)


def test_a_group_may_have_its_own_alpha() -> None:
    model = mlp()
    groups = [
        {"params": [("first.weight", model.first.weight)], "rank": 2, "alpha": "matched"},
        {"params": [("second.weight", model.second.weight)], "rank": 2, "alpha": 5.0},
    ]
    optimizer = ReLoRAOptimizer(groups)
    assert optimizer.scale(model.first.weight) == pytest.approx(math.sqrt(7 / 2), rel=DIGITS)
    assert optimizer.scale(model.second.weight) == 2.5


def test_the_scale_survives_a_restart_and_changed_options() -> None:
    W, optimizer = matched(AdamW, schedule=JaggedSchedule(1))
    before = optimizer.scale(W)
    W.grad = torch.ones_like(W)
    optimizer.param_groups[0]["betas"] = (0.5, 0.5)
    optimizer.step()
    assert optimizer.num_restarts == 1
    assert optimizer.scale(W) == before


def test_the_scale_follows_from_the_options_first_given_and_not_from_when_it_is_asked_for() -> None:
    (W, early), (X, late) = matched(AdamW, betas=(0.9, 0.95)), matched(AdamW, betas=(0.9, 0.95))
    before = early.scale(W)
    late.param_groups[0]["betas"] = (0.0, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert late.scale(X) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_scale_is_the_same_for_every_dtype_of_the_weights(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        W, optimizer = matched(AdamW)
        assert optimizer.scale(W) == pytest.approx(LIKE_ADAM, rel=DIGITS)
    finally:
        torch.set_default_dtype(before)


def test_a_model_on_the_meta_device_has_a_scale_and_a_size() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(N, M, bias=False))
    optimizer = ReLoRAOptimizer(model, rank=R, targets=["0"])
    assert optimizer.scale(model[0].weight) == pytest.approx(LIKE_ADAM, rel=DIGITS)
    assert memory(optimizer).num_trainable == R * (M + N)


# ---- as a default: bases, rates and groups of every kind


def test_the_scale_is_matched_and_a_is_orthonormal_where_nothing_is_said() -> None:
    model = mlp()
    optimizer = ReLoRAOptimizer(model, rank=2)
    W = model.first.weight
    A, _ = optimizer.factors(W)
    assert optimizer.scale(W) == 1.871  # sqrt(7 / 2), in the digits on which processes agree that round differently
    assert torch.allclose(A @ A.mT, torch.eye(2), atol=1e-6)


ALONE = (LBFGS, SparseAdam)  # they work with rank=0 alone
UNMATCHED = (Adafactor,)  # the size of what it trains decides how far it goes


@pytest.mark.parametrize("case", [case for case in cases() if case.optimizer not in ALONE], ids=str)
def test_every_optimizer_of_torch_has_its_scale_or_none(case: Case) -> None:
    base = partial(case.optimizer, **case.options)  # with the alpha that ASGD and RMSprop have
    model = nn.Sequential(nn.Linear(N, M, bias=False))
    if case.optimizer in UNMATCHED:
        with pytest.raises(ValueError, match=r"its updates go with the size of what it trains.*give alpha as a number"):
            ReLoRAOptimizer(model, base, rank=R, targets=["0"])
        assert ReLoRAOptimizer(model, base, rank=R, alpha=R, targets=["0"]).scale(model[0].weight) == 1.0
        return
    optimizer = ReLoRAOptimizer(model, base, rank=R, targets=["0"])
    like_adam = case.optimizer not in (SGD, ASGD, Muon) or case.options.get("adjust_lr_fn") == "match_rms_adamw"
    expected = LIKE_ADAM if like_adam else 1.0
    if case.options.get("adjust_lr_fn") == "spectral_unclamped":  # of torch 2.14: rates go with sqrt(rows / columns)
        expected = math.sqrt(M / N)
    # Muon's singular values spread as its coefficients leave them; Adagrad may begin at 0.1, Adadelta has a large eps.
    tolerance = {Muon: 0.25, Adagrad: 0.1}.get(case.optimizer, 0.02)
    assert optimizer.scale(model[0].weight) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("lr", [0.0, 1e-30, 1e6])
def test_the_rate_does_not_matter_0_included(lr: float) -> None:
    for base, expected in ((AdamW, LIKE_ADAM), (SGD, 1.0)):
        W, optimizer = matched(base, lr=lr)
        assert optimizer.scale(W) == pytest.approx(expected, rel=DIGITS)


def test_a_factory_that_sets_a_rate_of_0_does_not_matter() -> None:
    def idle_at_first(groups: list[dict[str, Any]], **options: Any) -> Optimizer:
        return AdamW([{**group, "lr": 0.0} for group in groups], **options)

    W, optimizer = matched(idle_at_first)
    assert optimizer.scale(W) == pytest.approx(LIKE_ADAM, rel=DIGITS)


def test_a_scheduler_that_begins_at_0_trains_as_if_the_scale_had_been_given() -> None:
    def trained(**changes: Any) -> torch.Tensor:
        W, optimizer = matched(AdamW, **changes)
        scheduler = LambdaLR(optimizer, lambda update: min(1.0, update / 4))
        assert optimizer.param_groups[0]["lr"] == 0.0
        for step in range(8):
            W.grad = torch.randn(M, N, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            scheduler.step()
        return W.detach()

    W, optimizer = matched(AdamW)
    assert torch.equal(trained(), trained(alpha=optimizer.scale(W) * R))


def test_groups_with_rates_of_their_own_have_the_same_scale() -> None:
    model = nn.Sequential(nn.Linear(N, M, bias=False), nn.Linear(M, N, bias=False), nn.Linear(N, M, bias=False))
    groups = [
        {"params": [model[0].weight], "rank": R, "lr": 0.0},
        {"params": [model[1].weight], "lr": 1.0},
        {"params": [model[2].weight], "rank": R, "lr": 1e-3, "betas": (0.5, 0.6)},
    ]
    optimizer = ReLoRAOptimizer(groups, rank=0, lr=0.1)
    for W in (model[0].weight, model[2].weight):
        assert optimizer.scale(W) == pytest.approx(LIKE_ADAM, rel=DIGITS)


def test_a_factory_sees_its_groups_in_the_trial() -> None:
    def by_place(groups: list[dict[str, Any]], **options: Any) -> Optimizer:
        matrices, rest = groups
        return AdamW([{"betas": (0.8, 0.9), **matrices}, {"weight_decay": 0.5, **rest}], **options)

    model = nn.Sequential(nn.Linear(N, M))
    optimizer = ReLoRAOptimizer(model, by_place, rank=R, targets=["0.weight"])
    assert optimizer.scale(model[0].weight) == pytest.approx(LIKE_ADAM, rel=DIGITS)


def test_a_base_that_passes_over_what_needs_no_gradient_has_a_scale() -> None:
    class Careful(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            if all(p.requires_grad for group in self.param_groups for p in group["params"]):
                super().step()

    W, optimizer = matched(Careful)
    assert optimizer.scale(W) == pytest.approx(1.0, rel=DIGITS)


def test_a_base_that_draws_at_random_leaves_the_random_numbers_of_the_run_alone() -> None:
    class Noisy(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()
            torch.rand(3)

    W, optimizer = matched(Noisy)
    before = torch.get_rng_state()
    assert optimizer.scale(W) == pytest.approx(1.0, rel=DIGITS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("saved", "live"), [(None, "matched"), ("matched", None)])
def test_a_state_keeps_the_scale_that_it_was_trained_with(saved: Any, live: Any) -> None:
    (W, ours), (X, theirs) = matched(AdamW, alpha=saved), matched(AdamW, alpha=live)
    for U, optimizer in ((W, ours), (X, theirs)):
        U.grad = torch.ones_like(U)
        optimizer.step()
    assert ours.scale(W) != theirs.scale(X)
    theirs.load_state_dict(ours.state_dict())
    assert ours.scale(W) == theirs.scale(X)


def test_a_matched_scale_is_loaded_to_the_last_digit() -> None:
    (_, ours), (X, theirs) = matched(AdamW), matched(AdamW)
    layer = nn.Linear(N, M, bias=False)
    layer.weight = X
    functional = theirs.functional(layer)
    X.grad = torch.ones_like(X)
    theirs.step()
    state = ours.state_dict()
    rounded = {name: scale * 1.0005 for name, scale in state["low_rank"].items()}  # by another processor, say
    theirs.load_state_dict({**state, "low_rank": rounded})
    assert [theirs.scale(X)] == [float(place.scale) for place in functional._places] == list(rounded.values())
    assert theirs.state_dict()["low_rank"] == rounded


def test_a_scale_that_was_given_does_not_pass_for_a_matched_one() -> None:
    (_, given), (_, theirs), (X, live) = matched(AdamW, alpha=3.0), matched(AdamW), matched(AdamW)
    own, state = live.scale(X), theirs.state_dict()
    live.load_state_dict(given.state_dict())
    assert live.scale(X) == 3.0 / R
    live.load_state_dict({**state, "low_rank": list(state["low_rank"])})
    assert live.scale(X) == own


OTHERS: dict[str, tuple[Any, Any]] = {  # a base with its options, and one like it whose matched scale is another
    "init": ((AdamW, {}), (AdamW, {"init": "kaiming"})),
    "an option of the base": ((Muon, {}), (Muon, {"adjust_lr_fn": "match_rms_adamw"})),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("updates", [0, 2])
def test_a_state_at_another_matched_scale_is_refused_and_nothing_is_changed(name: str, updates: int) -> None:
    (base, options), (other, other_options) = OTHERS[name]
    (W, ours), (X, theirs) = matched(base, **options), matched(other, **other_options)
    for _ in range(updates):
        W.grad = torch.ones_like(W)
        ours.step()
    state, scale = ours.state_dict(), theirs.scale(X)
    with pytest.raises(ValueError, match=rf"at the matched scale {ours.scale(W):.4g}, .* finds {scale:.4g}: construct"):
        theirs.load_state_dict(state)
    assert not theirs.state
    assert theirs.scale(X) == scale
    theirs.load_state_dict({**state, "low_rank": list(state["low_rank"])})  # a state of old, without scales
    assert theirs.num_updates == updates


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [
        ((4096, 1024), 128, (4096, 1024, 128)),
        ((8192, 28672), 128, (1024, 3584, 16)),
        ((8192, 28672), 3, (8192, 28672, 3)),
        ((10**6, 10**6), 4, (250_000, 250_000, 1)),
    ],
)
def test_a_large_matrix_is_tried_by_a_small_one_of_its_proportions(
    shape: tuple[int, int], rank: int, expected: tuple[int, int, int]
) -> None:
    assert trial_shape(*shape, rank) == expected


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("shape", [(192, 384), (384, 192)])
def test_the_small_matrix_has_the_scale_of_the_large_one(
    name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, tolerance = EXPECTED[name]
    W, optimizer = matched(base, shape, rank=24)
    large = optimizer.scale(W)
    monkeypatch.setattr("relora_opt.matched._LARGEST", 192 * 384 // 16)
    W, optimizer = matched(base, shape, rank=24)
    assert optimizer.scale(W) == pytest.approx(large, rel=max(1.5 * tolerance, 1e-3))  # sums of fewer numbers


class Idle(SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


class Broken(SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("call train() first")


class Contrary(SGD):
    """The larger the gradient, the smaller the update: no scale makes it larger."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.data -= p.grad / p.grad.norm() ** 2


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (Idle, r"Idle moves a weight of shape \(24, 96\) by 0.0"),
        (Broken, r"Broken cannot be tried on a matrix \(RuntimeError: call train\(\) first\)"),
        (Contrary, r"Contrary moves .* \(0.5 times as far for gradients twice as large\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_base_that_cannot_be_tried_is_refused_with_the_remedy_and_works_with_a_number(base: Any, words: str) -> None:
    with pytest.raises(ValueError, match=rf'alpha="matched", the default, .*{words}.*: give alpha as a number'):
        matched(base)
    W, optimizer = matched(base, alpha=2.0 * R)
    assert optimizer.scale(W) == 2.0
    dense = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match="give alpha as a number"):
        optimizer.add_param_group({"params": [("other.0.weight", dense)], "rank": 2, "alpha": "matched"})
    assert len(optimizer.param_groups) == 1


def test_draws_do_not_go_by_the_default_device() -> None:
    W, optimizer = matched(AdamW)
    expected = optimizer.factors(W)
    W, optimizer = matched(AdamW)
    with torch.device("meta"):
        found = optimizer.factors(W)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_without_numbers_is_taken_and_its_scale_found_when_it_has_some() -> None:
    with torch.device("meta"):
        W, optimizer = matched(AdamW)
        assert W.is_meta
        model = nn.Sequential(nn.Linear(N, M, bias=False))
        ReLoRAOptimizer(model, targets=["0"], rank=R, schedule=JaggedSchedule(10, warm_start=5))
    assert optimizer.scale(W) == LIKE_ADAM
