"""A byte-level BPE for a small base model of real text, with a chat template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from steerlora.data.conversations import from_row
from steerlora.data.jsonl import read_objects
from steerlora.errors import UserError

PAD = "<|pad|>"
END_OF_TURN = "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_BYTES = 256


def build_tokenizer(directory: Path, *, vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """Train a tokenizer on the pretraining text of a domains artifact.

    Bytes are the alphabet, so any text is encoded without an unknown token and decoded as it was.
    Digits are split one by one, as Qwen's tokenizers do. Each role is one special token and
    ``<|end|>`` ends a turn, which is what generation stops at.

    Args:
        directory: the domains artifact; ``pretrain.jsonl`` is read.
        vocabulary: most entries, special tokens included; fewer if the text is too small for them.

    Returns:
        A tokenizer that ``save_pretrained`` and ``AutoTokenizer`` understand. Deterministic.

    Raises:
        UserError: ``vocabulary`` has no room for the bytes and the special tokens.
    """
    special = [PAD, END_OF_TURN, *ROLES]
    least = _BYTES + len(special)
    if vocabulary < least:
        raise UserError(f"a vocabulary of {vocabulary} is too small; bytes alone take {least}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(directory / "pretrain.jsonl"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END_OF_TURN,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _texts(path: Path) -> Iterator[str]:
    for _, row in read_objects(path):
        yield from (turn.content for turn in from_row(row))
