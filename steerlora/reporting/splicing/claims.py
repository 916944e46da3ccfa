"""Claims on LoRA around a frozen SAE (arXiv 2501.19406), and of its independent repetition
(arXiv 2503.17272).

Conditions are named as in ``conf/experiment/spliced.yaml``; what is not among the records is not
measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from steerlora.evaluation.splicing import ADAPTER, BASE, METHOD, SAES
from steerlora.reporting.claims import Claim, judged_claim, without_verdicts
from steerlora.reporting.effects import Measure
from steerlora.reporting.splicing.shares import Study, flops_to_reach
from steerlora.reporting.tables import interval_text, number
from steerlora.reporting.verdicts import LEAST_SHARE, overlaps

LOW, HIGH = 30.0, 55.0
"""Percent of the gap that the paper has LoRA close."""
SPAN = HIGH - LOW
"""Points: the yardstick where the paper compares settings and we know no figure."""
HARMLESS = 0.016
"""Change of a score that counts as none; as for C3 of the main paper."""
SOONER = (3.0, 20.0)
"""Times sooner that LoRA reaches the loss of an end-to-end SAE, Gemma-2-2B."""
ADDED = 33.6
"""Points by which LoRA and fine-tuning together close less than the two summed, in Karvonen's
figures: 30.4 and 40.0 apart, 36.8 together."""
ANCHOR = "Karvonen, Gemma-2-2B, rank 16: 26.4 % after the SAE, 33.6 % on all layers"
RULE = (
    "Each effect has a direction, which the claim says is positive. The smallest effect that "
    f"counts is {LEAST_SHARE} of the one that the paper's figure implies, or where we do not know "
    "a figure, of the size that the claim's definition names. Where a claim has several measures, "
    "all must satisfy it. A replicate is everything made anew from another seed, the rows of text "
    "the same; intervals are Student's t over replicates, of a share as the ratio of two means. A "
    "gap below five standard errors over rows has no share. Again is the probability that another "
    "study of the same size would decide alike."
)


def splicing_claims(study: Study, *, meaningful: bool = True) -> tuple[Claim, ...]:
    """S1 to S9, and K1 of the repetition.

    Args:
        study: what was measured.
        meaningful: False for a smoke run, which has figures and no verdicts.
    """
    claims = (
        _every_setting(study),
        _compared(
            study,
            "S2",
            "The sparser the SAE, the larger the share",
            "largest at the lowest L0; no table known to us",
            ("k2", "k8"),
            "the SAE with k = 2, less that with k = 8",
        ),
        _not_measured("S3", "It grows with the size of the model", "2B, 9B, 27B; Fig. 4"),
        _compared(
            study,
            "S4",
            "It grows with the rank",
            "five curves; Figs. 3 and 4",
            ("lora", "rank_1"),
            "rank 16 less rank 1, alpha = rank",
            _of_alpha(study),
        ),
        _sooner(study),
        _compared(
            study,
            "S6",
            "It ends below an SAE trained end to end",
            "Figs. 1 and 5",
            ("lora", "end_to_end"),
            "LoRA less the SAE trained by KL alone",
            _listed(study, "Fine-tuning the SAE itself", "tuned"),
        ),
        _several(study),
        _not_measured("S8", "Steering is more selective", "tables not known to us"),
        _unharmed(study),
        _do_not_add_up(study),
    )
    return claims if meaningful else without_verdicts(claims)


def _claim(
    id: str,
    text: str,
    paper: str,
    measures: Sequence[Measure | None],
    definition: str,
    *,
    smallest: float,
    range: tuple[float | None, float | None] = (None, None),
    unit: str = "percent",
    direction: Sequence[Measure | None] | None = None,
    shift: float = 0.0,
    whole: bool = True,
    note: str = "",
) -> Claim:
    """A claim with its verdict.

    Args:
        smallest: the effect that the paper's figure implies.
        direction: what the claim says is positive, if not the measures.
        shift: added to each of these before they are judged.
        whole: whether the measures are all that the claim names.
    """
    judged_on = [one for one in (measures if direction is None else direction) if one is not None]
    low, high = range
    digits, ending = (1, " %") if unit == "percent" else (3, "")
    counts = LEAST_SHARE * smallest - shift
    return judged_claim(
        id,
        text,
        paper,
        definition,
        measures,
        unit=unit,
        smallest=smallest,
        range=range,
        direction=[one.interval.shifted(shift) for one in judged_on],
        agrees=low is not None
        and all(overlaps(one.interval, low, high) for one in measures if one is not None),
        whole=whole,
        counts_from=number(counts, digits, sign=unit != "percent") + ending,
        note=note,
        rule=RULE,
    )


def _not_measured(id: str, text: str, paper: str) -> Claim:
    return _claim(id, text, paper, [], "not measured here.", smallest=SPAN)


def _listed(study: Study, label: str, condition: str) -> str:
    """``<label>: 12.3 % [10.0, 14.6].``; nothing where it was not measured."""
    measure = study.measure(label, condition)
    return "" if measure is None else f"{label}: {interval_text(measure.interval, 1, ' %')}."


def _every_setting(study: Study) -> Claim:
    settings = {
        "after the SAE": "lora",
        "all layers": "all_layers",
        "SAE with k = 2": "k2",
        "SAE with k = 8": "k8",
        "rank 1": "rank_1",
        "rank 4": "rank_4",
    }
    measures = [study.measure(label, name) for label, name in settings.items()]
    control = study.difference("beyond the control", ["lora"], ["cross_entropy"])
    said = {
        "cross_entropy": "LoRA trained by cross-entropy without the SAE",
        "map": "A linear map after the SAE",
        "shuffled_teacher": "A shuffled teacher",
        "random_dictionary": "Around a random dictionary",
        "noise": "Around noise of equal length",
    }
    others = [_listed(study, label, name) for name, label in said.items()]
    return _claim(
        "S1",
        "LoRA closes part of the gap that the SAE leaves, in every setting",
        "30 to 55 %",
        measures,
        "(L_SAE - L_SAE+LoRA) / (L_SAE - L_base), cross-entropy of general text, in every setting; "
        "the direction also asks that LoRA after the SAE closes more than the same LoRA trained by "
        "cross-entropy without the SAE.",
        smallest=LOW,
        range=(LOW, HIGH),
        direction=[*measures, control],
        whole=control is not None,
        note=" ".join(filter(None, [f"{ANCHOR}.", *others])),
    )


def _compared(
    study: Study,
    id: str,
    text: str,
    paper: str,
    pair: tuple[str, str],
    what: str,
    note: str = "",
) -> Claim:
    """A claim that one condition closes more than another."""
    measure = study.difference("difference", [pair[0]], [pair[1]])
    return _claim(
        id,
        text,
        paper,
        [measure],
        f"the share closed with {what}, in points. The yardstick is the width of the paper's "
        f"range, {number(SPAN, 0)} points.",
        smallest=SPAN,
        note=note,
    )


def _of_alpha(study: Study) -> str:
    parts = [
        _listed(study, "Rank 4, alpha = 4", "rank_4"),
        _listed(study, "Rank 4, alpha = 32", "rank_4_alpha_32"),
    ]
    return " ".join(filter(None, parts))


def _sooner(study: Study) -> Claim:
    found, outside = {}, []
    ends = study.records.get("end_to_end", {})
    for seed, end in sorted(ends.items()):
        runs = [study.records.get(name, {}).get(seed) for name in ("lora_50_steps", "lora")]
        if None in runs:
            continue
        untrained = (0.0, runs[-1].loss(SAES))
        points = [untrained, *((run.cost.flops, run.loss(METHOD)) for run in runs)]
        flops = flops_to_reach(points, end.loss(METHOD))
        if flops and end.cost.flops:
            found[seed] = end.cost.flops / flops
        else:
            above = end.loss(METHOD) > untrained[1]
            outside.append(f"seed {seed} ({'above' if above else 'below'})")
    note = ""
    if outside:
        note = (
            "The end-to-end SAE's loss is not among those that LoRA passes, from the SAE alone to "
            f"its own end, in {', '.join(outside)}: no ratio there."
        )
    measure = study.figures("times fewer FLOPs", ["lora", "end_to_end"], found)
    return _claim(
        "S5",
        "LoRA reaches the loss of an SAE trained end to end sooner",
        "3 to 20 times (wall clock)",
        [measure],
        "FLOPs of the end-to-end training, over those at which LoRA reaches its loss (between "
        "trainings of several lengths by straight lines); 1 is subtracted before it is judged.",
        smallest=SOONER[0] - 1,
        range=SOONER,
        unit="ratio",
        shift=-1.0,
        note=note,
    )


def _several(study: Study) -> Claim:
    return _claim(
        "S7",
        "One LoRA adapts a model to several SAEs",
        "large drops, numbers not known to us",
        [study.measure("two SAEs, all layers", "two_saes")],
        "the share closed of the gap that SAEs at two sites leave together.",
        smallest=LOW,
    )


def _unharmed(study: Study) -> Claim:
    measures = []
    for label, name in {"after the SAE": "lora", "all layers": "all_layers"}.items():
        values = {}
        for seed, record in sorted(study.records.get(name, {}).items()):
            before, after = (
                [score.value for score in record.scores.get(way, {}).values()]
                for way in (BASE, ADAPTER)
            )
            if before:
                values[seed] = sum(after) / len(after) - sum(before) / len(before)
        measures.append(study.figures(label, [name], values))
    return _claim(
        "S9",
        "General ability is unharmed without the SAE",
        "MMLU, HellaSwag, TruthfulQA; table not known to us",
        measures,
        "mean score of the general tasks with the adapter and without the SAE, less the base's. It "
        f"holds where every interval lies above a loss of {HARMLESS}.",
        smallest=0.0,
        unit="score",
        shift=HARMLESS,
    )


def _do_not_add_up(study: Study) -> Claim:
    parts = [
        _listed(study, "LoRA", "lora"),
        _listed(study, "Fine-tuned SAE", "tuned"),
        _listed(study, "Both", "tuned_and_lora"),
        _listed(study, "Linear map", "map"),
    ]
    measure = study.difference("shortfall", ["lora", "tuned"], ["tuned_and_lora"])
    return _claim(
        "K1",
        "LoRA and a short KL and MSE fine-tune of the SAE do not add up",
        "33.6 points short (Karvonen)",
        [measure],
        "the shares closed by LoRA and by the fine-tuned SAE on equal text, summed, less that of "
        "both together, in points.",
        smallest=ADDED,
        note=" ".join(filter(None, parts)),
    )
