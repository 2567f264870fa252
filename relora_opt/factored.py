"""An optimizer of whose parameters some have factors: which these are, their scales, and where their state lives.

    param_groups    each with rank, scale and clock, beside the base optimizer's options
    _slots          what is known of every parameter beside its tensor, in the order of the groups
    _turns          in which turn of the warm start a group is at full rank, where it has a rank
    _parts          how many groups before it are parts of the same one, split by turns
    state[W]        A, B and what the base knows of them (state.py), from the first update of the low-rank phase on
    _drafts[W]      the same before that update, so that `state` stays empty until there is something to save

This file makes no update, and does not know schedules but for the warm start.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import inner
from .factors import draw_a, draw_generator, matrix_shape, product
from .groups import MATCHED, LowRank, Selected, Slot
from .matched import check_scale, matched_scale, trial_shape
from .schedule import JaggedSchedule
from .state import Entry, LowRankState, add_master_, check_fits, exact_weight, is_low_rank, new_entry

Group = dict[str, Any]


class FactoredOptimizer(Optimizer):
    """What `ReLoRAOptimizer` knows of its weights; it sets these attributes before its groups are added."""

    schedule: JaggedSchedule
    _followed: JaggedSchedule  # by which it is known who has factors
    init: str
    seed: int
    _base: inner.Base
    _low_rank: LowRank
    _slots: list[list[Slot]]
    _turns: list[int]
    _parts: list[int]
    _options: list[Group]  # of every group as they were first given, without parameters
    _scales: list[Any]  # of every group
    _with_alpha: list[bool]  # whether the base keeps an alpha in the group
    _matched: dict[tuple[int, int, int], float]  # scales found so far, by (group, m, n)
    _drafts: dict[Tensor, Entry]

    @property
    def num_updates(self) -> int:
        """How many updates were applied; skipped ones do not count, nor steps without any gradient."""
        return int(self.param_groups[0]["num_updates"])

    @property
    def num_restarts(self) -> int:
        """How many restarts there were; the switch to low rank is one where there was low rank before."""
        return int(self.param_groups[0]["num_restarts"])

    @property
    def is_low_rank(self) -> bool:
        """Whether the next update is low-rank, of some weights at least: the warm start may be others' turn."""
        return any(map(self._has_factors, range(len(self.param_groups))))

    @property
    def selected(self) -> list[str]:
        """The names of the low-rank weights, in the order of the groups."""
        return [
            slot.name
            for group, slots in zip(self.param_groups, self._slots, strict=True)
            if group["rank"]
            for slot in slots
        ]

    def parameters(self) -> Iterator[Tensor]:
        """Yield the model's parameters in all groups."""
        return (p for group in self.param_groups for p in group["params"])

    def factors(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Return the live factors (A, B) of a low-rank weight: (r, n) and (m, r), or batches of them.

        While A is being pointed (init "gradient", at the start of a cycle) they hold what the sketches are made with.

        Raises:
            KeyError: where the parameter is not low-rank. ValueError: in a warm start.
        """
        selected = self._find(parameter)
        if not self._has_factors(selected.number):
            switch = self.schedule.warm_start_at + (self._turns[selected.number] + 1) * self.schedule.warm_start
            raise ValueError(f"{selected.slot.name} has no factors until the switch, update {switch}")
        entry = self._entry(selected)
        return entry["A"], entry["B"]

    def scale(self, parameter: Tensor) -> float:
        """Return the scale s of a low-rank weight.

        Raises:
            KeyError: where the parameter is not low-rank.
        """
        return self._scale(self._find(parameter))

    @torch.no_grad()
    def frozen_weight(self, parameter: Tensor) -> Tensor:
        """Return W - s B A in W's shape and dtype: what module-style LoRA calls the frozen weight."""
        A, B = self.factors(parameter)
        selected = self._find(parameter)
        if selected.group["pointing"]:
            return parameter.detach().clone()
        W = exact_weight(parameter, self.state.get(parameter))
        return (W - product(A, B, self._scale(selected)).view(W.shape)).to(parameter.dtype)

    def _selected(self, groups: Iterable[Group] | None = None) -> Iterator[Selected]:
        """Yield the low-rank weights of all groups, or of these."""
        wanted = {id(group) for group in (self.param_groups if groups is None else groups)}
        for number, (group, slots) in enumerate(zip(self.param_groups, self._slots, strict=True)):
            if group["rank"] and id(group) in wanted:
                yield from (Selected(W, slot, group, number) for W, slot in zip(group["params"], slots, strict=True))

    def _has_factors(self, number: int) -> bool:
        """Say whether the next update moves the factors of a group's weights, and not these themselves."""
        turn = self.schedule.turn(self.num_updates + 1)
        return bool(self.param_groups[number]["rank"]) and turn != self._turns[number]

    def _factored(self) -> Iterator[Selected]:
        """Yield the selected weights whose factors the next update moves."""
        return self._selected([group for number, group in enumerate(self.param_groups) if self._has_factors(number)])

    def _find(self, parameter: Tensor) -> Selected:
        for selected in self._selected():
            if selected.W is parameter:
                return selected
        what = f"the parameter of shape {tuple(parameter.shape)}" if isinstance(parameter, Tensor) else repr(parameter)
        raise KeyError(f"{what} is not low-rank in this optimizer: give one of model's weights in .selected")

    def _scale(self, selected: Selected) -> float:
        """Return s of a weight; where it is matched, it is found once for every shape, from the options first given."""
        if selected.group["scale"] != MATCHED:
            return float(selected.group["scale"])
        return self._matched_scale(selected)

    def _matched_scale(self, selected: Selected) -> float:
        W, _, group, number = selected
        key = _, m, n = self._matched_key(selected)
        if key not in self._matched:
            like = torch.empty(0, dtype=torch.float32, device="cpu" if W.is_meta else W.device)
            *shape, rank = trial_shape(m, n, group["rank"])
            A = draw_a(tuple(shape), rank, init=self.init, generator=draw_generator(0, "", 0), like=like)
            self._matched[key] = matched_scale(self._base, self._options, number, A, num_rows=shape[0])
        return self._matched[key]

    def _matched_key(self, selected: Selected) -> tuple[int, int, int]:
        m, n = matrix_shape(selected.W, is_batch=selected.slot.is_batch)[-2:]
        return selected.number - self._parts[selected.number], m, n  # the parts of a group have the same options

    def _fix_scales(self) -> None:
        self._scales = [group["scale"] for group in self.param_groups]
        self._with_alpha = ["alpha" in group for group in self.param_groups]

    def _check_groups(self) -> None:
        """Refuse groups whose rank, scale, alpha or number of parameters somebody has changed, to no or a wrong effect.

        And a schedule that somebody has put in the place of another, which has other weights at full rank now.

        Raises:
            ValueError: names the group, both values and the remedy.
        """
        self._follow_schedule()
        if len(self.param_groups) != len(self._slots):
            raise ValueError(
                f"param_groups holds {len(self.param_groups)} groups now, and was made of {len(self._slots)}: add one "
                "by add_param_group, freeze what is not to be trained, or construct a new optimizer"
            )
        for number, (group, slots) in enumerate(zip(self.param_groups, self._slots, strict=True)):
            given = {"rank": self._options[number]["rank"], "scale": self._scales[number], "params": len(slots)}
            for name, value in given.items():
                now = len(group["params"]) if name == "params" else group[name]
                if now != value:
                    raise ValueError(
                        f"param_groups[{number}] has {name} {now} now, and was made with {value}: that is fixed; "
                        "freeze what is not to be trained, or construct a new optimizer"
                    )
            if "alpha" in group and not self._with_alpha[number]:
                raise ValueError(
                    f"param_groups[{number}] has alpha {group['alpha']} now, which nobody reads there: the scale is "
                    "fixed when a group is made; take it out, or construct a new optimizer with it"
                )

    def _follow_schedule(self) -> None:
        given, followed, coming = self.schedule, self._followed, self.num_updates + 1
        if given is followed:
            return
        if not isinstance(given, JaggedSchedule):
            raise TypeError(f"schedule={given!r} must be a JaggedSchedule: JaggedSchedule(1000), say")
        has_other_turns = given.warm_start_turns != followed.warm_start_turns
        is_other_turn = given.turn(coming) != followed.turn(coming)
        if self.selected and (has_other_turns or (is_other_turn and self.state)):
            raise ValueError(
                f"optimizer.schedule was replaced before update {coming} by one of {given.place}, where that of "
                f"{followed.place} has other weights at full rank then: replace it by one that has the same turns, and "
                "this update in the same one, or load the state into a new optimizer"
            )
        self._followed = given
        if is_other_turn:  # before anything was trained
            self._drafts.clear()
            self._changed()

    def _adopt_scales(self, saved: dict[str, float], groups: list[Group]) -> None:
        """Take the scales of weights in saved groups that are matched, to the last digit.

        Raises:
            ValueError: where this optimizer's are matched too, and it finds others; names the first such weight.
        """
        scales = {}
        for selected in self._selected():
            name, number = selected.slot.name, selected.number
            if groups[number]["scale"] == MATCHED and name in saved:
                if self._options[number]["scale"] == MATCHED:
                    check_scale(name, saved[name], self._matched_scale(selected))
                scales[self._matched_key(selected)] = float(saved[name])
        self._matched.update(scales)

    def _low_rank_weights(self, groups: Iterable[Group] | None = None) -> Iterator[LowRankState]:
        """Yield the selected weights, of all groups or of these, that have factors."""
        for selected in self._selected(groups):
            entry = self.state.get(selected.W)
            if is_low_rank(entry):
                yield LowRankState(selected.W, entry, self._scale(selected))

    def _entry(self, selected: Selected) -> Entry:
        """Return a weight's low-rank state; before the first step a draft, so that `state` stays empty."""
        W, slot, group, _ = selected
        entry = self._known_entry(W)
        if entry is None:
            with torch.inference_mode(False):  # where somebody looks at them first, to train them later
                entry = new_entry(W, slot, group["rank"], init=self.init, seed=self.seed, restart=self.num_restarts)
            self._drafts[W] = entry
        return entry

    def _holds(self, parameter: Tensor, A: Tensor, B: Tensor) -> bool:
        """Say whether these are the live factors of a weight, and not those of a state that was cleared since."""
        entry = self._known_entry(parameter)
        return entry is not None and entry["A"] is A and entry["B"] is B

    def _known_entry(self, W: Tensor) -> Entry | None:
        """Return a weight's low-rank state or its draft, if any; who looks into `state`, a defaultdict, fills it."""
        entry = self.state.get(W)
        return entry if is_low_rank(entry) else self._drafts.get(W)

    def _make_entries(self) -> None:
        """Give every low-rank weight its state, where the phase has it."""
        is_news = False
        for selected in self._factored():
            is_news |= not is_low_rank(self.state.get(selected.W)) and selected.W not in self._drafts
            self.state[selected.W] = entry = self._entry(selected)
            add_master_(entry, selected.W)
            check_fits(selected.W, entry, selected.slot.name)
        self._drafts.clear()
        if is_news:
            self._changed()

    @property
    def _has_gradients(self) -> bool:
        """Whether a parameter or a factor has a gradient."""
        return any(p.grad is not None for p in (*self.parameters(), *self._all_factors()))

    def _all_factors(self) -> Iterator[Tensor]:
        for entry in (*self.state.values(), *self._drafts.values()):
            if is_low_rank(entry):
                yield from (entry["A"], entry["B"])

    @abstractmethod
    def _changed(self) -> None:
        """What is trained has changed."""
