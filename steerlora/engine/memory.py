"""Memory that runs out, as what it is to the user: something to make smaller."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from steerlora.errors import UserError


@contextmanager
def shortage_explained(label: str) -> Iterator[None]:
    """Inside, a lack of memory, the machine's or a GPU's, becomes one line.

    Args:
        label: of the work, for the message.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _of_memory(error):
            raise
        raise UserError(
            f"memory ran out while building '{label}': make smaller what it reads of "
            "trainer.batch_size, trainer.max_length, evaluation.batch_size, sae.batch_size, "
            "sae.max_tokens, domains.train_items and domains.pretrain_items, or study.workers; "
            "the same command resumes"
        ) from error


def _of_memory(error: Exception) -> bool:
    # torch's own class for a GPU's; of the machine's memory it says so in words only.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or bool(re.search(r"can't allocate memory|Cannot allocate memory", str(error)))
    )
