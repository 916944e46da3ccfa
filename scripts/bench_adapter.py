"""One training step of SC-LoRA beside PEFT LoRA: same model, same batch, same optimizer, one run.

    python scripts/bench_adapter.py            # a table
    python scripts/bench_adapter.py --json     # one object

Contenders take turns, so that a drift of the machine's speed touches all alike; each ratio is of
two neighbouring steps. PEFT's rank is the total rank of our specialists.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import psutil
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from steerlora.config import AdapterConfig, TrainerConfig
from steerlora.data.chat import ChatBatch
from steerlora.models.adapter import Adapter, AdapterShape, total_rank
from steerlora.models.sae import SparseAutoencoder
from steerlora.training.adapter import AdapterModule
from steerlora.training.language import next_token_loss

OURS, SAME, ALL = "sc_lora", "peft_same_layers", "peft_all_layers"


@dataclass(frozen=True)
class Contender:
    """Attributes: step: one whole training step; parameters: that it trains."""

    name: str
    step: Callable[[], None]
    parameters: int


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    batch = _batch(options)
    memory = {build.__name__: _in_a_process_of_its_own(build, options) for build in BUILDERS}
    contenders = [build(options, batch) for build in BUILDERS]
    seconds = _race(contenders, options.warmup, options.repetitions)
    tokens = options.batch * options.length
    result = {
        "setting": vars(options),
        **{
            f"{OURS}_over_{peer}": _spread(
                [a / b for a, b in zip(seconds[OURS], seconds[peer], strict=True)]
            )
            for peer in (SAME, ALL)
        },
        "contenders": {
            contender.name: {
                "step_seconds": _spread(seconds[contender.name]),
                "tokens_per_second": tokens / statistics.median(seconds[contender.name]),
                "peak_memory_bytes": memory[build.__name__],
                "parameters": contender.parameters,
            }
            for contender, build in zip(contenders, BUILDERS, strict=True)
        },
    }
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--latents", type=int, default=2048, help="4 x width, as published")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--specialists", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _model(options: argparse.Namespace) -> Qwen3ForCausalLM:
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


def _batch(options: argparse.Namespace) -> ChatBatch:
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.length)
    ids = torch.randint(0, options.vocabulary, shape, generator=generator)
    owners = torch.zeros(options.batch).long()
    return ChatBatch(ids, torch.ones_like(ids), ids.clone(), owners, ids.numel())


def _site(options: argparse.Namespace) -> int:
    return round(options.layers * 3 / 8)


def _sc_lora(options: argparse.Namespace, batch: ChatBatch) -> Contender:
    model = _model(options)
    shape = AdapterShape(
        routing="sae",
        sites=(_site(options),),
        specialists=options.specialists,
        rank=options.rank,
        alpha=float(options.rank),
    )
    sae = SparseAutoencoder(options.width, options.latents, k=options.k, seed=0)
    adapter = Adapter(model, shape, {_site(options): sae}).attach(model)
    module = AdapterModule(
        model, adapter, config=AdapterConfig(), trainer=TrainerConfig(), total_steps=1000
    )
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    return _contender(OURS, lambda: next_token_loss(module.model, batch), parameters)


def _peft(name: str, layers: list[int], options: argparse.Namespace, batch: ChatBatch) -> Contender:
    rank = total_rank(AdapterShape(specialists=options.specialists, rank=options.rank))
    model = get_peft_model(
        _model(options),
        LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=list(AdapterShape().target_modules),
            layers_to_transform=layers,
        ),
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    base = model.get_base_model()
    return _contender(name, lambda: next_token_loss(base, batch), parameters)


def _peft_same(options: argparse.Namespace, batch: ChatBatch) -> Contender:
    return _peft(SAME, list(range(_site(options), options.layers)), options, batch)


def _peft_all(options: argparse.Namespace, batch: ChatBatch) -> Contender:
    return _peft(ALL, list(range(options.layers)), options, batch)


def _contender(
    name: str, loss: Callable[[], torch.Tensor], parameters: list[torch.nn.Parameter]
) -> Contender:
    """The same loss, clipping and optimizer for everybody."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, eps=1e-6, weight_decay=0.0, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return Contender(name, step, sum(p.numel() for p in parameters))


BUILDERS = (_sc_lora, _peft_same, _peft_all)


def _race(contenders: list[Contender], warmup: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds of every step."""
    for contender in contenders:
        for _ in range(warmup):
            contender.step()
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for repetition in range(repetitions):
        # Who goes first changes, so that no one always runs with the other's caches.
        order = contenders if repetition % 2 else contenders[::-1]
        for contender in order:
            began = time.perf_counter()
            contender.step()
            seconds[contender.name].append(time.perf_counter() - began)
    return seconds


def _in_a_process_of_its_own(
    build: Callable[[argparse.Namespace, ChatBatch], Contender], options: argparse.Namespace
) -> int:
    """What training adds to a process's peak memory: one allocator's leftovers would hide it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_added_memory, build, options).result()


def _added_memory(
    build: Callable[[argparse.Namespace, ChatBatch], Contender], options: argparse.Namespace
) -> int:
    """Peak resident bytes of a few steps, less those of the built model before them."""
    torch.set_num_threads(options.threads)
    contender = build(options, _batch(options))
    before = psutil.Process().memory_info().rss
    for _ in range(options.warmup):
        contender.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _print(result: dict) -> None:
    table = Table(title="one training step")
    for column in ("contender", "ms (median)", "tokens/s", "memory of training, MiB", "parameters"):
        table.add_column(column, justify="right")
    for name, figures in result["contenders"].items():
        table.add_row(
            name,
            f"{1000 * figures['step_seconds']['median']:.1f}",
            f"{figures['tokens_per_second']:,.0f}",
            f"{figures['peak_memory_bytes'] / 2**20:.0f}",
            f"{figures['parameters']:,}",
        )
    console = Console()
    console.print(table)
    for peer in (SAME, ALL):
        spread = result[f"{OURS}_over_{peer}"]
        console.print(
            f"{OURS} over {peer}: {spread['median']:.3f} "
            f"(from {spread['min']:.3f} to {spread['max']:.3f})"
        )


if __name__ == "__main__":
    main()
