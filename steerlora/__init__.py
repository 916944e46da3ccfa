"""Steering-conditioned LoRA via sparse autoencoders: train, ablate, report."""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["export_peft", "load_adapter", "load_sae", "run"]


def __getattr__(name: str):
    # Loaded on first use: the command line answers --help without importing torch.
    if name == "load_adapter":
        from steerlora.methods.saving import load_adapter as value
    elif name == "load_sae":
        from steerlora.saes.saelens import load_sae as value
    elif name == "export_peft":
        from steerlora.methods.saving import export_peft as value
    elif name == "run":
        from steerlora.cli.door import run as value
    else:
        raise AttributeError(f"module 'steerlora' has no attribute {name!r}")
    return value
