"""Figures of the literature on the continual benchmark, as far as they are known here.

All are second hand: read in a table of another work, which ``source`` names. AP and BWT in points,
as `steerlora.evaluation.forgetting` defines them; NaN where the source has none.
"""

from __future__ import annotations

from typing import NamedTuple

STANDARD = frozenset({"dbpedia", "amazon", "yahoo", "agnews"})
"""The tasks of orders 1 to 3 (Wang et al. 2023, arXiv 2310.14152)."""
LONG = STANDARD | {
    *("mnli", "cb", "wic", "copa", "qqp", "boolqa", "rte", "imdb", "yelp", "sst-2", "multirc")
}
"""The tasks of orders 4 to 6."""

_NAN = float("nan")
_FOREVER = "arXiv 2601.03938, table 1"
_KIF = "Recurrent-KIF, ACL 2025"
_GAIN = "arXiv 2505.15424"
_SLAO = "a table with SLAO"


class Published(NamedTuple):
    """What is published of one method and model, a mean over orders."""

    tasks: frozenset[str]
    """Of the benchmark."""
    method: str
    """As the literature calls it."""
    model: str
    average: float
    """AP."""
    backward: float
    """BWT."""
    source: str

    @property
    def text(self) -> str:
        """For a table: AP, BWT where it is known, model and source."""
        backward = "" if self.backward != self.backward else f" / {self.backward:+.1f}"
        figures = f"{self.average:.1f}{backward}".replace("-", "−")
        return f"{figures} ({self.model}; {self.source})"


OURS = {
    "lora": "SeqLoRA",
    "seq_lora": "SeqLoRA",
    "o_lora": "O-LoRA",
    "inf_lora": "InfLoRA",
    "epi": "EPI",
}
"""{method of this project: what the literature calls it}."""

PUBLISHED = tuple(
    Published(tasks, method, model, average, backward, source)
    for tasks, model, source, rows in (
        (
            STANDARD,
            "Qwen3-0.6B",
            _FOREVER,
            (
                ("SeqLoRA", 47.2, -12.6),
                ("EWC", 51.0, -10.3),
                ("O-LoRA", 59.4, -7.9),
                ("MIGU", 69.9, -7.5),
                ("VBM (replay)", 71.5, -5.2),
                ("FOREVER (2 % replay)", 72.9, -4.7),
            ),
        ),
        (
            STANDARD,
            "T5-large",
            _KIF,
            (
                ("SeqLoRA", 43.7, -50.4),
                ("O-LoRA", 75.8, -3.8),
                ("TaSL", 76.3, -4.0),
                ("VR-MCL", 76.0, -3.7),
                ("MIGU", 76.6, _NAN),
                ("Recurrent-KIF (2 % replay)", 78.4, -2.8),
                ("joint training", 80.3, _NAN),
            ),
        ),
        (
            LONG,
            "T5-large",
            _KIF,
            (
                ("SeqLoRA", 11.6, -73.4),
                ("O-LoRA", 69.6, -4.1),
                ("TaSL", 74.4, -5.3),
                ("MIGU", 76.5, _NAN),
                ("Recurrent-KIF (2 % replay)", 77.8, -3.6),
                ("joint training", 81.8, _NAN),
            ),
        ),
        (LONG, "T5-large, its order 3", _GAIN, (("InfLoRA", 75.15, _NAN),)),
        (LONG, "T5-large, its order 4", _GAIN, (("InfLoRA", 75.79, _NAN), ("EPI", 75.19, _NAN))),
        (
            LONG,
            "LLaMA-2-7B-chat",
            _SLAO,
            (
                ("SeqLoRA", 68.7, -17.2),
                ("O-LoRA", 73.5, -4.0),
                ("InfLoRA", 69.8, -4.9),
                ("SLAO", 74.8, -3.5),
                ("joint training", 78.1, _NAN),
            ),
        ),
    )
    for method, average, backward in rows
)


def published(tasks: frozenset[str]) -> dict[str, str]:
    """{method, as the literature calls it: what is published of it on these tasks}."""
    found: dict[str, list[str]] = {}
    for one in PUBLISHED:
        if one.tasks == tasks:
            found.setdefault(one.method, []).append(one.text)
    return {method: "; ".join(texts) for method, texts in found.items()}
