"""The order in which a report shows things, and what it calls them."""

from __future__ import annotations

from collections.abc import Iterable

from steerlora.evaluation.records import INTACT

BANNER = "numbers are meaningless (smoke run)"

GROUPS = {
    "instruction_following": "Instruction following",
    "general_knowledge": "General knowledge",
    "mmlu_pro": "MMLU-Pro",
    "gsm8k": "GSM8K",
    "target": "Target domains",
}

INTERVENTIONS = (
    INTACT,
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
    "broad_first": "broad domain first",
    "other": "broad domain later",
}

METRICS = {
    "positive_forgetting": "Positive forgetting",
    "chaudhry_forgetting": "Chaudhry F",
    "backward_transfer": "BWT",
    "forward_transfer": "FWT",
    "final_average": "Final average",
}


def in_order(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The distinct names: the known ones in their order, then the others as they came."""
    names = list(dict.fromkeys(names))
    known = list(dict.fromkeys(known))
    return [name for name in known if name in names] + [n for n in names if n not in known]
