"""What a W&B agent tells the command that it starts: the id of one run, and the sweep it is of.

The agent writes them into the environment, and W&B puts every run of a process that has them into
the sweep, under the one id. Here a command makes several runs, one a stage; only the run of the
stage that was asked for is the sweep's. So W&B never sees the variables, and that run is given what
they say.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

OF_ONE_RUN = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")
"""Environment variables that belong to one run, and not to all that a command makes."""


@dataclass(frozen=True)
class Agent:
    """What the environment says of runs."""

    run_id: str | None
    """Id of the run that is asked for; None gives it one of its own."""
    sweep_id: str | None
    """The sweep that this run is of; None where no agent started the command."""
    project: str | None
    """The sweep's project, where all runs of the command belong. None: the configuration's."""
    entity: str | None
    """The sweep's user or team. None: the configuration's."""
    parameters: Mapping[str, Any]
    """What the sweep varies, as the agent gives it; a search looks for it in the run's
    configuration, also where it is an option of a group (``method``)."""

    @classmethod
    def of_environment(cls) -> Agent:
        """What the variables say now."""
        run_id, sweep_id = (os.environ.get(name) or None for name in OF_ONE_RUN[:2])
        places = ("WANDB_PROJECT", "WANDB_ENTITY")
        project, entity = (os.environ.get(name) or None for name in places)
        if sweep_id is None:
            return cls(run_id, None, None, None, {})
        return cls(run_id, sweep_id, project, entity, _parameters(os.environ.get(OF_ONE_RUN[2])))


def _parameters(file: str | None) -> dict[str, Any]:
    """Of the agent's YAML file, ``{key: {value: ...}}`` beside a number of its version."""
    if not file or not Path(file).is_file():
        return {}
    found = yaml.safe_load(Path(file).read_text()) or {}
    return {key: one["value"] for key, one in found.items() if isinstance(one, dict)}


@contextmanager
def hidden() -> Iterator[None]:
    """The variables are not there inside; W&B reads them once a process, for all its runs."""
    aside = {name: os.environ.pop(name) for name in OF_ONE_RUN if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(aside)
