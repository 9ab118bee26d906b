"""What a report is made of, before it is HTML or Markdown: sections of paragraphs, tables, pictures and commands.

    page = Page(title, question, answer, sections=[Section("votes", "The evidence", (Text("..."), Table(...)))])
    render(page, "html"), render(page, "md")

Both forms are written from the same blocks by one template each (templates/page.html.j2, templates/page.md.j2), so that
they cannot say different things. Every string may come from a user or a model: HTML is escaped by Jinja's autoescape,
Markdown by `markdown_text`. The only exceptions are pictures, which plt_eval.report.style draws and labels itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

Form = Literal["html", "md"]
TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Text:
    """A paragraph. A "note" stands apart; a "warning" says what may make the numbers wrong."""

    kind: ClassVar[str] = "text"
    text: str
    tone: Literal["plain", "note", "warning"] = "plain"


@dataclass(frozen=True)
class Items:
    """A list of short lines."""

    kind: ClassVar[str] = "items"
    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table; the first column names its row. `left` are the columns, from 0, that hold words and not numbers."""

    kind: ClassVar[str] = "table"
    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[int] = frozenset({0})
    published: frozenset[int] = frozenset()
    """Rows, from 0, that hold published numbers."""
    cards: bool = False
    """Rows of sentences: on a narrow screen each row is a card, where others scroll sideways."""


@dataclass(frozen=True)
class Picture:
    """A figure: `svg` is drawn by plt_eval.report.style, `alternative` says in words what it shows."""

    kind: ClassVar[str] = "picture"
    svg: str
    alternative: str
    caption: str


@dataclass(frozen=True)
class Commands:
    """Lines for a shell."""

    kind: ClassVar[str] = "commands"
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Folded:
    """Blocks that a reader opens; printed, they are open."""

    kind: ClassVar[str] = "folded"
    title: str
    blocks: tuple[Block, ...]


Block = Text | Items | Table | Picture | Commands | Folded


@dataclass(frozen=True)
class Section:
    """`name` is its anchor."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A report. `facts` are (name, value) lines under the answer; `sure` is False where the answer is that there is not
    enough evidence for one."""

    title: str
    question: str
    answer: str
    sure: bool
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...] = field(default_factory=tuple)
    footer: str = ""


def render(page: Page, form: Form) -> str:
    """The page as one self-contained HTML file, or as Markdown."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=form == "html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(md=markdown_text, table=markdown_table, code=_code)
    text = environment.get_template(f"page.{form}.j2").render(page=page)
    return text if form == "html" else re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def markdown_text(text: str) -> str:
    """`text` on one line, with what Markdown or HTML would read as markup spelled out."""
    flat = " ".join(text.split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    flat = re.sub(r"([\\`*|]|\](?=[(\[:])|!(?=\[))", r"\\\1", flat)
    flat = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", flat)
    flat = re.sub(r"(?i)\bjavascript:", "javascript&#58;", flat)
    return re.sub(r"^(#+|[-+~=]|\d+[.)])(?=\s)", r"\\\1", flat)


def markdown_table(table: Table) -> str:
    """The table as lines of Markdown, under its caption."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(markdown_text(cell) for cell in cells) + " |"

    rule = "| " + " | ".join("---" if at in table.left else "---:" for at in range(len(table.heads))) + " |"
    return "\n".join([markdown_text(table.caption), "", line(table.heads), rule, *map(line, table.rows)])


def _code(lines: Sequence[Any]) -> str:
    """Lines for a fenced block, which no line of them can end."""
    return "\n".join(" ".join(str(line).split()).replace("```", "'''") for line in lines)
