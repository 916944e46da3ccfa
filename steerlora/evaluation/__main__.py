"""lm-eval's own command line, with our model and our tasks known to it.

python -m steerlora.evaluation run --model steerlora \\
    --model_args pretrained=<base>,adapter=<folder>,intervention=shuffle --tasks micro_math \\
    --apply_chat_template --metadata '{"domains_dir": "<domains artifact>"}'
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lm_eval.__main__ import cli_evaluate

from steerlora.errors import UserError
from steerlora.evaluation.harness import TASKS  # its import registers the model
from steerlora.text import for_terminal


def main(arguments: Sequence[str] | None = None) -> None:
    """Run lm-eval; ``--include_path`` is our task folders unless another is given."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    asks_for_help = not arguments or {"-h", "--help"} & set(arguments)
    if not asks_for_help and not any(a.startswith("--include_path") for a in arguments):
        arguments += ["--include_path", str(TASKS)]
    sys.argv = ["steerlora.evaluation", *arguments]
    try:
        cli_evaluate()
    except UserError as error:
        print(for_terminal(f"error: {error}"), file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
