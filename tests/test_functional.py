"""The functional path for people who do more than call it: nothing stays swapped, nothing trains in silence."""

import copy
import pickle
from typing import Any

import pytest
import torch
from models import COMPILES, batch, mlp, mse, relora, selected_weights
from torch import Tensor, nn

from relora_opt import JaggedSchedule, LowRankWeight, ReLoRAOptimizer


class Raising(torch.autograd.Function):
    """The identity, whose backward fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("out of memory, say")


class Shared(nn.Module):
    """One linear layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def is_whole(model: nn.Module) -> bool:
    return not any(isinstance(p, LowRankWeight) for m in model.modules() for p in m._parameters.values())


def small(model: nn.Module, **changes: Any) -> ReLoRAOptimizer:
    settings = {"rank": 2, "alpha": 2, "schedule": JaggedSchedule(0), "lr": 0.1}
    return ReLoRAOptimizer(model, torch.optim.SGD, **{**settings, **changes})


@pytest.mark.parametrize("compile", COMPILES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13's compiler uses what torch 2.13 deprecates
def test_a_rollback_across_the_switch_trains_on(compile: Any) -> None:
    losses: list[list[float]] = []
    for rolls_back in (False, True):
        model = mlp(torch.float64)
        optimizer = relora(model, "AdamW", schedule=JaggedSchedule(3, 1, warm_start=2))
        step = optimizer.make_step(model, mse, compile=compile)
        step(*batch(0, torch.float64))
        if rolls_back:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            for index in range(1, 5):
                step(*batch(index, torch.float64))
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        losses.append([float(step(*batch(index, torch.float64))) for index in range(1, 9)])
    assert losses[0] == losses[1]


def test_a_module_under_two_names_trains_as_densely_and_stays_whole() -> None:
    torch.manual_seed(0)
    ours = Shared().double()
    theirs = copy.deepcopy(ours)
    functional, dense = small(ours), small(theirs)
    f = functional.functional(ours)
    for index in range(4):
        x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(index))
        for call, optimizer in ((f, functional), (theirs, dense)):
            loss = call(x).square().mean()
            assert is_whole(ours)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert is_whole(ours)
        assert ours.a is ours.b
    torch.testing.assert_close(ours.a.weight, theirs.a.weight, rtol=1e-12, atol=1e-14)  # float64, two orders of summing


def test_two_functional_models_in_one_backward_leave_the_model_whole() -> None:
    model = mlp()
    optimizer = relora(model)
    f, g = optimizer.functional(model), optimizer.functional(model)
    x, _ = batch(0)
    (f(x).sum() + g(x).square().sum()).backward()
    assert is_whole(model)


@pytest.mark.parametrize("mend", ["step", "zero_grad", "state_dict", "functional"])
def test_whatever_follows_a_backward_that_failed_makes_the_model_whole(mend: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 8))
    model[1].forward = Raising.apply  # type: ignore[assignment]
    optimizer = small(model)
    f = optimizer.functional(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        f(torch.ones(2, 8)).sum().backward()
    getattr(optimizer, mend)(*([model] if mend == "functional" else []))
    assert is_whole(model)


@pytest.mark.parametrize("path", ["dense", "functional"])
def test_a_step_inside_autocast_moves_the_weight_in_full_precision(path: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 9, 4))
    optimizer = small(model, targets=["0"], schedule=JaggedSchedule(0))
    before = model[0].weight.detach().clone()
    step = optimizer.make_step(model, lambda model, x: model(x).square().mean(), compile=False)
    for _ in range(10):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = torch.randn(2, 8, 5, 5)
            if path == "dense":
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                step(x)
            frozen = optimizer.frozen_weight(model[0].weight)
    assert not torch.equal(before, model[0].weight)
    torch.testing.assert_close(frozen, before, rtol=0, atol=1e-6)  # float32 rounding of ten moves of a weight below 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("is_contiguous", [False, True])
def test_the_output_of_a_linear_layer_can_be_changed_in_place(bias: bool, is_contiguous: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=bias), nn.ReLU(inplace=True)).double()
    optimizer = small(model, targets=["0.weight"])
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    x = x if is_contiguous else x.transpose(0, 1)
    y = optimizer.functional(model)(x)
    assert torch.equal(y, model(x))
    y.square().sum().backward()
    assert model[0].weight.grad is None
    G = torch.autograd.grad(model(x).square().sum(), model[0].weight)[0]
    A, B = optimizer.factors(model[0].weight)
    torch.testing.assert_close(B.grad, G @ A.T, rtol=1e-12, atol=1e-12)  # float64, two orders of summing


def test_a_cleared_state_does_not_leave_the_functional_model_with_orphans() -> None:
    model = mlp()
    optimizer = relora(model)
    f = optimizer.functional(model)
    weight = next(iter(selected_weights(model).values()))

    def update() -> Tensor:
        before = weight.detach().clone()
        mse(f, *batch(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return (weight - before).abs().max()

    update()
    optimizer.state.clear()
    update()
    assert update() > 0


def test_a_functional_model_shows_exactly_what_is_trained() -> None:
    model = nn.Module()  # whose names clash with those of nn.Module and nn.ParameterDict, unless they are kept apart
    model.keys, model.A, model.rest, model.other = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 8)
    model.rest.weight.requires_grad_(False)
    trained = [(n, p) for n, p in model.named_parameters() if not n.startswith("other")]
    optimizer = ReLoRAOptimizer(trained, rank=2, targets=["keys.weight"], lr=0.1)
    f = optimizer.functional(model)
    factors = optimizer.factors(model.keys.weight)
    dense = [p for n, p in trained if n != "keys.weight"]
    assert {id(p) for p in f.parameters()} == {id(p) for p in (*factors, *dense)}
    assert {id(b) for b in f.buffers()} == {id(b) for b in model.buffers()}


def test_a_selected_weight_that_is_frozen_later_is_not_trained() -> None:
    model = mlp()
    optimizer = relora(model)
    name, weight = next(iter(selected_weights(model).items()))
    weight.requires_grad_(False)
    before = weight.detach().clone()
    step = optimizer.make_step(model, mse, compile=False)
    step(*batch(0))
    step(*batch(1))
    assert torch.equal(before, weight), name


@pytest.mark.parametrize("wrap", [nn.DataParallel])
def test_a_parallel_wrapper_inside_is_refused_with_the_remedy(wrap: Any) -> None:
    model = wrap(mlp())
    optimizer = ReLoRAOptimizer(model, rank=2, lr=0.1)
    for make in (optimizer.functional, lambda model: optimizer.make_step(model, mse)):
        with pytest.raises(
            ValueError, match=r"wrapped in DataParallel.*wrap optimizer\.functional\(model\) in it instead"
        ):
            make(model)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (copy.deepcopy, "cannot be copied or pickled: copy model and optimizer together"),
        (pickle.dumps, "cannot be copied or pickled"),
        (lambda f: f.double(), "cannot be moved or cast: move the model itself"),
        (lambda f: f.load_state_dict({}), "load the model's and the optimizer's own"),
    ],
)
def test_what_would_part_it_from_its_optimizer_is_refused(attempt: Any, words: str) -> None:
    model = mlp()
    f = relora(model).functional(model)
    mse(f, *batch(0)).backward()
    with pytest.raises(TypeError, match=words):
        attempt(f)


@pytest.mark.parametrize("compile", COMPILES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # as above
def test_a_loss_that_is_no_scalar_is_named_compiled_or_not(compile: Any) -> None:
    model = mlp()
    step = relora(model).make_step(model, lambda model, x, y: model(x) - y, compile=compile)
    with pytest.raises(TypeError, match=r"a tensor of shape \(12, 3\) and not a scalar tensor: reduce it"):
        step(*batch(0))
    step = relora(model).make_step(model, lambda model, x, y: mse(model, x, y), compile=compile, has_aux=True)
    with pytest.raises(TypeError, match=r"with has_aux=True it must return \(loss, aux\)"):
        step(*batch(0))


def test_aux_is_detached() -> None:
    model = mlp()
    step = relora(model).make_step(model, lambda m, x, y: (mse(m, x, y), {"y": m(x)}), compile=False, has_aux=True)
    loss, aux = step(*batch(0))
    assert not loss.requires_grad
    assert not aux["y"].requires_grad


def test_a_model_that_was_cast_after_its_factors_were_made_is_refused() -> None:
    model = mlp()
    optimizer = relora(model)
    mse(model, *batch(0)).backward()
    optimizer.step()
    model.double()
    mse(model, *batch(0, torch.float64)).backward()
    with pytest.raises(ValueError, match=r"is torch\.float64 on cpu, but its factors were made for torch\.float32"):
        optimizer.step()


def test_a_sparse_gradient_is_projected() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 8, sparse=True)).double()
    optimizer = small(model, targets=["0"])
    ids = torch.tensor([1, 3, 3])
    model(ids).sum().backward()
    A, B = optimizer.factors(model[0].weight)
    G = model[0].weight.grad.to_dense()
    expected = -0.1 * G @ A.detach().T
    optimizer.step()
    torch.testing.assert_close(B.detach(), expected, rtol=1e-12, atol=1e-14)


class Counting(torch.optim.Optimizer):
    """A base that counts in its groups, as Schedule-Free and Prodigy do, and steps less and less far."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"] / group["k"])


@pytest.mark.parametrize("rank", [0, 2])
def test_what_a_base_counts_in_its_groups_is_kept_and_saved(rank: int) -> None:
    ours, plain = mlp(torch.float64), mlp(torch.float64)
    optimizer = ReLoRAOptimizer(ours, Counting, rank=rank, schedule=JaggedSchedule(0), lr=0.1)
    base = Counting(plain.parameters(), lr=0.1)
    for index in range(5):
        for model, one in ((ours, optimizer), (plain, base)):
            mse(model, *batch(index, torch.float64)).backward()
            one.step()
            one.zero_grad()
    assert {group["k"] for group in optimizer.state_dict()["param_groups"]} == {5}
    if rank == 0:
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), plain.parameters(), strict=True))


class Bounded(nn.Module):
    """A table that its own forward pass normalises in place, and a layer that clips its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 5, max_norm=0.5)
        self.bag = nn.EmbeddingBag(9, 5, max_norm=0.5, mode="sum")
        self.clipped = nn.Linear(5, 4, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            self.clipped.weight.clamp_(-0.3, 0.3)
        return self.clipped(self.table(ids) + self.bag(ids)[:, None])


def test_a_forward_pass_that_changes_its_weights_outside_autograd_trains_as_densely() -> None:
    torch.manual_seed(0)
    ours = Bounded().double()
    theirs = copy.deepcopy(ours)
    targets = ["table", "bag", "clipped"]
    functional, dense = small(ours, targets=targets), small(theirs, targets=targets)
    ids = torch.tensor([[0, 3, 3], [8, 1, 0]])
    for call, optimizer in ((functional.functional(ours), functional), (theirs, dense)):
        for _ in range(3):
            call(ids).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14, msg=name)  # float64, two orders of summing


@pytest.mark.parametrize(
    "change", [lambda w: w.mul_(2), lambda w: w.__imul__(2), lambda w: w.__setitem__(0, 1.0), lambda w: w.relu_()]
)
def test_a_weight_that_is_changed_in_place_with_gradients_enabled_is_refused(change: Any) -> None:
    model = nn.Linear(5, 4)
    f = small(model).functional(model)
    before = model.weight.detach().clone()
    model.forward = lambda x: (change(model.weight), x)[1]  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"changes a low-rank weight in place.*do it under torch\.no_grad"):
        f(torch.ones(2, 5))
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    "transformed",
    [
        lambda f, x: torch.vmap(f)(x),
        lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f, x: torch.func.jacrev(f)(x[0]),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
    ],
    ids=["vmap", "grad", "jacrev", "jvp"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # as above
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # torch 2.14's
def test_the_transforms_of_torch_func_raise(transformed: Any) -> None:
    model = mlp()
    with pytest.raises(RuntimeError, match=r"autograd\.Function with functorch transforms"):
        transformed(relora(model).functional(model), batch(0)[0])


@pytest.mark.parametrize("forgets", ["functional", "optimizer"])
def test_a_gradient_that_is_not_to_be_stepped_on_can_be_forgotten(forgets: str) -> None:
    model = mlp()
    optimizer = relora(model)
    f = optimizer.functional(model)
    before = [p.detach().clone() for p in model.parameters()]
    mse(f, *batch(0)).backward()
    (f if forgets == "functional" else optimizer).zero_grad()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("path", ["dense", "functional"])
def test_zeroing_the_models_gradients_is_enough_between_updates(path: str) -> None:
    """transformers' Trainer does that; the model does not know the factors."""
    runs = []
    for zeroes_by_model in (True, False):
        model = mlp()
        optimizer = relora(model, schedule=JaggedSchedule(3, 1, warm_start=1))
        call = optimizer.functional(model) if path == "functional" else model
        for index in range(6):
            mse(call, *batch(index)).backward()
            optimizer.step()
            (model if zeroes_by_model else optimizer).zero_grad()
        runs.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


@pytest.mark.parametrize("penalty", [0.0, 0.1])
@pytest.mark.parametrize("warm_start", [0, 1])
def test_zeroing_the_functional_model_zeroes_all_that_a_step_uses(warm_start: int, penalty: float) -> None:
    ends = []
    for zeroes_functional in (False, True):
        model = mlp(torch.float64)
        optimizer = small(model, schedule=JaggedSchedule(0, warm_start=warm_start))
        f = optimizer.functional(model)
        weights = list(selected_weights(model).values())
        for index in range(4):
            loss = mse(f, *batch(index, torch.float64)) + penalty * sum(w.square().sum() for w in weights)
            loss.backward()
            optimizer.step()
            (f if zeroes_functional else optimizer).zero_grad()
            assert all(weight.grad is None for weight in weights) or index < warm_start
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


def test_the_last_gradient_of_the_warm_start_is_used_once_where_only_what_is_trained_is_zeroed() -> None:
    # What DistributedDataParallel.zero_grad() does around the functional model.
    ends = []
    for zeroes_parameters in (False, True):
        model = mlp(torch.float64)
        optimizer = small(model, schedule=JaggedSchedule(0, warm_start=1))
        f = optimizer.functional(model)
        for index in range(4):
            mse(f, *batch(index, torch.float64)).backward()
            optimizer.step()
            nn.Module.zero_grad(f) if zeroes_parameters else optimizer.zero_grad()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *ends))
