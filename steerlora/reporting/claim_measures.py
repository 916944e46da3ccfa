"""How each of the paper's eight claims is measured from records."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from steerlora.evaluation.records import Ablation, DomainSequence, Evaluation
from steerlora.evaluation.statistics import Interval
from steerlora.reporting.claims import Claim, judged_claim, without_verdicts
from steerlora.reporting.effects import Measure, drop, drop_advantage, fingerprints, gain, select
from steerlora.reporting.health import OverTraining, over_training
from steerlora.reporting.labels import group_label
from steerlora.reporting.methods import Methods
from steerlora.reporting.sequences import broad_first, reduction
from steerlora.reporting.tables import interval_text, number
from steerlora.reporting.verdicts import LEAST_SHARE, overlaps

CONTROLS = ("replace_dense", "replace_random_sae", "randomize", "shuffle", "invert")
SPARED = "fixed_rank"
"""The intervention of C5, which keeps the signal and takes the dynamic rank away."""


class Said(NamedTuple):
    """What the paper says, and the range of its figure, if it gives one."""

    text: str
    low: float | None = None
    high: float | None = None


SMALLEST_GAIN, LARGEST_GAIN = 0.016, 0.052
"""The range of C1, which also says what C3's "marginal" can mean."""
LEAST_SPREAD = 0.1
"""What C8 takes for the smallest difference that would be no collapse against a collapse, in units
of log E: of four specialists, a collapse onto two costs 0.5, so 0.1 is a fifth of the mildest."""
CLAIMS = {
    "C1": Said(
        "Instruction following improves over the base model at every scale",
        SMALLEST_GAIN,
        LARGEST_GAIN,
    ),
    "C2": Said("General knowledge improves over the base model", 0.017, 0.023),
    "C3": Said("MMLU-Pro and GSM8K move marginally, or fall for larger models", high=SMALLEST_GAIN),
    "C4": Said(
        "Replacing, randomizing, shuffling or inverting the SAE signal cuts target scores",
        33.6,
        65.6,
    ),
    "C5": Said("Removing dynamic rank alone cuts them far less", 11.8, 11.8),
    "C6": Said("Less positive forgetting in sequential adaptation", 13.1, 13.1),
    "C7": Said("Much less when broad instruction data comes first", 38.3, 38.3),
    "C8": Said("SAE routing prevents the expert collapse of dense-state routing"),
}

LEAST_ADVANTAGE = CLAIMS["C4"].low - CLAIMS["C5"].high
"""Percentage points by which, in the paper, the mildest control cuts more than C5's does."""


def measure_claims(
    evaluations: list[Evaluation],
    ablations: list[Ablation],
    sequentials: list[DomainSequence],
    methods: Methods,
    *,
    main_model: str,
    meaningful: bool = True,
) -> tuple[Claim, ...]:
    """All eight claims, C1 to C8.

    Args:
        evaluations: of models without any intervention; may be empty, like the rest.
        methods: whose claims they are, and against which methods.
        main_model: the model of the ablations and sequences that count.
        meaningful: False for a smoke run, which has figures and no verdicts.
    """
    own = select(ablations, model=main_model, method=methods.paper)
    orders = select(sequentials, model=main_model)
    first = [record for record in orders if broad_first(record)]
    claims = (
        _gain("C1", evaluations, methods.paper, "instruction_following", scale=True),
        _gain("C2", evaluations, methods.paper, "general_knowledge"),
        _marginal(evaluations, methods.paper),
        _controls(own, methods.paper),
        _fixed_rank(own, methods.paper),
        _reduction("C6", orders, methods, "all orders"),
        _reduction("C7", first, methods, "the orders that begin with the broad domain"),
        _collapse(evaluations, methods),
    )
    return claims if meaningful else without_verdicts(claims)


def _claim(
    id: str,
    measures: Iterable[Measure | None],
    definition: str,
    *,
    unit: str = "percent",
    paper: str | None = None,
    direction: Sequence[Interval] | None = None,
    smallest: float | None = None,
    counts_from: str | None = None,
    agrees: bool | None = None,
    missing: Sequence[str] = (),
    note: str = "",
) -> Claim:
    """A claim with its verdict.

    Args:
        measures: those that are not None are ours.
        definition, unit, note: as in `Claim`.
        paper: the paper's figure as text; its range unless given.
        direction: intervals that the claim says are positive; the measures' unless given.
        smallest: effect that the paper's figure implies; the low end of its range unless given.
        counts_from: the smallest effect that counts, as text; that of ``smallest`` unless given.
        agrees: whether the figures agree with the paper's; unless given, whether all of the
            measures' intervals overlap its range.
        missing: what the claim names and was not measured.
    """
    text, low, high = CLAIMS[id]
    measures = tuple(measure for measure in measures if measure is not None)
    intervals = [measure.interval for measure in measures]
    if paper is None:
        ends = [str(end) if unit == "percent" else number(end, sign=True) for end in (low, high)]
        paper = " to ".join(dict.fromkeys(ends)) + (" %" if unit == "percent" else "")
    if agrees is None:
        agrees = all(overlaps(interval, low, high) for interval in intervals)
    if measures and missing:
        note = " ".join(filter(None, (f"Not measured: {', '.join(missing)}.", note)))
    return judged_claim(
        id,
        text,
        paper,
        definition,
        measures,
        unit=unit,
        smallest=low if smallest is None else smallest,
        range=(low, high),
        direction=direction,
        agrees=agrees,
        whole=not missing,
        counts_from=counts_from,
        note=note,
    )


def _gain(
    id: str, evaluations: list[Evaluation], method: str, group: str, *, scale: bool = False
) -> Claim:
    """A claim about the gain of a group of tasks; ``scale``: about more than one model."""
    measures = _gains(evaluations, method, group)
    return _claim(
        id,
        [measure for measure in measures.values() if measure is not None],
        f"Average of the {group.replace('_', ' ')} tasks with {method}, less the base model's; "
        "mean over replicates, for every model.",
        unit="score",
        missing=[
            *(model for model, measure in measures.items() if measure is None),
            *(_scales(measures) if scale else ()),
        ],
    )


def _gains(evaluations: list[Evaluation], method: str, group: str) -> dict[str, Measure | None]:
    """{model: the gain of a group of tasks, if it was measured}."""
    models = dict.fromkeys(record.model for record in evaluations)
    return {model: gain(evaluations, model, method, group) for model in models}


def _scales(models: Iterable[str]) -> list[str]:
    """What is missing of a claim about several models."""
    return ["another scale"] if len(list(models)) < 2 else []


def _marginal(evaluations: list[Evaluation], method: str) -> Claim:
    found = {
        f"{model}, {group_label(group, evaluations)}": measure
        for group in ("mmlu_pro", "gsm8k")
        for model, measure in _gains(evaluations, method, group).items()
    }
    measures = [m._replace(label=label) for label, m in found.items() if m is not None]
    models = dict.fromkeys(record.model for record in evaluations)
    return _claim(
        "C3",
        measures,
        f"Gain of {method} over the base model on each set, for every model. The paper gives "
        f"no figure, so C1's are the yardstick: in range if every interval lies wholly below "
        f"its smallest gain ({number(SMALLEST_GAIN, sign=True)}), direction reproduced if "
        f"wholly below its largest ({number(LARGEST_GAIN, sign=True)}), not reproduced if one lies "
        "wholly above it.",
        unit="score",
        paper="marginal or negative",
        direction=[
            Interval(LARGEST_GAIN - value, LARGEST_GAIN - high, LARGEST_GAIN - low, seeds, items)
            for value, low, high, seeds, items in (measure.interval for measure in measures)
        ],
        smallest=0.0,
        counts_from=number(SMALLEST_GAIN, sign=True),
        agrees=all(measure.interval.high < SMALLEST_GAIN for measure in measures),
        missing=[*(label for label, m in found.items() if m is None), *_scales(models)],
    )


def _controls(ablations: list[Ablation], method: str) -> Claim:
    return _claim(
        "C4",
        [drop(ablations, name) for name in CONTROLS],
        f"Drop of {method}'s mean target-domain score under {', '.join(CONTROLS)} at "
        "evaluation time, in percent of the intact adapter's; ratio of means over domains "
        "and replicates.",
        missing=_not_run(ablations),
    )


def _not_run(ablations: list[Ablation]) -> list[str]:
    """The controls that C4 names and no replicate has."""
    return [name for name in CONTROLS if drop(ablations, name) is None]


def _fixed_rank(ablations: list[Ablation], method: str) -> Claim:
    advantage = drop_advantage(ablations, CONTROLS, SPARED)
    direction, note = [], ""
    if advantage is not None:
        direction = [advantage.interval]
        points = interval_text(advantage.interval, 1)
        note = f"Mean drop of C4's controls less this one, in points: {points}."
    return _claim(
        "C5",
        [drop(ablations, SPARED)],
        f"Drop of {method}'s mean target-domain score under {SPARED}, as in C4. Direction: "
        f"C4's controls cut more than {SPARED} does. Smallest size: the "
        f"{number(LEAST_ADVANTAGE, 1)} points between the paper's figures. In range: the interval "
        "of the drop also holds the paper's figure.",
        direction=direction,
        smallest=LEAST_ADVANTAGE,
        counts_from=f"{number(LEAST_SHARE * LEAST_ADVANTAGE, 1)} points",
        missing=_not_run(ablations),
        note=note,
    )


def _reduction(id: str, sequentials: list[DomainSequence], methods: Methods, which: str) -> Claim:
    measure = reduction(sequentials, methods.paper, methods.baseline)
    note = ""
    if measure is not None and math.isnan(measure.interval.value):
        note = f"{methods.baseline} forgot next to nothing, so a percentage of it means nothing."
    return _claim(
        id,
        [measure],
        f"Percentage by which {methods.paper}'s mean positive forgetting is below that of "
        f"{methods.baseline} with as many parameters, over {which} and replicates; items: those of "
        "one domain's score.",
        note=note,
    )


def _collapse(evaluations: list[Evaluation], methods: Methods) -> Claim:
    paper, dense_routing = methods.paper, methods.dense
    runs = {
        name: {
            (record.model, record.seed): record
            for record in select(evaluations, method=name)
            if record.routing
        }
        for name in (paper, dense_routing)
    }
    shared = [key for key in runs[paper] if key in runs[dense_routing]]
    measures, note, agrees = [], "", False
    if shared:
        pairs = [over_training(runs[paper][key], runs[dense_routing][key]) for key in shared]
        own, dense = zip(*pairs, strict=True)
        found: dict[int, list[float]] = defaultdict(list)
        for (_, seed), (one, other) in zip(shared, pairs, strict=True):
            found[seed].append(one.usage_entropy - other.usage_entropy)
        seeds = tuple(sorted(found))
        measure = Measure(
            label=f"{paper} less {dense_routing}",
            seeds=seeds,
            numerator=tuple(sum(found[seed]) / len(found[seed]) for seed in seeds),
            denominator=None,
            item_errors=(0.0,) * len(seeds),  # so many tokens that only the replicate matters
            items=0,
            fingerprints=fingerprints(runs[name][key] for name in runs for key in shared),
        )
        measures = [measure]
        agrees = not any(run.died for run in own) and 2 * sum(r.died for r in dense) >= len(shared)
        note = _collapse_note(methods, own, dense)
    return _claim(
        "C8",
        measures,
        f"Usage entropy of {paper}'s gates less that of {dense_routing}'s, in units of log E, "
        "mean over the training's measurements (a batch each) and the final evaluation's "
        "tokens, over the models that both have in a replicate, and over replicates. Smallest "
        f"size: {LEAST_SPREAD}, where a collapse onto half of four specialists costs 0.5. In "
        f"range: also no run (model, seed) of {paper} has a dead specialist at any measurement "
        f"after the first, and at least half of {dense_routing}'s do.",
        unit="usage entropy / log E",
        smallest=LEAST_SPREAD,
        counts_from=number(LEAST_SHARE * LEAST_SPREAD, 2),
        paper="no collapse, against collapse",
        agrees=agrees,
        note=note,
    )


def _collapse_note(
    methods: Methods, own: Sequence[OverTraining], dense: Sequence[OverTraining]
) -> str:
    def ends(which: str) -> str:
        """Means over runs of one point of training."""
        return " and ".join(
            number(sum(getattr(run, which) for run in side) / len(side), 2) for side in (own, dense)
        )

    count = len(own)
    parts = [
        f"Runs with a dead specialist, of {count}: {methods.paper} {sum(r.died for r in own)}, "
        f"{methods.dense} {sum(r.died for r in dense)}.",
        f"Largest load: {methods.paper} {number(max(r.max_load for r in own), 2)}, {methods.dense} "
        f"{number(max(r.max_load for r in dense), 2)}.",
    ]
    measured = [run.measurements for run in own]
    if max(measured) > 1:
        parts.append(
            f"Usage entropy of {methods.paper} and {methods.dense}: at first "
            f"{ends('first_entropy')}, lowest {ends('lowest_entropy')}, at evaluation "
            f"{ends('last_entropy')}."
        )
    if min(measured) == 1:
        late = sum(times == 1 for times in measured)
        parts.append(f"Runs without a history of training, judged at evaluation alone: {late}.")
    return " ".join(parts)
