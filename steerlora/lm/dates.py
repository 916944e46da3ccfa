"""The day that a chat template takes for today."""

from __future__ import annotations

import json
import re
from datetime import date
from typing import Any

from steerlora.errors import UserError

_CLOCK = "strftime_now("
_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def pin_date(tokenizer: Any, day: str) -> None:
    """Have the tokenizer's chat template print ``day`` wherever it asks transformers for today.

    Templates ask by ``strftime_now(format)``, and transformers takes no other clock from its caller
    (5.23 turns functions that are passed to a template into text). So the calls are replaced by
    what they would print on the day.

    Args:
        tokenizer: its template is changed, each of them where it has several.
        day: as year-month-day.

    Raises:
        UserError: a template asks with a format that it computes.
    """
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: _pinned(text, day) for name, text in templates.items()}
    elif templates:
        tokenizer.chat_template = _pinned(templates, day)


def _pinned(template: str, day: str) -> str:
    today = date.fromisoformat(day)
    pinned = _CALL.sub(lambda call: json.dumps(today.strftime(call[2])), template)
    if _CLOCK in pinned:
        raise UserError(
            "the model's chat template prints today's date in a way that cannot be pinned to "
            f"model.date={day}: have it call strftime_now with a format in quotes"
        )
    return pinned
