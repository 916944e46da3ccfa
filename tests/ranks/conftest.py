"""An artifact root to train in, and a training that was interrupted."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
from runs import ADAPTER, Starter, reached, until, weights
from torch import Tensor


@pytest.fixture(scope="session")
def upstream(ask, tmp_path_factory) -> Path:
    """An artifact root with all that the trainings under test read."""
    folder = tmp_path_factory.mktemp("upstream")
    root = folder / "artifacts"
    starter = Starter(folder, ask)
    starter("stage=sae_training", f"artifacts.root={root}").ends_well()
    given = [path.parent.name for path in root.glob("*/*/manifest.json")]
    (root / "given.txt").write_text("\n".join(given))
    return root


@pytest.fixture
def root(upstream, tmp_path) -> Path:
    """A copy of it, to train in."""
    return Path(shutil.copytree(upstream, tmp_path / "artifacts"))


class References(NamedTuple):
    """Roots in which the same adapter was trained, by one process."""

    unbroken: Path
    """In one go."""
    begun: Path
    """Until a signal came."""


@pytest.fixture(scope="session")
def references(ask, upstream, tmp_path_factory) -> References:
    folder = tmp_path_factory.mktemp("references")
    unbroken, begun = (Path(shutil.copytree(upstream, folder / name)) for name in ("a", "b"))
    starter = Starter(folder, ask)
    whole, part = (starter(ADAPTER, f"artifacts.root={root}") for root in (unbroken, begun))
    until(reached(begun, 5))
    part.send(signal.SIGTERM)
    assert part.wait() == 75
    whole.ends_well()
    return References(unbroken, begun)


@pytest.fixture(scope="session")
def unbroken(references) -> dict[str, Tensor]:
    """The weights of an adapter that was trained in one go, by one process."""
    return weights(references.unbroken)


@pytest.fixture
def begun(references, tmp_path) -> Path:
    """A root in which its training was preempted."""
    return Path(shutil.copytree(references.begun, tmp_path / "begun"))
