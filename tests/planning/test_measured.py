"""The plan's memory beside what real trainings take, at small shapes on a CPU: within 5 %.

What differs on a GPU, the block in which an SAE's scores are held, is an argument here; kernels'
own work spaces are in neither number.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from steerlora.cli import compose
from steerlora.config import Config
from steerlora.data.harvest import HARVEST_ROWS
from steerlora.lm.shapes import model_shape
from steerlora.methods.base import Method, Sources
from steerlora.methods.config import MethodConfig
from steerlora.planning import memory
from steerlora.planning.operations import Operations
from steerlora.planning.trials import Trials
from steerlora.planning.work import SAE, end_to_end_sites, works
from steerlora.saes.config import SAES
from steerlora.saes.training import SAEModule

TOLERANCE = 0.05
"""Of the plan, as a share of what was measured."""

SMALL = (
    *("domains.kind=text", "domains.dir=.", "domains.names=[law]", "domains.broad=law"),
    *("model=text_s", "model.vocabulary=500", "trainer.max_steps=2"),
    *("trainer.batch_size=16", "trainer.max_length=64", "method.rank=4"),
)
"""A training that takes a fraction of a second."""


def planned(config: Config) -> memory.Memory:
    return memory.method_training(config, on_a_cpu(config))


def on_a_cpu(config: Config) -> Trials:
    return Trials(config, accelerator=False)


@pytest.mark.parametrize(
    "changes",
    [
        "",
        "model.vocabulary=8000 plan.labelled=0.25 trainer.accumulate=2",
        "model.layers=6 model.width=256 model.heads=8 model.ffn_width=768 trainer.batch_size=4",
        "method.source=base method.sites=[1,3] model.heads=16 model.kv_heads=4",
        "trainer.activation_checkpointing=true model.layers=6",
        "trainer.precision=bf16-mixed trainer.batch_size=8",
        "trainer.precision=bf16-mixed trainer.activation_checkpointing=true trainer.batch_size=8",
        "method=lora trainer.max_length=256 trainer.batch_size=4",
        "method=moe_lora method.target_modules=[q_proj,v_proj] method.sites=[3]",
        "method=sc_lora_context method.specialists=3 sae.latents=4096 trainer.batch_size=8",
        "method=sc_lora_reference method.router_hidden=32 trainer.batch_size=8",
        "method.monitor=4 method.losses.preservation=1 method.losses.steering=1",
        "sae.latents=16384 method.sites=[3] trainer.batch_size=4",
        "trainer.batch_size=2 method.rank=2",  # the probe of routing takes more than a step
    ],
)
def test_the_peak_of_adapter_training_is_the_planned_one(changes, measured_adapter_training):
    config = compose.load([*SMALL, *changes.split()])
    plan, found = planned(config), measured_adapter_training(config)
    assert plan.total == pytest.approx(found.peak, rel=TOLERANCE), plan


@dataclass(frozen=True, kw_only=True)
class Bent(MethodConfig):
    """A method that planning has never heard of."""

    def build(self, model: nn.Module, sources: Sources, seed: int) -> Method:
        return Bend(self, model).attach(model)


class Bend(Method):
    """Adds a small network's output to the stream of every site."""

    def __init__(self, config: Bent, model: nn.Module) -> None:
        super().__init__(config, model)
        width = model.config.hidden_size
        self.networks = nn.ModuleDict(
            {
                str(site): nn.Sequential(
                    nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
                )
                for site in config.sites
            }
        )

    def edits(self):
        return {site: self._edit(site) for site in self.config.sites}

    def _edit(self, site: int):
        return lambda stream: stream + self.networks[str(site)](stream)


def test_a_new_method_has_a_plan_without_a_line_of_its_own(measured_adapter_training):
    config = replace(compose.load(SMALL), method=Bent(sites=[1, 2]))
    plan, found = planned(config), measured_adapter_training(config)
    assert plan.total == pytest.approx(found.peak, rel=TOLERANCE), plan
    width = config.model.width
    assert plan.parts["weights of what trains"] == 4 * 2 * (8 * width**2 + 5 * width)


@pytest.mark.parametrize(
    "changes", ["", "method.rank=16", "trainer.precision=bf16-mixed sae.latents=2048"]
)
def test_so_are_its_parts(changes, measured_adapter_training):
    config = compose.load([*SMALL, "model.vocabulary=4000", *changes.split()])
    plan, found = planned(config), measured_adapter_training(config)
    assert plan.moment == "at the loss"
    weights = ("weights of the base", "weights of what trains", "SAEs and prototypes")
    assert sum(map(plan.parts.get, weights)) == pytest.approx(found.fixed, rel=0.01)
    assert plan.parts["optimizer"] == pytest.approx(found.optimizer, rel=0.001)
    # Before the backward there are the softmax of the logits, of the plan's three, and activations.
    kept = plan.parts["activations"] + plan.parts["logits"] / 3
    assert kept == pytest.approx(found.kept, rel=TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        "sae.latents=4096",
        "sae.latents=4096 sae.batch_size=256 model.width=512",
        "sae.latents=512 sae.batch_size=4096 model.width=512",
        "sae.latents=2048 sae.batch_size=2048 sae.k=128",
    ],
)
def test_the_peak_of_sae_training_is_the_planned_one(changes, measured_sae_training):
    config = compose.load([*SMALL, *changes.split()])
    plan = memory.sae_training(config, on_a_cpu(config))
    assert plan.total == pytest.approx(measured_sae_training(config), rel=TOLERANCE), plan


SMALL_SAE = ("sae.latents=2048", "sae.batch_size=512")
UNSURE = ("batch_topk", "matryoshka_batch_topk")
"""Architectures whose memory follows the token that has most latents: as planned, a quarter."""


@pytest.mark.parametrize("architecture", SAES)
def test_so_is_that_of_every_architecture(architecture, measured_sae_training):
    config = compose.load([*SMALL, f"sae={architecture}", *SMALL_SAE])
    plan = memory.sae_training(config, on_a_cpu(config))
    if architecture in UNSURE:
        alike, far = (measured_sae_training(config, far) for far in (False, True))
        assert alike < plan.total < far, plan
    else:
        found = measured_sae_training(config)
        assert plan.total == pytest.approx(found, rel=TOLERANCE), plan


@pytest.mark.parametrize("architecture", SAES)
def test_the_arithmetic_of_an_sae_is_what_a_step_does(architecture):
    config = compose.load([*SMALL, f"sae={architecture}", *SMALL_SAE])
    trials, tokens = on_a_cpu(config), config.sae.batch_size
    (work,) = (w for w in works(config, model_shape(config.model), trials) if w.name == SAE)
    sae = config.sae.build(config.model.width)
    batch = torch.randn(tokens, *[2] * bool(sae.span), config.model.width)
    batch[0] *= 100
    sae.initialize_thresholds(batch)
    with Operations() as counted:
        loss, _ = SAEModule(sae, total_steps=2).step(batch, 0, in_full=False)
        loss.backward()
    assert work.single == pytest.approx(counted.single / tokens, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "site"),
    [
        ("", 1),
        ("sae=batch_topk sae.latents=1024", 3),
        ("sae=skip_transcoder sae.end_to_end.mse_weight=0", 1),
        ("trainer.precision=bf16-mixed model.width=256 model.heads=8", 1),
    ],
)
def test_the_peak_of_training_end_to_end_is_the_planned_one(changes, site, measured_end_to_end):
    own = ("sae.end_to_end.steps=9", f"method.sites=[{site}]", "sae.end_to_end.batch_size=8")
    config = compose.load([*SMALL, *own, *changes.split()])
    plan = memory.end_to_end(config, on_a_cpu(config), end_to_end_sites(config))
    assert plan.total == pytest.approx(measured_end_to_end(config, site), rel=TOLERANCE), plan


@pytest.mark.parametrize(
    ("changes", "sites"),
    [
        ("", (1,)),
        ("", (1, 3)),
        ("model.width=512 model.ffn_width=1024 trainer.max_length=32", (1,)),
        ("trainer.precision=bf16-mixed model.heads=16 model.kv_heads=4", (1,)),
    ],
)
def test_the_peak_of_a_harvest_is_the_planned_one(changes, sites, measured_harvest):
    config = compose.load([*SMALL, *changes.split()])
    plan = memory.harvesting(config, on_a_cpu(config), sites)
    found = measured_harvest(config, sites, HARVEST_ROWS)
    assert plan.total == pytest.approx(found, rel=TOLERANCE), plan


LARGE = (
    *("model.width=512", "model.heads=8", "model.kv_heads=4", "model.head_width=64"),
    *("model.ffn_width=1536", "model.vocabulary=20000", "trainer.max_length=128"),
    "trainer.batch_size=6",
)
ALONE = """
import importlib.util, re, sys, tempfile, threading, time
from pathlib import Path
import torch
from steerlora.cli import compose
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("trainings", sys.argv[1])
trainings = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trainings)
peak = 0
def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(re.search(r"RssAnon:\\s*(\\d+) kB", status)[1]))
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
def run(overrides):
    config = compose.load(overrides.split())
    with tempfile.TemporaryDirectory() as directory:
        trainings.train(trainings.built(config), config, Path(directory))
    return peak
before = run(sys.argv[2] + " trainer.batch_size=1")
print(1024 * (run(sys.argv[3]) - before))
"""
"""Peaks of a process's own memory: pages of its libraries come and go as the system likes."""


def test_a_process_grows_by_what_is_planned():
    """The system's own count of a process, for a training with parts of hundreds of megabytes."""
    small, large = " ".join(SMALL), " ".join([*SMALL, *LARGE])
    plan = planned(compose.load(large.split()))
    assert sum(part > 1e8 for part in plan.parts.values()) == 2
    ran = subprocess.run(
        [sys.executable, "-c", ALONE, str(Path(__file__).with_name("conftest.py")), small, large],
        capture_output=True,
        text=True,
        check=True,
        # Every tensor has pages of its own, which go when it does: no gaps of the C library's.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )
    # A process is looked at every 5 ms, and a busy machine looks less often.
    assert plan.total == pytest.approx(int(ran.stdout.split()[-1]), rel=0.1), plan
