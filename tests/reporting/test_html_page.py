"""Pages of HTML: what is shown is text, what is inside is whole, and nothing is fetched."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re

import pytest
from helpers.pages import HOSTILE, Reader
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import UndefinedError

from steerlora.reporting.html_page import environment, packed, render


def test_text_is_escaped_and_has_no_control_characters():
    page = render("base.html", title=HOSTILE, banner=HOSTILE, parts={})
    plain = render("base.html", title="plain", banner="plain", parts={})
    assert Reader(page).tags == Reader(plain).tags
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert any("<script>alert(1)</script>" in text for text in Reader(page).texts)


def test_nothing_is_fetched_and_no_other_script_runs():
    page = render("base.html", title="a", parts={"rows": packed("x")})
    assert all(address.startswith("data:") for address in Reader(page).loaded)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none';")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}' blob:;" in policy


def test_what_a_template_needs_is_given():
    with pytest.raises(UndefinedError, match="rows"):
        render("report.html", title="a", parts={})


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_packed_text_is_harmless_and_whole(text):
    assert re.fullmatch(r"[A-Za-z0-9+/=]*", packed(text))
    assert gzip.decompress(base64.b64decode(packed(text))).decode() == text
    assert packed(text) == packed(text)


def test_every_template_compiles():
    names = environment().list_templates(extensions=["html"])
    assert "base.html" in names
    for name in names:
        environment().get_template(name)
