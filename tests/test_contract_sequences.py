"""No sequence of steps, restarts, saves, loads, copies and added groups breaks the laws.

Hypothesis draws shapes, ranks, groups, restart plans, bases and the sequence. Every run has a twin that is never
interrupted; after every event the two are equal, bitwise. Beside that: within a cycle a weight's change has rank r at
most; a restart changes no weight; the clock counts what the plan says.
"""

import copy
import pickle
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from models import differences, through_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from relora_opt import JaggedSchedule, ReLoRAOptimizer, prune

DOUBLE = torch.float64
TARGETS = r"^(layers\.[01]|extra\.\d)\.weight$"
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.01}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
}
STRATEGIES = (prune.reset(), prune.magnitude(0.5), prune.random(0.5), prune.keep())


class Net(nn.Module):
    """Three linear layers, and two more that no optimizer knows before they are added."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.extra = nn.ModuleList(nn.Linear(widths[-1], widths[-1]) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        for layer in self.extra:
            x = x + layer(x)
        return x


class Plan(NamedTuple):
    """What a run is made of, before anything happens to it."""

    widths: tuple[int, ...]
    rank: int
    base: str
    schedule: JaggedSchedule
    strategy: prune.Strategy
    init: str
    max_grad_norm: float | None
    factor_lr: float
    splits_groups: bool
    release_grads: bool


class Run(NamedTuple):
    model: Net
    optimizer: ReLoRAOptimizer

    def state(self) -> dict[str, Any]:
        for group in self.optimizer.param_groups:  # torch gives it to groups that are added after loading
            group.setdefault("differentiable", False)
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    widths = tuple(draw(st.integers(3, 7)) for _ in range(4))
    init = draw(st.sampled_from(["kaiming", "orthogonal", "gradient"]))
    # Sketches take the first two updates of a cycle, so with "gradient" a cycle is longer than that.
    every = draw(st.sampled_from([0, 3, 4] if init == "gradient" else [0, 1, 2, 4]))
    lengths = {"restart_warmup": draw(st.integers(0, every)), "warm_start": draw(st.integers(0, 3))}
    lengths["warm_start_at"] = (
        draw(st.integers(0, 4)) if lengths["warm_start"] >= max(1, lengths["restart_warmup"]) else 0
    )
    if lengths["warm_start"] >= max(1, lengths["restart_warmup"]):
        lengths["warm_start_turns"] = draw(st.integers(1, 2))
    return Plan(
        widths=widths,
        rank=draw(st.integers(1, min(widths) - 1)),
        base=draw(st.sampled_from(sorted(BASES))),
        schedule=JaggedSchedule(every, **lengths),
        strategy=draw(st.sampled_from(STRATEGIES)),
        init=init,
        max_grad_norm=draw(st.sampled_from([None, 0.5])),
        factor_lr=draw(st.sampled_from([1.0, 2.0])),
        splits_groups=draw(st.booleans()),
        release_grads=draw(st.booleans()),
    )


def build(plan: Plan, added: list[int], *, seed: int = 0) -> Run:
    """Return a new run to which groups of these ranks have been added."""
    torch.manual_seed(seed)
    model = Net(plan.widths).to(DOUBLE)
    named = [(name, p) for name, p in model.named_parameters() if name.startswith("layers")]
    base, options = BASES[plan.base]
    groups: list[Any] = [{"params": named[:2], "lr": 0.02}, {"params": named[2:]}] if plan.splits_groups else named
    optimizer = ReLoRAOptimizer(
        groups,
        base,
        rank=plan.rank,
        alpha=2.0,
        targets=TARGETS,
        schedule=plan.schedule,
        init=plan.init,
        prune=plan.strategy,
        factor_lr=plan.factor_lr,
        max_grad_norm=plan.max_grad_norm,
        release_grads=plan.release_grads,
        **options,
    )
    run = Run(model, optimizer)
    for number, rank in enumerate(added):
        add(run, number, rank)
    return run


def add(run: Run, number: int, rank: int) -> None:
    named = [(f"extra.{number}.{name}", p) for name, p in run.model.extra[number].named_parameters()]
    run.optimizer.add_param_group({"params": named, "rank": rank})


def data(index: int, width: int) -> Tensor:
    return torch.randn(6, width, generator=torch.Generator().manual_seed(index), dtype=DOUBLE)


def take_step(run: Run, path: str, index: int) -> None:
    run.optimizer.zero_grad()
    x = data(index, run.model.layers[0].in_features)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - 0.3).square().mean()

    if path == "step":
        run.optimizer.make_step(run.model, loss_fn, compile=False)(x)
        return
    loss_fn(run.optimizer.functional(run.model) if path == "functional" else run.model, x).backward()
    run.optimizer.step()


def assert_same(a: Any, b: Any) -> None:
    lines = differences(a, b)
    assert not lines, lines[0]


class Contract(RuleBasedStateMachine):
    """`live` is interrupted, `twin` is not."""

    @initialize(plan=plans())
    def begin(self, plan: Plan) -> None:
        self.plan, self.added = plan, list[int]()
        self.live, self.twin = build(plan, []), build(plan, [])
        self.index = self.num_updates = self.num_restarts = 0
        self.all_have_moved = False
        self.saved: list[tuple[Any, ...]] = []
        self.start_cycle()

    def start_cycle(self) -> None:
        self.start = {name: p.detach().clone() for name, p in self.live.model.named_parameters()}

    def start_cycle_of_those_at_full_rank(self) -> None:
        optimizer, turn = self.live.optimizer, self.plan.schedule.turn(self.num_updates)
        weights = dict(self.live.model.named_parameters())
        slots = [
            slot for own, its in zip(optimizer._slots, optimizer._turns, strict=True) for slot in own if its == turn
        ]
        self.start = {**self.start, **{slot.name: weights[slot.name].detach().clone() for slot in slots}}

    # -- what both do

    @rule(path=st.sampled_from(["dense", "functional", "step"]))
    def step(self, path: str) -> None:
        for run in (self.live, self.twin):
            take_step(run, path, self.index)
        self.index += 1
        self.num_updates += 1
        self.all_have_moved = True
        schedule = self.plan.schedule
        ended = schedule.turn(self.num_updates) if schedule.changes_after(self.num_updates) else None
        is_counted = ended is not None and ended + schedule.warm_start_at > 0
        self.num_restarts += schedule.restarts_after(self.num_updates) or is_counted
        if schedule.restarts_after(self.num_updates):
            self.start_cycle()
        elif schedule.is_full_rank(self.num_updates):
            self.start_cycle_of_those_at_full_rank()

    @precondition(lambda self: self.live.optimizer.is_low_rank)
    @rule()
    def restart(self) -> None:
        x = data(99, self.plan.widths[0])
        before = copy.deepcopy(self.live.model.state_dict()), self.live.model(x)
        for run in (self.live, self.twin):
            run.optimizer.restart()
        assert_same(self.live.model.state_dict(), before[0])
        assert torch.equal(self.live.model(x), before[1])
        self.num_restarts += 1
        self.start_cycle()

    @precondition(lambda self: len(self.added) < 2)
    @rule(is_low_rank=st.booleans())
    def add_param_group(self, is_low_rank: bool) -> None:
        rank = self.plan.rank if is_low_rank else 0
        for run in (self.live, self.twin):
            add(run, len(self.added), rank)
        self.added.append(rank)
        self.all_have_moved = False

    @rule(factor=st.sampled_from([0.5, 2.0]))
    def change_the_rate(self, factor: float) -> None:
        for run in (self.live, self.twin):
            for group in run.optimizer.param_groups:
                group["lr"] *= factor

    # -- what happens to one alone, and must leave it the same

    @rule(touches=st.booleans(), seed=st.integers(1, 3))
    def save_and_load_into_a_fresh_one(self, touches: bool, seed: int) -> None:
        state = through_file(self.live.state())
        self.live = build(self.plan, self.added, seed=seed)
        if touches:  # a fresh one is in use already: its functional model has factors
            self.live.optimizer.functional(self.live.model)
        self.live.model.load_state_dict(state["model"])
        self.live.optimizer.load_state_dict(state["optimizer"])

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy_it(self, how: str) -> None:
        pair = tuple(self.live)
        self.live = Run(*(copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))))

    # A phantom step makes up state for parameters that have none, as for any optimizer of torch; so all have some here.
    @precondition(lambda self: self.num_updates > 0 and self.all_have_moved)
    @rule(is_flat=st.booleans())
    def go_through_distributed_checkpoint(self, is_flat: bool) -> None:
        schedule = (
            self.plan.schedule
        )  # a weight that has just begun its warm start has no state, which torch takes for lost
        has_begun = schedule.changes_after(self.num_updates) and schedule.is_full_rank(self.num_updates + 1)
        options = StateDictOptions(flatten_optimizer_state_dict=is_flat, strict=not has_begun)
        saved = through_file(get_optimizer_state_dict(*self.live, options=options))
        weights, clock = self.live.model.state_dict(), self.live.optimizer.clock
        self.live = build(self.plan, self.added, seed=1)
        self.live.model.load_state_dict(weights)
        self.live.optimizer.set_clock(**clock)
        set_optimizer_state_dict(*self.live, saved, options=options)

    @rule(bad=st.sampled_from([float("inf"), float("nan")]))
    def skip_an_update_under_a_scaler(self, bad: float) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        self.live.optimizer.zero_grad()
        scaler.scale((self.live.model(data(0, self.plan.widths[0])) * bad).sum()).backward()
        scaler.step(self.live.optimizer)
        self.live.optimizer.zero_grad()

    @rule(set_to_none=st.booleans())
    def compute_gradients_in_vain(self, set_to_none: bool) -> None:
        self.live.optimizer.zero_grad(set_to_none=set_to_none)  # released ones of the last step are used up
        self.live.optimizer.functional(self.live.model)(data(0, self.plan.widths[0])).sum().backward()
        self.live.model(data(1, self.plan.widths[0])).sum().backward()
        self.live.optimizer.zero_grad(set_to_none=set_to_none)
        self.live.optimizer.zero_grad()

    # -- going back

    @rule()
    def save(self) -> None:
        counters = (
            self.index,
            self.num_updates,
            self.num_restarts,
            self.start,
            self.all_have_moved,
            len(self.added),
        )
        self.saved.append((through_file(self.live.state()), counters))

    @precondition(lambda self: any(counters[-1] == len(self.added) for _, counters in self.saved))
    @rule()
    def load_into_a_live_one_and_a_fresh_one(self) -> None:
        state, counters = next(s for s in reversed(self.saved) if s[1][-1] == len(self.added))
        self.twin = build(self.plan, self.added, seed=2)
        for run in (self.live, self.twin):
            run.model.load_state_dict(state["model"])
            run.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.index, self.num_updates, self.num_restarts, self.start, self.all_have_moved, _ = counters

    # -- the laws

    @invariant()
    def the_clock_is_right(self) -> None:
        for run in (self.live, self.twin):
            assert (run.optimizer.num_updates, run.optimizer.num_restarts) == (self.num_updates, self.num_restarts)

    @invariant()
    def an_interruption_changes_nothing(self) -> None:
        assert_same(self.live.model.state_dict(), self.twin.model.state_dict())

    @invariant()
    def the_change_within_a_cycle_has_rank_r_at_most(self) -> None:
        if not self.live.optimizer.is_low_rank:
            return
        weights = dict(self.live.model.named_parameters())
        for name in self.live.optimizer.selected:
            change = torch.linalg.svdvals(weights[name].detach() - self.start[name])
            size = max(1.0, float(change[0]))  # at rates that were doubled again and again a run leaves all bounds
            assert change[self.plan.rank] < 1e-12 * size, name  # in float64

    def teardown(self) -> None:
        if hasattr(self, "live"):
            self.step("dense")  # saved before the first update, it depends on what was looked at whether factors exist
            assert_same(self.live.state(), self.twin.state())


def check(max_examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Contract,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


def test_no_sequence_breaks_the_laws() -> None:
    check(25, 12)


@pytest.mark.slow
def test_no_long_sequence_breaks_the_laws() -> None:
    check(400, 40)
