"""Where an optimizer's parameters sit in a model, and whether they still do when it is called again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .weight import LowRankWeight


class Place(NamedTuple):
    """Where a selected weight sits: `module._parameters[name]`, reached by `path`, trained through factors `key`."""

    module: nn.Module
    name: str
    path: str
    W: Tensor
    key: str
    digits: str  # of s: a number that differs from an earlier model's, torch.compile would make a variable, and fail
    traced_path: str  # that torch.compile sees

    @property
    def scale(self) -> float:
        return float(self.digits)


class Held(NamedTuple):
    """A parameter of the optimizer's in the model."""

    module: nn.Module
    name: str
    W: Tensor
    was_trained: bool


class Around(nn.Module):
    """A module of this project around the caller's model, which messages are about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training


def structure(model: nn.Module) -> list[Any]:
    """Return every module, each followed by its children and their names: equal lists mean that nothing has moved."""
    built: list[Any] = []
    modules, seen = [model], {model}
    for module in modules:  # which grow meanwhile
        built.append(module)
        for item in module._modules.items():
            built.append(item)
            if item[1] is not None and item[1] not in seen:
                seen.add(item[1])
                modules.append(item[1])
    return built


def traced_paths(model: nn.Module) -> dict[str, str]:
    """Return by the path of every module the one that torch.compile sees: it looks through what it has compiled."""
    modules, seen = dict(model.named_modules()), {"": ""}
    for path in list(modules)[1:]:  # parents first
        parent, _, name = path.rpartition(".")
        is_inside = name == "_orig_mod" and _is_compiled(modules[parent])
        seen[path] = seen[parent] if is_inside else f"{seen[parent]}.{name}".lstrip(".")
    return seen


def _is_compiled(module: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # where nobody has imported it, nothing is compiled
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def check_held(held: Iterable[Held], model: nn.Module) -> None:
    """Refuse a model in which somebody has replaced a parameter: the old one would be trained, to no effect."""
    for module, name, parameter, _ in held:
        current = parameters[name] if name in (parameters := module._parameters) else None  # of a script, no dict
        if current is not parameter and not isinstance(current, LowRankWeight):
            raise RuntimeError(
                f"{_path(model, module, name)} is no longer the parameter that the optimizer trains: "
                "let what replaces parameters (Accelerate's prepare, fully_shard, load_state_dict(assign=True)) "
                "come first, then the optimizer, then functional() or make_step()"
            )


def check_hooks(places: Iterable[Place], model: nn.Module, has_hook: Callable[[Tensor], bool]) -> None:
    """Refuse gradient hooks on low-rank weights, which would never be called."""
    for place in places:
        if has_hook(place.W):
            raise RuntimeError(
                f"{_path(model, place.module, place.name)} has a gradient hook, which the functional path would never "
                "call, for it forms no dense gradient: remove the hook, or use the dense path (loss.backward() through "
                "the model, then optimizer.step())"
            )


def check_factors(places: Iterable[Place], factors: Iterable[tuple[Tensor, Tensor, Tensor]], model: nn.Module) -> None:
    """Refuse weights both of whose factors were frozen, where others train: what unfreezes the model missed them."""
    for place, (_, A, B) in zip(places, factors, strict=True):
        if not (A.requires_grad or B.requires_grad):
            raise RuntimeError(
                f"{_path(model, place.module, place.name)} is to be trained, but both of its factors were frozen: "
                "unfreeze by the functional model's requires_grad_(True) what was frozen by it, or freeze the model's "
                "own weight"
            )


def check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} must be the nn.Module that the optimizer trains")


def _path(model: nn.Module, module: nn.Module, name: str) -> str:
    """Return where the caller's model has a parameter; its bare name where it no longer has."""
    paths = {id(each): f"{path}.{name}" for path, each in unwrapped(model).named_modules()}
    return paths.get(id(module), name).lstrip(".")


def unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(model, Around):
        model = model.model
    return model


def key_of(name: str) -> str:
    """Return a parameter's key: one that neither ParameterDict nor Module has as an attribute."""
    return "/" + name.replace(".", "/")
