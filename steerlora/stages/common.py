"""What several stages do: open upstream artifacts, follow a run in Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any, NamedTuple

import lightning as L
import torch
from transformers import PreTrainedModel

from steerlora.config import Config, LoggerConfig
from steerlora.data.batches import evenly_spaced
from steerlora.data.chat import EncodedChat, encode_chats
from steerlora.data.cuts import warn_of_cuts
from steerlora.data.jsonl import read_rows
from steerlora.distributed import ranks
from steerlora.engine.artifacts import Artifact
from steerlora.engine.content import identity_of
from steerlora.engine.manifests import CHECKPOINTS, plain
from steerlora.engine.steps import Context
from steerlora.errors import UserError
from steerlora.evaluation.suite import Domains
from steerlora.lm.pretrained import open_model, open_tokenizer
from steerlora.lm.weight_files import model_files
from steerlora.reporting.runs import RunLog, follow
from steerlora.training.loop import fit

if not torch.cuda.is_available():
    # Else DeepSpeed, which transformers looks for, warns that it found no accelerator.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _of_trainer(names: str) -> frozenset[str]:
    return frozenset(f"trainer.{name}" for name in names.split())


NOT_IDENTITY = frozenset({"logger"}) | _of_trainer(
    "accelerator strategy offload persistent_elements accumulate activation_checkpointing compile "
    "checkpoint_seconds"
)
"""Keys that change where a training runs and how it is followed, not what comes out of it."""
WHERE = frozenset({"accelerator", "spread", "evaluation.spread"})
"""Keys that say on what hardware a model runs that does not train."""
ADAPTER_ONLY = _of_trainer(
    "max_steps batch_size max_length last_turn_only drop_cut packing learning_rate weight_decay "
    "adam_epsilon warmup_fraction decay_fraction validation"
)
"""Trainer keys that base and SAE training have in their own sections."""

BASE = "model"
"""Folder of the base artifact that holds the Hugging Face files."""
POINTER = "base.json"
"""File of the base artifact that says where a base model of the user's lies."""


SEEDS = {"base": "model.seed", "sae": "sae.seed", "adapter": "seed"}
"""{part of a replicate: the key of its seed}."""


def varied(config: Config) -> list[str]:
    """What every replicate has of its own; a base or SAEs that are given are the same in all."""
    given = {"base": config.model.path, "sae": config.sae.path}
    return [part for part in SEEDS if part in config.study.vary and not given.get(part)]


def replicate(config: Config, seed: int) -> list[str]:
    """Overrides that make anew what a replicate of an experiment about a stage has of its own."""
    return [f"{SEEDS[part]}={seed}" for part in varied(config)]


class BasePlace(NamedTuple):
    """Where a base model lies, its chat template, and what that is told of thinking and the date.

    The arguments of :func:`open_tokenizer`; the first two are also :func:`open_model`'s.
    """

    path: str
    revision: str | None
    thinking: bool | None
    date: str
    chat_template: str | None


def place_of(artifact: Artifact) -> BasePlace:
    """Where the model of a base artifact lies: in it, or at the user's own place."""
    pointer = artifact.json(POINTER)
    path = pointer["path"] or str(artifact / BASE)
    template = pointer.get("chat_template")
    return BasePlace(path, pointer["revision"], pointer["thinking"], pointer["date"], template)


def load_base(
    artifact: Artifact, *, accelerator: str = "cpu", spread: bool = False
) -> tuple[PreTrainedModel, Any]:
    """The base model and its tokenizer.

    Args:
        artifact: of stage ``base``.
        accelerator: what the configuration calls the hardware that it goes to.
        spread: over all visible GPUs.

    Raises:
        UserError: the model cannot be loaded, or there is no such hardware.
    """
    place = place_of(artifact)
    device = device_of(accelerator, spread=spread)
    tokenizer = open_tokenizer(**place._asdict())
    return open_model(place.path, place.revision, device=device), tokenizer


def device_of(accelerator: str, *, spread: bool = False) -> str:
    """The device of ``open_model`` for one of ``trainer.accelerator``'s values.

    Raises:
        UserError: there is no such hardware here.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    there = {"cpu": True, "auto": True, "gpu": cuda or mps, "cuda": cuda, "mps": mps}
    if not there[accelerator]:
        raise UserError(
            f"trainer.accelerator={accelerator}: there is none here; trainer.accelerator=cpu runs "
            "anywhere"
        )
    on_cuda = cuda and accelerator in ("auto", "gpu", "cuda")
    if spread and not on_cuda:
        raise UserError(
            f"evaluation.spread=true spreads the model over GPUs: with trainer.accelerator="
            f"{accelerator} there are none here"
        )
    if on_cuda:
        return "auto" if spread else f"cuda:{torch.cuda.current_device()}"
    return "mps" if mps and accelerator != "cpu" else "cpu"


def identity_of_model(path: str, root: str) -> str:
    """Of a local model what its files hold; of a hub id, the id itself.

    Args:
        path: a folder or a hub id.
        root: of the artifacts.
    """
    files = model_files(path)
    return identity_of(files, root) if files else path


def domain_names(source: Artifact) -> list[str]:
    """The domains of a domains artifact, in order."""
    return list(Domains.read(source.path).names)


def training_rows(
    domains: Artifact,
    names: Sequence[str],
    tokenizer,
    max_length: int,
    *,
    last_only: bool = False,
) -> dict[str, list[EncodedChat]]:
    """{domain: its conversations for adapter training}; a warning says how many do not fit.

    Args:
        domains: of stage ``domains``.
        names: of the domains to read.
        tokenizer, max_length, last_only: as for :func:`steerlora.data.chat.encode_chats`.
    """
    rows = {}
    for name in names:
        turns = read_rows(domains / f"train/{name}.jsonl")
        rows[name] = encode_chats(tokenizer, turns, max_length, last_only=last_only)
    if ranks.is_main():
        warn_of_cuts(rows, max_length)
    return rows


def general_text(domains: Artifact, tokenizer, max_length: int, most: int) -> list[EncodedChat]:
    """Conversations of pretraining text, evenly spaced: ``most``, if there are so many."""
    rows = read_rows(domains / "pretrain.jsonl")
    return encode_chats(tokenizer, evenly_spaced(rows, most), max_length)


def other_general_text(
    domains: Artifact, names: Sequence[str], tokenizer, max_length: int, most: int
) -> list[EncodedChat]:
    """Conversations of pretraining text that are not among :func:`sae_rows`, evenly spaced.

    Raises:
        UserError: those take all of it.
    """
    rows = read_rows(domains / "pretrain.jsonl")
    own = sum(len(read_rows(domains / f"train/{name}.jsonl")) for name in names)
    taken = set(evenly_spaced(range(len(rows)), own // len(names)))
    left = [row for index, row in enumerate(rows) if index not in taken]
    if not left:
        raise UserError(
            f"all {len(rows)} rows of general text are what SAEs learn from, so none is left to "
            "measure on: set domains.pretrain_items to more than domains.train_items"
        )
    return encode_chats(tokenizer, evenly_spaced(left, most), max_length)


def sae_rows(
    domains: Artifact, names: Sequence[str], tokenizer, max_length: int
) -> list[EncodedChat]:
    """What an SAE learns from: the domains' training rows, and as much general text as of one
    domain, so that features cover what adapters must not disturb.

    Args:
        domains, names, tokenizer, max_length: as for :func:`training_rows`.
    """
    found = training_rows(domains, names, tokenizer, max_length)
    rows = list(chain.from_iterable(found.values()))
    return rows + general_text(domains, tokenizer, max_length, len(rows) // len(names))


def train(
    context: Context,
    module: L.LightningModule,
    batches: Callable[[int], Any],
    steps: int,
    log: RunLog,
    **options: Any,
) -> dict[str, float]:
    """Train under the stage's own name, settings and checkpoints.

    Args:
        context: the stage's.
        module: what trains.
        batches: the batch of a step; a pure function of the step.
        steps: optimizer steps in all.
        log: of the stage's run.
        options: of :func:`fit`; they take precedence.

    Returns:
        As :func:`fit`.
    """
    own = {
        "trainer": context.config.trainer,
        "checkpoints": context.directory / CHECKPOINTS,
        "progress": context.progress,
        "description": context.label,
        "identity": context.fingerprint,
        "run_logger": log.lightning(),
    }
    return fit(module, batches, steps, **own | options)


def run_log(context: Context, logger: LoggerConfig) -> AbstractContextManager[RunLog]:
    """The stage's run in Weights & Biases; rank 0 has one, the others log nothing."""
    if not ranks.is_main():
        logger = LoggerConfig(name="none")
    stage, inputs = context.home.parent.name, {}
    for name, value in context.inputs.items():
        several = value if isinstance(value, tuple) else (value,)
        inputs |= {f"{name}[{place}]": one.fingerprint for place, one in enumerate(several)}
    known = {"label": context.label, "config": plain(context.config), "inputs": inputs}
    artifact = Artifact(stage, context.fingerprint, context.home, known)
    id_file = context.directory / CHECKPOINTS / "wandb_run_id"
    return follow(artifact, logger, asked_for=context.asked_for, id_file=id_file)
