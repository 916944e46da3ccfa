"""A plan as tables."""

from __future__ import annotations

from rich.table import Table

from steerlora.distributed.devices import GPUS
from steerlora.planning.plan import RESERVED, Plan
from steerlora.planning.work import HARVEST, row_tokens
from steerlora.text import for_markup

COMPARED = ("a100-80gb", "h100-80gb", "h200-141gb", "b200-180gb", "l40s-48gb", "rtx4090-24gb")
"""GPUs on which the time is told besides the one that is planned for."""


def tables(plan: Plan) -> list[Table]:
    """Parameters, memory, arithmetic, and time on several GPUs."""
    return [_parameters(plan), _memory(plan), _work(plan), _time(plan)]


def notes(plan: Plan) -> list[str]:
    """What the figures leave out or take for granted."""
    told = plan.config.plan
    return [
        f"memory: the longest rows, {told.labelled:.0%} of their tokens labelled (plan.labelled); "
        f"{RESERVED / 1e9:g} GB of every GPU is set aside for CUDA and the allocator",
        f"time: {told.mfu:.0%} of the peak rate (plan.mfu) is an assumption, not a measurement; "
        f"{row_tokens(plan.config):g} tokens a row; communication, loading and evaluation are left "
        "out",
    ]


def _parameters(plan: Plan) -> Table:
    table = _table("parameters", "of", "parameters")
    tied = " (the head is the embedding)" if plan.shape.tied else ""
    layer = plan.trials.layer
    table.add_row(f"base {for_markup(plan.config.model.name)}{tied}", _count(plan.base))
    table.add_row(
        f"  {plan.shape.layers} layers of {_count(layer)}", _count(plan.shape.layers * layer)
    )
    table.add_row("  embedding and head", _count(plan.base - plan.shape.layers * layer))
    trained = sum(plan.trained.values())
    table.add_row(f"method {for_markup(plan.config.method.name)}, which trains", _count(trained))
    for part, count in plan.trained.items():
        table.add_row(f"  {for_markup(part)}", _count(count))
    if plan.saes:
        table.add_row(f"SAE, {plan.saes} in all, each", _count(plan.sae))
    return table


def _memory(plan: Plan) -> Table:
    trainer, told = plan.config.trainer, plan.config.plan
    engine = f"{trainer.strategy}, {trainer.precision}"
    title = f"memory of each of {told.gpus} x {told.gpu}, GB ({engine})"
    table = _table(title, "part", *plan.memories)
    names = dict.fromkeys(name for found in plan.memories.values() for name in found.parts)
    for name in names:
        values = [found.parts.get(name, 0) for found in plan.memories.values()]
        if any(values):
            table.add_row(name, *map(_gigabytes, values))
    table.add_section()
    table.add_row("peak", *(_gigabytes(found.total) for found in plan.memories.values()))
    table.add_row("when", *(found.moment for found in plan.memories.values()))
    hosts = [found.host for found in plan.memories.values()]
    if any(hosts):
        table.add_row("in the CPU's memory", *map(_gigabytes, hosts))
    return table


def _work(plan: Plan) -> Table:
    table = _table("work", "of", "tokens", "FLOPs a token", "recomputed", "FLOPs", "disk, GB")
    for work in plan.works:
        each = work.model + work.single
        disk = _gigabytes(plan.disk) if work.name == HARVEST else ""
        table.add_row(
            work.name,
            _count(work.tokens),
            _count(each),
            _count(work.again) if work.again else "",
            _count(work.tokens * (each + work.again)),
            disk,
        )
    return table


def _time(plan: Plan) -> Table:
    told = plan.config.plan
    title = f"time on {told.gpus} GPU{'s' * (told.gpus > 1)} at {told.mfu:.0%} of peak (assumed)"
    table = _table(title, "gpu", *(work.name for work in plan.works), "fits")
    for name in sorted({*COMPARED, told.gpu}, key=lambda name: -GPUS[name].bfloat):
        marked = f"{name} *" if name == told.gpu else name
        times = (_duration(seconds) for seconds in plan.seconds(name).values())
        table.add_row(marked, *times, "yes" if plan.fits(name) else "no")
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(first, title=title, title_justify="left")
    for name in others:
        table.add_column(name, justify="right")
    return table


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}" if size else ""


def _count(number: float) -> str:
    """Three significant digits and a letter: 8.19 B."""
    for letter in ("", " k", " M", " B", " T", " P", " E"):
        if number < 999.5:
            return f"{number:.3g}{letter}"
        number /= 1000
    return f"{number:.3g} Z"


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 99.5 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
