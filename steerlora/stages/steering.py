"""Stage ``steering``: concepts steered by what labelled texts say of latents, beside its rivals.

Labelled texts choose a latent or a direction for each concept, some prompts how far it is pushed;
the figures are of other texts and of other prompts. Every way to steer tries as many strengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerlora.config import Config, LoggerConfig, TrainerConfig
from steerlora.config.checks import one_of
from steerlora.data.batches import evenly_spaced
from steerlora.data.chat import encode_chats
from steerlora.data.conversations import exchange
from steerlora.data.domains.micro.concepts import (
    CONCEPTS,
    Prompt,
    labelled_texts,
    prompts,
    world_of,
)
from steerlora.data.headers import signal_tokens_of
from steerlora.engine.artifacts import Artifact
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError
from steerlora.evaluation.records import SCHEMA, read_record, write_record
from steerlora.evaluation.steering import (
    SteeredConcept,
    SteeringRecord,
    best_factor,
    harmonic_mean,
)
from steerlora.lm.identity import model_fingerprint
from steerlora.lm.output_scores import output_scores
from steerlora.methods.base import Method, SiteSAE, Sources
from steerlora.methods.config import METHODS, MethodConfig
from steerlora.methods.saving import save_adapter
from steerlora.reporting.report import Report
from steerlora.reporting.steering.report import write_steering
from steerlora.saes.saelens import load_sae
from steerlora.stages import base, sae_training
from steerlora.stages import labelled_streams as streams
from steerlora.stages.common import NOT_IDENTITY, WHERE, load_base, replicate, run_log
from steerlora.stages.label_training import learn, reft_vector
from steerlora.stages.labelled_streams import Aim, LabelledStreams, read_texts
from steerlora.stages.steered_answers import MAX_LENGTH, Judge

RESULT, ADAPTERS = "steering.json", "adapters"
"""ADAPTERS: folder of a saved adapter for each concept."""
PUSH = 10
"""Times its own largest activation that a latent is pushed for its output score; published, of the
largest of all."""
SCORED = 5
"""Prompts whose mean is a latent's output score."""
UNSTEERED = 30
"""Prompts of a concept whose unsteered answers say what is fluent."""
SAE, UNTRAINED = "sae", "untrained"
LEARNT = "lora"
"""The way that trains a method of ``trained``."""


@dataclass(frozen=True, kw_only=True)
class SteeringSettings:
    """What the figures of one way depend on."""

    way: str
    """Of `WAYS`."""
    condition: str
    """What an experiment calls it."""
    concepts: tuple[str, ...]
    texts: int
    """Labelled texts of a concept: half choose, the others tell."""
    prompts: int
    """Of a concept: half choose the strength, the others tell."""
    factors: tuple[float, ...]
    """Strengths that are tried, in mean lengths of a token's stream; of a trained method, in its
    update's own."""
    support: int
    """Texts that a concept needs at least."""
    least_output_score: float
    """Latents below it are not chosen, where the way has a filter."""
    latents: MethodConfig
    """Steers along latents."""
    vector: MethodConfig
    """Steers along a vector."""
    trained: MethodConfig | None
    """The rival that is trained for each concept."""
    trainer: TrainerConfig
    """How."""
    model: str
    seed: int
    """Of texts, prompts, draws and controls."""
    accelerator: str
    logger: LoggerConfig


DEFAULTS: dict[str, Any] = {
    "ways": [],
    "concepts": list(CONCEPTS),
    "texts": 144,
    "prompts": 20,
    "factors": [0.05, 0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5],
    "support": 50,
    "least_output_score": 0.01,
    "vector": "steering_vector",
    "trained": [],
    "saes": {},
}


def steps(config: Config, variant: Callable[..., Config]) -> tuple[Step, ...]:
    """One step a way and replicate; in ``saes``, of the way that latents alone decide."""
    given = _checked(config)
    if config.study.stage and len(config.study.seeds) > 1 and "adapter" not in config.study.vary:
        raise UserError(
            f"study.vary={config.study.vary}: stage=steering tells replicates apart by the "
            "adapter's seed: add adapter"
        )
    found = []
    for seed in config.study.seeds if config.study.stage else [config.seed]:
        own = replicate(config, seed) if config.study.stage else []
        for way in given["ways"]:
            found.append(_step(variant, own, given, way, way))
        for name, overrides in given["saes"].items():
            found.append(_step(variant, [*own, *overrides], given, "interpretable", name))
    return tuple(found)


def _checked(config: Config) -> dict[str, Any]:
    given = DEFAULTS | {"ways": list(WAYS)} | config.stage.settings
    given["saes"] = given["saes"] or {}  # null takes an experiment's away
    if unknown := sorted(set(given) - set(DEFAULTS)):
        raise UserError(
            f"stage.settings.{unknown[0]}: stage=steering has {', '.join(DEFAULTS)} alone"
        )
    for key, names in (("ways", WAYS), ("concepts", CONCEPTS)):
        for name in given[key]:
            one_of(f"stage.settings.{key}", name, tuple(names))
    for key, least in (("texts", 4), ("prompts", 2), ("support", 1)):
        if type(given[key]) is not int or given[key] < least:
            raise UserError(f"stage.settings.{key}={given[key]}: a whole number from {least}")
    for key in ("concepts", "factors"):
        if len(given[key]) < 2:
            raise UserError(f"stage.settings.{key}={given[key]}: give two or more")
    if not all(isinstance(f, int | float) and 0 < f < 1e6 for f in given["factors"]):
        raise UserError(f"stage.settings.factors={given['factors']}: numbers above 0")
    if given["texts"] < given["support"]:
        raise UserError(
            f"stage.settings.texts={given['texts']}: every concept has less than the support of "
            f"{given['support']} texts that it needs: give more texts, or stage.settings.support="
        )
    if config.domains.kind != "micro":
        raise UserError(
            f"domains.kind={config.domains.kind}: stage=steering grades answers by the rules of "
            "the micro world: set domains=micro"
        )
    return given


def _step(
    variant: Callable[..., Config],
    overrides: Sequence[str],
    given: dict[str, Any],
    way: str,
    condition: str,
) -> Step:
    config = variant(*overrides)
    method = config.method
    if method.steers_along != "latents":
        able = ", ".join(name for name, kind in METHODS.items() if kind.steers_along)
        raise UserError(
            f"stage=steering steers along latents, which method={method.name} does not: give "
            f"method=<option> of kind {able}"
        )
    vector = variant(*overrides, f"method={given['vector']}").method
    if vector.steers_along != "vector":
        raise UserError(
            f"stage.settings.vector={given['vector']}: this method steers along no vector"
        )
    learnt = variant(*overrides, *given["trained"]) if way == LEARNT else None
    if learnt is not None and not (learnt.method.trains and learnt.method.low_rank):
        raise UserError(
            f"stage.settings.trained={list(given['trained'])}: give overrides that name a method "
            "of low rank, as in [method=lora]"
        )
    settings = SteeringSettings(
        way=way,
        condition=condition,
        latents=method,
        vector=vector,
        trained=learnt and learnt.method,
        trainer=(learnt or config).trainer,
        model=config.model.name,
        seed=config.seed,
        accelerator=config.trainer.accelerator,
        logger=config.logger,
        **{
            name: tuple(value) if isinstance(value, list | tuple) else value
            for name, value in given.items()
            if name not in ("ways", "vector", "trained", "saes")
        },
    )
    (sae,) = sae_training.steps(config)
    label = f"steering {config.model.name} {condition} seed {config.seed}"
    return Step(
        "steering",
        settings,
        base.inputs(config) | {"sae": sae},
        label,
        cost=20,
        skip=frozenset() if learnt else frozenset({"trainer"}),
    )


def report(config: Config, artifacts: list[Artifact], provenance: dict[str, Any]) -> Report:
    """Claims, tables and a figure of an experiment's ways."""
    records = [read_record(artifact / RESULT, SteeringRecord) for artifact in artifacts]
    return write_steering(config, records, provenance)


class _Bench:
    """A base with its SAE, labelled texts and prompts: what every way begins with."""

    def __init__(self, context: Context) -> None:
        settings: SteeringSettings = context.config
        self.context, self.settings = context, settings
        self.model, self.tokenizer = load_base(
            context.inputs["base"], accelerator=settings.accelerator
        )
        self.rule = signal_tokens_of(self.tokenizer)
        (self.site,) = settings.latents.sites
        self.sae_folder = context.inputs["sae"] / sae_training.FOLDER
        sae = load_sae(self.sae_folder, self.model.device)
        self.saes = {SAE: sae, UNTRAINED: sae.untrained_like(settings.seed)}
        self.world = world_of(context.inputs["domains"].json("world.json"))
        self.prompts = {
            concept: prompts(self.world, concept, settings.prompts, settings.seed)
            for concept in settings.concepts
        }

    def choosing(self, concept: str) -> list[Prompt]:
        """The prompts that choose the strength."""
        return self.prompts[concept][0::2]

    def telling(self, concept: str) -> list[Prompt]:
        return self.prompts[concept][1::2]

    @cached_property
    def judge(self) -> Judge:
        seed, concepts = self.settings.seed, self.settings.concepts
        # Prompts of their own: neither those that choose nor those that tell.
        own = [one for c in concepts for one in prompts(self.world, c, UNSTEERED, seed + 1)]
        return Judge(self.model, self.tokenizer, self.world, own, seed)

    @cached_property
    def data(self) -> LabelledStreams:
        settings = self.settings
        texts = labelled_texts(self.world, settings.concepts, settings.texts, settings.seed)
        rows = encode_chats(
            self.tokenizer, [exchange(one.prompt, one.response) for one in texts], MAX_LENGTH
        )
        labels = torch.tensor([[one.concept == c for c in settings.concepts] for one in texts])
        return read_texts(
            self.model, self.site, self.rule, self.tokenizer.pad_token_id, rows, labels, self.saes
        )

    def says(self, name: str) -> Tensor:
        """[N] bool, the latents of an SAE whose output score is high enough; mean over prompts of
        some concepts."""
        peak = self.data.scores[name].peak.max(0).values
        directions = self.saes[name].W_dec.detach().float().cpu()
        some = evenly_spaced(self.settings.concepts, SCORED)
        first = [self.choosing(concept)[0].text for concept in some]
        rows = encode_chats(self.tokenizer, [exchange(text, ".") for text in first], MAX_LENGTH)
        score = partial(output_scores, self.model, self.site, directions, PUSH * peak)
        found = [score(row.input_ids[: row.response_start]) for row in rows]
        mean, least = torch.stack(found).mean(0), self.settings.least_output_score
        fired = self.data.scores[name].frequency[self.data.choosing].any(0)
        if not (mean[fired] >= least).any():
            raise UserError(
                f"no latent that fires has an output score of {least}, the largest is "
                f"{float(mean[fired].max()):.1g}: train the base and its SAE for longer, or set "
                "stage.settings.least_output_score (of an experiment, study.settings.)"
            )
        return mean >= least

    # What steers, for each concept

    def supervised(self) -> list[Aim]:
        """The method: calibrated F1 among latents that say something."""
        return streams.latents(self.data, SAE, allowed=self.says(SAE))

    def interpretable(self) -> list[Aim]:
        """By calibrated F1 alone."""
        return streams.latents(self.data, SAE)

    def permuted(self) -> list[Aim]:
        """As the method, with the texts' labels permuted."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        labels = self.data.labels.clone()
        half = self.data.choosing
        labels[half] = labels[half][torch.randperm(len(half), generator=generator)]
        return streams.latents(self.data, SAE, allowed=self.says(SAE), labels=labels)

    def untrained(self) -> list[Aim]:
        """As the method, of an untrained SAE."""
        return streams.latents(self.data, UNTRAINED, allowed=self.says(UNTRAINED))

    def random_latent(self) -> list[Aim]:
        """One that fires about as often as the method's."""
        return streams.like_latents(self.data, SAE, self.supervised(), self.settings.seed)

    def axbench_sae(self) -> list[Aim]:
        return streams.latent_directions(self.data, SAE)

    def neuron(self) -> list[Aim]:
        return streams.coordinates(self.data, SAE)

    def component(self) -> list[Aim]:
        return streams.principal_components(self.data, SAE)

    def difference(self) -> list[Aim]:
        find = partial(streams.difference_of_means, self.data, SAE)
        return streams.directions(self.data, SAE, find)

    def probe(self) -> list[Aim]:
        return streams.directions(self.data, SAE, partial(streams.probe_direction, self.data, SAE))

    def reft(self) -> list[Aim]:
        def find(label: int) -> Tensor:
            rows = streams.positives(self.data, label)
            pad, seed = self.tokenizer.pad_token_id, self.settings.seed
            return reft_vector(self.model, self.site, self.rule, rows, pad, seed)

        return streams.directions(self.data, SAE, find)

    def random_direction(self) -> list[Aim]:
        generator = torch.Generator().manual_seed(self.settings.seed)
        width = self.saes[SAE].width
        return streams.directions(
            self.data, SAE, lambda label: torch.randn(width, generator=generator)
        )

    def unsteered(self) -> list[Aim]:
        """What the base writes by itself."""
        nowhere = torch.zeros(self.saes[SAE].width)
        return [Aim(None, None, vector=nowhere)] * len(self.settings.concepts)

    def learnt(self) -> list[Aim]:
        """Nothing in the stream of a site: a method is trained for each concept."""
        return [Aim(None, None)] * len(self.settings.concepts)

    # Steering

    def method(self, aim: Aim, factor: float) -> Method:
        """What steers by an aim, attached."""
        settings, saes = self.settings, {}
        if aim.vector is None:
            sae = self.saes[aim.sae]
            unit = float(sae.W_dec[aim.candidate].norm()) * self.data.scale[aim.sae]
            strength = factor * self.data.norm / max(unit, 1e-12)
            config = replace(settings.latents, latents=[aim.candidate], strengths=[strength])
            saes = {self.site: SiteSAE(sae)}
        else:
            config = replace(settings.vector, sites=[self.site], strengths=[float(factor)])
        method = config.build(
            self.model, Sources(saes=saes, signal_tokens=self.rule), settings.seed
        )
        if aim.vector is not None:
            vector = aim.vector / aim.vector.norm().clamp_min(1e-12) * self.data.norm
            with torch.no_grad():
                method.vector.copy_(vector)
        return method

    def scores(
        self, method: Method | None, asked: Sequence[Prompt], seed: int
    ) -> dict[str, list[int]]:
        said = self.judge.answer(asked, seed)
        return self.judge.grades(asked, said, method)

    def steered(self, number: int, concept: str, aim: Aim) -> SteeredConcept:
        """Choose the strength on half of the prompts, and grade answers to the others."""
        choosing, telling = self.choosing(concept), self.telling(concept)
        seed, factors = self.settings.seed + 1000 * number, self.settings.factors
        if self.settings.trained is not None:
            method = self._trained(number)
            with _undone(method):
                matrices = [pair.B for pair in method.low_rank().values()]
                whole = [matrix.detach().clone() for matrix in matrices]

                def graded(factor: float, asked: list[Prompt], seed: int) -> dict[str, list[int]]:
                    with torch.no_grad():
                        for matrix, own in zip(matrices, whole, strict=True):
                            matrix.copy_(factor * own)
                    return self.scores(method, asked, seed)

                searched = [_mean(graded(factor, choosing, seed)) for factor in factors]
                factor = best_factor(factors, searched)
                grades = graded(factor, telling, seed + 1)
        else:
            method = self.method(aim, 1.0)
            with _undone(method):
                method.factors = torch.tensor(factors).repeat_interleave(len(choosing))
                found = self.scores(method, choosing * len(factors), seed)
            size = len(choosing)
            searched = [
                _mean({part: own[i * size : (i + 1) * size] for part, own in found.items()})
                for i in range(len(factors))
            ]
            factor = best_factor(factors, searched)
            method = self.method(aim, factor)
            with _undone(method):
                grades = self.scores(method, telling, seed + 1)
            self._save(method, aim, concept)
        return SteeredConcept(
            concept=concept,
            f1=aim.f1,
            auroc=aim.auroc,
            candidate=aim.candidate,
            searched=searched,
            factor=factor,
            grades=grades,
        )

    def _trained(self, number: int) -> Method:
        settings = self.settings
        sources = Sources(signal_tokens=self.rule)
        method = settings.trained.build(self.model, sources, settings.seed)
        rows = streams.positives(self.data, number)
        pad = self.tokenizer.pad_token_id
        learn(method, rows, settings.trainer, pad, settings.seed)
        return method

    def _save(self, method: Method, aim: Aim, concept: str) -> None:
        if aim.sae == UNTRAINED:  # its SAE is nowhere
            return
        folder = Path(ADAPTERS) / concept
        save_adapter(
            method,
            self.context.directory / folder,
            base_fingerprint=self.fingerprint,
            sae_paths={self.site: self.sae_folder} if method.saes else None,
            written_for=self.context.home / folder,
        )

    @cached_property
    def fingerprint(self) -> str:
        return model_fingerprint(self.model)


WAYS: dict[str, Callable[[_Bench], list[Aim]]] = {
    "latents": _Bench.supervised,
    "interpretable": _Bench.interpretable,
    "axbench_sae": _Bench.axbench_sae,
    "difference_of_means": _Bench.difference,
    "probe": _Bench.probe,
    "reft_r1": _Bench.reft,
    LEARNT: _Bench.learnt,
    "neuron": _Bench.neuron,
    "component": _Bench.component,
    "random_latent": _Bench.random_latent,
    "random_direction": _Bench.random_direction,
    "untrained_sae": _Bench.untrained,
    "permuted_labels": _Bench.permuted,
    "unsteered": _Bench.unsteered,
}
"""What a concept may be steered by."""


@contextmanager
def _undone(method: Method) -> Iterator[None]:
    """The method is removed afterwards."""
    try:
        yield
    finally:
        method.remove()


def _mean(grades: dict[str, list[int]]) -> float:
    scores = [harmonic_mean(of) for of in zip(*grades.values(), strict=True)]
    return sum(scores) / len(scores)


@stage(
    "steering",
    f"1.{SCHEMA}",
    steps=steps,
    report=report,
    skip=WHERE | NOT_IDENTITY,
)
def build(context: Context) -> dict:
    settings: SteeringSettings = context.config
    bench = _Bench(context)
    _ = bench.judge  # before anything is attached
    aims, found = WAYS[settings.way](bench), []
    with context.progress.task(context.label, len(aims), unit="concept") as task:
        for number, (concept, aim) in enumerate(zip(settings.concepts, aims, strict=True)):
            found.append(bench.steered(number, concept, aim))
            task.advance(note=concept)
    record = SteeringRecord(
        model=settings.model,
        method=settings.latents.name,
        seed=settings.seed,
        fingerprint=context.fingerprint,
        way=settings.condition,
        concepts=tuple(found),
        texts=settings.texts,
        l0=next((bench.data.l0[aim.sae] for aim in aims if aim.sae), None),
    )
    write_record(context.directory / RESULT, record)
    figures = {"score": record.score, **{part: record.grade(part) for part in found[0].grades}}
    with run_log(context, settings.logger) as log:
        log.results(figures)
    return figures
