"""A W&B Report on the runs of an experiment or a sweep: drops, forgetting, and the runs themselves.

python scripts/wandb_report.py --group micro --entity me            writes it into the project
python scripts/wandb_report.py --group micro --write report.json    its specification, no account

Needs the extra ``sweeps``, which has W&B's library for reports. The panels read the summaries and
tables that every run has (``docs/wandb.md``), so the report shows runs that end later, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steerlora.cli.sections import options_of
from steerlora.config import LoggerConfig
from steerlora.errors import UserError
from steerlora.evaluation.records import INTACT

COLUMNS = (
    *("config:stage.value", "config:model.name.value", "config:method.name.value"),
    *("config:intervention.name.value", "config:order.name.value", "config:seed.value"),
    *("summary:average/target", "summary:average/instruction_following"),
    *("summary:average/general_knowledge", "summary:forgetting/positive_mean"),
    *("summary:forgetting/final_average", "summary:general_kept"),
)
"""Of the table of runs; those at the end are measured by some stages only."""

WIDE = {"w": 24, "h": 12}
"""Size of a panel over the whole width, in W&B's grid of 24 columns."""


def interventions() -> list[str]:
    """Every intervention that an ablation may make, by name."""
    return [name for name in options_of("intervention") if name not in ("none", INTACT)]


def report(group: str, project: str, entity: str | None = None) -> Any:
    """The report, not saved yet.

    Args:
        group: an experiment's name, or a sweep's, which W&B lists runs under.
        project, entity: where the runs and the report are; without an entity, the account's own.

    Raises:
        UserError: W&B's library for reports is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise UserError("a report needs pip install 'steerlora[sweeps]'") from error

    def runs(stage: str | None, **options: Any) -> Any:
        """Runs of the group; without an entity and a project they are the report's own."""
        wanted = {"experiment": group} | ({"stage": stage} if stage else {})
        text = " and ".join(f"Config('{key}') = '{value}'" for key, value in wanted.items())
        return wr.Runset(name=stage or "all runs", filters=text, **options)

    def drops(place: int, name: str) -> Any:
        """The mean drop under an intervention beside the ends of its interval, a group a seed."""
        measured = [f"drop_pct/{name}_low", f"drop_pct/{name}", f"drop_pct/{name}_high"]
        return wr.BarPlot(
            title=name,
            metrics=[wr.SummaryMetric(metric) for metric in measured],
            groupby=wr.Config("seed"),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            title_x="drop in % of the intact score; low and high: 95 % interval over items",
            layout=wr.Layout(x=12 * (place % 2), y=8 * (place // 2), w=12, h=8),
        )

    names = interventions()
    below = 8 * ((len(names) + 1) // 2)
    return wr.Report(
        project=project,
        **({} if entity is None else {"entity": entity}),
        title=f"SteerLoRA: {group}",
        description="Written by scripts/wandb_report.py",
        width="fluid",
        blocks=[
            wr.H1("Drops by intervention"),
            wr.P(
                "How much of its score on the domains' own tasks an adapter loses when its control "
                "signal is changed. Where a seed has several runs, bars are their means and lines "
                "their extremes."
            ),
            wr.PanelGrid(
                runsets=[runs("causal_ablation", groupby=["config.seed"])],
                panels=[
                    *(drops(place, name) for place, name in enumerate(names)),
                    wr.WeavePanelSummaryTable(
                        table_name="drops", layout=wr.Layout(x=0, y=below, **WIDE)
                    ),
                ],
            ),
            wr.H1("Forgetting"),
            wr.P(
                "The score on every domain (columns) after every stage of a sequence (rows; the "
                "first is the base model)."
            ),
            wr.PanelGrid(
                runsets=[runs("sequential_forgetting", groupby=["config.seed"])],
                panels=[
                    wr.WeavePanelSummaryTable(
                        table_name="forgetting_matrix", layout=wr.Layout(x=0, y=0, **WIDE)
                    )
                ],
            ),
            wr.H1("Runs"),
            wr.PanelGrid(
                runsets=[runs(None, pinned_columns=["run:displayName"], visible_columns=COLUMNS)],
                panels=[wr.RunComparer(diff_only=True, layout=wr.Layout(x=0, y=0, **WIDE))],
            ),
        ],
    )


def specification(made: Any) -> dict[str, Any]:
    """What W&B stores of a report."""
    spec = made._to_model().spec
    return json.loads(spec.model_dump_json(by_alias=True, exclude_none=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for the user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--group", required=True, help="an experiment's name, or a sweep's")
    parser.add_argument("--project", default=LoggerConfig().project, help="W&B project")
    parser.add_argument("--entity", help="W&B user or team; by default the account's")
    parser.add_argument("--write", type=Path, help="write the specification there; no account")
    asked = parser.parse_args(arguments)
    try:
        if asked.write:
            made = report(asked.group, asked.project, asked.entity or "")
            asked.write.write_text(json.dumps(specification(made), indent=2) + "\n")
            print(asked.write)
        else:
            print(report(asked.group, asked.project, asked.entity).save().url)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
