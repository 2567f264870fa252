"""memory() equals a count by hand, and metrics() a computation with dense matrices, in every phase and precision."""

import copy
import math
import pickle
from dataclasses import asdict
from typing import Any

import pytest
import torch
from models import MLP, PATHS, batch, differences, jagged_schedule, mlp, relora, selected_weights, snapshot, stepper
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from relora_opt import JaggedSchedule, Memory, Metrics, ReLoRAOptimizer, WeightMetrics, memory, prune

# The MLP of models.py: stem (7, 5) + 7; first (6, 7) + 6 and second (8, 6), selected; norm 6 + 6; head (3, 8) + 3.
SELECTED = 6 * 7 + 8 * 6
DENSE = 7 * 5 + 7 + 6 + 6 + 6 + 3 * 8 + 3
FACTORS = 2 * (6 + 7) + 2 * (8 + 6)  # rank 2
NUM_DENSE_TENSORS = 7
STEP = 4  # bytes of AdamW's counter, one a trained tensor


def trained(
    num_updates: int, dtype: torch.dtype = torch.float32, base: str = "AdamW", **changes: Any
) -> tuple[MLP, ReLoRAOptimizer]:
    """Return a model and its optimizer after updates of a schedule that switches after 3 and restarts after 7."""
    model = mlp(dtype)
    optimizer = relora(model, base, schedule=jagged_schedule(4, 1, 3), **changes)
    step = stepper("dense", optimizer, model)
    for u in range(num_updates):
        step(*batch(u, dtype))
    return model, optimizer


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.float64, 8), (torch.bfloat16, 2)], ids=str)
def test_in_the_warm_start_everything_is_trained_at_full_rank(dtype: torch.dtype, width: int) -> None:
    _, optimizer = trained(2, dtype)
    weights = (SELECTED + DENSE) * width
    assert memory(optimizer) == Memory(
        num_parameters=SELECTED + DENSE,
        num_trainable=SELECTED + DENSE,
        weight_bytes=weights,
        gradient_bytes=weights,
        factor_bytes=0,
        base_bytes=2 * weights + (NUM_DENSE_TENSORS + 2) * STEP,
        master_bytes=0,
        full_rank_adamw_bytes=2 * weights,
    )
    assert memory(optimizer).full_rank_total_bytes == 4 * weights


@pytest.mark.parametrize("num_updates", [3, 4, 7, 12], ids=lambda u: f"after {u}")
@pytest.mark.parametrize(
    ("dtype", "width", "factor_width", "master_width"),
    [(torch.float32, 4, 4, 0), (torch.float64, 8, 8, 0), (torch.bfloat16, 2, 4, 4), (torch.float16, 2, 4, 4)],
    ids=str,
)
def test_in_the_low_rank_phase_there_are_factors_their_moments_and_the_masters_of_16_bit_weights(
    dtype: torch.dtype, width: int, factor_width: int, master_width: int, num_updates: int
) -> None:
    _, optimizer = trained(num_updates, dtype, lr=1e-4)
    has_stepped = num_updates > 3  # right after the switch the base has not made its state of the factors yet
    copies = 3 if has_stepped else 1  # a factor and its two moments
    num_counters = NUM_DENSE_TENSORS + (4 if has_stepped else 0)
    assert memory(optimizer) == Memory(
        num_parameters=SELECTED + DENSE,
        num_trainable=FACTORS + DENSE,
        weight_bytes=(SELECTED + DENSE) * width,
        gradient_bytes=FACTORS * factor_width + DENSE * width,
        factor_bytes=FACTORS * factor_width,
        base_bytes=(copies - 1) * FACTORS * factor_width + 2 * DENSE * width + num_counters * STEP,
        master_bytes=SELECTED * master_width,
        full_rank_adamw_bytes=2 * (SELECTED + DENSE) * width,
    )
    sizes = optimizer.memory()
    assert sizes.state_bytes == sizes.factor_bytes + sizes.base_bytes + sizes.master_bytes
    assert sizes.total_bytes == sizes.state_bytes + sizes.weight_bytes + sizes.gradient_bytes


def test_sgd_with_momentum_keeps_one_tensor_a_parameter() -> None:
    _, optimizer = trained(5, base="SGD")
    assert memory(optimizer).state_bytes == 2 * FACTORS * 4 + DENSE * 4


def test_before_the_first_update_nothing_is_held() -> None:
    _, optimizer = trained(0)
    assert memory(optimizer).state_bytes == 0
    assert memory(optimizer).num_trainable == SELECTED + DENSE


@pytest.mark.parametrize("draws_early", [False, True])
def test_without_a_warm_start_the_coming_update_trains_factors_from_the_beginning(draws_early: bool) -> None:
    model = mlp()
    optimizer = relora(model)
    if draws_early:
        optimizer.factors(model.first.weight)
    assert memory(optimizer).num_trainable == FACTORS + DENSE


def test_frozen_parameters_are_not_trained_and_cost_adamw_nothing() -> None:
    model = mlp()
    model.stem.requires_grad_(False)
    optimizer = relora(model)
    stepper("dense", optimizer, model)(*batch(0))
    frozen = 7 * 5 + 7
    assert memory(optimizer) == Memory(
        num_parameters=SELECTED + DENSE,
        num_trainable=FACTORS + DENSE - frozen,
        weight_bytes=(SELECTED + DENSE) * 4,
        gradient_bytes=(FACTORS + DENSE - frozen) * 4,
        factor_bytes=FACTORS * 4,
        base_bytes=2 * FACTORS * 4 + 2 * (DENSE - frozen) * 4 + (NUM_DENSE_TENSORS - 2 + 4) * STEP,
        master_bytes=0,
        full_rank_adamw_bytes=2 * (SELECTED + DENSE - frozen) * 4,
    )


@pytest.mark.parametrize("num_updates", [0, 5], ids=lambda u: f"after {u}")
def test_factors_of_weights_that_are_frozen_are_held_but_not_trained(num_updates: int) -> None:
    model = mlp()
    optimizer = relora(model)
    step = stepper("functional", optimizer, model)
    for index in range(num_updates):
        step(*batch(index))
    before = memory(optimizer)
    model.first.weight.requires_grad_(False)
    sizes, frozen = memory(optimizer), 2 * (6 + 7)
    assert sizes.num_trainable == before.num_trainable - frozen == FACTORS + DENSE - frozen
    assert sizes.gradient_bytes == before.gradient_bytes - 4 * frozen
    assert sizes.state_bytes == before.state_bytes


class Hoarding(torch.optim.SGD):
    """SGD that keeps tensors made of others, whose own dtype says nothing of their size, in containers of any kind."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                low = TwoTensor(torch.zeros(p.shape, dtype=torch.float64), torch.zeros(p.shape, dtype=torch.float64))
                self.state[p] = {
                    "made of two": low,
                    "made of three": TwoTensor(low, torch.zeros(p.shape, dtype=torch.float64)),
                    "many": (torch.zeros(3), [torch.zeros(5), (torch.zeros(7),)]),
                }
        return super().step(closure)


def test_every_byte_of_what_a_base_keeps_is_counted_however_it_is_kept() -> None:
    model = mlp()
    optimizer = ReLoRAOptimizer(model, Hoarding, rank=2, alpha=2, targets=["first", "second"], lr=0.1)
    stepper("dense", optimizer, model)(*batch(0))
    assert memory(optimizer).base_bytes == (FACTORS + DENSE) * 5 * 8 + (NUM_DENSE_TENSORS + 4) * 15 * 4


def test_tied_weights_count_once_and_rank_0_is_full_rank() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9, bias=False))
    model[1].weight = model[0].weight
    optimizer = ReLoRAOptimizer(model, torch.optim.AdamW, rank=0)
    model(torch.arange(9)).sum().backward()
    optimizer.step()
    assert memory(optimizer) == Memory(72, 72, 72 * 4, 72 * 4, 0, 2 * 72 * 4 + STEP, 0, 2 * 72 * 4)


def test_batches_of_matrices_are_counted_whole() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stacked = nn.Parameter(torch.randn(3, 6, 5))

    model = Experts()
    optimizer = ReLoRAOptimizer(model, torch.optim.SGD, rank=2, targets=["stacked"], lr=0.1)
    model.stacked.square().sum().backward()
    optimizer.step()
    factors = 3 * 2 * (6 + 5)
    assert memory(optimizer) == Memory(90, factors, 90 * 4, factors * 4, factors * 4, 0, 0, 2 * 90 * 4)


# ---- metrics()

NOTHING = WeightMetrics(low_rank_ratio=None, update_rms=None, pruned_share=None)


class Mixed(nn.Module):
    """A convolution, stacked experts, a tall and a wide layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 6, 3)
        self.first = nn.Linear(18, 7)
        self.experts = nn.Parameter(torch.randn(3, 6, 7) / 3)
        self.second = nn.Linear(6, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(self.conv(x.unsqueeze(1)).flatten(1)))
        return self.head(torch.tanh(self.second(torch.tanh(torch.einsum("bn,emn->bem", h, self.experts)).mean(1))))


MIXED = ["experts", "conv.weight", "first.weight", "second.weight"]


def mixed(dtype: torch.dtype = torch.float32) -> Mixed:
    torch.manual_seed(0)
    return Mixed().to(dtype)


def effective(optimizer: ReLoRAOptimizer, W: Tensor) -> Tensor:
    """Return a weight in its own precision: the float32 one of 16 bits, where there is one."""
    return optimizer.state.get(W, {}).get("master", W).detach().double().clone()


def dense_ratio(optimizer: ReLoRAOptimizer, weights: list[Tensor]) -> float:
    factors = [[factor.detach().double() for factor in optimizer.factors(W)] for W in weights]
    products = [optimizer.scale(W) * (B @ A) for W, (A, B) in zip(weights, factors, strict=True)]
    return length(products) / length([effective(optimizer, W) for W in weights])


def length(tensors: list[Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())


def rms(tensors: list[Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).square().mean().sqrt())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        (mixed, torch.float64, 1e-9),
        (mlp, torch.float64, 1e-9),
        (mixed, torch.float32, 1e-4),  # the difference of two W's, which this is held against, has lost some digits
        (mlp, torch.bfloat16, 1e-4),  # that of two float32 masters, too
    ],
    ids=["mixed, float64", "float64", "mixed, float32", "bfloat16"],
)
@pytest.mark.parametrize("base", ["AdamW", "SGD"])
def test_every_number_equals_one_of_dense_matrices(
    path: str, kind: Any, dtype: torch.dtype, tolerance: float, base: str
) -> None:
    model = kind(dtype)
    names = MIXED if kind is mixed else ["first.weight", "second.weight"]
    schedule = jagged_schedule(restart_every=5, restart_warmup=2, warm_start=3)
    optimizer = relora(model, base, schedule=schedule, targets=names, alpha="matched" if kind is mixed else 3.0)
    weights = [model.get_parameter(name) for name in names]
    step = stepper(path, optimizer, model)
    optimizer.measures_updates = True
    for u in range(1, 15):
        before = [effective(optimizer, W) for W in weights]
        step(*batch(u, dtype))
        found = optimizer.metrics()
        assert list(found.weights) == names == optimizer.selected
        if u < 3:
            assert found.weights == dict.fromkeys(names, NOTHING)
            continue
        moved = [effective(optimizer, W) - old for W, old in zip(weights, before, strict=True)]
        own = zip(found.weights.values(), [[W] for W in weights], [[move] for move in moved], strict=True)
        for numbers, some, moves in [*own, (found, weights, moved)]:
            assert numbers.low_rank_ratio == pytest.approx(dense_ratio(optimizer, some), rel=tolerance)
            if u == 3:  # the last one of the warm start
                assert numbers.update_rms is None
            else:
                assert numbers.update_rms == pytest.approx(rms(moves), rel=tolerance)
        assert (found.low_rank_ratio == 0) == (u in (3, 8, 13))  # the switch and the restarts
        assert found.updates_to_restart == {0: 8 - u, 1: 13 - u, 2: 18 - u}[found.num_restarts]
        assert found.num_restarts == (u >= 8) + (u >= 13)
        assert found.lr_multiplier == optimizer.lr_multiplier
        assert found.memory == memory(optimizer)


@pytest.mark.parametrize("path", PATHS)
def test_an_update_is_measured_only_where_it_was_asked_for(path: str) -> None:
    model = mlp()
    optimizer = relora(model)
    step = stepper(path, optimizer, model)
    seen = []
    for u, is_on in enumerate([False, True, True, False]):
        optimizer.measures_updates = is_on
        step(*batch(u))
        seen.append(optimizer.metrics().update_rms is not None)
    assert seen == [False, True, True, False]


def test_released_gradients_move_and_measure_alike() -> None:
    found = []
    for is_released in (False, True):
        model = mlp(torch.float64)
        optimizer = relora(model, schedule=JaggedSchedule(3), release_grads=is_released)
        optimizer.measures_updates = True
        step = stepper("dense", optimizer, model)
        for u in range(5):
            step(*batch(u, torch.float64))
        found.append(optimizer.metrics())
    assert found[0].update_rms == pytest.approx(found[1].update_rms, rel=1e-9)
    assert found[0].low_rank_ratio == pytest.approx(found[1].low_rank_ratio, rel=1e-9)


def test_a_weight_that_got_no_gradient_has_moved_by_0() -> None:
    model = mlp()
    optimizer = relora(model)
    optimizer.measures_updates = True
    model.first(torch.ones(2, 7)).sum().backward()
    optimizer.step()
    found = optimizer.metrics().weights
    assert found["second.weight"].update_rms == 0.0
    assert found["first.weight"].update_rms is not None
    assert found["first.weight"].update_rms > 0.0


@pytest.mark.parametrize("path", ["functional", "step"])
def test_sketches_are_no_part_of_the_weight(path: str) -> None:
    model = mlp(torch.float64)
    optimizer = relora(model, init="gradient", schedule=JaggedSchedule(5))
    step = stepper(path, optimizer, model)
    optimizer.measures_updates = True
    for u in range(1, 9):
        step(*batch(u, torch.float64))
        found = optimizer.metrics()
        is_sketched = u in (1, 2, 6, 7)  # the first two of each cycle
        assert (found.update_rms == 0.0) == is_sketched
        assert (found.low_rank_ratio == 0.0) == (is_sketched or u == 5)


def test_a_switch_leaves_the_last_update_known_and_no_restarts_share() -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(2, warm_start=2, warm_start_at=3))
    optimizer.measures_updates = True
    step, found = stepper("dense", optimizer, model), []
    for u in range(7):
        step(*batch(u))
        found.append(optimizer.metrics())
    assert [seen.low_rank_ratio is None for seen in found] == [False, False, True, True, False, False, False]
    assert [seen.update_rms is None for seen in found] == [False, False, False, True, True, False, False]
    assert [seen.pruned_share for seen in found] == [None, 1.0, None, None, None, None, 1.0]
    assert [seen.num_restarts for seen in found] == [0, 1, 1, 1, 2, 2, 3]


def test_how_far_weights_move_is_not_known_while_some_are_at_full_rank() -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(0, warm_start=2, warm_start_at=1, warm_start_turns=2))
    optimizer.measures_updates = True
    step, found = stepper("dense", optimizer, model), []
    for u in range(7):
        step(*batch(u))
        found.append(optimizer.metrics())
    assert [seen.update_rms is None for seen in found] == [False, True, True, True, True, False, False]
    assert [seen.low_rank_ratio is None for seen in found] == [True] * 4 + [False] * 3
    ratios = [[seen.weights[f"{name}.weight"].low_rank_ratio for name in ("first", "second")] for seen in found[:4]]
    assert [[ratio is None for ratio in pair] for pair in ratios] == [[True, False]] * 2 + [[False, True]] * 2
    moved = [[seen.weights[f"{name}.weight"].update_rms for name in ("first", "second")] for seen in found]
    assert [[rms is None for rms in pair] for pair in moved[1:5]] == [[True, False]] * 2 + [[False, True]] * 2
    assert all(rms is None or rms > 0 for pair in moved for rms in pair)


@pytest.mark.parametrize("init", ["kaiming", "gradient"])
@pytest.mark.parametrize("warm_start", [0, 3])
def test_before_the_first_update_there_is_nothing_to_see_and_nothing_comes_of_looking(
    init: str, warm_start: int
) -> None:
    model = mlp()
    optimizer = relora(model, init=init, schedule=JaggedSchedule(4, warm_start=warm_start))
    before = snapshot(model, optimizer)
    found = optimizer.metrics()
    assert found.low_rank_ratio == (None if warm_start else 0.0)
    assert (found.update_rms, found.pruned_share, found.updates_to_restart) == (None, None, warm_start + 4)
    assert found.memory.num_trainable == (SELECTED if warm_start else FACTORS) + DENSE
    assert not differences(snapshot(model, optimizer), before)
    assert not optimizer.state


def test_factors_that_were_asked_for_before_the_first_update_count() -> None:
    model = mlp(torch.float64)
    optimizer = relora(model)
    W = model.first.weight
    with torch.no_grad():
        optimizer.factors(W)[1].fill_(0.5)
    assert optimizer.metrics().weights["first.weight"].low_rank_ratio == pytest.approx(dense_ratio(optimizer, [W]))
    assert torch.equal(optimizer.factors(W)[1], torch.full((6, 2), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("init", ["kaiming", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_looking_changes_nothing(path: str, init: str, dtype: torch.dtype) -> None:
    runs = []
    for is_watched in (True, False):
        model = mlp(dtype)
        optimizer = relora(model, init=init, schedule=jagged_schedule(4, 1, 3), prune=prune.magnitude(0.5))
        optimizer.measures_updates = is_watched
        step = stepper(path, optimizer, model)
        for u in range(9):
            if is_watched:
                optimizer.metrics()
            step(*batch(u, dtype))
        runs.append(snapshot(model, optimizer))
    assert not differences(*runs)


@pytest.mark.parametrize(
    ("strategy", "share"),
    [(prune.reset(), 1.0), (prune.keep(), 0.0), (prune.magnitude(0.75), 0.75), (prune.random(0.25), 0.25)],
    ids=str,
)
@pytest.mark.parametrize("base", ["AdamW", "SGD"])
def test_the_share_that_the_last_restart_pruned_is_that_of_the_zeros(
    strategy: prune.Strategy, share: float, base: str
) -> None:
    model = mlp()
    optimizer = relora(model, base, prune=strategy, schedule=JaggedSchedule(4))
    step = stepper("dense", optimizer, model)
    for u in range(4):
        assert optimizer.metrics().pruned_share is None
        step(*batch(u))
    found, totals = optimizer.metrics(), [0, 0]
    for name, W in selected_weights(model).items():
        states = [optimizer.state[W][key] for key in ("A_state", "B_state")]
        moments = [t for state in states for t in state.values() if isinstance(t, Tensor) and t.dim() == 2]
        zeros, size = sum(int((t == 0).sum()) for t in moments), sum(t.numel() for t in moments)
        if moments:  # SGD's fresh state is none
            assert found.weights[f"{name}.weight"].pruned_share == zeros / size
            totals = [totals[0] + zeros, totals[1] + size]
    assert found.pruned_share == (totals[0] / totals[1] if totals[1] else share)
    assert found.pruned_share == pytest.approx(share, abs=0.03)  # a whole number of a factor's elements
    for u in range(4, 8):
        assert optimizer.metrics().pruned_share == found.pruned_share
        step(*batch(u))
    assert optimizer.num_restarts == 2


@pytest.mark.parametrize(
    ("base", "options", "share"),
    [
        (torch.optim.SGD, {}, None),
        (torch.optim.Adafactor, {"alpha": 2.0}, 1.0),
        (torch.optim.SGD, {"momentum": 0.9}, 1.0),
    ],
)
def test_a_base_without_moments_has_no_share_and_one_with_others_is_reset_whole(
    base: Any, options: dict[str, Any], share: float | None
) -> None:
    model = mlp()
    optimizer = ReLoRAOptimizer(model, base, rank=2, schedule=JaggedSchedule(3), lr=0.01, **options)
    step = stepper("dense", optimizer, model)
    for u in range(4):
        step(*batch(u))
    assert optimizer.metrics().pruned_share == share


def test_what_is_remembered_of_the_last_update_and_restart_ends_with_the_process() -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(4))
    optimizer.measures_updates = True
    step = stepper("dense", optimizer, model)
    for u in range(5):
        step(*batch(u))
    found = optimizer.metrics()
    assert None not in asdict(found).values()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.measures_updates
        assert other.metrics() == forgetful(found)
    saved = copy.deepcopy(optimizer.state_dict())
    assert not differences(optimizer.state_dict(), saved)
    optimizer.load_state_dict(saved)
    assert optimizer.metrics() == forgetful(found)


def forgetful(metrics: Metrics) -> Metrics:
    weights = {name: WeightMetrics(seen.low_rank_ratio, None, None) for name, seen in metrics.weights.items()}
    return Metrics(**{**vars(metrics), "weights": weights, "update_rms": None, "pruned_share": None})


def test_full_rank_and_plain_lora_have_no_restart_to_come() -> None:
    for rank, schedule in ((0, JaggedSchedule(4)), (2, JaggedSchedule(0))):
        model = mlp()
        optimizer = relora(model, rank=rank, schedule=schedule)
        optimizer.measures_updates = True
        stepper("dense", optimizer, model)(*batch(0))
        found = optimizer.metrics()
        assert found.updates_to_restart is None
        assert len(found.weights) == (2 if rank else 0)
        assert (found.low_rank_ratio is None) == (found.update_rms is None) == (rank == 0)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_is_none(value: float) -> None:
    model = mlp()
    optimizer = relora(model)
    optimizer.measures_updates = True
    stepper("dense", optimizer, model)(*batch(0))
    with torch.no_grad():
        optimizer.factors(model.first.weight)[1][0, 0] = value
    found = optimizer.metrics()
    assert found.weights["first.weight"].low_rank_ratio is None
    assert found.low_rank_ratio is None
    assert found.weights["second.weight"].low_rank_ratio is not None


def test_a_weight_of_zeros_has_no_ratio() -> None:
    model = mlp()
    nn.init.zeros_(model.first.weight)
    found = relora(model).metrics()
    assert found.weights["first.weight"].low_rank_ratio is None
    assert found.low_rank_ratio == 0.0


class Watch(TorchDispatchMode):
    """Counts the scalars that are read, and keeps the largest number of elements that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_reads = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.num_reads += func is torch.ops.aten._local_scalar_dense.default
        if isinstance(result, Tensor) and not func.is_view:
            self.largest = max(self.largest, result.numel())
        return result


def test_looking_waits_for_the_device_once_and_makes_nothing_of_the_weights_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 60), nn.Linear(60, 40))
    optimizer = ReLoRAOptimizer(model, rank=2, targets=["0.weight", "1.weight", "2.weight"], lr=0.01)
    step = stepper("step", optimizer, model, lambda model, x: model(x).square().mean())
    step(torch.ones(3, 40))
    lists: list[Tensor] = []
    to_list = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: (lists.append(tensor), to_list(tensor))[1])
    with Watch() as watch:
        optimizer.metrics()
    assert (watch.num_reads, len(lists)) == (0, 1)
    assert watch.largest < 2 * 2 * 60  # factors have 2 x 60 elements and less, weights 2000 and more


@pytest.mark.parametrize("strategy", [prune.reset(), prune.magnitude(0.5)], ids=str)
def test_measuring_an_update_and_a_restart_reads_nothing_from_the_device(strategy: prune.Strategy) -> None:
    reads = []
    for is_on in (False, True):
        model = mlp()
        optimizer = relora(model, prune=strategy, schedule=JaggedSchedule(2))
        optimizer.measures_updates = is_on
        step = stepper("dense", optimizer, model)
        step(*batch(0))
        with Watch() as watch:
            step(*batch(1))
        assert optimizer.num_restarts == 1
        reads.append(watch.num_reads)
    assert reads[0] == reads[1]
