"""The folders that a run writes to: refused before any work where they cannot be written to."""

from __future__ import annotations

import os
from pathlib import Path

from steerlora.config import Config
from steerlora.errors import UserError, shown


def refuse_unwritable(config: Config, *, reports: bool) -> None:
    """Refuse folders that could not be made or filled.

    Args:
        config: the run's.
        reports: whether it writes an experiment's report.

    Raises:
        UserError: names the key.
    """
    places = {"artifacts.root": config.artifacts.root}
    if reports:
        places["results.dir"] = config.results.dir
    if config.logger.name != "none":
        places["logger.dir"] = config.logger.dir
    for key, place in places.items():
        try:
            folder = Path(place).absolute()
            there = next(path for path in (folder, *folder.parents) if path.exists())
            good = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        except OSError:
            there, good = folder, False
        if not good:
            raise UserError(
                f"{key}={shown(place)}: cannot write {there}: choose another place with {key}=DIR"
            )
