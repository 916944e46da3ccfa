"""Time a report and its page on invented records: evaluations, in a store, of as many seeds.

    python scripts/bench_report.py [--evaluations 500] [--items 100]

Run from a checkout: the records are those of the tests.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.artifacts import store_evaluation
from helpers.pages import page_of
from helpers.world import METHODS, World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=int, default=500, help="score artifacts")
    parser.add_argument("--items", type=int, default=100, help="items of a task")
    arguments = parser.parse_args()
    world, methods = World(items=arguments.items), ("lora", "moe_lora", "sc_lora", "o_lora")
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for number in range(arguments.evaluations):
            seed, method = divmod(number, len(methods))
            record = world.evaluation("micro_m", methods[method], seed)
            names.append(store_evaluation(Path(folder), record))
        began = time.perf_counter()
        path, *_ = page_of(Path(folder), names, METHODS)
        seconds = time.perf_counter() - began
        print(f"{len(names)} evaluations: {seconds:.1f} s, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
