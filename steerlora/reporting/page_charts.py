"""The charts of a report's page that answer to a pointer: Bokeh's, to pan, zoom and point at.

Bokeh's script lies in the page. Every point is an artifact, and says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from steerlora.reporting.html_page import packed
from steerlora.reporting.methods import Methods
from steerlora.reporting.run_figures import NORMAL
from steerlora.reporting.run_rows import RunRow

SCORES, SEQUENCES = "chart-scores", "chart-sequences"
"""Names of the charts, and of the elements that they go into."""

AXES = {
    SCORES: ("average/target", "average/general_knowledge", "target domains", "general knowledge"),
    SEQUENCES: (
        *("forgetting/positive_mean", "forgetting/final_average"),
        *("positive forgetting", "final average"),
    ),
}
"""{chart: the figures of its axes, and what the axes are called}."""

STAGES = {SCORES: "evaluate", SEQUENCES: "sequential_forgetting"}


def charts(rows: Sequence[RunRow], methods: Methods) -> dict[str, Any]:
    """{name: a chart, as Bokeh's script reads it}, of those that have two figures to show."""
    found = {}
    for name, stage in STAGES.items():
        shown = [row for row in rows if row.artifact.stage == stage and row.record is not None]
        points = [row for row in shown if {*AXES[name][:2]} <= {*row.figures}]
        if points:
            found[name] = _chart(name, points, methods)
    return found


def _chart(name: str, rows: Sequence[RunRow], methods: Methods) -> Any:
    from bokeh.embed import json_item
    from bokeh.models import ColumnDataSource, HoverTool
    from bokeh.plotting import figure

    across, up, across_label, up_label = AXES[name]
    plot = figure(
        height=420,
        sizing_mode="stretch_width",
        x_axis_label=across_label,
        y_axis_label=up_label,
        tools="pan,wheel_zoom,box_zoom,reset",
    )
    plot.toolbar.logo = None
    points = []
    for method in methods.sorted(row.record.method for row in rows):
        own = [row for row in rows if row.record.method == method]
        colour = methods.colour(method)
        x, y = ([row.figures[key].value for row in own] for key in (across, up))
        wide, high = ([NORMAL * (r.figures[k].stderr or 0.0) for r in own] for k in (across, up))
        source = ColumnDataSource(
            {
                "x": x,
                "y": y,
                "left": [value - arm for value, arm in zip(x, wide, strict=True)],
                "right": [value + arm for value, arm in zip(x, wide, strict=True)],
                "low": [value - arm for value, arm in zip(y, high, strict=True)],
                "high": [value + arm for value, arm in zip(y, high, strict=True)],
                "method": [methods.long_label(method)] * len(own),
                "model": [row.record.model for row in own],
                "seed": [row.record.seed for row in own],
                "order": [str(row.settings.get("order.name", "none")) for row in own],
                "intervention": [str(row.settings["intervention.name"]) for row in own],
                "artifact": [row.artifact.fingerprint for row in own],
            }
        )
        look = {
            "source": source,
            "color": colour,
            "alpha": 0.35,
            "legend_label": methods.label(method),
        }
        plot.segment("left", "y", "right", "y", **look)
        plot.segment("x", "low", "x", "high", **look)
        look |= {"alpha": 0.9, "size": 9, "line_color": "white"}
        points.append(plot.scatter("x", "y", **look))
    names = ("method", "model", "seed", "order", "intervention", "artifact")
    tooltips = [(across_label, "@x{0.000}"), (up_label, "@y{0.000}")]
    tooltips += [(name, f"@{name}") for name in names]
    plot.add_tools(HoverTool(renderers=points, tooltips=tooltips))
    plot.add_layout(plot.legend[0], "below")
    plot.legend.click_policy = "hide"
    plot.legend.ncols = 3
    plot.legend.label_text_font_size = "11px"
    return json_item(plot, name)


@cache
def charts_library() -> str:
    """Bokeh's script, packed."""
    from importlib import resources

    script = resources.files("bokeh") / "server" / "static" / "js" / "bokeh.min.js"
    return packed(script.read_text(encoding="utf-8"))
