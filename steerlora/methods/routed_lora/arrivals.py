"""What routers learn of a domain as it arrives, and what a user should know of it.

W width of the signal (N latents or D).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from steerlora.data.batches import evenly_spaced
from steerlora.data.chat import EncodedChat
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.signals import prompt_signals

PROTOTYPE_ROWS = 512
"""Training rows a domain, and rows of general text, whose signals make a prototype."""
COINCIDE = 1e-3
"""Prototypes coincide that are nearer than this part of the largest distance from their mean."""


def fit_routers(
    model: nn.Module,
    adapter: Adapter,
    specialist: int | None,
    rows: Sequence[EncodedChat],
    pad_token_id: int,
) -> None:
    """Give routers the signals of a domain's training rows, and their answers' tokens.

    Args:
        model: with ``adapter`` attached.
        specialist: the domain's; None: of general text.
        rows: as many as there are; `PROTOTYPE_ROWS`, evenly spaced, are taken.
        pad_token_id: fills batches.
    """
    spread = evenly_spaced(rows, PROTOTYPE_ROWS)
    spread = sorted(spread, key=lambda row: row.response_start)  # as the signals come
    answers = [tuple(row.input_ids[row.response_start :]) for row in spread]
    signals = prompt_signals(model, adapter, spread, pad_token_id)
    for site, found in signals.items():
        adapter.routers[str(site)].fit(specialist, found, answers)


def notes_of_prototypes(
    adapter: Adapter, arrived: Mapping[str, int], new: Sequence[str]
) -> list[str]:
    """What makes domains that have just come hard to tell from others, a sentence each.

    Args:
        adapter: its routers are fitted to the domains.
        arrived: {domain: its specialist}.
        new: those of them that have just come.
    """
    notes, names = [], list(arrived)
    for site, router in adapter.routers.items():
        if getattr(router, "shrunk", False):
            notes.append(
                f"site {site}: {', '.join(new)}: there are fewer texts so far than the signal has "
                "dimensions: the covariance that routes is shrunk towards an isotropic one"
            )
        known = router.prototypes[list(arrived.values())].double()  # [domains, W]
        near = COINCIDE * (known - known.mean(0)).norm(dim=1).max()
        for name in new:
            place = names.index(name)
            distances = (known[:place] - known[place]).norm(dim=1)
            notes += [
                f"site {site}: the prototypes of {earlier} and {name} coincide: text of either "
                "goes to one of them"
                for earlier, distance in zip(names, distances.tolist(), strict=False)
                if distance <= near
            ]
    return notes
