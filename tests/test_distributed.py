"""Two processes, gloo: DDP and FSDP2 train what one process trains, every rank alike, and runs move between them."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import MLP, batch, differences, jagged_schedule, mlp, mse, relora, selected_weights
from ranks import Ranks
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

from relora_opt import JaggedSchedule, ReLoRAOptimizer, memory, prune, save_merged

SIZE = 2
LAST = 16
SCHEDULE = jagged_schedule(restart_every=4, restart_warmup=2, warm_start=3)  # switch after 3; restarts after 7, 11, 15
# float32 adds the same numbers in another order; 16 updates at a rate of 0.01 carry that on.
CLOSE: dict[str, float] = {"rtol": 0, "atol": 2e-6}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    group = Ranks(SIZE)
    yield group
    group.stop()


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
    dtype = next(model.parameters()).dtype
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
}


def fsdp2_beside_one(rank: int, changes: dict[str, Any]) -> dict[str, Any]:
    one, many = mlp(), sharded(mlp())
    alone, optimizer = relora(one, schedule=SCHEDULE, **changes), relora(many, schedule=SCHEDULE, **changes)
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


@pytest.mark.parametrize("case", CASES)
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
        tolerance = CLOSE if dtype == torch.float32 else {"rtol": 0, "atol": 0.01}  # bfloat16 of the model's forward
        torch.testing.assert_close(whole(ours), theirs.detach(), **tolerance, msg=lambda text, n=name: f"{n}: {text}")
        if dtype == torch.bfloat16 and ours.dim() > 1:
            assert torch.equal(whole(ours), whole(optimizer.state[ours]["master"]).bfloat16())


@pytest.mark.parametrize(
    ("dtype", "init"), [(torch.float32, "kaiming"), (torch.float32, "gradient"), (torch.bfloat16, "kaiming")], ids=str
)
def test_fsdp2_shards_uneven_rows_convolutions_experts_and_masters(ranks: Ranks, dtype: torch.dtype, init: str) -> None:
    ranks.run(fsdp2_of_odd_shapes, dtype, init)


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


@pytest.mark.parametrize("stop", [2, 4, 7, 9])
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
