"""Who runs in ``bench_adapter.py``: every arrangement on a Qwen3 of the same size and weights.

The first line of each one's docstring is what its row says: the SAE, and which losses are on.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from published_arrangement import PublishedArrangement, Setting
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from steerlora.config import InterventionConfig, TrainerConfig
from steerlora.data.batches import ChatBatch
from steerlora.methods.base import Sources
from steerlora.methods.config import QWEN3_LINEAR
from steerlora.methods.module import MethodModule
from steerlora.methods.monitor import Monitor
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.config import LossWeights, RoutedLoRAConfig
from steerlora.methods.stan.config import StanConfig
from steerlora.methods.stan.units import StanLinear
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.relu import ReLU
from steerlora.saes.taxonomy import Taxonomy
from steerlora.saes.topk import TopK
from steerlora.training.language import next_token_loss

DOMAINS = 5
PUBLISHED_WEIGHTS = LossWeights(
    preservation=1.0,
    steering=1.0,
    gate_sparsity=1e-2,
    rank_budget=1e-3,
    load_balance=1e-2,
    diversity=1e-3,
)


@dataclass(frozen=True)
class Contender:
    """Attributes: step: one whole training step; parameters: that it trains."""

    step: Callable[[], None]
    parameters: int


def make_batch(options: Namespace) -> ChatBatch:
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.length)
    ids = torch.randint(0, options.vocabulary, shape, generator=generator)
    owners = torch.arange(options.batch) % DOMAINS
    return ChatBatch(ids, torch.ones_like(ids), ids.clone(), owners, ids.numel())


def sc_lora(options: Namespace, batch: ChatBatch) -> Contender:
    """TopK, task loss

    One site at 3/8 of the depth, a sparse linear router.
    """
    return _ours(options, batch, sites=[_site(options)])


def sc_lora_all_losses(options: Namespace, batch: ChatBatch) -> Contender:
    """TopK, all seven losses in our form

    At their published weights, with the monitor above the last layer.
    """
    return _ours(
        options, batch, sites=[_site(options)], monitor=options.layers, losses=PUBLISHED_WEIGHTS
    )


def sc_lora_reference(options: Namespace, batch: ChatBatch) -> Contender:
    """TopK, task loss

    The published equations: every layer steered by what it gives out, a perceptron router for every
    module.
    """
    return _reference(options, batch, "topk")


def sc_lora_reference_relu(options: Namespace, batch: ChatBatch) -> Contender:
    """ReLU, task loss"""
    return _reference(options, batch, "relu")


def sc_lora_reference_losses(options: Namespace, batch: ChatBatch) -> Contender:
    """ReLU, all seven losses as published"""
    return _reference(options, batch, "relu", published_losses=True, losses=PUBLISHED_WEIGHTS)


def published(options: Namespace, batch: ChatBatch) -> Contender:
    """TopK, task loss

    The published equations in the published arrangement; without its budget controllers, which
    nothing reads.
    """
    return _published(options, batch, "topk")


def published_relu(options: Namespace, batch: ChatBatch) -> Contender:
    """ReLU, task loss"""
    return _published(options, batch, "relu")


def _published(options: Namespace, batch: ChatBatch, sae: str) -> Contender:
    model = _model(options)
    setting = Setting(specialists=options.specialists, rank=options.rank, alpha=float(options.rank))
    arrangement = PublishedArrangement(model, _saes(options, range(options.layers), sae), setting)

    def loss() -> Tensor:
        arrangement.observe(batch.input_ids, batch.attention_mask)
        return next_token_loss(model, batch)

    return _contender(loss, arrangement.trainable())


def stan(options: Namespace, batch: ChatBatch) -> Contender:
    """no SAE, task loss

    As many units as PEFT's rank, a quarter of which act.
    """
    units = options.specialists * options.rank
    return _stan(options, batch, units=units, k=max(1, units // 4))


def stan_wide_masked(options: Namespace, batch: ChatBatch) -> Contender:
    """no SAE, task loss

    Sixteen times as many units, of which as many act; a product with all of them.
    """
    return _wide_stan(options, batch, gathered=False)


def stan_wide_gathered(options: Namespace, batch: ChatBatch) -> Contender:
    """no SAE, task loss

    The same, with the rows of those that act gathered.
    """
    return _wide_stan(options, batch, gathered=True)


def _wide_stan(options: Namespace, batch: ChatBatch, *, gathered: bool) -> Contender:
    units = options.specialists * options.rank
    return _stan(options, batch, gathered, units=16 * units, k=max(1, units // 4))


def _stan(
    options: Namespace, batch: ChatBatch, gathered: bool | None = None, **settings: int
) -> Contender:
    """Units in the layers that ``sc_lora`` adapts; ``gathered`` None: as their number says."""
    model = _model(options)
    method = StanConfig(sites=[_site(options)], **settings).build(model, Sources(), 0)
    for layer in model.modules() if gathered is not None else ():
        if isinstance(layer, StanLinear):
            layer.gathers = lambda x: gathered
    return _contender(lambda: next_token_loss(model, batch), list(method.parameters()))


def peft_same_layers(options: Namespace, batch: ChatBatch) -> Contender:
    """no SAE, task loss"""
    return _peft(options, batch, range(_site(options), options.layers))


def peft_all_layers(options: Namespace, batch: ChatBatch) -> Contender:
    """no SAE, task loss"""
    return _peft(options, batch, range(options.layers))


Build = Callable[[Namespace, ChatBatch], Contender]
CONTENDERS: dict[str, Build] = {
    build.__name__: build
    for build in (
        sc_lora,
        stan,
        stan_wide_masked,
        stan_wide_gathered,
        peft_same_layers,
        peft_all_layers,
        sc_lora_all_losses,
        sc_lora_reference,
        published,
        sc_lora_reference_relu,
        published_relu,
        sc_lora_reference_losses,
    )
}
SLOW = {name for name in CONTENDERS if "reference" in name or "published" in name}


def said_of(name: str) -> str:
    """What a contender's row says of it."""
    return CONTENDERS[name].__doc__.splitlines()[0]


def _reference(options: Namespace, batch: ChatBatch, sae: str, **settings: Any) -> Contender:
    return _ours(
        options,
        batch,
        sae,
        sites=list(range(options.layers)),
        source="base",
        reads="output",
        router="mlp",
        per_module=True,
        **settings,
    )


def _ours(options: Namespace, batch: ChatBatch, sae: str = "topk", **settings: Any) -> Contender:
    """Specialists that SAE features route, with these settings of the method."""
    model = _model(options)
    config = RoutedLoRAConfig(
        specialists=options.specialists,
        rank=options.rank,
        alpha=float(options.rank),
        **settings,
    )
    adapter = Adapter(model, config, _saes(options, config.sites, sae)).attach(model)
    adapter.taxonomies = dict.fromkeys(config.sites, _taxonomy(options))
    learner = config.learner(
        adapter,
        model=model,
        domains=[str(domain) for domain in range(DOMAINS)],
        pad_token_id=0,
        seed=0,
        intervention=InterventionConfig(),
        monitor=_monitor(model, adapter, options) if config.compares_with_base else None,
    )
    module = MethodModule(learner, trainer=TrainerConfig(), total_steps=1000)
    module.log = module.log_dict = lambda *_, **__: None  # there is no trainer to log to
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    return _contender(lambda: module.training_step(batch, 0), parameters)


def _monitor(model: nn.Module, adapter: Adapter, options: Namespace) -> Monitor:
    """At the stream leaving the last layer."""
    sae = _saes(options, [options.layers])[options.layers]
    return Monitor(model, adapter, sae, options.layers, _taxonomy(options))


def _taxonomy(options: Namespace) -> Taxonomy:
    """As many features of each sort as is usual."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(1 + DOMAINS, options.latents, generator=generator)
    general, domain = draws[0] < 0.3, draws[1:] < 0.2
    unused = torch.zeros(options.latents)
    return Taxonomy(general, domain, draws[1:] * domain, draws[1:], unused)


def _peft(options: Namespace, batch: ChatBatch, layers: Sequence[int]) -> Contender:
    """PEFT's rank is the total rank of our specialists."""
    model = peft_lora(_model(options), options.specialists * options.rank, layers)
    parameters = [p for p in model.parameters() if p.requires_grad]
    base = model.get_base_model()
    return _contender(lambda: next_token_loss(base, batch), parameters)


def peft_lora(
    model: nn.Module, rank: int, layers: Sequence[int], modules: Sequence[str] | None = None
) -> PeftModel:
    """Of a scale of one, on these layers' linear modules, or on those of them that are named."""
    return get_peft_model(
        model,
        LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=list(modules or QWEN3_LINEAR),
            layers_to_transform=list(layers),
        ),
    )


def _contender(loss: Callable[[], Tensor], parameters: list[nn.Parameter]) -> Contender:
    """The same clipping and optimizer for everybody."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, eps=1e-6, weight_decay=0.0, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return Contender(step, sum(p.numel() for p in parameters))


def _model(options: Namespace) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=options.vocabulary,
            hidden_size=options.width,
            intermediate_size=3 * options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=options.width // 64,
            num_key_value_heads=max(1, options.width // 128),
            head_dim=64,
            tie_word_embeddings=True,
        )
    ).eval()


def _site(options: Namespace) -> int:
    return round(options.layers * 3 / 8)


def _saes(
    options: Namespace, sites: Sequence[int], sae: str = "topk"
) -> dict[int, SparseAutoencoder]:
    """{site: an untrained SAE}; of a ReLU one half of the latents are active."""
    shape = (options.width, options.latents)
    if sae == "relu":
        return {site: ReLU(*shape, normalize="layer_norm_input", seed=site) for site in sites}
    return {site: TopK(*shape, k=options.k, seed=site) for site in sites}
