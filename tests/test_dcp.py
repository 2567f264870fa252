"""torch.distributed.checkpoint: its files of any moment load, and continuing from them is bitwise.

It reads into a template: the state of a fresh optimizer after its phantom step. `set_clock(**clock)` gives the template
the form of the saved moment, be it before the first step, in the warm start, at the switch, at a restart or while A is
pointed.
"""

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from models import MLP, batch, differences, jagged_schedule, mlp, relora, selected_weights, snapshot, stepper
from test_foreign_bases import Grows
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from relora_opt import ReLoRAOptimizer, prune

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")

Made = tuple[MLP, ReLoRAOptimizer]
CASES: dict[str, dict[str, Any]] = {
    "AdamW": {"base": "AdamW", "alpha": "matched"},
    "magnitude": {"base": "AdamW", "prune": prune.magnitude(0.5)},
    "cleared by a reset": {"base": "SGD", "dampening": 0.5},
    "gradient": {"base": "AdamW", "init": "gradient"},
    "gradient, cleared by a reset": {"base": "SGD", "dampening": 0.5, "init": "gradient"},
}


def build(case: str, dtype: torch.dtype, *, seed: int = 0, warm_start: int = 3, at: int = 0, turns: int = 1) -> Made:
    model, settings = mlp(dtype, seed=seed), dict(CASES[case])
    # Of 3: the switch after 3, restarts after 7 and 11; of 2 at 2: the switch after 4, restarts after 8 and 12; in two
    # turns of 2 at 2: switches after 4 and 6, a restart after 10.
    schedule = jagged_schedule(restart_every=4, restart_warmup=2, warm_start=warm_start, at=at, turns=turns)
    return model, relora(model, settings.pop("base"), schedule=schedule, max_grad_norm=0.5, **settings)


def run(path: str, made: tuple[nn.Module, ReLoRAOptimizer], first: int, last: int) -> dict[str, Any]:
    model, optimizer = made
    step = stepper(path, optimizer, model)
    for u in range(first, last):
        step(*batch(u, next(model.parameters()).dtype))
    return snapshot(model, optimizer)


def packed(made: Made, options: StateDictOptions) -> dict[str, Any]:
    return {"model": made[0].state_dict(), "optimizer": get_optimizer_state_dict(*made, options=options)}


def moments() -> Iterator[Any]:
    """Yield every case, its warm start and is_flat; but for one warm start, flat, the hardest case alone is fast."""
    for case in CASES:
        for form in ((3, 0, 1, False), (3, 0, 1, True), (0, 0, 1, True), (2, 2, 1, True), (2, 2, 2, True)):
            is_fast = form == (3, 0, 1, True) or case == "gradient, cleared by a reset"
            yield pytest.param(case, *form, marks=() if is_fast else pytest.mark.slow)


@pytest.mark.parametrize(("case", "warm_start", "at", "turns", "is_flat"), [*moments()])
@pytest.mark.parametrize("path", ["dense", "functional"])
def test_continuing_from_its_files_is_bitwise_at_every_moment(
    case: str, path: str, is_flat: bool, warm_start: int, at: int, turns: int, tmp_path: Path
) -> None:
    """The moments: before the first step, in the warm start, the switch, a sketch, mid-cycle, a restart, after it."""
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    made = build(case, torch.float32, warm_start=warm_start, at=at, turns=turns)
    last = 0
    for stop in (0, 2, 3, 4, 5, 6, 7, 8):
        if stop:
            run(path, made, last, stop)
        last = stop
        saved = packed(made, options)
        dcp.save(saved, checkpoint_id=tmp_path / str(stop), no_dist=True)
        clock, expected = made[1].clock, snapshot(*made)
        resumed = build(case, torch.float32, seed=stop + 1, warm_start=warm_start, at=at, turns=turns)
        resumed[1].set_clock(**clock)
        template = packed(resumed, options)
        dcp.load(template, checkpoint_id=tmp_path / str(stop), no_dist=True)
        resumed[0].load_state_dict(template["model"])
        set_optimizer_state_dict(*resumed, template["optimizer"], options=options)
        assert resumed[1].clock == clock
        assert not differences(snapshot(*resumed), expected), f"loading after update {stop}"
        if stop in (0, 3, 5):  # the saved state is that of the updates up to here, and it goes on
            twin = build(case, torch.float32, seed=stop + 1, warm_start=warm_start, at=at, turns=turns)
            twin[0].load_state_dict(expected["model"])
            twin[1].load_state_dict(expected["optimizer"])
            assert not differences(run(path, resumed, stop, stop + 5), run(path, twin, stop, stop + 5))


@pytest.mark.parametrize("stop", [2, 3, 4, 6, 8])
def test_counters_alone_tell_whose_state_is_fresh_in_turns(stop: int, tmp_path: Path) -> None:
    """At the changes of turns, after 2, 4 and 6, of the weights concerned alone."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    place = {"warm_start": 2, "at": 2, "turns": 2}
    made, resumed = build("AdamW", torch.float32, **place), build("AdamW", torch.float32, seed=1, **place)
    run("dense", made, 0, stop)
    dcp.save(packed(made, options), checkpoint_id=tmp_path, no_dist=True)
    clock = {name: value for name, value in made[1].clock.items() if name != "fresh"}
    resumed[1].set_clock(**clock)
    template = packed(resumed, options)
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    resumed[0].load_state_dict(template["model"])
    set_optimizer_state_dict(*resumed, template["optimizer"], options=options)
    assert not differences(snapshot(*resumed), snapshot(*made))


@pytest.mark.parametrize("stop", [0, 1, 3, 5])
@pytest.mark.parametrize("is_flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("case", ["AdamW", "magnitude", "cleared by a reset"])
def test_a_file_without_its_clock_loses_nothing(case: str, is_flat: bool, stop: int, tmp_path: Path) -> None:
    """Without a warm start the template of a fresh optimizer has all that files of most moments have."""
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    made, resumed = build(case, torch.float32, warm_start=0), build(case, torch.float32, seed=1, warm_start=0)
    run("dense", made, 0, stop)
    dcp.save(packed(made, options), checkpoint_id=tmp_path, no_dist=True)
    template = packed(resumed, options)
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    resumed[0].load_state_dict(template["model"])
    set_optimizer_state_dict(*resumed, template["optimizer"], options=options)
    assert not differences(snapshot(*resumed), snapshot(*made))
    assert not differences(run("dense", resumed, stop, 9), run("dense", made, stop, 9))


def test_a_file_of_a_moment_that_a_template_does_not_have_is_refused(tmp_path: Path) -> None:
    """After a restart that has cleared their state, the file lacks what the base keeps of the factors."""
    made, resumed = (build("cleared by a reset", torch.float32, warm_start=0) for _ in range(2))
    run("dense", made, 0, 4)
    dcp.save(packed(made, StateDictOptions()), checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: .*A_state"):
        dcp.load(packed(resumed, StateDictOptions()), checkpoint_id=tmp_path, no_dist=True)


@pytest.mark.parametrize("is_flat", [False, True], ids=["nested", "flat"])
def test_a_state_that_the_base_makes_when_it_is_built_is_there_at_the_switch(is_flat: bool, tmp_path: Path) -> None:
    """Adagrad's accumulator starts from a number of its own."""
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    pair = []
    for seed in (0, 1):
        model = mlp(seed=seed)
        base = functools.partial(torch.optim.Adagrad, lr=0.05, initial_accumulator_value=0.1)
        schedule = jagged_schedule(restart_every=4, restart_warmup=2, warm_start=2)
        pair.append((model, ReLoRAOptimizer(model, base, rank=2, schedule=schedule)))
    made, resumed = pair
    run("dense", made, 0, 2)
    dcp.save(packed(made, options), checkpoint_id=tmp_path, no_dist=True)
    resumed[1].set_clock(**made[1].clock)
    template = packed(resumed, options)
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    resumed[0].load_state_dict(template["model"])
    set_optimizer_state_dict(*resumed, template["optimizer"], options=options)
    assert not differences(run("dense", resumed, 2, 7), run("dense", made, 2, 7))


def test_the_clock_is_plain_and_says_of_which_factors_the_base_knows_nothing() -> None:
    model = mlp()
    optimizer = relora(model, init="gradient", schedule=jagged_schedule(4, 2, 1))
    seen = []
    for u in range(5):
        run("functional", (model, optimizer), u, u + 1)
        seen.append(optimizer.clock)
        assert json.loads(json.dumps(seen[-1])) == seen[-1]
    weights = ["first.weight", "second.weight"]
    assert [clock["fresh"] for clock in seen] == [weights, weights, weights, [], []]  # the switch, and two sketches
    assert seen[4] == {"num_updates": 5, "num_restarts": 1, "last_restart": 5, "fresh": [], "scales": {}}


def test_without_fresh_the_clock_stands_as_a_state_of_that_many_updates_has_it() -> None:
    early, late = {"warm_start": 3}, {"warm_start": 3, "at": 2}
    moments = [(early, 3, 3, 0, False), (early, 5, 3, 0, True), (early, 7, 7, 1, True)]
    moments += [(late, 1, 0, 0, True), (late, 2, 0, 0, False), (late, 3, 0, 0, True)]
    moments += [(late, 5, 5, 1, False), (late, 6, 5, 1, True)]
    for lengths, num_updates, last_restart, num_restarts, has_state in moments:
        model, optimizer = build("AdamW", torch.float32, **lengths)
        optimizer.set_clock(num_updates=num_updates, num_restarts=num_restarts, last_restart=last_restart)
        get_optimizer_state_dict(model, optimizer)  # makes the state
        for weight in selected_weights(model).values():
            entry = optimizer.state.get(weight, {})
            assert bool(entry.get("A_state", entry)) == has_state, (lengths, num_updates)


def test_what_the_phantom_step_makes_up_does_not_count() -> None:
    """Momentum of zeros is not the momentum of a first update under dampening; torch's own SGD is left with it."""
    runs = []
    for has_phantom in (True, False):
        made = build("cleared by a reset", torch.float32, warm_start=0)
        if has_phantom:
            get_optimizer_state_dict(*made)
        run("dense", made, 0, 1)
        runs.append({name: made[1].factors(weight) for name, weight in selected_weights(made[0]).items()})
    assert not differences(*runs)


@pytest.mark.parametrize("warm_start", [0, 3])
@pytest.mark.parametrize("path", ["dense", "functional"])
@pytest.mark.parametrize("case", CASES)
def test_taking_the_state_before_the_first_update_changes_nothing(case: str, path: str, warm_start: int) -> None:
    taken, untouched = (build(case, torch.float32, warm_start=warm_start) for _ in range(2))
    packed(taken, StateDictOptions())
    assert taken[1].grad_norm is None
    assert taken[1].last_lr() == untouched[1].last_lr()
    assert not differences(run(path, taken, 0, 6), run(path, untouched, 0, 6))


def of_matrices(base: Any) -> tuple[nn.Module, ReLoRAOptimizer]:
    """Return a model that is low-rank as a whole: nothing has state where its warm start, after 3, begins."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False))
    schedule = jagged_schedule(restart_every=2, restart_warmup=1, warm_start=2, at=3)
    options: dict[str, Any] = {"rank": 2, "alpha": 2.0, "targets": ["0", "2"], "lr": 0.01, "prune": prune.keep()}
    return model, ReLoRAOptimizer(model, base, schedule=schedule, **options)


@pytest.mark.parametrize("base", [torch.optim.AdamW, Grows], ids=lambda base: base.__name__)
@pytest.mark.parametrize("stop", [3, 4, 5, 6])
def test_a_later_warm_start_of_everything_is_saved_and_goes_on_without_a_trace(stop: int, base: Any) -> None:
    untouched, taken, resumed = (of_matrices(base) for _ in range(3))
    for made in (untouched, taken):
        run("dense", made, 0, stop)
    saved = copy.deepcopy(get_optimizer_state_dict(*taken))
    resumed[0].load_state_dict(taken[0].state_dict())
    resumed[1].set_clock(**taken[1].clock)
    assert resumed[1].clock == taken[1].clock
    get_optimizer_state_dict(*resumed)  # a template
    set_optimizer_state_dict(*resumed, saved)
    assert resumed[1].clock == taken[1].clock
    after, *others = (run("dense", made, stop, stop + 3) for made in (untouched, taken, resumed))
    assert not any(differences(other, after) for other in others)


@pytest.mark.parametrize("num_updates", [0, 2, 9], ids="after {}".format)
@pytest.mark.parametrize("case", ["AdamW", "magnitude", "gradient", "cleared by a reset"])
def test_the_phantom_step_does_not_touch_torchs_random_state(case: str, num_updates: int) -> None:
    made = build(case, torch.bfloat16)
    made[1].set_clock(num_updates=num_updates, num_restarts=num_updates // 8, last_restart=num_updates // 8 * 7)
    before = torch.get_rng_state()
    get_optimizer_state_dict(*made)
    assert made[1].state
    assert torch.equal(before, torch.get_rng_state())


def test_the_clock_carries_matched_scales_and_another_optimizers_are_refused() -> None:
    model = mlp()
    optimizer = relora(model, alpha="matched", init="kaiming")
    clock = optimizer.clock
    assert clock["scales"] == {name: optimizer.scale(model.get_parameter(name)) for name in optimizer.selected}
    with pytest.raises(ValueError, match=r"the saved state has first\.weight at the matched scale .* same init"):
        relora(mlp(), alpha="matched").set_clock(**clock)
    rounded = {name: scale * 1.0005 for name, scale in clock["scales"].items()}  # by another processor, say
    resumed = relora(mlp(), alpha="matched", init="kaiming")
    resumed.set_clock(**{**clock, "scales": rounded})
    assert resumed.clock["scales"] == rounded
    with pytest.raises(ValueError, match=r"fresh, scales: \['other'\] are no low-rank weights"):
        resumed.set_clock(**{**clock, "scales": {"other": 1.0}})


def test_a_copy_knows_what_set_clock_said() -> None:
    made = build("AdamW", torch.float32)
    made[1].set_clock(num_updates=9, num_restarts=1, last_restart=7, fresh=["first.weight"])
    model, optimizer = copy.deepcopy(made)
    assert packed((model, optimizer), StateDictOptions())["optimizer"]["state"]["first.weight"]["A_state"] == {}
    assert optimizer.clock["fresh"] == ["first.weight"]
