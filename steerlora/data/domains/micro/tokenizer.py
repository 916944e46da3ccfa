"""The micro world's tokenizer: one token a word, a chat template, an ordinary HF tokenizer."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from steerlora.data.domains.micro import words

PAD, UNKNOWN, END = "<|pad|>", "<|unknown|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] + ' <|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

MAX_LENGTH = 256
"""Longest sequence in tokens: far above any row, so that nothing is cut."""


def build_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Make the tokenizer of every micro world and save it.

    Its vocabulary is the world's: the unknown token exists because the format wants one, and
    no text of the world needs it. `<|end|>` ends every turn and is the end-of-sequence token.

    Args:
        directory: where `save_pretrained` writes it; `AutoTokenizer` loads it from there.
    """
    special = (PAD, UNKNOWN, END, *ROLES)
    vocabulary = {word: number for number, word in enumerate((*special, *words.vocabulary()))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return tokenizer
