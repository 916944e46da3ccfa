"""The shape of a decoder, which determines its parameters, memory and arithmetic.

Needs no tensor and no torch, so that the planner answers fast.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerlora.config import ModelConfig
from steerlora.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """A decoder-only model of pre-norm layers with grouped-query attention and a gated MLP."""

    layers: int
    """L, the number of layers."""

    width: int
    """D, the width of the residual stream."""

    heads: int
    """Query heads of each attention."""

    kv_heads: int
    """Key and value heads of each attention. A divisor of ``heads``."""

    head_width: int
    """Width of one attention head."""

    ffn_width: int
    """F, the inner width of the MLP."""

    vocabulary: int
    """V, the rows of the embedding."""

    tied: bool = True
    """Whether the output head shares its weights with the embedding."""

    """Whether queries and keys are normalised, head by head (Qwen3)."""

    @property
    def query_width(self) -> int:
        """All heads' queries side by side."""
        return self.heads * self.head_width

    @property
    def key_width(self) -> int:
        """All heads' keys side by side; values likewise."""
        return self.kv_heads * self.head_width

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """{name: (inputs, outputs)} of a layer's linear modules, named as in transformers."""
        width, query, key, ffn = self.width, self.query_width, self.key_width, self.ffn_width
        return {
            "q_proj": (width, query),
            "k_proj": (width, key),
            "v_proj": (width, key),
            "o_proj": (query, width),
            "gate_proj": (width, ffn),
            "up_proj": (width, ffn),
            "down_proj": (ffn, width),
        }

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """Of a transformers configuration: a live one, or the mapping in a ``config.json``."""
        read = (
            config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
        )
        heads, width = read("num_attention_heads"), read("hidden_size")
        tied = read("tie_word_embeddings")
        return cls(
            layers=read("num_hidden_layers"),
            width=width,
            heads=heads,
            kv_heads=read("num_key_value_heads") or heads,
            head_width=read("head_dim") or width // heads,
            ffn_width=read("intermediate_size"),
            vocabulary=read("vocab_size"),
            tied=True if tied is None else tied,  # transformers' default
        )

    @classmethod
    def complete(cls, config: Any) -> DecoderShape | None:
        """As :meth:`of`; None for a kind of decoder that has another shape."""
        shape = cls.of(config)
        return None if None in vars(shape).values() else shape


def model_shape(config: ModelConfig) -> DecoderShape:
    """Of the configured base: its own ``config.json`` where ``model.path`` is a folder.

    A hub id is not looked up: the sizes in the configuration are those of the model behind it.

    Raises:
        UserError: a folder without a readable ``config.json``, or one of another kind of model.
    """
    folder = Path(config.path) if config.path else None
    if folder is not None and folder.is_dir():
        try:
            stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return DecoderShape.of(stored)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.path={folder}: its config.json cannot be read: give a folder with "
                "config.json and weights"
            ) from error
        except TypeError as error:
            raise UserError(
                f"model.path={folder}: its config.json names no sizes of a decoder-only model: "
                "num_hidden_layers, hidden_size, num_attention_heads, ..."
            ) from error
    fields = ("layers", "width", "heads", "kv_heads", "head_width", "ffn_width", "vocabulary")
    return DecoderShape(**{name: getattr(config, name) for name in fields}, tied=config.tied)


def layer_weights(shape: DecoderShape) -> int:
    """Entries of one layer's matrices: multiplications of one token's forward through it."""
    return sum(inputs * outputs for inputs, outputs in shape.linears.values())
