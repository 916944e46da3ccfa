from __future__ import annotations

import json
from dataclasses import replace

import pytest

from steerlora.errors import UserError
from steerlora.evaluation.records import (
    BASE,
    INTACT,
    SCHEMA,
    Ablation,
    DomainSequence,
    Evaluation,
    GeneralKnowledge,
    MemoryEvent,
    Routing,
    RoutingAtStep,
    read_record,
    write_record,
)
from steerlora.evaluation.scores import Estimate, Score

SCORE = Score("acc,none", 0.5, 0.25, 2, "1.0", [0.0, 1.0], {"f1,none": 0.4}, None)
SUMMARY = {
    "usage_entropy": 0.9,
    "token_entropy": 0.2,
    "load_cv2": 0.1,
    "dead_specialists": 0,
    "max_load": 0.6,
    "mean_rank": 8.0,
}
ROUTING = Routing(
    **SUMMARY,
    routed=1.0,
    mutual_information=0.5,
    mutual_information_null=0.1,
    mutual_information_null_95=0.2,
    gate_by_domain={"law": [0.4, 0.6]},
    rank_by_domain={"law": 8.0},
    tokens=12,
)
WHERE = {"model": "m", "method": "x", "seed": 3, "fingerprint": "f" * 20, "domains": ("law",)}
EVALUATION = Evaluation(
    **WHERE,
    tasks={"law_task": SCORE},
    averages={"target": Estimate(0.5, 0.25)},
    groups={"general": ["a", "b"]},
    target_tasks={"law": "law_task"},
    routing_by_site={2: ROUTING, 1: replace(ROUTING, tokens=13)},
    routing_history=(RoutingAtStep(**SUMMARY, step=50),),
    stand_ins=("a stand-in",),
)
RECORDS = [
    EVALUATION,
    replace(EVALUATION, method=BASE, routing_by_site={}, routing_history=()),
    Ablation(
        **WHERE,
        interventions={INTACT: {"law": SCORE}, "shuffle": {"law": SCORE}},
        doses={"shuffle": {0.001: {"law": SCORE}}},
    ),
    DomainSequence(
        **WHERE,
        order="given",
        sequence=("law",),
        broad="law",
        matrix=[[0.1], [0.2]],
        stderr=[[0.01], [0.02]],
        items=2,
        metrics={"final_average": 0.2},
        general=GeneralKnowledge(before=Estimate(0.9, 0.1), after=Estimate(0.8, 0.1)),
        drift=(0.5,),
        events=(
            MemoryEvent(step=4, domain="law", event="merge", specialists=[0, 1], why="similar"),
        ),
        replay=0.2,
    ),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_what_is_read_is_what_was_written(record, tmp_path):
    write_record(tmp_path / "record.json", record)
    assert read_record(tmp_path / "record.json", type(record)) == record
    assert json.loads((tmp_path / "record.json").read_text())["schema"] == SCHEMA


def test_the_routing_of_an_evaluation_is_the_first_sites():
    assert EVALUATION.routing is EVALUATION.routing_by_site[2]
    assert replace(EVALUATION, routing_by_site={}).routing is None


@pytest.mark.parametrize("schema", [SCHEMA + 1, SCHEMA - 1, None])
def test_a_record_of_another_schema_is_refused_in_one_line(schema, tmp_path):
    path = tmp_path / "scores.json"
    write_record(path, EVALUATION)
    content = json.loads(path.read_text()) | {"schema": schema}
    if schema is None:
        del content["schema"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"schema {SCHEMA} are read: run its stage again") as says:
        read_record(path, Evaluation)
    assert str(path) in str(says.value)
    assert "\n" not in str(says.value)


def test_another_kind_of_record_is_refused_in_one_line(tmp_path):
    path = tmp_path / "scores.json"
    write_record(path, EVALUATION)
    with pytest.raises(UserError, match=r"no record of kind Ablation: 'tasks'$"):
        read_record(path, Ablation)
    path.write_text(json.dumps({"schema": SCHEMA}))
    with pytest.raises(UserError, match="no record of kind Ablation"):
        read_record(path, Ablation)
