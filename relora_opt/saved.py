"""An optimizer whose state goes into a checkpoint and comes back: what that holds, and going on from it.

    state_dict        torch's, with the factors in `state`, the clock in `param_groups`, and the names and scales
    load_state_dict   checks before it changes anything; factors in use are overwritten in place
    clock, set_clock  what torch.distributed.checkpoint needs beside its files
    pickles, copies   all but what is rebuilt

What a saved state is, and what is refused, is in state.py and loading.py; what an update does, in optimizer.py.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import release
from .casting import StateDtypes
from .factored import FactoredOptimizer, Group
from .groups import MATCHED
from .loading import (
    check_clock,
    check_layouts,
    check_loadable,
    check_names,
    check_scales,
    loaded,
    saved_scales,
    with_fresh_states,
)
from .state import CLOCK, FORMAT, NAMES, detached, is_low_rank, new_clock


class SavedOptimizer(FactoredOptimizer):
    """The checkpoints of `ReLoRAOptimizer`."""

    _fresh: Collection[str] | None = None  # what set_clock said
    _made_up: Sequence[dict[str, Any]] = ()  # by group: what its numbers were before such a step has changed them
    _is_template = False  # whether the state may be what a phantom step, which is no update, has made up

    def state_dict(self) -> dict[str, Any]:
        """Return the state: factors, the base optimizer's state of them, and the clock, in `param_groups`.

        Beside these, "low_rank" holds the names of the low-rank weights, where there are any, and their scales, for who
        loads it.
        """
        self._restore_models()
        self._check_groups()
        self.state.update(self._drafts)
        try:
            packed = super().state_dict()
        finally:
            for W in self._drafts:  # `state` stays empty until the first update
                del self.state[W]
        entries = packed["state"].items()
        packed["state"] = {key: detached(entry) if is_low_rank(entry) else entry for key, entry in entries}
        scales = {selected.slot.name: self._scale(selected) for selected in self._selected()}
        return {**packed, NAMES: scales} if scales else packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken, bitwise. Factors in use are overwritten in place.

        Dtypes are kept, but for what follows a parameter's own, where that is another one now.

        Raises:
            ValueError: where the state is another optimizer's, of an unknown format, of other weights or ranks, or
                disagrees with its own counters.
        """
        self._restore_models()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        state_dict = with_fresh_states(state_dict, self._selected(), self._fresh or ())
        self._follow_schedule()
        check_loadable(state_dict, self.param_groups, self.schedule, self._turns)
        check_names(state_dict, self.selected)
        check_layouts(state_dict, self._selected())
        self._adopt_scales(saved_scales(state_dict), state_dict["param_groups"])
        if self._drafts:
            self._make_entries()
        live = dict(self.state)
        pre, post = self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()  # called last: what they put here stays
        try:
            super().load_state_dict(state_dict)
        finally:
            self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks = pre, post
        # torch has cast every floating tensor to its parameter's dtype: here the saved ones take their places.
        dtypes = StateDtypes(self._base, self._options)
        for number, (group, saved_group) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=True)):
            for W, index in zip(group["params"], saved_group["params"], strict=True):
                saved = state_dict["state"].get(index)
                if saved is not None:
                    on_device = bool(group.get("fused") or group.get("capturable"))
                    entry = loaded(saved, live.get(W), W, moves_counters=on_device)
                    self.state[W] = dtypes.cast_entry(entry, number, W)
        for group in self.param_groups:
            group.setdefault("pointing", 0)  # of a state saved before there was pointing
            if not any(is_low_rank(self.state.get(W)) for W in group["params"]):
                group["pointing"] = self._num_sketches(group)  # factors to come are drawn by this optimizer's init
            group["relora_format"] = FORMAT
        self._fix_scales()
        for factor in self._all_factors():
            factor.grad = None  # as at a restart: it belongs to the A before
        for W, *_ in self._selected():
            W.grad = W.grad if release.is_dense(W.grad) else None
        self._is_template = self.num_updates == 0
        self._forget_update()
        self._changed()
        for loaded_hook in post.values():
            loaded_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_functionals"):  # a copy; load_state_dict comes through here too
            self._init_transients()
            self._attach(takes_over=True)

    @property
    def clock(self) -> dict[str, Any]:
        """The counters, and what else a template of the state is made by: for `set_clock`.

        `fresh` lists the low-rank weights of which, or of whose factors, the base holds no state, and `scales` has the
        scales that are matched. Plain numbers and strings, to be kept beside the files of torch.distributed.checkpoint.
        """
        is_known = self.is_low_rank or self.num_updates > 0  # in a warm start, from its first update on
        fresh = [s.slot.name for s in self._selected() if is_known and not self._holds_state(s.W)]
        if self._fresh is not None and not self.state:  # nothing is loaded yet
            fresh = [*self._fresh]
        counters: dict[str, Any] = {name: self.param_groups[0][name] for name in CLOCK}
        scales = {s.slot.name: self._scale(s) for s in self._selected() if s.group["scale"] == MATCHED}
        return {**counters, "fresh": fresh, "scales": scales}

    def set_clock(
        self,
        *,
        num_updates: int,
        num_restarts: int,
        last_restart: int,
        fresh: Sequence[str] | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        """Set the counters of a fresh optimizer, so that its state takes the form it has at that update.

        `load_state_dict` sets them by itself; torch.distributed.checkpoint, which needs a template of the state
        first, is what this is for: keep `clock` beside its files, and give it back as `set_clock(**clock)`.

        Args:
            fresh: the names of the low-rank weights of which, or of whose factors, the base holds no state; left out,
                those that have switched between full and low rank after this very update, or all before the first one.
            scales: the matched scales by the names of weights; left out, those that this optimizer finds.

        Raises:
            ValueError: where the optimizer holds state already, the counters are impossible, or a matched scale is
                another one here.
        """
        if self.state:
            raise ValueError("set_clock on an optimizer that has made updates: construct a fresh one")
        self._follow_schedule()
        check_clock(num_updates, num_restarts, last_restart, fresh)
        if fresh is None:
            turns = self.schedule.turn(num_updates), self.schedule.turn(num_updates + 1)
            changed = turns if self.schedule.changes_after(num_updates) else ()
            fresh = [s.slot.name for s in self._selected() if not num_updates or self._turns[s.number] in changed]
        scales = dict(scales or {})
        unknown = sorted({*fresh, *scales} - {*self.selected})
        if unknown:
            raise ValueError(f"fresh, scales: {unknown} are no low-rank weights of this optimizer: construct it alike")
        check_scales(scales)
        self._adopt_scales(scales, self.param_groups)
        for group in self.param_groups:
            group.update(num_updates=num_updates, num_restarts=num_restarts, last_restart=last_restart)
        self._fresh = fresh
        self._drafts.clear()
        self._changed()

    def _holds_state(self, W: Tensor) -> bool:
        """Say whether the base holds state of a low-rank weight, or of its factors."""
        entry = self.state.get(W, {})
        return bool(entry.get("A_state") or entry.get("B_state") if is_low_rank(entry) else entry)

    def _clock(self) -> dict[str, int]:
        return {**new_clock(), **{name: self.param_groups[0][name] for name in CLOCK}}

    @abstractmethod
    def _init_transients(self) -> None:
        """Set what no checkpoint, copy or pickle holds."""

    @abstractmethod
    def _forget_update(self) -> None:
        """Forget what is known of the last update, and what was begun of the next: the state is another one."""

    @abstractmethod
    def _restore_models(self) -> None:
        """Undo what a backward pass that failed may have left behind."""

    @abstractmethod
    def _num_sketches(self, group: Group) -> int:
        """Return how many sketches point the A's of a group at the start of a cycle."""

    @abstractmethod
    def _attach(self, *, takes_over: bool) -> None:
        """Hook the low-rank weights whose dense gradients are to be released; leave no other optimizer's hook."""


_OWN = (
    "schedule",
    "_followed",
    "init",
    "prune",
    "max_grad_norm",
    "release_grads",
    "seed",
    "measures_updates",
    "_low_rank",
    "_base",
    "_slots",
    "_turns",
    "_parts",
    "_options",
    "_scales",
    "_with_alpha",
    "_matched",
    "_fresh",
    "_is_template",
    "_made_up",
    "_passes_closure",
)
