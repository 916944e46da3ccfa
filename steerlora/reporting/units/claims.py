"""Claims of STAN (OpenReview mkx3xkRBkw), and what its reviewers asked, judged by the same rule.

Where the paper's own figure is not known to us, the claim's definition names its yardstick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from steerlora.evaluation.units import UnitsRecord
from steerlora.reporting.claims import Claim, judged_claim, without_verdicts
from steerlora.reporting.effects import Measure
from steerlora.reporting.tables import interval_text
from steerlora.reporting.units.study import UnitStudy
from steerlora.reporting.verdicts import LEAST_SHARE

GAIN = 0.016
"""Score: the smallest gain that the main paper reports, as a yardstick."""
SELECTIVE = 0.1
"""Nats a token by which switching off a domain's own units hurts it more than the others."""
LESS_FORGETTING = 13.1
"""Percent that the main paper reports for its own method."""
UNKNOWN = "no figure known to us"
NOT_TUNED = (
    "Learning rates were not chosen on development text (study.settings.tuned), so this decides "
    "nothing."
)
RULE = (
    "Each effect has a direction, which the claim says is positive. The paper's margins are not "
    f"known to us: the smallest effect that counts is {LEAST_SHARE} of the yardstick that the "
    "claim's definition names. Where a claim has several measures, all must satisfy it. Intervals "
    "are Student's t over replicates, the items the same. Again is the probability that another "
    "study of the same size would decide alike. U1 and U2 need learning rates that were chosen on "
    "development text, the same grid for all."
)


def unit_claims(
    study: UnitStudy, *, tuned: bool = False, meaningful: bool = True
) -> tuple[Claim, ...]:
    """U1 to U8.

    Args:
        tuned: whether every method's learning rate was chosen on development text.
        meaningful: False for a smoke run, which has figures and no verdicts.
    """
    sparse = study.advantage
    claims = (
        _claim(
            "U1",
            "Sparse units beat LoRA of as many parameters",
            [sparse("less LoRA of rank m", "sparse", "lora")],
            "mean target score of TopK units less that of LoRA of rank m = r, whose parameters are "
            f"as many; yardstick: a gain of {GAIN}.",
            paper="higher on five GLUE tasks; margins not known to us",
            whole=tuned,
            note=" ".join(
                filter(
                    None,
                    (
                        "" if tuned else NOT_TUNED,
                        _listed(sparse, "At equal step time, less LoRA", "lora", one="timed"),
                        _listed(sparse, "At equal active width, less LoRA", "lora", one="wide"),
                        _listed(sparse, "Less LoRA of rank k", "lora_narrow"),
                        _listed(sparse, "Less specialists of rank 4", "specialists"),
                    ),
                )
            ),
        ),
        _claim(
            "U2",
            "A larger latent space has more capacity across domains",
            [sparse("four times the units less these", "wide", "sparse")],
            "mean target score with four times as many units, of which as many act as LoRA has "
            f"ranks, less that of m = r units; yardstick: a gain of {GAIN}.",
            whole=tuned,
            note="" if tuned else NOT_TUNED,
        ),
        _claim(
            "U3",
            "Units are interpretable: a domain's own units matter to that domain",
            [
                study.of_units("own units less matched ones", _selectivity),
            ],
            "switching off a domain's own units, chosen on one half of held-out text: the rise of "
            "its cross-entropy less the mean rise of the other domains', on the other half; less "
            "the same of units with equal rate on the domain and equal norm; mean over domains. "
            f"Yardstick: {SELECTIVE} nats a token.",
            unit="nats",
            smallest=SELECTIVE,
            paper="a figure of styles (SD3)",
            note=_information(study),
        ),
        _not_measured(
            "U4",
            "Inference is no more complex",
            "steps are timed by scripts/bench_adapter.py; unlike LoRA it cannot be merged.",
        ),
        _claim(
            "U5",
            "Sparsity itself helps",
            [
                sparse("less the dense twin", "sparse", "dense"),
                sparse("less ReLU of equal mean L0", "sparse", "threshold"),
            ],
            "mean target score of TopK units less that of the same with every unit allowed (scale "
            f"1/m), and less ReLU with a threshold of equal mean L0; yardstick: {GAIN}.",
        ),
        _claim(
            "U6",
            "Which units act on a token matters",
            [
                sparse(label, "sparse", part)
                for part, label in {
                    "static": "less a static random set",
                    "chosen": "less a set that was learnt, then frozen",
                    "random": "less units drawn for each token, in training too",
                    "shuffled": "less another token's units, in training too",
                    "random_evaluation": "less units drawn for each token, in evaluation alone",
                    "shuffled_evaluation": "less another token's units, in evaluation alone",
                }.items()
            ],
            f"mean target score less that of each control of the gate; yardstick: {GAIN}.",
            paper="units are input-dependent; no figure",
        ),
        _claim(
            "U7",
            "The encoder has to be learnt with the task",
            [
                sparse("less a frozen random encoder", "sparse", "frozen"),
                sparse("less a genuine SAE's encoder", "sparse", "sae"),
            ],
            "mean target score less that with E as it was drawn, and less that with the features "
            f"of the site's frozen SAE as units; yardstick: {GAIN}.",
            paper="asked by its reviewers",
        ),
        _claim(
            "U8",
            "It forgets less in sequences",
            [study.less_forgetting("sparse", "lora")],
            "percentage by which its mean positive forgetting is below that of LoRA of as many "
            f"parameters; yardstick: {LESS_FORGETTING} %.",
            unit="percent",
            smallest=LESS_FORGETTING,
            paper="asked by its reviewers",
            note=_overlap(study),
        ),
    )
    return claims if meaningful else without_verdicts(claims)


def _claim(
    id: str,
    text: str,
    measures: Sequence[Measure | None],
    definition: str,
    *,
    unit: str = "score",
    smallest: float = GAIN,
    paper: str = UNKNOWN,
    whole: bool = True,
    note: str = "",
) -> Claim:
    """A claim with its verdict: all of ``measures`` are positive, if they were measured."""
    return judged_claim(
        id,
        text,
        paper,
        definition,
        measures,
        unit=unit,
        smallest=smallest,
        whole=whole and None not in measures,
        note=note,
        rule=RULE,
    )


def _not_measured(id: str, text: str, why: str) -> Claim:
    return _claim(id, text, [], f"not measured here: {why}")


def _listed(
    advantage: Callable[[str, str, str], Measure | None],
    label: str,
    other: str,
    *,
    one: str = "sparse",
) -> str:
    """``<label>: +0.012 [...].``; nothing where it was not measured."""
    measure = advantage(label, one, other)
    return "" if measure is None else f"{label}: {interval_text(measure.interval, 3, sign=True)}."


def _selectivity(record: UnitsRecord) -> float:
    return record.figures["switched_off/own"] - record.figures["switched_off/control"]


def _figure(study: UnitStudy, label: str, name: str, training: str = "joint") -> str:
    measure = study.of_units(label, lambda record: record.figures[name], training)
    return "" if measure is None else f"{label}: {interval_text(measure.interval, 4)}."


def _information(study: UnitStudy) -> str:
    parts = {
        "Mean mutual information of units and domains, nats": "information/mean",
        "With the rows' domains permuted": "information/null",
        "Share of units above their own 0.95 quantile of that (0.05 by chance)": (
            "information/above_null"
        ),
        "Share of units that ever act": "load/alive",
        "Squared coefficient of variation of their rates": "load/cv2",
    }
    return " ".join(filter(None, (_figure(study, label, name) for label, name in parts.items())))


def _overlap(study: UnitStudy) -> str:
    parts = [
        _figure(
            study,
            "Jaccard overlap of the tenth of the units that act most on each of two domains, "
            "after a sequence",
            "overlap/jaccard",
            "sequence",
        ),
        _figure(study, "By chance", "overlap/chance", "sequence"),
    ]
    protected = study.less_forgetting("protected", "lora")
    if protected is not None:
        rival = study.roles["protected"]
        parts.append(f"{rival}: {interval_text(protected.interval, 1, ' %')} less than LoRA.")
    return " ".join(filter(None, parts))
