"""Play another machine on this one: run an experiment under another instruction set, and compare.

    python scripts/another_machine.py --instructions avx2 experiment=micro
    python scripts/another_machine.py --instructions default experiment=micro study.orders=[]
    python scripts/another_machine.py --compare results/micro /elsewhere/results/micro

Overrides are those of ``steerlora``. The second run keeps artifacts of its own, in a folder of the
instruction set's name under ``artifacts.root``: given again, the command resumes. What it reports
is compared with the committed results: every interval of every claim, every verdict, and the tables
(steerlora/reporting/comparison.py says how), into ``comparison.md`` and ``.json`` beside it.

torch, oneDNN and MKL are each told. MKL heeds MKL_ENABLE_INSTRUCTIONS on Intel's processors only;
on others, MKL_CBWR=COMPATIBLE is the setting by which it takes other kernels.

Exit code: 0 where the results agree, 1 where they do not, 2 for a mistake; 75 or 130 where the
experiment was preempted or interrupted, 3 where it failed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from steerlora.cli import compose
from steerlora.engine.machine import supported, this_machine
from steerlora.errors import UserError
from steerlora.reporting.comparison import (
    CLAIMS,
    compare,
    comparison_terminal,
    write_comparison,
)

SETTINGS = {
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
    },
}
"""{instruction set: the environment that has the libraries keep to it}."""
READ_BACK = "import torch; print(torch.backends.cpu.get_cpu_capability())"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment again, unless two results are given, and compare."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        if options.compare:
            first, second = options.compare
            _check_results(first, f"steerlora experiment=... results.dir={first}")
            _check_results(second, f"steerlora experiment=... results.dir={second}")
        else:
            config = compose.load(options.overrides)
            if config.study.name == "single" or config.stage is not None:
                raise UserError("give an experiment and no stage, such as experiment=micro")
            first = options.committed or Path(config.results.dir)
            command = shlex.join(["steerlora", *options.overrides, f"results.dir={first}"])
            _check_results(first, command)
            environment = _environment(options.instructions)
            prefix = f"steerlora-{config.study.name}-{options.instructions}-"
            second = options.out or Path(tempfile.mkdtemp(prefix=prefix))
            root = Path(config.artifacts.root) / options.instructions
            places = [f"artifacts.root={root}", f"results.dir={second}"]
            ended = _run(["-m", "steerlora", *options.overrides, *places], environment)
            if ended:
                return ended if ended in (2, 75, 130) else 3
        compared = compare(first, second)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 150)
    console.print(comparison_terminal(compared))
    for line in (compared.summary, *compared.differences):
        console.print(line, markup=False, highlight=False)
    for path in write_comparison(compared, options.out or second):
        console.print(str(path), markup=False, highlight=False)
    return 1 if compared.differences else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--instructions", choices=SETTINGS, help="run the experiment with these")
    what.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="run nothing")
    parser.add_argument("--committed", type=Path, help="results to compare with: results.dir")
    parser.add_argument("--out", type=Path, help="folder for the second results: a temporary one")
    parser.add_argument("overrides", nargs="*", help="experiment=micro study.orders=[] ...")
    return parser


def _check_results(folder: Path, command: str) -> None:
    if not (folder / CLAIMS).is_file():
        raise UserError(f"{folder} has no {CLAIMS}: {command} writes it")


def _environment(instructions: str) -> dict[str, str]:
    """The environment of a process that keeps to an instruction set.

    Raises:
        UserError: this processor or this torch does not have it.
    """
    had = supported()
    if instructions not in had:
        here = this_machine().processor
        raise UserError(f"--instructions {instructions}: {here} has {', '.join(had)} only")
    environment = {**os.environ, **SETTINGS[instructions]}
    command = [sys.executable, "-c", READ_BACK]
    told = subprocess.run(command, env=environment, capture_output=True, text=True)
    if told.stdout.strip() != instructions.upper():
        answer = told.stdout.strip() or "an error"
        raise UserError(f"--instructions {instructions}: torch answers with {answer}")
    return environment


def _run(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Exit code of a Python process that saves its state when this one is told to end."""
    child = subprocess.Popen([sys.executable, *arguments], env=environment)
    handlers = {
        # The terminal sends Ctrl-C to both.
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: child.terminate()),
    }
    try:
        return child.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    raise SystemExit(main())
