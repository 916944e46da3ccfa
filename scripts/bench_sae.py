"""Time one SAE training step against dense autograd, its own lower bound, and installed libraries.

    python scripts/bench_sae.py [--json] [--tokens 4096 --width 512 --latents 8192 --k 32]

A step is forward, loss (fraction of variance unexplained), backward, Adam, and, where the contender
has it, the unit-norm constraint of the decoder. All contenders take turns in every repetition, on
the same batch, so that a busy machine slows all of them alike; ratios are per repetition. The
*bound* is what exact TopK needs at least: the encoder's matrix product and ``torch.topk``.
sparsify, dictionary_learning and SAELens join where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from steerlora.saes.topk import TopK
from steerlora.saes.training import SAEModule

Step = Callable[[Tensor], None]


def main() -> None:
    arguments = parse_arguments()
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(arguments.width, arguments.width, generator=generator)
    x = torch.randn(arguments.tokens, arguments.width, generator=generator) @ mixing
    x = (x / arguments.width**0.5).to(arguments.device)
    steps = contenders(arguments)
    seconds = measure(steps, x, arguments.repetitions)
    report(seconds, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a batch")
    parser.add_argument("--width", type=int, default=512, help="D, the model's width")
    parser.add_argument("--latents", type=int, default=8192, help="N")
    parser.add_argument("--k", type=int, default=32, help="active latents per token")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    return parser.parse_args()


def contenders(a: argparse.Namespace) -> dict[str, Step]:
    steps = {"steerlora": ours(a), "dense": dense(a), "bound": bound(a)}
    if importlib.util.find_spec("sparsify"):
        steps["sparsify"] = sparsify(a)
    if importlib.util.find_spec("dictionary_learning"):
        steps["dictionary_learning"] = dictionary_learning(a)
    if importlib.util.find_spec("sae_lens"):
        steps["sae_lens"] = sae_lens(a)
    return steps


def ours(a: argparse.Namespace) -> Step:
    sae = TopK(a.width, a.latents, k=a.k).to(a.device)
    module = SAEModule(sae, total_steps=1)
    optimizer = module.configure_optimizers()["optimizer"]

    def step(x: Tensor) -> None:
        loss, fired = module.losses(x)
        loss.total.backward()
        module.count_idle_tokens(fired, len(x))
        optimizer.step()
        optimizer.zero_grad()
        sae.normalize_decoder()

    return step


def dense(a: argparse.Namespace) -> Step:
    """The same mathematics by plain autograd, with dense latents."""
    sae = TopK(a.width, a.latents, k=a.k).to(a.device)

    def reconstruct(x: Tensor) -> Tensor:
        scores = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        best = scores.topk(a.k, dim=1, sorted=False)
        latents = torch.zeros_like(scores).scatter(1, best.indices, best.values.relu())
        return latents @ F.normalize(sae.W_dec, dim=1) + sae.b_dec

    return training_step(sae, reconstruct, after=sae.normalize_decoder)


def bound(a: argparse.Namespace) -> Step:
    weight = torch.randn(a.width, a.latents, device=a.device)
    bias = torch.zeros(a.latents, device=a.device)

    def step(x: Tensor) -> None:
        torch.addmm(bias, x, weight).topk(a.k, dim=1, sorted=False)

    return step


def sparsify(a: argparse.Namespace) -> Step:
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=a.latents, k=a.k)
    sae = SparseCoder(a.width, config, device=a.device)

    def constrain() -> None:
        sae.set_decoder_norm_to_unit_norm()

    return training_step(sae, lambda x: sae(x).sae_out, after=constrain)


def dictionary_learning(a: argparse.Namespace) -> Step:
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    sae = AutoEncoderTopK(a.width, a.latents, a.k).to(a.device)
    return training_step(sae, sae)


def sae_lens(a: argparse.Namespace) -> Step:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    config = TopKTrainingSAEConfig(d_in=a.width, d_sae=a.latents, k=a.k, device=a.device)
    sae = TopKTrainingSAE(config)
    return training_step(sae, sae)


def training_step(
    sae: nn.Module, reconstruct: Callable[[Tensor], Tensor], after: Callable[[], None] | None = None
) -> Step:
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)

    def step(x: Tensor) -> None:
        fvu = (x - reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum()
        fvu.backward()
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after()

    return step


def measure(steps: dict[str, Step], x: Tensor, repetitions: int) -> dict[str, list[float]]:
    """Seconds of every repetition; the first, which allocates, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(repetitions + 1):
        for name, step in steps.items():
            synchronize(x)
            started = time.perf_counter()
            step(x)
            synchronize(x)
            if repetition:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def report(seconds: dict[str, list[float]], a: argparse.Namespace) -> None:
    rows = {
        name: {
            "milliseconds": 1e3 * statistics.median(values),
            "tokens_per_second": a.tokens / statistics.median(values),
            "over_steerlora": spread(
                [theirs / ours for theirs, ours in zip(values, seconds["steerlora"], strict=True)]
            ),
        }
        for name, values in seconds.items()
    }
    if a.json:
        sizes = {name: getattr(a, name) for name in ("tokens", "width", "latents", "k", "device")}
        print(json.dumps({**sizes, "threads": torch.get_num_threads(), "contenders": rows}))
        return
    sizes = f"{a.tokens} tokens x {a.width} -> {a.latents}, k {a.k}, {a.device}"
    table = Table(title=f"One SAE training step: {sizes}, {torch.get_num_threads()} threads")
    for column in ("contender", "ms (median)", "tokens/s", "time over ours: median", "min", "max"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, row in rows.items():
        ratio = row["over_steerlora"]
        table.add_row(
            name,
            f"{row['milliseconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            *(f"{ratio[key]:.2f}" for key in ("median", "min", "max")),
        )
    Console().print(table)


def spread(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


if __name__ == "__main__":
    main()
