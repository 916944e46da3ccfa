"""Null in the section of a model that is given: what suits it takes that place.

Sizes are read from the model's files. Latents, k and the learning rate follow from the width by a
rule. The control site and the context length are measured on the model and the domains' text, and
stored (stage ``model_defaults``). What the user sets stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from omegaconf import DictConfig, OmegaConf

from steerlora.config import Config, ModelConfig
from steerlora.distributed import ranks
from steerlora.errors import UserError

SIZES = ("layers", "width", "heads", "kv_heads", "head_width", "ffn_width", "vocabulary", "tied")
FROM_WIDTH = ("sae_latents", "sae_k", "adapter_learning_rate")
FOLLOWED_BY = {"control_sites": "method.sites", "context_length": "trainer.max_length"}
"""{key of the model that is measured: the key that takes it, unless the user sets that}."""

_sizes: dict[str, dict[str, int | bool]] = {}
"""{place of a model's files: the sizes that they say}, of this process."""
_measured: dict[str, dict[str, Any]] = {}
"""{model and text: what was measured}, of this process."""


def filled(tree: DictConfig, typed: Callable[[DictConfig], Config]) -> DictConfig:
    """The tree with values for what ``model`` has null of.

    Args:
        tree: composed.
        typed: makes a configuration of one that is filled.

    Raises:
        UserError: the model's files cannot be read, or its configuration names no files.
    """
    model = tree.get("model")
    if not isinstance(model, DictConfig):
        return tree
    derived = (*SIZES, *FROM_WIDTH, *FOLLOWED_BY)
    absent = [key for key in derived if key in model and model[key] is None]
    if not absent:
        return tree
    if model.get("path") is None:
        raise UserError(
            f"model.{absent[0]}=null: follows from the files of a model that is given: set "
            f"model.path=<folder, hub id or GGUF file>, or model.{absent[0]}"
        )
    tree = deepcopy(tree)

    def put(values: dict[str, Any]) -> None:
        for key in absent:
            if key in values:
                OmegaConf.update(tree, f"model.{key}", values[key])

    if set(absent) & set(SIZES):
        put(_sizes_of(tree.model))
    from steerlora.lm import suited

    width, layers = tree.model.width, tree.model.layers
    put(
        {
            "sae_latents": suited.latents(width),
            "sae_k": suited.active_latents(width),
            "adapter_learning_rate": suited.adapter_learning_rate(width),
            # Until measured, and for good where nothing follows them.
            "control_sites": [suited.control_site(layers)],
            "context_length": suited.LONGEST,
        }
    )
    unresolved = OmegaConf.to_container(tree, resolve=False)
    followed = [
        key
        for key, taker in FOLLOWED_BY.items()
        if key in absent and _at(unresolved, taker) == f"${{model.{key}}}"
    ]
    if followed:
        facts = _facts(tree, typed)
        put({key: facts[key] for key in followed})
    return tree


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _sizes_of(model: DictConfig) -> dict[str, int | bool]:
    """The sizes that a model's files say; of what they do not, the defaults."""
    from steerlora.lm.gguf import gguf_file, read_gguf_config
    from steerlora.lm.pretrained import read_config, shape_of

    given = {key: model.get(key) for key in ("path", "gguf_file", "revision")}
    key = json.dumps(given)
    if key not in _sizes:
        file = gguf_file(ModelConfig(name="own", **given))
        config = read_gguf_config(file) if file else read_config(given["path"], given["revision"])
        defaults = {name: getattr(ModelConfig, name) for name in SIZES}
        _sizes[key] = defaults | shape_of(config)
    return _sizes[key]


def _facts(tree: DictConfig, typed: Callable[[DictConfig], Config]) -> dict[str, Any]:
    """What stage ``model_defaults`` measured, once for each model and text in a process."""
    from steerlora.engine.artifacts import ArtifactStore
    from steerlora.engine.run import run
    from steerlora.stages import model_defaults

    config = typed(tree)
    key = json.dumps(
        [OmegaConf.to_container(tree[name], resolve=True) for name in ("model", "domains")]
        + [config.artifacts.root, list(config.plugins)]
    )
    if key not in _measured:
        step, store = model_defaults.step(config), ArtifactStore(config.artifacts.root)
        found = store.find(step.stage, step.fingerprint)
        if found is None and ranks.current().world > 1:
            raise UserError(
                f"model.path={config.model.path}: its control site and context length are not "
                "measured yet, which one process does: run stage=model_defaults once without "
                "torchrun or srun, or set model.control_sites and model.context_length"
            )
        if found is None:
            print(f"{config.model.path}: measuring its control site and context length", flush=True)
            found = run([step], store)[step]
        facts = _measured[key] = found.json(model_defaults.FACTS)
        if ranks.is_main():
            fits = ", ".join(
                f"{name} {rows['share_that_fits']:.0%}"
                for name, rows in facts["row_tokens"].items()
            )
            print(
                f"{config.model.path}: control site {facts['control_sites'][0]} of "
                f"{config.model.layers} layers, context length {facts['context_length']} (rows "
                f"that fit: {fits}), {config.model.sae_latents} latents, k {config.model.sae_k}, "
                f"learning rate {config.model.adapter_learning_rate:g}, where they are not set "
                f"(stored: {found.path})",
                flush=True,
            )
    return _measured[key]
