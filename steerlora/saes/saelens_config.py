"""SAELens' ``cfg.json``, of version 6 and of earlier ones, as one mapping.

Before version 6 the activation function and its settings were keys of their own beside the
architecture, and what the SAE was made for lay beside its sizes (SAELens,
``loading/pretrained_sae_loaders.py``, ``handle_pre_6_0_config``). A key that is neither understood
nor known to leave the features alone is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from steerlora.errors import UserError
from steerlora.saes.weights import read_object

CONFIG_FILE = "cfg.json"
VERSION = "6.0.0"
"""Version of SAELens whose layout is written: without one, SAELens takes a file for an older."""
SAELENS_NAMES = {"relu": "standard", "skip_transcoder": "topk_skip_transcoder"}
"""{architecture: its name in files}, where it is another: SAELens's, or one that SAELens does not
have, where it means something else by ours (its skip_transcoder has no k)."""


def _keys(names: str) -> frozenset[str]:
    return frozenset(names.split())


_RENAMED = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
"""{what early versions call a key: its later name}."""
_ACTIVATIONS = ("relu", "topk")
_ABOUT = _keys(
    "model_name hook_name hook_layer hook_head_index context_size prepend_bos dataset_path "
    "sae_lens_version sae_lens_training_version neuronpedia_id seqpos_slice "
    "model_from_pretrained_kwargs norm_scaling_factor"
)
"""What an SAE was made for; beside the sizes before version 6, under ``metadata`` since."""
_UNDERSTOOD = _keys(
    "architecture d_in d_sae dtype device apply_b_dec_to_input normalize_activations "
    "reshape_activations rescale_acts_by_decoder_norm metadata"
)
_HARMLESS = _keys(
    "hook_point_layer hook_eval dataset_trust_remote_code streaming is_dataset_tokenized "
    "cached_activations_path use_cached_activations model_class_name model_kwargs expansion_factor "
    "from_pretrained_path store_batch_size store_batch_size_prompts n_batches_in_buffer "
    "train_batch_size train_batch_size_tokens eval_batch_size_prompts n_eval_batches "
    "total_training_tokens training_tokens total_training_steps tokens_per_buffer seed lr lr_end "
    "lr_scheduler_name lr_warm_up_steps lr_decay_steps n_restart_cycles adam_beta1 adam_beta2 "
    "l1_coefficient l1_warm_up_steps lp_norm mse_loss_normalization b_dec_init_method "
    "init_encoder_as_decoder_transpose decoder_heuristic_init decoder_init_norm "
    "decoder_orthogonal_init normalize_sae_decoder scale_sparsity_penalty_by_decoder_norm "
    "noise_scale use_ghost_grads resample_batches feature_sampling_window feature_sampling_method "
    "feature_reinit_scale dead_feature_window dead_feature_estimation_method "
    "dead_feature_threshold finetuning_tokens finetuning_method n_checkpoints checkpoint_path "
    "verbose autocast autocast_lm compile_llm llm_compilation_mode compile_sae "
    "sae_compilation_mode act_store_device log_to_wandb log_activations_store_to_wandb "
    "log_optimizer_state_to_wandb wandb_project wandb_id wandb_entity wandb_log_frequency "
    "eval_every_n_wandb_logs run_name exclude_special_tokens"
)
"""Settings of a training, which decide what was learnt but not how it is read."""


def read_config(directory: Path) -> dict[str, Any]:
    """The configuration of an SAE under version 6's keys; ``metadata`` is always there.

    Raises:
        UserError: there is none, or it is no JSON object, or it describes features that no
            architecture here has.
    """
    path = directory / CONFIG_FILE
    said = read_object(path)
    config = {_RENAMED.get(key, key): value for key, value in said.items()}
    metadata = config.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: metadata should be a JSON object, not {metadata}")
    if _before_version_6(config, metadata, path):
        config.setdefault("architecture", "standard")
    config["metadata"] = {key: config.pop(key) for key in _ABOUT & set(config)} | metadata
    config["metadata"].pop("sae_lens_version", None)  # of the file, not of the SAE
    _read_activation(config, path)
    _read_normalization(config)
    _refuse_other_features(config, path)
    return config


def refuse_unknown_keys(config: dict[str, Any], own: Iterable[str], path: Path) -> None:
    """UserError for a key that may change the features in a way that is not known here.

    Args:
        config: what :func:`read_config` gave.
        own: keys of the SAE's architecture.
        path: of the file, for the message.
    """
    unknown = sorted(set(config) - _UNDERSTOOD - _HARMLESS - set(own))
    if unknown:
        raise UserError(
            f"{path}: {', '.join(unknown)} may change the features, and cannot be read here; "
            "delete what does not"
        )


def _before_version_6(config: dict[str, Any], metadata: dict[str, Any], path: Path) -> bool:
    version = config.get("sae_lens_version") or metadata.get("sae_lens_version")
    if version is None:
        return "metadata" not in config
    major = str(version).partition(".")[0]
    if not major.isdecimal():
        raise UserError(f"{path}: sae_lens_version is {version}: a version such as {VERSION}")
    return int(major) < 6


def _read_activation(config: dict[str, Any], path: Path) -> None:
    """Earlier versions' activation function, as the architecture that has it."""
    activation = config.pop("activation_fn", None)
    settings = config.pop("activation_fn_kwargs", None) or {}
    if activation is None and not settings:
        return
    activation = activation or "relu"
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UserError(f"{path}: cannot read activation_fn '{activation}', only {known}")
    if not isinstance(settings, dict) or set(settings) - {"k"}:
        raise UserError(f"{path}: cannot read activation_fn_kwargs {settings}: only k is known")
    architecture = config.get("architecture")
    if activation == "topk" and architecture == "standard":
        config["architecture"] = architecture = "topk"
    if architecture == "topk" and "k" in settings:
        if config.setdefault("k", settings["k"]) != settings["k"]:
            raise UserError(
                f"{path}: k is {config['k']}, and {settings['k']} in activation_fn_kwargs"
            )
    elif settings:
        raise UserError(f"{path}: k={settings['k']} goes with no {architecture} SAE")
    if activation == "topk" and architecture != "topk":
        raise UserError(f"{path}: activation_fn 'topk' goes with no {architecture} SAE")


def _refuse_other_features(config: dict[str, Any], path: Path) -> None:
    head = config["metadata"].get("hook_head_index")
    if head is not None:
        raise UserError(f"{path}: hook_head_index is {head}: it reads one attention head")
    if config.pop("finetuning_scaling_factor", False):
        raise UserError(f"{path}: finetuning_scaling_factor is set: it scales features by a tensor")
    for key in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if not isinstance(config.get(key, False), bool):
            raise UserError(f"{path}: {key} is {config[key]}: true or false")


def _read_normalization(config: dict[str, Any]) -> None:
    """Early versions have null, or whether activations are scaled by their expected norm."""
    said = config.get("normalize_activations")
    if said is None or said is False:
        config["normalize_activations"] = "none"
    elif said is True:
        config["normalize_activations"] = "expected_average_only_in"
