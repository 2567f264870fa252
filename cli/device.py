"""Where a model computes, and in which precision.

"auto" takes an accelerator where there is one, and bfloat16 where the machine multiplies it in hardware.
"""

from __future__ import annotations

import torch

from .errors import UserError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def find_device(name: str) -> torch.device:
    """Return the device of a name; "auto" takes an accelerator where there is one. Raises UserError where it is not."""
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
            raise UserError(f"device={name!r} is not to be had here: {str(error).splitlines()[0]}") from error
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def available_device(name: str) -> str:
    """Return the name of a run's device; where that is not to be had here, of the one that "auto" takes."""
    kind, _, index = name.partition(":")
    here = torch.accelerator.current_accelerator(check_available=True)
    number = int(index) if index.isdigit() else 0
    is_here = here is not None and here.type == kind and number < torch.accelerator.device_count()
    return name if name in ("auto", "cpu") or is_here else find_device("auto").type


def autocast_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products; "auto" takes bfloat16 where the machine multiplies it in hardware."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has_bf16 = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512" and _cpu_multiplies_bf16()
    return torch.bfloat16 if has_bf16 else torch.float32


def _cpu_multiplies_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
