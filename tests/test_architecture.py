"""The house keeps its order: what imports what, what is named where, and what lies at the top."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import steerlora
from steerlora.cli import sections
from steerlora.methods.config import METHODS

PACKAGE = Path(steerlora.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = (
    {"errors", "text"},
    {"registry", "config"},
    {"distributed", "engine"},
    {"lm", "saes"},
    {"methods", "reporting", "evaluation", "training", "data", "planning"},
    {"stages"},
    {"cli"},
    {"__main__", "__init__"},
)
"""Rooms of the house, the lowest first. Imports point down, or sideways without a circle."""
ENGINE_KNOWS = {"engine", "distributed", "errors", "registry", "text"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports when it runs; not what only a type checker reads."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("steerlora"):
            whole = node.module == "steerlora"
            yield from (
                f"steerlora.{name.name}" if whole else f"{node.module}.{name.name}"
                for name in node.names
            )
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("steerlora."))


def test_the_top_level_holds_rooms_and_five_files():
    files = {path.name for path in PACKAGE.glob("*.py")}
    assert files == {"__init__.py", "__main__.py", "errors.py", "registry.py", "text.py"}
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__", "conf"}
    assert rooms | {name.removesuffix(".py") for name in files} == set().union(*LAYERS)


def test_imports_point_down_and_make_no_circle():
    height = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
    edges = {
        (room_of(path), module.split(".")[1])
        for path in FILES
        for module in imports_of(path)
        if module.split(".")[1] != room_of(path)
    }
    assert [edge for edge in sorted(edges) if height[edge[0]] < height[edge[1]]] == []
    left = set(edges)
    while left:  # take away what imports nothing that is left
        ends = {room for _, room in left} - {room for room, _ in left}
        assert ends, f"a circle among {sorted(left)}"
        left = {edge for edge in left if edge[1] not in ends}


def test_what_runs_stages_knows_no_torch_module_of_ours():
    for path in FILES:
        if room_of(path) == "engine":
            for module in imports_of(path):
                assert module.split(".")[1] in ENGINE_KNOWS, path


def test_wandb_has_one_room():
    room = PACKAGE / "reporting"
    knows = {p for p in FILES if re.search(r"^\s*(import|from) wandb\b", p.read_text(), re.M)}
    assert knows
    assert knows <= {room / "runs.py", *room.glob("wandb_*.py")}


KINDS = sorted(path.name for path in (PACKAGE / "methods").iterdir() if path.is_dir())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "__pycache__"])
def test_a_kind_of_method_is_named_in_its_own_folder_only(kind):
    inside = PACKAGE / "methods" / kind
    word = re.compile(rf"\b{kind}\b")
    named = [p for p in FILES if not p.is_relative_to(inside) and word.search(p.read_text())]
    assert named == []


def method_words() -> set[str]:
    """Names and kinds of methods, and the words that tell routed methods apart."""
    names = set(sections.groups()["method"]) | set(METHODS)
    return names | {"dense", "prototype", "linear", "mlp", "own", "frozen", "base_last"}


def test_nothing_is_compared_with_a_method_outside_the_methods():
    """Stages ask a method for its capabilities."""
    words, found = method_words(), []
    for path in FILES:
        if room_of(path) == "methods":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.Match):
                constants = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                if constants & words:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
