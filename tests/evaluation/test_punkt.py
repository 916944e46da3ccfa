"""The sentence splitter's data: found, or stood in for."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from steerlora.errors import UserError
from steerlora.evaluation import punkt

PROSE = [
    f"Dr. Smith saw patient {i} on Monday. The patient felt well. Dr. Jones agreed, i.e. he left. "
    "They met Dr. Brown later. It was late."
    for i in range(60)
]

# A fresh interpreter each time: NLTK fixes where it looks when it is imported.
PROGRAM = """
import json, sys
from pathlib import Path
from steerlora.evaluation.punkt import ensure_punkt
first = ensure_punkt(Path(sys.argv[1]), json.loads(sys.argv[2]))
again = ensure_punkt(Path(sys.argv[1]), iter(()))
import nltk
print(json.dumps([first, again, nltk.sent_tokenize("Dr. Smith slept. He left.")]))
"""


def run(directory: Path, texts: list[str], home: Path, hash_seed: str = "0") -> list:
    environment = dict(os.environ, HOME=str(home), NLTK_DATA="", PYTHONHASHSEED=hash_seed)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory), json.dumps(texts)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    pytest.importorskip("nltk")
    if any(Path(sys.prefix, part, "tokenizers/punkt_tab").exists() for part in ("nltk_data",)):
        pytest.skip("the real punkt_tab is installed beside this interpreter")
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_a_stand_in_is_trained_once_and_admitted(home: Path, tmp_path: Path) -> None:
    tmp_path.chmod(tmp_path.stat().st_mode | stat.S_IWGRP)  # a folder a group may write to
    want = [True, True, ["Dr. Smith slept.", "He left."]]
    assert run(tmp_path / "data", PROSE, home) == want
    run(tmp_path / "twin", PROSE, home, hash_seed="7")
    english = tmp_path / "data" / "tokenizers" / "punkt_tab" / "english"
    assert "dr" in (english / "abbrev_types.txt").read_text().split()
    for path in english.iterdir():
        twin = tmp_path / "twin" / "tokenizers" / "punkt_tab" / "english" / path.name
        assert path.read_bytes() == twin.read_bytes()
    assert [path.name for path in english.parent.parent.iterdir()] == ["punkt_tab"]


def test_installed_data_is_preferred(home: Path, tmp_path: Path) -> None:
    english = home / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (english / name).write_text("")
    (english / "abbrev_types.txt").write_text("slept")
    want = [False, False, ["Dr.", "Smith slept. He left."]]  # as the installed data has it
    assert run(tmp_path / "other", PROSE, home) == want
    assert not (tmp_path / "other").exists()


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = punkt.importlib.util.find_spec
    monkeypatch.setattr(
        punkt.importlib.util,
        "find_spec",
        lambda name: None if name in ("langdetect", "nltk") else found(name),
    )
    with pytest.raises(UserError, match=r"needs langdetect, nltk: pip install 'steerlora\[text\]'"):
        punkt.ensure_punkt(tmp_path, [])
    assert not list(tmp_path.iterdir())
