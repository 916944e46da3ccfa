"""Plain LoRA in the format of the PEFT library (adapter_config.json, adapter_model.safetensors)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

if TYPE_CHECKING:
    from steerlora.methods.routed_lora.adapter import Adapter


def export_peft(
    adapter: Adapter, directory: Path, *, base_path: str, specialist: int | None = None
) -> None:
    """Write a plain LoRA so that ``peft.PeftModel.from_pretrained(base, directory)`` reads it.

    A ``specialist`` is one LoRA of rank R. The stacked specialists are one of rank E * R; alpha is
    scaled with it, so that the update (alpha / r) B A x stays the same.
    """
    config = adapter.config
    directory.mkdir(parents=True, exist_ok=True)
    rows, rank = slice(None), config.total_rank
    if specialist is not None:
        rows, rank = config.rows_of(specialist), config.rank
    state, layers, modules = {}, set(), set()
    for name, layer in adapter.layers.items():
        index, module = name.replace("/", ".").split(":")
        layers.add(int(index))
        modules.add(module)
        key = f"base_model.model.{adapter.layers_path}.{index}.{module}"
        state[f"{key}.lora_A.weight"] = layer.A[rows].detach().contiguous()
        state[f"{key}.lora_B.weight"] = layer.B[:, rows].detach().contiguous()
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    stored = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_path,
        "r": rank,
        "lora_alpha": config.alpha / config.rank * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(modules),
        "layers_to_transform": sorted(layers),
        "layers_pattern": adapter.layers_path.rsplit(".", 1)[-1],
    }
    (directory / "adapter_config.json").write_text(json.dumps(stored, indent=2) + "\n")
