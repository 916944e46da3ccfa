"""Where latents are active, against a loop over tokens; and the page, whose text is text."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from steerlora.reporting.dashboards import (
    BINS,
    ContextShown,
    LatentShown,
    LogitEffect,
    dashboard_page,
)
from steerlora.reporting.latent_activity import AFTER, BEFORE, Batch, Seen, pieces
from steerlora.saes.sparse import SparseFeatures

LATENTS, K, VOCABULARY = 12, 3, 40


class Words:
    """Token 7 reads " w7"."""

    def decode(self, ids) -> str:
        return "".join(f" w{number}" for number in ids)

    def __len__(self) -> int:
        return VOCABULARY


def batch(lengths: list[int], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    ids = torch.randint(VOCABULARY, shape, generator=generator)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    mask[:, 0] = False
    row, position = mask.nonzero(as_tuple=True)
    values = torch.rand(len(row), K, generator=generator) - 0.3
    order = torch.rand(len(row), LATENTS, generator=generator).argsort(1)
    features = SparseFeatures(values.relu(), order[:, :K])
    return Batch(features, row, position, ids, torch.tensor(lengths))


def by_hand(batches: list[tuple[str, Batch]], latent: int):
    """[(domain, ids of the row, {position: activation})] of every row, and values by domain."""
    rows, values = [], {}
    for source, one in batches:
        dense = one.features.dense(LATENTS)[:, latent]
        for number, length in enumerate(one.lengths.tolist()):
            own = {
                int(p): float(v)
                for r, p, v in zip(one.row, one.position, dense, strict=True)
                if r == number
            }
            rows.append((source, one.input_ids[number, :length].tolist(), own))
            values.setdefault(source, []).extend(own.values())
    return rows, values


@pytest.mark.parametrize("latents", [[4], [9, 0, 4]])
def test_what_is_seen_is_what_a_loop_over_tokens_sees(latents):
    batches = [("law", batch([30, 9, 2], 0)), ("math", batch([12, 40], 1)), ("law", batch([7], 2))]
    seen = Seen(latents, LATENTS, contexts=3)
    for source, one in batches:
        seen.update(source, one)
    effects = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3))
    for latent in latents:
        found = seen.latent(latent, "law", Words(), effects)
        rows, values = by_hand(batches, latent)
        everything = values["law"] + values["math"]
        active = [value for value in everything if value > 0]
        assert found.density == pytest.approx(len(active) / len(everything))
        for domain, own in values.items():
            share = sum(value > 0 for value in own) / len(own)
            assert found.density_by_domain[domain] == pytest.approx(share)
        assert found.largest == pytest.approx(max(active))
        assert sum(found.histogram) == len(active)
        assert len(found.histogram) == BINS
        best = sorted(rows, key=lambda row: max(row[2].values()), reverse=True)[:3]
        for context, (source, ids, own) in zip(found.contexts, best, strict=True):
            position = max(own, key=own.get)
            assert (context.source, context.value) == (source, pytest.approx(own[position]))
            window = range(max(0, position - BEFORE), min(len(ids), position + AFTER + 1))
            assert context.tokens == tuple(f" w{ids[place]}" for place in window)
            shown = [own.get(place, 0.0) for place in window]
            assert context.activations == pytest.approx(shown)
            assert window[context.marked] == position
        assert found.promoted[0].token == f" w{int(effects.argmax())}"
        assert found.suppressed[0].token == f" w{int(effects.argmin())}"
        assert found.suppressed[0].effect == pytest.approx(float(effects.min()))


def test_a_latent_that_is_never_active_has_a_page_too():
    seen = Seen([LATENTS - 1], LATENTS, contexts=3)
    one = batch([5], 0)
    features = SparseFeatures(one.features.values, torch.zeros_like(one.features.indices))
    seen.update("law", one._replace(features=features))
    found = seen.latent(LATENTS - 1, "", Words(), torch.zeros(VOCABULARY))
    assert (found.density, found.largest, found.contexts) == (0.0, 0.0, ())
    assert "Never active" in dashboard_page([found], title="a", tokens=4)


def test_a_character_of_several_tokens_is_the_last_one_s(make_tokenizer):
    tokenizer = make_tokenizer()
    text = "a café, naïve €"
    ids = tokenizer(text)["input_ids"]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == text
    assert found[-3:] == ["", "", "€"]


HOSTILE = "<script>alert(1)</script>\"'&{{ 7 * 7 }}\x1b[31m"


def shown(text: str) -> LatentShown:
    context = ContextShown(
        value=2.0, source=text, tokens=(text, " b", "\n"), activations=(0.0, 2.0, 1.0), marked=1
    )
    effect = LogitEffect(token=text, effect=-0.5)
    return LatentShown(
        latent=7,
        domain=text,
        density=0.25,
        density_by_domain={text: 0.25},
        largest=2.0,
        histogram=(0, 3, 1),
        contexts=(context,),
        promoted=(effect,),
        suppressed=(effect,),
    )


class Reader(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.marked, self.addresses, self.words = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        names = ("src", "href", "srcset", "xlink:href")
        self.addresses += [value for name, value in attributes if name in names]

    def handle_data(self, data):
        self.words.append(data)
        if self.tags and self.tags[-1] == "mark" and data.strip():
            self.marked.append(data)
            self.tags.append("")


def test_text_of_a_page_is_text_and_nothing_is_fetched():
    hostile = Reader(page := dashboard_page([shown(HOSTILE)], title=HOSTILE, tokens=9))
    plain = Reader(dashboard_page([shown("plain")], title="plain", tokens=9))
    assert hostile.tags == plain.tags
    assert all(address.startswith(("#", "data:")) for address in hostile.addresses)
    assert "\x1b" not in page
    assert "{{ 7 * 7 }}" in page
    assert hostile.marked == [" b"]
    assert any("<script>alert(1)</script>" in words for words in hostile.words)


def test_numbers_of_a_page_are_those_of_the_records():
    page = dashboard_page([shown("a"), replace(shown("b"), latent=8)], title="t", tokens=12345)
    for expected in ("2 latents on 12345 tokens", "-0.500", "0, 3, 1", 'id="latent-8"'):
        assert expected in page
    assert page.index('id="latent-7"') < page.index('id="latent-8"')
