"""What the README's commands read: text of one's own, an artifact root, a base model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.readme import shrunk

from steerlora.__main__ import main


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for domain in ("instruction", "math", "code", "medicine", "law"):
        rows = [
            {"prompt": f"{domain} question {number} about {number * 7}", "response": f"{number}"}
            for number in range(60)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{domain}_train.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def pretrained(root: Path) -> Path:
    """A base model on disk, as a user would have one."""
    main(shrunk("steerlora stage=base", root, root, root))
    return next((root / "base").glob("*/model"))
