"""Two processes, gloo: DDP and FSDP2 train what one process trains, every rank alike, and runs move between them."""

import copy
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import MLP, batch, differences, jagged_schedule, mlp, mse, relora, selected_weights, stepper
from ranks import Ranks, reset_accelerate
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from relora_opt import JaggedSchedule, Metrics, ReLoRAOptimizer, WeightMetrics, memory, prune, save_merged

SIZE = 2
LAST = 16
SCHEDULE = jagged_schedule(restart_every=4, restart_warmup=2, warm_start=3)  # switch after 3; restarts after 7, 11, 15
# float32 adds the same numbers in another order; 16 updates at a rate of 0.01 carry that on.
CLOSE: dict[str, float] = {"rtol": 0, "atol": 2e-6}


def part(rank: int, *tensors: Tensor) -> list[Tensor]:
    """Return a rank's equal share of a batch."""
    return [tensor.chunk(SIZE)[rank] for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def state(value: Any) -> Any:
    """Return a tree with every DTensor in it gathered."""
    if isinstance(value, dict):
        return {key: state(item) for key, item in value.items()}
    return whole(value) if isinstance(value, Tensor) else value


def sharded(model: MLP) -> MLP:
    for layer in (model.first, model.second):
        fully_shard(layer)
    return fully_shard(model)


def train(model: nn.Module, optimizer: Any, updates: range, rank: int | None = None, **options: Any) -> None:
    """Make these updates, on a rank's share of every batch; `None` is one process with the whole batch."""
    dtype = options.get("dtype", next(model.parameters()).dtype)
    loss_fn = options.get("loss_fn", mse)
    for u in updates:
        data = batch(u, dtype)
        loss_fn(model, *(data if rank is None else part(rank, *data))).backward()
        optimizer.step()
        optimizer.zero_grad()


# ---- FSDP2

CASES: dict[str, dict[str, Any]] = {
    "SGD": {"base": "SGD"},
    "AdamW": {},
    "magnitude": {"prune": prune.magnitude(0.5)},
    "random": {"prune": prune.random(0.5)},
    "keep": {"prune": prune.keep()},
    "orthogonal, matched": {"init": "orthogonal", "alpha": "matched"},
    "gradient": {"init": "gradient"},
    "clipped": {"max_grad_norm": 0.1},
    "in turns": {"schedule": jagged_schedule(restart_every=4, restart_warmup=2, warm_start=3, turns=2)},
}


def fsdp2_beside_one(rank: int, changes: dict[str, Any]) -> dict[str, Any]:
    one, many = mlp(), sharded(mlp())
    changes = {"schedule": SCHEDULE, **changes}
    alone, optimizer = relora(one, **changes), relora(many, **changes)
    train(one, alone, range(LAST))
    train(many, optimizer, range(LAST), rank)
    assert (optimizer.num_updates, optimizer.num_restarts) == (LAST, 3)
    for ours, theirs in zip(many.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(whole(ours), theirs.detach(), **CLOSE)
    norms = [o.grad_norm for o in (optimizer, alone)]
    if "max_grad_norm" in changes:
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
    found: dict[str, Any] = {}
    for name, W in selected_weights(many).items():
        A, B = optimizer.factors(W)
        for tensor, other in zip(
            (A, B, optimizer.frozen_weight(W)),
            (*alone.factors(getattr(one, name).weight), alone.frozen_weight(getattr(one, name).weight)),
            strict=True,
        ):
            torch.testing.assert_close(whole(tensor), other.detach(), **CLOSE)
        assert A.placements == (Replicate(),)
        assert B.placements == W.placements == (Shard(0),)
        found[name] = A.to_local().detach()
        for key, value in optimizer.state[W]["A_state"].items():
            found[f"{name}.{key}"] = value.to_local() if isinstance(value, DTensor) else value
    return found


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in ("random", "keep") else ()) for case in CASES]
)
def test_fsdp2_trains_what_one_process_trains_and_A_is_alike_on_every_rank(ranks: Ranks, case: str) -> None:  # noqa: N802
    found = ranks.run(fsdp2_beside_one, CASES[case])
    assert not differences(*found)


class Odd(nn.Module):
    """Rows that two ranks cannot share evenly, a convolution, and three stacked experts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 5, 3)
        self.lin = nn.Linear(15, 7)
        self.experts = nn.Parameter(torch.randn(3, 6, 7) / 3)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.lin(self.conv(x.unsqueeze(1)).flatten(1)))
        return self.out(torch.tanh(torch.einsum("bn,emn->bem", h, self.experts)).mean(1))


def odd(dtype: torch.dtype = torch.float32) -> Odd:
    torch.manual_seed(0)
    return Odd().to(dtype)


def fsdp2_of_odd_shapes(rank: int, dtype: torch.dtype, init: str) -> None:
    one, many = odd(dtype), fully_shard(odd(dtype))
    targets = ["conv", "lin", "experts", "out.weight"]
    options: dict[str, Any] = {"rank": 2, "targets": targets, "schedule": SCHEDULE, "init": init, "lr": 0.01}
    alone, optimizer = ReLoRAOptimizer(one, **options), ReLoRAOptimizer(many, **options)
    train(one, alone, range(LAST))
    train(many, optimizer, range(LAST), rank)
    for (name, ours), theirs in zip(many.named_parameters(), one.parameters(), strict=True):
        # One of the 16 updates the other way, at a rate of 0.01: processors round passes in bfloat16 otherwise.
        tolerance = CLOSE if dtype == torch.float32 else {"rtol": 0, "atol": 0.02}
        torch.testing.assert_close(whole(ours), theirs.detach(), **tolerance, msg=lambda text, n=name: f"{n}: {text}")
        if dtype == torch.bfloat16 and ours.dim() > 1:
            assert torch.equal(whole(ours), whole(optimizer.state[ours]["master"]).bfloat16())


@pytest.mark.parametrize(
    ("dtype", "init"), [(torch.float32, "kaiming"), (torch.float32, "gradient"), (torch.bfloat16, "kaiming")], ids=str
)
def test_fsdp2_shards_uneven_rows_convolutions_experts_and_masters(ranks: Ranks, dtype: torch.dtype, init: str) -> None:
    ranks.run(fsdp2_of_odd_shapes, dtype, init)


def approximately(metrics: Metrics) -> Metrics:
    """Return metrics to compare others with: float32 adds the same numbers in another order, which Adam carries on."""

    def near(value: Any) -> Any:
        return pytest.approx(value, rel=1e-3, abs=1e-7) if isinstance(value, float) else value

    weights = {name: WeightMetrics(*map(near, vars(seen).values())) for name, seen in metrics.weights.items()}
    return Metrics(**{**{key: near(value) for key, value in vars(metrics).items()}, "weights": weights})


def metrics_beside_one(rank: int, make: Any, changes: dict[str, Any]) -> Any:
    one, many = make(), make()
    many = sharded(many) if isinstance(many, MLP) else fully_shard(many)
    alone, optimizer = (ReLoRAOptimizer(model, schedule=SCHEDULE, rank=2, lr=0.01, **changes) for model in (one, many))
    alone.measures_updates = optimizer.measures_updates = True
    seen = []
    for u in range(9):  # the switch after 3, a restart after 7
        train(one, alone, range(u, u + 1))
        train(many, optimizer, range(u, u + 1), rank)
        before = state(optimizer.state_dict())
        ours, theirs = optimizer.metrics(), alone.metrics()
        assert not differences(state(optimizer.state_dict()), before)
        assert list(ours.weights) == list(theirs.weights) == optimizer.selected
        assert replace(ours, memory=theirs.memory) == approximately(theirs)
        assert ours.memory.num_trainable == theirs.memory.num_trainable
        seen.append(asdict(replace(ours, memory=theirs.memory)))
    assert None not in seen[-1].values()
    assert all(numbers["pruned_share"] == 0.5 for numbers in seen[7:])
    return seen


@pytest.mark.parametrize(
    ("make", "targets"),
    [(mlp, ["first.weight", "second.weight"]), (odd, ["conv", "lin", "experts", "out.weight"])],
    ids=["mlp", "odd"],
)
def test_metrics_of_sharded_weights_are_those_of_one_process_and_alike_on_every_rank(
    ranks: Ranks, make: Any, targets: list[str]
) -> None:
    first, second = ranks.run(metrics_beside_one, make, {"targets": targets, "prune": prune.magnitude(0.5)})
    assert first == second


# ---- FSDP2: one run through two processes, one, and two again

FULL = StateDictOptions(full_state_dict=True)


def build(changes: dict[str, Any], clock: dict[str, int] | None = None, *, is_sharded: bool, seed: int = 9) -> Any:
    model = sharded(mlp(seed=seed)) if is_sharded else mlp(seed=seed)
    optimizer = relora(model, schedule=SCHEDULE, **changes)
    if clock is not None:
        optimizer.set_clock(**clock)
    return model, optimizer


def clock_of(optimizer: ReLoRAOptimizer) -> dict[str, int]:
    return {key: optimizer.param_groups[0][key] for key in ("num_updates", "num_restarts", "last_restart")}


def saves(model: nn.Module, optimizer: ReLoRAOptimizer, folder: str) -> tuple[dict[str, int], Any]:
    weights, rest = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": rest}, checkpoint_id=folder)
    return clock_of(optimizer), state({"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]})


def loads(model: nn.Module, optimizer: ReLoRAOptimizer, folder: str) -> Any:
    weights, rest = get_state_dict(model, optimizer)
    template = {"model": weights, "optimizer": rest}
    dcp.load(template, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=template["model"], optim_state_dict=template["optimizer"])
    return state({"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]})


def on_two(rank: int, changes: dict[str, Any], updates: range, folder: str, to: str, clock: Any) -> Any:
    model, optimizer = build(changes, clock, is_sharded=True, seed=0 if clock is None else 9)
    before = None if clock is None else loads(model, optimizer, folder)
    train(model, optimizer, updates, rank)
    return before, saves(model, optimizer, to)


@pytest.mark.parametrize(
    "stop", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow), 7]
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # it is, in the one process
def test_a_run_goes_from_two_ranks_to_one_and_back(ranks: Ranks, stop: int, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_grad_norm": 0.5}
    first, second, third = (str(tmp_path / name) for name in "abc")
    (_, (clock, saved)), _ = ranks.run(on_two, changes, range(stop), "", first, None)
    model, optimizer = build(changes, clock, is_sharded=False)
    assert not differences(loads(model, optimizer, first), saved)
    train(model, optimizer, range(stop, stop + 5))
    clock, saved = saves(model, optimizer, second)
    (before, (clock, after)), _ = ranks.run(on_two, changes, range(stop + 5, LAST), second, third, clock)
    assert not differences(before, saved)
    model, optimizer = build(changes, is_sharded=False, seed=0)
    train(model, optimizer, range(LAST))
    assert clock == clock_of(optimizer)
    for name, p in model.state_dict().items():
        torch.testing.assert_close(after["model"][name], p, **CLOSE)


def through_full_state_dicts(rank: int) -> None:
    model, optimizer = build({}, is_sharded=True, seed=0)
    train(model, optimizer, range(5), rank)
    weights = get_model_state_dict(model, options=FULL)
    rest = get_optimizer_state_dict(model, optimizer, options=FULL)
    saved = state(optimizer.state_dict()["state"])
    for is_sharded in (True, False):
        other, fresh = build({}, clock_of(optimizer), is_sharded=is_sharded)
        set_model_state_dict(other, copy.deepcopy(weights), options=FULL)
        set_optimizer_state_dict(other, fresh, copy.deepcopy(rest), options=FULL)
        assert not differences(state(fresh.state_dict()["state"]), saved)
    plain, fresh = build({}, is_sharded=False)
    with pytest.raises(
        ValueError, match=r"factors of first\.weight are sharded, but the weight is not.*full_state_dict"
    ):
        fresh.load_state_dict(optimizer.state_dict())
    fresh.set_clock(**clock_of(optimizer))
    set_optimizer_state_dict(plain, fresh, copy.deepcopy(rest), options=FULL)
    _, other = build({}, is_sharded=True)
    with pytest.raises(ValueError, match=r"factors of first\.weight are not sharded, but the weight is"):
        other.load_state_dict(fresh.state_dict())
    assert not other.state
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # its own, as Accelerate does
    train(model, optimizer, range(5, 9), rank)
    assert not differences(state(fresh.state_dict()["state"]), saved)


def test_a_full_state_dict_loads_sharded_or_not_and_a_bare_one_is_refused_across(ranks: Ranks) -> None:
    ranks.run(through_full_state_dicts)


def through_full_state_dicts_at_the_switch(rank: int) -> None:
    model, optimizer = build({}, is_sharded=True, seed=0)
    train(model, optimizer, range(3), rank)
    assert optimizer.is_low_rank
    assert optimizer.clock["fresh"] == optimizer.selected
    weights = get_model_state_dict(model, options=FULL)
    rest = get_optimizer_state_dict(model, optimizer, options=FULL)
    other, fresh = build({}, optimizer.clock, is_sharded=True)
    set_model_state_dict(other, copy.deepcopy(weights), options=FULL)
    set_optimizer_state_dict(other, fresh, copy.deepcopy(rest), options=FULL)
    train(model, optimizer, range(3, 6), rank)
    train(other, fresh, range(3, 6), rank)
    assert not differences(state(fresh.state_dict()["state"]), state(optimizer.state_dict()["state"]))


def test_a_full_state_dict_of_the_switch_loads_too(ranks: Ranks) -> None:
    ranks.run(through_full_state_dicts_at_the_switch)


def what_sharded_weights_refuse(rank: int, folder: str) -> tuple[int, int]:
    model, optimizer = build({}, is_sharded=True, seed=0)
    for make in (optimizer.functional, lambda model: optimizer.make_step(model, mse)):
        with pytest.raises(ValueError, match="is a DTensor: the functional path does not shard; use the dense path"):
            make(model)
    with pytest.raises(ValueError, match=r"stem\.weight is sharded: gather the weights with get_model_state_dict"):
        save_merged(model, Path(folder) / f"{rank}.safetensors")
    conv = nn.Conv1d(4, 6, 3)
    mesh = init_device_mesh("cpu", (SIZE,))
    conv.weight = nn.Parameter(distribute_tensor(conv.weight.detach(), mesh, [Shard(1)]))
    by_columns = ReLoRAOptimizer(conv, rank=2, targets=["weight"], schedule=JaggedSchedule(0), lr=0.1)
    with pytest.raises(ValueError, match=r"weight of shape \(6, 4, 3\) .*can be sharded along dimension 0 alone"):
        by_columns.factors(conv.weight)
    train(model, optimizer, range(5), rank)
    sizes = memory(optimizer)
    return sizes.state_bytes, sizes.num_parameters


def test_what_sharded_weights_cannot_do_is_refused_by_name_and_a_rank_counts_its_own_bytes(
    ranks: Ranks, tmp_path: Path
) -> None:
    found = ranks.run(what_sharded_weights_refuse, str(tmp_path))
    assert not list(tmp_path.iterdir())
    model, optimizer = build({}, is_sharded=False, seed=0)
    train(model, optimizer, range(5))
    sizes = memory(optimizer)
    assert all(size < sizes.state_bytes and number == sizes.num_parameters for size, number in found)
    entries = [optimizer.state[W] for W in selected_weights(model).values()]
    on_both = sum(3 * 4 * entry["A"].numel() for entry in entries)  # A and its two moments
    on_both += 4 * (len(optimizer.state) + len(entries))  # Adam's counters: one of each factor and dense parameter
    assert sum(size for size, _ in found) == sizes.state_bytes + on_both


def tensor_parallel(rank: int) -> None:
    """Columns of the first layer (rows of its weight) and rows of the second lie on two ranks: no data parallelism."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))

    one, many = network(), network()
    mesh = init_device_mesh("cpu", (SIZE,))
    parallelize_module(many, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    options: dict[str, Any] = {"targets": ["0.weight", "2.weight"], "init": "gradient", "schedule": SCHEDULE}
    options |= {"rank": 2, "prune": prune.magnitude(0.5), "max_grad_norm": 0.5, "lr": 0.01}
    alone, optimizer = ReLoRAOptimizer(one, **options), ReLoRAOptimizer(many, **options)
    train(one, alone, range(LAST))
    train(many, optimizer, range(LAST))
    A, B = optimizer.factors(many[2].weight)
    assert (A.placements, B.placements) == ((Shard(1),), (Replicate(),))
    for ours, theirs in zip(many.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(whole(ours), theirs.detach(), **CLOSE)


def test_factors_follow_weights_that_are_sharded_by_columns(ranks: Ranks) -> None:
    ranks.run(tensor_parallel)


def tensor_parallel_below_fsdp2(_: int, rank: int) -> None:
    """Rows of the first weight are shared out twice, in strides, and the second one's rows and columns."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 12, bias=False))

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    one, many = network(), network()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(many, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(many, mesh=mesh["data"])
    options: dict[str, Any] = {"targets": ["0.weight", "2.weight"], "schedule": SCHEDULE, "rank": rank, "lr": 0.01}
    alone, optimizer = ReLoRAOptimizer(one, **options), ReLoRAOptimizer(many, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(LAST):  # the same batch on all four
        x = torch.randn(6, 12, generator=generator)
        for model, its in ((one, alone), (many, optimizer)):
            model(x).square().mean().backward()
            its.step()
            its.zero_grad()
    for weight in (many[0].weight, many[2].weight):
        A, _ = optimizer.factors(weight)
        assert A.to_local().shape[0] == A.shape[0] == rank
    for ours, theirs in zip(many.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(whole(ours), theirs.detach(), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 4])
def test_factors_follow_weights_under_tensor_parallelism_below_fsdp2(rank: int) -> None:
    four = Ranks(4)
    try:
        four.run(tensor_parallel_below_fsdp2, rank)
    finally:
        four.stop()


def mixed_precision(rank: int) -> None:
    one, many = mlp(), mlp()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in (many.first, many.second, many):
        fully_shard(layer, mp_policy=policy)
    alone, optimizer = relora(one, schedule=SCHEDULE), relora(many, schedule=SCHEDULE)
    train(one, alone, range(LAST))
    train(many, optimizer, range(LAST), rank, loss_fn=lambda model, x, y: mse(model, x, y.bfloat16()))
    for ours, theirs in zip(many.parameters(), one.parameters(), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(whole(ours), theirs.detach(), rtol=0, atol=0.02)  # two digits of bfloat16


def test_fsdp2_computes_in_bfloat16_beside_float32_weights(ranks: Ranks) -> None:
    ranks.run(mixed_precision)


def scaled(rank: int) -> None:
    """The second rank alone meets an infinite gradient: both skip."""
    one, many = mlp(), sharded(mlp())
    alone, optimizer = relora(one, schedule=SCHEDULE), relora(many, schedule=SCHEDULE)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for u in range(LAST):
        for factor in (float("inf"), 1.0) if u in (1, 5) else (1.0,):
            x, y = part(rank, *batch(u))
            scaler.scale(mse(many, x, y) * (factor if rank == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert optimizer.num_updates == u + 1
    train(one, alone, range(LAST))
    for ours, theirs in zip(many.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(whole(ours), theirs.detach(), **CLOSE)


def test_a_grad_scaler_skips_on_all_ranks_of_fsdp2_or_on_none(ranks: Ranks) -> None:
    ranks.run(scaled)


# ---- DDP


class Counted:
    """Counts the bytes of gradients that a DistributedDataParallel communicates."""

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self.num_bytes = 0
        ddp.register_comm_hook(self, Counted.reduce)

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        self.num_bytes += buffer.numel() * buffer.element_size()
        reduced = dist.all_reduce(buffer.div_(SIZE), async_op=True).get_future()
        return reduced.then(lambda future: future.value()[0])


def ddp_around_the_model(rank: int, changes: dict[str, Any]) -> Any:
    one, many = mlp(), mlp(seed=rank)  # DDP gives all ranks the first one's weights
    wrapped = DistributedDataParallel(many)
    alone = relora(one, schedule=SCHEDULE, **changes)
    optimizer = relora(wrapped, schedule=SCHEDULE, **changes)
    assert optimizer.selected == alone.selected
    train(one, alone, range(LAST))
    train(wrapped, optimizer, range(LAST), rank)
    for ours, theirs in zip(many.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), **CLOSE)
    return state({"model": many.state_dict(), "optimizer": optimizer.state_dict()})


@pytest.mark.parametrize("case", ["AdamW", "random", "orthogonal, matched", "gradient", "clipped"])
def test_ddp_around_the_model_trains_what_one_process_trains_through_switch_and_restarts(
    ranks: Ranks, case: str
) -> None:
    found = ranks.run(ddp_around_the_model, CASES[case])
    assert not differences(*found)


def ddp_around_the_functional_model(rank: int, use_reentrant: bool | None, init: str) -> Any:
    one, many = mlp(), mlp(seed=rank, use_reentrant=use_reentrant)
    options = {"schedule": SCHEDULE, "init": init, "max_grad_norm": 0.5}
    alone, optimizer = relora(one, **options), relora(many, **options)
    f = optimizer.functional(many)
    wrapped = DistributedDataParallel(f)
    train(wrapped, optimizer, range(3), rank)
    with pytest.raises(RuntimeError, match=r"wrap optimizer\.functional\(model\) again after the switch"):
        wrapped(*part(rank, *batch(3))[:1])
    wrapped = DistributedDataParallel(f)
    counted = Counted(wrapped)
    train(wrapped, optimizer, range(3, LAST), rank)
    step = stepper("functional", alone, one)
    for u in range(LAST):
        step(*batch(u))
    for ours, theirs in zip(many.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), **CLOSE)
    dense = [p for p in many.parameters() if not any(p is W for W in selected_weights(many).values())]
    factors = [factor for W in selected_weights(many).values() for factor in optimizer.factors(W)]
    assert counted.num_bytes == (LAST - 3) * sum(4 * p.numel() for p in (*dense, *factors))
    assert all(W.grad is None for W in selected_weights(many).values())
    return state({"model": many.state_dict(), "optimizer": optimizer.state_dict()})


@pytest.mark.parametrize(
    ("use_reentrant", "init"), [(None, "kaiming"), (False, "kaiming"), (None, "gradient")], ids=str
)
def test_ddp_around_the_functional_model_communicates_factors_and_unselected_parameters_only(
    ranks: Ranks, use_reentrant: bool | None, init: str
) -> None:
    found = ranks.run(ddp_around_the_functional_model, use_reentrant, init)
    assert not differences(*found)


def ddp_from_other_weights(rank: int, dtype: torch.dtype) -> Any:
    model = mlp(dtype, seed=rank)
    before = {name: W.detach().clone() for name, W in selected_weights(mlp(dtype)).items()}
    optimizer = relora(model, schedule=JaggedSchedule(3, 1))
    wrapped = DistributedDataParallel(optimizer.functional(model))
    wrapped(*part(rank, *batch(0, dtype))[:1])
    assert not differences(before, {name: W.detach() for name, W in selected_weights(model).items()})
    train(wrapped, optimizer, range(5), rank, dtype=dtype)
    return state({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ddp_around_the_functional_model_starts_from_the_first_ranks_weights(ranks: Ranks, dtype: torch.dtype) -> None:
    found = ranks.run(ddp_from_other_weights, dtype)
    assert not differences(*found)


class WithLoss(nn.Module):
    """A module of the user's that holds the functional model."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mse(self.f, x, y)


def ddp_accumulates(rank: int) -> Any:
    one, many = mlp(), mlp(seed=rank)
    alone, optimizer = relora(one, schedule=SCHEDULE), relora(many, schedule=SCHEDULE)
    f = optimizer.functional(many)
    wrapped = DistributedDataParallel(WithLoss(f))
    train(one, alone, range(LAST))
    for u in range(LAST):
        if u == 3:
            with pytest.raises(RuntimeError, match="again after the switch"):
                wrapped(*part(rank, *batch(u)))
            wrapped = DistributedDataParallel(WithLoss(f))
        first, second = zip(*(tensor.chunk(2) for tensor in part(rank, *batch(u))), strict=True)
        with wrapped.no_sync():
            (wrapped(*first) / 2).backward()
        (wrapped(*second) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(many.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), **CLOSE)
    return state({"model": many.state_dict(), "optimizer": optimizer.state_dict()})


def test_ddp_accumulates_without_communication_and_sees_a_functional_model_inside_another_module(ranks: Ranks) -> None:
    found = ranks.run(ddp_accumulates)
    assert not differences(*found)


# ---- Accelerate and transformers


def accelerated(rank: int, is_sharded: bool) -> Any:
    """Accelerate knows FSDP on accelerators alone; here it is told that it runs there, and the rest is its own."""
    import accelerate
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator = accelerate.Accelerator(cpu=True)
    if is_sharded:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
        )
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    one, many = mlp(), mlp()
    alone, optimizer = relora(one, schedule=SCHEDULE), relora(many, schedule=SCHEDULE, max_grad_norm=100.0)
    schedulers = [torch.optim.lr_scheduler.StepLR(alone, 4), torch.optim.lr_scheduler.StepLR(optimizer, 4 * SIZE)]
    wrapped, prepared, scheduler = accelerator.prepare(many, optimizer, schedulers[1])
    for u in range(LAST):
        mse(one, *batch(u)).backward()
        alone.step()
        schedulers[0].step()
        alone.zero_grad()
        accelerator.backward(mse(wrapped, *part(rank, *batch(u))))
        prepared.step()
        scheduler.step()  # once a process
        prepared.zero_grad()
        assert scheduler.get_last_lr() == schedulers[0].get_last_lr()
    assert (optimizer.num_updates, optimizer.num_restarts) == (LAST, 3)
    trained = dict(accelerator.unwrap_model(wrapped).named_parameters())
    assert all(isinstance(p, DTensor) == is_sharded for p in trained.values())
    for name, theirs in one.named_parameters():
        torch.testing.assert_close(whole(trained[name]), theirs.detach(), **CLOSE)
    reset_accelerate()
    return state({"model": dict(trained), "optimizer": optimizer.state_dict()["state"]})


@pytest.mark.parametrize("is_sharded", [False, True], ids=["DDP", "FSDP2"])
def test_accelerate_prepares_the_optimizer_beside_ddp_and_fsdp2(ranks: Ranks, is_sharded: bool) -> None:
    found = ranks.run(accelerated, is_sharded)
    assert not differences(*found)


def trainer_under_ddp(rank: int, folder: str) -> Any:
    import test_trainers as single

    from relora_opt import trainer_factory

    rows = single.texts()
    order = [4 * u + SIZE * i + r for u in range(single.STEPS) for i in range(2) for r in range(SIZE)]
    model = single.llama()
    arguments = single.arguments(Path(folder), per_device_train_batch_size=2, ddp_backend="gloo")
    made = single.Trainer(
        model,
        arguments,
        train_dataset=[rows[i] for i in order],
        optimizer_cls_and_kwargs=(trainer_factory, single.OPTIONS),
    )
    made.remove_callback(single.PrinterCallback)
    made.train()
    single.close(single.weights(model), single.weights(single.plain_loop()[0]), atol=1e-5)
    reset_accelerate()
    return {"model": single.weights(model), "optimizer": made.optimizer.optimizer.state_dict()["state"]}


@pytest.mark.slow
def test_the_trainer_of_transformers_trains_alike_on_two_ranks(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks.run(trainer_under_ddp, str(tmp_path))
    assert not differences(*found)
