"""The domains and the text of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MinLen

from steerlora.config.checks import Section, fitted, hints_of, one_of
from steerlora.config.ranges import Count, Distinct, Location, Name, NotEmpty, OneOf, Seed
from steerlora.errors import UserError, nearest
from steerlora.text import is_plain_name

KINDS = ("micro", "text", "classification", "hub")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """The dataset that the conversations of one domain are read from.

    A template is the name of a column, or text with columns in braces, such as
    ``"{instruction}\\n{input}"``; ``{source[text]}`` is a field of a column.
    """

    path: Location
    """Dataset id on the hub, a jsonl file, or a folder with a ``<split>.jsonl`` for each split. A
    single file is one split. Files have no ``name`` and no ``revision``."""

    name: NotEmpty | None = None
    """Configuration of a hub dataset. Null for a dataset that has only one."""

    revision: NotEmpty | None = None
    """Commit or tag of a hub dataset, required there so that the text does not change."""

    split: NotEmpty = "train"
    """Split whose rows are trained on."""

    heldout_split: NotEmpty | None = None
    """Split whose rows are scored. Null holds out some rows of ``split``."""

    prompt: NotEmpty | None = None
    """Template of the user's turn. Needs ``response``, and excludes ``messages``."""

    response: NotEmpty | None = None
    """Template of the answer. Needs ``prompt``, and excludes ``messages``."""

    messages: NotEmpty | None = None
    """Column with a list of turns {role, content}, of a system, a user and an assistant. All turns
    up to the last answer are read. Excludes ``prompt`` and ``response``."""

    @property
    def local(self) -> bool:
        """Whether ``path`` is a file or a folder."""
        files = (".jsonl", ".json", ".jsonl.gz")
        return self.path.endswith(files) or Path(self.path).exists()


@dataclass(frozen=True, kw_only=True)
class DomainsConfig(Section, key="domains"):
    """The domains, and where their text comes from."""

    name: Name = "micro"
    """The name of this set of domains in tables and labels."""

    kind: Annotated[str, OneOf(KINDS)] = "micro"
    """Where the text comes from: "micro" (generated here), "text" (jsonl files in ``dir``),
    "classification" (such files, of tasks whose answer is a label) or "hub" (the datasets in
    ``sources``)."""

    dir: Location | None = None
    """Folder of a ``<domain>_train.jsonl`` for each domain, with the columns prompt and response,
    or messages. Required by kinds "text" and "classification"; the latter has prompt, response and
    choices, the labels."""

    general: Location | None = None
    """For kind "classification", a jsonl file of general text, with the columns of ``dir``. Null:
    there is none, so that no base can be pretrained on it and no method can know it."""

    development: bool = False
    """Whether kind "classification" scores rows held out of the training files in place of those of
    the test files: for choosing settings."""

    # Mappings until they are checked below: the command line cannot add to a typed dictionary.
    sources: dict[str, Any] = field(default_factory=dict)
    """{domain: its dataset, a `SourceConfig`}. Kind "hub" needs one for each of ``names``."""

    names: Annotated[list[Name], MinLen(1), Distinct()] = field(
        default_factory=lambda: ["instruction", "math", "code", "medicine", "law"]
    )
    """The domains, in order, each once. At least one. Kind "micro" has the five of the default."""

    broad: Name | None = "instruction"
    """The broad domain, one of ``names``, which the orders put first or last. For kind "hub", half
    of its rows may be set aside as general text (``pretraining``). Null, for other kinds: none is
    broad."""

    train_items: Count = 2000
    """Rows of each domain for adapter training. At least 1. Kinds "text" and "hub" may have
    fewer."""

    pretrain_items: Count = 24_000
    """Rows of general text, which a base model pretrained here learns from. At least 1. Kinds
    "text" and "hub" may have fewer."""

    pretraining: bool | None = None
    """Whether half of the rows of every domain of kind "text", or of the broad one of kind "hub",
    are set aside: for the pretraining of a base, and as general text for all that follows. Null:
    where the base is pretrained here. A base that is given needs none of them."""

    evaluation_items: Count = 200
    """Items of each evaluation set. At least 1. Kinds "text" and "hub" may have fewer."""

    prompt_characters: Count | None = None
    """Characters of a prompt at most, for kinds "text" and "classification": a longer prompt loses
    its middle, and is counted. At least 1; null keeps prompts whole."""

    seed: Seed = 0
    """Seed of the generated world, or of the split of the text. At least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.broad is not None:
            one_of("domains.broad", self.broad, self.names)
        elif self.kind == "hub":
            raise UserError("domains.broad=null: kind hub takes its general text from one of names")
        for name in self.names:
            if not is_plain_name(name):
                raise UserError(
                    f"domains.names: {name!r} is no name of a file: printable characters without / "
                    "or \\, not dots alone"
                )
        sources = {name: _source(name, given) for name, given in self.sources.items()}
        object.__setattr__(self, "sources", sources)
        if self.kind == "hub":
            for name in {**dict.fromkeys(self.names), **sources}:
                self._check_source(name)

    @property
    def has_general_text(self) -> bool:
        """Whether there is text of no domain."""
        return self.kind != "classification" or self.general is not None

    def _check_source(self, name: str) -> None:
        key, source = f"domains.sources.{name}", self.sources.get(name)
        if source is None:
            raise UserError(
                f"{key} is not set, and domains.names has {name}: sources are there for "
                f"{', '.join(self.sources) or 'none'}; set {key}.path=<hub id or jsonl file>"
            )
        if not source.messages and not (source.prompt and source.response):
            unused = "" if name in self.names else f" (and domains.names has no {name})"
            raise UserError(
                f"{key}: name the columns, {key}.prompt and {key}.response, or "
                f"{key}.messages{unused}"
            )
        if source.messages and (source.prompt or source.response):
            raise UserError(
                f"{key}: give messages, or prompt and response, and set the others to null"
            )
        if not source.local and not source.revision:
            raise UserError(
                f"{key}.path={source.path} is not pinned: set {key}.revision to the commit of the "
                "dataset that is meant (its page on the hub lists them), or path to a local file"
            )


def _source(name: str, given: SourceConfig | Mapping[str, Any]) -> SourceConfig:
    """The source of a domain.

    Raises:
        UserError: an unknown key, a value that is not text, or no path.
    """
    if isinstance(given, SourceConfig):
        return given
    key, known = f"domains.sources.{name}", hints_of(SourceConfig)
    if not isinstance(given, Mapping):
        raise UserError(f"{key}={given}: give {key}.path=<hub id or jsonl file>, and its columns")
    for option in given:
        if option not in known:
            raise UserError(f"no such key: {key}.{option}; {nearest(option, known)}")
    if given.get("path") is None:
        raise UserError(f"{key}.path is not set: give a hub id or a jsonl file")
    return SourceConfig(
        **{
            option: fitted(f"{key}.{option}", value, known[option])
            for option, value in given.items()
        }
    )
