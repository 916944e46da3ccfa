"""One training step of SC-LoRA beside PEFT LoRA and the published arrangement, in one run.

    python scripts/bench_adapter.py                                    # two tables
    python scripts/bench_adapter.py --json                             # one object
    python scripts/bench_adapter.py --contenders sc_lora published     # some of them

Same model, same batch, same optimizer. Contenders take turns in an order drawn anew for every
round, so that a drift of the machine's speed touches all alike; each ratio is of two steps of the
same round. Slow contenders run in every third round only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import psutil
import torch
from bench_contenders import CONTENDERS, SLOW, Contender, make_batch, said_of
from rich.console import Console
from rich.table import Table

SLOW_EVERY = 3


class Target(NamedTuple):
    """What a ratio of two contenders is to be.

    Attributes:
        over, under: contenders; the ratio is of the first to the second.
        most, least: one of them is given.
        of: what is compared, "seconds" of a step or trained "parameters".
    """

    over: str
    under: str
    most: float | None = None
    least: float | None = None
    of: str = "seconds"

    @property
    def name(self) -> str:
        return f"{self.over}_over_{self.under}" + "_parameters" * (self.of == "parameters")

    def __str__(self) -> str:
        return f"at most {self.most}" if self.least is None else f"at least {self.least}"

    def met(self, ratio: float) -> bool:
        return ratio <= self.most if self.least is None else ratio >= self.least


TARGETS = (
    Target("sc_lora", "peft_same_layers", most=1.05),
    Target("sc_lora", "peft_all_layers", most=0.95),
    Target("stan", "peft_same_layers", most=1.05),
    Target("stan_wide_gathered", "stan_wide_masked", most=1.0),
    Target("sc_lora_all_losses", "sc_lora", most=2.2),
    Target("published", "sc_lora_reference", least=1.5),
    Target("published_relu", "sc_lora_reference_relu", least=1),
    Target("published", "sc_lora", least=6),
    Target("published", "sc_lora", least=15, of="parameters"),
)
"""The project's; each is shown where both of its contenders run."""


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    memory = {name: _in_a_process_of_its_own(name, options) for name in options.contenders}
    batch = make_batch(options)
    contenders = {name: CONTENDERS[name](options, batch) for name in options.contenders}
    seconds = _race(contenders, options.warmup, options.repetitions)
    tokens = options.batch * options.length
    targets = [t for t in TARGETS if {t.over, t.under} <= contenders.keys()]
    result = {
        "setting": vars(options),
        **{target.name: _spread(_ratio(target, seconds, contenders)) for target in targets},
        "targets": {target.name: str(target) for target in targets},
        "contenders": {
            name: {
                "what": said_of(name),
                "step_seconds": _spread(list(seconds[name].values())),
                "steps": len(seconds[name]),
                "tokens_per_second": tokens / statistics.median(seconds[name].values()),
                "peak_memory_bytes": memory[name],
                "parameters": contender.parameters,
            }
            for name, contender in contenders.items()
        },
    }
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
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
    parser.add_argument("--repetitions", type=int, default=20, help="rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _race(
    contenders: dict[str, Contender], warmup: int, rounds: int
) -> dict[str, dict[int, float]]:
    """{contender: {round: seconds of its step}}."""
    for contender in contenders.values():
        for _ in range(warmup):
            contender.step()
    draws = random.Random(0)
    seconds: dict[str, dict[int, float]] = {name: {} for name in contenders}
    for number in range(rounds):
        running = [name for name in contenders if number % SLOW_EVERY == 0 or name not in SLOW]
        for name in draws.sample(running, len(running)):
            began = time.perf_counter()
            contenders[name].step()
            seconds[name][number] = time.perf_counter() - began
    return seconds


def _in_a_process_of_its_own(name: str, options: argparse.Namespace) -> int:
    """What training adds to a process's peak memory: one allocator's leftovers would hide it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft", "steerlora.methods.module"])  # once, for all
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_added_memory, name, options).result()


def _added_memory(name: str, options: argparse.Namespace) -> int:
    """Peak resident bytes of a few steps, less those of the built model before them."""
    torch.set_num_threads(options.threads)
    contender = CONTENDERS[name](options, make_batch(options))
    before = psutil.Process().memory_info().rss
    for _ in range(options.warmup):
        contender.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def _ratio(
    target: Target, seconds: dict[str, dict[int, float]], contenders: dict[str, Contender]
) -> list[float]:
    """Of parameters one number; of seconds one for every round in which both ran."""
    if target.of == "parameters":
        return [contenders[target.over].parameters / contenders[target.under].parameters]
    over, under = seconds[target.over], seconds[target.under]
    return [over[number] / under[number] for number in over.keys() & under.keys()]


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _print(result: dict) -> None:
    console = Console()
    table = Table(title="one training step")
    for column in ("contender", "SAE, losses"):
        table.add_column(column, no_wrap=True)
    for column in ("ms (median)", "tokens/s", "memory of training, MiB", "parameters"):
        table.add_column(column, justify="right")
    for name, figures in result["contenders"].items():
        table.add_row(
            name,
            figures["what"],
            f"{1000 * figures['step_seconds']['median']:.1f}",
            f"{figures['tokens_per_second']:,.0f}",
            f"{figures['peak_memory_bytes'] / 2**20:.0f}",
            f"{figures['parameters']:,}",
        )
    console.print(table)
    table = Table(title="one contender over another, round by round")
    for column in ("ratio", "median (range)", "target", "met"):
        table.add_column(column, justify="right")
    for target in TARGETS:
        if spread := result.get(target.name):
            met = "yes" if target.met(spread["median"]) else "no"
            table.add_row(target.name, _in_words(spread), str(target), met)
    console.print(table)


def _in_words(spread: dict[str, float]) -> str:
    if spread["min"] == spread["max"]:
        return f"{spread['median']:.2f}"
    return f"{spread['median']:.3f} ({spread['min']:.2f}-{spread['max']:.2f})"


if __name__ == "__main__":
    main()
