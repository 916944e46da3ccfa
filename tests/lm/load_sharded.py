"""What one of two ranks finds when it loads models under ZeRO-3: ``load_sharded.py MODELS``.

test_sharded.py runs and reads it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from transformers.integrations import is_deepspeed_zero3_enabled

from steerlora.errors import UserError
from steerlora.lm.pretrained import open_model

ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


M_MMAP_THRESHOLD = -3
"""glibc's ``mallopt``: bytes from which on an allocation has pages of its own."""


def main(models: Path) -> None:
    # Weights of a few megabytes would stay in malloc's heap when freed; larger ones do not.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 18)
    deepspeed.init_distributed("gloo")
    found = {
        "tied": compare(models / "tied", torch.float32),
        "several_files": compare(models / "several_files", torch.bfloat16),
        # After the others: by now the code that loads is in memory, and does not count.
        "memory": memory_of_loading(models / "large"),
        "errors": [refusal(models / name) for name in ("lacking", "other", "misshapen", "empty")],
        # A model that is opened afterwards is whole again.
        "whole_again": all(weight.numel() for weight in open_model(models / "tied").parameters()),
        "transformers_knows": is_deepspeed_zero3_enabled(),
    }
    rank = dist.get_rank()
    (models / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()


def memory_of_loading(folder: Path) -> dict[str, int]:
    """Bytes by which this process's memory grew, at the most, while it loaded."""
    Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    before = status("VmRSS")
    model = open_model(folder, sharding=ZERO3)
    return {
        "grew": status("VmHWM") - before,
        "model": sum(weight.ds_numel * 4 for weight in model.parameters()),
    }


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def compare(folder: Path, dtype: torch.dtype) -> dict[str, bool | str]:
    """The sharded model beside the same files loaded whole."""
    sharded = open_model(folder, dtype=dtype, sharding=ZERO3)
    whole = open_model(folder, dtype=dtype)
    weights = True
    for name, weight in whole.named_parameters():
        held = sharded.get_parameter(name)
        with deepspeed.zero.GatheredParameters([held]):
            weights &= torch.equal(held.data, weight) and held.dtype == weight.dtype
    buffers = [
        (mine.dtype, mine.tolist()) == (other.dtype, other.tolist())
        for mine, other in zip(sharded.buffers(), whole.buffers(), strict=True)
    ]
    config = {**ZERO3, "train_micro_batch_size_per_gpu": 1}
    config["bf16"] = {"enabled": dtype == torch.bfloat16}
    engine, *_ = deepspeed.initialize(model=sharded, config=config)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        logits = engine(ids, use_cache=False).logits
        expected = whole(ids, use_cache=False).logits
    return {
        "weights": weights,
        "names": [n for n, _ in sharded.named_parameters()]
        == [n for n, _ in whole.named_parameters()],
        "buffers": all(buffers) and bool(buffers),
        "logits": torch.equal(logits, expected),
        "tied": sharded.lm_head.weight is sharded.get_input_embeddings().weight,
        "training": sharded.training,
    }


def refusal(folder: Path) -> str:
    try:
        open_model(folder, sharding=ZERO3)
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(Path(sys.argv[1]))
