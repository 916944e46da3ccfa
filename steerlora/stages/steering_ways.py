"""What a concept may be steered by.

Each way gives an aim for every concept; `Bench` steers by it and grades what comes of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steerlora.data.batches import evenly_spaced
from steerlora.data.chat import encode_chats
from steerlora.data.conversations import exchange
from steerlora.data.domains.micro.concepts import (
    Prompt,
    labelled_texts,
    prompts,
    world_of,
)
from steerlora.data.headers import signal_tokens_of
from steerlora.engine.steps import Context
from steerlora.errors import UserError
from steerlora.evaluation.steering import (
    SteeredConcept,
    best_factor,
    harmonic_mean,
)
from steerlora.lm.identity import model_fingerprint
from steerlora.lm.output_scores import output_scores
from steerlora.methods.base import Method, SiteSAE, Sources
from steerlora.methods.saving import save_adapter
from steerlora.saes.saelens import load_sae
from steerlora.stages import labelled_streams as streams
from steerlora.stages import sae_training
from steerlora.stages.common import load_base
from steerlora.stages.label_training import learn, reft_vector
from steerlora.stages.labelled_streams import Aim, LabelledStreams, read_texts
from steerlora.stages.steered_answers import MAX_LENGTH, Judge

if TYPE_CHECKING:
    from steerlora.stages.steering import SteeringSettings

ADAPTERS = "adapters"
"""Folder of a saved adapter for each concept."""
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
OF_UNTRAINED = "untrained_sae"
"""The one way that reads an untrained SAE."""


class Bench:
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
        self.saes = {SAE: sae}
        if settings.way == OF_UNTRAINED:
            self.saes[UNTRAINED] = sae.untrained_like(settings.seed)
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


WAYS: dict[str, Callable[[Bench], list[Aim]]] = {
    "latents": Bench.supervised,
    "interpretable": Bench.interpretable,
    "axbench_sae": Bench.axbench_sae,
    "difference_of_means": Bench.difference,
    "probe": Bench.probe,
    "reft_r1": Bench.reft,
    LEARNT: Bench.learnt,
    "neuron": Bench.neuron,
    "component": Bench.component,
    "random_latent": Bench.random_latent,
    "random_direction": Bench.random_direction,
    OF_UNTRAINED: Bench.untrained,
    "permuted_labels": Bench.permuted,
    "unsteered": Bench.unsteered,
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
