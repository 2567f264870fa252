"""A run's options as a TOML file: what `--config` reads, and the config.toml that a run folder keeps."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from .config import FIELDS, Config, Options
from .errors import UserError
from .resolution import check_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MOST_BYTES = 1 << 20


def load_config_file(path: str | Path) -> Options:
    """Read a flat TOML file of options.

    Raises:
        UserError: for a missing file, bad TOML, or a key that is no option.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MOST_BYTES:
                raise UserError(f"config={str(path)!r} has {size:,} bytes, more than options take: give a TOML file")
            options = tomllib.load(file)
    except OSError as error:
        raise UserError(f"config={str(path)!r} cannot be read: {error.strerror}; give a TOML file") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, a number of thousands of digits
        raise UserError(f"config={str(path)!r} is not TOML: {error}") from error
    check_names(options, str(path))
    return dict(options)


def to_toml(config: Config) -> str:
    """Return a resolved configuration as TOML: what `load_config_file` and `resolve` read back as the same."""
    lines = []
    for name in FIELDS:
        value = getattr(config, name)
        if value is not None and name != "tokens":  # steps say it already
            lines.append(f"{name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _toml_string(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return repr(value)


def _toml_string(text: str) -> str:
    escapes = {'"': '\\"', "\\": "\\\\"}
    return '"' + "".join(escapes.get(c, c if c.isprintable() else f"\\U{ord(c):08X}") for c in text) + '"'
