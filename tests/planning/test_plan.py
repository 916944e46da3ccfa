"""Plans: what fits, what is refused and with what advice, and the command that prints them."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
import yaml
from rich.console import Console

from steerlora import planning
from steerlora.cli import compose
from steerlora.errors import UserError
from steerlora.planning import fitting
from steerlora.planning.plan import make
from steerlora.planning.work import ADAPTER, HARVEST, SAE

SECTIONS = ("plan", "trainer", "sae", "control", "adapter", "evaluation")

QWEN3_8B = ("model=qwen3_8b", "model.sae_path=null", "trainer=gpu", "trainer.accumulate=1")
QWEN3_32B = ("model=qwen3_32b", "trainer=gpu", "trainer.accumulate=1")


def plan_of(*overrides: str):
    """The plan of some overrides; keys of sections are set without composing, which takes long."""
    keys = [o for o in overrides if o.split(".")[0] in SECTIONS]
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


def test_an_8b_adapter_in_parts_fits_an_h100():
    plan = plan_of(*QWEN3_8B, "trainer.accumulate=8")
    assert plan.fits("h100-80gb")
    fitting.refuse(plan)
    memory = plan.memories[ADAPTER]
    assert memory.parts["weights of the base"] == 2 * plan.base.total
    assert plan.base.total == pytest.approx(8.19e9, rel=0.001)
    assert sum(memory.parts.values()) == memory.total


def test_the_whole_batch_at_once_does_not_and_the_fewest_parts_that_do_are_advised():
    assert advised(*QWEN3_8B) == ["trainer.accumulate=4"]
    fitting.refuse(plan_of(*QWEN3_8B, "trainer.accumulate=4"))
    assert not plan_of(*QWEN3_8B, "trainer.accumulate=2").fits("h100-80gb")


def test_recomputation_is_advised_where_parts_are_not_enough():
    tight = (*QWEN3_8B, "trainer.max_length=16384", "method=lora")
    assert advised(*tight)[0] == "trainer.activation_checkpointing=true"
    fitting.refuse(plan_of(*tight, *advised(*tight)))


@pytest.mark.parametrize("gpu", ["a100-40gb", "rtx4090-24gb"])
def test_a_base_that_one_gpu_cannot_hold_is_spread_over_several(gpu):
    told = advised(*QWEN3_32B, f"plan.gpu={gpu}")
    assert {"trainer.strategy=zero3", "evaluation.spread=true"} <= {*told}
    changed = plan_of(*QWEN3_32B, f"plan.gpu={gpu}", *told)
    assert changed.config.plan.gpus > 1
    fitting.refuse(changed)


def test_offloading_is_named_beside_more_gpus():
    told = refusal(*QWEN3_32B, "plan.gpu=a100-40gb", "method=lora")
    more, offloaded = told.rpartition(" GB: set ")[2].split(" or set ")
    assert more.startswith("plan.gpus=4 ")
    assert "trainer.offload=true" in offloaded
    for changes in (more, offloaded):
        fitting.refuse(plan_of(*QWEN3_32B, "plan.gpu=a100-40gb", "method=lora", *changes.split()))


def test_on_several_gpus_shards_are_advised_before_more_of_them():
    told = advised(*QWEN3_32B, "trainer.strategy=ddp", "plan.gpus=4", "plan.gpu=a100-40gb")
    assert told[0] == "trainer.strategy=zero3"
    assert not any(change.startswith("plan.gpus") for change in told)


def test_a_larger_gpu_is_advised_where_shards_do_not_help():
    told = (*QWEN3_8B, "trainer.max_length=8192", "plan.gpu=l4-24gb", "trainer.batch_size=1")
    assert advised(*told)[0].startswith("plan.gpu=")
    fitting.refuse(plan_of(*told, *advised(*told)))


def test_where_nothing_helps_the_text_is_to_be_shortened():
    assert refusal(*QWEN3_8B, "trainer.max_length=1000000").endswith(
        "shorten trainer.max_length or lower sae.latents"
    )


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("plan.gpus=2", "plan.gpus=2: trainer.strategy=single is one rank"),
        ("trainer.strategy=ddp plan.gpus=3", "trainer.batch_size=32 does not divide over"),
        ("trainer.accumulate=5", "make it a multiple of 5"),
        ("trainer.strategy=ddp plan.gpus=2 sae.batch_size=1023", "sae.batch_size=1023"),
        ("plan.gpu=h100", "plan.gpu=h100: did you mean"),
        ("method.target_modules=[c_attn]", "a layer has self_attn.q_proj, self_attn.k_proj"),
    ],
)
def test_a_plan_that_means_nothing_is_refused(overrides, says):
    with pytest.raises(UserError) as caught:
        plan_of(*QWEN3_8B, *overrides.split())
    assert says in str(caught.value)


def test_a_folder_with_fewer_layers_than_the_configuration_says_is_refused(tmp_path):
    shape = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
    shape |= {"intermediate_size": 96, "vocab_size": 99}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    with pytest.raises(UserError, match="has layers 0 to 3"):
        plan_of(*QWEN3_8B, f"model.path={tmp_path}")


def test_more_ranks_take_less_each():
    alone = plan_of(*QWEN3_8B)
    shared = plan_of(*QWEN3_8B, "trainer.strategy=ddp", "plan.gpus=4")
    parts, fewer = (p.memories[ADAPTER].parts for p in (alone, shared))
    assert fewer["logits"] == parts["logits"] / 4
    assert fewer["weights of the base"] == parts["weights of the base"]
    for name, seconds in alone.seconds("h100-80gb").items():
        assert shared.seconds("h100-80gb")[name] == pytest.approx(seconds / 4)


def test_what_is_trained_is_what_is_planned():
    assert [*plan_of(*QWEN3_8B).memories] == [HARVEST, SAE, ADAPTER]
    assert [*plan_of(*QWEN3_8B, "method=lora").memories] == [ADAPTER]
    given = plan_of(*QWEN3_8B, "sae.path=elsewhere")
    assert [*given.memories] == [ADAPTER]
    assert given.disk == 0
    assert next(work.name for work in plan_of().works) == "base pretraining"


def test_a_published_sae_is_not_trained():
    plan = plan_of("model=qwen3_8b", "trainer=gpu")
    assert [*plan.memories] == [ADAPTER]
    assert plan.sae == 2 * 4096 * 65536 + 65536 + 4096


def test_packed_rows_are_full():
    loose, packed = (
        plan_of(*QWEN3_8B, "plan.tokens_per_row=100", f"trainer.packing={packing}")
        for packing in ("false", "true")
    )
    assert packed.seconds("h100-80gb")[ADAPTER] > 10 * loose.seconds("h100-80gb")[ADAPTER]


def test_disk_is_of_every_site_and_the_monitor():
    one = plan_of(*QWEN3_8B, "sae.max_tokens=1000")
    assert one.disk == 4 * 4096 * 1000
    more = plan_of(*QWEN3_8B, "sae.max_tokens=1000", "method.sites=[13,20]", "method.monitor=36")
    assert more.disk == 3 * one.disk


def test_monitored_losses_and_second_forwards_cost_their_share():
    def each(*changes: str) -> float:
        (work,) = (w for w in plan_of(*QWEN3_8B, *changes).works if w.name == ADAPTER)
        return work.model + work.single

    plain = each()
    assert each("method.monitor=36", "method.losses.preservation=1") > 1.2 * plain
    assert each("method=x_lora") > 1.2 * plain
    assert each("plan.labelled=0.1") < plain


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
    for part in ("8.19 B", "weights of the base", "logits", "optimizer", "SAEs and prototypes"):
        assert part in text
    assert "a100-80gb *" in text
    assert "assumption" in text
    assert text.count("a sequence of domains") == 2


def test_the_command_prints_tables_and_refuses_in_one_line(tmp_path):
    def run(*changes: str):
        command = [sys.executable, "-m", "steerlora", "stage=plan", *QWEN3_8B, *changes]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    good = run("trainer.accumulate=8")
    assert (good.returncode, good.stderr) == (0, "")
    assert "memory of each of 1 x h100-80gb" in good.stdout
    bad = run()
    assert bad.returncode == 2
    assert "memory of each of 1 x h100-80gb" in bad.stdout
    assert bad.stderr.startswith("error: adapter training needs")
    assert bad.stderr.count("\n") == 1
    assert [*tmp_path.iterdir()] == []  # nothing is written


def test_planning_needs_no_torch():
    program = (
        "import sys, json; from steerlora import compose, planning; "
        "from rich.console import Console; "
        "planning.show(Console(file=sys.stderr), compose.load(['stage=plan'])); "
        "print(json.dumps('torch' in sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert json.loads(ran.stdout) is False, ran.stderr
