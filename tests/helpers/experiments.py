"""The smoke experiment, smaller still; overrides that come after these take precedence."""

from __future__ import annotations

TINY = (
    "experiment=smoke",
    "model.steps=3",
    "model.batch_size=8",
    "domains.train_items=20",
    "domains.pretrain_items=100",
    "domains.evaluation_items=6",
    "sae.max_tokens=800",
    "sae.steps=3",
    "sae.batch_size=64",
    "trainer.max_steps=2",
    "trainer.batch_size=4",
    "evaluation.limit=3",
    "order.steps_per_domain=1",
    "logger=none",
)
