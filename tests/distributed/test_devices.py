"""Peak rates: by a GPU's name from the table, of anything else by measurement."""

from __future__ import annotations

import re
import time

import pytest
import torch

from steerlora.distributed import devices
from steerlora.distributed.devices import GPUS
from steerlora.errors import UserError


@pytest.fixture(autouse=True)
def fresh():
    """Every test asks anew."""
    devices.peak.cache_clear()
    yield
    devices.peak.cache_clear()


@pytest.fixture
def cuda(monkeypatch):
    """``cuda("NVIDIA H100 80GB HBM3")``: a device whose driver reports that name."""

    def pretend(name: str) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(devices, "_measured", lambda device, dtype: 1e9)
        return torch.device("cuda", 0)

    return pretend


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA H100 NVL", "h100-nvl-94gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA B200", "b200-180gb"),
        ("NVIDIA L40S", "l40s-48gb"),
        ("NVIDIA L4", "l4-24gb"),
        ("NVIDIA A10G", "a10g-24gb"),
        ("NVIDIA A10", "a10-24gb"),
        ("NVIDIA RTX A6000", "a6000-48gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("Tesla T4", "t4-16gb"),
        ("NVIDIA GeForce RTX 3090", "rtx3090-24gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24gb"),
        ("NVIDIA GeForce RTX 5090", "rtx5090-32gb"),
    ],
)
def test_a_gpu_is_known_by_the_name_that_its_driver_reports(reported, name, cuda):
    found = devices.peak(cuda(reported), "bf16-mixed")
    assert found == (GPUS[name].bfloat, name)


def test_every_gpu_of_the_table_has_a_name_of_its_own():
    patterns = [gpu.reported for gpu in GPUS.values()]
    assert len(set(patterns)) == len(patterns)
    for name, gpu in GPUS.items():
        assert gpu.memory == pytest.approx(1e9 * int(re.search(r"(\d+)gb$", name)[1]))
        assert gpu.half >= gpu.tf32 >= gpu.single


@pytest.mark.parametrize(
    "reported",
    [
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA L40",
        "AMD Instinct MI300X",
    ],
)
def test_a_part_of_a_gpu_or_another_one_is_measured(reported, cuda):
    assert devices.peak(cuda(reported), "bf16-mixed") == (1e9, "measured")


def test_the_rate_is_that_of_the_precision(cuda, monkeypatch):
    device, h100 = cuda("NVIDIA H100 80GB HBM3"), GPUS["h100-80gb"]
    assert devices.peak_flops(device, "16-mixed") == h100.half
    assert devices.peak_flops(device, "32-true") == h100.single
    devices.peak.cache_clear()
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert devices.peak_flops(device, "32-true") == h100.tf32
    assert devices.rate(GPUS["v100-16gb"], "bf16-mixed") == GPUS["v100-16gb"].single


def test_a_cpu_is_measured_once_quickly_and_said_to_be(caplog):
    caplog.set_level("INFO", logger="steerlora.distributed.devices")
    began = time.perf_counter()
    found = devices.peak(torch.device("cpu"), "32-true")
    assert time.perf_counter() - began < 30  # a tenth of a second, on a machine that is idle
    assert found.source == "measured"
    assert 1e8 < found.flops < 1e14
    assert devices.peak_flops(torch.device("cpu"), "32-true") == found.flops
    assert [f"{found.flops:.3g} FLOP/s" in record.message for record in caplog.records] == [True]


def test_a_gpu_that_is_in_no_table_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"^plan\.gpu=h100-80g: did you mean 'h100-80gb'"):
        devices.gpu("h100-80g")
