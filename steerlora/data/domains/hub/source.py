"""One dataset of the hub, or local files with its columns, as conversations."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub.errors import HTTPError

from steerlora.config import SourceConfig
from steerlora.data.conversations import exchange
from steerlora.data.domains.text.rows import SourceRow, turns_of
from steerlora.data.jsonl import file_of
from steerlora.engine.content import sha256
from steerlora.errors import UserError, nearest

# It warns of every dataset that it takes from its cache; and progress is ours to show.
datasets.logging.set_verbosity_error()
datasets.disable_progress_bars()


def open_split(
    domain: str, source: SourceConfig, split: str, *, cache: Path | None = None, fetch: str = ""
) -> datasets.Dataset:
    """The rows of one split, mapped from disk.

    Args:
        domain: whose source it is, for messages.
        source: what the configuration says.
        split: of it; of a single local file, its only one.
        cache: where rows of local files are kept while they are used; None: Hugging Face's own.
        fetch: the command that fetches the dataset, for messages.

    Raises:
        UserError: a file or a dataset that cannot be had, an unknown configuration or split.
    """
    key = f"domains.sources.{domain}"
    if source.local:
        files = {split: str(_local_file(key, source, split))}
        what = {"path": "json", "data_files": files}
    else:
        what = {"path": source.path, "name": source.name, "revision": source.revision}
        # Without a network, load_dataset takes whatever its cache has newest of a dataset, be it
        # another revision that lm-eval has fetched: so each revision has a cache of its own.
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "pinned" / source.revision
    try:
        return datasets.load_dataset(**what, split=split, cache_dir=cache and str(cache))
    except (OSError, HTTPError) as error:
        if source.local:
            raise UserError(f"{key}.path={source.path}: {_cause(error)}") from error
        raise UserError(
            f"{key}.path={source.path} cannot be reached ({_first_line(error)}): fetch it first, "
            f"where there is a network: {fetch}"
        ) from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{key}: {source.path} cannot be read: {_cause(error)}") from error


def rows_of(
    domain: str, source: SourceConfig, rows: datasets.Dataset, *, seed: int
) -> Iterator[SourceRow]:
    """The conversations of a split in a shuffled order; those with a blank turn are empty.

    Large mixtures are sorted by origin: their first rows are not what they are.

    Args:
        domain: whose source it is, for messages.
        source: what the configuration says of the columns.
        rows: a split.
        seed: of the order.

    Raises:
        UserError: a column that is not there, or that holds no text; whatever `turns_of` refuses.
    """
    key = f"domains.sources.{domain}"
    if source.messages:
        named = {"messages": source.messages}
    else:
        named = {"prompt": source.prompt, "response": source.response}
    needed = set().union(
        *(_columns(f"{key}.{name}", text, rows.column_names) for name, text in named.items())
    )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    shuffled = rows.select_columns(sorted(needed)).select(order.numpy())
    for index, row in zip(order.tolist(), shuffled, strict=True):
        if source.messages:
            place = f"{key}.messages: row {index + 1}"
            yield SourceRow(turns_of(row[source.messages] or [], place))
        else:
            pair = [_filled(f"{key}.{name}", text, row).strip() for name, text in named.items()]
            yield SourceRow(exchange(*pair) if all(pair) else ())


def identity_of(domain: str, source: SourceConfig) -> list[str | None]:
    """What decides the rows of a source: local files by content, a dataset by id and revision.

    Raises:
        UserError: there is no such file.
    """
    splits = [source.split, heldout_split_of(source)]
    if source.local:
        key = f"domains.sources.{domain}"
        where = [split and sha256(_local_file(key, source, split)) for split in splits]
    else:
        where = [source.path, source.name, source.revision, *splits]
    return [*where, source.prompt, source.response, source.messages]


def heldout_split_of(source: SourceConfig) -> str | None:
    """The split to score on; None where held-out rows are taken from those to train on."""
    return None if source.local and not Path(source.path).is_dir() else source.heldout_split


def _local_file(key: str, source: SourceConfig, split: str) -> Path:
    path = Path(source.path)
    if path.is_dir():
        found = sorted(file.name for file in path.glob("*.json*"))
        path = file_of(path, split)
        if not path.is_file():
            raise UserError(
                f"{key}.path={source.path}: there is no {split}.jsonl (there: "
                f"{', '.join(found) or 'no jsonl file'})"
            )
    if not path.is_file():
        raise UserError(f"{key}.path={source.path}: there is no such file")
    return path


def _columns(key: str, template: str, columns: Iterable[str]) -> set[str]:
    """The columns that a template names."""
    if template in columns:
        return {template}
    try:
        fields = [
            field for _, field, _, _ in string.Formatter().parse(template) if field is not None
        ]
    except ValueError as error:
        raise UserError(f"{key}={template!r}: {error}") from error
    named = {re.split(r"[.\[]", field)[0] for field in fields}
    unknown = sorted(named - set(columns)) if named else [template]
    if unknown:
        raise UserError(
            f"{key}={template!r}: there is no column {unknown[0]!r}; {nearest(unknown[0], columns)}"
            f" (columns: {', '.join(columns)})"
        )
    return named


def _filled(key: str, template: str, row: Mapping[str, Any]) -> str:
    """A template with a row's values; null is empty."""
    if template in row:
        value = row[template]
        if isinstance(value, list | dict):
            raise UserError(
                f"{key}={template!r}: the column holds no text but {type(value).__name__}s; name a "
                f"part of it, such as '{{{template}[0]}}', or use messages"
            )
        return "" if value is None else str(value)
    blank = {column: "" if value is None else value for column, value in row.items()}
    try:
        return template.format_map(blank)
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{key}={template!r} does not fit a row: {_first_line(error)}") from error


def _cause(error: Exception) -> str:
    """What was wrong, where the error itself only says that something was."""
    return _first_line(error.__cause__ or error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
