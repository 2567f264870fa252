"""What is low-rank follows DESIGN's selection, clause by clause, and nothing is dropped or added in silence."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, mlp, mse, relora
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers.pytorch_utils import Conv1D

from relora_opt import ReLoRAOptimizer, default_targets, target_names

AdamW = torch.optim.AdamW
MLP_WEIGHTS = ["stem.weight", "first.weight", "second.weight"]  # all but the head's


def selected(model: nn.Module, optimizer: ReLoRAOptimizer) -> list[str]:
    """Return the names of the low-rank parameters, in the model's order."""
    low_rank = {id(p) for group in optimizer.param_groups if group["rank"] for p in group["params"]}
    return [name for name, p in model.named_parameters() if id(p) in low_rank]


def select(model: nn.Module, rank: int = 2, **options: Any) -> list[str]:
    return selected(model, ReLoRAOptimizer(model, AdamW, rank=rank, **options))


class Tied(nn.Module):
    """A head that shares the embedding's weight, and has no telling name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.body = nn.Linear(8, 8)
        self.projection = nn.Linear(8, 11, bias=False)
        self.projection.weight = self.embedding.weight


class Declaring(nn.Module):
    """A model that says what its head is, as those of transformers do; a layer called head is none."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 8)
        self.unembed = nn.Linear(8, 11)

    def get_output_embeddings(self) -> nn.Module:
        return self.unembed


class Experts(nn.Module):
    """Three stacked matrices of 6 x 5, beside a convolution of the same number of dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.stacked = nn.Parameter(torch.randn(3, 6, 5))
        self.conv = nn.Conv1d(4, 6, 3)
        self.up = nn.ConvTranspose1d(6, 4, 3)
        self.image = nn.Conv2d(4, 6, (3, 2))


# ---- the default


def test_linear_layers_are_low_rank_by_default_and_embeddings_norms_biases_and_convolutions_are_not() -> None:
    model = nn.Sequential(
        nn.Embedding(9, 8), nn.Linear(8, 7), nn.LayerNorm(7), nn.Conv2d(7, 7, 3), nn.Bilinear(7, 7, 7)
    )
    assert select(model) == ["1.weight"] == default_targets(model)


def test_the_conv1d_of_transformers_is_low_rank_by_default_and_a_namesake_is_not() -> None:
    namesake = type("Conv1D", (nn.Module,), {})()
    namesake.weight = nn.Parameter(torch.randn(8, 8))
    assert select(nn.ModuleDict({"gpt": Conv1D(7, 8), "own": namesake})) == ["gpt.weight"]
    sharded = Conv1D(7, 8)
    sharded.__class__ = type("FSDPConv1D", (Conv1D,), {})  # as fully_shard does with whatever it is given
    assert select(nn.ModuleDict({"gpt": sharded})) == ["gpt.weight"]


def test_subclasses_of_linear_are_linear_layers() -> None:
    layer = type("Scaled", (nn.Linear,), {})(8, 8)
    assert select(nn.Sequential(layer)) == ["0.weight"]


def test_a_lone_linear_layer_is_a_model() -> None:
    assert select(nn.Linear(8, 8)) == ["weight"] == default_targets(nn.Linear(8, 8))


@pytest.mark.parametrize("name", ["lm_head", "head", "classifier", "output"])
def test_a_head_is_known_by_its_name_where_the_model_declares_none(name: str) -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "inner": nn.ModuleDict({name: nn.Linear(8, 8)})})
    assert select(model) == ["body.weight"]


@pytest.mark.parametrize("name", ["heads", "multi_head", "output_proj"])
def test_a_name_that_only_resembles_a_heads_is_no_head(name: str) -> None:
    assert select(nn.ModuleDict({name: nn.Linear(8, 8)})) == [f"{name}.weight"]


def test_a_declared_head_is_the_head_and_a_layer_of_that_name_is_not() -> None:
    assert select(Declaring()) == ["head.weight"]
    assert select(nn.ModuleDict({"inside": Declaring()})) == ["inside.head.weight"]


def test_tied_weights_stay_dense() -> None:
    assert select(Tied()) == ["body.weight"]


def test_a_layer_that_is_called_twice_is_not_tied() -> None:
    layer = nn.Linear(8, 8)
    assert select(nn.Sequential(layer, nn.ReLU(), layer)) == ["0.weight"]


def test_frozen_weights_stay_as_they_are() -> None:
    model = mlp()
    model.first.weight.requires_grad_(False)
    assert select(model) == ["stem.weight", "second.weight"]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_by_default_a_weight_is_low_rank_exactly_where_its_smaller_side_exceeds_the_rank(
    m: int, n: int, r: int
) -> None:
    model = nn.Sequential(nn.Linear(n, m), nn.Linear(13, 13))
    assert select(model, rank=r) == (["0.weight", "1.weight"] if min(m, n) > r else ["1.weight"])


# ---- explicit targets


def is_of_shape_6_7(name: str, parameter: Tensor) -> bool:
    return parameter.shape == (6, 7)


def is_the_heads(name: str, parameter: Tensor) -> bool:
    return name == "head.weight"


def is_the_seconds(name: str, parameter: Tensor) -> bool:
    return name == "second.weight"


def spelled(value: object) -> str:
    """Return a test's id, the same in every process: the text of a function holds its address."""
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (r"first|second", ["first.weight", "second.weight"]),
        (r"^s", ["stem.weight", "second.weight"]),
        (r"weight$", [*MLP_WEIGHTS, "head.weight"]),
        (["head.weight"], ["head.weight"]),
        (("second", "stem"), ["stem.weight", "second.weight"]),
        (["weight"], [*MLP_WEIGHTS, "head.weight"]),
        (is_of_shape_6_7, ["first.weight"]),
        (is_the_heads, ["head.weight"]),
    ],
    ids=spelled,
)
def test_targets_are_a_regex_or_names_of_parameters_or_modules_or_a_predicate(
    targets: Any, expected: list[str]
) -> None:
    assert select(mlp(), targets=targets) == expected == target_names(mlp(), targets)


def test_names_match_whole_parts_only() -> None:
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "kq": nn.Linear(8, 8), "deep": nn.ModuleDict({"q": nn.Linear(8, 8)})})
    assert select(model, targets=["q"]) == ["q.weight", "deep.q.weight"]
    assert select(model, targets=["deep.q"]) == ["deep.q.weight"]


def test_what_the_default_excludes_can_be_named() -> None:
    assert select(Tied(), targets=["embedding"]) == ["embedding.weight"]
    assert select(Declaring(), targets=["unembed"]) == ["unembed.weight"]
    assert select(nn.Sequential(nn.Conv2d(4, 6, 3)), targets=["0"]) == ["0.weight"]


def test_a_predicate_sees_every_parameter_of_two_or_more_dimensions_by_canonical_name() -> None:
    model, seen = mlp(), []

    def predicate(name: str, parameter: Tensor) -> bool:
        seen.append((name, parameter.shape))
        return True

    select(nn.DataParallel(model), targets=predicate)
    assert seen == [(name, p.shape) for name, p in model.named_parameters() if p.dim() > 1]


@pytest.mark.parametrize("targets", ["nothing_like_it", ["first", "nothing"], ["stem.bias"], "bias"])
def test_a_target_that_matches_nothing_is_an_error_that_names_it_alone(targets: Any) -> None:
    with pytest.raises(ValueError, match="match no parameter of two or more dimensions") as caught:
        select(mlp(), targets=targets)
    assert repr(targets if isinstance(targets, str) else targets[-1]) in str(caught.value)
    assert "'first'" not in str(caught.value)
    with pytest.raises(ValueError, match="match no parameter"):
        target_names(mlp(), targets)


@pytest.mark.parametrize("targets", [["second"], "second", is_the_seconds], ids=spelled)
def test_a_named_weight_that_the_rank_does_not_fit_is_an_error_with_its_shape(targets: Any) -> None:
    assert select(mlp(), rank=5, targets=targets) == ["second.weight"]
    with pytest.raises(ValueError, match=r"rank=6 is not below the smaller side 6 of second\.weight \(8, 6\)"):
        select(mlp(), rank=6, targets=targets)


def test_a_predicate_that_takes_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no weight is selected"):
        select(mlp(), targets=lambda name, p: False)


def test_a_named_frozen_weight_is_an_error() -> None:
    model = mlp()
    model.first.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"first\.weight is named as low-rank but frozen: set requires_grad"):
        select(model, targets=["first"])


def test_complex_weights_are_dense_by_default_and_an_error_when_named() -> None:
    model = nn.ModuleDict({"real": nn.Linear(8, 8), "complex": nn.Linear(8, 8, dtype=torch.cfloat)})
    assert select(model) == ["real.weight"]
    for targets in (["complex"], lambda name, p: True):
        with pytest.raises(
            ValueError, match=r"complex\.weight is named as low-rank but torch\.complex64: leave it out"
        ):
            select(model, targets=targets)
    with pytest.raises(ValueError, match=r"param0 is named as low-rank but torch\.complex64"):
        ReLoRAOptimizer([{"params": [model["complex"].weight], "rank": 2}], AdamW)


@pytest.mark.parametrize("targets", [None, ["1"]])
def test_a_parameter_without_a_shape_is_an_error_that_names_it(targets: Any) -> None:
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet: call the model on a batch before its optimizer"):
        select(nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8)), targets=targets)


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 0, "targets": []}, {"rank": 0, "targets": ["first"]}])
def test_rank_0_selects_nothing(options: dict[str, Any]) -> None:
    assert select(mlp(), **options) == []


@pytest.mark.parametrize("targets", [[], ()], ids=str)
def test_a_rank_with_no_targets_is_refused(targets: Any) -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.LayerNorm(16))
    assert default_targets(model) == []
    with pytest.raises(ValueError, match=r"rank=2, targets=.*: no weight is selected; .* pass rank=0"):
        select(mlp(), targets=targets)


def test_a_group_whose_rank_would_not_count_is_refused() -> None:
    model, more = mlp(), nn.Linear(8, 8)
    pairs = list(model.named_parameters())
    groups: list[dict[str, Any]] = [{"params": pairs[:-1]}, {"params": pairs[-1:], "rank": 3}]
    with pytest.raises(
        ValueError, match=r"a group says rank=3, and none of its 1 parameters is a matrix that targets="
    ):
        ReLoRAOptimizer(groups, AdamW, rank=2, targets=[pairs[0][0]], lr=1e-3)
    optimizer = ReLoRAOptimizer(model, AdamW, rank=2, targets=[pairs[0][0]], lr=1e-3)
    before = len(optimizer.param_groups)
    with pytest.raises(ValueError, match=r"a group says rank=4, and none .*: name some, or leave rank out"):
        optimizer.add_param_group({"params": [("more", more.weight)], "rank": 4})
    assert len(optimizer.param_groups) == before
    optimizer.add_param_group({"params": [("more", more.weight)], "rank": 0})
    assert optimizer.selected == [pairs[0][0]]


def test_a_rank_above_every_weight_is_an_error_with_the_largest_side() -> None:
    with pytest.raises(ValueError, match=r"rank=7 is not below the smaller side of any weight \(the largest is 6\)"):
        select(mlp(), rank=7)


# ---- parameters without a module


def test_parameters_without_names_are_refused_unless_their_groups_set_a_rank() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="pass the model itself"):
        ReLoRAOptimizer(model.parameters(), AdamW, rank=2)
    with pytest.raises(ValueError, match="pass the model itself"):
        ReLoRAOptimizer(model.named_parameters(), AdamW, rank=2)
    groups = [{"params": [model.first.weight, model.first.bias], "rank": 3}, {"params": [model.head.weight], "rank": 0}]
    assert selected(model, ReLoRAOptimizer(groups, AdamW, rank=2)) == ["first.weight"]
    assert selected(model, ReLoRAOptimizer(model.parameters(), AdamW, rank=0)) == []


def test_a_dense_parameter_may_have_the_name_of_another_and_a_low_rank_weight_may_not() -> None:
    """A head that was replaced, say, and is added under its old name."""
    model = mlp()
    optimizer = relora(model)
    model.head = nn.Linear(8, 3)
    optimizer.add_param_group({"params": [(f"head.{name}", p) for name, p in model.head.named_parameters()]})
    before = model.head.weight.detach().clone()
    mse(model, *batch(0)).backward()
    optimizer.step()
    assert not torch.equal(model.head.weight, before)
    model.first = nn.Linear(7, 6)
    with pytest.raises(ValueError, match=r"first\.weight is the name of 2 low-rank weights"):
        optimizer.add_param_group({"params": [("first.weight", model.first.weight)], "rank": 2})


def test_a_group_without_a_rank_stays_dense_beside_one_that_sets_it() -> None:
    model = mlp()
    groups = [{"params": [model.first.weight], "rank": 2}, {"params": [model.stem.weight, model.head.weight]}]
    assert selected(model, ReLoRAOptimizer(groups, AdamW, rank=2)) == ["first.weight"]


def test_named_parameters_are_selected_by_targets() -> None:
    model = mlp()
    optimizer = ReLoRAOptimizer(model.named_parameters(), AdamW, rank=2, targets=["first", "second"])
    assert selected(model, optimizer) == ["first.weight", "second.weight"]


def test_parameters_without_names_draw_different_factors_in_different_groups() -> None:
    first, second = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
    optimizer = ReLoRAOptimizer([{"params": [first], "rank": 2}, {"params": [second], "rank": 2}], AdamW)
    assert not torch.equal(optimizer.factors(first)[0], optimizer.factors(second)[0])


# ---- groups


def test_groups_have_their_own_rank_alpha_and_rate_and_split_into_a_low_rank_and_a_dense_part() -> None:
    model = mlp()
    groups = [
        {"params": list(model.stem.named_parameters("stem")), "rank": 1, "alpha": 4.0, "factor_lr": 3.0, "lr": 0.5},
        {"params": list(model.first.named_parameters("first")), "weight_decay": 0.7},
        {"params": [("head.weight", model.head.weight)], "rank": 0},
    ]
    optimizer = ReLoRAOptimizer(groups, AdamW, rank=2, alpha=3.0, factor_lr=2.0, targets=["stem", "first"], lr=0.1)
    keys = ("rank", "scale", "factor_lr", "lr", "weight_decay")
    assert [tuple(group[key] for key in keys) for group in optimizer.param_groups] == [
        (1, 4.0, 3.0, 0.5, 0.01),
        (0, 0.0, 1.0, 0.5, 0.01),
        (2, 1.5, 2.0, 0.1, 0.7),
        (0, 0.0, 1.0, 0.1, 0.7),
        (0, 0.0, 1.0, 0.1, 0.01),
    ]
    assert "alpha" not in optimizer.param_groups[0]
    assert [p.shape[0] for p in (*optimizer.factors(model.stem.weight), *optimizer.factors(model.first.weight))] == [
        1,
        7,
        2,
        6,
    ]


def test_a_group_may_be_low_rank_where_the_optimizer_is_not() -> None:
    model = mlp()
    groups = [{"params": [model.first.weight], "rank": 2}, {"params": [model.stem.weight]}]
    assert selected(model, ReLoRAOptimizer(groups, AdamW, rank=0)) == ["first.weight"]


def test_a_rank_that_does_not_fit_a_weight_of_its_group_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"rank=6 is not below the smaller side 6 of param0 \(6, 7\)"):
        ReLoRAOptimizer([{"params": [mlp().first.weight], "rank": 6}], AdamW)


def test_the_users_groups_are_left_alone() -> None:
    group = {"params": [mlp().first.weight], "rank": 2, "alpha": 1.0}
    before = dict(group)
    ReLoRAOptimizer([group], AdamW)
    assert group == before


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = Experts()
    optimizer = ReLoRAOptimizer(model, AdamW, rank=2, targets=["stacked", "image"])
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


# ---- weights that are no matrices


def test_convolutions_are_matrices_of_out_by_rest_and_other_3d_weights_batches_of_matrices() -> None:
    model = Experts()
    optimizer = ReLoRAOptimizer(model, AdamW, rank=2, targets=["stacked", "conv", "up", "image"])
    shapes = {
        name: tuple(tuple(f.shape) for f in optimizer.factors(model.get_parameter(name))) for name in select_of(model)
    }
    assert shapes == {
        "stacked": ((3, 2, 5), (3, 6, 2)),
        "conv.weight": ((2, 12), (6, 2)),
        "up.weight": ((2, 12), (6, 2)),
        "image.weight": ((2, 24), (6, 2)),
    }


def select_of(model: Experts) -> list[str]:
    return [name for name, p in model.named_parameters() if p.dim() > 1]


def test_stacked_matrices_must_each_exceed_the_rank() -> None:
    with pytest.raises(ValueError, match=r"rank=5 is not below the smaller side 5 of stacked \(3, 6, 5\)"):
        ReLoRAOptimizer(Experts(), AdamW, rank=5, targets=["stacked"])
    assert math.prod(Experts().stacked.shape[1:]) > 5  # as a matrix of (3, 30) it would fail already at rank 3
    assert select(Experts(), rank=4, targets=["stacked"]) == ["stacked"]


def test_every_matrix_of_a_batch_has_a_draw_of_its_own() -> None:
    model = Experts()
    A, _ = ReLoRAOptimizer(model, AdamW, rank=2, targets=["stacked"]).factors(model.stacked)
    assert not torch.equal(A[0], A[1])


# ---- names


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)  # type: ignore[return-value]


def data_parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


def checkpointed(model: nn.Module) -> nn.Module:
    model.first, model.second = checkpoint_wrapper(model.first), checkpoint_wrapper(model.second)
    return model


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch.compile's own, on import
@pytest.mark.parametrize(
    "wrap",
    [
        compiled,
        data_parallel,
        checkpointed,
        lambda model: compiled(data_parallel(checkpointed(model))),
        lambda model: data_parallel(compiled(model)),
    ],
)
def test_wrappers_change_neither_the_selection_nor_the_draws(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain, inner = mlp(), mlp()
    weights = {name: inner.get_parameter(name) for name in MLP_WEIGHTS}
    wrapped = wrap(inner)
    assert default_targets(wrapped) == MLP_WEIGHTS
    assert target_names(wrapped, ["first.weight", "module.second"]) == ["first.weight", "second.weight"]
    for targets in (None, r"^(stem|first|second)\.weight$", MLP_WEIGHTS):
        expected, optimizer = (ReLoRAOptimizer(m, AdamW, rank=2, targets=targets) for m in (plain, wrapped))
        for name, weight in weights.items():
            assert torch.equal(optimizer.factors(weight)[0], expected.factors(plain.get_parameter(name))[0])


def test_draws_follow_the_seed_and_the_name_and_neither_order_nor_global_randomness() -> None:
    model = mlp()
    targets = ["stem", "first", "second"]

    def draws(params: Any, **options: Any) -> list[Tensor]:
        torch.manual_seed(len(options))
        optimizer = ReLoRAOptimizer(params, AdamW, rank=2, targets=targets, **options)
        return [optimizer.factors(model.get_parameter(name))[0] for name in MLP_WEIGHTS]

    expected = draws(model)
    backwards = list(reversed(list(model.named_parameters())))
    assert all(torch.equal(a, b) for a, b in zip(draws(backwards, lr=0.5), expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(draws(model, seed=1), expected, strict=True))
    state = torch.get_rng_state()
    ReLoRAOptimizer(model, AdamW, rank=2).factors(model.first.weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_target_names_says_what_is_low_rank_whatever_the_rank() -> None:
    model = mlp()
    assert target_names(model) == default_targets(model) == MLP_WEIGHTS
    assert target_names(model, re.compile("first").pattern) == ["first.weight"]
    assert target_names(model, lambda name, p: p.shape[0] == 3) == ["head.weight"]


# ---- groups added later


def test_a_group_added_later_may_set_its_own_rank_and_shares_the_clock() -> None:
    model = mlp()
    optimizer = ReLoRAOptimizer(model, AdamW, rank=2)
    train(model, optimizer, 3)
    added = nn.Parameter(torch.randn(9, 8))
    optimizer.add_param_group({"params": [("later", added)], "rank": 3, "alpha": 6.0, "lr": 0.25})
    group = optimizer.param_groups[-1]
    assert (group["rank"], group["scale"], group["lr"], group["num_updates"]) == (3, 2.0, 0.25, 3)
    assert [tuple(factor.shape) for factor in optimizer.factors(added)] == [(3, 8), (9, 3)]
    before = added.detach().clone()
    added.grad = torch.ones_like(added)
    train(model, optimizer, 1)
    change = added.detach() - before
    assert change.any()
    assert torch.linalg.matrix_rank(change.double(), rtol=1e-4) <= 6  # B' A' - B A of rank 2 r at most


@pytest.mark.parametrize("targets", [None, ["first", "second"], "first|second"])
def test_a_dense_group_can_be_added_whatever_the_targets(targets: Any) -> None:
    model = mlp()
    optimizer = ReLoRAOptimizer(model, AdamW, rank=2, targets=targets)
    added = nn.Parameter(torch.randn(9, 8))
    optimizer.add_param_group({"params": [("later", added)], "rank": 0})
    assert optimizer.param_groups[-1]["rank"] == 0
    added.grad = torch.ones_like(added)
    before = added.detach().clone()
    train(model, optimizer, 1)
    assert not torch.equal(added, before)


def test_a_parameter_cannot_be_added_twice() -> None:
    model = mlp()
    optimizer = ReLoRAOptimizer(model, AdamW, rank=2)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": [model.first.weight], "rank": 2})
    assert len(optimizer.param_groups) == 2
    train(model, optimizer, 2)
    assert optimizer.num_updates == 2


def train(model: nn.Module, optimizer: ReLoRAOptimizer, count: int) -> None:
    for _ in range(count):
        model(torch.ones(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("parametrize", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the second is deprecated
def test_a_parametrized_convolution_is_one_matrix(parametrize: Any) -> None:
    model = nn.Sequential(parametrize(nn.Conv1d(16, 32, 7)))
    optimizer = ReLoRAOptimizer(model, torch.optim.SGD, rank=4, lr=0.1, targets=r"original1|weight_v")
    (name,) = optimizer.selected
    A, B = optimizer.factors(model.get_parameter(name))
    assert (A.shape, B.shape) == ((4, 112), (32, 4))
