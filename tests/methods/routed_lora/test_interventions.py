"""Each intervention does what its row of the table says, on real tokens, from its seed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from steerlora.methods.interventions import INTERVENTIONS, check_phase
from steerlora.methods.routed_lora.interventions import SiteFacts
from steerlora.methods.routed_lora.routing import Routing
from steerlora.saes.sparse import SparseFeatures

B, S, E, R = 3, 6, 4, 5
ON_SIGNAL = [
    "replace_dense",
    "replace_random_sae",
    "randomize",
    "shuffle",
    "permute_latents",
    "invert",
]
ON_ROUTING = ["fixed_rank", "uniform_gate", "oracle_domain"]


@pytest.fixture
def scene(make_sae):
    """Stream, real tokens (lengths 6, 4, 2), the SAE's features and what is known of the site."""
    sae = make_sae()
    stream = torch.randn(B, S, 32, generator=torch.Generator().manual_seed(3))
    real = torch.arange(S) < torch.tensor([6, 4, 2])[:, None]
    facts = SiteFacts(sae, 2.4, {"law": 2, "math": 0})
    with torch.no_grad():
        return stream, real, sae.encode(stream), facts


def change(name: str, scene, seed: int = 0) -> SparseFeatures:
    stream, real, features, facts = scene
    with torch.no_grad():
        return INTERVENTIONS[name](seed=seed).features(features, stream, real, facts)


def dense(features: SparseFeatures, latents: int = 64) -> torch.Tensor:
    zeros = torch.zeros(*features.values.shape[:-1], latents)
    return zeros.scatter_add(-1, features.indices, features.values)


def routing(*modules: int) -> Routing:
    generator = torch.Generator().manual_seed(0)
    gate = torch.rand(B, S, *modules, E, generator=generator).softmax(-1)
    return Routing(gate, torch.rand(B, S, *modules, R, generator=generator).cumprod(-1))


def apply(control, scene, layer: int = 1) -> SparseFeatures:
    stream, real, features, facts = scene
    with torch.no_grad():
        return control.apply_features(features, stream, real, facts, layer)


def test_the_table_is_complete():
    # Other tests register interventions of their own.
    ours = [n for n, one in INTERVENTIONS.items() if one.__module__.startswith("steerlora.")]
    assert ours == ON_SIGNAL + ON_ROUTING


@pytest.mark.parametrize("name", ON_SIGNAL)
def test_signals_change_with_the_seed_and_only_with_it(name, scene):
    first, again, other = (change(name, scene, seed) for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    if name != "invert":
        assert not torch.equal(dense(first), dense(other))
    real = scene[1]
    assert not torch.equal(dense(first)[real], dense(scene[2])[real])
    assert first.values.shape[-1] == scene[2].values.shape[-1]
    # Routing is left to the router.
    untouched = routing()
    assert INTERVENTIONS[name]().routing(untouched, scene[3]) is untouched


@pytest.mark.parametrize("name", ON_SIGNAL)
def test_padding_enters_no_draw(name, scene):
    stream, real, _, facts = scene
    other_stream = stream.clone()
    other_stream[~real] = 100.0
    wider = torch.cat([other_stream, torch.ones(B, 2, 32)], 1)
    wider_real = torch.cat([real, torch.zeros(B, 2, dtype=torch.bool)], 1)
    with torch.no_grad():
        other_scene = (wider, wider_real, facts.sae.encode(wider), facts)
    ours, theirs = change(name, scene), change(name, other_scene)
    torch.testing.assert_close(dense(ours)[real], dense(theirs)[wider_real], atol=1e-5, rtol=0)


def test_replace_dense_is_the_top_k_of_a_fixed_projection(scene):
    stream, _, features, facts = scene
    found = change("replace_dense", scene)
    projection = torch.empty(32, 64).normal_(generator=torch.Generator().manual_seed(0))
    projected = stream @ projection
    kept = projected.abs() >= projected.abs().topk(5).values[..., -1:]
    expected = projected * kept
    norms = features.values.norm(dim=-1, keepdim=True)
    expected = expected / expected.norm(dim=-1, keepdim=True) * norms
    torch.testing.assert_close(dense(found), expected, atol=1e-5, rtol=0)
    # The same in the next forward of the context, and not the SAE's in disguise.
    control = INTERVENTIONS["replace_dense"](seed=0)
    args = (features, stream, scene[1], facts)
    assert torch.equal(control.features(*args).indices, control.features(*args).indices)


def test_replace_random_sae_keeps_shape_and_settings_only(scene):
    stream, _, features, facts = scene
    control = INTERVENTIONS["replace_random_sae"](seed=0)
    before = {name: p.clone() for name, p in facts.sae.state_dict().items()}
    found = control.features(features, stream, scene[1], facts)
    assert found.values.shape == features.values.shape
    assert (found.values >= 0).all()
    assert torch.equal(dense(found), dense(control.features(features, stream, scene[1], facts)))
    assert all(torch.equal(p, before[name]) for name, p in facts.sae.state_dict().items())


def test_randomize_keeps_the_values_on_distinct_random_latents(scene):
    _, real, features, facts = scene
    found = change("randomize", scene)
    assert torch.equal(found.values, features.values)
    assert torch.equal(found.indices[~real], features.indices[~real])
    for row in found.indices[real]:
        assert len(row.unique()) == len(row)
        assert row.min() >= 0
        assert row.max() < facts.sae.latents
    assert len({tuple(row.sort().values.tolist()) for row in found.indices[real]}) == real.sum()
    # Drawn anew in every forward of a context.
    control = INTERVENTIONS["randomize"](seed=0)
    args = (features, scene[0], real, facts)
    assert not torch.equal(control.features(*args).indices, control.features(*args).indices)


def test_shuffle_permutes_the_real_tokens_of_the_batch(scene):
    _, real, features, _ = scene
    found = change("shuffle", scene)
    assert torch.equal(dense(found)[~real], dense(features)[~real])
    ours = sorted(map(tuple, dense(found)[real].tolist()))
    assert ours == sorted(map(tuple, dense(features)[real].tolist()))
    moved = (dense(found)[real] != dense(features)[real]).any(-1)
    assert moved.sum() >= real.sum() - 3


def test_permute_latents_is_one_fixed_permutation(scene):
    stream, real, features, facts = scene
    control = INTERVENTIONS["permute_latents"](seed=0)
    found = control.features(features, stream, real, facts)
    assert torch.equal(found.values, features.values)
    pairs = set(map(tuple, torch.stack([features.indices, found.indices], -1).view(-1, 2).tolist()))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    again = control.features(features, stream, real, facts)
    assert torch.equal(again.indices, found.indices)


def test_invert_flips_every_active_latent(scene):
    assert torch.equal(dense(change("invert", scene)), -dense(scene[2]))


def test_fixed_rank_keeps_the_gate_and_rounds_the_mean_rank(scene):
    given = routing()
    found = INTERVENTIONS["fixed_rank"]().routing(given, scene[3])
    assert torch.equal(found.gate, given.gate)
    assert torch.equal(found.mask, torch.tensor([1.0, 1, 0, 0, 0]).expand(B, S, R))
    tiny = SiteFacts(scene[3].sae, 0.2, {})
    assert INTERVENTIONS["fixed_rank"]().routing(given, tiny).mask.sum(-1).eq(1).all()


def test_uniform_gate_keeps_the_mask(scene):
    given = routing()
    found = INTERVENTIONS["uniform_gate"]().routing(given, scene[3])
    assert torch.equal(found.gate, torch.full((B, S, E), 1 / E))
    assert found.mask is given.mask


def test_oracle_domain_is_one_hot_at_the_domains_specialist(scene):
    given = routing()
    found = INTERVENTIONS["oracle_domain"](domain="law").routing(given, scene[3])
    assert torch.equal(found.gate, torch.eye(E)[2].expand(B, S, E))
    assert found.mask is given.mask
    for domain in (None, "poetry"):
        with pytest.raises(ValueError, match=r"one of \['law', 'math'\]"):
            INTERVENTIONS["oracle_domain"](domain=domain).routing(given, scene[3])


@pytest.mark.parametrize("name", ON_ROUTING)
def test_routing_controls_leave_the_signal(name, scene):
    assert change(name, scene) is scene[2]


def test_uniform_and_oracle_gates_heed_active_specialists_rows_and_modules(scene):
    facts = SiteFacts(scene[3].sae, 2.4, {"law": 2, "math": 0})
    facts.active = torch.tensor([True, False, True, True])
    uniform = INTERVENTIONS["uniform_gate"]().routing(routing(7), facts).gate
    assert torch.equal(uniform, (facts.active / 3).expand(B, S, 7, E))
    oracle = INTERVENTIONS["oracle_domain"]()
    oracle.begin(0, ["math", "law", "math"])
    owners = oracle.routing(routing(7), facts).gate.argmax(-1)
    assert torch.equal(owners, torch.tensor([0, 2, 0])[:, None, None].expand(B, S, 7))
    oracle.begin(1, ["math", None, "math"])
    with pytest.raises(ValueError, match="got None"):
        oracle.routing(routing(), facts)


# Strength


@pytest.mark.parametrize("name", ON_SIGNAL)
def test_strength_mixes_the_signals(name, scene):
    intact, control = dense(scene[2]), INTERVENTIONS[name]
    assert apply(control(strength=0.0), scene) is scene[2]
    full = apply(control(), scene)
    assert all(map(torch.equal, full, change(name, scene)))
    for strength in (0.25, 0.7):
        mixed = apply(control(strength=strength), scene)
        assert mixed.values.shape[-1] == 10
        expected = (1 - strength) * intact + strength * dense(full)
        torch.testing.assert_close(dense(mixed), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("modules", [(), (7,)])
@pytest.mark.parametrize("name", ON_ROUTING)
def test_strength_mixes_the_routings(name, scene, modules):
    given, facts = routing(*modules), scene[3]
    control = INTERVENTIONS[name]
    assert control(domain="law", strength=0.0).apply_routing(given, facts, 1) is given
    full = control(domain="law").apply_routing(given, facts, 1)
    assert all(map(torch.equal, full, control(domain="law").routing(given, facts)))
    mixed = control(domain="law", strength=0.25).apply_routing(given, facts, 1)
    for before, after, found in zip(given, full, mixed, strict=True):
        torch.testing.assert_close(found, 0.75 * before + 0.25 * after)
        assert (found is before) == (after is before)  # what a control leaves is not touched
    assert (mixed.mask.diff(dim=-1) <= 1e-6).all()


def test_mixed_routings_carry_the_intact_gradient(scene):
    logits = torch.randn(B, S, E, requires_grad=True)
    given = Routing(logits.softmax(-1), routing().mask)
    control = INTERVENTIONS["uniform_gate"](strength=0.5)
    mixed = control.apply_routing(given, scene[3], 1).gate
    whole = torch.autograd.grad(given.gate[0, 0, 0], logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(mixed[0, 0, 0], logits)[0], 0.5 * whole)


@pytest.mark.parametrize("strength", [-0.1, 1.5])
def test_strengths_out_of_range_are_refused(strength):
    with pytest.raises(ValueError, match=f"strength {strength}: choose 0"):
        INTERVENTIONS["invert"](strength=strength)


# Targets


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_other_sites_stay_intact(name, scene):
    control = INTERVENTIONS[name](domain="law", sites=(2, 5))
    given = routing()
    assert apply(control, scene, 1) is scene[2]
    assert control.apply_routing(given, scene[3], 1) is given
    assert not control.ran
    found = apply(control, scene, 5), control.apply_routing(given, scene[3], 5)
    assert control.ran
    assert found[0] is not scene[2] or found[1] is not given


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("name", INTERVENTIONS)
def test_rows_of_other_domains_stay_intact(name, scene, strength):
    real, features, facts = scene[1:]
    given = routing()
    everywhere = INTERVENTIONS[name](domain="law", strength=strength)
    aimed = INTERVENTIONS[name](strength=strength, domains=("law",))
    everywhere.begin(4)
    aimed.begin(4, ["law", None, "poetry"])
    found, full = dense(apply(aimed, scene)), dense(apply(everywhere, scene))
    torch.testing.assert_close(found[0], full[0])
    assert torch.equal(found[1:], dense(features)[1:])
    routed = aimed.apply_routing(given, facts, 1)
    for part, whole, intact in zip(
        routed, everywhere.apply_routing(given, facts, 1), given, strict=True
    ):
        torch.testing.assert_close(part[0], whole[0])
        assert torch.equal(part[1:], intact[1:])
    touched = (found != dense(features))[real].any() or not torch.equal(routed.gate, given.gate)
    assert touched or not torch.equal(routed.mask, given.mask)


def test_in_evaluation_the_context_says_the_domain(scene):
    for domain in ("math", None):
        control = INTERVENTIONS["invert"](domain=domain, domains=("law",))
        assert apply(control, scene) is scene[2]
        assert control.ran  # it looked, and had nothing to change
    control = INTERVENTIONS["invert"](domain="law", domains=("law",))
    assert torch.equal(dense(apply(control, scene)), -dense(scene[2]))


# Training


@pytest.mark.parametrize("name", ON_SIGNAL)
def test_draws_are_a_function_of_seed_and_step(name, scene):
    unbroken, resumed = (INTERVENTIONS[name](seed=3) for _ in range(2))
    found = []
    for step in range(4):
        unbroken.begin(step)
        found.append(dense(apply(unbroken, scene)))
    resumed.begin(3)
    assert torch.equal(dense(apply(resumed, scene)), found[3])
    moves = name in ("randomize", "shuffle")
    assert all(torch.equal(a, b) != moves for a, b in pairwise(found))
    other = INTERVENTIONS[name](seed=4)
    other.begin(3)
    assert torch.equal(dense(apply(other, scene)), found[3]) == (name == "invert")


def test_what_is_fixed_is_the_same_in_training_and_evaluation(scene):
    for name in ("replace_dense", "replace_random_sae", "permute_latents"):
        in_training = INTERVENTIONS[name](seed=3)
        in_training.begin(17)
        assert all(map(torch.equal, apply(in_training, scene), change(name, scene, 3)))


def test_a_permutation_before_training_is_refused_as_a_relabelling():
    for name in INTERVENTIONS:
        check_phase(name, "evaluation")
        if name != "permute_latents":
            check_phase(name, "training")
    with pytest.raises(ValueError, match="latents by other names, which is no control"):
        check_phase("permute_latents", "training")


# In a model


@pytest.mark.parametrize(
    "changes", [{}, {"router": "mlp", "router_hidden": 8}, {"prototypes": True}]
)
def test_routers_add_up_the_entries_of_a_mixture(make_model, make_adapter, tokens, changes):
    model = make_model()
    adapter = make_adapter(model, **changes)
    if "prototypes" in changes:
        generator = torch.Generator().manual_seed(0)
        adapter.routers["1"].set_prototypes(torch.rand(4, 64, generator=generator))
    ids, mask = tokens([8, 5])
    before = model(ids, attention_mask=mask).logits
    with adapter.intervention("invert", strength=0.0):
        assert torch.equal(model(ids, attention_mask=mask).logits, before)
    # A quarter inverted is the signal at half its size, which another scale gives as well.
    with adapter.intervention("invert", strength=0.25):
        mixed = model(ids, attention_mask=mask).logits
    adapter.scales["1"].data.mul_(2)
    halved = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(mixed, halved, atol=1e-5, rtol=0)
    assert not torch.allclose(mixed, before, atol=1e-3)


def test_one_site_of_several(make_model, make_adapter, tokens):
    model = make_model()
    adapter = make_adapter(model, sites=(0, 1, 2))
    ids, mask = tokens([8])
    model(ids, attention_mask=mask)
    before = {layer: site.features for layer, site in adapter.sites.items()}
    with adapter.intervention("invert", sites=(2,)):
        model(ids, attention_mask=mask)
    for layer, site in adapter.sites.items():
        sign = -1 if layer == 2 else 1
        torch.testing.assert_close(site.features.values, sign * before[layer].values)
    with pytest.raises(ValueError, match="no control site 7"):
        adapter.intervention("invert", sites=(7,)).__enter__()


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_a_context_changes_the_model_inside_it_only(name, make_model, make_adapter, tokens):
    model = make_model()
    adapter = make_adapter(model)
    adapter.sites[1].facts.specialist_of_domain = {"law": 2}
    adapter.sites[1].facts.mean_rank = 2.0
    ids, mask = tokens([8, 5])
    before = model(ids, attention_mask=mask).logits
    outcomes = []
    for _ in range(2):
        with adapter.intervention(name, seed=3, domain="law") as control:
            outcomes.append(model(ids, attention_mask=mask).logits)
        assert control.ran
    assert torch.equal(*outcomes)
    assert not torch.allclose(outcomes[0][mask.bool()], before[mask.bool()], atol=1e-4)
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    filled = ids.masked_fill(mask == 0, 17)
    with adapter.intervention(name, seed=3, domain="law"):
        padded = model(filled, attention_mask=mask).logits
    torch.testing.assert_close(padded[mask.bool()], outcomes[0][mask.bool()], atol=1e-5, rtol=0)


def test_deterministic_controls_hold_in_cached_decoding(make_model, make_adapter, tokens):
    model = make_model()
    adapter = make_adapter(model)
    ids, mask = tokens([6, 6])
    for name in ("permute_latents", "replace_dense", "replace_random_sae", "invert"):
        with adapter.intervention(name, seed=1):
            out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
            whole = model(out[:, :-1]).logits.argmax(-1)
        assert torch.equal(whole[:, 5:], out[:, 6:]), name


def test_each_site_gets_its_own_draw(make_model, make_adapter, tokens):
    model = make_model()
    adapter = make_adapter(model, sites=(0, 1, 2))
    ids, mask = tokens([8])
    with adapter.intervention("randomize", seed=0):
        model(ids, attention_mask=mask)
    seen = [site.features.indices for site in adapter.sites.values()]
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))


def test_misuse_is_refused(make_model, make_adapter, tokens):
    model = make_model()
    adapter = make_adapter(model)
    ids, mask = tokens([4])
    with pytest.raises(ValueError, match=r"intervention=shufle: did you mean 'shuffle'"):
        adapter.intervention("shufle").__enter__()
    with (
        pytest.raises(RuntimeError, match="'shuffle': its control site never ran"),
        adapter.intervention("shuffle"),
    ):
        pass
    with adapter.intervention("invert"):
        with (
            pytest.raises(ValueError, match=r"'shuffle' inside another .Invert."),
            adapter.intervention("shuffle"),
        ):
            pass
        inverted = model(ids, attention_mask=mask).logits  # the outer one still holds
    assert not torch.allclose(inverted, model(ids, attention_mask=mask).logits)
    # An error inside is the error that is seen, and the context is over.
    with pytest.raises(KeyError, match="mine"), adapter.intervention("invert"):
        raise KeyError("mine")
    assert adapter.running.intervention is None


@pytest.mark.parametrize("signal", ["none", "dense"])
def test_interventions_need_sae_routing(make_model, make_adapter, signal):
    adapter = make_adapter(make_model(), signal)
    with pytest.raises(ValueError, match=r"intervention shuffle acts on .* SAE features") as caught:
        adapter.intervention("shuffle").__enter__()
    assert "\n" not in str(caught.value)
