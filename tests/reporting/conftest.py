"""Fixtures of invented records."""

from __future__ import annotations

import pytest
from helpers.world import METHODS, World

from steerlora.reporting.methods import Methods


@pytest.fixture(scope="session")
def methods() -> Methods:
    """The parts that methods have in invented reports."""
    return METHODS


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(scope="session")
def make_world() -> type[World]:
    return World
