"""How the micro world's responses are scored: do they obey, and is an answer right?

The scores of instructions are IFEval's (Zhou et al. 2023, arXiv 2311.07911, section 3): strict and
loose, per instruction and per prompt. A verifier sees the response and the instruction's arguments,
nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

MARKS = frozenset({",", '"', "."})


def words_of(response: str) -> list[str]:
    """The words of a response, without marks."""
    return [word for word in response.split() if word not in MARKS]


def _frequency(response: str, *, keyword: str, frequency: int, **_: object) -> bool:
    return words_of(response).count(keyword) == frequency


def _reverse(response: str, *, words: Sequence[str], **_: object) -> bool:
    written, wanted = words_of(response), list(words)[::-1]
    starts = range(len(written) - len(wanted) + 1)
    return any(written[start : start + len(wanted)] == wanted for start in starts)


def _category(response: str, *, members: Sequence[str], number: int, **_: object) -> bool:
    named = [word for word in words_of(response) if word in set(members)]
    return len(named) == number == len(set(named))


def _number_words(response: str, *, number: int, **_: object) -> bool:
    return len(words_of(response)) == number


def _start_word(response: str, *, word: str, **_: object) -> bool:
    return words_of(response)[:1] == [word]


def _end_word(response: str, *, word: str, **_: object) -> bool:
    return words_of(response)[-1:] == [word]


def _quotation(response: str, **_: object) -> bool:
    written = response.split()
    return len(written) > 2 and written[0] == written[-1] == '"'


def _existence(response: str, *, keyword: str, **_: object) -> bool:
    return keyword in words_of(response)


def _forbidden(response: str, *, keyword: str, **_: object) -> bool:
    return keyword not in words_of(response)


def _comma(response: str, **_: object) -> bool:
    written = [word for word in response.split() if word not in MARKS - {","}]
    commas = [number for number, word in enumerate(written) if word == ","]
    return len(written) > 1 and commas == list(range(1, len(written) - 1, 2)) and len(written) % 2


VERIFIERS: dict[str, Callable[..., bool]] = {
    "keywords:frequency": _frequency,
    "order:reverse": _reverse,
    "content:category": _category,
    "length:number_words": _number_words,
    "startend:start_word": _start_word,
    "startend:end_word": _end_word,
    "startend:quotation": _quotation,
    "keywords:existence": _existence,
    "keywords:forbidden": _forbidden,
    "punctuation:comma": _comma,
}


def follows(response: str, instruction: str, arguments: Mapping) -> bool:
    """Whether a response obeys one instruction; an empty response obeys none.

    Args:
        response: what the model wrote.
        instruction: a key of `VERIFIERS`.
        arguments: its arguments; those that are None are absent (a dataset's columns are shared).
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    return bool(response.strip()) and bool(VERIFIERS[instruction](response, **given))


def loose_variants(response: str) -> list[str]:
    """The response, and without its first or last sentence: what a courtesy would add.

    IFEval drops lines; the micro world has no lines, so sentences stand in.
    """
    sentences = [part.strip() for part in response.split(" . ")]
    parts = (sentences, sentences[1:], sentences[:-1], sentences[1:-1])
    return [response, *(" . ".join(part) for part in parts[1:])]


def process_results(document: Mapping, results: Sequence[str]) -> dict[str, float]:
    """lm-eval's hook: the four IFEval scores of one prompt.

    Every prompt of a set gives equally many instructions, so the mean over prompts of the share
    obeyed is instruction-level accuracy, and its standard error is over prompts (instructions of
    one prompt are not independent).
    """
    response = results[0]
    asked = list(zip(document["instruction_id_list"], document["kwargs"], strict=True))
    strict = [follows(response, *instruction) for instruction in asked]
    variants = loose_variants(response)
    loose = [any(follows(text, *instruction) for text in variants) for instruction in asked]
    return {
        "prompt_level_strict_acc": float(all(strict)),
        "inst_level_strict_acc": sum(strict) / len(strict),
        "prompt_level_loose_acc": float(all(loose)),
        "inst_level_loose_acc": sum(loose) / len(loose),
    }


def exact_match(document: Mapping, results: Sequence[str]) -> dict[str, float]:
    """lm-eval's hook: 1.0 where the answer is the response, word for word.

    A worked solution ends in `#### answer`, as in GSM8K; only what follows the mark counts.
    """
    wanted, written = document["response"].split(), results[0].split()
    if "####" in wanted:
        wanted = wanted[wanted.index("####") :]
        written = written[written.index("####") :] if "####" in written else []
    return {"exact_match": float(wanted == written)}
