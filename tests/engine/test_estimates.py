from __future__ import annotations

import pytest

from steerlora.engine.estimates import MOST_STORED, TimeLeft, stored_rates
from steerlora.engine.manifests import MANIFEST, write_json
from steerlora.engine.steps import Step, stage

for name in ("test_long", "test_short"):
    stage(name, 1)(lambda context: None)


def step(kind: str, number: int, *, cost: float = 1.0, after: Step | None = None) -> Step:
    inputs = {} if after is None else {"after": after}
    return Step(f"test_{kind}", {"number": number}, inputs, f"{kind} {number}", cost)


def test_the_estimate_does_not_swing_between_long_and_short_steps():
    """Three trainings of 1000 s and thirty evaluations of 10 s, in turn; what is left is known
    from the first of each kind on, however the steps alternate."""
    steps = [step("long" if n % 11 == 0 else "short", n) for n in range(33)]
    seconds = {"test_long": 1000.0, "test_short": 10.0}
    left = TimeLeft(steps, 1, {})
    assert left.seconds is None
    for place, one in enumerate(steps):
        left.finished(one, seconds[one.stage])
        if place > 0:
            assert left.seconds == pytest.approx(sum(seconds[s.stage] for s in steps[place + 1 :]))


def test_earlier_runs_say_it_before_anything_is_done_and_this_run_corrects_them():
    steps = [step("long", n, cost=100.0) for n in range(3)] + [step("short", 0)]
    left = TimeLeft(steps, 1, {"test_long": [2.0, 3.0, 40.0], "test_short": [5.0]})
    assert left.seconds == pytest.approx(3 * 300 + 5)
    left.finished(steps[0], 600.0)
    assert left.seconds == pytest.approx(2 * 600 + 5)
    left.finished(steps[1], None)  # another process built it
    assert left.seconds == pytest.approx(600 + 5)


def test_a_kind_that_nothing_is_known_of_is_like_the_others():
    left = TimeLeft([step("long", 0, cost=50.0), step("short", 0)], 1, {"test_short": [2.0]})
    assert left.seconds == pytest.approx(102)


def test_workers_share_what_does_not_wait_for_anything_else():
    chain = [step("long", 0)]
    chain.append(step("long", 1, after=chain[0]))
    known = {"test_long": [100.0], "test_short": [100.0]}
    alone = [step("short", number) for number in range(6)]
    assert TimeLeft([*chain, *alone], 2, known).seconds == pytest.approx(400)
    assert TimeLeft([*chain, *alone], 8, known).seconds == pytest.approx(200)  # the chain


def test_stored_times_are_read_of_the_newest_and_the_damaged_are_passed_over(tmp_path):
    for number in range(MOST_STORED + 2):
        folder = tmp_path / "test_long" / f"{number:020x}"
        folder.mkdir(parents=True)
        write_json(folder / MANIFEST, {"wall_seconds": 30.0, "cost": 10.0})
    for name, text in {"a": "{", "b": "{}", "c": '{"wall_seconds": 1, "cost": 0}'}.items():
        folder = tmp_path / "test_short" / name
        folder.mkdir(parents=True)
        (folder / MANIFEST).write_text(text)
    found = stored_rates(tmp_path, ["test_long", "test_short", "test_never"])
    assert found == {"test_long": [3.0] * MOST_STORED, "test_short": [], "test_never": []}
