"""Pages of HTML that are one file each: styles, scripts and data lie inside, nothing is fetched.

Templates are in ``templates/``; a page extends ``base.html``. All text is escaped by jinja2, and a
content security policy in the page keeps a browser from asking anything of anyone, and from running
a script that is not the page's own.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from steerlora.text import for_html

SCRIPT = "page.js"
"""The script of all pages: unpacks libraries and data, and hands tables and charts to them."""


def render(
    template: str, *, title: str, banner: str = "", parts: Mapping[str, str], **content: Any
) -> str:
    """A page, from a template of ``templates/`` and what it shows.

    Args:
        title, banner: above everything else; an empty banner is none.
        parts: {name: what `packed` made of it}. Libraries, rows and charts have the names that
            ``page.js`` knows them by.
        content: what else the template shows; text is escaped.
    """
    script = _template_text(SCRIPT)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        environment()
        .get_template(template)
        .render(
            script=Markup(script),
            style=Markup(_template_text("style.css")),
            script_digest=digest,
            title=title,
            banner=banner,
            parts=parts,
            **content,
        )
    )


def render_part(template: str, **content: Any) -> str:
    """A piece of a page, such as what a dialog shows: no head, no script."""
    return environment().get_template(template).render(**content)


@cache
def environment() -> Environment:
    """Where templates are found, and how what is put into them is made harmless."""
    return Environment(
        loader=PackageLoader("steerlora.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: for_html(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def packed(content: str | Any) -> str:
    """Text, or what JSON can say, compressed: a fifth of its size, and harmless as it stands.

    Of the same content the same bytes. ``page.js`` unpacks it.
    """
    text = content if isinstance(content, str) else json.dumps(content, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def data_url(svg: str) -> str:
    """A drawing as the address of an image: a script in it would not run."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


@cache
def tables_library() -> dict[str, str]:
    """DataTables, which sorts, searches and filters: {"js" and "css": packed}.

    itables ships it as one module and one style sheet, without anything to fetch.
    """
    folder = resources.files("itables") / "html"
    return {
        kind: packed((folder / f"dt_bundle.{kind}").read_text(encoding="utf-8"))
        for kind in ("js", "css")
    }


def _template_text(name: str) -> str:
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")
