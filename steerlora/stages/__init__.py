"""Every stage, one file each; importing this package registers them."""

from __future__ import annotations

from steerlora.config import Config
from steerlora.engine.run import Step
from steerlora.stages import (
    activations,
    adapter_training,
    base,
    causal_ablation,
    domains,
    evaluate,
    features,
    sae_training,
    sequential_forgetting,
)


def steps_for(config: Config) -> tuple[Step, ...]:
    """The steps that ``stage=<name>`` asks for."""
    single = {
        "domains": domains.step,
        "base": base.step,
        "activations": activations.step,
        "adapter_training": adapter_training.step,
        "evaluate": evaluate.step,
        "causal_ablation": causal_ablation.step,
        "sequential_forgetting": sequential_forgetting.step,
    }
    by_site = {"sae_training": sae_training, "features": features}
    if config.stage.name in by_site:
        stage = by_site[config.stage.name]
        monitor = stage.monitor_step(config)
        return (*stage.steps(config), *([monitor] if monitor else []))
    return (single[config.stage.name](config),)
