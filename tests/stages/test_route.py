"""The address book of a sequence: which text goes where."""

from __future__ import annotations

import json
import shutil

import pytest

from steerlora.data.jsonl import read_rows
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.run import run
from steerlora.errors import UserError
from steerlora.stages import route

SEQUENCE = ("order=given", "order.sequence=[law,math]")


@pytest.fixture(scope="module")
def store(smoke, tmp_path_factory) -> ArtifactStore:
    root = tmp_path_factory.mktemp("routes") / "artifacts"
    return ArtifactStore(shutil.copytree(smoke.root, root))


def step(smoke, text: str, *changes: str):
    quoted = json.dumps(text)
    return route.step(smoke.config("stage=route", f"stage.settings.text={quoted}", *changes))


@pytest.mark.parametrize("method", ["sc_lora_context", "any_ssr"])
def test_a_text_of_a_domain_goes_there_with_a_margin(method, smoke, store):
    asked = (f"method={method}", *SEQUENCE)
    source = smoke.report[step(smoke, "x", *asked).inputs["domains"]]
    text = read_rows(source / "train/math.jsonl")[0][0].content
    one = step(smoke, text, *asked)
    (site, found), *_ = json.loads((run([one], store)[one] / route.ROUTE).read_text()).items()
    assert site == "1"
    assert found["domain"] == "math"
    best, second, *_ = found["nearness"].values()
    assert found["margin"] == pytest.approx(best - second)
    assert found["margin"] > 0
    known = {"law", "math"} | ({route.GENERAL} if method == "sc_lora_context" else set())
    assert set(found["nearness"]) == known


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("method=lora", "stage.settings.text=a"), "method=lora does not route by domain"),
        (("method=epi",), "stage=route needs a text: stage.settings.text='...'"),
        (("method=epi", "+stage.settings.txt=a"), "stage.settings.txt: stage=route has text alone"),
    ],
)
def test_what_cannot_be_routed_is_refused(changes, says, smoke):
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        route.step(smoke.config("stage=route", *changes))
