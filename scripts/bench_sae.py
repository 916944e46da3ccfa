"""Time one SAE training step beside its own lower bound and installed libraries.

    python scripts/bench_sae.py                                       # two sizes, a table each
    python scripts/bench_sae.py --json --sizes 4096x512x8192 --k 32   # one object

A step is forward, loss (fraction of variance unexplained), backward, Adam, and, where the contender
has it, the unit-norm constraint of the decoder. All contenders take turns in every repetition, on
the same batch, so that a busy machine slows all of them alike; ratios are per repetition. The
*bound* is what exact TopK needs at least: the encoder's matrix product and ``torch.topk``.
sparsify, dictionary_learning and SAELens join where they are installed.

Memory is the peak of a few steps above parameters and optimizer, each contender in a process of its
own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from typing import NamedTuple

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from steerlora.saes.topk import TopK
from steerlora.saes.training import SAEModule

OURS = "steerlora"


class Size(NamedTuple):
    """Attributes: tokens: of a batch; width: D; latents: N."""

    tokens: int
    width: int
    latents: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


class Contender(NamedTuple):
    """Attributes: step: one whole training step; kept: parameters, and numbers the optimizer keeps
    between steps."""

    step: Callable[[Tensor], None]
    kept: int


def main() -> None:
    options = parse_arguments()
    with redirect_stdout(sys.stderr):  # libraries say things
        found = {str(size): figures(size, options) for size in options.sizes}
    if options.json:
        print(json.dumps(found))
        return
    for size, of_size in found.items():
        report(size, of_size, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=read_size,
        default=[Size(4096, 512, 8192), Size(4096, 1024, 32768)],
        help="tokens x width x latents of each, such as 4096x512x8192",
    )
    parser.add_argument(
        "--contenders", nargs="+", choices=[*CONTENDERS], help="beside ours; default: all there are"
    )
    parser.add_argument("--k", type=int, default=32, help="active latents per token")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object, no tables")
    return parser.parse_args()


def read_size(text: str) -> Size:
    try:
        size = Size(*map(int, text.split("x")))
    except (TypeError, ValueError):
        size = None
    if size is None or min(size) < 1:
        raise argparse.ArgumentTypeError(
            f"'{text}': give tokens x width x latents, such as 4096x512x8192"
        )
    return size


def figures(size: Size, options: argparse.Namespace) -> dict:
    """Milliseconds of our step, its ratio to every other's, and the memory of all."""
    asked = {OURS, *(options.contenders or CONTENDERS)}
    names = [name for name in CONTENDERS if name in asked and (name == OURS or installed(name))]
    # In processes of their own first: this one's memory is then still what it was.
    memory = {name: memory_in_a_process_of_its_own(name, size, options) for name in names}
    made = {name: CONTENDERS[name](size, options) for name in names}
    seconds = measure(made, batch_of(size, options.device), options.repetitions)
    ours = seconds[OURS]
    return {
        "ours_ms": 1e3 * statistics.median(ours),
        "ours_over": {
            name: spread([mine / theirs for mine, theirs in zip(ours, values, strict=True)])
            for name, values in seconds.items()
            if name != OURS
        },
        "memory_mib": {"ours" if name == OURS else name: memory[name] / 2**20 for name in names},
    }


def installed(name: str) -> bool:
    return name == "bound" or importlib.util.find_spec(name) is not None


def batch_of(size: Size, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(size.width, size.width, generator=generator)
    x = torch.randn(size.tokens, size.width, generator=generator) @ mixing
    return (x / size.width**0.5).to(device)


def steerlora(size: Size, options: argparse.Namespace) -> Contender:
    sae = TopK(size.width, size.latents, k=options.k).to(options.device)
    module = SAEModule(sae, total_steps=1)
    optimizer = module.configure_optimizers()["optimizer"]

    def step(x: Tensor) -> None:
        loss, fired = module.losses(x)
        loss.total.backward()
        module.count_idle_tokens(fired, len(x))
        optimizer.step()
        optimizer.zero_grad()
        sae.normalize_decoder()

    return Contender(step, with_adam(sae))


def sparsify(size: Size, options: argparse.Namespace) -> Contender:
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=size.latents, k=options.k)
    sae = SparseCoder(size.width, config, device=options.device)

    def constrain() -> None:
        sae.set_decoder_norm_to_unit_norm()

    return trained(sae, lambda x: sae(x).sae_out, after=constrain)


def dictionary_learning(size: Size, options: argparse.Namespace) -> Contender:
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    sae = AutoEncoderTopK(size.width, size.latents, options.k).to(options.device)
    return trained(sae, sae)


def sae_lens(size: Size, options: argparse.Namespace) -> Contender:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    config = TopKTrainingSAEConfig(
        d_in=size.width, d_sae=size.latents, k=options.k, device=options.device
    )
    sae = TopKTrainingSAE(config)
    return trained(sae, sae)


def bound(size: Size, options: argparse.Namespace) -> Contender:
    weight = torch.randn(size.width, size.latents, device=options.device)
    bias = torch.zeros(size.latents, device=options.device)

    def step(x: Tensor) -> None:
        torch.addmm(bias, x, weight).topk(options.k, dim=1, sorted=False)

    return Contender(step, weight.numel() + bias.numel())


CONTENDERS: dict[str, Callable[[Size, argparse.Namespace], Contender]] = {
    OURS: steerlora,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "sae_lens": sae_lens,
    "bound": bound,
}


def trained(
    sae: nn.Module, reconstruct: Callable[[Tensor], Tensor], after: Callable[[], None] | None = None
) -> Contender:
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)

    def step(x: Tensor) -> None:
        fvu = (x - reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum()
        fvu.backward()
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after()

    return Contender(step, with_adam(sae))


def with_adam(sae: nn.Module) -> int:
    """Parameters, and Adam's two moments of each."""
    return 3 * sum(parameter.numel() for parameter in sae.parameters())


def measure(
    contenders: dict[str, Contender], x: Tensor, repetitions: int
) -> dict[str, list[float]]:
    """Seconds of every repetition; the first, which allocates, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repetition in range(repetitions + 1):
        for name, contender in contenders.items():
            synchronize(x)
            started = time.perf_counter()
            contender.step(x)
            synchronize(x)
            if repetition:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def memory_in_a_process_of_its_own(name: str, size: Size, options: argparse.Namespace) -> int:
    """Bytes: one allocator's leftovers, and the peaks of others, would hide it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(memory_above_kept, name, size, options).result()


def memory_above_kept(name: str, size: Size, options: argparse.Namespace) -> int:
    """Peak bytes of two steps above those of parameters and optimizer."""
    on_gpu = torch.device(options.device).type == "cuda"
    # The code that a first step loads is not memory of a step.
    small = Size(tokens=2, width=8, latents=options.k)
    CONTENDERS[name](small, options).step(batch_of(small, options.device))
    x = batch_of(size, options.device)
    before = torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    contender = CONTENDERS[name](size, options)
    for _ in range(2):
        contender.step(x)
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(0, peak - before - 4 * contender.kept)


def report(size: str, found: dict, options: argparse.Namespace) -> None:
    threads = f"{options.device}, {torch.get_num_threads()} threads"
    table = Table(title=f"One SAE training step: {size}, k {options.k}, {threads}")
    for column in ("contender", "ours over it: median", "min", "max", "memory, MiB"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    memory = found["memory_mib"]
    table.add_row(f"ours, {found['ours_ms']:.1f} ms", "", "", "", f"{memory['ours']:.0f}")
    for name, ratio in found["ours_over"].items():
        ratios = (f"{ratio[key]:.2f}" for key in ("median", "min", "max"))
        table.add_row(name, *ratios, f"{memory[name]:.0f}")
    Console().print(table)


def spread(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


if __name__ == "__main__":
    main()
