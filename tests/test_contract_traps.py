"""What others fell into between an optimizer that is not torch's own and the tools that expect one.

Each test is named after its trap. Those with a file of their own are not repeated: hooks, schedulers and closures in
test_inner.py and test_laws_step.py; copies, files and the phantom step in test_laws_resume.py; templates in
test_dcp.py; optimizers and their dtypes in test_torch_contract.py.
"""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import (
    batch,
    differences,
    jagged_schedule,
    mlp,
    mse,
    relora,
    selected_weights,
    snapshot,
    stepper,
    through_file,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from relora_opt import JaggedSchedule, ReLoRAOptimizer

SCHEDULE = jagged_schedule(4, 2, 2)  # a switch after 2, restarts after 6 and 10


def train(model: nn.Module, optimizer: ReLoRAOptimizer, first: int, last: int) -> None:
    step = stepper("dense", optimizer, model)
    for u in range(first, last):
        step(*batch(u, next(model.parameters()).dtype))


# ---- state and its keys


@pytest.mark.parametrize("updates", [0, 1, 2, 3, 6, 7])
def test_state_is_keyed_by_the_models_parameters_and_a_key_of_its_own_holds_nothing_but_names_and_scales(
    updates: int,
) -> None:
    model = mlp()
    optimizer = relora(model, schedule=SCHEDULE)
    train(model, optimizer, 0, updates)
    own = {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} <= own
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == own
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups", "low_rank"}
    names = saved.pop("low_rank")
    assert names == {name: optimizer.scale(model.get_parameter(name)) for name in optimizer.selected}
    relora(mlp(), schedule=SCHEDULE).load_state_dict(saved)  # as torch.distributed.checkpoint leaves it
    assert not any(name in str(saved["param_groups"]) for name in names)
    assert relora(mlp(), rank=0, schedule=SCHEDULE).state_dict().keys() == {"state", "param_groups"}


BASES_WITH_SCALARS = {  # float32 numbers in the state, whatever the parameter's dtype
    "NAdam": partial(torch.optim.NAdam, lr=0.01),
    "ASGD": partial(torch.optim.ASGD, lr=0.01, t0=2),
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
}


@pytest.mark.parametrize("name", BASES_WITH_SCALARS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("updates", [1, 2, 4])
def test_loading_keeps_every_dtype_where_torch_casts_to_the_parameters(
    name: str, dtype: torch.dtype, updates: int
) -> None:
    def build(seed: int) -> tuple[nn.Module, ReLoRAOptimizer]:
        model = mlp(dtype, seed=seed)
        return model, ReLoRAOptimizer(model, BASES_WITH_SCALARS[name], rank=2, schedule=SCHEDULE)

    model, optimizer = build(0)
    train(model, optimizer, 0, updates)
    saved = snapshot(model, optimizer)
    resumed, fresh = build(1)
    resumed.load_state_dict(saved["model"])
    fresh.load_state_dict(state_dict=saved["optimizer"])  # the argument's name is torch's: tools pass it by name
    assert not differences(snapshot(resumed, fresh), saved)
    train(model, optimizer, updates, 8)
    train(resumed, fresh, updates, 8)
    assert not differences(snapshot(resumed, fresh), snapshot(model, optimizer))


def test_what_was_loaded_shares_no_memory_with_what_it_was_loaded_from() -> None:
    model = mlp()
    optimizer = relora(model, schedule=SCHEDULE)
    train(model, optimizer, 0, 4)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    model.load_state_dict(weights)
    train(model, optimizer, 4, 9)
    assert not differences(saved["state"], kept["state"])


def test_a_state_of_32_bits_gives_a_16_bit_model_its_masters() -> None:
    """Without one, updates smaller than half a unit of bfloat16 would round away."""
    model = mlp()
    optimizer = relora(model, "SGD", momentum=0.0, weight_decay=0.0)
    train(model, optimizer, 0, 2)
    resumed = mlp(seed=1).to(torch.bfloat16)
    fresh = relora(resumed, "SGD", momentum=0.0, weight_decay=0.0)
    fresh.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(model.state_dict())
    train(resumed, fresh, 2, 3)
    for name, weight in selected_weights(resumed).items():
        master = fresh.state[weight]["master"]
        assert master.dtype == torch.float32
        assert torch.equal(master.bfloat16(), weight)
        assert not torch.equal(master, weight.float()), name


def test_a_group_that_is_saved_before_its_first_update_continues_bitwise() -> None:
    def build(seed: int) -> tuple[nn.Module, ReLoRAOptimizer]:
        model = mlp(seed=seed)
        named = [(name, p) for name, p in model.named_parameters() if not name.startswith("second")]
        return model, relora(named, targets=r"^(first|second)\.weight$", schedule=JaggedSchedule(4))

    model, optimizer = build(0)
    train(model, optimizer, 0, 2)
    model.zero_grad()  # nobody has cleared the gradients of what was not in the optimizer
    optimizer.add_param_group({"params": [("second.weight", model.second.weight)]})
    saved = snapshot(model, optimizer)
    resumed, fresh = build(1)
    fresh.add_param_group({"params": [("second.weight", resumed.second.weight)]})
    resumed.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    train(model, optimizer, 2, 6)
    train(resumed, fresh, 2, 6)
    assert not differences(snapshot(resumed, fresh), snapshot(model, optimizer))


# ---- hooks


def test_state_dict_hooks_run_once_and_are_obeyed() -> None:
    model = mlp()
    optimizer, calls = relora(model), []
    train(model, optimizer, 0, 2)
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append("before loading"))
    optimizer.register_load_state_dict_pre_hook(lambda o, state: {k: v for k, v in state.items() if k != "note"})
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(f"loaded {o.num_updates}"))
    saved = optimizer.state_dict()
    assert saved["note"] == 1
    fresh_calls = list(calls)
    optimizer.load_state_dict(saved)
    assert calls == [*fresh_calls, "before loading", "loaded 2"] == ["before saving", "before loading", "loaded 2"]


def test_a_hook_that_is_removed_stays_removed_after_loading() -> None:
    model, calls = mlp(), []
    optimizer = relora(model)
    handle = optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append(1))
    optimizer.load_state_dict(optimizer.state_dict())
    handle.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == [1]


# ---- gradients


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_reaches_parameters_and_factors(set_to_none: bool) -> None:
    model = mlp()
    optimizer = relora(model)
    mse(model, *batch(0)).backward()
    mse(optimizer.functional(model), *batch(0)).backward()
    factors = [factor for weight in selected_weights(model).values() for factor in optimizer.factors(weight)]
    tensors = [*model.parameters(), *factors]
    assert all(t.grad is not None for t in tensors)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(t.grad is None if set_to_none else not t.grad.any() for t in tensors)


@pytest.mark.parametrize("flags", [{"fused": True}, {"foreach": True}], ids=str)
def test_a_fused_base_under_a_grad_scaler_is_unscaled_once(flags: dict[str, bool]) -> None:
    """The fused one advertises that it unscales by itself; bitwise, because scales are powers of two."""
    runs = []
    for enabled in (True, False):
        model = mlp()
        optimizer = relora(model, schedule=SCHEDULE, **flags)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, enabled=enabled)
        for u in range(8):
            scaler.scale(mse(model, *batch(u))).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        runs.append(model.state_dict())
    assert not differences(*runs)


# ---- torch.distributed.checkpoint


@pytest.mark.parametrize("is_flat", [False, True])
def test_stale_gradients_at_load_time_make_no_state_that_is_silently_empty(is_flat: bool) -> None:
    """torch.distributed.checkpoint makes no template then, and flattened it drops the state: that is an error here."""
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(4))
    train(model, optimizer, 0, 3)
    saved = through_file(get_optimizer_state_dict(model, optimizer, options=options))
    resumed = mlp(seed=1)
    resumed.load_state_dict(model.state_dict())
    fresh = relora(resumed, schedule=JaggedSchedule(4))
    fresh.set_clock(**optimizer.clock)
    mse(resumed, *batch(0)).backward()
    if is_flat:
        with pytest.raises(ValueError, match="at low rank but has no factors"):
            set_optimizer_state_dict(resumed, fresh, saved, options=options)
        return
    set_optimizer_state_dict(resumed, fresh, saved, options=options)
    fresh.zero_grad()
    train(model, optimizer, 3, 6)
    train(resumed, fresh, 3, 6)
    assert not differences(snapshot(resumed, fresh), snapshot(model, optimizer))


@pytest.mark.parametrize(
    "look", [lambda model, made: made.functional(model), lambda model, made: made.factors(model.first.weight)]
)
def test_looking_at_factors_and_saving_before_the_first_update_leaves_the_state_empty(look: Any) -> None:
    """A state with factors in it would keep set_clock and torch's phantom step from their work."""
    model = mlp()
    optimizer = relora(model, schedule=JaggedSchedule(4))
    kept = look(model, optimizer)
    saved = through_file(optimizer.state_dict())
    assert not optimizer.state
    twin = mlp()
    restored = relora(twin, schedule=JaggedSchedule(4), seed=5)
    restored.load_state_dict(saved)
    assert torch.equal(restored.factors(twin.first.weight)[0], optimizer.factors(model.first.weight)[0])  # of seed 0
    optimizer.set_clock(num_updates=2, num_restarts=0, last_restart=0)
    template = get_optimizer_state_dict(model, optimizer)
    assert "step" in template["state"]["first.weight"]["A_state"]
    del kept


# ---- parameters


def test_named_parameters_select_and_train_as_the_module_does() -> None:
    runs = []
    targets = ["first.weight", "second.weight"]
    for named in (True, False):
        model = mlp()
        optimizer = relora(model.named_parameters() if named else model, targets=targets, schedule=SCHEDULE)
        assert optimizer.selected == targets
        train(model, optimizer, 0, 8)
        runs.append(snapshot(model, optimizer))
    assert not differences(*runs)


@pytest.mark.parametrize("looks", [False, True], ids=["untouched", "with drafts"])
def test_parameters_that_are_replaced_in_the_groups_are_the_ones_trained(looks: bool) -> None:
    """Accelerate does so under FSDP2, before the first update; names and draws stay with the place."""
    model, plain = mlp(), mlp()
    optimizer, expected = relora(model, schedule=JaggedSchedule(3)), relora(plain, schedule=JaggedSchedule(3))
    if looks:
        optimizer.functional(model)
        optimizer.factors(model.first.weight)
    replaced = {}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = replaced[p] = nn.Parameter(p.detach().clone())
    for group in optimizer.param_groups:
        group["params"] = [replaced[p] for p in group["params"]]
    for path in ("dense", "step"):
        for run in ((model, optimizer), (plain, expected)):
            step = stepper(path, run[1], run[0])
            for u in range(4):
                step(*batch(u))
        assert not differences(snapshot(model, optimizer), snapshot(plain, expected))


def accelerated() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
        from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)


def test_accelerate_prepares_accumulates_and_schedules_and_a_micro_step_is_no_update() -> None:
    """`prepare` loads the optimizer's own state into it, wraps it and its scheduler, and steps them every second time.

    The same run by hand is bitwise equal.
    """
    accelerator = accelerated()
    model, plain = mlp(), mlp()
    optimizer = relora(model, schedule=SCHEDULE)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    ours, wrapped, prepared = accelerator.prepare(model, optimizer, scheduler)
    by_hand = relora(plain, schedule=SCHEDULE)
    hand_scheduler = torch.optim.lr_scheduler.ExponentialLR(by_hand, 0.9)
    for u in range(8):
        for micro in range(2):
            with accelerator.accumulate(ours):
                accelerator.backward(mse(ours, *batch(2 * u + micro)))
                wrapped.step()
                prepared.step()
                wrapped.zero_grad()
            (mse(plain, *batch(2 * u + micro)) / 2).backward()
        by_hand.step()
        hand_scheduler.step()
        by_hand.zero_grad()
        assert optimizer.num_updates == u + 1
    assert optimizer.num_restarts == 1
    assert not differences(snapshot(model, optimizer), snapshot(plain, by_hand))


def test_accelerates_own_checkpoint_continues_bitwise(tmp_path: Any) -> None:
    def build(seed: int) -> tuple[Any, nn.Module, ReLoRAOptimizer]:
        accelerator, model = accelerated(), mlp(seed=seed)
        optimizer = relora(model, schedule=SCHEDULE)
        accelerator.prepare(model, optimizer)
        return accelerator, model, optimizer

    accelerator, model, optimizer = build(0)
    train(model, optimizer, 0, 5)
    accelerator.save_state(str(tmp_path))
    train(model, optimizer, 5, 9)
    accelerator, resumed, fresh = build(1)
    accelerator.load_state(str(tmp_path))
    train(resumed, fresh, 5, 9)
    assert not differences(snapshot(resumed, fresh), snapshot(model, optimizer))


# ---- formats


def older(change: Callable[[dict[str, Any]], None]) -> tuple[ReLoRAOptimizer, dict[str, Any]]:
    model = mlp()
    optimizer = relora(model)
    train(model, optimizer, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    return relora(mlp(seed=1)), saved


def without_factors(saved: dict[str, Any]) -> None:
    for index in saved["param_groups"][0]["params"]:
        del saved["state"][index]


def with_half_a_pair(saved: dict[str, Any]) -> None:
    del saved["state"][saved["param_groups"][0]["params"][0]]["B"]


def with_other_shapes(saved: dict[str, Any]) -> None:
    entry = saved["state"][saved["param_groups"][0]["params"][0]]
    entry["A"] = entry["A"][:, :-1]


def with_clocks_that_disagree(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["num_updates"] = 7


def without_its_clock(saved: dict[str, Any]) -> None:
    for group in saved["param_groups"]:
        del group["last_restart"]


@pytest.mark.parametrize("updates", [0, 3])
def test_a_state_of_other_weights_of_the_same_shapes_is_refused(updates: int) -> None:
    saved = of_targets("query", updates)[0]
    other, theirs = of_targets("key", 0)[1], copy.deepcopy(saved)
    optimizer = ReLoRAOptimizer(other, rank=2, lr=0.01, targets=["key"])
    with pytest.raises(ValueError, match=r"query\.weight where this optimizer has key\.weight"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state
    del theirs["low_rank"]  # as the message says
    optimizer.load_state_dict(theirs)
    assert optimizer.num_updates == updates


def of_targets(name: str, updates: int) -> tuple[dict[str, Any], nn.Module]:
    """Return the state after some updates of one of two layers alike, and their model."""
    model = nn.ModuleDict({"query": nn.Linear(6, 6), "key": nn.Linear(6, 6)})
    optimizer = ReLoRAOptimizer(model, rank=2, lr=0.01, targets=[name])
    for _ in range(updates):
        (model["query"](torch.ones(3, 6)).sum() + model["key"](torch.ones(3, 6)).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.state_dict(), model


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without_factors, "at low rank but has no factors"),
        (with_half_a_pair, r"lacks \['B'\]"),
        (with_other_shapes, r"saved A is \(2, 6\) and B \(6, 2\)"),
        (with_clocks_that_disagree, "disagree"),
        (without_its_clock, "last_restart"),
    ],
)
def test_a_state_that_disagrees_with_itself_is_refused_and_nothing_is_changed(
    change: Callable[[dict[str, Any]], None], why: str
) -> None:
    fresh, saved = older(change)
    with pytest.raises(ValueError, match=why):
        fresh.load_state_dict(saved)
    assert not fresh.state
    assert fresh.num_updates == 0
