"""The base model."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field

from steerlora.config.checks import positive
from steerlora.errors import UserError

DATE = "2024-07-26"
"""What Llama 3.2's chat template prints where it is told of no clock."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model: one to load (``path``), or a small Qwen3 to pretrain here (no ``path``).

    The sizes given here are what ``stage=plan`` and the early checks read. A loaded model that
    turns out to have other sizes is refused.
    """

    name: str
    """The model's name in tables and labels."""

    path: str | None = None
    """Hugging Face folder or hub id of the model to load. Null pretrains a Qwen3 of the sizes below
    on the domains' text."""

    revision: str | None = None
    """Hub revision (commit, tag or branch) of ``path``. Null takes the default branch."""

    layers: int = 4
    """Number of decoder layers. At least 1."""

    width: int = 128
    """Width of the residual stream. At least 1."""

    heads: int = 4
    """Query heads of each attention. At least 1, and a multiple of ``kv_heads``."""

    kv_heads: int = 2
    """Key and value heads of each attention. At least 1."""

    head_width: int = 32
    """Width of one attention head. At least 1."""

    ffn_width: int = 384
    """Inner width of the MLP. At least 1."""

    vocabulary: int = 2048
    """Rows of the embedding. For a model pretrained here on text, the number of entries of its
    byte-level BPE tokenizer. The micro world's tokenizer has a size of its own and ignores this.
    At least 1."""

    tied: bool = True
    """Whether the output head shares its weights with the embedding."""

    thinking: bool | None = None
    """The chat template's switch for thinking, where it has one (Qwen3), in training, evaluation
    and everything else. False asks for the answer at once; null leaves it to the template. Must be
    null for a model that is pretrained here."""

    date: str = DATE
    """The day that a chat template is told is today, where it prints it (Llama 3.2's does), in
    training, evaluation and everything else: year-month-day."""

    control_sites: list[int] = field(default_factory=lambda: [1])
    """Control sites that suit this model, for the sections that ask for a default: layer numbers,
    about 3/8 of the depth."""

    sae_latents: int = 512
    """Number of SAE latents that suits this model, the default of ``sae.latents``."""

    sae_path: str | None = None
    """Published SAEs of this model, the default of ``sae.path``. Null trains them here."""

    steps: int = 4000
    """Optimizer steps of the pretraining here at most; it ends by ``target_loss`` or ``tolerance``.
    At least 1."""

    target_loss: float | None = None
    """Loss on held-out text, in nats a response token, at which the rates of the pretraining here
    begin to fall, so that models of one level come out of it. Greater than 0; null: they fall when
    that loss no longer does."""

    tolerance: float = 0.03
    """Share by which the loss on held-out text must fall below its lowest so far to be progress in
    the pretraining here; without any for three looks in a row the rates fall. Greater than 0, below
    1."""

    batch_size: int = 64
    """Documents in a step of the pretraining here. At least 1."""

    learning_rate: float = 6e-3
    """Peak learning rate of AdamW, for embeddings and norms, in the pretraining here. Greater than
    0."""

    matrix_learning_rate: float = 0.05
    """Peak learning rate of Muon, for the layers' matrices, in the pretraining here. Greater than
    0."""

    prompt_weight: float = 0.1
    """Weight of prompt tokens in the pretraining loss; response tokens have weight 1. Greater than
    0."""

    seed: int = 0
    """Seed of the initialisation and the data order of the pretraining here. At least 0."""

    def __post_init__(self) -> None:
        positive(
            "model",
            self,
            "layers width heads kv_heads head_width ffn_width vocabulary steps batch_size "
            "target_loss tolerance learning_rate matrix_learning_rate prompt_weight",
        )
        try:
            datetime.date.fromisoformat(self.date)
        except (TypeError, ValueError):
            raise UserError(
                f"model.date={self.date}: give a day as year-month-day, such as {DATE}"
            ) from None
        if self.thinking is not None and self.path is None:
            raise UserError(
                f"model.thinking={str(self.thinking).lower()}: models pretrained here do not "
                "think: set model.thinking=null"
            )
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}"
            )
