"""What people do to state, groups, gradients and devices between steps is followed, or refused by a sentence."""

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import batch, mlp, mse, relora, selected_weights, snapshot, stepper
from torch import Tensor, nn

from relora_opt import Guard, JaggedSchedule, ReLoRAOptimizer, prune

# ---- state


def look_for_moments(optimizer: ReLoRAOptimizer) -> None:
    for p in optimizer.parameters():
        optimizer.state[p].get("exp_avg")  # of a defaultdict


def clear(optimizer: ReLoRAOptimizer) -> None:
    optimizer.state.clear()


def replace(optimizer: ReLoRAOptimizer) -> None:
    optimizer.state = defaultdict(dict)


@pytest.mark.parametrize("look", ["memory", "factors", "frozen_weight", "functional", "state_dict", "nothing"])
@pytest.mark.parametrize(("meddle", "after"), [(look_for_moments, 0), (clear, 3), (replace, 3)])
@pytest.mark.parametrize("path", ["dense", "functional", "step"])
def test_a_state_that_was_looked_into_or_cleared_is_trained_from_there(
    path: str, meddle: Callable[[ReLoRAOptimizer], None], after: int, look: str
) -> None:
    model = mlp()
    optimizer = relora(model)
    step = stepper(path, optimizer, model)
    for u in range(after):
        step(*batch(u))
    meddle(optimizer)
    W = model.first.weight
    seen = {
        "memory": optimizer.memory,
        "factors": lambda: optimizer.factors(W),
        "frozen_weight": lambda: optimizer.frozen_weight(W),
        "functional": lambda: optimizer.functional(model),
        "state_dict": optimizer.state_dict,
        "nothing": lambda: None,
    }
    seen[look]()
    before = [weight.detach().clone() for weight in selected_weights(model).values()]
    for u in range(5):
        step(*batch(u))
        frozen = optimizer.frozen_weight(W)
        torch.testing.assert_close(frozen, before[0], rtol=0, atol=1e-6)  # nothing but s B A has moved it
    for weight, old in zip(selected_weights(model).values(), before, strict=True):
        assert float((weight.detach() - old).abs().max()) > 0.01


@pytest.mark.parametrize("rank", [0, 2])
def test_state_that_was_put_there_before_the_first_update_is_used(rank: int) -> None:
    model = mlp(torch.float64)
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    for u in range(5):
        mse(model, *batch(u, torch.float64)).backward()
        base.step()
        base.zero_grad()
    twin = mlp(torch.float64)
    twin.load_state_dict(model.state_dict())
    targets = {"targets": ["first"]} if rank else {}
    optimizer = ReLoRAOptimizer(twin, torch.optim.AdamW, rank=rank, lr=0.01, **targets)
    pairs = [
        pair for pair in zip(model.parameters(), twin.parameters(), strict=True) if pair[0] is not model.first.weight
    ]
    for p, q in pairs:
        optimizer.state[q] = copy.deepcopy(base.state[p])
    for m, o in ((model, base), (twin, optimizer)):
        mse(m, *batch(9, torch.float64)).backward()
        o.step()
    for p, q in pairs:
        assert float(optimizer.state[q]["step"]) == 6
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


# ---- groups


def train_no_factors(optimizer: ReLoRAOptimizer) -> None:
    optimizer.param_groups[0]["rank"] = 0


def raise_rank(optimizer: ReLoRAOptimizer) -> None:
    optimizer.param_groups[0]["rank"] = 4


def set_scale(optimizer: ReLoRAOptimizer) -> None:
    optimizer.param_groups[0]["scale"] = 1.0


def drop_group(optimizer: ReLoRAOptimizer) -> None:
    del optimizer.param_groups[1]


def drop_parameter(optimizer: ReLoRAOptimizer) -> None:
    del optimizer.param_groups[0]["params"][0]


@pytest.mark.parametrize(
    ("meddle", "why"),
    [
        (train_no_factors, "has rank 0 now, and was made with 2"),
        (raise_rank, "has rank 4 now"),
        (set_scale, r"has scale 1\.0 now, and was made with 1\.5"),
        (drop_group, "holds 1 groups now, and was made of 2"),
        (drop_parameter, "has params 1 now, and was made with 2"),
    ],
)
@pytest.mark.parametrize("call", ["step", "state_dict", "restart"])
def test_groups_that_were_changed_by_hand_are_refused(
    meddle: Callable[[ReLoRAOptimizer], None], why: str, call: str
) -> None:
    model = mlp()
    optimizer = relora(model)
    step = stepper("dense", optimizer, model)
    step(*batch(0))
    meddle(optimizer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=why):
        getattr(optimizer, call)()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_loaded_scale_is_the_one_that_is_fixed_and_copies_keep_it() -> None:
    saved, model = relora(mlp(), alpha=5.0), mlp()
    optimizer = relora(model)
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.scale(model.first.weight) == 2.5
    twin, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, copied)):
        stepper("dense", o, m)(*batch(0))


def test_the_group_of_weights_of_three_dimensions_says_whether_they_are_stacked() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.router = nn.Parameter(torch.randn(8, 6, 5)), nn.Linear(5, 8)

    model = Experts()
    pairs = list(model.named_parameters())
    known = ReLoRAOptimizer(model, rank=2, targets=["w"])
    with pytest.raises(ValueError, match=r"w \(8, 6, 5\) may stack matrices.*say stacked=True or stacked=False"):
        ReLoRAOptimizer(pairs, rank=2, targets=["w"])
    with pytest.raises(TypeError, match="stacked='yes' must be True or False"):
        ReLoRAOptimizer([{"params": pairs, "stacked": "yes"}], rank=2, targets=["w"])
    stacked = ReLoRAOptimizer([{"params": pairs, "stacked": True}], rank=2, targets=["w"])
    assert (
        [f.shape for f in stacked.factors(model.w)]
        == [f.shape for f in known.factors(model.w)]
        == [(8, 2, 5), (8, 6, 2)]
    )
    assert stacked.scale(model.w) == known.scale(model.w)
    single = ReLoRAOptimizer([{"params": pairs, "stacked": False}], rank=2, targets=["w"])
    assert [f.shape for f in single.factors(model.w)] == [(2, 30), (8, 2)]
    assert "stacked" not in stacked.param_groups[0]
    assert ReLoRAOptimizer(pairs, rank=2, targets=["router"]).selected == ["router.weight"]  # nobody asks


# ---- gradients


class Fails(torch.autograd.Function):
    is_on = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        if Fails.is_on:
            raise torch.OutOfMemoryError("no memory")
        return g


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(Fails.apply(self.first(x)).tanh())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("guard", [None, Guard()])
def test_a_batch_that_failed_leaves_nothing_in_the_next_update(accumulate: int, guard: Guard | None) -> None:
    runs = []
    for fails in (True, False):
        model = Failing()
        optimizer = ReLoRAOptimizer(model, torch.optim.SGD, rank=2, lr=0.1, targets=["first", "second"])
        step = optimizer.make_step(model, mse, compile=False, accumulate=accumulate, guard=guard)
        for u in range(6):
            if fails and u == 2:
                if accumulate == 2:
                    step(*batch(7))  # of the update that is made anew
                Fails.is_on = True
                with pytest.raises(torch.OutOfMemoryError):
                    step(*batch(8))
                Fails.is_on = False
                assert all(p.grad is None for p in model.parameters())
            step(*batch(u))
        runs.append((step.num_micro_batches, optimizer.num_updates, [p.detach() for p in model.parameters()]))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


class FailsOnce(torch.optim.SGD):
    is_on = False

    def step(self, closure: Any = None) -> None:
        if FailsOnce.is_on:
            raise torch.OutOfMemoryError("no memory")
        super().step()


@pytest.mark.parametrize("guard", [None, Guard()])
def test_an_update_that_failed_leaves_nothing_in_the_next_one(guard: Guard | None) -> None:
    runs = []
    for fails in (True, False):
        model = Failing()
        optimizer = ReLoRAOptimizer(model, FailsOnce, rank=2, lr=0.1, targets=["first"])
        step = optimizer.make_step(model, mse, compile=False, guard=guard)
        for u in range(4):
            FailsOnce.is_on = fails and u == 1
            if FailsOnce.is_on:
                with pytest.raises(torch.OutOfMemoryError):
                    step(*batch(8))
                FailsOnce.is_on = False
            step(*batch(u))
        runs.append((optimizer.num_updates, [p.detach() for p in model.parameters()]))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_two_steps_of_one_optimizer_take_turns_between_updates_alone() -> None:
    model = mlp()
    optimizer = relora(model)
    first, second = (optimizer.make_step(model, mse, compile=False, accumulate=2) for _ in range(2))
    for step in (first, second, first):
        step(*batch(0))
        step(*batch(1))
    first(*batch(2))
    gradients = [p.grad.clone() for p in optimizer.factors(model.first.weight)]
    with pytest.raises(RuntimeError, match=r"another step of this optimizer has taken 1 of the 2 micro-batches"):
        second(*batch(3))
    for gradient, factor in zip(gradients, optimizer.factors(model.first.weight), strict=True):
        assert torch.equal(gradient, factor.grad)
    first(*batch(3))
    assert optimizer.num_updates == 4
    before = copy.deepcopy((model, optimizer))
    first(*batch(4))
    del first, step  # who drops a step drops the update that it has begun
    twin, copied = before
    for made in (second, copied.make_step(twin, mse, compile=False, accumulate=2)):
        made(*batch(5))
        made(*batch(6))
    assert optimizer.num_updates == copied.num_updates == 5
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_hook_that_waits_for_a_dense_gradient_is_refused_whichever_way_it_was_registered() -> None:
    model = mlp()
    optimizer = relora(model)
    functional = optimizer.functional(model)
    handle = model.first.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(RuntimeError, match=r"first\.weight has a gradient hook"):
        functional(batch(0)[0])
    handle.remove()
    model.head.weight.register_post_accumulate_grad_hook(lambda p: None)  # is called
    functional(batch(0)[0])


def test_releasing_gradients_is_no_hook_of_somebody_elses() -> None:
    model = mlp()
    step = stepper("functional", relora(model, release_grads=True), model)
    step(*batch(0))


def test_a_released_gradient_ends_where_a_state_is_loaded() -> None:
    runs = []
    for release_grads in (True, False):
        model = mlp(torch.float64)
        optimizer = relora(model, "SGD", schedule=JaggedSchedule(3), release_grads=release_grads)
        step = stepper("dense", optimizer, model)
        for u in range(2):
            step(*batch(u, torch.float64))
        saved = snapshot(model, optimizer)
        for u in range(2, 4):
            step(*batch(u, torch.float64))
        mse(model, *batch(9, torch.float64)).mul(100).backward()
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        selected = [id(W) for W in selected_weights(model).values()]
        for p in model.parameters():
            if release_grads and id(p) in selected:
                assert p.grad is None
            p.grad = None  # a dense one stays, as everywhere in torch
        step(*batch(2, torch.float64))
        runs.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-12)


class PullsBack(torch.optim.SGD):
    """SGD that also pulls every parameter towards zero, whether it has a gradient or not."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.9)


def test_w_goes_with_factors_that_a_base_moves_without_a_gradient() -> None:
    model = nn.ModuleDict({"used": nn.Linear(6, 5), "idle": nn.Linear(6, 5)}).double()
    optimizer = ReLoRAOptimizer(model, PullsBack, rank=2, lr=0.1, targets=["used", "idle"])
    x = torch.ones(3, 6, dtype=torch.float64)
    (model["used"](x).square().sum() + model["idle"](x).square().sum()).backward()
    optimizer.step()
    optimizer.zero_grad()
    frozen = optimizer.frozen_weight(model["idle"].weight)
    moved = model["idle"].weight.detach().clone()
    for _ in range(4):
        model["used"](x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(optimizer.frozen_weight(model["idle"].weight), frozen, rtol=0, atol=1e-14)
    assert not torch.allclose(model["idle"].weight, moved, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sets", [{"max_grad_norm": 0.05}, {}])
def test_sparse_gradients_are_clipped_and_guarded_by_their_values(sets: dict[str, float]) -> None:
    def run(*, sparse: bool) -> tuple[list[Tensor], float | None]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 6, sparse=sparse), nn.Linear(6, 5)).double()
        optimizer = ReLoRAOptimizer(model, torch.optim.SGD, rank=2, lr=0.1, targets=["1"], **sets)
        step = optimizer.make_step(model, lambda m, ids: m(ids).square().sum(), compile=False, skip_nonfinite=True)
        for u in range(3):
            step(torch.tensor([1, 4, 4, u]))
        assert optimizer.num_updates == 3
        norm = None if optimizer.grad_norm is None else float(optimizer.grad_norm)
        return [p.detach() for p in model.parameters()], norm

    torch.testing.assert_close(run(sparse=True), run(sparse=False), rtol=1e-12, atol=1e-12)


# ---- devices and the last update


@pytest.mark.parametrize("strategy", [prune.reset(), prune.random(0.5), prune.magnitude(0.5)], ids=str)
def test_a_restart_does_not_depend_on_the_default_device(strategy: Any) -> None:
    runs = []
    for device in ("cpu", "meta"):
        model = mlp()
        optimizer = relora(model, schedule=JaggedSchedule(2), prune=strategy)
        for u in range(5):
            mse(model, *batch(u)).backward()
            with torch.device(device):
                optimizer.step()
            optimizer.zero_grad()
        assert optimizer.num_restarts == 2
        runs.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_the_last_rate_and_norm_are_not_those_of_the_run_before_a_load() -> None:
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(100, restart_warmup=10), max_grad_norm=1.0)
    step = stepper("dense", optimizer, model)
    step(*batch(0))
    saved = snapshot(model, optimizer)["optimizer"]
    optimizer.restart()
    step(*batch(1))
    optimizer.load_state_dict(saved)
    assert optimizer.last_lr() == [0.01, 0.01]
    assert optimizer.grad_norm is None


@pytest.mark.parametrize("what", ["step", "zero_grad", "restart"])
def test_micro_batches_before_somebody_elses_step_zeroing_or_restart_are_not_counted(what: str) -> None:
    model = mlp(torch.float64)
    optimizer = ReLoRAOptimizer(model, torch.optim.SGD, rank=2, alpha=2, lr=0.1)
    step = optimizer.make_step(model, mse, compile=False, accumulate=3)
    for index in range(2):
        step(*batch(index, torch.float64))
    getattr(optimizer, what)()
    twin = copy.deepcopy((model, optimizer))
    other = twin[1].make_step(twin[0], mse, compile=False, accumulate=3)
    twin[1].zero_grad()
    made = optimizer.num_updates
    for index in range(3):
        assert optimizer.num_updates == made
        step(*batch(index, torch.float64))
        other(*batch(index, torch.float64))
    assert optimizer.num_updates == made + 1
    for ours, theirs in zip(model.parameters(), twin[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
