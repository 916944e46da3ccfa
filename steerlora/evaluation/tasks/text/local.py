"""lm-eval's own ``gsm8k`` and ``ifeval`` on local files: task files written at run time.

A task file can include an installed one only by its absolute path, so these cannot be shipped.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import lm_eval.tasks
import yaml

_OWN_FILES = {"text_gsm8k": "gsm8k/gsm8k.yaml", "text_ifeval": "ifeval/ifeval.yaml"}


class _PlainLoader(yaml.SafeLoader):
    """Reads a task file as data: lm-eval's ``!function`` references stay names."""


_PlainLoader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def local_task_yamls(
    domains_dir: Path, out_dir: Path, limit: int | None = 40, max_generated_tokens: int = 128
) -> list[Path]:
    """Write ``text_gsm8k.yaml`` and ``text_ifeval.yaml`` where the domains have items for them.

    Args:
        domains_dir: the text domains artifact.
        out_dir: where the task files and the rows they read are written; created.
        limit: most items of a task, None for all; generation is the slow part of an evaluation.
        max_generated_tokens: most tokens of an answer. lm-eval cuts prompts to what the context
            leaves beside it, so it has to stay well below a small model's context.

    Returns:
        The task files, to be given to lm-eval as tasks. The prompts, scoring and stop strings are
        lm-eval's own, zero-shot.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for task, own_file in _OWN_FILES.items():
        items = domains_dir / "evaluation" / f"{task}.jsonl"
        if not items.exists():
            continue
        rows = (out_dir / f"{task}.jsonl").resolve()
        with items.open(encoding="utf-8") as lines:
            rows.write_text("".join(islice(lines, limit)), encoding="utf-8")
        own = Path(lm_eval.tasks.__file__).parent / own_file
        config = {
            "include": str(own),
            "task": task,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "test_split": "test",
            "generation_kwargs": yaml.load(own.read_text(), _PlainLoader)["generation_kwargs"]
            | {"max_gen_toks": max_generated_tokens},
            # Five examples, as gsm8k has them, do not fit the context of a small model.
            "training_split": None,
            "fewshot_split": None,
            "num_fewshot": 0,
        }
        path = out_dir / f"{task}.yaml"
        path.write_text(json.dumps(config, indent=2) + "\n")  # JSON is YAML
        paths.append(path)
    return paths
