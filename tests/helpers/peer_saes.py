"""SAEs written and read by other libraries themselves; run by a Python that has these.

    python peer_saes.py write FOLDER   # one of every kind, and what its library makes of some rows
    python peer_saes.py read FOLDER    # what SAELens makes of the SAEs in FOLDER, of FOLDER's rows

Nothing of this package is imported: the environment is the libraries' own.
T rows, D model width, N latents.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WIDTH, LATENTS, K, LAYER = 6, 20, 3, 8
HOOK = f"blocks.{LAYER}.hook_resid_post"
ROWS, MADE, SAID = "rows.safetensors", "made.safetensors", "said.json"
KNOWN = {"model_name": "gpt2", "hook_name": HOOK, "context_size": 64, "prepend_bos": True}
Run = Callable[[Tensor], tuple[Tensor, Tensor]]
"""[T, D] -> features [T, N], reconstruction [T, D]"""


def write(folder: Path) -> None:
    x = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(9))
    for library in (sae_lens, sparsify, dictionary_learning):
        for name, place, run in library(folder, x):
            features, output = run(x)
            made = {"rows": x, "features": features, "output": output}
            save_file(
                {part: value.detach().float().contiguous() for part, value in made.items()},
                place / MADE,
            )
            print(name)


def read(folder: Path) -> None:
    from sae_lens import SAE

    x = load_file(folder / ROWS)["rows"]
    for config in sorted(folder.glob("*/cfg.json")):
        sae = SAE.load_from_disk(config.parent, device="cpu")
        with torch.no_grad():
            features = sae.encode(x)
            made = {"features": features, "output": sae.decode(features)}
        save_file({part: value.contiguous() for part, value in made.items()}, config.parent / MADE)
        said = {key: value for key, value in sae.cfg.metadata.items() if value is not None}
        (config.parent / SAID).write_text(json.dumps(said))


def shaken(module: nn.Module) -> nn.Module:
    """The module with numbers added to all its weights; what has to be positive stays so."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator))
            if name == "threshold":
                parameter.abs_()
    return module


# SAELens


def sae_lens(folder: Path, x: Tensor) -> Iterator[tuple[str, Path, Run]]:
    import sae_lens as library
    from sae_lens.saes.sae import SAEMetadata, TrainStepInput

    def settings(**more: Any) -> dict[str, Any]:
        return {"d_in": WIDTH, "d_sae": LATENTS, "metadata": SAEMetadata(**KNOWN), **more}

    inference = {
        "standard": ("Standard", {}),
        "standard layer norm": ("Standard", {"normalize_activations": "layer_norm"}),
        "standard constant norm": ("Standard", {"normalize_activations": "constant_norm_rescale"}),
        "standard without b_dec": ("Standard", {"apply_b_dec_to_input": False}),
        "topk": ("TopK", {"k": K}),
        "topk rescaled": ("TopK", {"k": K, "rescale_acts_by_decoder_norm": True}),
        "jumprelu": ("JumpReLU", {}),
        "gated": ("Gated", {}),
    }
    for name, (kind, more) in inference.items():
        config = getattr(library, f"{kind}SAEConfig")(**settings(**more))
        sae = shaken(getattr(library, f"{kind}SAE")(config))
        place = folder / "sae_lens" / name
        sae.save_model(place)
        yield f"sae_lens {name}", place, by_saelens(place)
    training = {
        "trained standard": ("Standard", {"l1_coefficient": 1.0}),
        "trained topk": ("TopK", {"k": K}),
        "trained jumprelu": ("JumpReLU", {}),
        "trained gated": ("Gated", {"l1_coefficient": 1.0}),
        "batchtopk": ("BatchTopK", {"k": K}),
        "matryoshka": ("MatryoshkaBatchTopK", {"k": K, "matryoshka_widths": [5, LATENTS]}),
    }
    for name, (kind, more) in training.items():
        config = getattr(library, f"{kind}TrainingSAEConfig")(**settings(**more))
        sae = shaken(getattr(library, f"{kind}TrainingSAE")(config))
        if "BatchTopK" in kind:  # its threshold follows steps of training
            for step in range(50):
                sae.training_forward_pass(TrainStepInput(x, {}, None, step, False))
        place = folder / "sae_lens" / name
        sae.save_inference_model(place)
        yield f"sae_lens {name}", place, by_saelens(place)


def by_saelens(place: Path) -> Run:
    from sae_lens import SAE

    sae = SAE.load_from_disk(place, device="cpu")

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        features = sae.encode(x)
        return features, sae.decode(features)

    return run


# sparsify


def sparsify(folder: Path, x: Tensor) -> Iterator[tuple[str, Path, Run]]:
    from sparsify import SparseCoder, SparseCoderConfig

    kinds = {
        "sae": {},
        "transcoder": {"transcode": True},
        "skip transcoder": {"transcode": True, "skip_connection": True},
    }
    for name, more in kinds.items():
        config = SparseCoderConfig(num_latents=LATENTS, k=K, **more)
        # A transcoder reads what enters its layer.
        layer = LAYER + 1 if more else LAYER
        place = folder / "sparsify" / name / f"layers.{layer}"
        shaken(SparseCoder(WIDTH, config)).save_to_disk(place)
        coder = SparseCoder.load_from_disk(place)

        def run(x: Tensor, coder: Any = coder) -> tuple[Tensor, Tensor]:
            values, indices, _ = coder.encode(x)
            features = torch.zeros(len(x), LATENTS).scatter(1, indices, values)
            return features, coder(x).sae_out

        yield f"sparsify {name}", place, run


# dictionary_learning


def dictionary_learning(folder: Path, x: Tensor) -> Iterator[tuple[str, Path, Run]]:
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, standard, top_k
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.utils import load_dictionary

    sparse = {"k": K, "warmup_steps": 1}
    kinds = {
        "standard": (standard.StandardTrainer, {}),
        "april": (standard.StandardTrainerAprilUpdate, {}),
        "topk": (top_k.TopKTrainer, sparse),
        "batchtopk": (batch_top_k.BatchTopKTrainer, sparse),
        "matryoshka": (MatryoshkaBatchTopKTrainer, sparse | {"group_fractions": [0.5, 0.5]}),
        "gated": (gdm.GatedSAETrainer, {}),
        "jumprelu": (jumprelu.JumpReluTrainer, {}),
    }
    for name, (kind, more) in kinds.items():
        trainer = kind(
            steps=3000,
            activation_dim=WIDTH,
            dict_size=LATENTS,
            layer=LAYER,
            lm_name="gpt2",
            device="cpu",
            submodule_name=f"resid_post_layer_{LAYER}",
            **more,
        )
        sae = shaken(trainer.ae)
        if hasattr(sae, "k"):  # a threshold that a training has set
            sae.threshold.fill_(0.4)
        place = folder / "dictionary_learning" / name / f"resid_post_layer_{LAYER}" / "trainer_0"
        place.mkdir(parents=True)
        torch.save(sae.state_dict(), place / "ae.pt")
        (place / "config.json").write_text(json.dumps({"trainer": trainer.config}))
        dictionary, _ = load_dictionary(str(place), "cpu")

        def run(x: Tensor, dictionary: Any = dictionary) -> tuple[Tensor, Tensor]:
            features = dictionary.encode(x)
            return features, dictionary.decode(features)

        yield f"dictionary_learning {name}", place, run


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
