"""Things of one kind by name: methods, SAE architectures, interventions, routers, stages.

A decorator registers each beside its code; nothing else lists them.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from steerlora.errors import UserError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """What is registered under names of one kind.

    Args:
        kind: what a user calls one of them, for messages.
        sources: modules that register things when they are imported; ``*`` stands for any name in a
            package. A look-up imports one source after the other until it has found its name, so
            what is quick to import stands first.
    """

    def __init__(self, kind: str, *sources: str) -> None:
        self.kind, self.sources = kind, sources
        self._found: dict[str, T] = {}
        self._imported = 0

    def register(self, name: str, **facts: Any) -> Callable[[T], T]:
        """Decorator: makes a class or function known by its name.

        Args:
            name: as configurations spell it.
            facts: set as attributes of what is registered.
        """

        def add(item: T) -> T:
            other = self._found.get(name)
            # The same definition again is a module that was imported twice.
            assert other is None or _origin(other) == _origin(item), (
                f"{self.kind} {name} is registered twice"
            )
            for fact, value in facts.items():
                setattr(item, fact, value)
            self._found[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        """What bears the name.

        Raises:
            UserError: nothing does; with the nearest names.
        """
        self.check(self.kind, name)
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        while name not in self._found and self._imported < len(self.sources):
            self.import_first(self._imported + 1)
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self.items()))

    def items(self) -> list[tuple[str, T]]:
        """(name, what is registered), of all sources."""
        self.import_first(len(self.sources))
        return list(self._found.items())

    def known(self) -> list[tuple[str, T]]:
        """(name, what is registered), of the first source and whatever else has been imported."""
        self.import_first(1)
        return list(self._found.items())

    def check(self, key: str, name: str) -> None:
        """Refuse a name that is not registered.

        Args:
            key: of the configuration that gives the name.

        Raises:
            UserError: with the nearest names.
        """
        if name not in self:
            raise UserError(f"{key}={name}: {nearest(name, self)}")

    def import_first(self, count: int) -> None:
        """Import the first ``count`` sources."""
        for source in self.sources[self._imported : count]:
            self._imported += 1
            for module in _matching(source):
                importlib.import_module(module)


def _matching(source: str) -> Iterator[str]:
    """The modules that a source names; ``*`` is any module or package of the package before it."""
    package, star, rest = source.partition(".*")
    if not star:
        yield source
        return
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
        name = f"{package}.{found.name}{rest}"
        if not rest or (found.ispkg and importlib.util.find_spec(name)):
            yield name


def _origin(item: Any) -> tuple[str, str] | int:
    """Where a class or function is defined; other things are only themselves."""
    if hasattr(item, "__qualname__"):
        return item.__module__, item.__qualname__
    return id(item)


def import_plugins(modules: Iterable[str]) -> list[Path]:
    """Import modules of the user's, installed or in the current folder, which register what they
    define.

    Returns:
        Their folders of configuration: ``conf/`` beside each, where there is one.

    Raises:
        UserError: there is no such module, or it is no Python.
    """
    folders = []
    for name in modules:
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)
        try:
            module = importlib.import_module(name)
        except (ImportError, SyntaxError) as error:
            raise UserError(
                f"plugins: {name} cannot be imported ({error}): give modules that are installed or "
                "lie in the current folder"
            ) from error
        folder = Path(module.__file__).resolve().parent / "conf" if module.__file__ else None
        folders += [folder] if folder and folder.is_dir() else []
    return folders
