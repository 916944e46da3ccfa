"""Small trainings, to be run by one process or by several ranks: ``trainings.py FOLDER``.

Each leaves its losses, what it trained and a few facts in a folder of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import lightning as L
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from steerlora.config import InterventionConfig, TrainerConfig
from steerlora.config.trainer import ValidationConfig
from steerlora.data.activations import ActivationBatches, ActivationStore
from steerlora.data.batches import ChatBatches, batches_by_length
from steerlora.data.chat import EncodedChat
from steerlora.data.harvest import harvest
from steerlora.distributed import ranks
from steerlora.engine.progress import SilentProgress
from steerlora.lm.signal_tokens import NOT_FIRST
from steerlora.methods.base import Method, SiteSAE, Sources
from steerlora.methods.module import MethodModule
from steerlora.methods.monitor import Monitor
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.config import LossWeights, MemoryConfig, RoutedLoRAConfig
from steerlora.methods.routed_lora.memory import MemoryPolicy
from steerlora.methods.saving import save_adapter
from steerlora.methods.spliced_lora.config import SplicedLoRAConfig
from steerlora.methods.stan.config import StanConfig
from steerlora.saes.batch_topk import BatchTopK
from steerlora.saes.end_to_end.training import EndToEndModule
from steerlora.saes.relu import ReLU
from steerlora.saes.taxonomy import Taxonomy
from steerlora.saes.topk import TopK
from steerlora.saes.training import SAEModule
from steerlora.training.language import PretrainingModule
from steerlora.training.loop import fit
from steerlora.training.validation import Validation

STEPS, BATCH, LATENTS = 8, 4, 64

STRATEGIES = {
    "ddp": {"strategy": "ddp"},
    "zero2": {"strategy": "zero2"},
    "zero3": {"strategy": "zero3", "persistent_elements": 0},
}
ECONOMIES = {
    "offload": {"strategy": "zero2", "offload": True},
    "offload of weights": {"strategy": "zero3", "offload": True, "persistent_elements": 0},
    "persistent": {"strategy": "zero3"},
    "checkpointing": {
        "strategy": "zero3",
        "persistent_elements": 0,
        "activation_checkpointing": True,
    },
}
ONE = {"strategy": "single"}


class Facts(L.Callback):
    """The loss of every part, and how the adapter's weights are held between steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.held: dict[str, Any] = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        named = dict(trainer.callback_metrics)
        self.losses.append(float(named.get("train/loss", named.get("sae/loss", 0))))
        trained = [p for p in module.parameters() if p.requires_grad]
        self.held = {
            "sharded": sum(hasattr(p, "ds_id") and not p.numel() for p in trained),
            "persistent": sum(bool(getattr(p, "ds_persist", False)) for p in trained),
        }
        zero = getattr(trainer.strategy, "zero", None)
        if zero is not None:
            flags = ("cpu_offload", "offload_optimizer")
            self.held["offloaded"] = any(bool(getattr(zero, flag, False)) for flag in flags)


def model(**changes: Any) -> Qwen3ForCausalLM:
    config = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**config | changes)).eval()


def chats() -> ChatBatches:
    """Rows of unlike length and unlike numbers of labels; some of no domain."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(40):
        length = int(torch.randint(3, 9, (1,), generator=generator))
        filler = torch.randint(10, 60, (length,), generator=generator).tolist()
        rows.append(EncodedChat([1 + index % 2, *filler, 5, 6 + index % 2], 1 + index % length))
    owners = [index % 3 - 1 for index in range(40)]
    return ChatBatches(rows, owners, batch_size=BATCH, pad_token_id=0, seed=0)


def adapted(base, **changes: Any) -> Adapter:
    sae = TopK(32, LATENTS, k=5, seed=1)
    config = RoutedLoRAConfig(sites=[1], specialists=4, rank=3, alpha=6.0, top_k=2, **changes)
    adapter = Adapter(base, config, {1: sae}, feature_scales={1: 2.5})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.B.normal_(0, 0.2, generator=generator)
        for parameter in adapter.routers.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapter.attach(base)


def module_of(
    base, adapter: Method, trainer: TrainerConfig, monitor: Monitor | None = None
) -> MethodModule:
    learner = adapter.config.learner(
        adapter,
        model=base,
        domains=("a", "b"),
        pad_token_id=0,
        seed=0,
        intervention=InterventionConfig(),
        monitor=monitor,
    )
    return MethodModule(learner, trainer=trainer, total_steps=STEPS)


def settings(**changes: Any) -> TrainerConfig:
    return TrainerConfig(
        **{"batch_size": BATCH, "learning_rate": 1e-2, "checkpoint_seconds": 1e9} | changes
    )


def train(module, batch, folder: Path, trainer: TrainerConfig, callbacks=()) -> Facts:
    facts = Facts()
    figures = fit(
        module,
        batch,
        STEPS,
        trainer=trainer,
        checkpoints=folder / "checkpoints",
        progress=SilentProgress(),
        description="training",
        callbacks=[facts, *callbacks],
    )
    facts.held["tokens"] = figures["tokens"]
    return facts


def note(folder: Path, facts: Facts, state: dict, **more: Any) -> None:
    """Write what came of a training; rank 0's, as all ranks have the same."""
    if ranks.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {n: t.detach().contiguous() for n, t in state.items()}, folder / "state.safetensors"
        )
        text = json.dumps({"losses": facts.losses, **facts.held, **more})
        (folder / "facts.json").write_text(text)


def adapter_training(folder: Path, trainer: TrainerConfig, **weights: float) -> None:
    """All losses on; the adapter is also exported."""
    base = model()
    on = {"gate_sparsity": 0.5, "rank_budget": 0.25, "diversity": 0.1, "load_balance": 2.0}
    losses = LossWeights(**{**on, "preservation": 3.0, "steering": 5.0, **weights})
    adapter = adapted(base, losses=losses, monitor=3)
    general = torch.arange(LATENTS) % 2 == 0
    domain = torch.stack([~general & (torch.arange(LATENTS) % 3 == d) for d in range(2)])
    prototypes = torch.rand(2, LATENTS, generator=torch.Generator().manual_seed(3)) * domain
    taxonomy = Taxonomy(general, domain, prototypes, prototypes, torch.zeros(LATENTS))
    monitor = Monitor(base, adapter, TopK(32, LATENTS, k=5, seed=7), 3, taxonomy)
    module = module_of(base, adapter, trainer, monitor)
    facts = train(module, chats(), folder, trainer)
    note(folder, facts, adapter.state_dict())
    if ranks.is_main():
        save_adapter(adapter, folder / "adapter", base_fingerprint="x")


def spliced_training(folder: Path, trainer: TrainerConfig) -> None:
    """LoRA of the upper layers and a map, around an SAE."""
    base = model()
    config = SplicedLoRAConfig(sites=[1], rank=3, alpha=6.0, map_rank=4)
    sources = Sources(saes={1: SiteSAE(TopK(32, LATENTS, k=5, seed=1))}, signal_tokens=NOT_FIRST)
    method = config.build(base, sources, 0)
    facts = train(module_of(base, method, trainer), chats(), folder, trainer)
    note(folder, facts, method.state_dict())


def units_training(folder: Path, trainer: TrainerConfig) -> None:
    """Units that are chosen token by token."""
    base = model()
    method = StanConfig(sites=[1], units=24, k=3).build(base, Sources(), 0)
    facts = train(module_of(base, method, trainer), chats(), folder, trainer)
    note(folder, facts, method.state_dict())


def followed_training(folder: Path, trainer: TrainerConfig) -> None:
    """Ends with the weights that suited conversations that are set aside, three batches of them."""
    base = model()
    adapter = adapted(base)
    module = module_of(base, adapter, trainer)
    ids = torch.randint(1, 60, (5, 9), generator=torch.Generator().manual_seed(6)).tolist()
    aside = {"a": [EncodedChat(row[: 5 + index], 2) for index, row in enumerate(ids)]}
    held = {name: [*batches_by_length(rows, 2, 0)] for name, rows in aside.items()}
    asked = ValidationConfig(rows=5, every_steps=2, keep_best=True)
    followed = Validation(held, asked, "training")
    facts = train(module, chats(), folder, trainer, [followed])
    note(folder, facts, adapter.state_dict(), history=followed.history)


def memory_training(folder: Path, trainer: TrainerConfig) -> None:
    """Specialists are spawned and merged on the way: weights and moments are cut up and sewn."""
    base = model()
    adapter = adapted(base, active=3)
    every_two = MemoryConfig(
        every=2,
        spawn_confidence=1.0,
        spawn_similarity=1.0,
        merge_similarity=0.1,
        prune_usage=0.0,
    )
    policy = MemoryPolicy(adapter, every_two, domain="all")
    module = module_of(base, adapter, trainer)
    facts = train(module, chats(), folder, trainer, [policy])
    state = policy.state_dict()
    note(folder, facts, adapter.state_dict(), events=[e["event"] for e in state["events"]])


def pretraining(folder: Path, trainer: TrainerConfig) -> None:
    """Every weight trains, one of them tied."""
    base = model()
    module = PretrainingModule(
        base.train(),
        matrix_learning_rate=0.02,
        learning_rate=3e-3,
        held_out=[chats()(0)],
        target_loss=0.0,
        tolerance=0.03,
        most_steps=STEPS,
    )
    facts = train(module, chats(), folder, trainer)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    note(folder, facts, dict(base.named_parameters()))


def sae_training(folder: Path, trainer: TrainerConfig, architecture: str = "topk") -> None:
    """Some latents die and are revived."""
    source = folder.parent / "activations"
    if ranks.is_main() and not source.exists():
        ids = torch.randint(1, 61, (40, 12), generator=torch.Generator().manual_seed(2))
        harvest(model(), [(ids, torch.ones_like(ids))], {1: source})
    ranks.barrier()
    store = ActivationStore(source)
    sae = {
        "topk": lambda: TopK(32, LATENTS, k=5, auxiliary=0.5),
        "relu": lambda: ReLU(32, LATENTS),
        "batch_topk": lambda: BatchTopK(32, LATENTS, k=5, auxiliary=0.5),
    }[architecture]()
    batches = activations(store)
    sae.center_on(batches(0))
    module = SAEModule(sae, total_steps=STEPS, lr=1e-2, dead_after_tokens=100)
    facts = train(module, batches, folder, trainer)
    note(folder, facts, {**sae.state_dict(), "idle": module.tokens_since_fired})


def end_to_end_training(folder: Path, trainer: TrainerConfig) -> None:
    """Ranks have unlike numbers of tokens; the second of a row passes unreconstructed, too."""

    def replaced(ids, mask):
        return mask.bool() & (torch.arange(ids.shape[1]) > 1)

    sae = BatchTopK(32, LATENTS, k=5, auxiliary=0.0)
    settings = {"total_steps": STEPS, "lr": 1e-2, "replaced": replaced, "mse_weight": 0.5}
    module = EndToEndModule(sae, model(), 1, **settings)
    facts = train(module, chats(), folder, trainer)
    note(folder, facts, {**sae.state_dict(), "idle": module.tokens_since_fired})


def activations(store: ActivationStore):
    return ActivationBatches([store], 40, 0)


def runs(strategies: dict[str, dict]) -> dict[str, tuple]:
    """{name: (training, trainer's settings, further settings)}"""
    found: dict[str, tuple] = {}
    for name, options in strategies.items():
        found[f"adapter {name}"] = (adapter_training, options, {})
        found[f"followed {name}"] = (followed_training, {**options, "learning_rate": 0.03}, {})
        found[f"memory {name}"] = (memory_training, options, {})
        found[f"spliced {name}"] = (spliced_training, options, {})
        found[f"units {name}"] = (units_training, options, {})
        if options["strategy"] in ("single", "ddp"):  # whole on every rank, always
            found[f"base {name}"] = (pretraining, options, {})
            found[f"batch_topk {name}"] = (sae_training, options, {"architecture": "batch_topk"})
            found[f"end_to_end {name}"] = (end_to_end_training, options, {})
        found[f"sae {name}"] = (sae_training, options, {})
        found[f"relu {name}"] = (sae_training, options, {"architecture": "relu"})
        # Of parts that a rank takes in turn, load balance sees one at a time.
        parts = {**options, "accumulate": 2}
        found[f"accumulated {name}"] = (adapter_training, parts, {"load_balance": 0.0})
        autocast = {**options, "precision": "bf16-mixed"}
        found[f"autocast {name}"] = (adapter_training, autocast, {})
    return found


def main(folder: Path) -> None:
    economies = {
        f"adapter {name}": (adapter_training, options, {}) for name, options in ECONOMIES.items()
    }
    for name, (training, options, more) in {**runs(STRATEGIES), **economies}.items():
        training(folder / name, settings(**options), **more)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with ranks.joined({"folder": sys.argv[1], **dataclasses.asdict(settings())}):
        main(Path(sys.argv[1]))
