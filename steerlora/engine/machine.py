"""The machine that numbers come from: an artifact's manifest and a report's provenance name it.

Another instruction set sums in another order, and a training makes of the last digit another
adapter: equal in distribution, not in numbers.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

LEVELS = {
    "default": frozenset[str](),
    "avx2": frozenset({"avx2", "fma"}),
    "avx512": frozenset({"avx512vl", "avx512bw", "avx512dq", "fma"}),
}
"""Instruction sets of x86 that torch has kernels for, ascending: what ``ATEN_CPU_CAPABILITY`` calls
them, and the processor's flags that each needs. Source: torch, ATen/native/DispatchStub.cpp."""

LIMITS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA")
"""Environment variables by which torch, MKL and oneDNN take less than the processor has."""


@dataclass(frozen=True)
class Machine:
    """What a process computes on, as far as its numbers depend on it."""

    processor: str
    """The processor's model."""

    instructions: str
    """Instruction set of torch's kernels, as torch names it: ``DEFAULT``, ``AVX2``, ``AVX512``."""

    limits: tuple[str, ...] = ()
    """``NAME=value`` of those of `LIMITS` that are set."""

    threads: int | None = None
    """Threads that torch computes with. None: the process has not imported torch."""

    gpu: str | None = None
    """Model of the GPU that the process computes on. None: it has used none."""

    torch: str | None = None
    """Build of torch: version and commit. None: the process has not imported torch."""

    def __str__(self) -> str:
        return f"{self.instructions}, {self.processor}"

    def computes_like(self, other: Machine) -> bool:
        """Whether processor and instruction set are the same."""
        return str(self) == str(other)


def this_machine() -> Machine:
    """What this process computes on. Does not import torch where the processor tells enough."""
    limits = tuple(f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ)
    instructions = _instructions()
    torch = sys.modules.get("torch")
    if torch is None:
        return Machine(_processor(), instructions, limits)
    used = torch.cuda.is_initialized()
    return Machine(
        processor=_processor(),
        instructions=instructions,
        limits=limits,
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if used else None,
        torch=f"{torch.__version__} ({(torch.version.git_version or 'unknown')[:12]})",
    )


def built_by(manifest: Mapping[str, Any]) -> Machine | None:
    """The machine that built an artifact, or finished it; None where its manifest does not say."""
    try:
        recorded = manifest["machine"]
        return Machine(**{**recorded, "limits": tuple(recorded["limits"])})
    except (KeyError, TypeError):
        return None


def builders(manifests: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The distinct machines that built artifacts, each with the fingerprints of what it built.

    Several are a report of mixed machines. ``machine`` is None for artifacts that do not say.
    """
    built: dict[Machine | None, list[str]] = {}
    for manifest in manifests:
        built.setdefault(built_by(manifest), []).append(manifest["fingerprint"])
    return [
        {"machine": machine and asdict(machine), "artifacts": names}
        for machine, names in built.items()
    ]


def description() -> dict[str, Any]:
    """All that ``provenance.json`` says about this machine."""
    import torch

    here = this_machine()
    built = [line.strip(" -") for line in torch.__config__.show().splitlines()[1:]]
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return {
        "processor": here.processor,
        "instructions": here.instructions,
        "limits": here.limits,
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": here.torch,
        "blas": blas and blas[1],
        "torch_built_with": [line for line in built if line and "Build settings" not in line],
    }


def supported() -> list[str]:
    """Those of `LEVELS` that this processor has, ascending; the first where it does not say."""
    flags = _cpuinfo().get("flags", "").split()
    return [name for name, needed in LEVELS.items() if needed <= set(flags)]


def _instructions() -> str:
    """What ``torch.backends.cpu.get_cpu_capability()`` answers."""
    if "torch" in sys.modules or "flags" not in _cpuinfo():
        import torch

        return torch.backends.cpu.get_cpu_capability()
    # torch takes the variable's word for it, unless it does not know the word.
    asked = os.environ.get("ATEN_CPU_CAPABILITY")
    return (asked if asked in LEVELS else supported()[-1]).upper()


def _processor() -> str:
    name = _cpuinfo().get("model name") or platform.processor() or platform.machine()
    return " ".join(name.split())


@cache
def _cpuinfo() -> dict[str, str]:
    """What Linux says about the first processor; empty on other systems."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
