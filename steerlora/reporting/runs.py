"""Runs in Weights & Biases: one a stage and one an experiment's report, or none at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerlora.config import LoggerConfig
from steerlora.errors import UserError


@dataclass(frozen=True)
class RunLog:
    """One run in Weights & Biases, or nothing where logging is off."""

    run: Any = None

    def lightning(self) -> Any:
        """A Lightning logger that writes into the run; None where logging is off."""
        if self.run is None:
            return None
        from lightning.pytorch.loggers import WandbLogger

        return WandbLogger(experiment=self.run)

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Figures of the whole run."""
        if self.run is not None:
            self.run.summary.update(dict(figures))

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table of results."""
        if self.run is not None:
            import wandb

            self.run.log({name: wandb.Table(columns=columns, data=rows)})


@contextmanager
def open_run(
    logger: LoggerConfig, *, job_type: str, name: str, config: Mapping[str, Any]
) -> Iterator[RunLog]:
    """A run with group, job type, tags and the resolved configuration.

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
    run = wandb.init(
        project=logger.project,
        entity=logger.entity,
        mode=logger.mode,
        dir=logger.dir,
        group=logger.group or None,
        job_type=job_type,
        name=name,
        tags=[*logger.tags, job_type],
        config=dict(config),
        settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        reinit="finish_previous",
    )
    failed = 1
    try:
        yield RunLog(run)
        failed = 0
    finally:
        # Without an exit code the next run of a sweep would go on in this one.
        run.finish(exit_code=failed)
