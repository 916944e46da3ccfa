"""Claims on steering by supervised features of SAEs (arXiv 2605.31183), with figures that others
give for AxBench (arXiv 2501.17148).

Ways are named as in ``conf/experiment/steering.yaml``; what is not among the records is not
measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from steerlora.reporting.claims import Claim, judged_claim, without_verdicts
from steerlora.reporting.effects import Measure
from steerlora.reporting.steering.study import Study
from steerlora.reporting.tables import interval_text, number
from steerlora.reporting.verdicts import LEAST_SHARE

CLOSE = 0.9
"""Share of LoRA's score that counts as close to it."""
LORA, BASELINE = 0.602, 0.322
"""Of Gemma-2-9B: LoRA at layer 20, and the best of the simple baselines there, difference of
means."""
GAIN = LORA - BASELINE
"""What the paper's latents would gain on the simple baselines if they were as good as LoRA."""
FLAT = 0.05
"""Change of the score for twice the L0 that would matter."""
MARGIN = 0.1
"""Distance that "hardly" leaves, of a score from 0 to 2."""
RULE = (
    "Each effect has a direction, which the claim says is positive. The paper's own table is not "
    f"known to us: the smallest effect that counts is {LEAST_SHARE} of what the claim's definition "
    "implies. Where a claim has several measures, all must satisfy it. Scores go from 0 to 2 and "
    "are means over concepts and prompts; intervals are Student's t over replicates, the base, the "
    "SAE, texts and prompts all made anew. Again is the probability that another study of the same "
    "size would decide alike."
)


def steering_claims(study: Study, *, meaningful: bool = True) -> tuple[Claim, ...]:
    """V1 to V5.

    Args:
        study: what was measured.
        meaningful: False for a smoke run, which has figures and no verdicts.
    """
    less = study.advantage
    claims = (
        _claim(
            "V1",
            "Latents that labelled texts choose steer close to LoRA",
            [less(f"less {CLOSE} of LoRA", "latents", "lora", CLOSE)],
            f"score of the chosen latents less {CLOSE} of that of LoRA trained on the same texts; "
            "close is from 0 on.",
            paper=f"close to on par; LoRA {LORA} (Gemma-2-9B, layer 20)",
            counts=0.0,
            note=_scores(study, "latents", "lora", "unsteered"),
        ),
        _claim(
            "V2",
            "They beat simple baselines",
            [
                less("less AxBench's SAE baseline", "latents", "axbench_sae"),
                less("less difference of means", "latents", "difference_of_means"),
                less("less linear probe", "latents", "probe"),
            ],
            "score less that of each baseline on the same labelled texts and as many strengths; "
            f"implied: {number(GAIN, 2)}, LoRA less difference of means.",
            paper="SAE .140, difference of means .158 to .322 (Gemma-2-9B)",
            note=_listed(
                study, {"ReFT-r1": "reft_r1", "neuron": "neuron", "component": "component"}
            ),
        ),
        _claim(
            "V3",
            "Latents that are chosen by interpretability alone are causal for their label",
            [
                less("less a latent of equal firing rate", "interpretable", "random_latent"),
                less("less permuted labels", "interpretable", "permuted_labels"),
                less("less an untrained SAE", "interpretable", "untrained_sae"),
            ],
            "score by calibrated F1 without any output score, less that of each control; implied: "
            f"{number(GAIN, 2)}, as for V2.",
            paper="qualitative",
            note=_listed(study, {"random direction": "random_direction"}, "interpretable"),
        ),
        _claim(
            "V4",
            "High sparsity is not needed",
            [
                study.figure(
                    f"{FLAT} less the change for twice the L0",
                    sparsities(study),
                    lambda *records: FLAT - abs(slope(records)),
                )
                if len(sparsities(study)) > 2
                else None
            ],
            f"{FLAT} less the absolute slope of the score over log2 of L0, latents chosen by "
            f"calibrated F1 alone, SAEs of three sparsities or more; implied: {FLAT}.",
            paper="L0 hardly matters; no figure known to us",
            smallest=FLAT,
        ),
        _claim(
            "V5",
            "Prompting stays ahead",
            [],
            "not measured here: bases of the micro world are not taught to be told what to speak "
            "of.",
            paper="1.072 (Gemma-2-9B, layer 31)",
        ),
    )
    return claims if meaningful else without_verdicts(claims)


def sparsities(study: Study) -> list[str]:
    """Conditions that differ in the SAE's sparsity alone."""
    found = [name for name in study.records if name.startswith("l0_")]
    return [*found, "interpretable"] if found else []


def slope(records: Sequence) -> float:
    """Of the score over log2 of the L0."""
    places = [math.log2(record.l0) for record in records]
    return float(np.polyfit(places, [record.score for record in records], 1)[0])


def _claim(
    id: str,
    text: str,
    measures: Sequence[Measure | None],
    definition: str,
    *,
    paper: str,
    smallest: float = GAIN,
    counts: float | None = None,
    note: str = "",
) -> Claim:
    """A claim with its verdict.

    Args:
        smallest: the effect that the paper's figures imply.
        counts: an effect counts from here on; None: from `LEAST_SHARE` of ``smallest``.
    """
    shift = 0.0 if counts is None else LEAST_SHARE * smallest - counts
    known = [one for one in measures if one is not None]
    return judged_claim(
        id,
        text,
        paper,
        definition,
        measures,
        unit="score",
        smallest=smallest,
        direction=[one.interval.shifted(shift) for one in known],
        whole=len(known) == len(measures),
        counts_from=number(LEAST_SHARE * smallest - shift, 3, sign=True),
        note=note,
        rule=RULE,
    )


def _scores(study: Study, *ways: str) -> str:
    found = [(way, study.score(way)) for way in ways]
    return " ".join(
        f"{way}: {interval_text(own.interval, 3)}." for way, own in found if own is not None
    )


def _listed(study: Study, others: dict[str, str], one: str = "latents") -> str:
    """``Less <label>: +0.012 [...].``, of those that were measured."""
    found = {label: study.advantage(label, one, other) for label, other in others.items()}
    return " ".join(
        f"Less {label}: {interval_text(own.interval, 3, sign=True)}."
        for label, own in found.items()
        if own is not None
    )
