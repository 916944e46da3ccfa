"""Runs in Weights & Biases: one a stage and one an experiment's report, or none at all.

No account and no network is needed: offline runs are files under ``logger.dir``, which
``wandb sync`` uploads. No other room of the house calls W&B.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import steerlora
from steerlora.config import LoggerConfig
from steerlora.engine import code
from steerlora.engine.artifacts import Artifact
from steerlora.engine.lineage import Library
from steerlora.errors import Preempted, UserError
from steerlora.evaluation.records import Ablation, DomainSequence, Evaluation, find_record
from steerlora.reporting.run_figures import figures_of
from steerlora.reporting.settings import NAMES, Setting, settings_of
from steerlora.reporting.wandb_agent import Agent, hidden
from steerlora.reporting.wandb_artifacts import make, use
from steerlora.reporting.wandb_metrics import STAGE, Counts, TrainingMetrics, define_metrics
from steerlora.reporting.wandb_tables import tables_of

NO_EXPERIMENT = "single"
"""Name of an experiment that is none, and of no group."""

LONGEST_TAG = 64  # characters, W&B's limit


@dataclass(frozen=True)
class RunLog:
    """One run in Weights & Biases, or nothing where logging is off."""

    run: Any = None
    stage: str = ""
    """That the run is of."""
    _counts: Counts = field(default_factory=Counts)

    def lightning(self, first_step: int | None = None) -> TrainingMetrics | None:
        """A Lightning logger that writes into the run; None where logging is off.

        Args:
            first_step: optimizer steps of the trainings before; None: of those of this run.
        """
        return None if self.run is None else TrainingMetrics(self.run, self._counts, first_step)

    def results(
        self,
        summary: Mapping[str, Any],
        record: Evaluation | Ablation | DomainSequence | None = None,
    ) -> None:
        """What came out: the run's summary, under the names of `steerlora.reporting.run_figures`,
        and the record's tables.

        Args:
            summary: what the stage measured, as in its artifact's manifest.
            record: that the stage wrote, if it writes one.
        """
        if self.run is None:
            return
        found: dict[str, float] = {}
        for name, figure in figures_of(self.stage, summary, record).items():
            found[name] = figure.value
            if name.startswith("drop_pct/") and figure.interval:
                found[f"{name}_low"], found[f"{name}_high"] = figure.interval
            elif figure.stderr is not None:
                found[f"{name}_stderr"] = figure.stderr
        self.run.summary.update(found)
        if record is not None:
            for name, (columns, rows) in tables_of(record).items():
                self.table(name, columns, rows)

    def stage_of_sequence(self, number: int, figures: Mapping[str, float]) -> None:
        """Figures after so many domains of a sequence."""
        if self.run is not None:
            self.run.log({STAGE: number, **{f"sequence/{k}": v for k, v in figures.items()}})

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table of results."""
        if self.run is not None:
            import wandb

            self.run.log({name: wandb.Table(columns=columns, data=rows)})

    def images(self, files: Iterable[Path]) -> None:
        """Figures that are drawn already, each under the name of its file."""
        if self.run is not None:
            import wandb

            found = {f"figures/{file.stem}": wandb.Image(str(file)) for file in files}
            if found:
                self.run.log(found)

    def used(self, artifacts: Iterable[Artifact]) -> None:
        """What the run reads."""
        if self.run is not None:
            for artifact in artifacts:
                use(self.run, artifact)


def follow(
    artifact: Artifact,
    logger: LoggerConfig,
    *,
    reused: bool = False,
    asked_for: bool = False,
    id_file: Path | None = None,
) -> AbstractContextManager[RunLog]:
    """The run of a stage's artifact, with all its settings, what it reads and what it makes.

    Args:
        artifact: complete, or one in the making: its manifest then holds what is known of it,
            ``label``, ``config`` and ``inputs``.
        logger: where the run is written; or that there is none.
        reused: whether the artifact was there before, and the run only shows it.
        asked_for, id_file: as for :func:`open_run`.

    Raises:
        UserError: ``logger.dir`` cannot be written to.
    """
    if logger.name == "none":
        return nullcontext(RunLog())
    return _follow(artifact, logger, reused, asked_for, id_file)


@contextmanager
def _follow(
    artifact: Artifact, logger: LoggerConfig, reused: bool, asked_for: bool, id_file: Path | None
) -> Iterator[RunLog]:
    library = Library(artifact.path.parents[1])
    settings = settings_of(library.ancestry(artifact))
    found = (library.find(name) for name in artifact.manifest["inputs"].values())
    inputs = [one for one in found if one]
    tags = [settings[key] for key in NAMES if settings[key] != "none"]
    with open_run(
        logger,
        job_type=artifact.stage,
        name=run_name(artifact.manifest.get("label", ""), settings, logger.varied),
        config={**settings, "reused": reused},
        tags=[*map(str, tags), *(["reused"] if reused else [])],
        asked_for=asked_for,
        id_file=id_file,
    ) as log:
        log.used([*inputs, artifact] if reused else inputs)
        yield log
        if not reused:
            make(log.run, artifact, settings)


def log_reused(artifact: Artifact, logger: LoggerConfig, *, asked_for: bool = False) -> None:
    """A light run for an artifact that was asked for and was there: settings, figures, tables."""
    with follow(artifact, logger, reused=True, asked_for=asked_for) as log:
        if log.run is not None:
            log.results(artifact.manifest["summary"], find_record(artifact.path))


def run_name(label: str, settings: Mapping[str, Setting], varied: Sequence[str]) -> str:
    """``rank=8 seed=1``: the values that vary; where nothing does, the label less its stage.

    Args:
        label: the step's, which begins with the stage.
        settings: flat, of the run.
        varied: keys of the configuration, or groups (``method``), that vary between runs.
    """
    parts = []
    for key in varied:
        named = next((k for k in (f"{key}.name", f"{key}.architecture") if k in settings), key)
        if settings.get(named, "none") != "none":
            short = key.rpartition(".")[2]
            value = settings[named]
            parts.append(f"{short}={value}" if named == key else str(value))
    return " ".join(parts) or label.partition(" ")[2] or label


@contextmanager
def open_run(
    logger: LoggerConfig,
    *,
    job_type: str,
    name: str,
    config: Mapping[str, Any],
    tags: Sequence[str] = (),
    asked_for: bool = False,
    id_file: Path | None = None,
) -> Iterator[RunLog]:
    """A run with group, job type, tags and a flat configuration.

    Args:
        logger: where it goes; or that there is none.
        job_type, name, config, tags: what W&B shows of it.
        asked_for: whether the command is about it. Such a run has the id that the environment's
            WANDB_RUN_ID gives, if it does, and is of a W&B agent's sweep, if one started the
            command; others, which would continue it, have ids of their own.
        id_file: remembers the id, so that the same work, done again after an interruption, goes on
            in the same run. None: it does not.

    Raises:
        UserError: ``logger.dir`` cannot be written to.
    """
    if logger.name == "none":
        yield RunLog()
        return
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        Path(logger.dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"logger.dir={logger.dir} cannot be written to ({error.strerror}): give another "
            "folder, or logger=none"
        ) from error
    if logger.group == NO_EXPERIMENT:
        logger = replace(logger, group="")
    about = {"experiment": logger.group or "none", "code.version": steerlora.__version__}
    about["code.commit"] = code.commit() or "none"
    agent = Agent.of_environment()
    parameters = agent.parameters if asked_for else {}
    with hidden():
        run = wandb.init(
            project=agent.project or logger.project,
            entity=agent.entity or logger.entity,
            mode=logger.mode,
            dir=logger.dir,
            group=logger.group or None,
            job_type=job_type,
            name=name,
            tags=[tag[:LONGEST_TAG] for tag in dict.fromkeys([*logger.tags, job_type, *tags])],
            config={**parameters, **about, "stage": job_type, **config},
            settings=wandb.Settings(
                sweep_id=agent.sweep_id if asked_for else None,
                console="off",
                silent=True,
                # What it gathers of the machine, the packages and the repository takes most of a
                # second a run; manifests have it.
                x_disable_stats=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                disable_git=True,
                disable_code=True,
            ),
            reinit="finish_previous",
            # Always given: W&B reads its environment once a process, whoever asks later.
            id=_id(agent.run_id if asked_for else None, id_file),
            resume="allow",
        )
    failed = 1
    try:
        define_metrics(run)
        yield RunLog(run, job_type)
        failed = 0
    except Preempted:
        run.mark_preempting()  # an agent of its sweep then starts it again
        raise
    finally:
        # Without an exit code the next run of a sweep would go on in this one.
        run.finish(exit_code=failed)


def _id(given: str | None, file: Path | None) -> str:
    """A run's id: the given one, else the one in the file, else a new one; the file has it then."""
    if file is None:
        return given or secrets.token_hex(4)
    there = file.read_text().strip() if file.is_file() else ""
    found = given or there or secrets.token_hex(4)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(found)
    return found
