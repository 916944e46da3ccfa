"""What README and docs/ say that needs no run: tree, toys, targets, links, what is downloaded."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.readme import COMMANDS, FENCES, PAGES, ROOT

RUN_BY = ("steerlora ", "make ", "torchrun ", "sbatch ", "python scripts/", "python -m steerlora")
INSTALLS = "pip install "
"""Beginnings of commands; a test of this folder, or of tests/scripts, runs each of them."""


def test_every_command_is_of_a_kind_that_a_test_runs():
    assert COMMANDS
    assert [c for c in COMMANDS if not c.startswith((*RUN_BY, INSTALLS))] == []


def test_what_pip_is_asked_for_is_what_make_asks_it_for():
    makefile = (ROOT / "Makefile").read_text()
    asked = re.findall(r"\$\(BIN\)/(pip install) --quiet (.*)", makefile)
    assert [c for c in COMMANDS if c.startswith(INSTALLS)] == [" ".join(words) for words in asked]


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors_of(found), target


def tree_of(folder: Path) -> list[str]:
    """Folders that hold code or settings, as git has them, by path from the root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=folder,
        capture_output=True,
        text=True,
    ).stdout.split()
    found = {parent.as_posix() for name in listed for parent in Path(name).parents}
    deep = {path for path in found if path.startswith("steerlora/")}
    return sorted((found & {path.split("/")[0] for path in found}) - {".", ".ci"} | deep)


def test_the_tree_is_the_tree():
    if not (ROOT / ".git").exists():
        pytest.skip("the tree is compared with what git lists: there is no checkout here")
    (block,) = [block for language, block in FENCES if not language]
    paths, above = [], []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, *said = line.split(maxsplit=1)
        assert said, f"{name} is not described"
        above[depth:] = [name.rstrip("/")]
        paths.append("/".join(above))
    assert sorted(paths) == tree_of(ROOT)


EXTENSION = ROOT / "tests/extension"
SHOWN = sorted(
    path.relative_to(EXTENSION).as_posix()
    for path in (*EXTENSION.glob("*.py"), *EXTENSION.rglob("*.yaml"))
    if not path.name.startswith("test_")
)


@pytest.mark.parametrize("name", SHOWN)
def test_adding_to_it_shows_what_the_tests_run(name):
    language = {"py": "python", "yaml": "yaml"}[name.rpartition(".")[2]]
    assert (language, (EXTENSION / name).read_text()) in FENCES


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_commands_exist(command):
    said = subprocess.run(
        ["make", "--dry-run", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr


def test_the_download_finds_what_there_is_to_fetch():
    (command,) = [c for c in COMMANDS if "download.py" in c]
    words = [sys.executable, *shlex.split(command)[1:], "--dry-run"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    for thing in ("Qwen/Qwen3-8B", "Qwen/SAE-Res", "openai/gsm8k", "cais/mmlu", "punkt_tab"):
        assert thing in said.stdout
