"""Invented records, in which every claim of the paper holds or fails as a test wishes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from steerlora.evaluation.forgetting import forgetting_metrics
from steerlora.evaluation.records import (
    BASE,
    INTACT,
    Ablation,
    DomainSequence,
    Evaluation,
    GeneralKnowledge,
    Routing,
    RoutingAtStep,
)
from steerlora.evaluation.scores import Estimate, Score
from steerlora.reporting.methods import Methods

DOMAINS = ["instruction", "math", "code", "medicine", "law"]
TARGETS = {domain: f"world_{domain}" for domain in DOMAINS}
GROUPS = {
    "instruction_following": ["world_ifeval"],
    "general_knowledge": ["world_mmlu"],
    "mmlu_pro": ["world_mmlu_pro"],
    "gsm8k": ["world_gsm8k"],
}
BASE_SCORES = {"world_ifeval": 0.4, "world_mmlu": 0.6, "world_mmlu_pro": 0.3, "world_gsm8k": 0.2}
KEPT = {
    "intact": 1.0,
    "replace_dense": 0.5,
    "replace_random_sae": 0.55,
    "randomize": 0.4,
    "shuffle": 0.45,
    "permute_latents": 0.5,
    "invert": 0.38,
    "fixed_rank": 0.88,
    "uniform_gate": 0.9,
    "oracle_domain": 1.02,
}
SEQUENCES = {
    "broad_first": DOMAINS,
    "broad_last": [*DOMAINS[1:], DOMAINS[0]],
    "random_0": ["law", "instruction", "code", "math", "medicine"],
    "random_1": ["instruction", "law", "medicine", "code", "math"],
}
STRENGTHS = (0.25, 0.5, 0.75)
OWN = "sc_lora_context"
VARIANTS = {f"{OWN}_soft": "soft gate", f"{OWN}_free": "nothing frozen"}
METHODS = Methods(
    paper="sc_lora",
    baseline="lora",
    dense="moe_lora",
    own=OWN,
    variants=VARIANTS,
    order=("lora", "o_lora", "moe_lora", "sc_lora", OWN, *VARIANTS),
)


@dataclass
class World:
    """Invented records; ``items`` a task, reproducible from the arguments of each method."""

    items: int = 100
    gains: dict[str, float] = field(
        default_factory=lambda: {
            "world_ifeval": 0.035,
            "world_mmlu": 0.02,
            "world_mmlu_pro": 0.0,
            "world_gsm8k": -0.03,
        }
    )
    kept: dict[str, float] = field(default_factory=lambda: dict(KEPT))
    forgetting: dict[str, float] = field(default_factory=lambda: {"lora": 0.4, "sc_lora": 0.3})

    def scores(self, mean: float, key: str) -> list[float]:
        """Item scores whose mean is exactly ``mean``; items keep part of their noise everywhere."""
        item = np.random.default_rng(list(key.encode())).normal(0, 0.1, self.items)
        own = np.random.default_rng([*key.encode(), round(1e6 * mean)]).normal(0, 0.03, self.items)
        noise = item + own
        return (mean + noise - noise.mean()).tolist()

    def score(self, mean: float, key: str) -> Score:
        scores = self.scores(mean, key)
        return Score(
            metric="acc,none",
            value=float(np.mean(scores)),
            stderr=float(np.std(scores) / np.sqrt(self.items)),
            items=self.items,
            version="1",
            per_item=scores,
        )

    def evaluation(self, model: str, method: str, seed: int) -> Evaluation:
        adapted = method != BASE
        means = {t: s + adapted * self.gains[t] for t, s in BASE_SCORES.items()}
        means |= {task: 0.6 if adapted else 0.05 for task in TARGETS.values()}
        tasks = {
            task: self.score(mean + 0.001 * seed * adapted, task) for task, mean in means.items()
        }
        averages = {
            group: Estimate(
                float(np.mean([tasks[task].value for task in members])),
                float(np.mean([tasks[task].stderr for task in members])),
            )
            for group, members in (GROUPS | {"target": list(TARGETS.values())}).items()
        }
        routes = method in ("moe_lora", "sc_lora")
        return Evaluation(
            model=model,
            method=method,
            seed=seed,
            fingerprint=f"evaluation-{model}-{method}-{seed}",
            domains=tuple(DOMAINS),
            tasks=tasks,
            averages=averages,
            groups=GROUPS,
            target_tasks=TARGETS,
            routing_by_site={1: self.routing(method, seed)} if routes else {},
        )

    def retrained(self, intervention: str, seed: int, score: float) -> Evaluation:
        """An evaluation of sc_lora on micro_m, trained and scored under an intervention."""
        record = self.evaluation("micro_m", "sc_lora", seed)
        mean = score + 0.001 * seed
        target = replace(record.averages["target"], value=mean)
        return replace(
            record,
            tasks=record.tasks | {task: self.score(mean, task) for task in TARGETS.values()},
            averages=record.averages | {"target": target},
            intervention=intervention,
            phase="training",
            fingerprint=f"retrained-{intervention}-{seed}",
        )

    def history(self, method: str, seed: int) -> tuple[RoutingAtStep, ...]:
        """Routing over training: both begin evenly; moe_lora loses specialists, sc_lora none."""
        lost = 0.7 if method == "moe_lora" else 0.03
        noise = np.random.default_rng(seed).normal(0, 0.01, 8)
        return tuple(
            RoutingAtStep(
                step=50 * (at + 1),
                usage_entropy=float(0.97 - lost * at / 7 + noise[at]),
                token_entropy=0.4,
                load_cv2=0.1,
                dead_specialists=int(method == "moe_lora" and at > 3),
                max_load=0.3 + lost * at / 12,
                mean_rank=9.0,
            )
            for at in range(8)
        )

    def over_training(self, record: Evaluation) -> Evaluation:
        """The record with what training left: routing over time, and at every site."""
        if record.routing is None:
            return record
        ranks = record.routing.rank_by_domain
        sites = {
            site: replace(
                record.routing, rank_by_domain={d: rank - 1.5 * place for d, rank in ranks.items()}
            )
            for place, site in enumerate((1, 3, 5))
        }
        return replace(
            record,
            routing_history=self.history(record.method, record.seed),
            routing_by_site=sites if record.method == "sc_lora" else {1: sites[1]},
        )

    @staticmethod
    def rerouted(record: Evaluation, **changes: float) -> Evaluation:
        """The record with other figures of its routing at evaluation."""
        site, *_ = record.routing_by_site
        changed = {site: replace(record.routing, **changes)}
        return replace(record, routing_by_site=record.routing_by_site | changed)

    def routing(self, method: str, seed: int) -> Routing:
        collapsed = method == "moe_lora"
        if collapsed:
            gates = np.tile([0.93, 0.05, 0.01, 0.01], (5, 1))
        else:
            gates = np.full((5, 4), 0.1)
            gates[np.arange(5), [0, 1, 2, 3, 3]] = 0.7
        return Routing(
            usage_entropy=0.25 - 0.01 * seed if collapsed else 0.95 + 0.01 * seed,
            token_entropy=0.2,
            load_cv2=2.5 if collapsed else 0.1,
            dead_specialists=2 if collapsed else 0,
            max_load=0.93 if collapsed else 0.4,
            mean_rank=9.0,
            routed=1.0,
            mutual_information=0.01 if collapsed else 0.62,
            mutual_information_null=0.01,
            mutual_information_null_95=0.02,
            gate_by_domain=dict(zip(DOMAINS, gates.tolist(), strict=True)),
            rank_by_domain={d: 8.0 + i + 0.2 * seed for i, d in enumerate(DOMAINS)},
            tokens=10000,
        )

    def evaluations(
        self, models=("micro_s", "micro_m", "micro_l"), seeds=(0, 1)
    ) -> list[Evaluation]:
        return [
            self.evaluation(model, method, seed)
            for model in models
            for method in (BASE, "lora", "moe_lora", "sc_lora")
            for seed in seeds
        ]

    def ablation(self, seed: int, method: str = "sc_lora") -> Ablation:
        return Ablation(
            model="micro_m",
            method=method,
            seed=seed,
            fingerprint=f"ablation-{method}-{seed}",
            domains=tuple(DOMAINS),
            interventions={
                name: {d: self.score(0.6 * kept + 0.002 * seed * kept**2, d) for d in DOMAINS}
                for name, kept in self.kept.items()
            },
        )

    def ablations(self, seeds=(0, 1)) -> list[Ablation]:
        return [self.ablation(seed) for seed in seeds]

    def doses(self, record: Ablation) -> Ablation:
        """The ablation with the doses of every control, the drop growing with the square."""
        doses = {
            name: {
                strength: {d: self.score(0.6 * (1 - (1 - kept) * strength**2), d) for d in DOMAINS}
                for strength in STRENGTHS
            }
            for name, kept in self.kept.items()
            if name not in (INTACT, "oracle_domain")
        }
        return replace(record, doses=doses)

    def sequential(self, method: str, order: str, seed: int) -> DomainSequence:
        sequence = SEQUENCES[order]
        # Forgetting differs between replicates by 1 %, in each method its own way; 0 on average.
        sign = (1, -1, 1, -1) if method == "lora" else (1, -1, -1, 1)
        lost = self.forgetting[method] * (1 + 0.01 * sign[seed % 4])
        matrix = np.full((6, 5), 0.05)
        for stage, domain in enumerate(sequence, start=1):
            column = DOMAINS.index(domain)
            matrix[stage:, column] = 0.8 - lost
            matrix[stage, column] = 0.8
        matrix += 0.004 * seed
        return DomainSequence(
            model="micro_m",
            method=method,
            seed=seed,
            fingerprint=f"sequential-{method}-{order}-{seed}",
            order=order,
            sequence=tuple(sequence),
            broad=DOMAINS[0],
            domains=tuple(DOMAINS),
            matrix=matrix.tolist(),
            stderr=np.full((6, 5), 0.01).tolist(),
            items=self.items,
            metrics=forgetting_metrics(matrix, sequence=sequence, domains=DOMAINS),
        )

    def general(self, record: DomainSequence) -> DomainSequence:
        """The sequence with general knowledge and drift: what forgets domains forgets facts too."""
        lost = self.forgetting[record.method]
        after = 0.95 * (1 - lost) + 0.002 * record.seed
        return replace(
            record,
            general=GeneralKnowledge(before=Estimate(0.95, 0.01), after=Estimate(after, 0.012)),
            drift=tuple(lost * (stage + 1) / 5 + 0.01 * record.seed for stage in range(5)),
        )

    def sequentials(self, seeds=(0, 1)) -> list[DomainSequence]:
        return [
            self.sequential(method, order, seed)
            for method in self.forgetting
            for order in SEQUENCES
            for seed in seeds
        ]
