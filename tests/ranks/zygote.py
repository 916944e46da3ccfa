"""``python -m steerlora``, or a script, in a moment: a process that has imported and composed what
takes long, and forks.

Standard input takes a JSON line per request, standard output answers each with another:
{"script", "arguments", "environment", "folder", "out", "err", "first", "slow_end"} starts one and
gives its number; {"poll": number} gives its exit code as subprocess has it, or null while it runs.
Without a ``script`` it is ``steerlora``. ``first``, where it is given, is one that the process runs
before, as an interpreter runs sitecustomize. With ``slow_end``, and after a ``script``, it ends as
an interpreter does.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import threading

from hydra._internal.hydra import Hydra
from runs import TINY, TRAININGS

from steerlora.cli import compose
from steerlora.engine.steps import STAGES

SLOW = ("deepspeed", "steerlora.cli.experiment", "steerlora.distributed.group")


def serve() -> dict | None:
    """Answer requests; returns one in each process that is to run it, None in the last of all."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            number, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if number else None
        else:
            answer = os.fork()
            if not answer:
                return request
        print(json.dumps(answer), flush=True)
    return None


def become(request: dict) -> None:
    """Take the place of a process that was started with these arguments."""
    os.setsid()
    # A background job of a shell ignores the interrupt, and so would what it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY),
        (2, request["err"], os.O_WRONLY),
    ):
        os.dup2(os.open(path, flags), descriptor)
    sys.argv = [request["script"] or "steerlora", *request["arguments"]]
    if request["first"]:
        runpy.run_path(request["first"])


def work() -> int:
    """Run ``steerlora``; gives its exit code. What it raises ends it as it would any."""
    try:
        runpy.run_module("steerlora", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if isinstance(ended.code, str):  # which Python prints
            raise
        return ended.code or 0
    return 0


def end(code: int) -> None:
    """As multiprocessing ends what it forked: an interpreter would take apart all that was ever
    imported, and copy the memory page by page that it shares with the others."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


for name in SLOW:
    importlib.import_module(name)
STAGES.items()  # which imports every stage
for stage in TRAININGS:
    compose.load([*TINY, f"stage={stage}"])
# Hydra would compose everything once more to read hydra.mode, which nothing sets.
Hydra.get_mode = lambda *_, **__: None
gc.freeze()  # at their ends the processes need not look through all of it
asked = serve()
if asked is not None:
    become(asked)
    if asked["script"]:
        runpy.run_path(asked["script"], run_name="__main__")
    else:
        code = work()
        if not asked["slow_end"]:
            end(code)
        raise SystemExit(code)
