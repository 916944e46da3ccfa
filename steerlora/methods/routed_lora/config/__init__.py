"""Configuration of low-rank specialists: routed ones, and kinds for sequences of domains."""

from steerlora.methods.routed_lora.config.routed import (
    CONTEXTS,
    SIGNALS,
    HealthConfig,
    LossWeights,
    MemoryConfig,
    RoutedLoRAConfig,
)
from steerlora.methods.routed_lora.config.sequential import AnalyticLoRAConfig, SubspaceLoRAConfig

__all__ = [
    "CONTEXTS",
    "SIGNALS",
    "AnalyticLoRAConfig",
    "HealthConfig",
    "LossWeights",
    "MemoryConfig",
    "RoutedLoRAConfig",
    "SubspaceLoRAConfig",
]
