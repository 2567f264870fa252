"""`make_step(process_group=...)`: several processes train what one process would on all of their batches."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import batch, mlp
from ranks import Ranks
from torch import Tensor, nn

from relora_opt import Guard, JaggedSchedule, ReLoRAOptimizer, gradients
from relora_opt.guard import NUM_LOSSES

SIZE = 2
UPDATES = 7


def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def optimizer_of(model: nn.Module, *, turns: int = 1, **options: Any) -> ReLoRAOptimizer:
    schedule = JaggedSchedule(2, restart_warmup=1, warm_start=2, warm_start_turns=turns)
    return ReLoRAOptimizer(model, rank=2, lr=0.01, schedule=schedule, max_grad_norm=1.0, **options)


def train(process_group: dist.ProcessGroup | None, rank: int, **settings: Any) -> dict[str, Tensor]:
    """Train on this process's halves of the batches, or on whole ones."""
    model = mlp(torch.float64)
    init, turns = settings.pop("init", "kaiming"), settings.pop("turns", 1)
    optimizer = optimizer_of(model, init=init, turns=turns)
    step = optimizer.make_step(model, loss_fn, process_group=process_group, **settings)
    for index in range(UPDATES * settings.get("accumulate", 1)):
        x, y = batch(index, torch.float64)
        if process_group is not None:
            x, y = x.tensor_split(SIZE)[rank], y.tensor_split(SIZE)[rank]
        step(x, y)
    assert optimizer.num_updates == UPDATES
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trains_alike(rank: int, group: dist.ProcessGroup, settings: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13's compiler uses what torch 2.13 deprecates
        return train(group, rank, **settings)


def skips_together(rank: int, group: dist.ProcessGroup, settings: dict[str, Any]) -> Any:
    """Only the last process has a bad batch."""
    model = mlp(torch.float64)
    optimizer = optimizer_of(model)
    step = optimizer.make_step(model, loss_fn, compile=False, skip_nonfinite=True, process_group=group)
    x, y = batch(0, torch.float64)
    bad = x.clone()
    bad[0, 0] = float("nan")
    step(bad if rank == SIZE - 1 else x, y)
    assert optimizer.num_updates == 0
    step(x, y)
    return optimizer.num_updates


def skips_a_jump_together(rank: int, group: dist.ProcessGroup, settings: dict[str, Any]) -> Any:
    """The last process alone has a batch that explodes: the others' loss of it is an ordinary one."""
    model = mlp(torch.float64)
    guard = Guard(losses=[1.0, 1.5] * (NUM_LOSSES // 2))
    step = optimizer_of(model).make_step(model, loss_fn, compile=False, guard=guard, process_group=group)
    x, y = batch(0, torch.float64)
    step(x, y)
    step(x, y * 100 if rank == SIZE - 1 else y)
    return guard.reason, [*guard.losses]


def starts_apart(rank: int, group: dist.ProcessGroup, settings: dict[str, Any]) -> Any:
    """Weights, a buffer, 16-bit masters, factors and seeds are of each process's own; a weight is not contiguous.

    So are matched scales, in their last digit, as on two kinds of processors.
    """
    dtype = settings["dtype"]
    torch.manual_seed(rank)
    model = mlp(dtype, seed=rank)
    model.first.weight.data = model.first.weight.data.t().contiguous().t()
    model.register_buffer("shift", torch.full((3,), rank == 1))
    schedule = JaggedSchedule(2, restart_warmup=1, warm_start=2)
    optimizer = ReLoRAOptimizer(model, torch.optim.SGD, rank=2, lr=0.01, schedule=schedule, seed=rank)
    optimizer._matched = {key: scale * (1 + 1e-3 * rank) for key, scale in optimizer._matched.items()}
    alone = optimizer.functional(model)
    for index in range(settings["alone"]):
        loss_fn(alone, *batch(rank + index, dtype)).backward()
        optimizer.step()
        optimizer.zero_grad()
    step = optimizer.make_step(model, loss_fn, compile=False, process_group=group)
    seen = []
    for index in range(5):
        step(*(part.tensor_split(SIZE)[rank] for part in batch(index, dtype)))
        masters = [entry["master"] for entry in optimizer.state.values() if "master" in entry]
        seen.append([tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers(), *masters)])
    return seen


class Aliased(nn.Module):
    """A model that reads a weight past its module, where no low-rank weight can stand in for it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = mlp(torch.float64)
        self.alias = [self.model.first.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + (x @ self.alias[0][:, : x.shape[1]].mT).mean(1, keepdim=True)


def reads_elsewhere(rank: int | None, group: dist.ProcessGroup | None, settings: dict[str, Any]) -> Any:
    model = Aliased()
    step = optimizer_of(model).make_step(model, loss_fn, compile=False, process_group=group)
    for index in range(UPDATES):
        x, y = batch(index, torch.float64)
        step(*((x, y) if rank is None else (part.tensor_split(SIZE)[rank] for part in (x, y))))
    return [p.detach().clone() for p in model.parameters()]


def refuses_to_train_apart(rank: int, group: dist.ProcessGroup, settings: dict[str, Any]) -> Any:
    """`dist.group.WORLD`, read before the processes have met, is None; here they meet after the step was made."""
    model = mlp()
    with pytest.raises(ValueError, match=r"make_step without process_group in one of 2 processes.*group\.WORLD, read"):
        optimizer_of(model).make_step(model, loss_fn, compile=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        optimizer = optimizer_of(model)
        step = optimizer.make_step(model, loss_fn, compile=False)
    with pytest.raises(ValueError, match="make_step without process_group in one of 2 processes"):
        step(*batch(0))
    assert optimizer.num_updates == 0


def refuses_other_models(rank: int, group: dist.ProcessGroup, settings: dict[str, Any]) -> Any:
    model = nn.Linear(4 + rank, 4)
    optimizer = ReLoRAOptimizer(model, rank=2, lr=0.01, targets=["weight"])
    with pytest.raises(ValueError, match="rank 1 of it has another model or clock than rank 0"):
        optimizer.make_step(model, loss_fn, compile=False, process_group=group)


def averages(rank: int, group: dist.ProcessGroup, settings: dict[str, Any]) -> Any:
    """One gradient is everywhere, one on the first process alone (sparse), one nowhere; small buckets, two dtypes."""
    sizes = (3, 2, 5, 1, 2)
    tensors = [torch.zeros(n, dtype=torch.float64 if n == 5 else torch.float32, requires_grad=True) for n in sizes]
    for tensor in (tensors[0], tensors[2], tensors[4]):
        tensor.grad = torch.full_like(tensor, 1.0 + rank)
    if rank == 0:
        tensors[1].grad = torch.ones(2).to_sparse()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "_BUCKET_SIZE", 4)
        gradients.average_(tensors, group)
    return [None if tensor.grad is None else tensor.grad.tolist() for tensor in tensors]


def averages_half(rank: int, group: dist.ProcessGroup, settings: dict[str, Any]) -> Any:
    """Beside a float16 gradient whose sum would overflow lies a frozen parameter of integers."""
    half, frozen = torch.zeros(3, dtype=torch.float16, requires_grad=True), torch.zeros(3, dtype=torch.int8)
    half.grad = torch.full_like(half, 40_000.0)
    gradients.average_([half, frozen], group)
    return half.grad.tolist()


def _with_group(rank: int, work: Callable[..., Any], settings: dict[str, Any]) -> Any:
    return work(rank, dist.group.WORLD, settings)


def on_all(ranks: Ranks, work: Callable[..., Any], **settings: Any) -> list[Any]:
    """Return what the work gives in each of SIZE processes."""
    return ranks.run(_with_group, work, settings)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # as in trains_alike
@pytest.mark.parametrize(
    "settings",
    [
        {"compile": False},
        {"compile": False, "accumulate": 3, "init": "orthogonal"},
        {"compile": False, "turns": 2},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
)
def test_processes_train_what_one_does(ranks: Ranks, settings: dict[str, Any]) -> None:
    whole = train(None, 0, **settings)
    first, second = on_all(ranks, trains_alike, **settings)
    for name, weight in whole.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", [{"dtype": torch.float32, "alone": 0}, {"dtype": torch.bfloat16, "alone": 3}])
def test_processes_that_start_apart_train_alike_from_the_first_update_on(
    ranks: Ranks, settings: dict[str, Any]
) -> None:
    first, second = on_all(ranks, starts_apart, **settings)
    for update, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        assert len(ours) == len(theirs)
        assert all(map(torch.equal, ours, theirs)), update


def test_processes_that_would_train_apart_are_refused(ranks: Ranks) -> None:
    assert on_all(ranks, refuses_to_train_apart) == [None, None]


def test_processes_with_different_models_are_refused_in_all_of_them(ranks: Ranks) -> None:
    assert on_all(ranks, refuses_other_models) == [None, None]


def test_an_update_is_skipped_by_all_or_none(ranks: Ranks) -> None:
    assert on_all(ranks, skips_together) == [1, 1]


def test_a_jump_in_one_process_is_skipped_by_all_and_all_know_the_same(ranks: Ranks) -> None:
    (reason, losses), other = on_all(ranks, skips_a_jump_together)
    assert reason.startswith("loss ")
    assert "is above" in reason
    assert len(losses) == NUM_LOSSES
    assert (reason, losses) == other


def test_gradients_that_some_processes_lack_count_as_zero(ranks: Ranks) -> None:
    assert on_all(ranks, averages) == [[[1.5] * 3, [0.5] * 2, [1.5] * 5, None, [1.5] * 2]] * 2


def test_a_16_bit_mean_does_not_overflow_and_frozen_parameters_stay_at_home(ranks: Ranks) -> None:
    assert on_all(ranks, averages_half) == [[40_000.0] * 3] * 2


def test_a_weight_that_is_read_elsewhere_trains_alike_in_all_processes(ranks: Ranks) -> None:
    first, second = on_all(ranks, reads_elsewhere)
    alone = reads_elsewhere(None, None, {})
    for one, other, whole in zip(first, second, alone, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, whole, rtol=1e-9, atol=1e-12)
