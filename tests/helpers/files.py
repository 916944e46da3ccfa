"""What may lie where a file is expected."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def _loop(path: Path) -> tuple[Path, str]:
    path.symlink_to(path)
    return path, "cannot be read: Too many levels of symbolic links"


def _dangling(path: Path) -> tuple[Path, str]:
    path.symlink_to(path.with_name("nothing"))
    return path, "cannot be read: No such file"


def _folder(path: Path) -> tuple[Path, str]:
    path.mkdir()
    return path, "is a folder"


def _pipe(path: Path) -> tuple[Path, str]:
    os.mkfifo(path)
    return path, "is a pipe"


NO_FILES: dict[str, Callable[[Path], tuple[Path, str]]] = {
    "a loop of links": _loop,
    "a link to nothing": _dangling,
    "a folder": _folder,
    "a pipe": _pipe,
}
"""{what it is: makes it at a path, and says what a message says of it}."""
