"""A model that changes after functional() or make_step(): the functional path follows it, as the dense path does."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import stepper
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from relora_opt import JaggedSchedule, LowRankWeight, ReLoRAOptimizer

AOT_EAGER = {"backend": "aot_eager"}  # by inductor every compilation takes seconds
PATHS = ("functional", "step", "compiled", pytest.param("inductor", marks=pytest.mark.slow))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))).double()


def sgd(model: nn.Module, **changes: Any) -> ReLoRAOptimizer:
    settings = {"rank": 2, "alpha": 2, "targets": ["0", "1", "2"], "schedule": JaggedSchedule(5), "lr": 0.1}
    return ReLoRAOptimizer(model, torch.optim.SGD, **{"momentum": 0.9, **settings, **changes})


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x).tanh() - 1).square().mean()


def trained(path: str, change: Callable[[nn.Sequential], Any], **options: Any) -> tuple[list[float], list[Tensor]]:
    """Return losses and weights of seven updates, of which `change(model)` comes after the second and the fifth."""
    model = layers()
    weights = list(model.parameters())
    optimizer = sgd(model, **options)
    f = optimizer.functional(model) if path == "functional" else model
    step = None
    compiles = {"step": False, "compiled": AOT_EAGER, "inductor": True}
    if path in compiles:
        step = optimizer.make_step(model, loss_of, compile=compiles[path])
    losses = []
    for index in range(7):
        if index in (2, 5):
            change(model)
        x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(index))
        if step is not None:
            losses.append(float(step(x)))
            continue
        loss = loss_of(f, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [weight.detach() for weight in weights]


def assert_same(ours: tuple[list[float], list[Tensor]], theirs: tuple[list[float], list[Tensor]]) -> None:
    """To 1e-12 in float64: two orders of summing."""
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    for our, their in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-14)


def assert_trains_as_dense(path: str, build: Callable[[], nn.Module], targets: list[str]) -> None:
    """Train a model for five updates on this path and on the dense one."""
    ends = []
    for each in (path, "dense"):
        torch.manual_seed(0)
        model = build().double()
        step = stepper(each, sgd(model, targets=targets), model, loss_of)
        for index in range(5):
            step(torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(index)))
        ends.append([p.detach() for p in model.parameters()])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def swap(model: nn.Sequential) -> None:
    model[0], model[2] = model[2], model[0]


def insert(model: nn.Sequential) -> None:
    model.insert(0, nn.Tanh())


def delete(model: nn.Sequential) -> None:
    del model[1]


def repeat(model: nn.Sequential) -> None:
    model.append(model[1])


def checkpointed(model: nn.Sequential) -> None:
    model[1] = checkpoint_wrapper(model[1])


def compiled(model: nn.Sequential) -> None:
    if isinstance(model[1], nn.Linear):
        model[1] = torch.compile(model[1], backend="eager")


def freeze_or_unfreeze(model: nn.Sequential) -> None:
    model[1].requires_grad_(not model[1].weight.requires_grad)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "change",
    [
        swap,
        freeze_or_unfreeze,
        pytest.param(insert, marks=pytest.mark.slow),
        pytest.param(delete, marks=pytest.mark.slow),
        pytest.param(repeat, marks=pytest.mark.slow),
        pytest.param(checkpointed, marks=pytest.mark.slow),
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13's compiler uses what torch 2.13 deprecates
def test_layers_that_are_moved_or_frozen_train_as_on_the_dense_path(change: Any, path: str) -> None:
    assert_same(trained(path, change), trained("dense", change))


@pytest.mark.parametrize("path", ["functional", "step"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler reads it
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # as above
def test_a_layer_that_is_compiled_later_trains_as_on_the_dense_path(path: str) -> None:
    assert_same(trained(path, compiled), trained("dense", compiled))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # as above
def test_a_weight_that_is_frozen_under_a_compiler_of_ones_own_gets_no_factor_gradients() -> None:
    model = layers()
    optimizer = sgd(model)
    f = torch.compile(optimizer.functional(model), backend="aot_eager", fullgraph=True)
    for is_trained in (True, False, True):
        model[1].requires_grad_(is_trained)
        loss_of(f, torch.ones(2, 6, dtype=torch.float64)).backward()
        assert (optimizer.factors(model[1].weight)[1].grad is not None) is is_trained
        assert optimizer.factors(model[0].weight)[1].grad is not None
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # as above
@pytest.mark.parametrize(
    "compile",
    [pytest.param(AOT_EAGER, id="aot_eager"), pytest.param(True, id="inductor", marks=pytest.mark.slow)],
)
def test_a_weight_that_is_frozen_now_and_then_is_compiled_once_frozen_and_once_not(compile: Any) -> None:
    model = layers()
    optimizer = sgd(model, schedule=JaggedSchedule(0))
    step = optimizer.make_step(model, loss_of, compile=compile)
    x = torch.ones(2, 6, dtype=torch.float64)
    step(x)
    freeze_or_unfreeze(model)
    step(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            freeze_or_unfreeze(model)
            step(x)


def test_what_is_frozen_shows_no_factors_and_its_state_survives() -> None:
    model = layers()
    optimizer = sgd(model)
    f = optimizer.functional(model)
    loss_of(f, torch.ones(2, 6, dtype=torch.float64)).backward()
    optimizer.step()
    factors = optimizer.factors(model[1].weight)
    momentum = optimizer.state[model[1].weight]["B_state"]["momentum_buffer"].clone()
    model[1].requires_grad_(False)
    f(torch.ones(2, 6, dtype=torch.float64))
    assert not {id(p) for p in factors} & {id(p) for p in f.parameters()}
    model[1].requires_grad_(True)
    f(torch.ones(2, 6, dtype=torch.float64))
    assert {id(p) for p in factors} <= {id(p) for p in f.parameters()}
    assert torch.equal(momentum, optimizer.state[model[1].weight]["B_state"]["momentum_buffer"])


@pytest.mark.parametrize("path", ["functional", "step"])
def test_factors_that_stay_frozen_while_their_model_is_unfrozen_are_refused(path: str) -> None:
    model, x = layers(), torch.ones(2, 6, dtype=torch.float64)
    optimizer = sgd(model)
    f = optimizer.functional(model)
    call = f if path == "functional" else optimizer.make_step(model, loss_of, compile=False)
    f.requires_grad_(False)
    model.requires_grad_(True)
    with pytest.raises(
        RuntimeError, match=r"^0\.weight is to be trained, but both of its factors were frozen: unfreeze"
    ):
        call(x)
    f.requires_grad_(True)
    call(x)


def test_a_functional_model_is_frozen_and_unfrozen_as_a_whole_and_factors_one_by_one() -> None:
    model, x = layers(), torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
    optimizer = sgd(model)
    f = optimizer.functional(model)
    f.requires_grad_(False)
    loss_of(f, x).backward()
    assert x.grad is not None
    assert all(p.grad is None for p in f.parameters())
    f.requires_grad_(True)
    A, B = optimizer.factors(model[0].weight)
    A.requires_grad_(False)
    loss_of(f, x).backward()
    assert A.grad is None
    assert B.grad is not None


@pytest.mark.parametrize("path", ["functional", "dense"])
def test_a_discriminator_that_is_frozen_while_its_generator_trains_is_left_alone(path: str) -> None:
    generator, critic = layers(), layers()
    trains_critic, trains_generator = sgd(critic, lr=0.2), sgd(generator)
    f, g = critic, generator
    if path == "functional":
        f, g = trains_critic.functional(critic), trains_generator.functional(generator)  # type: ignore[assignment]
    for index in range(4):
        z = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(index))
        critic.requires_grad_(True)
        (f(z).square().mean() - f(g(z).detach()).mean()).backward()
        trains_critic.step()
        trains_critic.zero_grad()
        critic.requires_grad_(False)
        f(g(z)).mean().backward()
        trains_generator.step()
        trains_generator.zero_grad()
        assert all(p.grad is None for weight in critic[:3] for p in trains_critic.factors(weight.weight))


def test_a_model_wrapped_for_several_processes_after_functional_is_refused() -> None:
    model = layers()
    f = sgd(model).functional(model)
    model[1] = nn.DataParallel(model[1])
    with pytest.raises(ValueError, match=r"wrapped in DataParallel.*wrap optimizer\.functional\(model\) in it instead"):
        f(torch.ones(2, 6, dtype=torch.float64))


class Scaled(nn.Module):
    """Returns a parameter of its own beside what it computes, as CLIP does with its logit_scale."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.linear(x) * self.scale, self.scale, self.linear.weight


def test_a_parameter_that_a_model_returns_keeps_no_hook_and_no_functional_model_alive() -> None:
    model = Scaled()
    optimizer = sgd(model, targets=["linear"])
    f = optimizer.functional(model)
    for _ in range(3):
        output, scale, weight = f(torch.ones(2, 6))
        (output.sum() * scale + weight.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not model.scale._backward_hooks
    alive = weakref.ref(f)
    del f, output, scale, weight
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_backward_pass_that_fails_leaves_the_model_whole(error: type[BaseException]) -> None:
    def fail(_: Tensor) -> None:
        raise error

    model = layers()
    optimizer = sgd(model)
    hidden: list[Tensor] = []
    handle = model[1].register_forward_hook(lambda *parts: hidden.append(parts[-1]))
    loss = optimizer.functional(model)(torch.ones(2, 6, dtype=torch.float64)).sum()
    handle.remove()
    hidden[0].register_hook(fail)
    with pytest.raises(error):
        loss.backward()
    assert not any(isinstance(p, LowRankWeight) for p in model.parameters())
    copy.deepcopy(model)
    sgd(model)
    optimizer.factors(model[0].weight)


class Product(nn.Module):
    """x W in one of its spellings."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 48, dtype=torch.float64).view(8, 6).cos())
        self.bias = nn.Parameter(torch.zeros(6, dtype=torch.float64))
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        W = self.weight
        spellings: dict[str, Callable[[], Tensor]] = {
            "@": lambda: x @ W,
            "mm": lambda: torch.mm(x, W),
            "sparse.mm": lambda: torch.sparse.mm(x, W),
            "matmul": lambda: torch.matmul(x, W),
            "linear": lambda: F.linear(x, W.t()),
            "addmm": lambda: torch.addmm(self.bias, x, W),
        }
        return spellings[self.spelling]()


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("spelling", ["@", "mm", "sparse.mm", "matmul", "linear", "addmm"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_inputs_train_wherever_they_do_on_the_dense_path(spelling: str, layout: torch.layout) -> None:
    x = (
        torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        .relu()
        .to_sparse(layout=layout)
    )
    models = Product(spelling), Product(spelling)
    optimizers = [sgd(model, targets=["weight"]) for model in models]
    try:
        models[0](x).square().mean().backward()
    except RuntimeError as error:
        pytest.skip(f"torch itself: {error}"[:80])
    models[0].zero_grad()
    for _ in range(3):
        for call, optimizer in ((models[0], optimizers[0]), (optimizers[1].functional(models[1]), optimizers[1])):
            call(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


class Clipped(nn.Linear):
    """Bounds the norm of its rows before it uses them, by assigning to `data`, as EEGNet does."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.25)
        return super().forward(x)


@pytest.mark.parametrize("path", ["functional", "step"])
def test_data_that_a_forward_pass_assigns_is_the_weights_as_on_the_dense_path(path: str) -> None:
    def build() -> nn.Module:
        shared = Clipped(6, 6)
        return nn.Sequential(shared, nn.Tanh(), shared)

    assert_trains_as_dense(path, build, ["0"])


@pytest.mark.parametrize("compile", [False, True])
def test_a_weight_with_a_gradient_hook_is_refused_until_the_hook_is_gone(compile: bool) -> None:
    model = layers()
    optimizer = sgd(model)
    step = optimizer.make_step(model, loss_of, compile=compile)
    handle = model[1].weight.register_hook(torch.zeros_like)
    x = torch.ones(2, 6, dtype=torch.float64)
    for call in (step, optimizer.functional(model)):
        with pytest.raises(RuntimeError, match=r"^1\.weight has a gradient hook.*use the dense path"):
            call(x)
    handle.remove()
    optimizer.functional(model)(x)


def test_a_hook_during_the_warm_start_is_called_and_after_it_refused() -> None:
    model, seen = layers(), []
    step = sgd(model, schedule=JaggedSchedule(0, warm_start=1)).make_step(model, loss_of, compile=False)
    model[1].weight.register_hook(seen.append)
    step(torch.ones(2, 6, dtype=torch.float64))
    assert len(seen) == 1
    with pytest.raises(RuntimeError, match="has a gradient hook"):
        step(torch.ones(2, 6, dtype=torch.float64))


@pytest.mark.parametrize(
    "ask",
    [
        lambda model, loss: torch.autograd.grad(loss, list(model.parameters()), create_graph=True, allow_unused=True),
        lambda model, loss: torch.autograd.grad(outputs=loss, inputs=model[0].weight),
        lambda model, loss: model[0].weight.register_hook(print),
        lambda model, loss: model[0].weight.retain_grad(),
    ],
    ids=["grad", "grad by keyword", "register_hook", "retain_grad"],
)
def test_what_asks_for_a_dense_gradient_within_the_loss_is_refused(ask: Any) -> None:
    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        loss = loss_of(model, x)
        ask(model, loss)
        return loss

    model = layers()
    step = sgd(model).make_step(model, loss_fn, compile=False)
    with pytest.raises(RuntimeError, match=r"asks for the dense gradient of a low-rank weight.*use the dense path"):
        step(torch.ones(2, 6, dtype=torch.float64))


@pytest.mark.parametrize("path", ["functional", "step"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit.script says that it is old
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # and so it does in torch 2.14
def test_a_scripted_layer_trains_as_on_the_dense_path(path: str) -> None:
    def build() -> nn.Module:
        inner = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)))
        return nn.Sequential(nn.Linear(6, 6), inner, nn.Linear(6, 6))

    assert_trains_as_dense(path, build, ["0", "1.0.weight"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # as above
def test_a_state_from_before_the_switch_reaches_a_functional_model_under_a_compiler_of_ones_own() -> None:
    model, x = layers(), torch.ones(2, 6, dtype=torch.float64)
    optimizer = sgd(model, schedule=JaggedSchedule(3, 1, warm_start=2))
    f = torch.compile(optimizer.functional(model), backend="aot_eager", fullgraph=True)
    saved = None
    for _ in range(3):
        loss_of(f, x).backward()
        optimizer.step()
        optimizer.zero_grad()
        saved = saved or copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert optimizer.is_low_rank
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    loss_of(f, x).backward()
    assert model[0].weight.grad is not None
