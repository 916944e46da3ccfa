"""Every option of the configuration reaches what it should: it changes what is built, or is known
to change only how."""

from __future__ import annotations

import dataclasses

import pytest

from steerlora.cli import compose, experiment, sections
from steerlora.errors import UserError
from steerlora.stages import features

BASE = ("experiment=smoke", "model.steps=2")

CHANGES = {
    "model.path": None,  # covered below: needs a model on disk
    "model.revision": "main",
    "model.layers": 3,
    "model.width": 64,
    "model.heads": 4,
    "model.kv_heads": 2,
    "model.head_width": 8,
    "model.ffn_width": 96,
    "model.vocabulary": 999,
    "model.tied": "false",
    "model.chat_template": None,  # likewise
    "model.thinking": None,  # needs a model on disk: covered below
    "model.date": "2021-02-03",
    "model.control_sites": "[0]",
    "model.sae_latents": 96,
    "model.sae_k": 3,
    "model.context_length": 99,
    "model.adapter_learning_rate": 0.9,
    "model.sae_path": None,  # files: covered below
    "model.steps": 3,
    "model.batch_size": 5,
    "model.target_loss": 0.5,
    "model.tolerance": 0.5,
    "model.learning_rate": 0.5,
    "model.matrix_learning_rate": 0.5,
    "model.prompt_weight": 0.3,
    "model.seed": 9,
    "domains.kind": "text",
    "domains.dir": None,
    "domains.general": None,  # of kind "classification" only: test_classification.py
    "domains.development": None,
    "domains.sources": None,  # of kind "hub" only: covered in tests/data/domains/test_hub.py
    "domains.names": "[law,math,code,medicine,instruction]",
    "domains.broad": "law",
    "domains.train_items": 11,
    "domains.pretrain_items": 17,
    "domains.pretraining": None,  # of kinds "text" and "hub": covered below
    "domains.evaluation_items": 7,
    "domains.prompt_characters": 99,
    "domains.seed": 4,
    "sae.architecture": None,  # a group of its own: sae=topk, relu, ...
    "sae.path": None,  # files: covered below
    "sae.latents": 80,
    "sae.k": 3,
    "sae.normalize": "layer_norm",
    "sae.max_tokens": 99,
    "sae.corpus": None,  # files: covered below
    "sae.stream": "true",
    "sae.stream_buffer": None,  # only with stream: tests/stages/test_streaming.py
    "sae.stream_seed": None,
    "sae.steps": 7,
    "sae.epochs": None,  # in place of steps: tests/saes/test_config.py
    "sae.batch_size": 33,
    "sae.adam_beta2": 0.9,
    "sae.learning_rate": 0.1,
    "sae.auxiliary": 0.5,
    "sae.initial_k": 20,
    "sae.anneal_fraction": 0.3,
    "sae.warmup_fraction": 0.3,
    "sae.decay_fraction": 0.3,
    "sae.scale_inputs": "false",
    "sae.median_start": "false",
    "sae.unit_norm": "false",
    "sae.dead_fraction": 0.3,
    "sae.seed": 5,
    "sae.end_to_end.steps": 7,
    "sae.end_to_end.start": None,  # with steps only: tests/stages/test_end_to_end.py
    "sae.end_to_end.batch_size": None,
    "sae.end_to_end.mse_weight": None,
    "sae.end_to_end.learning_rate": None,
    "features.frequency": "general_text",
    "features.general_quantile": 0.6,
    "features.largest_variation": 0.6,
    "features.domain_quantile": 0.6,
    "features.least": 3,
    "features.instruct_model": "elsewhere",
    "features.drift": "token",
    "features.drift_quantile": 0.6,
    "features.control": "random",
    "features.seed": 3,
    "features.shown": 3,
    "features.examples": 3,
    "method.sites": "[0]",
    "method.monitor": 2,
    "method.target_modules": "[q_proj]",
    "method.replay.ratio": 0.5,
    "method.replay.batches": 9,
    "method.replay.how": "rows",
    "method.optimizer.constant_rate": "true",
    "method.optimizer.over_domains": "true",
    "method.bundle_sae": "true",
    "method.signal": None,  # an option of the group: method=lora, moe_lora, sc_lora
    "method.source": "base",
    "method.reads": None,  # "output" reads the base: covered below
    "method.context": "ema",
    "method.decay": 0.5,
    "method.router": "mlp",
    "method.signal_tokens": "all",
    "method.router_hidden": 99,
    "method.rank_hidden": 99,
    "method.per_module": "true",
    "method.specialists": 3,
    "method.active": 2,
    "method.rank": 5,
    "method.alpha": 3,
    "method.dropout": 0.1,
    "method.top_k": 1,
    "method.temperature": 2,
    "method.prototypes": None,  # needs SAE features: covered below
    "method.whitened": "false",
    "method.hard_gate": "false",
    "method.margin": 0.3,
    "method.null_specialist": "false",
    "method.dynamic_rank": None,  # likewise
    "method.initial_rank": 0.6,
    "method.hard_rank": 0.1,
    "method.isolation": None,  # frozen needs routing, own a specialist a domain: below
    "method.losses.task": 0.7,
    "method.losses.preservation": None,  # needs a monitor site: covered below
    "method.losses.steering": None,
    "method.losses.gate_sparsity": 0.7,
    "method.losses.rank_budget": 0.7,
    "method.losses.load_balance": 0.7,
    "method.losses.diversity": 0.7,
    "method.published_losses": "true",
    "method.losses.orthogonality": None,  # needs specialists of the domains' own: covered below
    "method.memory.enabled": None,  # needs SAE features: covered below
    "method.memory.per_module": None,  # needs routers of the modules' own: covered below
    "method.memory.every": 9,
    "method.memory.warmup": 9,
    "method.memory.spawn_confidence": 0.1,
    "method.memory.spawn_similarity": 0.1,
    "method.memory.merge_similarity": 0.1,
    "method.memory.prune_usage": 0.3,
    "method.health.log_every": 3,
    "intervention.name": "shuffle",
    "intervention.seed": None,  # only with an intervention, covered below
    "intervention.strength": 0.3,
    "intervention.sites": "[1]",
    "intervention.domains": "[law]",
    "intervention.phase": None,  # only with an intervention, covered below
    "order.kind": None,  # orders are set by the study
    "order.sequence": None,
    "order.seed": None,
    "order.index": None,
    "order.listed": None,
    "order.steps_per_domain": 9,
    "trainer.max_steps": 9,
    "trainer.batch_size": 9,
    "trainer.max_length": 99,
    "trainer.drop_cut": "true",
    "trainer.last_turn_only": "true",
    "trainer.packing": "true",
    "trainer.learning_rate": 0.9,
    "trainer.weight_decay": 0.1,
    "trainer.adam_epsilon": 0.1,
    "trainer.gradient_clip": 9,
    "trainer.warmup_fraction": 0.3,
    "trainer.decay_fraction": 0.3,
    "trainer.validation.rows": 3,
    "trainer.validation.every_steps": None,  # with rows only: covered below
    "trainer.validation.keep_best": None,
    "trainer.validation.patience": None,
    "trainer.precision": "bf16-mixed",
    "evaluation.limit": 3,
    "evaluation.limits": "{micro_law: 2}",
    "evaluation.generation_items": 3,
    "evaluation.tasks": "[micro_law]",
    "evaluation.max_length": 77,
    "evaluation.max_generated_tokens": 9,
    "evaluation.groups": "{gsm8k:[gsm8k]}",
    "evaluation.metrics": "{micro_law:'exact_match,none'}",
    "evaluation.shots": None,  # of a task that runs: covered below
    "evaluation.files": None,  # count by content: covered below
    "evaluation.folder": None,  # likewise
    "evaluation.include_path": None,  # likewise
    "study.stage": None,  # of a stage with a report: tests/cli/test_experiment.py
    "study.settings": None,
    "study.models": "[micro_xs,micro_s]",
    "study.main_model": "micro_s",
    "study.methods": "[lora]",
    "study.scale_methods": None,  # only with a second model, covered below
    "study.scale_seeds": None,
    "study.seeds": "[3]",
    "study.vary": None,  # needs two replicates: tests/cli/test_experiment.py
    "study.interventions": "[shuffle]",
    "study.doses": "[0.5]",
    "study.retrained": None,  # its variants' own options: covered below
    "study.ablation_method": None,  # must be one with SAE routing: there is one
    "study.orders": "[broad_last]",
    "study.sequential_methods": "[lora]",
}
"""{key: another value of it}; None where a single change is no whole configuration."""

HOW_NOT_WHAT = {
    "stage.name",
    "stage.settings",
    "sae.architecture",  # an option of the group
    "method.kind",  # likewise
    "method.name",
    "method.health.collapse",
    "method.health.collapse_below",
    "model.name",
    "model.gguf_file",  # what these four say of a file counts by its content: tests/lm/test_gguf.py
    "model.sha256",
    "model.wheel",
    "model.instead",
    "domains.name",
    "order.name",
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.offload",
    "trainer.persistent_elements",
    "trainer.accumulate",
    "trainer.activation_checkpointing",
    "trainer.compile",
    "trainer.checkpoint_seconds",
    "evaluation.batch_size",
    "plan.gpu",  # what the keys of plan do is tested in tests/planning/test_plan.py
    "plan.gpus",
    "plan.mfu",
    "plan.tokens_per_row",
    "plan.labelled",
    "evaluation.spread",
    "study.name",
    "study.meaningful",
    "study.objective",
    "study.colours",
    "study.workers",
    "study.least_general",
    "study.calibrate",
    "study.calibration",
    "study.paper_method",
    "study.baseline_method",
    "study.dense_method",
    "study.own_method",
    "study.variants",
    "artifacts.root",
    "results.dir",
}
"""Names, hardware and places; logger.* besides."""


def fingerprints(*changes: str, compose_variants: bool = False) -> set[str]:
    """Of every step of the experiment; its variants' own options matter to few of the tests."""
    overrides = [*BASE, *changes]
    config = compose.load(overrides)

    def variant(*more: str):
        return compose.load([*overrides, *more]) if compose_variants else config

    planned = experiment.plan(config, variant)
    found: set[str] = set()

    def visit(step) -> None:
        found.add(step.fingerprint)
        for upstream in step.upstream:
            visit(upstream)

    for step in (*planned.steps, *features.steps(config)):
        visit(step)
    return found


@pytest.fixture(scope="module")
def unchanged() -> dict[bool, set[str]]:
    """{whether variants have options of their own: fingerprints}"""
    return {composed: fingerprints(compose_variants=composed) for composed in (False, True)}


def keys_of(prefix: str, section) -> list[str]:
    """Dotted keys of a section and of those inside it."""
    found = []
    for field in dataclasses.fields(section):
        key, value = f"{prefix}.{field.name}", getattr(section, field.name)
        found += keys_of(key, value) if dataclasses.is_dataclass(value) else [key]
    return found


def test_every_key_is_accounted_for():
    config = compose.load(BASE)
    keys = {
        key
        for group in sections.GROUPS
        if group not in ("logger", "stage")
        for key in keys_of(group, getattr(config, group))
    } | {"stage.name", "stage.settings"}
    assert keys == set(CHANGES) | HOW_NOT_WHAT


@pytest.mark.parametrize("key", [key for key, value in CHANGES.items() if value is not None])
def test_it_changes_what_is_built(key, unchanged, tmp_path):
    extra = []
    if key == "domains.kind":
        extra = [f"domains.dir={tmp_path}"]
    if key == "intervention.name":  # only SAE routing has a signal to intervene on
        extra = ["method=sc_lora"]
    composed = key.startswith("study.")
    changed = fingerprints(f"{key}={CHANGES[key]}", *extra, compose_variants=composed)
    assert changed != unchanged[composed]


def test_the_intervention_seed_counts_under_an_intervention():
    one, other = (fingerprints("intervention=shuffle", f"intervention.seed={s}") for s in (1, 2))
    assert one != other


def test_scale_options_count_with_a_second_model():
    models = "study.models=[micro_xs,micro_s]"
    options = ("methods=[lora]", "methods=[sc_lora]", "seeds=[3]")
    found = [fingerprints(models, f"study.scale_{o}", compose_variants=True) for o in options]
    assert found[0] != found[1] != found[2] != found[0]


@pytest.mark.parametrize(
    ("needs", "options"),
    [
        ("method=sc_lora", ("method.prototypes=true", "method.prototypes=false")),
        (
            "method.monitor=2",
            ("method.losses.preservation=1", "method.losses.steering=1", "method.losses.task=1"),
        ),
        (
            "method.isolation=own method.specialists=5",
            ("method.losses.orthogonality=0.5", "method.losses.orthogonality=0.6"),
        ),
        (
            "method=sc_lora method.specialists=5",
            tuple(f"method.isolation={kind}" for kind in ("free", "frozen", "own")),
        ),
        (
            "trainer.validation.rows=3",
            (
                "trainer.validation.every_steps=7",
                "trainer.validation.keep_best=true",
                "trainer.validation.patience=2",
            ),
        ),
        ("method=sc_lora", ("method.memory.enabled=true", "method.memory.enabled=false")),
        (
            "method=any_ssr study.interventions=[]",
            ("method.expansion=64", "method.expansion=65", "method.ridge=1", "method.ridge=2"),
        ),
        (
            "method=inf_lora study.interventions=[]",
            ("method.kept_first=0.9", "method.kept_first=0.8", "method.kept_last=0.99"),
        ),
        ("method=sc_lora method.source=base", ("method.reads=input", "method.reads=output")),
        (
            "method=sc_lora method.per_module=true",
            ("method.memory.per_module=true", "method.memory.per_module=false"),
        ),
        (
            "method=spliced_lora study.interventions=[]",
            (
                *("method.rank=5", "method.alpha=3", "method.dropout=0.1", "method.map_rank=2"),
                *("method.adapted=all", "method.dictionary=random", "method.teacher=shuffled"),
                *("method.objective=cross_entropy", "method.spliced=false", "method.text=domains"),
            ),
        ),
        (
            "method=stan method.scale=alpha/k study.interventions=[]",
            (
                *("method.units=80", "method.k=5", "method.select=absolute"),
                *("method.scale=1/k", "method.alpha=3", "method.encoder=frozen"),
                *("method.gate=static", "method.gate=chosen", "method.gate_in_evaluation=random"),
            ),
        ),
        (
            "method=sae_steering study.interventions=[]",
            (
                *("method.latents=[3]", "method.strengths=[2]", "method.how=add"),
                "method.along=vector",
            ),
        ),
        (
            "method=stan_chosen study.interventions=[]",
            ("method.chosen_after=0.3", "method.chosen_after=0.4"),
        ),
        (
            "method=sc_lora intervention=shuffle study.interventions=[]",
            ("intervention.phase=training", "intervention.phase=evaluation"),
        ),
    ],
)
def test_options_that_need_others_count_with_them(needs, options):
    found = [frozenset(fingerprints(*needs.split(), option)) for option in options]
    assert len(set(found)) == len(options)


def test_what_is_kept_between_epochs_changes_only_how():
    spliced = ("method=spliced_lora", "study.interventions=[]")
    one, other = (fingerprints(*spliced, f"method.cached_tokens={n}") for n in (0, 9))
    assert one == other


def test_retrained_controls_are_steps_of_their_own():
    one, other = (
        fingerprints(f"study.retrained=[{name}]", compose_variants=True)
        for name in ("shuffle", "invert")
    )
    assert one != other


def test_permutations_count_by_index():
    one, other = (
        fingerprints(f"study.orders=[permutation_{index}]", compose_variants=True)
        for index in (0, 119)
    )
    assert one != other


def test_the_folder_counts_by_content_not_by_place(tmp_path):
    for place, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "law_train.jsonl").write_text(text)
    a, b, c = (
        fingerprints("domains.kind=text", f"domains.dir={tmp_path / place}") for place in "abc"
    )
    assert a == b != c


def test_rows_given_for_a_task_count_by_content_not_by_place(tmp_path):
    for place, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / f"{place}.jsonl").write_text(text)
    a, b, c = (fingerprints(f"evaluation.files.gsm8k={tmp_path / p}.jsonl") for p in "abc")
    assert a == b != c


def test_a_folder_of_benchmarks_counts_by_the_files_of_the_tasks_that_run(tmp_path):
    for place, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "gsm8k_test.jsonl").write_text(text)
        (tmp_path / place / "other_test.jsonl").write_text(place)
    group = "evaluation.groups={gsm8k:[gsm8k]}"
    a, b, c = (fingerprints(group, f"evaluation.folder={tmp_path / p}") for p in "abc")
    assert fingerprints(group) != a == b != c


def test_shots_count_for_a_task_that_runs():
    group = "evaluation.groups={gsm8k:[gsm8k]}"
    assert fingerprints(group) != fingerprints(group, "evaluation.shots={gsm8k:2}")


def test_task_files_count_by_content_not_by_place(tmp_path):
    for place, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "rows.txt").write_text(text)
    a, b, c = (fingerprints(f"evaluation.include_path={tmp_path / place}") for place in "abc")
    assert a == b != c


GIVEN = {
    "model.path": ["config.json"],
    "sae.path": ["cfg.json", "sae_weights.safetensors"],
    "model.sae_path": ["cfg.json", "sae_weights.safetensors"],
    "sae.corpus": ["a.txt", "b.jsonl"],
}


@pytest.mark.parametrize("key", GIVEN)
def test_files_given_by_path_count_by_content(key, tmp_path):
    for name in GIVEN[key]:
        (tmp_path / name).write_text("{}")
    given = ("model=micro_xs", f"{key}={tmp_path}")
    before = fingerprints(*given)
    assert fingerprints(*given) == before != fingerprints()
    for name in GIVEN[key]:
        (tmp_path / name).write_text("{ }")
        changed = fingerprints(*given)
        assert changed != before
        before = changed


def test_thinking_counts_with_a_model_that_can(tmp_path):
    given = ("model=micro_xs", f"model.path={tmp_path}")
    found = [fingerprints(*given, f"model.thinking={value}") for value in ("null", "true", "false")]
    assert found[0] != found[1] != found[2] != found[0]


def test_a_chat_template_counts_by_content_not_by_place(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for place, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / f"{place}.jinja").write_text(text)
    given = ("model=micro_xs", f"model.path={tmp_path}")
    a, b, c = (
        fingerprints(*given, f"model.chat_template={tmp_path / name}.jinja") for name in "abc"
    )
    assert fingerprints(*given) != a == b != c


def test_rows_set_aside_for_pretraining_count_by_the_base_that_needs_them(tmp_path):
    (tmp_path / "law_train.jsonl").write_text("x")
    (tmp_path / "config.json").write_text("{}")
    given = ("model=micro_xs", "domains.kind=text", f"domains.dir={tmp_path}")
    trained = (*given, f"model.path={tmp_path}")
    assert fingerprints(*given) == fingerprints(*given, "domains.pretraining=true")
    assert fingerprints(*trained) == fingerprints(*trained, "domains.pretraining=false")
    assert fingerprints(*trained) != fingerprints(*trained, "domains.pretraining=true")
    with pytest.raises(UserError, match="leaves no text to pretrain micro_xs on: set it to null"):
        fingerprints(*given, "domains.pretraining=false")


def test_random_orders_count_by_seed():
    one, other = (
        fingerprints(f"study.orders=[random_{seed}]", compose_variants=True) for seed in (0, 1)
    )
    assert one != other
