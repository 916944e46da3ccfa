from __future__ import annotations

from steerlora.data.chat import EncodedChat
from steerlora.data.cuts import Cuts, cuts_of, warn_of_cuts

WHOLE = EncodedChat([1, 2, 3], 1)
ROWS = [
    WHOLE,
    WHOLE._replace(response_cut=True),
    WHOLE._replace(prompt_cut=True, response_cut=True),
]


def test_what_did_not_fit_is_counted():
    assert cuts_of(ROWS) == Cuts(prompts=1, responses=2)


def test_what_did_not_fit_is_said_in_one_line(caplog):
    warn_of_cuts({"law": ROWS, "math": [WHOLE]}, 3)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    said = record.getMessage()
    assert said.startswith("trainer.max_length=3: ")
    assert said.endswith("law 2 and 1 of 3")


def test_nothing_is_said_where_everything_fits(caplog):
    warn_of_cuts({"law": [WHOLE], "math": []}, 3)
    assert not caplog.records
