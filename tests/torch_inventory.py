"""PyTorch's own inventory of its optimizers: every class with the list of inputs on which torch itself tests it.

It is private to torch's test suite (torch.testing._internal.common_optimizers), so this is the one place that reads it.
Importing it has effects, which are undone here: it chooses a profile for Hypothesis and writes into the environment.
"""

import os
import sys
import unittest
import warnings
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import hypothesis
import torch


class Case(NamedTuple):
    """One optimizer with one of torch's inputs for it, and one of its implementations ("" is torch's choice)."""

    optimizer: type[torch.optim.Optimizer]
    options: dict[str, Any]
    description: str
    implementation: str

    def __str__(self) -> str:
        return " ".join(filter(None, (self.optimizer.__name__, self.implementation, self.description)))


def _read() -> list[Any]:
    environment, profile = dict(os.environ), hypothesis.settings.get_current_profile_name()
    needs_stand_in = find_spec("expecttest") is None
    if needs_stand_in:  # torch's test utilities subclass its TestCase; the inventory does not use it
        sys.modules["expecttest"] = stand_in = ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.testing._internal.common_optimizers import optim_db
    finally:
        if needs_stand_in:
            del sys.modules["expecttest"]
        hypothesis.settings.load_profile(profile)
        os.environ.clear()
        os.environ.update(environment)
    return list(optim_db)


_INFOS = {info.optim_cls: info for info in _read()}


def optimizers() -> list[type[torch.optim.Optimizer]]:
    """Return every optimizer of torch."""
    return list(_INFOS)


def supports(optimizer: type[torch.optim.Optimizer], implementation: str) -> bool:
    """Say whether an optimizer has "foreach", "fused" or "differentiable"."""
    return implementation in _INFOS[optimizer].supported_impls


def cases() -> list[Case]:
    """Return every optimizer with every input of torch's, in all implementations that run on a CPU."""
    found = []
    for optimizer, info in _INFOS.items():
        for given in info.optim_inputs_func(device="cpu"):
            for implementation in ("", "foreach", "fused"):
                if not implementation or supports(optimizer, implementation):
                    flags = {implementation: True} if implementation else {}
                    found.append(Case(optimizer, {**given.kwargs, **flags}, given.desc, implementation))
    return found


def bad_options() -> list[tuple[type[torch.optim.Optimizer], dict[str, Any], str]]:
    """Return options that torch's constructors refuse, with what they say."""
    found = []
    for optimizer, info in _INFOS.items():
        for bad in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
            given = bad.optimizer_error_input
            if bad.error_on.name == "CONSTRUCTION_ERROR" and given.kwargs and not isinstance(given.params, dict):
                found.append((optimizer, given.kwargs, bad.error_regex))
    return found
