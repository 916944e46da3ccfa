"""Stages, and the steps that ask them for an artifact.

A `Stage` is how something is built, a `Step` is one thing to build: a stage, its configuration and
the steps whose artifacts it reads. A step's fingerprint follows from these alone, so that it is
known before anything is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from steerlora.engine.artifacts import Artifact, fingerprint, plain
from steerlora.engine.progress import Progress
from steerlora.errors import UserError, nearest


@dataclass(frozen=True)
class Stage:
    """How one kind of artifact is built.

    Attributes:
        name: how users and directories call it.
        version: raised when the code changes what it writes, so that nothing old is reused; of a
            stage that writes records, ``<version>.<schema of the records>``.
        build: fills ``context.directory``; returns a summary for the manifest.
        skip: dotted keys of the configuration that do not change what is built, such as
            ``trainer.accelerator``, and so are not part of the fingerprint.
        shared: with several ranks, all of them build it together, and rank 0 alone writes its
            files; else rank 0 builds it while the others wait.
        check: refuses a configuration that cannot be built here, before anything is.
    """

    name: str
    version: int | str
    build: Callable[[Context], Mapping | None]
    skip: frozenset[str] = frozenset()
    shared: bool = False
    check: Callable[[Any], None] = lambda config: None


@dataclass
class Context:
    """What a stage's ``build`` is given."""

    config: Any
    inputs: dict[str, Artifact | tuple[Artifact, ...]]
    directory: Path  # to fill; may hold an interrupted attempt's files, to resume from
    home: Path  # where the directory will lie when it is complete
    fingerprint: str
    label: str
    progress: Progress


_STAGES: dict[str, Stage] = {}


def register(stage: Stage) -> Stage:
    """Make a stage known by its name."""
    assert stage.name not in _STAGES, f"stage {stage.name} is registered twice"
    _STAGES[stage.name] = stage
    return stage


def get_stage(name: str) -> Stage:
    """The stage of that name.

    Raises:
        UserError: there is none; suggests the nearest.
    """
    if name not in _STAGES:
        raise UserError(f"unknown stage '{name}': {nearest(name, _STAGES)}")
    return _STAGES[name]


@dataclass(frozen=True, eq=False)
class Step:
    """One thing to build.

    Attributes:
        stage: the registered name of its stage.
        config: a picklable dataclass or mapping.
        inputs: the steps whose artifacts it reads, by the name its stage knows them by.
        label: what the user reads, such as ``adapter_training micro_m sc_lora seed 1``.
        cost: a guess of the seconds it takes, for the order in which steps are begun.
    """

    stage: str
    config: Any
    inputs: Mapping[str, Step | tuple[Step, ...]]
    label: str
    cost: float = 1.0

    @cached_property
    def upstream(self) -> tuple[Step, ...]:
        """The input steps, in order."""
        return tuple(step for _, step in self._named_inputs())

    @cached_property
    def fingerprint(self) -> str:
        """What the artifact is called; changes with anything that changes what is built."""
        stage = get_stage(self.stage)
        config = _without(plain(self.config, f"{self.stage} config"), stage.skip)
        return fingerprint(self.stage, stage.version, config, self.input_fingerprints)

    @property
    def input_fingerprints(self) -> dict[str, str]:
        """``{"sae": ..., "adapters[0]": ..., "adapters[1]": ...}``."""
        return {name: step.fingerprint for name, step in self._named_inputs()}

    def _named_inputs(self) -> Iterator[tuple[str, Step]]:
        for name, value in self.inputs.items():
            if isinstance(value, Step):
                yield name, value
            else:
                yield from ((f"{name}[{index}]", step) for index, step in enumerate(value))


def _without(config: Any, skip: frozenset[str]) -> Any:
    """A plain configuration less the dotted keys in ``skip``."""
    if not isinstance(config, dict):
        return config
    deeper = {
        key: frozenset(name.removeprefix(f"{key}.") for name in skip if name.startswith(f"{key}."))
        for key in config
    }
    return {key: _without(value, deeper[key]) for key, value in config.items() if key not in skip}
