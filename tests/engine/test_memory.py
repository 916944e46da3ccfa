"""Memory that runs out is one line, with what to make smaller."""

from __future__ import annotations

import pytest
import torch

from steerlora.engine.memory import shortage_explained
from steerlora.errors import UserError


def too_long() -> None:
    bytearray(2**62)


def too_large() -> None:
    torch.empty(2**59, dtype=torch.uint8)


def too_much_for_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nSee docs")


@pytest.mark.parametrize("work", [too_long, too_large, too_much_for_a_gpu])
def test_a_lack_of_memory_is_one_line(work):
    with (
        pytest.raises(
            UserError, match=r"memory ran out .*'lora seed 1'.*trainer\.batch_size"
        ) as error,
        shortage_explained("lora seed 1"),
    ):
        work()
    assert "\n" not in str(error.value)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), shortage_explained("lora"):
        raise RuntimeError("shapes do not fit")
