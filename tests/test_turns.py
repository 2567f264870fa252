"""A warm start in turns: the low-rank weights are at full rank part after part, and the rest of them stays low-rank."""

import copy
from itertools import pairwise

import pytest
import torch
from models import PATHS, batch, differences, mlp, snapshot, stepper
from torch import Tensor, nn

from relora_opt import JaggedSchedule, ReLoRAOptimizer, factored

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # which torch.compile uses

SCHEDULE = JaggedSchedule(0, warm_start=3, warm_start_at=2, warm_start_turns=2)


def _stack(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(m, n) for m, n in pairwise(widths)))


def _optimizer(model: nn.Module, turns: int, **options: object) -> ReLoRAOptimizer:
    schedule = JaggedSchedule(0, warm_start=1, warm_start_turns=turns)
    return ReLoRAOptimizer(model, rank=2, schedule=schedule, lr=0.01, **options)


def _turns(optimizer: ReLoRAOptimizer) -> list[tuple[int, list[str]]]:
    """Return every low-rank group's turn and the names of its weights."""
    made = zip(optimizer.param_groups, optimizer._slots, optimizer._turns, strict=True)
    return [(turn, [slot.name for slot in slots]) for group, slots, turn in made if group["rank"]]


@pytest.mark.parametrize(
    ("num_turns", "parts"),
    [
        (1, ["01234"]),
        (2, ["012", "34"]),
        (3, ["01", "23", "4"]),
        (5, ["0", "1", "2", "3", "4"]),
    ],
)
def test_the_parts_follow_each_other_in_the_order_of_the_model(num_turns: int, parts: list[str]) -> None:
    optimizer = _optimizer(_stack(5, 6, 7, 8, 9, 10), num_turns)
    assert _turns(optimizer) == [(k, [f"{place}.weight" for place in part]) for k, part in enumerate(parts)]
    assert [group["rank"] for group in optimizer.param_groups] == [2] * num_turns + [0]


def test_the_parts_go_through_the_users_groups() -> None:
    model = _stack(5, 6, 7, 8, 9)
    layers = [[(f"{i}.weight", model[i].weight), (f"{i}.bias", model[i].bias)] for i in range(4)]
    groups = [
        {"params": [*layers[0], *layers[1], *layers[2]], "lr": 0.5, "factor_lr": 2.0},
        {"params": layers[3], "lr": 0.1},
    ]
    optimizer = _optimizer(groups, 2, targets="weight")
    assert _turns(optimizer) == [(0, ["0.weight", "1.weight"]), (1, ["2.weight"]), (1, ["3.weight"])]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 0.5, 0.1, 0.1]
    assert [group["factor_lr"] for group in optimizer.param_groups if group["rank"]] == [2.0, 2.0, 1.0]


def test_a_group_that_is_added_takes_its_turns_too() -> None:
    model = _stack(5, 6, 7, 8, 9)
    optimizer = _optimizer([(name, p) for name, p in model.named_parameters() if name[0] in "01"], 2, targets="weight")
    optimizer.add_param_group({"params": [("2.weight", model[2].weight), ("3.weight", model[3].weight)], "rank": 1})
    assert _turns(optimizer) == [(0, ["0.weight"]), (1, ["1.weight"]), (0, ["2.weight"]), (1, ["3.weight"])]
    twin = copy.deepcopy((model, optimizer))
    for made in ((model, optimizer), twin):
        for index in range(4):
            made[0](torch.ones(2, 5) * index).square().sum().backward()
            made[1].step()
            made[1].zero_grad()
    assert not differences(snapshot(model, optimizer), snapshot(*twin))


@pytest.mark.parametrize("path", PATHS)
def test_only_the_weights_whose_turn_it_is_have_gradients_and_state_of_their_size(path: str) -> None:
    model = mlp()
    optimizer = ReLoRAOptimizer(model, rank=2, targets=["first.weight", "second.weight"], schedule=SCHEDULE, lr=0.01)
    first, second = model.first.weight, model.second.weight
    step, seen = stepper(path, optimizer, model), list[tuple[bool, bool]]()
    optimizer.register_step_pre_hook(lambda *_: seen.append((first.grad is not None, second.grad is not None)))
    held = []
    for index in range(10):
        step(*batch(index))
        held.append(tuple("exp_avg" in optimizer.state[W] for W in (first, second)))
    at = [(False, False)] * 2 + [(True, False)] * 3 + [(False, True)] * 3 + [(False, False)] * 2
    assert path == "dense" or seen == at
    # The state of an update's end: it goes with the last update of a turn.
    assert (
        held
        == [(False, False)] * 2 + [(True, False)] * 2 + [(False, False)] + [(False, True)] * 2 + [(False, False)] * 3
    )
    assert optimizer.num_restarts == 2


def test_memory_is_that_of_one_part() -> None:
    model = mlp()
    whole = sum(p.numel() for p in model.parameters())
    sizes, low = [model.first.weight.numel(), model.second.weight.numel()], [2 * (7 + 6), 2 * (6 + 8)]
    optimizer = ReLoRAOptimizer(model, rank=2, targets=["first.weight", "second.weight"], schedule=SCHEDULE, lr=0.01)
    step = stepper("functional", optimizer, model)
    for index in range(9):
        turn = SCHEDULE.turn(index + 1)
        rest = whole - sum(sizes)
        trained = rest + sum(sizes[k] if k == turn else low[k] for k in (0, 1))
        assert optimizer.memory().num_trainable == trained
        assert optimizer.memory().gradient_bytes == 4 * trained
        step(*batch(index))


@pytest.mark.parametrize("path", PATHS)
def test_a_restart_by_hand_leaves_the_weights_at_full_rank_alone(path: str) -> None:
    model = mlp()
    optimizer = ReLoRAOptimizer(model, rank=2, targets=["first.weight", "second.weight"], schedule=SCHEDULE, lr=0.01)
    step = stepper(path, optimizer, model)
    for index in range(4):
        step(*batch(index))
    A = optimizer.factors(model.second.weight)[0].detach().clone()
    kept, output = copy.deepcopy(optimizer.state[model.first.weight]), model(batch(9)[0])
    optimizer.restart()
    assert torch.equal(model(batch(9)[0]), output)
    assert not differences(optimizer.state[model.first.weight], kept)
    assert not torch.equal(optimizer.factors(model.second.weight)[0], A)
    with pytest.raises(ValueError, match=r"first\.weight has no factors until the switch, update 5"):
        optimizer.factors(model.first.weight)
    before = model.first.weight.detach().clone()
    step(*batch(4))
    assert not torch.equal(model.first.weight, before)


def test_a_state_of_other_turns_is_refused() -> None:
    def made(turns: int) -> tuple[nn.Module, ReLoRAOptimizer]:
        model = mlp()
        schedule = JaggedSchedule(0, warm_start=3, warm_start_turns=turns)
        return model, ReLoRAOptimizer(model, rank=2, targets="first|second", schedule=schedule, lr=0.01)

    model, optimizer = made(2)
    step = stepper("dense", optimizer, model)
    step(*batch(0))
    with pytest.raises(ValueError, match="group"):
        made(1)[1].load_state_dict(optimizer.state_dict())


def test_turns_that_torch_would_not_compile_are_refused_before_they_come() -> None:
    model = _stack(5, 6, 7, 8, 9)
    schedule = JaggedSchedule(0, warm_start=1, warm_start_turns=3)
    optimizer = ReLoRAOptimizer(model, rank=2, targets="weight", schedule=schedule, lr=0.01)
    with torch._dynamo.config.patch(recompile_limit=3):
        with pytest.raises(ValueError, match="warm_start_turns=3 leaves 4 steps to compile, and torch stops after 3"):
            optimizer.make_step(model, lambda model, x: model(x).sum())
        optimizer.make_step(model, lambda model, x: model(x).sum(), compile=False)
        optimizer.make_step(model, lambda model, x: model(x).sum(), compile={"recompile_limit": 4})
    with torch._dynamo.config.patch(recompile_limit=4):
        step = optimizer.make_step(model, lambda model, x: model(x).square().mean(), compile={"backend": "aot_eager"})
        for _ in range(5):
            step(torch.ones(2, 5))
    assert optimizer.num_updates == 5
    with torch._dynamo.config.patch(recompile_limit=2):
        optimizer.make_step(model, lambda model, x: model(x).sum())  # the warm start is over


def test_a_scale_is_found_once_for_all_parts_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    original = factored.matched_scale
    monkeypatch.setattr(factored, "matched_scale", lambda *a, **k: found.append(a) or original(*a, **k))
    model = _stack(6, 6, 6, 6, 6)
    optimizer = _optimizer([(name, p) for name, p in model.named_parameters()], 4, targets="weight", alpha="matched")
    assert len(found) == 1
    assert len({optimizer.scale(layer.weight) for layer in model}) == 1
    other = nn.Linear(6, 6)
    optimizer.add_param_group({"params": [("other.weight", other.weight)], "rank": 2, "lr": 0.5})
    assert len(found) == 2


def test_full_rank_may_have_the_same_schedule() -> None:
    model = mlp()
    schedule = JaggedSchedule(0, warm_start=1, warm_start_turns=4)
    optimizer = ReLoRAOptimizer(model, rank=0, schedule=schedule, lr=0.01)
    assert _turns(optimizer) == []


def test_a_weight_moves_in_all_directions_in_its_turn_alone() -> None:
    model = mlp(torch.float64)
    schedule = JaggedSchedule(0, warm_start=30, warm_start_at=30, warm_start_turns=2)
    optimizer = ReLoRAOptimizer(
        model, torch.optim.SGD, rank=1, targets=["first.weight", "second.weight"], schedule=schedule, lr=0.05
    )
    step, ranks = stepper("functional", optimizer, model), []

    def values() -> list[Tensor]:
        return [W.detach().clone() for W in (model.first.weight, model.second.weight)]

    before = values()
    for index in range(120):
        step(*batch(index, torch.float64))
        if index % 30 == 29:
            ranks.append(
                [int(torch.linalg.matrix_rank(W - old, rtol=1e-9)) for W, old in zip(values(), before, strict=True)]
            )
            before = values()
    assert ranks == [[1, 1], [6, 2], [1, 6], [2, 1]]  # from one moment of a cycle to another, s (B' A' - B A): 2
