"""Trees of folders: the files below one, and those that a pattern matches.

Links are followed. One that leads back to a folder that it lies in is not gone round: its files are there already. What
cannot be looked into, and a link to nothing where a file is wanted, is refused, since nobody knows what would be
missing. What is hidden, by a name that begins with a dot, is neither read nor looked into, unless it is named itself.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from .errors import UserError


def entries_below(folder: Path) -> Iterator[Path]:
    """Yield all that lies below a folder but folders that are not hidden, in no order; links to nothing too.

    Raises:
        UserError: for a folder that cannot be read.
    """
    for place, folders, names in _walk(str(folder)):
        yield from (Path(place, name) for name in (*names, *filter(is_hidden, folders)))
        folders[:] = [name for name in folders if not is_hidden(name)]


def files_below(folder: Path, is_wanted: Callable[[Path], object]) -> Iterator[Path]:
    """Yield the regular files below a folder that are wanted and not hidden, in no order.

    Raises:
        UserError: for a folder that cannot be read, and for a link to nothing whose name is wanted.
    """
    for path in entries_below(folder):
        if not is_hidden(path.name) and is_wanted(path) and _is_file(path):
            yield path


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder of that name is hidden."""
    return name.startswith(".")


def files_matching(pattern: str) -> set[Path]:
    """Return the regular files that a pattern matches; ** stands for folders that are not hidden.

    Raises:
        UserError: for a folder that cannot be read, and for a link to nothing.
        ValueError, re.error: for what is no pattern.
    """
    return {path for path in map(Path, _matches(pattern)) if _is_file(path)}


def _matches(pattern: str) -> Iterator[str]:
    """Yield the paths that a pattern matches; `glob` itself goes round links that lead back, and round again."""
    parts = pattern.split("/")
    if "**" in parts:
        number = parts.index("**")
        rest = parts[number + 1 :] or ["*"]
        for top in _matches("/".join(parts[:number]) + "/") if number else ["."]:
            for place, folders, _ in _walk(top):
                folders[:] = [name for name in folders if not is_hidden(name)]
                yield from _matches("/".join([glob.escape(place.rstrip("/")), *rest]))
        return
    for number in range(1, len(parts)):
        if glob.has_magic(parts[number]):  # these folders will be listed, and glob is silent where that fails
            for folder in glob.iglob("/".join(parts[:number]) + "/"):
                _check_readable(folder)
    yield from glob.iglob(pattern)


def _walk(top: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield folders with the names of the folders and files in them, as os.walk does, but never round."""
    # of every folder that is still to be listed: where it and those above it really lie
    above: dict[str, tuple[str, ...]] = {top: (os.path.realpath(top),)}
    for place, folders, names in os.walk(top, onerror=_refuse, followlinks=True):
        _check_readable(place)
        reals = above.pop(place)
        lower = {name: os.path.realpath(os.path.join(place, name)) for name in folders}
        folders[:] = [name for name in folders if lower[name] not in reals]
        above.update({os.path.join(place, name): (*reals, lower[name]) for name in folders})
        yield place, folders, names


def _is_file(path: Path) -> bool:
    if path.is_symlink() and not path.exists():
        raise UserError(f"data={str(path)!r} is a link to nothing: mend or remove it")
    return path.is_file()


def _check_readable(folder: str) -> None:
    if not os.access(folder, os.R_OK | os.X_OK):
        _refuse(PermissionError(0, "Permission denied", folder))


def _refuse(error: OSError) -> NoReturn:
    raise UserError(
        f"data={str(error.filename)!r} cannot be read ({error.strerror or error}): allow that, or give names without it"
    ) from error
