"""lm-eval's own command line, with our model and our tasks known to it.

python -m steerlora.evaluation run --model steerlora \\
    --model_args pretrained=<base>,adapter=<folder>,intervention=shuffle --tasks micro_math \\
    --apply_chat_template --metadata '{"domains_dir": "<domains artifact>"}'
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from lm_eval.__main__ import cli_evaluate

from steerlora.errors import UserError
from steerlora.evaluation.harness import TASKS  # its import registers the model
from steerlora.evaluation.suite import OWN
from steerlora.text import for_terminal


def main(arguments: Sequence[str] | None = None) -> None:
    """Run lm-eval; ``--include_path`` is our task folders unless another is given."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    asks_for_help = not arguments or {"-h", "--help"} & set(arguments)
    if not asks_for_help and not any(a.startswith("--include_path") for a in arguments):
        arguments += ["--include_path", str(TASKS)]
    sys.argv = ["steerlora.evaluation", *arguments]
    try:
        _refuse_what_changes_nothing(arguments)
        cli_evaluate()
    except UserError as error:
        print(for_terminal(f"error: {error}"), file=sys.stderr)
        raise SystemExit(2) from None


def _refuse_what_changes_nothing(arguments: Sequence[str]) -> None:
    """Refuse options that lm-eval would ignore, or mix up, for the domains' own tasks.

    Raises:
        UserError: names the option.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tasks", "-t", nargs="+", default=[])
    parser.add_argument("--num_fewshot", "-f", default="0")
    parser.add_argument("--cache_requests", nargs="?", const="true")
    asked, _ = parser.parse_known_args(list(arguments))
    own = [task for text in asked.tasks for task in text.split(",") if task.startswith(OWN)]
    if own and asked.num_fewshot != "0":
        raise UserError(
            f"--num_fewshot {asked.num_fewshot}: {own[0]} has no examples to show: leave it out, "
            "or ask for other tasks in a run of their own"
        )
    if own and asked.cache_requests in ("true", "refresh"):
        raise UserError(
            f"--cache_requests: lm-eval knows what it kept of {own[0]} by the task's name alone, "
            "and would give it for another domains folder too: leave it out"
        )


if __name__ == "__main__":
    main()
