"""Generation in every mode, against sequences that are computed alone and without a cache.

The models are tiny and in float64, so that a token differs only where something is wrong.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from steerlora.methods.routed_lora.config import CONTEXTS

NEW = 5
PROMPTS = (7, 4, 5)

BASE = {"sites": (0, 1), "source": "base"}
CASES = {
    "lora": {"signal": "none"},
    **{f"linear {name}": {"context": name} for name in CONTEXTS},
    **{f"prototype {name}": {"context": name, "router": "prototype"} for name in CONTEXTS},
    "mlp": {"context": "causal_mean", "router": "mlp", "router_hidden": 6, "per_module": True},
    "reweighted": {"context": "ema", "prototypes": True},
    "dense": {"signal": "dense", "context": "causal_mean"},
    "soft": {"signal": "dense", "context": "ema", "router": "prototype", "hard_gate": False},
    "base token": {"context": "token", **BASE},
    "base causal_mean": {"context": "causal_mean", **BASE},
    "base_last": {"signal": "dense", "context": "ema", "sites": (0, 1), "source": "base_last"},
}
POOLED = [name for name, case in CASES.items() if case.get("context", "token") != "token"]


@pytest.fixture
def make(make_model, make_adapter):
    """``make("linear ema")``: a model of two layers with that adapter, and the adapter."""

    def made(name: str):
        case = {"decay": 0.8, "margin": 0.01} | CASES[name]
        model = make_model(torch.float64, num_hidden_layers=2)
        adapter = make_adapter(model, case.pop("signal", "sae"), case.pop("sites", (1,)), **case)
        generator = torch.Generator().manual_seed(3)
        for sae in adapter.saes.values():
            sae.double()
        for router in adapter.routers.values():
            if getattr(router, "prototypes", None) is None:
                continue
            rows = torch.rand(5, 4, router.prototypes.shape[1], generator=generator).double()
            if adapter.config.by_prototype:
                for specialist in range(4):
                    router.fit(specialist, rows[specialist])
                router.fit(None, rows[4])
            else:
                router.set_prototypes(rows[:, 0])
        return model, adapter

    return made


@pytest.fixture(params=CASES)
def adapted(request, make):
    return make(request.param)


@pytest.fixture(params=POOLED)
def pooled(request, make):
    return make(request.param)


def prompts(lengths=PROMPTS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 60, (length,), generator=generator) for length in lengths]


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """A batch as generation has it, with the padding on the left."""
    width = max(map(len, rows))
    pads = [torch.zeros(width - len(row), dtype=torch.long) for row in rows]
    ids = torch.stack([torch.cat([pad, row]) for pad, row in zip(pads, rows, strict=True)])
    mask = torch.stack(
        [torch.cat([p, torch.ones_like(r)]) for p, r in zip(pads, rows, strict=True)]
    )
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def greedily(model, prompt: Tensor, new: int = NEW) -> Tensor:
    """The tokens that follow a prompt, each from a forward of all before it."""
    ids = prompt
    for _ in range(new):
        best = model(ids[None], use_cache=False).logits[0, -1].argmax()
        ids = torch.cat([ids, best[None]])
    return ids[len(prompt) :]


def written(model, inputs: dict[str, Tensor], **settings) -> Tensor:
    """[B, new tokens]."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | settings
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]


GREEDY = {
    "greedy": {},
    "chunked prefill": {"prefill_chunk_size": 3},
    "static cache": {"prefill_chunk_size": 4, "cache_implementation": "static"},
}


@pytest.mark.parametrize("mode", GREEDY)
def test_a_batch_is_written_as_each_alone(adapted, mode):
    model, _ = adapted
    rows = prompts()
    found = written(model, padded(rows), **GREEDY[mode])
    assert torch.equal(found, torch.stack([greedily(model, row) for row in rows]))


def test_samples_are_those_without_a_cache(adapted):
    model, _ = adapted
    inputs, drawn = padded(prompts((6,))), []
    for use_cache in (True, False):
        torch.manual_seed(5)
        chosen = {"do_sample": True, "num_return_sequences": 3, "use_cache": use_cache}
        drawn.append(written(model, inputs, **chosen))
    assert torch.equal(*drawn)
    assert len(drawn[0].unique(dim=0)) == 3


def test_beams_are_those_of_each_alone_without_a_cache(adapted):
    model, _ = adapted
    rows = prompts((6, 4))
    settings = {
        **{"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 2 * NEW},
        **{"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True},
        "output_scores": True,
    }
    together = model.generate(**padded(rows), **settings)
    for row, prompt in enumerate(rows):
        alone = model.generate(**padded([prompt]), use_cache=False, **settings)
        own = slice(2 * row, 2 * row + 2)
        new = together.sequences[own, -2 * NEW :]
        assert torch.equal(new, alone.sequences[:, -2 * NEW :])
        torch.testing.assert_close(together.sequences_scores[own], alone.sequences_scores)


@pytest.mark.parametrize("helper", ["prompt", "base", "adapted"])
def test_assisted_generation_writes_what_the_model_alone_does(adapted, helper):
    """Candidates that are refused are cropped from the cache, of the assistant as well."""
    model, adapter = adapted
    (prompt,) = prompts((5,))
    prompt = prompt.repeat(2)
    expected = greedily(model, prompt, 2 * NEW)
    how = {"prompt_lookup_num_tokens": 3}
    if helper != "prompt":
        assistant, method = copy.deepcopy((model, adapter))
        if helper == "base":
            method.remove()
        else:  # a worse one, so that some of its tokens are refused
            for layer in method.layers.values():
                layer.B.data *= 0.5
        how = {"assistant_model": assistant}
    found = written(model, padded([prompt]), max_new_tokens=2 * NEW, **how)
    assert torch.equal(found[0], expected)


def turn(model, ids: Tensor, cache, seed: int):
    """One more prompt and its answer in a chat: all ids so far, and the cache."""
    ids = torch.cat([ids, prompts((3,), seed)[0]])
    output = model.generate(
        **padded([ids]),
        **{"past_key_values": cache, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0},
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences[0, len(ids) :], greedily(model, ids, 4))
    return output.sequences[0], output.past_key_values


def test_chats_go_on_in_turn(adapted):
    model, _ = adapted
    chats = [(torch.zeros(0, dtype=torch.long), DynamicCache(config=model.config))] * 2
    chats = [(ids, copy.deepcopy(cache)) for ids, cache in chats]
    for number in range(3):
        for which in (0, 1):
            chats[which] = turn(model, *chats[which], seed=2 * number + which)


@torch.no_grad()
def last_logits(model, ids: Tensor, **inputs) -> Tensor:
    return model(ids, **inputs).logits[:, -1]


def alone(model, ids: Tensor) -> Tensor:
    """The logits after each row of ids, without a cache, [B, V]."""
    return torch.cat([last_logits(model, row[None], use_cache=False) for row in ids])


@pytest.mark.parametrize("cache_type", ["made by the model", "grown by number"])
def test_whatever_is_done_to_a_cache_its_tokens_keep_their_state(adapted, cache_type):
    """The operations of a cache one after the other, each on top of the others."""
    model, _ = adapted
    ids = torch.stack(prompts((6, 6)))
    given = None if cache_type == "made by the model" else DynamicCache()
    with torch.no_grad():
        prefix = model(ids, use_cache=True, past_key_values=given).past_key_values
    more = torch.stack(prompts((2, 2, 2, 2, 2, 2), seed=1))
    for _ in range(2):  # a prefix that is copied is there to be used again
        cache, now = copy.deepcopy(prefix), ids

        def go_on(now: Tensor, new: Tensor, cache=cache) -> Tensor:
            now = torch.cat([now, new], 1)
            found = last_logits(model, new, past_key_values=cache, use_cache=True)
            torch.testing.assert_close(found, alone(model, now))
            return now

        now = go_on(now, more[:2])
        cache.batch_repeat_interleave(3)
        now = go_on(now.repeat_interleave(3, 0), more)
        order = torch.tensor([5, 0, 3, 3, 1, 2])
        cache.reorder_cache(order)
        now = go_on(now[order], more)
        cache.crop(-3)
        now = go_on(now[:, :-3], more)
        kept = torch.tensor([4, 2])
        cache.batch_select_indices(kept)
        cache.crop(0)
        now = go_on(now[kept], more[2:4])
        cache.crop(-now.shape[1] + 1)
        now = go_on(now[:, :1], more[2:4])
        cache.reset()
        go_on(now[:, :0], more[:2])


def test_a_cache_that_others_filled_is_refused(pooled):
    model, adapter = pooled
    (ids,) = prompts((6,))
    with adapter.disabled():
        cache = model(ids[None], use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="has not seen"):
        model(ids[None, :1], past_key_values=cache)
    cache = model(ids[None], use_cache=True).past_key_values
    with adapter.disabled():  # one token that the adapter does not see
        model(ids[None, :1], past_key_values=cache)
    with pytest.raises(RuntimeError, match="has not seen"):
        model(ids[None, :1], past_key_values=cache)


def test_pages_of_continuous_batching_are_refused(pooled):
    model, _ = pooled
    (ids,) = prompts((6,))
    with pytest.raises(RuntimeError, match=r"continuous batching.*use generate\(\)"):
        model(ids[None], use_cache=False, cache=object())


def test_a_cache_is_not_held_after_the_forward(adapted):
    """It may be most of a GPU's memory."""
    model, adapter = adapted
    (ids,) = prompts((6,))
    cache = model(ids[None], use_cache=True).past_key_values
    model(ids[None, :1], past_key_values=cache)
    forward = adapter.forward_state
    assert forward.cache is None
    assert forward.base_cache is None
    assert all(found.seen is found.state is None for found in forward.sites.values())


def test_threads_do_not_mix_their_forwards(adapted):
    model, adapter = adapted
    rows = prompts((5, 9, 7), seed=2)
    expected = [greedily(model, row, 4) for row in rows]
    with adapter.disabled():
        base = greedily(model, rows[0], 4)
    found: dict[int, list] = {number: [] for number in range(4)}

    def write(number: int) -> None:
        for _ in range(2):
            if number == 3:
                with adapter.disabled():
                    found[number].append(greedily(model, rows[0], 4))
            else:
                found[number].append(written(model, padded([rows[number]]), max_new_tokens=4)[0])

    threads = [threading.Thread(target=write, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, want in enumerate([*expected, base]):
        assert len(found[number]) == 2
        assert all(torch.equal(got, want) for got in found[number]), number
