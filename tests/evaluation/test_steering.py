"""Scores of steered answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from steerlora.evaluation.records import read_record, write_record
from steerlora.evaluation.steering import (
    Fluency,
    SteeredConcept,
    SteeringRecord,
    best_factor,
    harmonic_mean,
)


def test_the_score_is_the_harmonic_mean_and_none_where_a_part_is():
    assert harmonic_mean([2, 2, 2]) == 2
    assert harmonic_mean([1, 2, 2]) == pytest.approx(1.5)
    assert harmonic_mean([0, 2, 2]) == 0


def test_fluency_is_that_of_unsteered_answers():
    unsteered = np.linspace(-1, 0, 101).tolist()
    fluency = Fluency.of(unsteered)
    grades = [fluency.grade(likelihood) for likelihood in unsteered]
    assert grades == sorted(grades)
    assert (grades.count(0), grades.count(1)) == (5, 29)
    assert fluency.grade(-9) == 0


def test_the_best_factor_and_of_equal_ones_the_smallest():
    assert best_factor((0.1, 0.5, 2.0), (0.3, 0.9, 0.9)) == 0.5
    assert best_factor((2.0, 0.1), (0.0, 0.0)) == 0.1


def record(f1: float | None = 0.5) -> SteeringRecord:
    grades = {"concept": [2, 0], "instruction": [2, 2], "fluency": [1, 2]}
    concepts = [
        SteeredConcept(
            concept=name,
            f1=f1,
            auroc=0.9,
            candidate=3,
            searched=[0.1],
            factor=factor,
            grades=grades,
        )
        for name, factor in (("a", 1.0), ("b", 3.0))
    ]
    return SteeringRecord(
        model="micro_m",
        method="x",
        seed=0,
        fingerprint="f",
        way="latents",
        concepts=tuple(concepts),
        texts=8,
        l0=None,
    )


def test_a_record_gives_means_and_is_read_back(tmp_path):
    one = record()
    assert one.concepts[0].scores == [pytest.approx(1.5), 0]
    assert one.score == pytest.approx(0.75)
    assert one.grade("concept") == 1
    assert one.mean("factor") == 2
    assert math.isnan(record(None).mean("f1"))
    write_record(tmp_path / "one.json", one)
    assert read_record(tmp_path / "one.json", SteeringRecord) == one
