"""The state of every library's random numbers, as plain values and tensors.

Training itself draws from generators of its own, keyed by seed, name and number; this is for what else may draw.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators, the accelerator's included where there is one."""
    name, keys, *position = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *position),
        "torch": torch.get_rng_state(),
    }
    accelerator = _accelerator()
    return state if accelerator is None else {**state, accelerator.type: _module(accelerator).get_rng_state().cpu()}


def set_random_state(state: dict[str, Any]) -> None:
    """Set what `random_state` returned; an accelerator that is not here, or was not there, is left alone.

    Raises:
        ValueError, TypeError, KeyError, RuntimeError: for states that these generators do not have.
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    accelerator = _accelerator()
    if accelerator is not None and accelerator.type in state:
        _module(accelerator).set_rng_state(state[accelerator.type])


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator(check_available=True)


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)
