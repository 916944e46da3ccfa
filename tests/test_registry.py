"""Registries: names and their sources, imported in turn; plugins; one line for what is wrong."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from steerlora.errors import UserError
from steerlora.registry import Registry, import_plugins

PACKAGE = "things_under_test"


@pytest.fixture
def things(tmp_path, monkeypatch) -> Iterator[Callable[..., Registry]]:
    """``things({file: source}, *sources)``: the registry of a package of these files.

    ``sources`` are names inside the package; what the files register with is ``thing``.
    """
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / PACKAGE

    def make(files: dict[str, str], *sources: str) -> Registry:
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        listed = ", ".join(f'"{PACKAGE}.{source}"' for source in sources)
        (folder / "registered.py").write_text(
            "from steerlora.registry import Registry\n"
            f'THINGS = Registry("method.thing", {listed})\n'
            "thing = THINGS.register\n"
        )
        for name, source in files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"from {PACKAGE}.registered import thing\n{source}\n")
        importlib.invalidate_caches()
        return importlib.import_module(f"{PACKAGE}.registered").THINGS

    yield make
    for name in imported():
        del sys.modules[name]


def imported() -> set[str]:
    return {name for name in sys.modules if name.split(".")[0] == PACKAGE}


def defining(*names: str) -> str:
    return "\n".join(f'@thing("{name}")\nclass {name.title()}: pass' for name in names)


def test_sources_are_imported_in_turn_until_the_name_is_there(things):
    registry = things(
        {"quick.py": defining("light"), "slow.py": defining("heavy")}, "quick", "slow"
    )
    assert f"{PACKAGE}.quick" not in imported()
    assert registry["light"].__name__ == "Light"
    assert f"{PACKAGE}.quick" in imported()
    assert f"{PACKAGE}.slow" not in imported()
    assert [name for name, _ in registry.known()] == ["light"]
    assert registry["heavy"].__name__ == "Heavy"
    assert list(registry) == ["light", "heavy"]


def test_going_through_the_names_imports_every_source(things):
    registry = things({"a.py": defining("one"), "b.py": defining("two", "three")}, "a", "b")
    assert [(name, thing.__name__) for name, thing in registry.items()] == [
        ("one", "One"),
        ("two", "Two"),
        ("three", "Three"),
    ]


def test_a_star_is_any_module_and_any_package_that_has_the_rest(things):
    registry = things(
        {
            "alone.py": defining("two"),
            "first/__init__.py": "",
            "first/config.py": defining("one"),
            "second/__init__.py": "",
            "third/__init__.py": "",
            "third/config.py": defining("three"),
        },
        "*.config",
        "*",
    )
    assert [name for name, _ in registry.known()] == ["one", "three"]
    assert f"{PACKAGE}.alone" not in imported()
    assert set(registry) == {"one", "two", "three"}
    assert f"{PACKAGE}.alone" in imported()


@pytest.mark.parametrize(
    ("name", "advice"),
    [("lineal", "did you mean 'linear'?"), ("xyz", "choose from linear, prototype")],
)
def test_an_unknown_name_gets_the_nearest_of_all_sources(things, name, advice):
    registry = things({"a.py": defining("prototype"), "b.py": defining("linear")}, "a", "b")
    assert name not in registry
    for ask in (lambda: registry[name], lambda: registry.check("method.thing", name)):
        with pytest.raises(UserError) as caught:
            ask()
        assert str(caught.value) == f"method.thing={name}: {advice}"
    with pytest.raises(UserError, match=f"^other.key={name}: "):
        registry.check("other.key", name)
    registry.check("method.thing", "linear")


def test_a_name_that_is_taken_is_refused_and_the_same_definition_is_not():
    registry = Registry("method.thing")

    class One:
        pass

    class Two:
        pass

    assert registry.register("a")(One) is One
    registry.register("a")(One)
    with pytest.raises(AssertionError, match=r"method\.thing a is registered twice"):
        registry.register("a")(Two)
    assert registry["a"] is One


def test_a_module_that_runs_twice_registers_once(things):
    registry = things({"a.py": defining("one")}, "a")
    first = registry["one"]
    second = importlib.reload(sys.modules[f"{PACKAGE}.a"]).One
    assert second is not first
    assert registry["one"] is second


def test_facts_become_attributes():
    registry = Registry("method.thing")

    @registry.register("a", quick=True, unit="tokens")
    def count() -> None:
        pass

    assert (count.quick, count.unit) == (True, "tokens")


# Plugins


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current one, which is not on Python's path."""
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def test_plugins_of_the_current_folder_are_imported_with_the_configuration_beside_them(folder):
    (folder / "plain_plugin.py").write_text("RAN = True")
    package = folder / "plugin_package"
    (package / "conf").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert import_plugins(["plain_plugin", "plugin_package"]) == [package / "conf"]
    assert sys.modules["plain_plugin"].RAN
    assert import_plugins([]) == []


@pytest.mark.parametrize(
    ("source", "missing"), [(None, "no_such_plugin"), ("import no_such_library", "no_such_library")]
)
def test_a_plugin_that_cannot_be_imported_is_one_line(folder, source, missing):
    if source:
        (folder / "no_such_plugin.py").write_text(source)
    with pytest.raises(UserError) as caught:
        import_plugins(["no_such_plugin"])
    assert str(caught.value).startswith(
        f"plugins: no_such_plugin cannot be imported (No module named '{missing}'): give modules"
    )
    assert "\n" not in str(caught.value)
