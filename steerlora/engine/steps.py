"""Stages, and the steps that ask them for an artifact.

A `Stage` is how something is built, a `Step` is one thing to build: a stage, its configuration and
the steps whose artifacts it reads. A step's fingerprint follows from these alone, so that it is
known before anything is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from steerlora.engine.artifacts import Artifact, fingerprint
from steerlora.engine.manifests import plain
from steerlora.engine.progress import Progress
from steerlora.registry import Registry


@dataclass(frozen=True)
class Stage:
    """How one kind of artifact is built."""

    name: str
    """The stage's name on the command line and in folders."""

    version: int | str
    """Raised when the code changes what it writes, so that no older artifact is reused. Of a stage
    that writes records, ``<version>.<schema of the records>``."""

    build: Callable[..., Any]
    """Fills ``context.directory`` and returns a summary for the manifest; of a stage that builds
    ``together``, takes a sequence of contexts and returns a summary each."""

    steps: Callable[[Any, Callable[..., Any]], Sequence[Step]] | None = None
    """The steps that ``stage=<name>`` means: of the run's configuration, and of a function that
    gives it with some options changed (``variant("model=micro_s")``)."""

    skip: frozenset[str] = frozenset()
    """Dotted keys of the configuration that do not change what is built, such as
    ``trainer.accelerator``. They are not part of the fingerprint."""

    shared: bool = False
    """Whether several ranks build it together, and rank 0 writes the files. If not, rank 0 builds
    it while the others wait."""

    together: bool = False
    """Whether it can build several steps by one call; which ones, they say themselves."""

    report: Callable[..., Any] | None = None
    """Writes the report of an experiment that is about this stage (``study.stage``): of the run's
    configuration, the artifacts of ``steps``, and what there is to say of their origin. None: no
    experiment is."""

    check: Callable[[Any], None] = lambda config: None
    """Raises a `UserError` for a configuration that cannot be built here, before anything is."""


@dataclass
class Context:
    """What a stage's ``build`` is given."""

    config: Any
    """The step's configuration."""

    inputs: dict[str, Artifact | tuple[Artifact, ...]]
    """The artifacts that it reads, under the names that the step gave them."""

    directory: Path
    """The folder to fill. It may hold files of an interrupted build, to resume from."""

    home: Path
    """Where the folder will be when it is complete."""

    fingerprint: str
    """The artifact's fingerprint."""

    label: str
    """The step's label, for messages."""

    progress: Progress
    """Where the build reports its progress."""

    asked_for: bool = False
    """Whether the command is about this step, which others may be built for."""

    earlier: Artifact | None = None
    """The first of the step's ``earlier`` that is stored, on rank 0; None on other ranks."""


STAGES: Registry[Stage] = Registry("stage", "steerlora.stages.*")
"""Every stage by its name."""


def stage(
    name: str,
    version: int | str,
    *,
    step: Callable[[Any], Step | Sequence[Step]] | None = None,
    **facts: Any,
) -> Callable[[Callable], Callable]:
    """Decorator: makes a function that builds an artifact known as a stage.

    Args:
        name, version: of the `Stage`.
        step: gives what ``stage=<name>`` means of the configuration alone, in place of ``steps``.
        facts: the other fields of the `Stage`.
    """

    def steps(config: Any, variant: Callable[..., Any]) -> Sequence[Step]:
        found = step(config)
        return (found,) if isinstance(found, Step) else found

    def register(build: Callable) -> Callable:
        given = {"steps": steps, **facts} if step else facts
        STAGES.register(name)(Stage(name=name, version=version, build=build, **given))
        return build

    return register


@dataclass(frozen=True, eq=False)
class Step:
    """One artifact to build: a stage, its configuration and its inputs."""

    stage: str
    """Registered name of the stage."""

    config: Any
    """A picklable dataclass or mapping."""

    inputs: Mapping[str, Step | tuple[Step, ...]]
    """The steps whose artifacts it reads, under the names that the stage expects."""

    label: str
    """What messages call it, such as ``adapter_training micro_m sc_lora seed 1``."""

    cost: float = 1.0
    """Rough estimate of its seconds, which decides the order in which steps are started."""

    skip: frozenset[str] = frozenset()
    """Dotted keys of this step's configuration that are not part of its fingerprint, beside the
    stage's."""

    together: frozenset[str] = frozenset()
    """Dotted keys of the configuration. Steps that are missing in a run, and differ in these alone,
    are built by one call. Empty: it is built alone."""

    earlier: tuple[Step, ...] = ()
    """Steps of the same stage that do a part of this one's work, those that do most of it first.
    None of them is built for it, but the first whose artifact is stored spares it that part. What
    comes out is the same."""

    @cached_property
    def upstream(self) -> tuple[Step, ...]:
        """The input steps, in order."""
        return tuple(step for _, step in self._named_inputs())

    @cached_property
    def fingerprint(self) -> str:
        """What the artifact is called; changes with anything that changes what is built."""
        return self._fingerprint_without(frozenset())

    @cached_property
    def group(self) -> str:
        """What it has in common with the steps that are built together with it, and no others."""
        return self._fingerprint_without(self.together) if self.together else self.fingerprint

    @property
    def input_fingerprints(self) -> dict[str, str]:
        """``{"sae": ..., "adapters[0]": ..., "adapters[1]": ...}``."""
        return {name: step.fingerprint for name, step in self._named_inputs()}

    def _fingerprint_without(self, keys: frozenset[str]) -> str:
        stage = STAGES[self.stage]
        skip = stage.skip | self.skip | keys
        config = _without(plain(self.config, f"{self.stage} config"), skip)
        return fingerprint(self.stage, stage.version, config, self.input_fingerprints)

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
