"""One replicate of stage ``routing_signals``: its texts, and what each signal tells of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steerlora.data.chat import EncodedChat, encode_chats
from steerlora.data.conversations import exchange
from steerlora.data.domains.micro.alike import AlikeDomains, best_accuracy
from steerlora.data.headers import signal_tokens_of
from steerlora.engine.steps import Context
from steerlora.evaluation.routing_signals import (
    DOMAINS,
    NOISE,
    ROWS,
    SHARED,
    SIGNALS,
    TOKENS,
    Pair,
    RoutingSignals,
)
from steerlora.saes.saelens import load_sae
from steerlora.stages import sae_training
from steerlora.stages.common import domain_names, load_base, read_rows
from steerlora.stages.routing_signals_measures import (
    Found,
    SignalReader,
    accuracy,
    likeness,
    ordinary_tokens,
    with_noise,
)

if TYPE_CHECKING:
    from steerlora.stages.routing_signals import RoutingSignalsSettings

SUBSETS = 3
"""Sets of domains over which the accuracy at fewer domains is a mean."""

_Rows = dict[int, list[EncodedChat]]
"""{domain: its prompts}."""
_Read = dict[int, Found]
"""{domain: its signals}."""


class Study:
    """Measures a replicate.

    Args:
        context: of the stage.
    """

    def __init__(self, context: Context) -> None:
        settings: RoutingSignalsSettings = context.config
        self.settings = settings
        self.context, self.levels = context, settings.levels
        model, self.tokenizer = load_base(
            context.inputs["base"], accelerator=settings.accelerator, spread=settings.spread
        )
        self.rule = signal_tokens_of(self.tokenizer)
        self.read = SignalReader(
            model,
            load_sae(context.inputs["sae"] / sae_training.FOLDER),
            settings.site,
            self.rule,
            self.tokenizer.pad_token_id,
            settings.seed,
        )
        self.alike = AlikeDomains(settings.seed)

    def record(self, advance: Callable[..., None]) -> RoutingSignals:
        settings = self.settings
        most = max([settings.domains, *map(int, self.levels.get(DOMAINS, ()))])
        rows = max([settings.rows, *map(int, self.levels.get(ROWS, ()))])
        train, test = self._texts(most, rows, settings.shared)
        lengths = [*map(int, self.levels.get(TOKENS, ())), None]
        fitted = {d: self.read(own, [None]) for d, own in train.items()}
        scored = {d: self.read(own, lengths) for d, own in test.items()}
        advance(note="texts")
        chosen = range(settings.domains)
        found: dict[str, dict[str, list[float]]] = {}
        for name, levels in self.levels.items():
            if name == TOKENS:
                by_length = self._told(fitted, scored, chosen)
                found[name] = {signal: values[:-1] for signal, values in by_length.items()}
            elif name == NOISE:
                found[name] = self._told(fitted, self._in_noise(test), chosen)
            else:
                whole = {d: _last(own) for d, own in scored.items()}
                each = [self._at(name, level, fitted, whole) for level in levels]
                found[name] = {signal: [one[signal] for one in each] for signal in SIGNALS}
            advance(note=name)
        return RoutingSignals(
            model=settings.model,
            method=settings.method.name,
            seed=settings.seed,
            fingerprint=self.context.fingerprint,
            site=settings.site,
            levels={name: list(levels) for name, levels in self.levels.items()},
            accuracy=found,
            chance={name: [1 / n for n in self._domains(name)] for name in self.levels},
            best=self._best(),
            pairs=() if settings.made else self._pairs(train, fitted, scored),
            items=sum(len(test[d]) for d in chosen),
        )

    def _in_noise(self, test: _Rows) -> _Read:
        """The texts at every level of noise, in the place of lengths."""
        words, seed = ordinary_tokens(self.tokenizer), self.settings.seed
        found: _Read = {}
        for d in range(self.settings.domains):
            each = [
                self.read(with_noise(test[d], level, self.rule, words, seed + d), [None])
                for level in self.levels[NOISE]
            ]
            found[d] = {signal: torch.cat([one[signal] for one in each], 1) for signal in SIGNALS}
        return found

    def _at(self, name: str, level: float, fitted: _Read, whole: _Read) -> dict[str, float]:
        """{signal: accuracy} on whole texts at one level of a condition."""
        settings, chosen = self.settings, range(self.settings.domains)
        if name == DOMAINS:
            return self._of_fewer(int(level), fitted, whole)
        if name == SHARED:
            train, test = self._texts(settings.domains, settings.rows, level)
            fitted, whole = (
                {d: self.read(own, [None]) for d, own in part.items()} for part in (train, test)
            )
        rows = int(level) if name == ROWS else settings.rows
        return {s: v[0] for s, v in self._told(fitted, whole, chosen, rows).items()}

    def _of_fewer(self, count: int, fitted: _Read, whole: _Read) -> dict[str, float]:
        """Mean over sets of so many domains."""
        rng, every = random.Random(self.settings.seed), range(len(fitted))
        sets = [
            sorted(rng.sample(every, count)) for _ in range(SUBSETS if count < len(every) else 1)
        ]
        told = [self._told(fitted, whole, own) for own in sets]
        return {s: sum(one[s][0] for one in told) / len(told) for s in SIGNALS}

    def _told(
        self, fitted: _Read, scored: _Read, domains: Sequence[int], rows: int | None = None
    ) -> dict[str, list[float]]:
        """{signal: accuracy at every length} of some domains, from so many training rows each."""
        settings, rows = self.settings, rows or self.settings.rows

        def of(read: Mapping[int, Found], signal: str) -> dict[int, Tensor]:
            return {d: read[d][signal] for d in domains}

        return {
            signal: accuracy(
                settings.method,
                {d: own[:rows, -1] for d, own in of(fitted, signal).items()},
                of(scored, signal),
                settings.seed,
            )
            for signal in SIGNALS
        }

    def _pairs(self, train: _Rows, fitted: _Read, scored: _Read) -> tuple[Pair, ...]:
        names, size = self.settings.names, len(self.tokenizer)
        whole = {d: _last(own) for d, own in scored.items()}
        return tuple(
            Pair(
                domains=(names[one], names[other]),
                likeness=likeness(train[one], train[other], size),
                accuracy={s: v[0] for s, v in self._told(fitted, whole, (one, other)).items()},
            )
            for one, other in combinations(range(len(names)), 2)
        )

    def _texts(self, domains: int, rows: int, shared: float) -> tuple[_Rows, _Rows]:
        """Prompts to fit the rule to, and to test it on."""
        settings = self.settings
        if settings.made:
            wording = {"sentences": settings.sentences, "shared": shared}
            found = [
                {
                    d: self.alike.prompts(d, count, **wording, seed=2 * settings.seed + part)
                    for d in range(domains)
                }
                for part, count in enumerate((rows, settings.test_rows))
            ]
            turns = [
                {d: [exchange(one, "?") for one in own] for d, own in part.items()}
                for part in found
            ]
        else:
            source, turns = self.context.inputs["domains"], [{}, {}]
            rng = random.Random(f"routing signals {settings.seed}")
            for d, name in enumerate(domain_names(source)):
                for part, folder, count in ((0, "train", rows), (1, "heldout", settings.test_rows)):
                    own = read_rows(source / f"{folder}/{name}.jsonl")
                    turns[part][d] = rng.sample(own, min(count, len(own)))
        train, test = ({d: self._prompts(own) for d, own in part.items()} for part in turns)
        return train, test

    def _prompts(self, turns: Sequence[Any]) -> list[EncodedChat]:
        encoded = encode_chats(self.tokenizer, turns, self.settings.max_length)
        return [EncodedChat(row.input_ids[: row.response_start], 0) for row in encoded]

    def _domains(self, name: str) -> list[int]:
        """How many domains there are at every level of a condition."""
        levels = self.levels[name]
        return [int(n) if name == DOMAINS else self.settings.domains for n in levels]

    def _best(self) -> dict[str, list[float]]:
        settings = self.settings
        if not settings.made:
            return {}
        # Of fewer tokens and of noise it is not known.
        return {
            name: [
                best_accuracy(n, settings.sentences, level if name == SHARED else settings.shared)
                for n, level in zip(self._domains(name), levels, strict=True)
            ]
            for name, levels in self.levels.items()
            if name in (SHARED, DOMAINS, ROWS)
        }


def _last(read: Found) -> Found:
    """Whole texts alone."""
    return {signal: own[:, -1:] for signal, own in read.items()}
