"""Stage ``geometry``: what adapters add to the stream, SAEs of it, and what chance gives.

T tokens, D model width, E specialists. Several adapters of one base; all of their SAEs are trained
at once. What is measured is ``steerlora/saes/geometry/records.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from steerlora.config import Config, LoggerConfig
from steerlora.engine.artifacts import Artifact
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError
from steerlora.evaluation.records import SCHEMA, read_record, write_record
from steerlora.methods.config import MethodConfig
from steerlora.reporting.geometry.report import write_geometry
from steerlora.reporting.report import Report
from steerlora.saes.geometry.records import Geometry
from steerlora.stages import adapter_training, base, sae_training
from steerlora.stages.common import WHERE, run_log
from steerlora.stages.geometry_measures import Measures

RESULT = "geometry.json"
"""File of the artifact with its `Geometry`."""
GIVEN: dict[str, Any] = {
    "layers": None,
    "ranks": None,
    "options": [],
    "routed": [],
    "controls": None,
    "tokens": 8000,
    "held_out": 2000,
    "steps": 150,
    "batch_size": 256,
}
"""What the stage has of its own, and what each is where it is not given.

layers: whose incoming streams are read (the number of layers: what leaves the last); null: the
middle one and the last. ranks: of the method's adapters, alpha being the rank; null: its own rank
alone. options: overrides beside them. routed: further methods, by option. controls: ranks whose
untrained and permuted controls are made; null: all. tokens, held_out: for SAEs, and for figures.
steps, batch_size: of the training of the SAEs, in tokens a step."""


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """Attributes: method, rank, seed: of an adapter, the rank being that of all specialists; swept:
    whether it is one of the ranks; controlled: whether its controls are made."""

    method: str
    rank: int
    seed: int
    swept: bool
    controlled: bool


@dataclass(frozen=True, kw_only=True)
class GeometrySettings:
    """Attributes: adapters: of the input adapters, in order; layers, tokens, held_out, steps,
    batch_size: as the settings of the stage; latents and k: of the SAEs; domains: whose text
    is read; max_length: of a row; seed: of SAEs and of what is drawn; accelerator and spread: where
    the model runs."""

    model: str
    adapters: tuple[AdapterFacts, ...]
    layers: tuple[int, ...]
    latents: int
    k: int
    domains: tuple[str, ...]
    max_length: int
    tokens: int
    held_out: int
    steps: int
    batch_size: int
    seed: int
    accelerator: str
    spread: bool
    logger: LoggerConfig


def steps(config: Config, variant: Callable[..., Config]) -> tuple[Step, ...]:
    """One step, for all adapters together."""
    given = _checked(config)
    layers = given["layers"] or sorted({-(-config.model.layers // 2), config.model.layers})
    options = [*given["options"]]
    ranks = given["ranks"] or [None]
    seeds = [config.seed] if config.study.name == "single" else config.study.seeds
    found: list[tuple[AdapterFacts, Config]] = []
    for seed in seeds:
        for rank in ranks:
            own = [] if rank is None else [f"method.rank={rank}", f"method.alpha={rank}"]
            adapted = variant(*options, *own, f"seed={seed}")
            controlled = rank is not None and rank in (given["controls"] or ranks)
            found.append(_adapter(adapted, swept=rank is not None, controlled=controlled))
        for name in given["routed"]:
            found.append(_adapter(variant(f"method={name}", f"seed={seed}")))
    for _, adapted in found:
        first = min(adapted.method.sites)
        if min(layers) <= first:
            raise UserError(
                f"stage.settings.layers={layers}: method={adapted.method.name} adapts layers from "
                f"{first} on, so the stream entering layer {min(layers)} is the base's own; give "
                f"layers from {first + 1}"
            )
    settings = GeometrySettings(
        model=config.model.name,
        adapters=tuple(facts for facts, _ in found),
        layers=tuple(layers),
        latents=config.sae.latents,
        k=config.sae.k,
        domains=tuple(config.domains.names),
        max_length=config.trainer.max_length,
        seed=config.sae.seed,
        accelerator=config.trainer.accelerator,
        spread=config.evaluation.spread,
        logger=config.logger,
        **{name: given[name] for name in ("tokens", "held_out", "steps", "batch_size")},
    )
    inputs = base.inputs(config) | {
        "saes": _sae_steps(config, layers),
        "adapters": tuple(adapter_training.step(adapted) for _, adapted in found),
    }
    return (Step("geometry", settings, inputs, f"geometry {config.model.name}", cost=300),)


def _adapter(
    config: Config, *, swept: bool = False, controlled: bool = False
) -> tuple[AdapterFacts, Config]:
    method = config.method
    method.check_trains()
    if not method.low_rank:
        raise UserError(
            f"method={method.name}: stage=geometry compares low-rank updates, and it has none"
        )
    facts = AdapterFacts(
        method=method.name,
        rank=method.total_rank,
        seed=config.seed,
        swept=swept,
        controlled=controlled,
    )
    return facts, config


def _sae_steps(config: Config, layers: list[int]) -> tuple[Step, ...]:
    """The base's SAEs of the streams entering these layers."""
    inside = [layer for layer in layers if layer < config.model.layers]
    last = config.model.layers if config.model.layers in layers else None
    # A method is what names the streams; this one does nothing to them.
    reads = MethodConfig(sites=inside or [config.model.layers - 1], monitor=last)
    found = sae_training.of_sites(replace(config, method=reads))
    return found if inside else found[-1:]


def _checked(config: Config) -> dict[str, Any]:
    """The stage's own settings, each of the right kind."""
    own = config.stage.settings if config.stage else {}
    if unknown := sorted(set(own) - set(GIVEN)):
        raise UserError(f"stage.settings.{unknown[0]}: stage=geometry has {', '.join(GIVEN)} alone")
    given = GIVEN | own
    for name in ("tokens", "held_out", "steps", "batch_size"):
        if type(given[name]) is not int or given[name] < 1:
            raise UserError(f"stage.settings.{name}={given[name]}: a number from 1")
    for name, least in (("layers", 1), ("ranks", 1), ("controls", 1)):
        numbers = given[name]
        if numbers is None:
            continue
        whole = isinstance(numbers, list | tuple) and {*map(type, numbers)} == {int}
        if not whole or min(numbers) < least or len({*numbers}) < len(numbers):
            raise UserError(
                f"stage.settings.{name}={numbers}: whole numbers from {least}, each once, such as "
                "[4,8], or null"
            )
        given[name] = sorted(numbers)
    for name in ("options", "routed"):
        texts = given[name]
        if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
            raise UserError(f"stage.settings.{name}={texts}: a list of texts")
    if given["layers"] and max(given["layers"]) > config.model.layers:
        raise UserError(
            f"stage.settings.layers={given['layers']}: {config.model.name} has "
            f"{config.model.layers} layers; {config.model.layers} is the stream that leaves them"
        )
    if given["controls"] and set(given["controls"]) - set(given["ranks"] or ()):
        raise UserError(
            f"stage.settings.controls={given['controls']}: some of stage.settings.ranks="
            f"{given['ranks']}"
        )
    if not hasattr(config.sae, "k"):
        raise UserError(
            f"sae.architecture={config.sae.architecture}: stage=geometry compares SAEs at equal "
            "L0, and trains TopK SAEs: set sae=topk"
        )
    return given


def report(config: Config, artifacts: list[Artifact], provenance: dict[str, Any]) -> Report:
    """Claims, tables and a figure of the one artifact."""
    record = read_record(artifacts[0] / RESULT, Geometry)
    return write_geometry(config, record, provenance)


@stage(
    "geometry",
    f"1.{SCHEMA}",
    steps=steps,
    report=report,
    skip=WHERE | {"logger"},
)
def build(context: Context) -> dict:
    settings: GeometrySettings = context.config
    measures = Measures(context)
    total = len(settings.adapters) + len(settings.layers)
    with context.progress.task(context.label, total, unit="part") as task:
        record = measures.record(task.advance)
    write_record(context.directory / RESULT, record)
    trained = [one for one in record.deltas if one.kind == "trained"]
    figures = {
        f"{name}/layer_{layer}": sum(values) / len(values)
        for layer in settings.layers
        for name, values in {
            "alignment": [d.likeness.alignment for d in trained if d.layer == layer],
            "alignment_random": [d.random.alignment for d in trained if d.layer == layer],
            "unexplained": [d.unexplained for d in trained if d.layer == layer],
        }.items()
    }
    with run_log(context, settings.logger) as log:
        log.results(figures)
    return {**figures, "adapters": len(settings.adapters), "deltas": len(record.deltas)}
