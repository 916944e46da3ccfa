"""Text from outside does nothing where it is shown: terminal, rich, Markdown, LaTeX."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.markup import render

from steerlora.text import (
    for_html,
    for_latex,
    for_markdown,
    for_markup,
    for_terminal,
    is_plain_name,
)

HOSTILE = st.text(
    alphabet=st.sampled_from("ab \\`*_[]()<>!/:&;#|~$%^{}\n\r\t\x1b\x9b\x00\u202e\ud800é")
)
"""Strings of the characters that mean something to some reader."""


@given(HOSTILE | st.text())
def test_a_terminal_gets_one_line_of_printable_characters(text):
    shown = for_terminal(text)
    assert shown.isprintable()
    shown.encode()  # half a surrogate pair would fail


@given(HOSTILE | st.text())
def test_html_keeps_the_lines_of_a_text_and_no_other_control_characters(text):
    lines = for_html(text).split("\n")
    assert len(lines) == 1 + text.count("\n")
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("name", ["été", "数学", "a b", "C:\\data", "50 % [40.0, 60.0]"])
def test_what_is_harmless_stays(name):
    assert for_terminal(name) == name


@given(HOSTILE)
def test_rich_shows_the_text_itself(text):
    shown = render(f"[bold]{for_markup(text)}[/bold]!", emoji=False)
    # Of backslashes at the end, rich shows one more or less.
    assert shown.plain.rstrip("!").rstrip("\\") == for_terminal(text).rstrip("!").rstrip("\\")
    assert all(span.style == "bold" for span in shown.spans)


@pytest.mark.parametrize(
    "ending", ["\\", "[bold]\\", "[/]", "[link=file:///]x[/link]", "\\[", "\\[a", ":a:"]
)
def test_rich_prints_any_text_between_texts_of_ours(ending):
    console = Console(file=io.StringIO(), width=200, emoji=False)
    console.print(f"[bold]before {for_markup(ending)}[/bold] after", highlight=False)
    assert console.file.getvalue() == f"before {ending} after\n"


UNESCAPED = re.compile(r"(?<!\\)(?:\\\\)*[`*|~$]")


@given(HOSTILE)
def test_markdown_has_nothing_that_opens_or_ends(text):
    shown = for_markdown(text)
    assert not UNESCAPED.search(shown)
    assert not re.search(r"<[A-Za-z/!?]", shown)
    assert not re.search(r"(?<!\\)(?:\\\\)*\][(\[:]", shown)
    assert not re.search(r"&(?!amp;|lt;)#?\w+;", shown)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sc_lora_context", "sc_lora_context"),
        ("50.0 % [40.0, 60.0]", "50.0 % [40.0, 60.0]"),
        ("p < 0.05 & more", "p < 0.05 & more"),
        ("a|b", "a\\|b"),
        ("a\\|b", "a\\\\\\|b"),
        ("_x_", "\\_x\\_"),
        ("<script>&lt;", "&lt;script>&amp;lt;"),
        ("[a](http://b)", "[a\\](http://b)"),
        ("two\nlines", "two\\\\nlines"),
    ],
)
def test_markdown_of_names(text, shown):
    assert for_markdown(text) == shown


COMMANDS = re.compile(
    r"\\(?:text(?:backslash|asciitilde|asciicircum|less|greater|bar)\{\}|[&%$#_{}])"
    r"|\$(?:-|\\pm|\\Delta|\\le|\\times)\$"
)


@given(HOSTILE)
def test_latex_has_no_command_but_those_of_characters(text):
    shown = for_latex(text)
    assert not re.search(r"[\\$&%#_^~<>|]", COMMANDS.sub("", shown))
    assert not shown.startswith(("[", "*"))
    assert "\n" not in shown


def test_latex_of_names():
    assert for_latex("a\\b_{c}") == r"a\textbackslash{}b\_\{c\}"
    assert for_latex("\\input{x} ± 1") == r"\textbackslash{}input\{x\} $\pm$ 1"
    assert for_latex("[x]") == "{}[x]"


@pytest.mark.parametrize("name", ["law", "law-2", "legal contracts", "法律", "a.b", "..a", "#1"])
def test_plain_names(name):
    assert is_plain_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        " ",
        "a/b",
        "/a",
        "a\\b",
        "a\nb",
        "\x1b[31m",
        "a\0",
        "\u202ea",
        "x" * 201,
        None,
        1,
    ],
)
def test_names_that_are_not_plain(name):
    assert not is_plain_name(name)
