"""The order in which a report shows things, and what it calls them."""

from __future__ import annotations

from collections.abc import Iterable

BANNER = "numbers are meaningless (smoke run)"

BASE = "none"
"""The adapter name of the base model in score records."""

ADAPTERS = ("none", "lora", "moe_lora", "sc_lora")

GROUPS = {
    "instruction_following": "Instruction following",
    "general_knowledge": "General knowledge",
    "mmlu_pro": "MMLU-Pro",
    "gsm8k": "GSM8K",
    "target": "Target domains",
}

INTERVENTIONS = (
    "intact",
    "replace_dense",
    "replace_random_sae",
    "randomize",
    "shuffle",
    "permute_latents",
    "invert",
    "fixed_rank",
    "uniform_gate",
    "oracle_domain",
)

ORDER_CLASSES = {
    "all": "all orders",
    "broad_first": "instruction first",
    "other": "instruction later",
}

METRICS = {
    "positive_forgetting": "Positive forgetting",
    "chaudhry_forgetting": "Chaudhry F",
    "backward_transfer": "BWT",
    "forward_transfer": "FWT",
    "final_average": "Final average",
}


def adapter_label(name: str) -> str:
    """What a table calls an adapter."""
    return "base" if name == BASE else name


def in_order(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The distinct names: the known ones in their order, then the others as they came."""
    names = list(dict.fromkeys(names))
    known = list(known)
    return [name for name in known if name in names] + [n for n in names if n not in known]


def score_label(records: list[dict]) -> str:
    """What the scores are, from the records' optional ``score_name`` and ``score_unit``."""
    record = records[0] if records else {}
    name, unit = record.get("score_name", "score"), record.get("score_unit")
    return f"{name} ({unit})" if unit else name
