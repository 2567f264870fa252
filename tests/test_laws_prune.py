"""Pruning keeps exactly the share it says, by one mask; a reset is a fresh base optimizer, whichever it is."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, mlp, relora, selected_weights, stepper
from torch import Tensor, nn

from relora_opt import JaggedSchedule, ReLoRAOptimizer, prune

optim = torch.optim


def lone_weight(m: int = 6, n: int = 5, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(m, n, generator=torch.Generator().manual_seed(2)).to(dtype))


def low_rank(weight: nn.Parameter, base: Any, rank: int = 2, **settings_: Any) -> ReLoRAOptimizer:
    return ReLoRAOptimizer([("w", weight)], base, rank=rank, targets=["w"], **settings_)


def give_gradients(optimizer: ReLoRAOptimizer, weight: nn.Parameter, index: int) -> None:
    """Set both factors' gradients by hand, a pure function of the index."""
    generator = torch.Generator().manual_seed(index)
    for factor in optimizer.factors(weight):
        factor.grad = torch.randn(factor.shape, generator=generator).to(factor.dtype)


def moments(state: dict[str, Any], shape: torch.Size) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor) and value.shape == shape]


def expected_count(numel: int, ratio: float) -> int:
    return round((1 - ratio) * numel)


@pytest.mark.parametrize("strategy", [prune.magnitude, prune.random])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_pruning_keeps_exactly_its_share_by_one_mask_for_every_moment(
    strategy: Any, ratio: float, amsgrad: bool
) -> None:
    weight = lone_weight(40, 25)
    optimizer = low_rank(weight, optim.Adam, 4, lr=0.01, amsgrad=amsgrad, prune=strategy(ratio))
    for u in range(3):
        give_gradients(optimizer, weight, u)
        optimizer.step()
        optimizer.zero_grad()
    before = {key: {k: v.clone() for k, v in optimizer.state[weight][key].items()} for key in ("A_state", "B_state")}
    optimizer.restart()
    for key, factor in zip(("A_state", "B_state"), optimizer.factors(weight), strict=True):
        state = optimizer.state[weight][key]
        kept = [moment != 0 for moment in moments(state, factor.shape)]
        assert len(kept) == (3 if amsgrad else 2)
        assert all(int(mask.sum()) == expected_count(factor.numel(), ratio) for mask in kept)
        assert all(torch.equal(mask, kept[0]) for mask in kept)
        for old, new in zip(moments(before[key], factor.shape), moments(state, factor.shape), strict=True):
            assert torch.equal(new, old * kept[0])
        if strategy is prune.magnitude and kept[0].any() and not kept[0].all():
            size = before[key]["exp_avg"].abs()
            assert size[kept[0]].min() >= size[~kept[0]].max()
        assert int(state["step"]) in (0, 3)


@settings(max_examples=50, deadline=None)
@given(m=st.integers(3, 9), n=st.integers(3, 9), percent=st.integers(0, 100), is_negative=st.booleans())
def test_magnitude_pruning_keeps_its_share_among_ties(m: int, n: int, percent: int, is_negative: bool) -> None:
    masks = []
    for _ in range(2):
        weight = lone_weight(m, n)
        optimizer = low_rank(weight, optim.SGD, lr=0.1, momentum=0.9, prune=prune.magnitude(percent / 100))
        for factor in optimizer.factors(weight):
            factor.grad = torch.full_like(factor, -1.0 if is_negative else 1.0)
        optimizer.step()
        optimizer.restart()
        masks.append([optimizer.state[weight][key]["momentum_buffer"] != 0 for key in ("A_state", "B_state")])
    for mask, again in zip(*masks, strict=True):
        share = (100 - percent) * mask.numel() / 100
        assert abs(int(mask.sum()) - share) <= 0.5
        assert torch.equal(mask, again)  # ties are broken the same way every time


@pytest.mark.slow
def test_magnitude_pruning_keeps_its_share_above_2_to_the_24_elements() -> None:
    n = 2**23 + 9
    weight = nn.Parameter(torch.zeros(3, n))
    optimizer = low_rank(weight, optim.SGD, lr=0.1, momentum=0.9, prune=prune.magnitude(0.75))
    A, B = optimizer.factors(weight)
    assert A.numel() > 2**24
    A.grad, B.grad = torch.arange(1.0, 1 + A.numel()).view(A.shape) % 1000 + 1, torch.ones_like(B)
    optimizer.step()
    optimizer.restart()
    kept = optimizer.state[weight]["A_state"]["momentum_buffer"] != 0
    assert int(kept.sum()) == A.numel() - round(0.75 * A.numel())


@pytest.mark.parametrize("strategy", [prune.keep(), prune.magnitude(0.5), prune.random(0.5), prune.reset()], ids=str)
def test_pruning_is_in_place_for_adamw(strategy: Any) -> None:
    model = mlp()
    optimizer = relora(model, prune=strategy)
    step = stepper("dense", optimizer, model)
    for u in range(3):
        step(*batch(u))
    states = [optimizer.state[w][key] for w in selected_weights(model).values() for key in ("A_state", "B_state")]
    before = [{key: (id(value), value.clone()) for key, value in state.items()} for state in states]
    optimizer.restart()
    for state, old in zip(states, before, strict=True):
        assert {key: id(value) for key, value in state.items()} == {key: name for key, (name, _) in old.items()}
        if strategy == prune.keep():
            assert all(torch.equal(state[key], value) for key, (_, value) in old.items())


def test_random_pruning_draws_from_seed_name_and_restart_and_not_from_the_global_generator() -> None:
    def masks(seed: int, global_seed: int) -> list[Tensor]:
        weight = lone_weight(20, 20)
        optimizer = low_rank(weight, optim.SGD, lr=0.1, momentum=0.9, prune=prune.random(0.5), seed=seed)
        kept = []
        for _ in range(2):
            torch.manual_seed(global_seed)
            for factor in optimizer.factors(weight):
                factor.grad = torch.ones_like(factor)
            optimizer.step()
            optimizer.restart()
            kept.append(optimizer.state[weight]["A_state"]["momentum_buffer"] != 0)
        return kept

    first, again, other = masks(0, 1), masks(0, 2), masks(1, 1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


INVENTORY: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "SGD": (optim.SGD, {}),
    "SGD momentum": (optim.SGD, {"momentum": 0.9}),
    "SGD dampening": (optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    "SGD nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Adam": (optim.Adam, {}),
    "Adam amsgrad": (optim.Adam, {"amsgrad": True}),
    "AdamW": (optim.AdamW, {"weight_decay": 0.1}),
    "AdamW foreach": (optim.AdamW, {"foreach": True}),
    "AdamW fused": (optim.AdamW, {"fused": True}),
    "AdamW maximize": (optim.AdamW, {"maximize": True}),
    "Adagrad": (optim.Adagrad, {"initial_accumulator_value": 0.5, "lr_decay": 0.1}),
    "Adagrad zero": (optim.Adagrad, {}),
    "Rprop": (optim.Rprop, {}),
    "NAdam": (optim.NAdam, {}),
    "RMSprop": (optim.RMSprop, {"momentum": 0.5}),
    "RMSprop centered": (optim.RMSprop, {"centered": True}),
    "Adadelta": (optim.Adadelta, {}),
    "Adamax": (optim.Adamax, {}),
    "ASGD": (optim.ASGD, {"t0": 2}),
    "RAdam": (optim.RAdam, {}),
    "Adafactor": (optim.Adafactor, {}),
    "Muon": (optim.Muon, {}),
}


class CountsInItsGroup(optim.Optimizer):
    """Adam with the count of its steps in the group, as Adan's and apex's."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "k": torch.zeros(())})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = t = group.get("step", 0) + 1
            group["k"] = group["k"] + 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(m=torch.zeros_like(p), v=torch.zeros_like(p))
                m, v = state["m"].lerp_(p.grad, 0.1), state["v"].lerp_(p.grad.square(), 0.001)
                rate = -group["lr"] / float(group["k"]) ** 0.1
                p.addcdiv_(m / (1 - 0.9**t), (v / (1 - 0.999**t)).sqrt() + 1e-8, value=rate)


class LooksBack(optim.Adam):
    """Adam that every sixth update goes halfway back to where it was."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        for p in parameters:
            self.state[p].setdefault("slow", p.clone())
            self.state[p]["count"] = self.state[p].get("count", 0) + 1
        super().step()
        for p in parameters:
            if self.state[p]["count"] % 6 == 0:
                p.copy_(self.state[p]["slow"].lerp_(p, 0.5))

    def _init_group(self, group: Any, *args: Any) -> Any:
        kept = {p: {key: self.state[p].pop(key) for key in ("slow", "count")} for p in group["params"]}
        result = super()._init_group(group, *args)
        for p, state in kept.items():
            self.state[p].update(state)
        return result


FOREIGN = {"counts in its group": (CountsInItsGroup, {}), "looks back": (LooksBack, {})}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*INVENTORY, *FOREIGN])
def test_after_a_reset_the_next_updates_equal_a_fresh_base_optimizers_bitwise(name: str, dtype: torch.dtype) -> None:
    base, hyperparameters = {**INVENTORY, **FOREIGN}[name]
    every, num_updates = (8, 7) if name in FOREIGN else (4, 3)
    weight = lone_weight(dtype=dtype)
    optimizer = low_rank(weight, base, schedule=JaggedSchedule(every), alpha=None, lr=0.01, **hyperparameters)
    for u in range(every):
        give_gradients(optimizer, weight, u)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.num_restarts == 1
    twins = [factor.detach().clone().requires_grad_() for factor in optimizer.factors(weight)]
    fresh = base(twins, lr=0.01, **hyperparameters)
    for u in range(4, 4 + num_updates):
        give_gradients(optimizer, weight, u)
        for twin, factor in zip(twins, optimizer.factors(weight), strict=True):
            twin.grad = factor.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        fresh.step()
        for twin, factor in zip(twins, optimizer.factors(weight), strict=True):
            assert torch.equal(twin, factor), f"update {u}"


def test_what_a_base_counts_in_its_group_starts_anew_at_the_switch_and_stays_where_the_state_is_kept() -> None:
    weight = lone_weight()
    schedule = JaggedSchedule(4, warm_start=3)
    optimizer = low_rank(weight, CountsInItsGroup, schedule=schedule, lr=0.01, prune=prune.keep())
    counts = []
    for u in range(9):
        if optimizer.is_low_rank:
            give_gradients(optimizer, weight, u)
        else:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        optimizer.zero_grad()
        counts.append((optimizer.param_groups[0].get("step"), int(optimizer.param_groups[0]["k"])))
    assert optimizer.num_restarts == 1
    assert counts == [(1, 1), (2, 2), (None, 0), *((u, u) for u in range(1, 7))]


def test_after_keep_the_next_updates_equal_the_unrestarted_optimizers_bitwise() -> None:
    weight = lone_weight()
    optimizer = low_rank(weight, optim.AdamW, schedule=JaggedSchedule(4), lr=0.01, prune=prune.keep())
    twins = [factor.detach().clone().requires_grad_() for factor in optimizer.factors(weight)]
    alone = optim.AdamW(twins, lr=0.01)
    for u in range(7):
        give_gradients(optimizer, weight, u)
        for twin, factor in zip(twins, optimizer.factors(weight), strict=True):
            twin.grad = factor.grad.clone()
            if u == 4:
                twin.data.copy_(factor.detach())
        optimizer.step()
        alone.step()
        if u != 3:  # the restart has just re-drawn A and zeroed B
            for twin, factor in zip(twins, optimizer.factors(weight), strict=True):
                assert torch.equal(twin, factor), f"update {u}"


def test_what_random_forgets_does_not_depend_on_torchs_default_dtype() -> None:
    kept = []
    for default in (torch.float32, torch.float64, torch.bfloat16):
        state = {"exp_avg": torch.ones(6, 7, dtype=torch.float32)}
        torch.set_default_dtype(default)
        try:
            generator = torch.Generator().manual_seed(3)
            prune.prune_(state, torch.Size((6, 7)), prune.random(0.5), reset_=dict.clear, generator=generator)
        finally:
            torch.set_default_dtype(torch.float32)
        kept.append(state["exp_avg"] != 0)
    assert all(torch.equal(mask, kept[0]) for mask in kept)
