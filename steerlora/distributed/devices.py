"""GPUs by name: memory and peak rates from their makers' datasheets; any other device, measured.

Rates are dense (datasheets like to print twice as much, "with sparsity") and accumulate in float32.
Lightning has such a table too (``lightning.fabric.utilities.throughput``), with sparse figures for
some GPUs and without tensor cores for others.
"""

from __future__ import annotations

import logging
import re
import time
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from steerlora.errors import UserError, nearest

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

GB, TERA = 1e9, 1e12


class Gpu(NamedTuple):
    """Memory and peak rates of one model of GPU."""

    reported: str
    """Regular expression that the name reported by its driver matches."""

    memory: float
    """Memory in bytes, from the datasheet's gigabytes of 1e9 bytes. Drivers report a little
    more."""

    half: float
    """Peak rate in float16, in FLOP/s."""

    bfloat: float
    """Peak rate in bfloat16, in FLOP/s."""

    tf32: float
    """Peak rate in float32 where products may be rounded to TF32, in FLOP/s."""

    single: float
    """Peak rate in float32, in FLOP/s."""


def _gpu(reported: str, memory: float, half: float, tf32: float, single: float) -> Gpu:
    """Of one whose bfloat16 is as fast as its float16; gigabytes and tera-operations a second."""
    rates = (half * TERA, half * TERA, tf32 * TERA, single * TERA)
    return Gpu(reported, memory * GB, *rates)


def _without_bfloat(reported: str, memory: float, half: float, single: float) -> Gpu:
    """Of one that has neither bfloat16 nor TF32, and computes them as float32."""
    rates = (single * TERA,) * 3
    return Gpu(reported, memory * GB, half * TERA, *rates)


GPUS: dict[str, Gpu] = {
    # NVIDIA HGX B200 datasheet (a board of eight, divided).
    "b200-180gb": _gpu(r"\bB200", 180, 2250, 1125, 75),
    # NVIDIA H200 datasheet.
    "h200-141gb": _gpu(r"\bH200", 141, 989.4, 494.7, 66.9),
    # NVIDIA H100 datasheet and H100 architecture whitepaper.
    "h100-nvl-94gb": _gpu(r"\bH100 NVL", 94, 835, 417.5, 60),
    "h100-pcie-80gb": _gpu(r"\bH100 PCIe", 80, 756, 378, 51.2),
    "h100-80gb": _gpu(r"\bH100", 80, 989.4, 494.7, 66.9),
    # NVIDIA A100 datasheet.
    "a100-80gb": _gpu(r"\bA100\b.*80GB", 80, 312, 156, 19.5),
    "a100-40gb": _gpu(r"\bA100\b", 40, 312, 156, 19.5),
    # NVIDIA L40S and L4 datasheets.
    "l40s-48gb": _gpu(r"\bL40S\b", 48, 362, 183, 91.6),
    "l4-24gb": _gpu(r"\bL4\b", 24, 121, 60, 30.3),
    # NVIDIA RTX A6000 datasheet, with the GA102 whitepaper's dense rates.
    "a6000-48gb": _gpu(r"\bRTX A6000\b", 48, 154.8, 77.4, 38.7),
    # NVIDIA A10 datasheet; A10G: the variant in Amazon's G5 instances.
    "a10g-24gb": _gpu(r"\bA10G\b", 24, 70, 35, 31.5),
    "a10-24gb": _gpu(r"\bA10\b", 24, 125, 62.5, 31.2),
    # NVIDIA architecture whitepapers: Blackwell (GeForce), Ada, GA102.
    "rtx5090-32gb": _gpu(r"\bRTX 5090\b(?! Laptop)", 32, 209.5, 104.8, 104.8),
    "rtx4090-24gb": _gpu(r"\bRTX 4090\b(?! Laptop)", 24, 165.2, 82.6, 82.6),
    "rtx3090-24gb": _gpu(r"\bRTX 3090\b(?! Ti)", 24, 71, 35.6, 35.6),
    # NVIDIA V100 and T4 datasheets.
    "v100-32gb": _without_bfloat(r"\bV100\b.*32GB", 32, 125, 15.7),
    "v100-16gb": _without_bfloat(r"\bV100\b", 16, 125, 15.7),
    "t4-16gb": _without_bfloat(r"\bT4\b", 16, 65, 8.1),
}
"""What ``plan.gpu`` may name. Of two patterns that match, the first counts."""


def gpu(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        UserError: there is none; names the nearest.
    """
    if name not in GPUS:
        raise UserError(f"plan.gpu={name}: {nearest(name, GPUS)}")
    return GPUS[name]


def rate(of: Gpu, precision: str, *, tf32: bool = False) -> float:
    """FLOP/s of matrix products under a precision by Lightning's name ("bf16-mixed", ...).

    Args:
        tf32: float32 products may be rounded to TF32.
    """
    if precision.startswith("bf16"):
        return of.bfloat
    if precision.startswith("16"):
        return of.half
    return of.tf32 if tf32 else of.single


class Peak(NamedTuple):
    """The highest rate that a device can reach, and where that number is from."""

    flops: float
    """Rate in FLOP/s."""

    source: str
    """The GPU's name in `GPUS`, or "measured"."""


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s that ``device`` can reach at most, the denominator of a utilisation.

    From the table where the device's name is in it; otherwise, as on a CPU, what a short series of
    matrix products reaches, measured once a process and logged as such.

    Args:
        device: where the training runs.
        precision: its precision, by Lightning's name.
    """
    return peak(device, precision).flops


@lru_cache(maxsize=8)
def peak(device: torch.device, precision: str) -> Peak:
    """As :func:`peak_flops`, with the source."""
    import torch

    if device.type == "cuda":
        reported = torch.cuda.get_device_name(device)
        tf32 = torch.get_float32_matmul_precision() != "highest"
        for name, known in GPUS.items():
            if re.search(known.reported, reported) and "MIG" not in reported:
                return Peak(rate(known, precision, tf32=tf32), name)
    kinds = {"bf16": torch.bfloat16, "16": torch.float16}
    measured = _measured(device, kinds.get(precision.split("-")[0], torch.float32))
    logger.info(
        "%s is in no table of datasheets: its peak is taken to be the %.3g FLOP/s that matrix "
        "products reach on it now",
        device,
        measured,
    )
    return Peak(measured, "measured")


def _measured(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """The best rate of square products that grow until one takes a good part of ``seconds``."""
    import torch

    size, best, end = 128, 0.0, time.perf_counter() + seconds
    while True:
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        torch.mm(matrix, matrix)  # the first call of a size prepares it
        _wait(device)
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        _wait(device)
        now = time.perf_counter()
        best = max(best, 2 * size**3 / (now - began))
        if now + 16 * (now - began) > end:  # a product of twice the size, and its preparation
            return best
        size *= 2


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
