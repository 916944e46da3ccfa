"""EPI's and Any-SSR's routers against formulas written out, and how their specialists train."""

from __future__ import annotations

import pytest
import torch
from helpers.training import learner_of

from steerlora.data.batches import collate
from steerlora.data.chat import EncodedChat
from steerlora.lm.decoder import decoder_of
from steerlora.methods.base import Task
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.config import AnalyticLoRAConfig, RoutedLoRAConfig
from steerlora.methods.routed_lora.signals import prompt_signals
from steerlora.methods.routed_lora.task_routers import LeastSquaresRouter, MahalanobisRouter

W, E, B, S = 6, 4, 3, 9
REAL = torch.ones(B, S, dtype=torch.bool)
REAL[1, :4] = False  # left padding
REAL[2, 6:] = False  # right padding
ACTIVE = torch.ones(E, dtype=torch.bool)
SMALL = {
    "specialists": E,
    "rank": 2,
    "top_k": 1,
    "signal": "dense",
    "dynamic_rank": False,
    "null_specialist": False,
    "context": "causal_mean",
}


def config(kind: str = "mahalanobis", **changes) -> RoutedLoRAConfig:
    if kind == "mahalanobis":
        return RoutedLoRAConfig(router=kind, **(SMALL | changes))
    return AnalyticLoRAConfig(router=kind, expansion=40, ridge=0.5, **(SMALL | changes))


def router(kind: str = "mahalanobis"):
    generator = torch.Generator().manual_seed(3)
    made = {"mahalanobis": MahalanobisRouter, "least_squares": LeastSquaresRouter}[kind]
    return made(W, config(kind), 1, generator).double()


def draw(seed: int, count: int = 40, place: float = 0.0) -> torch.Tensor:
    """Signals that vary far more in some directions than in others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(W, W, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    spread = torch.logspace(0.5, -1.5, W, dtype=torch.float64)
    return torch.randn(count, W, dtype=torch.float64, generator=generator) * spread @ mixing + place


def stream() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(B, S, W, dtype=torch.float64, generator=generator) * REAL.unsqueeze(-1)


def test_the_nearest_class_mean_by_mahalanobis_distance():
    domains = [draw(seed, 30 + 10 * seed, 0.4 * seed) for seed in range(3)]
    answers = [[None] * 30, [row % 2 for row in range(40)], [None] * 50]
    ours = router()
    for specialist, (signals, own) in enumerate(zip(domains, answers, strict=True)):
        ours.fit(specialist, signals, own)
    classes = [
        [
            signals[[row for row, a in enumerate(own) if a == answer]]
            for answer in sorted(set(own), key=str)
        ]
        for signals, own in zip(domains, answers, strict=True)
    ]
    of_domains = [torch.stack([c.t().cov() for c in own]).mean(0) for own in classes]
    precision = torch.linalg.inv(torch.stack(of_domains).mean(0))
    found = draw(7, 60, 0.4)
    expected = []
    for signal in found:
        nearest = [
            min(float((signal - c.mean(0)) @ precision @ (signal - c.mean(0))) for c in own)
            for own in classes
        ]
        expected.append(nearest.index(min(nearest)))
    assert ours.scores(found)[:, :3].argmax(1).tolist() == expected
    assert len(set(expected)) == 3
    assert not ours.shrunk


def test_answers_are_classes_where_each_has_several_texts():
    """Two clusters of one domain on both sides of another domain."""
    apart = torch.eye(W, dtype=torch.float64)[0] * 30
    ends = torch.cat([draw(0, 20) - apart, draw(1, 20) + apart])
    found = torch.cat([draw(3, 10) - apart, draw(4, 10) + apart, draw(5, 10)])
    for answers, wrong in ((["a"] * 20 + ["b"] * 20, 0), (list(range(40)), 1)):
        ours = router()
        ours.fit(0, ends, answers)
        ours.fit(1, draw(2, 40), None)
        chosen = ours.scores(found)[:, :2].argmax(1)
        missed = int((chosen != torch.tensor([0] * 20 + [1] * 10)).sum())
        assert (missed > 0) == bool(wrong)


def test_of_fewer_texts_than_dimensions_the_covariance_is_shrunk():
    ours = router()
    ours.fit(0, draw(0, 3))
    assert ours.shrunk
    assert torch.isfinite(ours.weight).all()
    ours.fit(1, draw(1, 3, 5.0))
    assert not ours.shrunk
    few = router()
    few.fit(0, draw(0, 2))
    few.fit(1, draw(0, 2) + 3.0)  # away in directions that neither varies in
    assert few.scores(draw(0, 2) + 2.9)[:, :2].argmax(1).tolist() == [1, 1]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_recursion_gives_what_all_texts_together_give(order):
    domains = [draw(seed, 12 + 30 * seed, 0.5 * seed) for seed in range(3)]
    ours = router("least_squares")
    for specialist in order:
        ours.fit(specialist, domains[specialist])
    features = torch.relu(torch.cat(domains) @ ours.expansion)
    owners = torch.repeat_interleave(torch.arange(3), torch.tensor([12, 42, 72]))
    targets = torch.nn.functional.one_hot(owners, E).double()
    gram = features.t() @ features + 0.5 * torch.eye(40, dtype=torch.float64)
    expected = torch.linalg.solve(gram, features.t() @ targets)
    torch.testing.assert_close(ours.weight, expected, atol=1e-8, rtol=1e-6)
    found = draw(8, 20)
    torch.testing.assert_close(ours.scores(found), torch.relu(found @ ours.expansion) @ expected)


@pytest.fixture(params=["mahalanobis", "least_squares"])
def fitted(request):
    ours = router(request.param)
    for specialist, place in ((0, -0.6), (2, 0.6)):
        ours.fit(specialist, draw(specialist, 40, place) / 3)
    return ours


def test_a_token_goes_where_the_text_so_far_belongs(fitted):
    x = stream()
    gate = fitted(x, REAL, ACTIVE)[0].gate
    for row, position in REAL.nonzero().tolist():
        own = x[row, : position + 1][REAL[row, : position + 1]].mean(0)
        scores = fitted.scores(own).masked_fill(~fitted.known, -torch.inf)
        assert gate[row, position].tolist() == [float(e == scores.argmax()) for e in range(E)]
    assert set(gate[REAL].argmax(1).tolist()) == {0, 2}
    assert not gate[1, :4].any()  # no signal yet, no update


def test_a_cache_goes_on_and_a_packed_row_begins_again(fitted):
    x, every = stream(), torch.ones(B, S, dtype=torch.bool)
    whole = fitted(x, every, ACTIVE)[0].gate
    first, state = fitted(x[:, :4], every[:, :4], ACTIVE)
    rest, _ = fitted(x[:, 4:], every[:, 4:], ACTIVE, state)
    assert torch.equal(torch.cat([first.gate, rest.gate], 1), whole)
    restarts = torch.zeros_like(every)
    restarts[:, 4] = True
    packed = fitted(x, every, ACTIVE, None, restarts)[0].gate
    alone = fitted(x[:, 4:], every[:, 4:], ACTIVE)[0].gate
    assert torch.equal(packed[:, 4:], alone)


def test_what_is_fitted_is_saved(fitted):
    kind = "mahalanobis" if isinstance(fitted, MahalanobisRouter) else "least_squares"
    other = router(kind)
    other.load_state_dict(fitted.state_dict())
    x = stream()
    assert torch.equal(other(x, REAL, ACTIVE)[0].gate, fitted(x, REAL, ACTIVE)[0].gate)


def test_what_is_no_signal_of_a_domain_is_refused(fitted):
    with pytest.raises(ValueError, match="knows no general text"):
        fitted.fit(None, draw(0))
    with pytest.raises(ValueError, match=r"signals must be \[texts, 6\]; got \[40, 5\]"):
        fitted.fit(0, draw(0)[:, :5])
    with pytest.raises(ValueError, match="before any domain is known"):
        router()(stream(), REAL, ACTIVE)


def rows(seed: int, count: int = 8) -> list[EncodedChat]:
    """Texts of unequal lengths; each domain has words of its own."""
    generator = torch.Generator().manual_seed(seed)
    first = 1 + 15 * seed
    made = []
    for index in range(count):
        drawn = torch.randint(first, first + 15, (4 + index % 4,), generator=generator)
        made.append(EncodedChat(drawn.tolist(), 3))
    return made


TEXT = {name: rows(number) for number, name in enumerate(("law", "math", "code"))}


def in_sequence(position: int) -> Task:
    name = list(TEXT)[position]
    return Task({name: TEXT[name]}, position)


@pytest.fixture
def make(make_model):
    """``make("mahalanobis", source=...)``: a learner of an attached adapter."""

    def made(kind: str, **changes):
        model = make_model()
        changes = {"isolation": "own", "sites": [1], "signal_tokens": "all"} | changes
        adapter = Adapter(model, config(kind, **changes))
        with torch.no_grad():
            for layer in adapter.layers.values():
                layer.B.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
        return learner_of(model, adapter.attach(model), domains=list(TEXT))

    return made


def moved(learner) -> set[int]:
    """The specialists whose B has a gradient."""
    B = next(iter(learner.method.layers.values())).B
    return {e for e in range(E) if B.grad[:, 2 * e : 2 * e + 2].any()}


@pytest.mark.parametrize("kind", ["mahalanobis", "least_squares"])
@pytest.mark.parametrize("source", ["inline", "base_last"])
def test_rows_train_their_domain_s_specialist_and_are_routed_without_gradient(make, kind, source):
    learner = make(kind, source=source)
    for position in (0, 1):
        learner.begin(in_sequence(position))
    task = in_sequence(1)
    batch = collate(TEXT["law"][:2] + TEXT["math"][:2], [0, 0, 1, 1], 0)
    with learner.training(task):
        learner.losses(batch)["task"][1].backward()
        assert moved(learner) == {1}
    learner.method.zero_grad()
    with learner.training(Task(TEXT)):
        learner.losses(batch)["task"][1].backward()
        assert moved(learner) == {0, 1}
    assert learner.method.assigned is None
    for owner, name in enumerate(("law", "math")):
        part = collate(TEXT[name], [-1] * 8, 0)
        with torch.no_grad():
            learner.model(input_ids=part.input_ids, attention_mask=part.attention_mask)
        gate = learner.method.routing()[1].gate[part.attention_mask > 0]
        assert (gate.argmax(1) == owner).double().mean() > 0.7


def test_pooled_final_hidden_states_of_the_base(make):
    learner = make("mahalanobis", source="base_last")
    found = prompt_signals(learner.model, learner.method, TEXT["law"], 0)[1]
    expected = []
    for row in TEXT["law"]:
        ids = torch.tensor([row.input_ids[:3]])
        with learner.method.disabled(), torch.no_grad():
            last = decoder_of(learner.model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        expected.append((last * torch.rsqrt(last.square().mean(-1, keepdim=True) + 1e-6)).mean(0))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_decoding_with_a_cache_is_decoding_without(make):
    learner = make("mahalanobis", source="base_last")
    for position in range(3):
        learner.begin(in_sequence(position))
    ids = torch.tensor([TEXT["math"][3].input_ids])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with_cache = learner.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    without = learner.model.generate(
        ids, attention_mask=torch.ones_like(ids), use_cache=False, **options
    )
    assert torch.equal(with_cache, without)


def test_few_texts_and_coinciding_prototypes_are_noted_by_name(make):
    learner = make("mahalanobis")

    def notes(task: Task) -> list[str]:
        learner.begin(task)
        return learner.notes(task)

    (few,) = notes(in_sequence(0))
    assert few.startswith("site 1: law: there are fewer texts so far than the signal has dimension")
    assert "coincide" not in " ".join(notes(in_sequence(1)))
    *_, twins = notes(Task({"again": TEXT["law"]}, 2))
    assert twins.startswith("site 1: the prototypes of law and again coincide")
    together = make("least_squares")
    joint = Task({"law": TEXT["law"], "math": TEXT["math"], "again": TEXT["law"]})
    together.begin(joint)
    (note,) = together.notes(joint)
    assert "law and again" in note


def test_names_of_arrived_domains_go_on_in_a_sequence(make):
    one, other = make("least_squares"), make("least_squares")
    one.begin(in_sequence(0))
    other.load_state(one.state())
    other.begin(in_sequence(1))
    assert other.arrived == {"law": 0, "math": 1}
