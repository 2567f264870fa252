"""Where an optimizer's parameters sit in a model, and whether they still do when it is called again."""

from __future__ import annotations

from collections.abc import Iterable
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

    @property
    def scale(self) -> float:
        return float(self.digits)

    @property
    def traced_path(self) -> str:
        """The path that torch.compile sees: it looks through what it has compiled already."""
        return ".".join(part for part in self.path.split(".") if part != "_orig_mod")


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


def check_hooks(places: Iterable[Place], model: nn.Module) -> None:
    """Refuse gradient hooks on low-rank weights, which would never be called."""
    for place in places:
        if place.W._backward_hooks:
            raise RuntimeError(
                f"{_path(model, place.module, place.name)} has a gradient hook, which the functional path would never "
                "call, for it forms no dense gradient: remove the hook, or use the dense path (loss.backward() through "
                "the model, then optimizer.step())"
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
