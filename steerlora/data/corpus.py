"""Any text as a source of tokens: documents, one after the other, in windows of a context's length.

Shapes: B batch, S window length.

A corpus is a file of rows with ``text`` (``.jsonl``, ``.jsonl.gz``), a plain text file, a folder of
such files, or a dataset of the Hugging Face hub with a column ``text``. It is read as a stream, no
further than tokens are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from steerlora.data.jsonl import SUFFIXES, read_objects, type_name
from steerlora.engine.content import absolute, identity_of, open_file
from steerlora.errors import UserError

PLAIN = (".txt", ".md")
"""How the names of plain text files end in a folder."""
PIECE = 2**16
"""Characters of a document that are tokenized at once; a longer one is cut."""
DOCUMENTS = 64
"""Documents that are tokenized at once."""
Item = TypeVar("Item")
_HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def files_of(corpus: str) -> dict[str, Path]:
    """{name in the corpus: its file}, in the order in which they are read; empty for a hub id.

    Raises:
        UserError: neither a file, nor a folder that holds text, nor the form of a hub id.
    """
    place = Path(corpus).expanduser()
    if place.is_dir():
        found = {
            path.relative_to(place).as_posix(): path
            for path in sorted(place.rglob("*"))
            if path.name.endswith((*SUFFIXES, *PLAIN)) and path.is_file()
        }
        if not found:
            raise UserError(
                f"sae.corpus={corpus} holds no text: there is no file {', '.join(SUFFIXES)} or "
                f"{', '.join(PLAIN)} in the folder"
            )
        return found
    if place.exists():
        return {f"text{place.suffix}": place}
    if _HUB.fullmatch(corpus):
        return {}
    raise UserError(
        f"sae.corpus={corpus}: there is no such file or folder, and a dataset of the hub is "
        "owner/name or owner/name@revision"
    )


def identity_of_corpus(corpus: str, root: str) -> tuple[str, str]:
    """The corpus by one name of its place, and what decides its text: its files' content, or the
    hub id.

    Args:
        corpus: ``sae.corpus``.
        root: of the artifacts.

    Raises:
        UserError: as :func:`files_of`.
    """
    files = files_of(corpus)
    return absolute(corpus), identity_of(files, root) if files else corpus


def windows(
    corpus: str, tokenizer, length: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The corpus as (input_ids [B, S], attention_mask [B, S]), once.

    Documents follow each other, the tokenizer's end-of-sequence token between them, and are cut
    into windows without regard to where they end, as in pretraining. Where the tokenizer begins its
    text with a token, every window begins with it. The last window may be shorter.

    Args:
        corpus: ``sae.corpus``.
        tokenizer: of the model.
        length: S.
        batch_size: B at most.

    Raises:
        UserError: a corpus that cannot be read or holds no text, a row without text.
    """
    found = False
    for rows in _groups(_windows(_documents(corpus), tokenizer, length), batch_size):
        found = True
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        yield ids, mask
    if not found:
        raise UserError(f"sae.corpus={corpus} is empty: there is no text in it")


def _windows(documents: Iterator[list[str]], tokenizer, length: int) -> Iterator[list[int]]:
    """Documents, each in pieces, as windows of token ids."""
    first = tokenizer.bos_token_id
    begins = first is not None and tokenizer("a")["input_ids"][:1] == [first]
    head = [first] if begins else []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    room = length - len(head)
    waiting: list[int] = []
    for group in _groups(documents, DOCUMENTS):
        pieces = [piece for document in group for piece in document]
        encoded = iter(tokenizer(pieces, add_special_tokens=False)["input_ids"])
        for document in group:
            for ids in islice(encoded, len(document)):
                waiting += ids
            waiting += end
        whole = len(waiting) // room * room
        for start in range(0, whole, room):
            yield [*head, *waiting[start : start + room]]
        waiting = waiting[whole:]
    if len(waiting) > 1:
        yield [*head, *waiting]


def _documents(corpus: str) -> Iterator[list[str]]:
    """The pieces of each document that holds more than blanks."""
    files = files_of(corpus)
    for place, value in _hub_rows(corpus) if not files else _file_rows(files):
        if not isinstance(value, str):
            raise UserError(
                f"{place}: no text: a row of sae.corpus has a key text, this one's is "
                f"{type_name(value)}"
            )
        if value.strip():
            yield [value[start : start + PIECE] for start in range(0, len(value), PIECE)]


def _file_rows(files: dict[str, Path]) -> Iterator[tuple[str, Any]]:
    for path in files.values():
        if path.name.endswith(SUFFIXES):
            for place, row in read_objects(path):
                if "text" not in row:
                    raise UserError(
                        f"{place}: no text: a row of sae.corpus has a key text, this one has "
                        f"{', '.join(map(repr, row)) or 'no key'}"
                    )
                yield place, row["text"]
        else:
            with open_file(path) as file:
                try:
                    yield str(path), file.read().decode("utf-8-sig")
                except UnicodeDecodeError:
                    raise UserError(f"{path}: not UTF-8 text; save the file as UTF-8") from None


def _hub_rows(corpus: str) -> Iterator[tuple[str, Any]]:
    """Rows of the split ``train``, fetched as they are read."""
    import datasets
    from huggingface_hub.errors import HTTPError

    name, _, revision = corpus.partition("@")
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True, revision=revision or None)
        for number, row in enumerate(rows, start=1):
            if "text" not in row:
                raise UserError(
                    f"sae.corpus={corpus} has no column text (columns: {', '.join(row)})"
                )
            yield f"sae.corpus={corpus}: row {number}", row["text"]
    except (OSError, HTTPError) as error:
        raise UserError(f"sae.corpus={corpus} cannot be reached: {_first_line(error)}") from error
    except UserError:
        raise
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"sae.corpus={corpus} cannot be read: {_first_line(error)}") from error


def _groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    items = iter(items)
    while group := list(islice(items, size)):
        yield group


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
