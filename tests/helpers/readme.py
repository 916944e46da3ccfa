"""The blocks of code of README and docs/, and their commands at sizes that teach nothing and take
seconds."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from transformers import AutoConfig

from steerlora.__main__ import main
from steerlora.lm.pretrained import shape_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCES = [
    fence
    for page in PAGES
    for fence in re.findall(
        r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
]
"""(language, text) of every block of code."""
COMMANDS = list(
    dict.fromkeys(
        line.split("#")[0].strip()
        for language, block in FENCES
        if language == "bash"
        for line in block.splitlines()
        if line
    )
)
"""Each once."""
SWEEPS = [c for c in COMMANDS if c.startswith("steerlora -m")]
EXPERIMENTS = [c for c in COMMANDS if c.startswith("steerlora experiment=")]
STAGES = [c for c in COMMANDS if c.startswith("steerlora") and c not in SWEEPS + EXPERIMENTS]

TINY = {
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.head_width": 16,
    "model.ffn_width": 64,
    "model.vocabulary": 300,
    "model.steps": 2,
    "model.batch_size": 8,
    "method.sites": "[1]",
    "sae.latents": 64,
    "sae.max_tokens": 2000,
    "sae.steps": 2,
    "sae.batch_size": 128,
    "trainer.max_steps": 2,
    "trainer.batch_size": 8,
    "trainer.max_length": 64,
    "order.steps_per_domain": 1,
    "domains.train_items": 16,
    "domains.pretrain_items": 100,
    "domains.evaluation_items": 8,
    "evaluation.limit": 4,
    "evaluation.max_length": 64,
    "evaluation.generation_items": 1,
    "logger": "none",
    "study.workers": 1,
    "study.seeds": "[0]",
    "study.scale_seeds": "[0]",
    "study.orders": "[broad_first]",
}


def shrunk(command: str, text_folder: Path, root: Path, pretrained: Path) -> list[str]:
    """The command's arguments with everything tiny, and hub ids replaced by a local model."""
    words = shlex.split(command)[1:]
    words = [word.replace("domains.dir=data", f"domains.dir={text_folder}") for word in words]
    if "stage=plan" in words:  # it needs neither the model nor the GPU
        return words
    words = ["trainer=cpu" if word == "trainer=gpu" else word for word in words]
    # Here there may be no SLURM: its own tests run sweeps under one where there is.
    words = [word.replace("submitit_slurm", "submitit_local") for word in words]
    words = ["evaluation=micro" if word == "evaluation=paper" else word for word in words]
    words = ["domains=micro" if word == "domains=paper" else word for word in words]
    tiny = {**TINY, "artifacts.root": root, "results.dir": root / "results"}
    if any(word.startswith("model=qwen3") for word in words):
        shape = shape_of(AutoConfig.from_pretrained(pretrained))
        tiny |= {f"model.{key}": value for key, value in shape.items()}
        tiny |= {"model.path": pretrained, "model.thinking": "null", "sae.path": "null"}
    if "experiment=continual" in words:
        tiny |= {"study.sequential_methods": "[lora,sc_lora_context]"}
    if "experiment=published" in words:
        tiny |= {"sae.epochs": "null"}
    if "experiment=calibration" in words:
        tiny |= {"study.seeds": "[0,1,2]", "study.scale_seeds": "[0,1,2]", "study.calibrate": "[2]"}
        tiny |= {"study.models": "[micro_m]", "study.interventions": "[shuffle]"}
    if "experiment=published" in words:
        tiny |= {"study.interventions": "[shuffle]", "study.methods": "[sc_lora_reference]"}
    if "experiment=micro_full" in words:
        tiny |= {f"study.{those}methods": "[lora,sc_lora]" for those in ("", "scale_")}
        tiny |= {"study.sequential_methods": "[lora,sc_lora]"}
        tiny |= {"study.interventions": "[shuffle]", "study.retrained": "[shuffle]"}
        tiny |= {"study.doses": "[0.5]"}
    if "experiment=geometry" in words:
        own = {"layers": "[2]", "ranks": "[2,4]", "controls": "[2]", "tokens": 200}
        own |= {"held_out": 100, "steps": 2, "batch_size": 32}
        tiny |= {f"study.settings.{key}": value for key, value in own.items()}
    if "experiment=routing_signals" in words:
        own = {"domains": 2, "rows": 8, "test_rows": 4, "levels.domains": "[2,3]"}
        own |= {"levels.rows": "[4,8]", "levels.tokens": "[1,2]", "levels.noise": "[0,0.5]"}
        tiny |= {f"study.settings.{key}": value for key, value in own.items()}
    if "experiment=stan" in words:
        tiny |= {f"study.{those}methods": "[lora,stan]" for those in ("", "sequential_")}
        tiny |= {"study.settings.rows": 6}
    if "experiment=steering" in words:
        own = {"ways": "[latents,probe]", "texts": 12, "support": 12, "prompts": 4, "saes": "null"}
        own |= {"least_output_score": 0}  # a base of no training says nothing
        tiny |= {f"study.settings.{key}": value for key, value in own.items()}
    if "experiment=smoke" in words:
        tiny = {"artifacts.root": root, "results.dir": root / "results", "logger": "none"}
    if "--cfg" in words:
        tiny = {}
    return [*words, *(f"{key}={value}" for key, value in tiny.items())]


def runs(command: str, text_folder: Path, root: Path, pretrained: Path) -> bool:
    """Whether a ``steerlora`` command ends well."""
    try:
        main(shrunk(command, text_folder, root, pretrained))
    except SystemExit as stopped:  # a sweep always says how it ended
        return not stopped.code
    return True
