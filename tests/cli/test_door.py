"""``steerlora.run`` builds what the command line would, and gives records."""

from __future__ import annotations

import pytest
from helpers.artifacts import store_evaluation
from helpers.experiments import TINY
from helpers.world import World

import steerlora
from steerlora.cli.door import Results
from steerlora.engine.lineage import Library
from steerlora.errors import UserError
from steerlora.reporting.run_rows import row_of


def test_it_builds_quietly_and_says_where_things_are(tmp_path, capfd):
    asked = ("stage=domains", *TINY, f"artifacts.root={tmp_path}")
    first, again = steerlora.run(*asked), steerlora.run(*asked)
    (artifact,) = first.artifacts
    assert artifact.path.parent == tmp_path / "domains"
    assert again.artifacts[0].manifest["created"] == artifact.manifest["created"]
    assert first.records == []
    assert first.frame()["domains.train_items"].tolist() == [20]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((), "nothing to do"),
        (("stage=runs",), "stage=runs prints: it is for the command line"),
        (("stage=domains", "method.rnk=2"), "did you mean 'method.rank'"),
    ],
)
def test_a_mistake_is_a_user_error(overrides, says):
    with pytest.raises(UserError, match=says):
        steerlora.run(*overrides)


def test_a_frame_has_settings_and_figures(tmp_path):
    record = World().evaluation("micro_m", "sc_lora", 1)
    names = [store_evaluation(tmp_path, record, rank=rank) for rank in (2, 8)]
    library = Library(tmp_path)
    found = Results(tuple(row_of(library.find(name), library) for name in names))
    frame = found.frame()
    assert frame["method.rank"].tolist() == [2, 8]
    assert frame["average/target"].tolist() == pytest.approx([0.601, 0.601])
    assert (frame["average/target_stderr"] > 0).all()
    assert [one.tasks["world_law"].items for one in found.records] == [100, 100]
