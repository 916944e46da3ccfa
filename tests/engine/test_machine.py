"""What an artifact and a report say about the machine that made them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from steerlora.engine import machine
from steerlora.engine.machine import Machine, builders, built_by, supported, this_machine
from steerlora.engine.manifests import plain

BOTH = """
import sys
from steerlora.engine.machine import this_machine
before, early = this_machine(), "torch" in sys.modules
import torch
torch.set_num_threads(3)
after = this_machine()
print(before.instructions, after.instructions, torch.backends.cpu.get_cpu_capability(), early)
print(before.threads, before.torch, after.threads, after.torch)
"""


@pytest.mark.slow
@pytest.mark.parametrize("asked", [None, "nonsense", *supported()])
def test_the_instruction_set_is_torchs_answer_without_torch(asked):
    environment = {name: value for name, value in os.environ.items() if name not in machine.LIMITS}
    environment |= {"ATEN_CPU_CAPABILITY": asked} if asked else {}
    command = [sys.executable, "-W", "ignore", "-c", BOTH]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (before, after, told, early), (*_, threads, version, commit) = map(
        str.split, done.stdout.splitlines()
    )
    assert before == after == told
    if asked in machine.LEVELS:
        assert told == asked.upper()
    if sys.platform == "linux" and supported() != ["default"]:
        assert early == "False"
        assert done.stdout.splitlines()[1].startswith("None None ")
    assert threads == "3"
    assert version == torch.__version__
    assert commit.strip("()") == torch.version.git_version[:12]


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        ("fpu sse4_2 avx", ["default"]),
        ("avx2", ["default"]),  # torch wants fused multiply-add too
        ("avx2 fma", ["default", "avx2"]),
        ("avx2 fma avx512f avx512vl avx512bw", ["default", "avx2"]),
        ("avx2 fma avx512vl avx512bw avx512dq", ["default", "avx2", "avx512"]),
    ],
)
def test_what_the_processor_has(monkeypatch, flags, levels):
    monkeypatch.setattr(machine, "_cpuinfo", lambda: {"flags": flags})
    assert supported() == levels


def test_a_processor_that_says_nothing_is_named_all_the_same(monkeypatch):
    monkeypatch.setattr(machine, "_cpuinfo", dict)
    assert supported() == ["default"]
    here = this_machine()
    assert here.processor
    assert here.instructions == torch.backends.cpu.get_cpu_capability()


def test_limits_and_threads_are_those_of_this_process(monkeypatch):
    for name in machine.LIMITS:
        monkeypatch.delenv(name, raising=False)
    assert this_machine().limits == ()
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    here = this_machine()
    assert here.limits == ("MKL_CBWR=COMPATIBLE",)
    assert here.threads == torch.get_num_threads()
    assert here.gpu is None or torch.cuda.is_initialized()


def test_a_manifest_gives_back_its_machine_or_none():
    here = Machine("A", "AVX2", ("MKL_CBWR=COMPATIBLE",), 4, "H100", "2.9")
    assert built_by(json.loads(json.dumps(plain({"machine": here})))) == here
    for old in ({}, {"machine": None}, {"machine": {"processor": "A"}}, {"machine": {"new": 1}}):
        assert built_by(old) is None


def test_machines_compute_alike_by_processor_and_instruction_set():
    first = Machine("A", "AVX2", threads=1)
    assert first.computes_like(Machine("A", "AVX2", threads=8, torch="2.9"))
    assert not first.computes_like(Machine("A", "AVX512", threads=1))
    assert not first.computes_like(Machine("B", "AVX2", threads=1))


def test_builders_are_distinct_and_name_what_they_built():
    one, other = Machine("A", "AVX2", threads=1), Machine("A", "AVX2", threads=2)
    made = [("a", one), ("b", other), ("c", one), ("d", None)]
    manifests = [
        plain({"fingerprint": name} | ({"machine": built} if built else {})) for name, built in made
    ]
    found = json.loads(json.dumps(builders(manifests)))
    assert [(built_by(entry), entry["artifacts"]) for entry in found] == [
        (one, ["a", "c"]),
        (other, ["b"]),
        (None, ["d"]),
    ]


def test_the_description_is_this_machines():
    found = json.loads(json.dumps(machine.description()))
    assert found["processor"] == this_machine().processor
    assert found["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert found["cores"] >= 1
    assert found["memory_gib"] >= 1
    assert found["python"].startswith("3.")
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert torch.__version__ in found["torch"]
    shown = torch.__config__.show()
    assert f"BLAS_INFO={found['blas']}," in shown
    assert found["torch_built_with"]
    assert all(line in shown for line in found["torch_built_with"])
    assert not any("CXX_FLAGS" in line for line in found["torch_built_with"])
