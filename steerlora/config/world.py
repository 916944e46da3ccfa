"""The base model and the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerlora.config.checks import one_of, positive
from steerlora.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model: one to load (``path``) or one to pretrain here (a Qwen3 of this shape).

    The shape of one to load is what ``stage=plan`` and early checks read; a model that turns out
    to have another is refused.

    Attributes:
        name: what tables call it.
        path: Hugging Face directory or hub id; null pretrains a small Qwen3 on the domains.
        revision: hub revision of ``path``.
        layers, width, heads, kv_heads, head_width, ffn_width: the shape.
        vocabulary: rows of the embedding; of a model pretrained here on text, entries of its
            byte-level BPE tokenizer (the micro world's tokenizer has its own number).
        tied: the output head is the embedding.
        thinking: the chat template's switch for thinking, where it has one (Qwen3); false: the
            answer at once; null: what the template does by itself. Training, evaluation and
            everything else follow it.
        control_sites: default of ``control.sites``, about 3/8 of the depth.
        sae_latents: default of ``sae.latents``.
        sae_path: default of ``sae.path``.
        steps, batch_size, learning_rate: of the pretraining here (steps; documents; AdamW).
        prompt_weight: of prompt tokens in the pretraining loss; responses weigh 1.
        seed: of the pretraining here.
    """

    name: str
    path: str | None = None
    revision: str | None = None
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 32
    ffn_width: int = 384
    vocabulary: int = 2048
    tied: bool = True
    thinking: bool | None = None
    control_sites: list[int] = field(default_factory=lambda: [1])
    sae_latents: int = 512
    sae_path: str | None = None
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 3e-3
    prompt_weight: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        positive(
            "model",
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_width=self.head_width,
            ffn_width=self.ffn_width,
            vocabulary=self.vocabulary,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            prompt_weight=self.prompt_weight,
        )
        if self.thinking is not None and self.path is None:
            raise UserError(
                f"model.thinking={str(self.thinking).lower()}: models pretrained here do not "
                "think: set model.thinking=null"
            )
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}"
            )


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the conversations of one domain come from.

    A template is a column's name, or text with columns in braces, such as
    ``"{instruction}\\n{input}"``; ``{source[text]}`` is a field of a column.

    Attributes:
        path: dataset id on the hub, a jsonl file, or a folder with ``<split>.jsonl``. Files have no
            configuration and no revision, and a single file is one split.
        name: configuration of a hub dataset; null where it has one only.
        revision: commit (or tag) of a hub dataset.
        split: rows to train on.
        heldout_split: rows to score on; null holds out some of ``split``.
        prompt: template of the user's turn.
        response: template of the answer.
        messages: column of turns {role, content}, in place of the two: the first user's turn and
            the answer to it.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    heldout_split: str | None = None
    prompt: str | None = None
    response: str | None = None
    messages: str | None = None

    @property
    def local(self) -> bool:
        """Whether ``path`` is a file or a folder."""
        return Path(self.path).suffix in (".jsonl", ".json") or Path(self.path).exists()


@dataclass(frozen=True, kw_only=True)
class DomainsConfig:
    """The domains' text.

    Attributes:
        name: what tables call it.
        kind: "micro" (generated), "text" (a folder of jsonl files) or "hub" (``sources``).
        dir: the folder, for kind "text": ``<domain>_train.jsonl`` with prompt and response.
        sources: {domain: `SourceConfig`}, for kind "hub".
        names: the domains, in order; for kind "micro" the five of the world.
        broad: the broad domain, which the orders put first or last; for kind "hub" some of it is
            held back as general text.
        train_items: rows for adapter training, per domain (at most, unless generated).
        pretrain_items: of general text, which is what a base made here learns from (at most, unless
            generated).
        evaluation_items: items of each evaluation set (at most, unless generated).
        seed: of the generated world, or of the split of the text.
    """

    name: str = "micro"
    kind: str = "micro"
    dir: str | None = None
    # Mappings until they are checked below: the command line cannot add to a typed dictionary.
    sources: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(
        default_factory=lambda: ["instruction", "math", "code", "medicine", "law"]
    )
    broad: str = "instruction"
    train_items: int = 2000
    pretrain_items: int = 24_000
    evaluation_items: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("domains.kind", self.kind, ("micro", "text", "hub"))
        counts = ("train_items", "pretrain_items", "evaluation_items")
        positive("domains", **{name: getattr(self, name) for name in counts})
        if len(set(self.names)) != len(self.names) or not self.names:
            raise UserError(f"domains.names={self.names}: name each domain once")
        one_of("domains.broad", self.broad, self.names)
        sources = {name: _source(name, given) for name, given in self.sources.items()}
        object.__setattr__(self, "sources", sources)
        if self.kind == "hub":
            for name in {**dict.fromkeys(self.names), **sources}:
                self._check_source(name)

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
    key, known = f"domains.sources.{name}", SourceConfig.__dataclass_fields__
    if not isinstance(given, Mapping):
        raise UserError(f"{key}={given}: give {key}.path=<hub id or jsonl file>, and its columns")
    for option, value in given.items():
        if option not in known:
            raise UserError(f"no such key: {key}.{option}; {nearest(option, known)}")
        if not isinstance(value, str) and (value is not None or option in ("path", "split")):
            raise UserError(f"{key}.{option}={value}: must be text")
    if not given.get("path"):
        raise UserError(f"{key}.path is not set: give a hub id or a jsonl file")
    return SourceConfig(**given)
