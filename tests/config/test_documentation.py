"""Every field of a public record is documented by a string literal under it in the source."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import textwrap
import typing
from collections.abc import Iterator

import pytest

from steerlora import cli, config, engine
from steerlora.distributed import devices
from steerlora.lm import shapes
from steerlora.methods.config import METHODS
from steerlora.saes.config import SAES


def modules_of(package) -> list:
    found = pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    return [importlib.import_module(one.name) for one in found]


MODULES = [*modules_of(config), *modules_of(engine), *modules_of(cli), devices, shapes]
"""Where documented records are defined. What a registry holds is added to `RECORDS`."""


def with_what_it_holds(schema: type) -> Iterator[type]:
    """A configuration, those that it builds on, and those that it holds in its fields."""
    for one in schema.__mro__:
        if dataclasses.is_dataclass(one):
            yield one
            for kind in typing.get_type_hints(one).values():
                if dataclasses.is_dataclass(kind):
                    yield from with_what_it_holds(kind)


KINDS = [kind for registry in (METHODS, SAES) for _, kind in registry.items()]


def records_in(module) -> list[type]:
    """The public dataclasses and NamedTuples that a module defines."""
    return [
        member
        for name, member in vars(module).items()
        if inspect.isclass(member)
        and member.__module__ == module.__name__
        and not name.startswith("_")
        and (dataclasses.is_dataclass(member) or hasattr(member, "_fields"))
    ]


RECORDS = [
    *(record for module in MODULES for record in records_in(module)),
    *dict.fromkeys(record for kind in KINDS for record in with_what_it_holds(kind)),
]


def undocumented(record: type) -> list[str]:
    """The fields in a class's own body that have no string literal under them.

    One that only has another default than in a base class is documented there.
    """
    body = ast.parse(textwrap.dedent(inspect.getsource(record))).body[0].body
    inherited = {
        name for base in record.__mro__[1:] for name in vars(base).get("__annotations__", ())
    }
    missing = []
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or statement.target.id.startswith("_"):
            continue
        if statement.target.id in inherited:
            continue
        match following:
            case ast.Expr(value=ast.Constant(value=str(text))) if text.strip():
                continue
        missing.append(statement.target.id)
    return missing


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__qualname__)
def test_every_field_has_its_documentation_under_it(record):
    assert not undocumented(record)
    assert "Attributes:" not in record.__doc__


def test_the_records_are_found():
    names = {record.__name__ for record in RECORDS}
    assert {"ModelConfig", "StudyConfig", "Step", "SlurmOptions", "Gpu", "DecoderShape"} <= names
    assert {"MethodConfig", "ReplayConfig", "RoutedLoRAConfig", "LossWeights"} <= names
    assert {"MemoryConfig", "HealthConfig", "SAEConfig", "TopKConfig"} <= names


class Partly:
    documented: int = 0
    """A number."""

    bare: int = 0
    empty: int = 0
    """"""
    last: int = 0


class More(Partly):
    documented: int = 1
    own: int = 0


def test_a_field_without_documentation_is_found():
    assert undocumented(Partly) == ["bare", "empty", "last"]
    assert undocumented(More) == ["own"]
