"""Muon beside AdamW, the example of a factory that shares groups out: each trains its own, bitwise as alone."""

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from models import MLP, batch, differences, jagged_schedule, mlp, mse, snapshot, stepper
from torch import nn
from torch.optim import AdamW, Muon
from torch.optim.optimizer import register_optimizer_step_post_hook

from relora_opt import ReLoRAOptimizer, muon_beside_adamw, prune
from relora_opt.bases import MuonBesideAdamW

MUON: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.05, "adjust_lr_fn": "match_rms_adamw"}
ADAMW: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.05}
FACTORY = muon_beside_adamw(betas=(0.9, 0.95), weight_decay=0.05, momentum=0.9)
SCHEDULE = jagged_schedule(4, 2, 2)


def parts(model: MLP) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return matrices, [p for p in model.parameters() if p.dim() != 2]


def together(model: MLP) -> torch.optim.Optimizer:
    matrices, rest = parts(model)
    return FACTORY([{"params": matrices, "is_matrices": True}, {"params": rest}], lr=0.02)


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], first: int, last: int) -> None:
    for u in range(first, last):
        model.zero_grad()
        mse(model, *batch(u)).backward()
        for optimizer in optimizers:
            optimizer.step()


def low_rank(model: MLP, **changes: Any) -> ReLoRAOptimizer:
    settings: dict[str, Any] = {"rank": 2, "targets": ["first", "second"], "lr": 0.02, "schedule": SCHEDULE}
    return ReLoRAOptimizer(model, FACTORY, **{**settings, **changes})


def test_each_trains_its_groups_bitwise_as_alone() -> None:
    model, plain = mlp(), mlp()
    matrices, rest = parts(plain)
    train(model, [together(model)], 0, 5)
    train(plain, [Muon(matrices, **MUON), AdamW(rest, **ADAMW)], 0, 5)
    assert not differences(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("how", ["load", "deepcopy", "pickle"])
def test_alone_it_continues_bitwise_from_a_state_or_a_copy(how: str) -> None:
    model = mlp()
    optimizer = together(model)
    train(model, [optimizer], 0, 3)
    twin_model, twin = (
        copy.deepcopy((model, optimizer)) if how != "pickle" else pickle.loads(pickle.dumps((model, optimizer)))
    )
    if how == "load":
        twin = together(twin_model)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, [optimizer], 3, 6)
    train(twin_model, [twin], 3, 6)
    assert not differences(snapshot(model, optimizer), snapshot(twin_model, twin))


def test_muon_trains_the_factors_and_adamw_everything_else() -> None:
    model = mlp()
    optimizer = low_rank(model)
    step = stepper("dense", optimizer, model)
    for u in range(3):
        step(*batch(u))
    for name, p in model.named_parameters():
        entry = optimizer.state[p]
        if name in optimizer.selected:
            assert entry["A_state"].keys() == entry["B_state"].keys() == {"momentum_buffer"}
        else:
            assert entry.keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("strategy", [prune.reset(), prune.magnitude(0.5), prune.keep()], ids=str)
@pytest.mark.parametrize("alpha", [3.0, "matched"])
def test_both_paths_agree_and_continue_bitwise_over_switch_and_restarts(strategy: Any, alpha: Any) -> None:
    """The paths to 2e-3 in float32: Muon multiplies in bfloat16."""
    models = []
    for path in ("dense", "functional"):
        model = mlp()
        optimizer = low_rank(model, prune=strategy, alpha=alpha)
        step = stepper(path, optimizer, model)
        for u in range(4):
            step(*batch(u))
        saved = snapshot(model, optimizer)
        resumed = mlp(seed=1)
        fresh = low_rank(resumed, prune=strategy, alpha=alpha)
        resumed.load_state_dict(saved["model"])
        fresh.load_state_dict(saved["optimizer"])
        resumed_step = stepper(path, fresh, resumed)
        for u in range(4, 9):
            step(*batch(u))
            resumed_step(*batch(u))
        assert optimizer.num_restarts == 1
        assert not differences(snapshot(model, optimizer), snapshot(resumed, fresh))
        models.append(model.state_dict())
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=2e-3, atol=2e-3, msg=name)


def test_global_step_hooks_fire_once_an_update() -> None:
    model, calls = mlp(), []
    optimizer = low_rank(model)
    step = stepper("dense", optimizer, model)
    handle = register_optimizer_step_post_hook(lambda *_: calls.append(1))
    for u in range(7):
        step(*batch(u))
    handle.remove()
    assert len(calls) == 7


class Experts(nn.Module):
    """Stacked matrices, as mixtures of experts hold them, beside a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.experts = nn.Parameter(torch.randn(2, 6, 5))
        self.norm = nn.LayerNorm(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.einsum("bi,eio->beo", self.conv(x).mean((-1, -2)), self.experts))


@pytest.mark.parametrize(
    ("base", "targets", "warm_start", "words"),
    [
        (FACTORY, ["experts"], 0, r"experts \(2, 6, 5\) is no matrix, and MuonBesideAdamW .*: leave it out of targets"),
        (FACTORY, ["conv"], 3, r"conv\.weight \(6, 3, 3, 3\) is no matrix, .* takes nothing else: leave it out of"),
        (Muon, ["conv"], 0, r"experts \(2, 6, 5\) is no matrix, and Muon takes nothing else: muon_beside_adamw\(\)"),
        (
            Muon,
            ["experts"],
            0,
            r"experts \(2, 6, 5\) is no matrix, and Muon takes nothing else: leave it out of targets",
        ),
    ],
)
def test_what_is_no_matrix_is_refused_by_name(base: Any, targets: list[str], warm_start: int, words: str) -> None:
    schedule = jagged_schedule(4, 2, warm_start)
    with pytest.raises(ValueError, match=words):
        ReLoRAOptimizer(Experts(), base, rank=2, targets=targets, schedule=schedule, lr=0.02)


def test_muon_over_a_whole_model_names_what_it_does_not_take() -> None:
    with pytest.raises(
        ValueError, match=r"stem\.bias \(7,\) is no matrix, and Muon takes nothing else: muon_beside_ad"
    ):
        ReLoRAOptimizer(mlp(), Muon, rank=2, lr=0.02)


def test_an_added_weight_that_is_no_matrix_is_refused_by_name() -> None:
    optimizer = low_rank(mlp(), schedule=jagged_schedule(4, 2, 2))
    conv = nn.Conv2d(3, 6, 3).weight
    with pytest.raises(
        ValueError, match=r"conv\.first\.weight \(6, 3, 3, 3\) is no matrix, .*: leave it out of targets"
    ):
        optimizer.add_param_group({"params": [("conv.first.weight", conv)], "rank": 2})


@pytest.mark.parametrize("path", ["dense", "functional"])
def test_without_a_warm_start_muon_trains_the_factors_of_convolutions(path: str) -> None:
    torch.manual_seed(0)
    model = Experts()
    optimizer = ReLoRAOptimizer(model, FACTORY, rank=2, targets=["conv"], schedule=jagged_schedule(2, 1, 0), lr=0.02)
    before = model.conv.weight.detach().clone()
    step = stepper(path, optimizer, model, lambda model, x: model(x).square().mean())
    for _ in range(3):
        step(torch.randn(4, 3, 5, 5))
    assert optimizer.state[model.conv.weight]["A_state"].keys() == {"momentum_buffer"}
    assert not torch.equal(before, model.conv.weight)
    assert optimizer.num_restarts == 1


def test_a_group_of_muons_that_is_no_matrix_is_refused_in_its_words() -> None:
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        FACTORY([{"params": [mlp().norm.weight], "is_matrices": True}], lr=0.1)


@pytest.mark.parametrize(
    "build", [lambda **options: FACTORY([mlp().first.weight], **options), partial(low_rank, mlp())]
)
def test_an_option_that_neither_muon_nor_adamw_takes_is_refused_by_name(build: Any) -> None:
    with pytest.raises(
        TypeError, match=r"bettas=\(0.9, 0.95\) is an option neither of Muon nor of AdamW: .* betas, cap"
    ):
        build(lr=0.02, bettas=(0.9, 0.95))
    optimizer = build(lr=0.02, ns_steps=3, amsgrad=True, is_matrices=False)
    assert all(group["ns_steps"] == 3 and group["amsgrad"] for group in optimizer.param_groups)


def test_parts_that_take_any_option_get_any() -> None:
    def sgd(groups: Any, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, **options)

    optimizer = MuonBesideAdamW([mlp().first.weight], muon=sgd, adamw=AdamW, lr=0.02, anything=3)
    assert optimizer.param_groups[0]["anything"] == 3
