"""The order in which a report shows things, and what it calls them."""

from __future__ import annotations

from collections.abc import Iterable

from steerlora.evaluation.records import INTACT, Evaluation

BANNER = "numbers are meaningless (smoke run)"

GROUPS = {
    "instruction_following": "Instruction following",
    "general_knowledge": "General knowledge",
    "mmlu_pro": "MMLU-Pro",
    "gsm8k": "GSM8K",
    "target": "Target domains",
}

SETS = ("mmlu_pro", "gsm8k")
"""Groups that are called after a published set."""

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


def group_label(group: str, evaluations: Iterable[Evaluation]) -> str:
    """What a table calls a group of tasks.

    A published set's name is kept for lm-eval's task of that name. Of what stands in for it, the
    task's own prefix comes first (``micro-GSM8K`` of ``micro_gsm8k``); other tasks go by their
    own names.

    Args:
        evaluations: whose tasks the group has.
    """
    if group not in SETS:
        return GROUPS.get(group, group)
    tasks = dict.fromkeys(task for r in evaluations for task in r.groups.get(group, ()))
    names = [
        GROUPS[group]
        if task == group
        else f"{task.removesuffix(f'_{group}')}-{GROUPS[group]}"
        if task.endswith(f"_{group}")
        else task
        for task in tasks
    ]
    return ", ".join(names) or GROUPS[group]
