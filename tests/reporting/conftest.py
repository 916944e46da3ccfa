"""Invented score records, in which every claim of the paper holds or fails as a test wishes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

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

    def cell(self, mean: float, key: str) -> dict:
        scores = self.scores(mean, key)
        return {
            "value": float(np.mean(scores)),
            "stderr": float(np.std(scores) / np.sqrt(self.items)),
            "items": self.items,
            "per_item": scores,
        }

    def evaluation(self, model: str, adapter: str, seed: int) -> dict:
        adapted = adapter != "none"
        means = {t: s + adapted * self.gains[t] for t, s in BASE_SCORES.items()}
        means |= {task: 0.6 if adapted else 0.05 for task in TARGETS.values()}
        tasks = {
            task: self.cell(mean + 0.001 * seed * adapted, task) for task, mean in means.items()
        }
        averages = {
            group: {
                "value": float(np.mean([tasks[task]["value"] for task in members])),
                "stderr": float(np.mean([tasks[task]["stderr"] for task in members])),
            }
            for group, members in (GROUPS | {"target": list(TARGETS.values())}).items()
        }
        return {
            "model": model,
            "adapter": adapter,
            "seed": seed,
            "domains": DOMAINS,
            "fingerprint": f"evaluation-{model}-{adapter}-{seed}",
            "tasks": {t: {"metric": "acc,none", "version": 1} | c for t, c in tasks.items()},
            "averages": averages,
            "groups": GROUPS,
            "target_tasks": TARGETS,
            "routing": self.routing(adapter, seed) if adapter in ("moe_lora", "sc_lora") else None,
        }

    def routing(self, adapter: str, seed: int) -> dict:
        collapsed = adapter == "moe_lora"
        if collapsed:
            gates = np.tile([0.93, 0.05, 0.01, 0.01], (5, 1))
        else:
            gates = np.full((5, 4), 0.1)
            gates[np.arange(5), [0, 1, 2, 3, 3]] = 0.7
        return {
            "usage_entropy": (0.25 if collapsed else 0.95) + 0.01 * seed,
            "token_entropy": 0.2,
            "load_cv2": 2.5 if collapsed else 0.1,
            "dead_specialists": 2 if collapsed else 0,
            "max_load": 0.93 if collapsed else 0.4,
            "mutual_information": 0.01 if collapsed else 0.62,
            "mutual_information_null": 0.01,
            "mean_rank": 9.0,
            "gate_by_domain": dict(zip(DOMAINS, gates.tolist(), strict=True)),
            "rank_by_domain": {d: 8.0 + i + 0.2 * seed for i, d in enumerate(DOMAINS)},
            "tokens": 10000,
        }

    def evaluations(self, models=("micro_s", "micro_m", "micro_l"), seeds=(0, 1)) -> list[dict]:
        return [
            self.evaluation(model, adapter, seed)
            for model in models
            for adapter in ("none", "lora", "moe_lora", "sc_lora")
            for seed in (seeds if model == "micro_m" else seeds[:1])
        ]

    def ablation(self, seed: int, adapter: str = "sc_lora") -> dict:
        return {
            "model": "micro_m",
            "adapter": adapter,
            "seed": seed,
            "fingerprint": f"ablation-{adapter}-{seed}",
            "domains": DOMAINS,
            "interventions": {
                name: {d: self.cell(0.6 * kept + 0.002 * seed, d) for d in DOMAINS}
                for name, kept in self.kept.items()
            },
        }

    def sequential(self, adapter: str, order: str, seed: int) -> dict:
        sequence = SEQUENCES[order]
        matrix = np.full((6, 5), 0.05)
        for stage, domain in enumerate(sequence, start=1):
            column = DOMAINS.index(domain)
            matrix[stage:, column] = 0.8 - self.forgetting[adapter]
            matrix[stage, column] = 0.8
        matrix += 0.004 * seed
        return {
            "model": "micro_m",
            "adapter": adapter,
            "seed": seed,
            "fingerprint": f"sequential-{adapter}-{order}-{seed}",
            "order": order,
            "sequence": sequence,
            "domains": DOMAINS,
            "matrix": matrix.tolist(),
            "stderr": np.full((6, 5), 0.01).tolist(),
            "items": self.items,
        }

    def sequentials(self, seeds=(0, 1)) -> list[dict]:
        return [
            self.sequential(adapter, order, seed)
            for adapter in self.forgetting
            for order in SEQUENCES
            for seed in seeds
        ]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(scope="session")
def make_world() -> type[World]:
    return World
