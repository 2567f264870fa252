"""What torch's compiler leaves in its cache when it is killed: a library that was cut while it was written.

Whoever compiles the same later loads it and fails, every time (torch 2.13: it is linked in place).
"""

from __future__ import annotations

import os
from pathlib import Path


def drop_cut_library(error: BaseException, dropped: set[Path]) -> bool:
    """Delete the library in the compiler's cache that could not be loaded; return whether there is one to make anew.

    Args:
        error: what the compiler raised.
        dropped: the libraries that were deleted for this call already, to which this one is added: one that cannot be
            loaded when it is new was not cut.
    """
    cause, folder = getattr(error, "inner_exception", error), os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not (isinstance(cause, OSError | ImportError) and folder):
        return False
    path = Path(getattr(cause, "path", None) or str(cause).partition(":")[0])
    if path in dropped or not (path.is_relative_to(folder) and path.suffix == ".so" and path.is_file()):
        return False
    dropped.add(path)
    path.unlink()
    return True
