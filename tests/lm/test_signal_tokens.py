"""Which tokens carry a signal, against a loop over tokens, and in a model's forwards."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from steerlora.lm.forwards import ForwardArguments
from steerlora.lm.signal_tokens import SignalTokens

RULE = SignalTokens(prefix=(7, 8, 9), special=(1, 2), first=True)
HEADER = [7, 8, 9]


def slowly(sequence: list[int], rule: SignalTokens = RULE) -> list[bool]:
    """Of one sequence, token by token, from the definition."""
    found = []
    for place, token in enumerate(sequence):
        in_header = place < len(rule.prefix) and token == rule.prefix[place]
        found.append(not (in_header or token in rule.special or (rule.first and place == 0)))
    return found


SEQUENCES = [
    [*HEADER, 20, 1, 21, 2],
    [20, 21, 7, 8, 9],  # raw text, with the header's words in another place
    [20, 8, 21],  # raw text that has one of them in its place
    [*HEADER],
    [30],
    [*HEADER, *HEADER, 5],
]


@pytest.mark.parametrize(
    "rule",
    [
        RULE,
        SignalTokens(),
        SignalTokens(first=True),
        SignalTokens(prefix=(7, 8)),
        SignalTokens(special=(9,)),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_it_equals_a_loop_over_tokens_under_padding(rule, side):
    width = 9
    ids, mask = torch.full((len(SEQUENCES), width), 7), torch.zeros(len(SEQUENCES), width)
    expected = torch.zeros(len(SEQUENCES), width, dtype=torch.bool)
    for row, sequence in enumerate(SEQUENCES):
        where = slice(width - len(sequence), width) if side == "left" else slice(len(sequence))
        ids[row, where], mask[row, where] = torch.tensor(sequence), 1
        expected[row, where] = torch.tensor(slowly(sequence, rule))
    assert torch.equal(rule(ids, mask), expected)


def test_it_equals_a_loop_over_tokens_in_a_packed_row():
    joined = [token for sequence in SEQUENCES for token in sequence]
    places = [place for sequence in SEQUENCES for place in range(len(sequence))]
    expected = [kept for sequence in SEQUENCES for kept in slowly(sequence)]
    ids = torch.tensor([[*joined, 7, 7]])
    positions = torch.tensor([[*places, -1, -1]])
    found = RULE(ids, positions >= 0, positions)
    assert found.tolist() == [[*expected, False, False]]


def test_where_only_embeddings_are_known_the_place_says_it():
    real = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert RULE(None, real).int().tolist() == [[0, 0, 1], [0, 1, 1]]


def cache_of(tokens: int) -> DynamicCache:
    cache = DynamicCache()
    keys = torch.zeros(2, 1, tokens, 4)
    cache.update(keys, keys, 0)
    return cache


@pytest.mark.parametrize("pieces", [[8], [2, 6], [1] * 8, [4, 1, 3]])
@pytest.mark.parametrize("given", ["mask", "positions", "layers", "nothing"])
def test_pieces_of_a_cache_equal_the_whole(pieces, given):
    """Chunked prefill and decoding, with what transformers hands a decoder in each case."""
    left = 0 if given == "nothing" else 3
    sequences = [[*HEADER, 20, 1, 21, 2, 8], SEQUENCES[1] if left else [*HEADER, *SEQUENCES[1]]]
    ids = torch.full((2, 8), 0)
    mask = torch.zeros(2, 8, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, 8 - len(sequence) :], mask[row, 8 - len(sequence) :] = torch.tensor(sequence), 1
    expected = [[False] * (8 - len(row)) + slowly(row) for row in sequences]
    found, past = [], 0
    for length in pieces:
        now = slice(past, past + length)
        arguments = {"input_ids": ids[:, now], "past_key_values": cache_of(past) if past else None}
        if given in ("mask", "positions"):
            arguments["attention_mask"] = mask[:, : past + length]
        if given == "positions":
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, now]
        if given == "layers":
            seen = torch.ones(8, 8).tril().bool() & mask.bool()[:, None]
            arguments["attention_mask"] = seen[:, None, now, : past + length]
        forward = ForwardArguments()
        forward.note(arguments)
        found.append(forward.signal_tokens(torch.zeros(2, length, 4), RULE))
        past += length
    assert torch.cat(found, 1).tolist() == expected
