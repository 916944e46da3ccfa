"""Artifacts that no stage built: a manifest and a record, with everything that they come from."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from steerlora.engine.manifests import (
    FINGERPRINT_DIGITS,
    MANIFEST,
    describe_files,
    sealed,
    write_json,
)
from steerlora.evaluation.records import FILES, write_record

INTACT = {"name": "none", "seed": 0, "strength": 1.0, "phase": "evaluation"}


def store(
    root: Path,
    stage: str,
    config: dict[str, Any],
    inputs: dict[str, str] | None = None,
    *,
    summary: dict[str, Any] | None = None,
    record: Any = None,
) -> str:
    """Write a complete artifact; its fingerprint."""
    name = hashlib.sha256(repr((stage, config, inputs)).encode()).hexdigest()[:FINGERPRINT_DIGITS]
    folder = root / stage / name
    folder.mkdir(parents=True, exist_ok=True)
    if record is not None:
        (file,) = (file for file, kind in FILES.items() if isinstance(record, kind))
        write_record(folder / file, replace(record, fingerprint=name))
    manifest = {
        "label": f"{stage} of a test",
        "stage": stage,
        "fingerprint": name,
        "config": config,
        "inputs": inputs or {},
        "summary": summary or {},
        "files": describe_files(folder),
        "created": "2026-01-01T00:00:00+00:00",
    }
    write_json(folder / MANIFEST, sealed(manifest))
    return name


def store_adapter(root: Path, *, method: str, rank: int, seed: int) -> dict[str, str]:
    """An adapter and what it was trained from; {input of an evaluation: its fingerprint}."""
    names = ["instruction", "math", "code", "medicine", "law"]
    domains = store(root, "domains", {"domains": {"name": "micro", "names": names, "seed": 0}})
    model = {"name": "micro_m", "layers": 4, "seed": 0, "path": None}
    trainer = {"precision": "32-true", "accelerator": "cpu", "strategy": "single"}
    base = store(
        root, "base", {"model": model, "trainer": {**trainer, "max_steps": 9}}, {"domains": domains}
    )
    both = {"domains": domains, "base": base}
    sae = store(
        root,
        "sae_training",
        {"sae": {"architecture": "topk", "k": 16, "seed": 0}, "site": 1, "trainer": trainer},
        both,
        summary={"fvu": 0.1},
    )
    adapter = store(
        root,
        "adapter_training",
        {
            "method": {"name": method, "rank": rank, "sites": [1]},
            "trainer": {**trainer, "max_steps": 400},
            "intervention": INTACT,
            "domains": names,
            "seed": seed,
            "logger": {"name": "none"},
        },
        {**both, "saes[0]": sae},
        summary={"tokens": 100, "tokens_per_second": 50.0, "parameters": 10},
    )
    return {**both, "adapter": adapter}


def store_evaluation(root: Path, record: Any, *, rank: int = 16) -> str:
    """The evaluation that a record is of, with an adapter of that rank."""
    config = {
        "model": record.model,
        "method": record.method,
        "options": {},
        "seed": record.seed,
        "evaluation": {"limit": 100, "tasks": None},
        "intervention": {**INTACT, "name": record.intervention, "phase": record.phase},
        "accelerator": "cpu",
        "logger": {"name": "none"},
    }
    inputs = store_adapter(root, method=record.method, rank=rank, seed=record.seed)
    return store(root, "evaluate", config, inputs, record=record)
