"""Plans: what fits, what is refused and with what advice, and the command that prints them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest
import yaml
from rich.console import Console

from steerlora import planning
from steerlora.__main__ import main
from steerlora.cli import compose
from steerlora.config import Config
from steerlora.errors import UserError
from steerlora.lm import flops
from steerlora.planning import fitting, plan
from steerlora.planning.plan import make
from steerlora.planning.trials import Trials
from steerlora.planning.work import ADAPTER, END_TO_END, HARVEST, SAE

SECTIONS = ("plan", "trainer", "sae", "evaluation")

# Layers of the true shapes, few of them.
QWEN3_8B = (
    *("model=qwen3_8b", "model.sae_path=null", "model.layers=4", "method.sites=[1]"),
    *("trainer=gpu", "trainer.accumulate=1"),
)
QWEN3_32B = (
    *("model=qwen3_32b", "model.layers=16", "method.sites=[12]", "sae.latents=8192"),
    *("trainer=gpu", "trainer.accumulate=1", "trainer.max_length=256"),
)

# A dry run takes as long as it has operations: an SAE's are per block of tokens. For what does not
# depend on how many tokens there are.
FEW = ("trainer.batch_size=4", "trainer.max_length=64")


@pytest.fixture(autouse=True, scope="module")
def measured_once() -> Iterator[None]:
    """What does not count in a trial is left out of the configurations that one is kept for."""
    known: dict[str, Trials] = {}

    def trials(config: Config) -> Trials:
        trainer = config.trainer
        counts = (trainer.max_length, trainer.precision, trainer.packing, config.plan.labelled)
        key = repr((config.model, config.method, config.sae, config.domains.names, counts))
        return known.setdefault(key, known.get(key) or Trials(config))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "Trials", trials)
        yield


def plan_of(*overrides: str):
    """The plan of some overrides; keys of sections are set without composing, which takes long."""
    keys = [
        override
        for override in overrides
        for section, *names in [override.partition("=")[0].split(".")]
        if section in SECTIONS and len(names) == 1
    ]
    config = compose.load(["stage=plan", *(o for o in overrides if o not in keys)])
    change = {key: yaml.safe_load(value) for key, _, value in (o.partition("=") for o in keys)}
    return make(fitting.changed(config, change))


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        fitting.refuse(plan_of(*overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def advised(*overrides: str) -> list[str]:
    """The overrides of the first change that a refusal advises."""
    advice = refusal(*overrides).rpartition(" GB: set ")[2]
    return advice.split(" or set ")[0].split()


def test_an_adapter_in_parts_fits_an_h100():
    plan = plan_of(*QWEN3_8B, "trainer.accumulate=8")
    assert plan.fits("h100-80gb")
    fitting.refuse(plan)
    memory = plan.memories[ADAPTER]
    assert memory.parts["weights of the base"] == 2 * plan.base
    assert sum(memory.parts.values()) == memory.total


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("qwen3_0.6b", 596_049_920), ("qwen3_8b", 8_190_735_360), ("qwen3_32b", 32_762_123_264)],
)
def test_a_base_has_as_many_parameters_as_its_publisher_says(model, parameters):
    trials = Trials(compose.load(["stage=plan", f"model={model}"]))
    assert sum(p.numel() for p in trials.base.values()) == parameters


@pytest.mark.parametrize("model", ["gemma2_2b", "llama3.2_1b"])
def test_a_hub_id_has_the_family_of_its_name(model):
    trials = Trials(compose.load(["stage=plan", f"model={model}"]))
    normed = any("q_norm" in name for name in trials.base)
    assert not normed  # as Qwen3's attention is


def test_the_whole_batch_at_once_does_not_and_the_fewest_parts_that_do_are_advised():
    assert advised(*QWEN3_8B) == ["trainer.accumulate=2"]
    fitting.refuse(plan_of(*QWEN3_8B, "trainer.accumulate=2"))


def test_recomputation_is_advised_where_parts_are_not_enough():
    tight = (*QWEN3_8B, "trainer.max_length=32768", "method=lora")
    assert advised(*tight)[0] == "trainer.activation_checkpointing=true"
    fitting.refuse(plan_of(*tight, *advised(*tight)))


@pytest.mark.parametrize("gpu", ["t4-16gb", "v100-16gb"])
def test_a_base_that_one_gpu_cannot_hold_is_spread_over_several(gpu):
    told = advised(*QWEN3_32B, f"plan.gpu={gpu}")
    assert {"trainer.strategy=zero3", "evaluation.spread=true"} <= {*told}
    changed = plan_of(*QWEN3_32B, f"plan.gpu={gpu}", *told)
    assert changed.config.plan.gpus > 1
    fitting.refuse(changed)


def test_offloading_is_named_beside_more_gpus():
    told = refusal(*QWEN3_32B, "plan.gpu=v100-16gb", "method=lora")
    more, offloaded = told.rpartition(" GB: set ")[2].split(" or set ")
    assert more.startswith("plan.gpus=2 ")
    assert "trainer.offload=true" in offloaded
    for changes in (more, offloaded):
        fitting.refuse(plan_of(*QWEN3_32B, "plan.gpu=v100-16gb", "method=lora", *changes.split()))


def test_on_several_gpus_shards_are_advised_before_more_of_them():
    told = advised(*QWEN3_32B, "trainer.strategy=ddp", "plan.gpus=4", "plan.gpu=v100-16gb")
    assert told[0] == "trainer.strategy=zero3"
    assert not any(change.startswith("plan.gpus") for change in told)


def test_a_larger_gpu_is_advised_where_shards_do_not_help():
    told = (*QWEN3_8B, "trainer.max_length=8192", "plan.gpu=l4-24gb", "trainer.batch_size=1")
    assert advised(*told)[0].startswith("plan.gpu=")
    fitting.refuse(plan_of(*told, *advised(*told)))


def test_where_nothing_helps_the_text_is_to_be_shortened():
    long = ("method=lora", "trainer.max_length=200000", "trainer.batch_size=4")
    assert refusal(*QWEN3_8B, *long).endswith("shorten trainer.max_length or lower sae.latents")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("plan.gpus=2", "plan.gpus=2: trainer.strategy=single is one rank"),
        ("trainer.strategy=ddp plan.gpus=3", "trainer.batch_size=32 does not divide over"),
        ("trainer.accumulate=5", "make it a multiple of 5"),
        ("trainer.strategy=ddp plan.gpus=2 sae.batch_size=1023", "sae.batch_size=1023"),
        ("plan.gpu=h100", "plan.gpu=h100: did you mean"),
        ("method.target_modules=[c_attn]", "linear modules are self_attn.q_proj (Linear), self_"),
    ],
)
def test_a_plan_that_means_nothing_is_refused(overrides, says):
    with pytest.raises(UserError) as caught:
        plan_of(*QWEN3_8B, *overrides.split())
    assert says in str(caught.value)


def test_a_folder_with_fewer_layers_than_the_configuration_says_is_refused(tmp_path):
    shape = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
    shape |= {"intermediate_size": 96, "vocab_size": 99, "model_type": "qwen3"}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    with pytest.raises(UserError, match="has layers 0 to 3"):
        plan_of(*QWEN3_8B, "model.layers=8", "method.sites=[5]", f"model.path={tmp_path}")


def test_more_ranks_take_less_each():
    alone = plan_of(*QWEN3_8B)
    shared = plan_of(*QWEN3_8B, "trainer.strategy=ddp", "plan.gpus=4")
    parts, fewer = (p.memories[ADAPTER].parts for p in (alone, shared))
    assert fewer["logits"] == parts["logits"] / 4
    assert fewer["weights of the base"] == parts["weights of the base"]
    for name, seconds in alone.seconds("h100-80gb").items():
        assert shared.seconds("h100-80gb")[name] == pytest.approx(seconds / 4, rel=1e-4)


def test_what_is_trained_is_what_is_planned():
    assert [*plan_of(*QWEN3_8B, *FEW).memories] == [HARVEST, SAE, ADAPTER]
    assert [*plan_of(*QWEN3_8B, *FEW, "method=lora").memories] == [ADAPTER]
    given = plan_of(*QWEN3_8B, *FEW, "sae.path=elsewhere")
    assert [*given.memories] == [ADAPTER]
    assert given.disk == 0
    assert next(work.name for work in plan_of().works) == "base pretraining"


def test_a_published_sae_is_not_trained():
    plan = plan_of("model=qwen3_8b", "model.layers=4", "method.sites=[1]", "trainer=gpu")
    assert [*plan.memories] == [ADAPTER]
    assert plan.sae == 2 * 4096 * 65536 + 65536 + 4096


def test_training_end_to_end_is_planned_beside_that_which_it_follows_or_in_its_place():
    tuned = (*QWEN3_8B, *FEW, "sae.end_to_end.steps=50", "sae.end_to_end.batch_size=4")
    both, new = plan_of(*tuned), plan_of(*tuned, "sae.end_to_end.start=new")
    assert [*both.memories] == [HARVEST, SAE, END_TO_END, ADAPTER]
    assert [*new.memories] == [END_TO_END, ADAPTER]
    assert new.disk == 0
    (work,) = (one for one in new.works if one.name == END_TO_END)
    assert work.tokens == 50 * 4 * 64
    around = flops.splicing_flops_per_token(new.shape, 1, 64)
    own = new.trials.new_sae().training_flops_per_token()
    assert work.model + work.single == pytest.approx(around + own, rel=0.03)
    given = plan_of(*tuned, "sae.path=mine", "method.sites=[1,2]")
    assert [*given.memories] == [END_TO_END, ADAPTER]
    assert [one.tokens for one in given.works if one.name == END_TO_END] == [2 * 50 * 4 * 64]


def test_packed_rows_are_full():
    loose, packed = (
        plan_of(*QWEN3_8B, "plan.tokens_per_row=100", f"trainer.packing={packing}")
        for packing in ("false", "true")
    )
    assert packed.seconds("h100-80gb")[ADAPTER] > 10 * loose.seconds("h100-80gb")[ADAPTER]


def test_disk_is_of_every_site_and_the_monitor():
    stored = (*QWEN3_8B, *FEW, "sae.max_tokens=1000")
    one = plan_of(*stored)
    assert one.disk == (2 * 4096 + 4) * 1000  # bfloat16, and the norms
    more = plan_of(*stored, "method.sites=[1,2]", "method.monitor=4")
    assert more.disk == 3 * one.disk


def test_a_stream_takes_memory_in_place_of_disk():
    asked = (*QWEN3_8B, *FEW, "sae.stream_buffer=1000")
    stored, streamed = (plan_of(*asked, f"sae.stream={stream}") for stream in ("false", "true"))
    assert stored.disk > streamed.disk == 0
    more = streamed.memories[SAE].total - stored.memories[SAE].total
    assert more == 2 * streamed.base + 2 * 1000 * 4096 * 2  # of bfloat16


def test_monitored_losses_and_second_forwards_cost_their_share():
    def each(*changes: str) -> float:
        found = plan_of(*QWEN3_8B, *FEW, *changes).works
        (work,) = (work for work in found if work.name == ADAPTER)
        return work.model + work.single

    plain = each()
    assert each("method.monitor=4", "method.losses.preservation=1") > 1.2 * plain
    assert each("method=x_lora") > 1.1 * plain
    assert each("plan.labelled=0.1") < plain


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_the_arithmetic_that_is_counted_is_that_of_the_utilisation(recompute):
    changes = ("method=lora", "plan.labelled=0.25", f"trainer.activation_checkpointing={recompute}")
    found = plan_of(*QWEN3_8B, *changes)
    (work,) = (w for w in found.works if w.name == ADAPTER)
    said = flops.training_flops_per_token(
        found.shape,
        adapter_parameters=sum(found.trained.values()),
        first_adapted_layer=1,
        sequence=found.config.trainer.max_length,
        labelled=0.25,
    )
    assert work.model + work.single == pytest.approx(said, rel=0.03)
    assert (work.again > 0.2 * said) == (recompute == "true")


def test_tokens_a_row_count_for_time_and_not_for_memory():
    full, half = plan_of(*QWEN3_8B), plan_of(*QWEN3_8B, "plan.tokens_per_row=512")
    assert half.memories[ADAPTER] == full.memories[ADAPTER]
    assert half.seconds("h100-80gb")[ADAPTER] < 0.51 * full.seconds("h100-80gb")[ADAPTER]
    lazy = plan_of(*QWEN3_8B, "plan.mfu=0.2")
    assert lazy.seconds("h100-80gb")[ADAPTER] == 2 * full.seconds("h100-80gb")[ADAPTER]


def test_the_tables_name_every_part_and_mark_the_gpu():
    written = io.StringIO()
    config = compose.load(["stage=plan", *QWEN3_8B, "trainer.accumulate=8", "plan.gpu=a100-80gb"])
    planning.show(Console(file=written, width=160), config)
    text = written.getvalue()
    for part in (
        "4 layers of 193 M",
        "weights of the base",
        "logits",
        "optimizer",
        "SAEs and prototypes",
    ):
        assert part in text
    assert "a100-80gb *" in text
    assert "assumption" in text
    assert text.count("a sequence of domains") == 2


def test_the_command_prints_tables_and_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["stage=plan", *QWEN3_8B, "trainer.accumulate=8"])
    good = capsys.readouterr()
    assert good.err == ""
    assert "memory of each of 1 x h100-80gb" in good.out
    with pytest.raises(SystemExit) as ended:
        main(["stage=plan", *QWEN3_8B])
    bad = capsys.readouterr()
    assert ended.value.code == 2
    assert "memory of each of 1 x h100-80gb" in bad.out
    assert bad.err.startswith("error: adapter training needs")
    assert bad.err.count("\n") == 1
    assert [*tmp_path.iterdir()] == []  # nothing is written


@pytest.mark.parametrize(
    ("method", "trained"), [("sae_steering", {"strengths": 1}), ("steering_vector", {"vector": 32})]
)
def test_parameters_that_are_in_no_layer_are_counted(method, trained):
    assert make(compose.load([f"method={method}", "model=micro_xs"])).trained == trained
