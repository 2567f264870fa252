"""The base optimizer inside: built over factors and dense parameters, and stepped without its hooks.

    Base          what the user gave, class or factory, with its keyword arguments: groups -> Optimizer
    Inner         the base optimizer over factors and dense parameters, whose state lives in the outer optimizer's
    step          one update of a base optimizer that fires no step hook (the outer optimizer's fire once)
    used_state    what a base keeps of a tensor after an update, found by trying it

This file does not know clocks or models.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .state import OPTIONS, is_low_rank

Group = dict[str, Any]
State = dict[str, Any]

_OWN = frozenset(OPTIONS)


@dataclass(frozen=True)
class Base:
    """A base optimizer to be: `factory(groups, **options)`."""

    factory: Callable[..., Optimizer]
    options: dict[str, Any]

    def __post_init__(self) -> None:
        if isinstance(self.factory, Optimizer):
            name = type(self.factory).__name__
            raise TypeError(f"base is an instance of {name}: pass the class itself, with its arguments by keyword")
        if not callable(self.factory) or (isinstance(self.factory, type) and not issubclass(self.factory, Optimizer)):
            raise TypeError(f"base={self.factory!r} must be an optimizer class or a factory: torch.optim.AdamW, say")
        if not _takes_groups(self.factory):
            raise TypeError(
                f"base={self.name} takes no groups of parameters: call it, if it makes a base: muon_beside_adamw(), say"
            )
        if "lr" in self.options:
            _check_is_rate(self.options["lr"])

    @property
    def kind(self) -> object:
        """The optimizer's class, where the factory shows it."""
        return self.factory.func if isinstance(self.factory, partial) else self.factory

    @property
    def name(self) -> str:
        return getattr(self.kind, "__name__", repr(self.kind))

    @property
    def with_own_alpha(self) -> str:
        """The name of the optimizer's class, where it takes an `alpha` that `functools.partial` has not bound."""
        bound = self.factory.keywords if isinstance(self.factory, partial) else {}
        signature = _signature(self.kind)
        if signature is None or "alpha" not in signature.parameters or "alpha" in bound:
            return ""
        return f"torch.optim.{self.name}" if hasattr(torch.optim, self.name) else self.name

    def build(self, groups: list[Group]) -> Optimizer:
        """Return the base optimizer over these groups, one of its groups for each of them.

        Raises:
            TypeError: where the factory returns something else, or a learning rate is no number.
            ValueError: where it rearranges the groups, has no usable learning rate or is to be differentiated through.
        """
        for group in groups:
            if "lr" in group:
                _check_rate(group["lr"])
        optimizer = self.factory([_shown(group) for group in groups], **self.options)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"base gave a {type(optimizer).__name__}: it must return a torch.optim.Optimizer")
        if [_ids(group) for group in optimizer.param_groups] != [_ids(group) for group in groups]:
            raise ValueError(
                f"{type(optimizer).__name__} rearranged its groups: a base must keep them as they are given"
            )
        for group in optimizer.param_groups:
            _check_rate(group.get("lr"))
            if group.get("differentiable"):
                raise ValueError(
                    "differentiable=True is not supported: the update of W is made in place, outside autograd"
                )
        return optimizer


def template(base: Base, groups: list[Group], names: list[list[str]]) -> Optimizer:
    """Return the base over a user's groups, for the options that it fills in.

    Raises:
        ValueError: where it takes matrices alone, as Muon does: names the first parameter that is none; and where
            something of it would be lost.
    """
    try:
        optimizer = base.build(groups)
    except ValueError as error:
        if "2D parameters" in str(error):
            for group, p, name in _named(groups, names):
                if p.dim() != 2 and _refuses(base, {**group, "params": [p]}):
                    remedy = "leave it out of targets" if group["rank"] else "muon_beside_adamw() trains it by AdamW"
                    raise ValueError(
                        f"{name} {tuple(p.shape)} is no matrix, and {base.name} takes nothing else: {remedy}"
                    ) from error
        raise
    _check_is_plain(optimizer)
    return optimizer


def _check_is_plain(optimizer: Optimizer) -> None:
    """Refuse a base of which something would be lost: state that is no parameter's, hooks, a `step` of its own."""
    name = type(optimizer).__name__
    added = {key for group in optimizer.param_groups for key in group} - {"rank"}
    shared = sorted(_OWN & (optimizer.defaults.keys() | added))
    if shared:
        raise ValueError(
            f"{name} keeps {', '.join(shared)} in its groups, where {'they are' if shared[1:] else 'that is'} "
            "ReLoRAOptimizer's own: use it alone, or give another base"
        )
    hidden = sorted(str(key) for key in optimizer.state_dict().keys() - {"state", "param_groups"})
    if hidden:
        raise ValueError(
            f"{name} keeps {', '.join(hidden)} beside the state of its parameters, which would be neither saved nor "
            "reset: give a base whose state_dict() holds state and param_groups alone"
        )
    hooks = (*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values())
    if hooks or "step" in vars(optimizer):
        raise ValueError(
            f"base gave a {name} with step hooks, or a step that was replaced (by a scheduler, say), which would never "
            "be called: give them to ReLoRAOptimizer"
        )


def _named(groups: list[Group], names: list[list[str]]) -> Iterator[tuple[Group, Tensor, str]]:
    for group, own in zip(groups, names, strict=True):
        for p, name in zip(group["params"], own, strict=True):
            yield group, p, name


def _refuses(base: Base, group: Group) -> bool:
    try:
        base.build([group])
    except ValueError:
        return True
    return False


def _check_is_rate(lr: object) -> None:
    if isinstance(lr, bool) or not isinstance(lr, (Real, Tensor)):
        raise TypeError(f"lr={lr!r} must be a number, or a tensor of one")


def _check_rate(lr: Any) -> None:
    _check_is_rate(lr)
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise TypeError(f"lr of shape {tuple(lr.shape)} must be a number, or a tensor of one")
    if not math.isfinite(float(lr)):
        raise ValueError(f"lr={lr} must be a finite number: the schedule multiplies it")


def _takes_groups(factory: Callable[..., Any]) -> bool:
    """Say whether a factory can be called with groups; of what shows no signature, that is assumed."""
    signature = _signature(factory)
    return signature is None or any(
        parameter.kind not in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD)
        for parameter in signature.parameters.values()
    )


def _signature(factory: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(factory)
    except (TypeError, ValueError):  # of some that are written in C
        return None


_WORKS_ALONE: dict[type[Optimizer], str] = {
    torch.optim.LBFGS: "evaluates its closure many times an update",
    torch.optim.SparseAdam: "takes sparse gradients, and those of factors are dense",
}


def check_alone(kind: object, *, is_alone: bool) -> None:
    """Refuse a class of optimizer that needs the parameters to itself where there are factors, or clipping.

    Raises:
        ValueError: says why.
    """
    for needy, why in _WORKS_ALONE.items():
        if not is_alone and isinstance(kind, type) and issubclass(kind, needy):
            raise ValueError(f"{needy.__name__} {why}: it works with rank=0 and max_grad_norm=None only")


class Inner:
    """The base optimizer over factors and dense parameters, with one group for each of the outer optimizer's.

    It works on the very dictionaries that the outer optimizer's `state` holds: they are linked, not copied.
    """

    def __init__(self, base: Base) -> None:
        self._base = base
        self._optimizer: Optimizer | None = None
        self._key: list[int] = []
        self._rates: list[Any] = []
        self._has_adopted = False

    def current(self, groups: list[Group], state: Any) -> Optimizer:
        """Return the base optimizer, built anew where its parameters or the state that it is linked to have changed."""
        lists = [list(_trained(group, state)) for group in groups]
        key = [id(p) for parameters in lists for p in parameters]
        if self._optimizer is None or key != self._key or not self._is_linked(groups, state):
            own = [{**group, "params": parameters} for group, parameters in zip(groups, lists, strict=True)]
            self._optimizer, self._key, self._has_adopted = self._base.build(own), key, False
            for holder, name, parameter in _links(groups, state):
                if holder.get(name):
                    self._optimizer.state[parameter] = holder[name]
            self._optimizer.state.update(_of_no_parameter(state))
        return self._optimizer

    def set_rates(self, groups: list[Group], rates: list[Any]) -> None:
        """Copy the outer groups' options into the base's, with these effective rates."""
        assert self._optimizer is not None
        self._rates = rates
        for group, own, rate in zip(groups, self._optimizer.param_groups, rates, strict=True):
            for counter in own.keys() - group.keys() if self._has_adopted else ():  # which a restart has taken away
                del own[counter]
            own.update({key: value for key, value in _shown(group).items() if key != "params"}, lr=rate)

    def adopt(self, groups: list[Group], state: Any) -> None:
        """Hold in `state` and `groups` what the base holds: it may have made state, or counted in its groups."""
        assert self._optimizer is not None
        for holder, name, parameter in _links(groups, state):
            holder[name] = self._optimizer.state[parameter]
        state.update(_of_no_parameter(self._optimizer.state))
        for group, own, rate in zip(groups, self._optimizer.param_groups, self._rates, strict=True):
            group.update({key: value for key, value in own.items() if key not in ("params", "lr", *_OWN)})
            if isinstance(rate, float) and 0 <= own["lr"] < rate:  # the base lowers its rate by itself
                group["lr"] *= own["lr"] / rate
        self._has_adopted = True

    def _is_linked(self, groups: list[Group], state: Any) -> bool:
        """Say whether nobody has replaced or cleared the outer state since it was adopted."""
        assert self._optimizer is not None
        own = self._optimizer.state
        return not self._has_adopted or all(h.get(name) is own.get(p) for h, name, p in _links(groups, state))


def step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
    """Run one update without the profiling wrapper that torch puts around `step`, which fires the global hooks."""
    function = inspect.unwrap(type(optimizer).step, stop=lambda wrapper: not getattr(wrapper, "hooked", False))
    return function(optimizer) if closure is None else function(optimizer, closure)


def used_state(base: Base, group: Group, like: Tensor) -> State:
    """Return what a base keeps of a tensor like this one, on its device, after one update; the base may draw for it."""
    scratch = torch.zeros_like(like)
    devices = [] if like.device.type == "cpu" else [like.device]
    with torch.random.fork_rng(devices, device_type=like.device.type):
        optimizer = base.build([{**group, "params": [scratch], "lr": 0.01}])
        scratch.grad = torch.ones_like(scratch)
        step(optimizer)
    return dict(optimizer.state[scratch])


def _trained(group: Group, state: Any) -> Iterator[Tensor]:
    """Yield what the base trains of an outer group: the factors of low-rank weights, and the other parameters."""
    for p in group["params"]:
        entry = state.get(p)
        yield from (entry["A"], entry["B"]) if is_low_rank(entry) else (p,)


def _links(groups: list[Group], state: Any) -> Iterator[tuple[Any, Any, Tensor]]:
    """Yield where the base's state of every trained tensor lives: holder[name]."""
    for p in (p for group in groups for p in group["params"]):
        entry = state.get(p)
        if is_low_rank(entry):
            yield entry, "A_state", entry["A"]
            yield entry, "B_state", entry["B"]
        else:
            yield state, p, p


def _shown(group: Group) -> Group:
    """Return what a base sees of a group: its rank, by which a factory may tell factors, and what is not ours."""
    return {key: value for key, value in group.items() if key == "rank" or key not in _OWN}


def _of_no_parameter(state: Any) -> dict[Any, Any]:
    """Return what an optimizer keeps under other keys than parameters: torch saves and loads it as it is."""
    return {key: value for key, value in state.items() if not isinstance(key, Tensor)}


def _ids(group: Group) -> list[int]:
    return [id(parameter) for parameter in group["params"]]
