"""Text that came from outside, made harmless for what shows it: names, rows, others' messages.

Outside is whatever a user, a file or another process wrote: names of runs and domains, keys of
rows, what a stored artifact says of itself. It is cleaned where it leaves, not where it enters, so
that files and look-ups keep it as it is. Each function is for one reader, and is applied once.
"""

from __future__ import annotations

import re

from rich.markup import escape


def for_terminal(text: object) -> str:
    """One line without control characters, for ``print`` and for rich with ``markup=False``.

    What Unicode does not count as printable is written as Python's escape of it: a terminal would
    obey an escape code, a line break would make a second line, and marks of direction reorder the
    first. Words in all scripts stay as they are.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )


_BRACKET = re.compile(r"\\(?=\[(?![a-z#/@][^\[]*\]))")
"""A backslash before a bracket that begins no tag."""


def for_markup(text: object) -> str:
    """`for_terminal` where rich reads markup: titles and cells of its tables, ``console.print``.

    Of a console with ``emoji=False``: rich has no escape for ``:name:``.
    """
    # rich shows \[ as a bracket alone even where no tag begins; its own escape sees to tags.
    return escape(_BRACKET.sub(r"\\\\", for_terminal(text)))


NAME_BYTES = 200
"""Most bytes of a plain name: file systems take 255, and names get endings."""


def is_plain_name(text: object) -> bool:
    """Whether a text can be part of a file's name: not empty, nothing but printable characters, no
    separator of paths, not dots alone."""
    return (
        isinstance(text, str)
        and 0 < len(text.encode(errors="replace")) <= NAME_BYTES
        and text.isprintable()
        and not set(text) & {"/", "\\"}
        and bool(text.strip(". "))
    )


_MARKDOWN = re.compile(
    r"(?P<escaped>[\\`*|~$])"
    r"|(?P<underscore>(?<!\w)_|_(?!\w))"  # within a word it is no emphasis
    r"|(?P<link>\](?=[(\[:]))"
    r"|(?P<tag><(?=[A-Za-z/!?]))"
    r"|(?P<entity>&(?=#?\w+;))"
)


def for_markdown(text: object) -> str:
    """One line of a paragraph, a heading or a cell of a table in GitHub's Markdown.

    No emphasis, code, formula, link, tag or end of a cell begins in it. Brackets around an interval
    and underscores within a name stay as they are.
    """

    def harmless(found: re.Match) -> str:
        named = {"tag": "&lt;", "entity": "&amp;"}
        return named.get(found.lastgroup, f"\\{found[0]}")

    return _MARKDOWN.sub(harmless, for_terminal(text))


_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    | {"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}"}
    | {"±": "$\\pm$", "−": "$-$", "–": "--", "Δ": "$\\Delta$", "≤": "$\\le$", "×": "$\\times$"}
)


def for_latex(text: object) -> str:
    """One line of LaTeX's text mode that holds no command, with the few symbols used here."""
    cleaned = for_terminal(text).translate(_LATEX)
    # After the \\ that ends a row, a bracket or a star would be that command's argument.
    return f"{{}}{cleaned}" if cleaned.startswith(("[", "*")) else cleaned


def for_html(text: object) -> str:
    """Text of a page of HTML, not escaped yet: line breaks stay, other control characters and marks
    of direction are written as `for_terminal` writes them."""
    return "\n".join(map(for_terminal, str(text).split("\n")))
