"""lm-eval's task files of classification tasks, written at run time: their names are the user's."""

from __future__ import annotations

import json
from pathlib import Path

from steerlora.evaluation.suite import Domains


def local_task_yamls(domains: Domains, out_dir: Path) -> list[Path]:
    """Write the task files of every domain into ``out_dir``, which is created.

    A task that ranks a domain's labels and the one that has the answer written read the same items.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    forms = {"_ranked": domains.target_tasks, "_written": domains.written_tasks}
    paths = []
    for form, tasks in forms.items():
        for name, task in tasks.items():
            config = {
                "include": str(Path(__file__).with_name(form)),
                "task": task,
                "dataset_kwargs": {"file": domains.target_tasks[name]},
            }
            paths.append(out_dir / f"{task}.yaml")
            paths[-1].write_text(json.dumps(config) + "\n")  # JSON is YAML
    return paths


def exact_match(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether what is written is the label, up to case and the white space around it."""
    written, label = (text.strip().casefold() for text in (results[0], doc["response"]))
    return {"exact_match": float(written == label)}
