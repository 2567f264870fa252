"""ReLoRAOptimizer: any base optimizer, with an update of low rank for the chosen weights.

For a chosen weight W (m, n) with factors B (m, r), A (r, n) and scale s = alpha / r, one update is

    dA = s B^T G,  dB = s G A^T        G = dL/dW, or the factor gradients of the functional path, or both
    (A', B') = base step of (A, B)     at lr * schedule(u) * factor_lr
    W <- W + s (B' A' - B A)

and a restart re-draws A, zeroes B and prunes their state; it does not touch W. The model's own parameter is the
effective weight at every moment: evaluation, `state_dict()` and export need no merging.

Source: Lialin et al. 2023, arXiv 2307.05695, Algorithm 1. This file sequences; the mathematics is in factors.py,
weight.py, schedule.py and prune.py, the weights that have factors in factored.py, the layout of their state in
state.py, the base optimizer in inner.py, its matched scale in matched.py, what a restart does to its state in
restart.py, its checkpoints in saved.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from . import gradients, inner, phantom, pointing, release
from . import prune as pruning
from .factors import INITS, movements, product_norm
from .groups import (
    LowRank,
    Params,
    ResolvedGroup,
    Selected,
    check_foreign_names,
    resolve_added_group,
    resolve_groups,
)
from .restart import changed, check_prunable, numbers, prune_states_, reset_counters_
from .saved import SavedOptimizer
from .schedule import JaggedSchedule
from .select import Targets
from .state import (
    Before,
    LowRankState,
    factors_of,
    is_low_rank,
    move_weights_,
    new_clock,
    redraw_,
)

if TYPE_CHECKING:
    from .functional import FunctionalModel
    from .guard import Guard
    from .metrics import Memory, Metrics
    from .step import Step

Group = dict[str, Any]


class ReLoRAOptimizer(SavedOptimizer):
    """Train the chosen weights of any model by a sequence of low-rank updates, and everything else densely.

    Args:
        params: a module, parameters, (name, parameter) pairs, or groups of either; a group may set its own `rank`,
            `alpha` and `factor_lr` beside the base optimizer's options, and must say whether weights of three
            dimensions in it are `stacked` matrices (experts), or a convolution's.
        base: an optimizer class, or a factory `groups -> Optimizer`.
        rank: r of the factors; 0 trains everything densely.
        alpha: "matched" gives every weight the scale s with which an update moves it as far as the base's full-rank
            update at the same rate (sqrt(n / rank) for Adam), so that a tuned full-rank rate carries over (see
            matched.py). A number is the scale's: s = alpha / rank; None means alpha = rank, s = 1.
        targets: which weights are low-rank: a regular expression searched for in parameter names, a list of names (of
            parameters or modules, whole or their last parts), or a predicate (name, parameter) -> bool. None: the
            weights of linear layers except embeddings, tied weights and the output head.
        schedule: the clock of restarts and rates; None means a restart every 1000 updates with a ramp of 50.
        init: how A is drawn: "orthogonal", "kaiming" (the paper), or "gradient": along the leading right singular
            directions of the weight's gradient, exactly on the dense path, and by two sketches, in the first two
            updates of a cycle, on the functional path (see pointing.py).
        prune: what restarts leave of the factors' optimizer state, `prune.reset()` by default.
        factor_lr: multiplies the learning rate of factors only.
        max_grad_norm: clips the norm of factor and dense gradients together; None leaves them alone.
        release_grads: project each dense gradient onto its factors during the backward pass and free it, so that one at
            a time lives: `grad` of a low-rank weight then has no numbers of its own (see release.py). For the dense
            path in one process. With init "gradient", A is pointed by sketches, as on the functional path.
        seed: keys every draw, together with the parameter's name and the number of restarts.
        options: the base optimizer's keyword arguments.

    Raises:
        ValueError, TypeError: for settings that cannot work, before anything is allocated.

    Source: arXiv 2307.05695, Algorithm 1. Its own scale and draw are alpha=32 at rank 128 and init="kaiming"; recipes/
    has the rest of its settings.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    >>> optimizer = ReLoRAOptimizer(model, torch.optim.AdamW, rank=2, lr=1e-3)
    >>> model(torch.ones(4, 8)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.num_updates
    1
    """

    grad_norm: Tensor | None  # of the last update before clipping, where max_grad_norm is set
    measures_updates = False  # whether updates measure how far they move the low-rank weights, for metrics()
    _last_lr: list[Any]  # numbers, or tensors on a device, which nobody waits for
    _begun: ReferenceType[Step] | None  # the step that is in the middle of an update
    _moved: dict[Tensor, Tensor | float] | None  # how far the last update moved weights by their factors, where known
    _pruned: dict[Tensor, pruning.Pruned]  # by the last restart
    _num_breaks: int  # how often gradients were used, dropped or made void: whoever accumulates some begins anew
    _is_built = True  # False inside __init__

    def __init__(
        self,
        params: Params,
        base: Callable[..., Optimizer] = torch.optim.AdamW,
        *,
        rank: int = 128,
        alpha: float | str | None = "matched",
        targets: Targets = None,
        schedule: JaggedSchedule | None = None,
        init: str = "orthogonal",
        prune: pruning.Strategy | None = None,
        factor_lr: float = 1.0,
        max_grad_norm: float | None = None,
        release_grads: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        check_foreign_names(options)
        self.schedule = JaggedSchedule(1000, restart_warmup=50) if schedule is None else schedule
        self.init, self.max_grad_norm, self.release_grads, self.seed = init, max_grad_norm, release_grads, seed
        self.prune = pruning.reset() if prune is None else prune
        self._check_settings()
        self._base = inner.Base(base, options)
        self._low_rank = LowRank(rank, alpha, factor_lr, targets, base_with_alpha=self._base.with_own_alpha)
        resolved = resolve_groups(params, self._low_rank, num_turns=self.schedule.warm_start_turns)
        is_alone = max_grad_norm is None and not any(group.options["rank"] for group in resolved)
        inner.check_alone(self._base.kind, is_alone=is_alone)
        self._slots = [group.slots for group in resolved]
        self._turns, self._parts = [group.turn for group in resolved], [group.part for group in resolved]
        self._matched: dict[tuple[int, int, int], float] = {}
        self._options = [_without_parameters(group.options) for group in resolved]
        self._init_transients()
        template = self._template(resolved)
        inner.check_alone(type(template), is_alone=is_alone)  # a factory's
        groups = [
            _with_own_tensors({**given, **group.options, "pointing": self._num_sketches(group.options)})
            for given, group in zip(template.param_groups, resolved, strict=True)
        ]
        self._passes_closure = isinstance(template, torch.optim.LBFGS)
        self._followed = self.schedule
        self._is_built = False
        super().__init__(groups, {**template.defaults, **new_clock()})
        self._fix_scales()
        self._check_base(self.param_groups)
        self._attach(takes_over=True)
        self._is_built = True

    # The contract of torch.optim.Optimizer

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update, and what is due after it: a switch or a restart.

        A closure runs first, with gradients enabled; its loss is returned. An update that GradScaler skips is not
        counted, nor is a step without any gradient (a second one, say, after that of `make_step`), nor the step with lr
        0 and zero gradients by which torch.distributed.checkpoint makes state.
        The factors' gradients are used up: none outlasts its step, so zeroing the model's own gradients is enough.

        Raises:
            RuntimeError: for factor gradients of the functional path under a GradScaler, and inside the capture of a
                CUDA graph.
        """
        _check_step(closure)
        self._restore_models()
        self._check_groups()
        self._num_breaks += 1
        loss = None
        if closure is not None and not self._passes_closure:
            with torch.enable_grad():
                loss = closure()
        self._check_unscaled()
        counts = not phantom.is_phantom(self.param_groups, self.state, self._all_factors())
        if counts and self._is_template:
            if self.num_updates == 0:
                self._forget_template()
            self._is_template = False
        self._make_entries()
        self._attach(takes_over=False)
        result = (self._update if counts else self._make_template)(closure if self._passes_closure else None)
        return result if self._passes_closure else loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients of the parameters and of the factors."""
        self._restore_models()
        self._num_breaks += 1
        super().zero_grad(set_to_none)
        for factor in self._all_factors():
            if set_to_none or factor.grad is None:
                factor.grad = None
            else:
                factor.grad.zero_()

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, which may set its own `rank`, `alpha` and `factor_lr`.

        A group added at low rank is low-rank at once; its first A belongs to the current cycle. Where a warm start has
        turns, its weights take them too: those whose turn is over stay low-rank.
        """
        if not self._is_built:  # resolved already: __init__ adds its groups through here
            super().add_param_group(param_group)
            return
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group is a {type(param_group).__name__}: give a dictionary with params")
        param_group = {
            key: value for key, value in param_group.items() if key not in ("scale", "pointing", *new_clock())
        }
        num_groups, num_before = len(self.param_groups), sum(map(len, self._slots))
        try:
            turns = self.schedule.warm_start_turns
            for group in resolve_added_group(
                param_group, self._low_rank, num_before=num_before, taken=self.selected, num_turns=turns
            ):
                template = self._template([group]).param_groups[0]
                own = {"pointing": self._num_sketches(group.options), **self._clock()}
                super().add_param_group(_with_own_tensors({**template, **group.options, **own}))
                self._slots.append(group.slots)
                self._turns.append(group.turn)
                self._parts.append(group.part)
                self._options.append(_without_parameters(group.options))
            self._fix_scales()
            self._check_base(self.param_groups[num_groups:])
            self._attach(takes_over=True)
        except Exception:  # all of it or nothing
            for of_groups in (self.param_groups, self._slots, self._turns, self._parts, self._options):
                del of_groups[num_groups:]
            self._matched = {key: scale for key, scale in self._matched.items() if key[0] < num_groups}
            raise
        if self.state:
            self._make_entries()  # what is saved before its first update has its factors
        self._changed()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler must leave unscaling to `step`, which refuses: it does not know the factors' gradients.

        Those of the dense path are the model's own, which it unscales and finds infinite, as any optimizer's.
        """
        return any(factor.grad is not None for factor in self._all_factors())

    # What is ReLoRA's own

    @property
    def lr_multiplier(self) -> float:
        """The schedule's multiplier for the coming update."""
        last_restart = int(self.param_groups[0]["last_restart"])
        return self.schedule(self.num_updates + 1, last_restart, num_restarts=self.num_restarts)

    def last_lr(self) -> list[float]:
        """Return the effective rate of every group in the last update; of the coming one before any."""
        return [float(lr) for lr in self._last_lr or self._rates()]

    @torch.no_grad()
    def restart(self) -> None:
        """Start a new cycle now: re-draw every A, zero every B, prune their state, and ramp the rate up from 0.

        The model's output does not change. The periodic restarts stay where they are. Gradients of the factors that
        have not been stepped on are forgotten: they belong to the old A.

        Raises:
            ValueError: during the warm start, or where nothing is low-rank.
        """
        self._check_groups()
        if not self.is_low_rank:
            raise ValueError(
                f"restart() after {self.num_updates} updates: no weight is low-rank now ({self.schedule.place}, ranks "
                f"{[group['rank'] for group in self.param_groups]})"
            )
        self._make_entries()
        self._num_breaks += 1
        restart = self.num_restarts + 1
        self._pruned = prune_states_(  # first: it tries the base, and whatever that raises leaves the cycle as it is
            self._factored(), self.state, self._base, self._options, self.prune, seed=self.seed, restart=restart
        )
        for number, group in enumerate(self.param_groups):
            group["num_restarts"], group["last_restart"] = restart, self.num_updates
            if self._has_factors(number):
                group["pointing"] = self._num_sketches(group)
        for W, slot, _, _ in self._factored():
            W.grad = W.grad if release.is_dense(W.grad) else None
            redraw_(self.state[W], W, slot, init=self.init, seed=self.seed, restart=restart)

    def has_finite_gradients(self) -> bool:
        """Say whether the norm of factor and dense gradients is finite; it waits for the device."""
        return gradients.are_finite((*self.parameters(), *self._all_factors()))

    def metrics(self) -> Metrics:
        """Return what people watch, of every low-rank weight and overall: see `Metrics` in metrics.py.

        Computed when asked, at the cost of one pass over the weights; nothing changes, and the device is waited for
        once. `update_rms` is there after an update that was made with `measures_updates = True`, which costs two small
        products a weight. With sharded weights all ranks must call, and set `measures_updates` alike; they get the same
        numbers, but each its own bytes.
        """
        from .metrics import Watched, measure

        drafts = dict(self._drafts)
        watched = []
        for selected in self._selected():
            W, slot, group, number = selected
            entry = self.state[W] if self.state.get(W) else drafts.get(W)
            scale = self._scale(selected) if is_low_rank(entry) else 0.0
            moved = None if self._moved is None else self._moved.get(W)
            is_pointing = bool(group["pointing"])
            has_factors, pruned = self._has_factors(number), self._pruned.get(W)
            watched.append(Watched(slot.name, W, entry, scale, has_factors, is_pointing, moved, pruned))
        try:
            return measure(self, watched)
        finally:
            self._drafts = drafts  # sizes may have drawn some

    def memory(self) -> Memory:
        """Return the exact bytes of weights, gradients and state, by kind, and what full-rank AdamW needs."""
        from .metrics import memory

        return memory(self)

    def functional(self, model: nn.Module) -> FunctionalModel:
        """Return the model as a module that trains factors and keeps no dense gradient (see functional.py)."""
        from .functional import FunctionalModel

        self._check_sketches("on the functional path")
        self._restore_models()
        functional = FunctionalModel(model, self)
        self._functionals.add(functional)
        return functional

    def make_step(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        *,
        compile: bool | dict[str, Any] = True,
        accumulate: int = 1,
        skip_nonfinite: bool = False,
        guard: Guard | None = None,
        has_aux: bool = False,
        autocast: torch.dtype | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> Step:
        """Return `step(*batch, **kwargs) -> loss`: forward, backward, update, and a restart when due (see step.py).

        With a process group, all of its processes must call: they start from the first one's weights.
        """
        from .step import Step

        if self._passes_closure:
            raise ValueError("LBFGS asks for a closure, which make_step does not give: call optimizer.step(closure)")
        return Step(
            self,
            model,
            loss_fn,
            compile=compile,
            accumulate=accumulate,
            skip_nonfinite=skip_nonfinite,
            guard=guard,
            has_aux=has_aux,
            autocast=autocast,
            process_group=process_group,
        )

    # Privates

    def _check_settings(self) -> None:
        init, norm, seed = self.init, self.max_grad_norm, self.seed
        if init not in INITS:
            raise ValueError(f"init={init!r} is not known: choose one of {', '.join(INITS)}")
        is_norm = isinstance(norm, (int, float)) and not isinstance(norm, bool) and norm > 0
        if not (norm is None or is_norm):
            raise ValueError(f"max_grad_norm={norm!r} must be a positive number: None leaves gradients alone")
        if not isinstance(self.release_grads, bool):
            raise TypeError(f"release_grads={self.release_grads!r} must be True or False")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed={seed!r} must be a whole number: every draw is keyed by it")
        if not isinstance(self.schedule, JaggedSchedule):
            raise TypeError(
                f"schedule={self.schedule!r} must be a JaggedSchedule: JaggedSchedule(1000, outer=...), say"
            )
        if not isinstance(self.prune, pruning.STRATEGIES):
            raise TypeError(f"prune={self.prune!r} must be a strategy: prune.reset(), say")

    def _init_transients(self) -> None:
        """Set what no checkpoint, copy or pickle holds."""
        self._inner = inner.Inner(self._base)
        self._drafts = {}
        self._functionals: WeakSet[FunctionalModel] = WeakSet()
        self._last_lr = []
        self._moved, self._pruned = None, {}
        self._begun = None
        self.grad_norm = None
        self._num_breaks = 0

    def _forget_update(self) -> None:
        """Forget what is known of the last update, and what was begun of the next: the state is another one."""
        self._moved, self._pruned, self._last_lr, self.grad_norm, self._begun = None, {}, [], None, None
        self._num_breaks += 1

    def _update(self, closure: Callable[[], Any] | None) -> Any:
        """Make one update, and what is due before and after it; return what the base returns.

        Without any gradient there is none; where nothing is low-rank that is for the base to say.
        """
        if closure is None and not self._has_gradients and self.selected:
            return None
        weights = list(self._low_rank_weights())
        gradients.check_factors(weights)
        base = self._inner.current(self.param_groups, self.state)
        pointing.point_groups_(self._pointing())
        with gradients.projected(weights):
            pointing.sketch_groups_(self._pointing())
            if self.max_grad_norm is not None:
                parameters = [p for group in base.param_groups for p in group["params"]]
                self.grad_norm = gradients.clip_(parameters, self.max_grad_norm)
            self._last_lr = self._rates()
            self._inner.set_rates(self.param_groups, self._last_lr)
            before = Before(weights, base)
            try:
                result = inner.step(base, closure)
            finally:  # W goes with its factors, also where the base has failed after it moved some
                moving, factors = before.moved()
                move_weights_(moving, factors)
            self._moved = self._measured(moving, factors)
        self._inner.adopt(self.param_groups, self.state)
        self._fix_scales()  # a base may have put an alpha of its own into its groups
        self._tick()
        return result

    def _make_template(self, closure: Callable[[], Any] | None) -> Any:
        """Make the phantom step: the base makes its state, and nothing else changes."""
        base = self._inner.current(self.param_groups, self.state)
        before = [numbers(group) for group in self.param_groups]
        with gradients.projected(list(self._low_rank_weights())):
            self._inner.set_rates(self.param_groups, self._rates())
            result = inner.step(base, closure)
        self._inner.adopt(self.param_groups, self.state)
        self._is_template = True
        self._made_up = [
            {key: old.get(key) for key in changed(old, numbers(group))}
            for group, old in zip(self.param_groups, before, strict=True)
        ]
        if self._fresh is None and self.num_updates > 0:  # a later warm start of all that is trained has just begun
            self._forget_template()
        phantom.forget_(self.state, (s for s in self._selected() if s.slot.name in (self._fresh or ())))
        return result

    def _forget_template(self) -> None:
        """Take back all that the phantom step has made up, in the state and in the groups."""
        phantom.forget_all_(self.state)
        for group, fresh in zip(self.param_groups, self._made_up, strict=False):  # groups may have come since
            for key, value in fresh.items():
                if value is None:
                    group.pop(key, None)
                else:
                    group[key] = value
        self._made_up = []
        self._inner = inner.Inner(self._base)

    def _template(self, resolved: Sequence[ResolvedGroup]) -> Optimizer:
        """Return the base over parameters like those that it will see, for the options that it fills in."""
        names = [[slot.name for slot in group.slots] for group in resolved]
        groups = [group.seen_by_base(is_warm=self.schedule.warm_start > 0) for group in resolved]
        template = inner.template(self._base, groups, names)
        for group in resolved:
            check_foreign_names(group.options, known=template.defaults)
        return template

    def _check_base(self, groups: list[Group]) -> None:
        """Try the base on the low-rank weights of these groups: its state is prunable, and its scale can be matched.

        Weights without numbers yet have their scale matched when they are first needed.
        """
        check_prunable(self._selected(groups), self._base, self._options, self.prune)
        for selected in self._selected(groups):
            if not selected.W.is_meta:
                self._scale(selected)

    def _changed(self) -> None:
        """What is trained has changed: build the base optimizer anew, and tell the functional models."""
        self._inner = inner.Inner(self._base)
        for functional in self._functionals:
            functional.register_phase(self)

    def _restore_models(self) -> None:
        """Undo what a backward pass that failed may have left behind."""
        for functional in self._functionals:
            functional.restore()

    def _num_sketches(self, group: Group) -> int:
        """Return how many sketches point the A's of a group at the start of a cycle."""
        return pointing.NUM_SKETCHES if self.init == "gradient" and group["rank"] else 0

    def _pointing(self) -> list[tuple[Group, list[LowRankState]]]:
        """Return the groups whose A's are still to be pointed, with their weights."""
        groups = [group for number, group in enumerate(self.param_groups) if self._has_factors(number)]
        return [(group, list(self._low_rank_weights([group]))) for group in groups if group["pointing"]]

    def _check_sketches(self, where: str) -> None:
        if self.init == "gradient" and 0 < self.schedule.restart_every <= pointing.NUM_SKETCHES:
            raise ValueError(
                f'restart_every={self.schedule.restart_every} with init="gradient": {where} the first '
                f"{pointing.NUM_SKETCHES} updates of a cycle are sketches, and no low-rank weight would ever move; "
                "lengthen the cycle"
            )

    def _attach(self, *, takes_over: bool) -> None:
        """Hook the low-rank weights whose dense gradients are to be released; leave no other optimizer's hook."""
        if self.release_grads:
            self._check_sketches("with release_grads=True")
            release.attach(self._selected(), self._find_to_release, takes_over=takes_over)
        elif takes_over:
            for selected in self._selected():
                release.detach(selected.W)

    def _find_to_release(self, number: int, place: int) -> LowRankState | None:
        """Return the weight at a place of a group, where it has factors now."""
        if not self._has_factors(number):
            return None
        group = self.param_groups[number]
        selected = Selected(group["params"][place], self._slots[number][place], group, number)
        return LowRankState(selected.W, self._entry(selected), self._scale(selected))

    def _measured(self, weights: Sequence[LowRankState], before: list[Tensor]) -> dict[Tensor, Tensor | float] | None:
        """Return how far the update has moved the weights, whose factors were `before`; None where nobody asks."""
        if not (self.measures_updates and self.is_low_rank):
            return None
        moved = zip(weights, movements(factors_of(weights), before), strict=True)
        norms = {weight.W: product_norm(right, left, weight.scale) for weight, (left, right) in moved}
        return {**dict.fromkeys((selected.W for selected in self._factored()), 0.0), **norms}

    def _rates(self) -> list[Any]:
        """Return the effective rate of every group in the coming update."""
        multiplier = self.lr_multiplier
        return [
            group["lr"] * (multiplier * group["factor_lr"] if self._has_factors(number) else multiplier)
            for number, group in enumerate(self.param_groups)
        ]

    def _tick(self) -> None:
        """Count the update that was made; switch or restart where it is due."""
        for group in self.param_groups:
            group["num_updates"] += 1
        if not any(group["rank"] for group in self.param_groups):
            return
        if self.schedule.changes_after(self.num_updates):
            self._switch()
        elif self.schedule.restarts_after(self.num_updates):
            self.restart()

    def _switch(self) -> None:
        """Begin, pass on or end the warm start: what was trained of the weights concerned goes, all else is left alone.

        Factors go of which W has everything; W's dense state goes, and factors come, which may be still to be pointed.
        """
        ended, begun = self.schedule.turn(self.num_updates), self.schedule.turn(self.num_updates + 1)
        is_restart = ended is not None and ended + self.schedule.warm_start_at > 0  # these had factors before
        self._pruned = {}
        for group in self.param_groups:
            group["last_restart"] = self.num_updates
            group["num_restarts"] += is_restart
        concerned = [
            group for group, turn in zip(self.param_groups, self._turns, strict=True) if turn in (ended, begun)
        ]
        for group in concerned:
            group["pointing"] = self._num_sketches(group)
        weights = list(self._selected(concerned))
        for selected in weights:
            self.state.pop(selected.W, None)
            selected.W.grad = None  # used up: what zeroes the functional model's gradients will not reach it any more
        if begun is not None:
            self._fresh = None  # which was of another moment
        self._make_entries()
        self._changed()
        trained = {s.W: self.state[s.W]["A"] if self._has_factors(s.number) else s.W for s in weights}
        reset_counters_(weights, self._base, self._options, trained)

    def _check_unscaled(self) -> None:
        if getattr(self, "found_inf", None) is not None and self._step_supports_amp_scaling:
            raise RuntimeError(
                "factor gradients of the functional path under a GradScaler, which cannot unscale them: use bfloat16 "
                "autocast without a scaler, or the dense path (loss.backward() through the model itself)"
            )


def _with_own_tensors(group: Group) -> Group:
    """Return a group whose rate, where it is a tensor, is no other group's: one changed in place counts once."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}


def _check_step(closure: object) -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "step() inside the capture of a CUDA graph: updates and restarts are counted in Python, which a replay "
            "does not run; capture forward and backward alone"
        )
    if closure is not None and not callable(closure):
        raise TypeError(f"closure={closure!r} must be callable: it computes the loss and its gradients")


def _without_parameters(options: Group) -> Group:
    return {key: value for key, value in options.items() if key != "params"}
