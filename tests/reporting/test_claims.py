from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from steerlora.evaluation.scores import Estimate
from steerlora.reporting.claim_measures import CONTROLS, measure_claims
from steerlora.reporting.claims import (
    claims_grid,
    claims_json,
    claims_markdown,
    claims_terminal,
)
from steerlora.reporting.labels import BANNER
from steerlora.reporting.verdicts import (
    DIRECTION,
    IN_RANGE,
    MEANINGS,
    NO_VERDICT,
    NOT_MEASURED,
    NOT_REPRODUCED,
    PARTLY,
    UNDECIDED,
)

SEEDS = (0, 1, 2, 3)


def measured(world, methods, *, models=("micro_s", "micro_m", "micro_l")):
    claims = measure_claims(
        world.evaluations(models=models, seeds=SEEDS),
        world.ablations(SEEDS),
        world.sequentials(SEEDS),
        methods,
        main_model="micro_m",
    )
    return {claim.id: claim for claim in claims}


def test_a_world_like_the_papers(make_world, methods):
    world = make_world(forgetting={"lora": 0.4, "sc_lora": 0.4 * (1 - 0.131)})
    world.kept |= {"fixed_rank": 0.8825}
    claims = measured(world, methods)
    verdicts = {name: claim.verdict for name, claim in claims.items()}
    assert verdicts.pop("C7") == DIRECTION  # 13.1 % everywhere, not 38.3 % when broad comes first
    assert set(verdicts.values()) == {IN_RANGE}
    assert list(claims) == [f"C{number}" for number in range(1, 9)]
    assert claims["C1"].envelope.seeds == 4
    assert len(claims["C1"].measures) == 3
    assert [measure.label for measure in claims["C4"].measures] == list(CONTROLS)
    assert claims["C5"].ours.startswith("11.8 % [")
    assert all(claim.judged.again >= 0.9 for claim in claims.values())


def test_c1_needs_every_model(world, methods):
    """One model on which the method clearly loses refutes the claim, whatever the others say."""

    def worse(record):
        lower = replace(record.averages["instruction_following"], value=0.35 + 0.001 * record.seed)
        return replace(record, averages=record.averages | {"instruction_following": lower})

    records = [
        worse(r) if (r.model, r.method) == ("micro_l", "sc_lora") else r
        for r in world.evaluations(seeds=SEEDS)
    ]
    assert measure_claims(records, [], [], methods, main_model="micro_m")[0].verdict == (
        NOT_REPRODUCED
    )
    # A model with one replicate has no interval: it refutes nothing, and nothing is shown.
    few = [r for r in records if r.model != "micro_l" or r.seed == 0]
    claim = measure_claims(few, [], [], methods, main_model="micro_m")[0]
    assert (claim.verdict, claim.shown_verdict) == (UNDECIDED, "undecided (1 replicate)")


def test_bases_of_their_own_and_a_base_that_cannot_vary(world, methods):
    """A gain is within its replicate; one base alone stands beside every replicate."""

    def shifted(record, by):
        value = record.averages["instruction_following"].value + by
        average = replace(record.averages["instruction_following"], value=value)
        return replace(record, averages=record.averages | {"instruction_following": average})

    records = world.evaluations(models=("micro_m",), seeds=SEEDS)
    apart = [shifted(record, 0.05 * record.seed) for record in records]
    same, moved = (
        measure_claims(side, [], [], methods, main_model="micro_m")[0].measures[0]
        for side in (records, apart)
    )
    assert moved.interval == pytest.approx(same.interval)
    one = [record for record in apart if record.method != "none" or record.seed == 1]
    against_one = measure_claims(one, [], [], methods, main_model="micro_m")[0].measures[0]
    assert against_one.seeds == SEEDS
    assert against_one.interval.value == pytest.approx(same.interval.value + 0.05 * 0.5)
    some = [record for record in apart if record.method != "none" or record.seed < 2]
    assert measure_claims(some, [], [], methods, main_model="micro_m")[0].measures[0].seeds == (
        (0, 1)
    )


def test_claims_about_every_scale_are_not_decided_by_one_model(world, methods):
    claims = measured(world, methods, models=("micro_m",))
    for name in ("C1", "C3"):
        assert claims[name].verdict == PARTLY
        assert claims[name].note == "Not measured: another scale."
    assert claims["C2"].verdict == IN_RANGE  # which names no scale


def test_a_model_or_a_set_without_a_measure_is_missed(world, methods):
    records = [
        replace(r, averages={k: a for k, a in r.averages.items() if k != "gsm8k"})
        for r in world.evaluations(seeds=SEEDS)
        if (r.model, r.method) != ("micro_l", "sc_lora")
    ]
    claims = measure_claims(records, [], [], methods, main_model="micro_m")
    assert [claim.verdict for claim in claims[:3]] == [PARTLY] * 3
    assert claims[1].note == "Not measured: micro_l."
    assert "micro_l, world-MMLU-Pro, micro_s, world-GSM8K" in claims[2].note


def test_gains_beyond_the_range_are_the_direction_only(make_world, methods):
    world = make_world()
    world.gains |= {"world_ifeval": 0.3, "world_mmlu": -0.1, "world_gsm8k": 0.3}
    claims = measured(world, methods)
    assert claims["C1"].verdict == DIRECTION
    assert claims["C2"].verdict == NOT_REPRODUCED
    assert claims["C3"].verdict == NOT_REPRODUCED


def test_c3_between_the_yardsticks_is_the_direction(make_world, methods):
    world = make_world()
    world.gains |= {"world_mmlu_pro": 0.03}
    assert measured(world, methods)["C3"].verdict == DIRECTION


def test_a_set_on_which_nobody_scores_measures_nothing(make_world, methods):
    nothing = dict.fromkeys(("mmlu_pro", "gsm8k"), Estimate(0.0, 0.0))
    evaluations = [
        replace(record, averages=record.averages | nothing) for record in make_world().evaluations()
    ]
    claims = {
        claim.id: claim
        for claim in measure_claims(evaluations, [], [], methods, main_model="micro_m")
    }
    assert claims["C3"].verdict == NOT_MEASURED
    assert claims["C1"].verdict != NOT_MEASURED


@pytest.mark.parametrize("control", CONTROLS)
def test_c4_and_c5_need_every_control(make_world, methods, control):
    world = make_world()
    del world.kept[control]
    claims = measured(world, methods)
    for name in ("C4", "C5"):
        assert claims[name].verdict == PARTLY
        assert claims[name].note.startswith(f"Not measured: {control}.")


def test_shuffle_alone_is_a_part_of_c4(make_world, methods):
    kept = {name: make_world().kept[name] for name in ("intact", "shuffle")}
    claims = measured(make_world(kept=kept), methods)
    assert claims["C4"].verdict == PARTLY
    assert len(claims["C4"].measures) == 1
    assert claims["C5"].verdict == NOT_MEASURED


def test_a_drop_too_small_to_count_reproduces_nothing(make_world, methods):
    """However sure it is that something was lost, it is a fifth of a percent."""
    tiny = dict.fromkeys(make_world().kept, 0.998) | {"intact": 1.0}
    claim = measured(make_world(kept=tiny), methods)["C4"]
    assert all(measure.interval.low > 0 for measure in claim.measures)
    assert claim.verdict == NOT_REPRODUCED
    assert claim.counts_from == "3.4 %"


def test_a_run_that_is_not_meaningful_has_no_verdict(world, methods):
    records = (world.evaluations(seeds=SEEDS), world.ablations(SEEDS), world.sequentials(SEEDS))
    claims = measure_claims(*records, methods, main_model="micro_m", meaningful=False)
    assert {claim.verdict for claim in claims} == {NO_VERDICT}
    assert all(claim.measures for claim in claims)
    shown = claims_markdown(claims, name="smoke", meaningful=False)
    shown += claims_json(claims, name="smoke", meaningful=False).split('"claims": [')[1]
    for verdict in set(MEANINGS) - {NO_VERDICT, IN_RANGE}:  # definitions say what is in range
        assert f"**{verdict}**" not in shown
        assert f'"{verdict}"' not in shown
    assert f'"{IN_RANGE}"' not in shown


def test_each_claim_names_the_smallest_effect_that_counts(world, methods):
    claims = list(measured(world, methods).values())
    text = claims_markdown(claims, name="demo", meaningful=True)
    assert [claim.counts_from for claim in claims] == [
        "+0.0016",
        "+0.0017",
        "+0.016",
        "3.4 %",
        "2.2 points",
        "1.3 %",
        "3.8 %",
        "0.01",
    ]
    for claim in claims:
        assert f"The smallest effect that counts: {claim.counts_from}." in text


def test_a_row_has_one_figure_with_one_interval(world, methods):
    claims = measured(world, methods).values()
    rows = [line.split(" | ") for line in claims_grid(claims).splitlines() if line[:2] == "| "][2:]
    assert len(rows) == sum(1 + len(c.measures) * (len(c.measures) > 1) for c in claims)
    for row in rows:
        assert row[2].count("[") <= 1
        assert " to " not in row[2]
    several = [row for row in rows if row[0].startswith("| … ")]
    assert [row[0] for row in several[:3]] == ["| … micro_s", "| … micro_m", "| … micro_l"]
    assert "| … shuffle" in [row[0] for row in several]
    for row in several:
        assert "[" in row[2]


def test_verdicts_that_are_given_are_explained_below(world, methods):
    claims = measured(world, methods, models=("micro_m",)).values()
    had = {claim.verdict for claim in claims}
    shown = claims_grid(claims)
    for verdict, says in MEANINGS.items():
        assert (f"- **{verdict}**: {says}." in shown) is (verdict in had)


def test_the_terminals_table_can_be_read_at_80_columns(make_world, methods):
    world = make_world()
    del world.kept["invert"]
    claims = tuple(measured(world, methods).values())
    console = Console(file=io.StringIO(), width=80, soft_wrap=True)
    console.print(claims_terminal(claims, name="demo", meaningful=True))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    shown = " ".join(lines)
    assert "partly measured: some of what" in shown
    words = set(shown.split())
    for claim in claims:  # no word is cut, no interval is broken
        assert set(f"{claim.id} {claim.text} {claim.paper} {claim.shown_verdict}".split()) <= words
        for measure in claim.measures:
            assert claim.shown(measure) in shown
            assert len(claim.measures) == 1 or set(measure.label.split()) <= words


def test_c4_and_c5_where_the_signal_does_not_matter(make_world, methods):
    world = make_world(kept={name: 1.0 for name in make_world().kept})
    world.kept["fixed_rank"] = 0.5
    claims = measured(world, methods)
    assert claims["C4"].verdict == NOT_REPRODUCED
    assert claims["C5"].verdict == NOT_REPRODUCED  # rank matters more than the signal here


def test_c7_uses_only_orders_that_begin_with_instruction(world, methods):
    records = [
        r if r.sequence[0] == "instruction" or r.method == "lora"
        else replace(r, matrix=world.sequential("lora", r.order, r.seed).matrix)
        for r in world.sequentials()
    ]  # fmt: skip
    claims = {c.id: c for c in measure_claims([], [], records, methods, main_model="micro_m")}
    assert claims["C7"].measures[0].interval.value == pytest.approx(25.0)
    assert claims["C6"].measures[0].interval.value == pytest.approx(12.5)
    assert claims["C7"].fingerprints == tuple(
        f"sequential-{method}-{order}-{seed}"
        for method, order, seed in sorted(
            {
                (r.method, r.order, r.seed)
                for r in records
                if r.order in ("broad_first", "random_1")
            },
            key=lambda key: (key[2], key[0], key[1]),
        )
    )


def test_c6_where_lora_does_not_forget(make_world, methods):
    claim = measured(make_world(forgetting={"lora": 0.0, "sc_lora": 0.0}), methods)["C6"]
    assert claim.verdict == NOT_MEASURED
    assert "next to nothing" in claim.note


def test_c8_without_collapse_is_not_in_range(world, methods):
    def records(**routing):
        return [
            world.rerouted(record, **routing) if record.method == "moe_lora" else record
            for record in world.evaluations(seeds=SEEDS)
        ]

    uneven, even = (records(usage_entropy=entropy, dead_specialists=0) for entropy in (0.9, 1.0))
    claim = c8(uneven, methods)
    assert claim.verdict == DIRECTION
    assert c8(even, methods).verdict == NOT_REPRODUCED


def c8(records, methods):
    return measure_claims(records, [], [], methods, main_model="micro_m")[7]


def test_c8_looks_at_the_whole_of_training(world, methods):
    at_the_end = c8(world.evaluations(seeds=SEEDS), methods)
    records = [world.over_training(record) for record in world.evaluations(seeds=SEEDS)]
    claim = c8(records, methods)
    assert claim.verdict == IN_RANGE
    # moe_lora begins as evenly as sc_lora, so over training they are less far apart.
    assert 0.3 < claim.measures[0].interval.value < at_the_end.measures[0].interval.value - 0.2
    expected = [
        (sum(at.usage_entropy for at in r.routing_history) + r.routing.usage_entropy) / 9
        for name in ("sc_lora", "moe_lora")
        for r in records
        if r.method == name
    ]
    own, dense = expected[:12], expected[12:]
    assert claim.measures[0].interval.value == pytest.approx((sum(own) - sum(dense)) / 12)
    assert claim.measures[0].seeds == SEEDS  # three models are one replicate
    assert "at first 0.98 and 0.98" in claim.note
    assert "without a history" not in claim.note


def test_c8_specialists_that_die_in_training_count_but_not_at_its_first_measurement(world, methods):
    records = [world.over_training(record) for record in world.evaluations(seeds=SEEDS)]
    place = next(i for i, record in enumerate(records) if record.method == "sc_lora")

    def with_dead(at, dead):
        own, history = records[place], list(records[place].routing_history)
        history[at] = replace(history[at], dead_specialists=dead)
        changed = replace(own, routing_history=tuple(history))
        return c8([*records[:place], changed, *records[place + 1 :]], methods)

    assert with_dead(0, 2).verdict == IN_RANGE  # before routing has settled
    claim = with_dead(3, 1)  # and alive again at the end
    assert claim.verdict == DIRECTION
    assert "Runs with a dead specialist, of 12: sc_lora 1, moe_lora 12." in claim.note


def test_c8_never_compares_a_course_with_an_end(world, methods):
    """Where one side has no history, its pair is measured at evaluation alone."""
    records = [world.over_training(record) for record in world.evaluations(models=("micro_m",))]
    records = [
        replace(record, routing_history=()) if record.method == "moe_lora" else record
        for record in records
    ]
    claim = c8(records, methods)
    assert claim.measures == c8(world.evaluations(models=("micro_m",)), methods).measures
    assert "without a history of training, judged at evaluation alone: 2" in claim.note


def test_one_replicate_decides_nothing(world, methods):
    claims = measure_claims(
        world.evaluations(models=("micro_s", "micro_m"), seeds=(0,)),
        [],
        world.sequentials((0,)),
        methods,
        main_model="micro_m",
    )
    for claim in (claims[0], claims[2], claims[5], claims[7]):
        assert claim.shown_verdict == "undecided (1 replicate)"
        assert claim.measures[0].interval.value == claim.measures[0].interval.value
        assert not claim.measures[0].interval.known
        assert claim.shown_again == "–"
    assert claims[3].verdict == NOT_MEASURED
    two = measure_claims(
        world.evaluations(models=("micro_s",), seeds=(0,)) + world.evaluations(models=("micro_m",)),
        [],
        [],
        methods,
        main_model="micro_m",
    )
    assert "[" not in two[0].shown(two[0].measures[0])  # one of the two has no interval
    assert "[" in two[0].shown(two[0].measures[1])
    assert two[0].measures[1].interval.known


def test_nothing_measured_and_another_main_model(world, methods):
    for claims in (
        measure_claims([], [], [], methods, main_model="micro_m"),
        measure_claims([], [world.ablation(0)], world.sequentials(), methods, main_model="micro_l"),
    ):
        assert {claim.verdict for claim in claims} == {NOT_MEASURED}
        assert {claim.ours for claim in claims} == {"–"}


@pytest.mark.parametrize("meaningful", [True, False])
def test_shown_as_json_markdown_and_in_the_terminal(world, meaningful, methods):
    claims = tuple(measured(world, methods).values())
    document = json.loads(claims_json(claims, name="demo", meaningful=meaningful))
    assert document["meaningful"] is meaningful
    assert (document.get("banner") == BANNER) is not meaningful
    first = document["claims"][0]
    assert first["id"] == "C1"
    assert first["paper"] == {"text": "+0.016 to +0.052", "low": 0.016, "high": 0.052}
    assert first["verdict"] == IN_RANGE
    assert (first["by_intervals"], first["replicates"]) == (IN_RANGE, 4)
    assert first["again"] >= 0.9
    assert first["ours"]["low"] <= first["ours"]["value"] <= first["ours"]["high"]
    assert [m["label"] for m in first["measures"]] == ["micro_s", "micro_m", "micro_l"]
    assert "evaluation-micro_l-sc_lora-0" in first["artifacts"]

    text = claims_markdown(claims, name="demo", meaningful=meaningful)
    assert (BANNER in text) is not meaningful
    for claim in claims:
        assert claim.definition in text
        assert f"## {claim.id}: {claim.verdict}" in text

    grid = text.split("\n\n")[1 if meaningful else 2]
    assert grid.startswith(
        "| Claim | Paper | Ours [95 % interval] | Replicates | Items | Counts from |"
    )
    table = claims_terminal(claims, name="demo", meaningful=meaningful)
    assert table.row_count == 8 + 3 + 3 + 6 + 5
    assert (BANNER in table.title) is not meaningful


def test_unknown_numbers_are_null_in_json(world, methods):
    claims = measure_claims(
        world.evaluations(models=("micro_s",), seeds=(0,)), [], [], methods, main_model="micro_s"
    )
    document = json.loads(claims_json(claims, name="demo", meaningful=True))
    assert document["claims"][7]["ours"]["low"] is None
    assert document["claims"][7]["again"] is None
    assert document["claims"][3]["ours"]["value"] is None


def test_a_verdict_that_another_study_may_not_reach_is_undecided(world, methods):
    """Three replicates whose intervals decide, and whose width another three would not have."""
    claim = measure_claims(
        world.evaluations(("micro_m",), (0, 10, 20)), [], [], methods, main_model="micro_m"
    )[1]
    assert claim.judged.by_intervals == IN_RANGE
    assert claim.judged.again < 0.9
    assert claim.shown_verdict == "undecided (3 replicates)"
    text = claims_markdown([claim], name="demo", meaningful=True)
    assert "The intervals alone say: in range. Another study of 3 replicates would say so" in text
    assert f"undecided (3 replicates) | {claim.judged.again:.2f} |" in text


def test_what_a_calibration_study_saw_stands_beside_the_verdict(world, methods):
    claims = measured(world, methods)
    studies = {
        "C1": {4: {IN_RANGE: 180, DIRECTION: 15, UNDECIDED: 5}, 3: {UNDECIDED: 7}},
        "C2": {4: {UNDECIDED: 20}},
        "C4": {4: {IN_RANGE: 50}},
    }
    text = claims_markdown(list(claims.values()), name="demo", meaningful=True, studies=studies)
    assert (
        "Of 200 studies of 4 replicates, 90 % came to this verdict (8 % to direction reproduced, "
        "2 % to undecided)."
    ) in text
    assert "Of 20 studies of 4 replicates, none came to this verdict (100 % to undecided)." in text
    assert "Of 50 studies of 4 replicates, 100 % came to this verdict." in text
    assert text.count(" studies of ") == 3
