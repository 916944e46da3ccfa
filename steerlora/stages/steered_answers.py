"""Answers of a model as it is at the time, steered or not, and their grades.

P prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from steerlora.data.chat import encode_chats
from steerlora.data.conversations import exchange
from steerlora.data.domains.micro.concepts import (
    Prompt,
    concept_grade,
    instruction_grade,
    repeats,
)
from steerlora.data.domains.micro.world import World
from steerlora.evaluation.cross_entropy import heldout_cross_entropy
from steerlora.evaluation.steering import PARTS, Fluency
from steerlora.methods.base import Method

LONGEST = 12
"""Tokens of an answer: more than any of this world has."""
MAX_LENGTH = 256
BATCH_SIZE = 256


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: Sequence[str], seed: int) -> list[str]:
    """An answer to each prompt, drawn at temperature 1."""
    rows = encode_chats(tokenizer, [exchange(prompt, ".") for prompt in prompts], MAX_LENGTH)
    ids = [row.input_ids[: row.response_start] for row in rows]
    width = max(map(len, ids))
    padded = [[tokenizer.pad_token_id] * (width - len(row)) + row for row in ids]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in ids]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = model.generate(
            torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=LONGEST,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[:, width:]
    return [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]


class Judge:
    """Grades answers by the rules of the micro world, and fluency by the base.

    An answer's likelihood is that per token, its end included, behind the prompt or behind one that
    the concept follows from: what makes it unlikely is then not the concept. What counts as fluent
    is calibrated on unsteered answers to prompts of the same form.

    Args:
        model: the base; a method that is attached is switched off for likelihoods.
        tokenizer: its.
        world: of the prompts.
        prompts: whose unsteered answers say what is fluent; of every form that is to be graded.
        seed: of the unsteered answers.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, world: World, prompts: Sequence[Prompt], seed: int
    ) -> None:
        self.model, self.tokenizer, self.world = model, tokenizer, world
        found = self.likelihoods(prompts, self.answer(prompts, seed))
        forms: dict[str, list[float]] = {}
        for prompt, likelihood in zip(prompts, found, strict=True):
            forms.setdefault(prompt.asks, []).append(likelihood)
        self.fluency = {asks: Fluency.of(own) for asks, own in forms.items()}

    def answer(self, prompts: Sequence[Prompt], seed: int) -> list[str]:
        """The model's answers, as it is now."""
        return answers(self.model, self.tokenizer, [prompt.text for prompt in prompts], seed)

    def likelihoods(
        self, prompts: Sequence[Prompt], said: Sequence[str], method: Method | None = None
    ) -> list[float]:
        """[P] log-likelihood in nats a token."""
        pairs = [
            exchange(text, answer)
            for prompt, answer in zip(prompts, said, strict=True)
            for text in (prompt.text, prompt.natural)
        ]
        with method.disabled() if method is not None else nullcontext():
            items = heldout_cross_entropy(
                self.model,
                self.tokenizer,
                pairs,
                batch_size=BATCH_SIZE,
                max_length=MAX_LENGTH,
            ).per_item
        each = [-nats / tokens for nats, tokens in items]
        return [max(pair) for pair in zip(each[::2], each[1::2], strict=True)]

    def grades(
        self, prompts: Sequence[Prompt], said: Sequence[str], method: Method | None = None
    ) -> dict[str, list[int]]:
        """{part: [P]}"""
        fluency = [
            0 if repeats(answer) else self.fluency[prompt.asks].grade(likelihood)
            for prompt, answer, likelihood in zip(
                prompts, said, self.likelihoods(prompts, said, method), strict=True
            )
        ]
        by_rule = [
            [rule(self.world, prompt, answer) for prompt, answer in zip(prompts, said, strict=True)]
            for rule in (concept_grade, instruction_grade)
        ]
        return dict(zip(PARTS, (*by_rule, fluency), strict=True))
