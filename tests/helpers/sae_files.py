"""Files as other libraries write SAEs, and what those libraries make of them, written slowly.

Each follows the library's source: the shapes of its state dict, the keys of its configuration, and
its encode and decode, dense. D model width, N latents.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, LATENTS, K, LAYER = 6, 20, 3, 8
Tensors = dict[str, Tensor]


class Written(NamedTuple):
    """An SAE on disk that reads what leaves layer ``LAYER``, and its arithmetic."""

    tensors: Tensors
    """Under the library's names."""
    weights: str
    """Path of the weights file in a folder of SAEs."""
    config: tuple[str, dict] | None
    """Path and content of the configuration."""
    encode: Callable[[Tensor], Tensor]
    """[T, D] -> [T, N]"""
    decode: Callable[[Tensor, Tensor], Tensor]
    """(features [T, N], x [T, D]) -> [T, D]"""

    def save(self, folder: Path, tensors: Tensors | None = None, **changes) -> Path:
        """Write it, with other tensors or some keys of the configuration changed (null: gone)."""
        file = folder / self.weights
        file.parent.mkdir(parents=True, exist_ok=True)
        held = self.tensors if tensors is None else tensors
        if file.suffix == ".safetensors":
            save_file({name: value.contiguous() for name, value in held.items()}, file)
        elif file.suffix == ".npz":
            np.savez(file, **{name: value.numpy() for name, value in held.items()})
        else:
            torch.save(held, file)
        if self.config:
            path, said = self.config
            said = {key: value for key, value in (said | changes).items() if value is not None}
            (folder / path).write_text(json.dumps(said))
        return folder


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def top_k(scores: Tensor, k: int = K) -> Tensor:
    """The k largest of every row, where they are positive."""
    chosen = scores.topk(k, dim=1).indices
    return torch.zeros_like(scores).scatter(1, chosen, scores.relu().gather(1, chosen))


def linear(encoder: str = "encoder", decoder: str = "decoder") -> Tensors:
    """Of two torch layers: the encoder's weight is [N, D], the decoder's [D, N]."""
    return {
        f"{encoder}.weight": normal(LATENTS, WIDTH),
        f"{encoder}.bias": normal(LATENTS, seed=1),
        f"{decoder}.weight": normal(WIDTH, LATENTS, seed=2),
    }


def sparsify(*, transcode: bool = False, skip: bool = False) -> Written:
    held = linear()
    held["W_dec"] = held.pop("decoder.weight").t()
    held["b_dec"] = normal(WIDTH, seed=3)
    held |= {"W_skip": normal(WIDTH, WIDTH)} if skip else {}
    said = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": LATENTS,
        "k": K,
        "multi_topk": False,
        "skip_connection": skip,
        "transcode": transcode,
        "d_in": WIDTH,
    }

    def encode(x: Tensor) -> Tensor:
        x = x if transcode else x - held["b_dec"]
        return top_k(x @ held["encoder.weight"].t() + held["encoder.bias"])

    def decode(z: Tensor, x: Tensor) -> Tensor:
        y = z @ held["W_dec"] + held["b_dec"]
        return y + x @ held["W_skip"].t() if skip else y

    # A transcoder reads what enters its layer.
    folder = f"layers.{LAYER + 1 if transcode else LAYER}"
    config = (f"{folder}/cfg.json", said)
    return Written(held, f"{folder}/sae.safetensors", config, encode, decode)


def learnt_dictionary(name: str) -> Written:
    """Of dictionary_learning, by ``dict_class``."""
    subtracts, bias = name not in ("AutoEncoderNew", "JumpReluAutoEncoder"), "b_dec"
    if name in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        held = {"W_enc": normal(WIDTH, LATENTS), "W_dec": normal(LATENTS, WIDTH)}
        held["b_enc"] = normal(LATENTS, seed=1)
        into, out, shift = held["W_enc"], held["W_dec"], held["b_enc"]
    else:
        held = linear()
        into, out = held["encoder.weight"].t(), held["decoder.weight"].t()
        shift = held["encoder.bias"]
    names = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}
    bias = names.get(name, "decoder_bias" if name == "GatedAutoEncoder" else "b_dec")
    held[bias] = normal(WIDTH, seed=3)
    if "TopK" in name:
        held |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.4)}
    if name == "MatryoshkaBatchTopKSAE":
        held["group_sizes"] = torch.tensor([LATENTS // 2, LATENTS // 2])
    if name == "JumpReluAutoEncoder":
        held["threshold"] = normal(LATENTS, seed=4)
    if name == "GatedAutoEncoder":
        del held["encoder.bias"]
        held |= {part: normal(LATENTS, seed=ord(part[0])) for part in GATES}
    said = {
        "trainer": {
            "dict_class": name,
            "activation_dim": WIDTH,
            "dict_size": LATENTS,
            "k": K,
            "layer": LAYER,
            "lm_name": "EleutherAI/pythia-70m",
            "submodule_name": f"resid_post_layer_{LAYER}",
        },
        "buffer": {"d_submodule": WIDTH, "io": "out", "ctx_len": 128},
    }
    norm = out.norm(dim=1) if name == "AutoEncoder" else torch.ones(LATENTS)

    def encode(x: Tensor) -> Tensor:
        x = x - held[bias] if subtracts else x
        if name == "GatedAutoEncoder":
            opened = (x @ into + held["gate_bias"]) > 0
            return opened * (held["r_mag"].exp() * (x @ into) + held["mag_bias"]).relu()
        scores = x @ into + shift
        if name == "AutoEncoderTopK":
            return top_k(scores)
        # Loaded, an AutoEncoder's decoder has unit columns, and features make up for it.
        return scores.relu() * (scores > held.get("threshold", 0)) * norm

    def decode(z: Tensor, x: Tensor) -> Tensor:
        return (z / norm) @ out + held[bias]

    folder = f"resid_post_layer_{LAYER}/trainer_0"
    return Written(held, f"{folder}/ae.pt", (f"{folder}/config.json", said), encode, decode)


GATES = ("gate_bias", "mag_bias", "r_mag")


def gemma_scope(weights: str, *, small: bool = False, config: dict | None = None) -> Written:
    """Of Gemma Scope, or in small letters of Gemma Scope 2."""
    held = {
        "W_enc": normal(WIDTH, LATENTS),
        "W_dec": normal(LATENTS, WIDTH),
        "b_enc": normal(LATENTS, seed=1),
        "b_dec": normal(WIDTH, seed=3),
        "threshold": normal(LATENTS, seed=4).abs(),
    }

    def encode(x: Tensor) -> Tensor:
        scores = x @ held["W_enc"] + held["b_enc"]
        return scores.relu() * (scores > held["threshold"])

    def decode(z: Tensor, x: Tensor) -> Tensor:
        return z @ held["W_dec"] + held["b_dec"]

    named = {name.lower() if small else name: value for name, value in held.items()}
    said = (f"{Path(weights).parent}/config.json", config) if config else None
    return Written(named, weights, said, encode, decode)


def llama_scope() -> Written:
    held = linear() | {"decoder.bias": normal(WIDTH, seed=3)}
    norm, threshold = 1.7, 0.3
    scale = WIDTH**0.5 / norm
    said = {
        "d_model": WIDTH,
        "d_sae": LATENTS,
        "jump_relu_threshold": threshold,
        "dataset_average_activation_norm": {"in": norm, "out": norm},
        "hook_point_in": f"blocks.{LAYER}.hook_resid_post",
        "hook_point_out": f"blocks.{LAYER}.hook_resid_post",
    }

    def encode(x: Tensor) -> Tensor:
        scores = scale * x @ held["encoder.weight"].t() + held["encoder.bias"]
        return scores.relu() * (scores > threshold * scale)

    def decode(z: Tensor, x: Tensor) -> Tensor:
        return (z @ held["decoder.weight"].t() + held["decoder.bias"]) / scale

    folder = f"Llama3_1-8B-Base-L{LAYER}R-8x"
    config = (f"{folder}/hyperparams.json", said)
    return Written(held, f"{folder}/checkpoints/final.safetensors", config, encode, decode)


def qwen_scope() -> Written:
    held = {
        "W_enc": normal(LATENTS, WIDTH),
        "W_dec": normal(WIDTH, LATENTS),
        "b_enc": normal(LATENTS, seed=1),
        "b_dec": normal(WIDTH, seed=3),
    }

    def encode(x: Tensor) -> Tensor:
        return top_k(x @ held["W_enc"].t() + held["b_enc"])

    def decode(z: Tensor, x: Tensor) -> Tensor:
        return z @ held["W_dec"].t() + held["b_dec"]

    return Written(held, f"SAE-Res-Some-L0_{K}/layer{LAYER}.sae.pt", None, encode, decode)


CLASSES = (
    *("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE"),
    *("MatryoshkaBatchTopKSAE", "GatedAutoEncoder", "JumpReluAutoEncoder"),
)
GEMMA_2 = {"architecture": "jump_relu", "hf_hook_point_in": f"model.layers.{LAYER}.output"}
WRITTEN: dict[str, Written] = {
    "sparsify": sparsify(),
    "sparsify transcoder": sparsify(transcode=True),
    "sparsify skip-transcoder": sparsify(transcode=True, skip=True),
    **{name: learnt_dictionary(name) for name in CLASSES},
    "Gemma Scope": gemma_scope(f"layer_{LAYER}/width_16k/average_l0_71/params.npz"),
    "Gemma Scope 2": gemma_scope(
        f"resid_post/layer_{LAYER}_width_16k_l0_small/params.safetensors",
        small=True,
        config=GEMMA_2,
    ),
    "Gemma Scope 2 without config": gemma_scope(
        f"resid_post/layer_{LAYER}_width_16k_l0_big/params.safetensors", small=True
    ),
    "Llama Scope": llama_scope(),
    "Qwen-Scope": qwen_scope(),
}
"""Every format and variant that is read beside SAELens's."""
