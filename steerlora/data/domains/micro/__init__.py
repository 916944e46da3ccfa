"""The micro world: a small made-up world of general facts and five domains, from a seed."""

from __future__ import annotations

from steerlora.data.domains.micro.tokenizer import build_tokenizer
from steerlora.data.domains.micro.writer import WORLD_VERSION, write

__all__ = ["WORLD_VERSION", "build_tokenizer", "write"]
