"""What figures show: series, values and axes; that they are written is in ``test_report``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.colors import to_rgba

from steerlora.evaluation.statistics import Interval
from steerlora.reporting import figures, routing_figures, sequence_figures
from steerlora.reporting.drawing import STYLE, save
from steerlora.reporting.evidence import evidence

OWN = "sc_lora_context"
LOST = {"lora": 0.4, "sc_lora": 0.3, OWN: 0.05, f"{OWN}_soft": 0.1}


@pytest.fixture
def sequentials(make_world):
    world = make_world(forgetting=LOST)
    return [world.general(record) for record in world.sequentials()]


def lines(axis) -> dict[str, np.ndarray]:
    """{label: [2, n]} of the labelled series."""
    found = {}
    for container in [*axis.containers, *axis.lines]:
        label = container.get_label()
        if not label.startswith("_"):
            found[label] = np.array(getattr(container, "lines", [container])[0].get_data(), float)
    return found


def test_no_records_no_figure(world, methods):
    plain = world.evaluations(models=("micro_m",))
    assert figures.dose_response([world.ablation(0)], "micro_m", methods) is None
    assert routing_figures.rank_by_layer(plain, "micro_m", methods) is None
    assert routing_figures.routing_over_time(plain, "micro_m", methods) is None
    assert sequence_figures.general_drift(world.sequentials(), "micro_m", methods) is None
    assert sequence_figures.method(world.sequentials(), "micro_m", methods) is None
    for draw in (sequence_figures.pareto, sequence_figures.method, sequence_figures.general_drift):
        assert draw([], "micro_m", methods) is None
    for draw in (routing_figures.gate_by_domain, routing_figures.rank_by_domain):
        assert draw([], "micro_m", methods) is None


def test_methods_look_the_same_everywhere_and_differ_from_each_other(methods):
    looks = {(methods.colour(name), methods.marker(name)["marker"]) for name in methods.order}
    assert len(looks) == len(methods.order)
    assert methods.colour(f"{OWN}_soft") == methods.colour(OWN)
    methods = replace(methods, colours={"x_lora": "#882255", "sc_lora": "#009E73"})
    assert methods.colour("sc_lora") == "#009E73"
    orders = [methods.order, ("x_lora", "sc_lora", "moe_lora"), ("sc_lora",)]
    found = {replace(methods, order=order).colour("sc_lora") for order in orders}
    assert len(found) == 1  # whichever methods an experiment has
    assert methods.colour("lora") not in methods.colours.values()
    assert methods.colour("another") not in {methods.colour(name) for name in methods.order}


def test_dose_response_runs_from_nothing_to_the_whole_drop(world, methods):
    records = [world.doses(world.ablation(seed)) for seed in (0, 1)]
    figure = figures.dose_response(records, "micro_m", methods)
    axes = {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}
    assert set(axes) == set(world.kept) - {"intact", "oracle_domain"}
    strength, drop = axes["shuffle"].lines[-2].get_data()  # the last is the line at zero
    assert strength.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert drop[0] == 0
    assert drop[-1] == pytest.approx(55.0, abs=0.5)
    assert drop[2] == pytest.approx(55.0 / 4, abs=0.5)


def test_pareto_front():
    def point(x, y):
        return Interval(x, x, x, 1, 1), Interval(y, y, y, 1, 1)

    points = {"a": point(0.5, 0.9), "b": point(0.1, 0.4), "c": point(0.3, 0.3)}
    assert sequence_figures.pareto_front(points) == ["b", "a"]
    points |= {"d": point(0.1, 0.5), "e": point(0.6, 0.9)}  # better than b at its forgetting
    assert sequence_figures.pareto_front(points) == ["d", "a"]


def test_pareto_shows_every_method_at_its_means(sequentials, methods):
    (axis,) = sequence_figures.pareto(sequentials, "micro_m", methods).axes
    shown = lines(axis)
    assert set(shown) == {"lora", "sc_lora", OWN, "… soft gate", "Pareto front"}
    x, y = shown["lora"]
    assert x == pytest.approx(0.4)
    assert y == pytest.approx(0.8 - 0.8 * 0.4 + 0.002)  # the domain learnt last is not forgotten
    assert axis.get_xlim()[0] == 0


def test_general_drift_by_stage(sequentials, methods):
    (axis,) = sequence_figures.general_drift(sequentials, "micro_m", methods).axes
    shown = lines(axis)
    assert set(shown) == {"lora", "sc_lora", OWN}  # no switches
    assert np.round(shown["lora"][0]).tolist() == [1, 2, 3, 4, 5]
    assert shown["lora"][1] == pytest.approx([0.4 * (s + 1) / 5 + 0.005 for s in range(5)])
    assert axis.get_ylim()[0] == 0


def test_method_has_a_panel_for_general_knowledge_only_where_it_was_measured(sequentials, methods):
    figure = sequence_figures.method(sequentials, "micro_m", methods)
    assert len(figure.axes) == 3
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["lora", "sc_lora", OWN, "… soft gate"]
    forgetting, score, general = figure.axes
    assert forgetting.get_xlim()[0] == 0
    dashed = [[line for line in axis.lines if line.get_linestyle() == "--"] for axis in figure.axes]
    aims = [line.get_xdata()[0] for (line,) in dashed]
    assert aims[0] == pytest.approx(0.2 * 0.4)
    assert aims[2] == 0.95
    assert score.get_xlim()[1] > aims[1] > 0.9  # the aim is in view
    assert general.get_title().startswith("general knowledge")
    bare = [replace(record, general=None) for record in sequentials]
    assert len(sequence_figures.method(bare, "micro_m", methods).axes) == 2
    without = [record for record in sequentials if record.method != "lora"]
    assert len(sequence_figures.method(without, "micro_m", methods).axes) == 3


def test_matrices_of_many_methods_are_those_that_matter(make_world, methods):
    world = make_world(forgetting=dict.fromkeys(methods.order, 0.3))
    records = [world.sequential(name, "broad_first", 0) for name in world.forgetting]
    figure = sequence_figures.forgetting_matrices(records, "micro_m", methods)
    titles = [axis.get_title().split("\n")[0] for axis in figure.axes if axis.get_title()]
    assert titles == ["lora", "moe_lora", "sc_lora", OWN]


def test_matrices_have_the_same_columns_and_frame_what_was_just_learnt(world, methods):
    orders = ("broad_first", "broad_last", "random_0")
    records = [world.sequential("lora", order, seed) for order in orders for seed in (0, 1)]
    axes = sequence_figures.forgetting_matrices(records, "micro_m", methods).axes[:3]
    columns = [[label.get_text() for label in axis.get_xticklabels()] for axis in axes]
    assert columns == [list(records[0].domains)] * 3
    for axis, record in zip(axes, records[::2], strict=True):
        corners = [np.round(np.add(frame.get_xy(), 0.46)).tolist() for frame in axis.patches]
        assert corners == [
            [record.domains.index(domain), stage] for stage, domain in enumerate(record.sequence, 1)
        ]
        shown = np.mean([r.matrix for r in records if r.order == record.order], axis=0)
        assert axis.images[0].get_array().data == pytest.approx(shown)


def test_a_method_has_one_colour_in_all_figures(world, methods):
    """Of the bars, lines and areas that are drawn of the paper's method."""
    colour = to_rgba(methods.colour("sc_lora"))
    evaluations = [world.over_training(record) for record in world.evaluations()]
    gains = figures.scale_gains(evaluations, "micro_m", methods).axes[0]
    ranks = routing_figures.rank_by_domain(evaluations, "micro_m", methods).axes[0]
    for axis in (gains, ranks):
        bars = next(c for c in axis.containers if c.get_label() == "sc_lora")
        assert {bar.get_facecolor() for bar in bars} == {colour}
    ablations = [world.doses(world.ablation(seed)) for seed in (0, 1)]
    (axis,) = figures.ablation(ablations, "micro_m", methods).axes
    assert {bar.get_facecolor() for bar in axis.containers[0]} == {colour}
    others = {to_rgba(methods.colour(name)) for name in methods.order}
    marks = [line for line in axis.lines if line.get_label() in world.ablation(0).domains]
    assert len(marks) == len({line.get_marker() for line in marks}) == 5
    assert others.isdisjoint(to_rgba(line.get_color()) for line in marks)
    dose = figures.dose_response(ablations, "micro_m", methods).axes[0]
    assert colour in {to_rgba(line.get_color()) for line in dose.lines}


def test_a_bar_without_height_is_there_and_one_that_was_not_measured_says_so(world, methods):
    same = world.evaluations(models=("micro_m",), seeds=(0,))
    base = next(r for r in same if r.method == "none").averages
    flat = [replace(r, averages=base) if r.method == "lora" else r for r in same]
    other = [world.evaluation("micro_s", name, 0) for name in ("none", "sc_lora")]
    axis = figures.scale_gains([*flat, *other], "micro_m", methods).axes[0]
    lora = next(c for c in axis.containers if c.get_label() == "lora")
    assert lora[0].get_height() == 0
    assert lora[0].get_linewidth() > axis.lines[-1].get_linewidth()  # that of the zero line
    assert [text.get_text() for text in axis.texts] == ["not measured"] * 2  # two methods
    places = [text.get_position()[0] for text in axis.texts]
    assert all(place > 0.5 for place in places)  # of the second model


def test_figures_call_stand_ins_by_their_own_name(world, methods):
    titles = [
        axis.get_title() for axis in figures.scale_gains(world.evaluations(), "", methods).axes
    ]
    assert "world-GSM8K" in titles
    assert "world-MMLU-Pro" in titles


def test_what_a_figure_rests_on(world, methods):
    several = world.evaluations(models=("micro_m",), seeds=(0, 1, 2, 3))
    assert evidence(several) == "4 replicates (seeds 0 to 3); 100 items a task"
    assert evidence(several, tokens=True) == "4 replicates (seeds 0 to 3); 10,000 tokens"
    mixed = [*several, *world.evaluations(models=("micro_s", "micro_l"), seeds=(0,))]
    assert evidence(mixed) == (
        "micro_m: 4 replicates (seeds 0 to 3); "
        "micro_s, micro_l: 1 replicate (seed 0), no interval; 100 items a task"
    )
    assert evidence([world.ablation(seed) for seed in (1, 4)]) == (
        "2 replicates (seeds 1, 4); 100 items a domain"
    )
    one = [world.sequential("lora", "broad_first", 7)]
    assert evidence(one) == "1 replicate (seed 7), no interval; 100 items a domain"
    bases = world.evaluations(models=("micro_m",), seeds=(0,))[:1]
    assert evidence(bases).startswith("1 replicate (seed 0)")


def test_the_note_stands_under_the_figure_and_below_what_is_there(world, tmp_path, methods):
    records = [world.doses(world.ablation(0))]
    with rc_context(STYLE):
        figure = figures.dose_response(records, "micro_m", methods)
        save(figure, tmp_path / "f.png", meaningful=True, note="one replicate")
    assert figure.get_supxlabel() == "strength of the intervention\none replicate"


def test_rank_by_layer_where_there_are_several_sites(world, methods):
    records = [world.over_training(record) for record in world.evaluations(models=("micro_m",))]
    figure = routing_figures.rank_by_layer(records, "micro_m", methods)
    assert [axis.get_title() for axis in figure.axes if axis.get_title()] == ["sc_lora"]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert len(texts) == 15
    assert texts[:3] == ["8.1", "6.6", "5.1"]  # instruction at sites 1, 3, 5; two seeds' mean


def test_routing_over_time_shows_means_and_seeds(world, methods):
    records = [world.over_training(record) for record in world.evaluations(models=("micro_m",))]
    (axis,) = routing_figures.routing_over_time(records, "micro_m", methods).axes
    shown = lines(axis)
    assert set(shown) == {"moe_lora", "sc_lora"}
    assert shown["sc_lora"][0].tolist() == list(range(50, 401, 50))
    expected = np.mean(
        [[at.usage_entropy for at in world.history("sc_lora", s)] for s in (0, 1)], 0
    )
    assert shown["sc_lora"][1] == pytest.approx(expected)
    assert len(axis.lines) == 2 * (1 + 2)
    assert axis.get_ylim()[0] == 0
