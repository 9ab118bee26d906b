"""The look of every figure, and how it becomes bytes: the same data gives the same file, byte for byte.

    with drawing():
        figure = new_figure(7.0, 2.5)
        ...
    save(figure, Path("figure.pdf"))
    html = inline_svg(figure, "fig2", "Step size against loop")

Loop counts and loops are told apart by colour, marker, line and hatch at once, so that a figure survives a grey
printer and colour blindness (colours: Okabe and Ito, jfly.uni-koeln.de/color). Published numbers are always grey, open
and dotted."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

FORMATS = ("pdf", "png", "svg")
DPI = 200

PUBLISHED = "#6e6e6e"
"""The grey of published numbers."""

GAIN, COST = "#0072b2", "#d55e00"
"""What a loop brings, and what it costs."""

MAP = "cividis"
"""Colour map of matrices: even in lightness, so it reads the same in grey."""

_SETTINGS: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same letters
    "mathtext.fontset": "dejavusans",
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.6,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "lines.linewidth": 1.4,
    "lines.markersize": 5.0,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,  # TrueType: fonts are embedded whole glyphs, text can be searched and edited
    "svg.fonttype": "path",
    "svg.hashsalt": "plt-eval",
}


@dataclass(frozen=True)
class Look:
    """How one of several series is drawn."""

    colour: str
    marker: str
    line: Any
    hatch: str


_LOOKS = (
    Look("#000000", "o", "solid", ""),
    Look("#0072b2", "s", (0, (5, 1.5)), "///"),
    Look("#d55e00", "^", (0, (5, 1.5, 1, 1.5)), "..."),
    Look("#009e73", "D", (0, (1.2, 1.2)), "xxx"),
    Look("#cc79a7", "v", (0, (8, 2)), "\\\\"),
    Look("#56b4e9", "P", (0, (3, 1, 1, 1, 1, 1)), "++"),
    Look("#e69f00", "X", (0, (2, 3)), "o"),
)


def look(number: int) -> Look:
    """The look of a loop count or loop, from 1; the same one in every figure. Repeats after seven."""
    return _LOOKS[(number - 1) % len(_LOOKS)]


@contextmanager
def drawing() -> Iterator[None]:
    """Draw and save under these settings, whatever the user's matplotlibrc says; nothing outside changes."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, without pyplot's global state. Call it under drawing()."""
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.06))


def root_figure(figure: Figure | SubFigure) -> Figure:
    """The figure that `figure` is, or is a part of."""
    found = figure.get_figure(root=True) if isinstance(figure, SubFigure) else figure
    assert isinstance(found, Figure)
    return found


# --- bytes --------------------------------------------------------------------------------------------


def to_bytes(figure: Figure, form: str, *, salt: str = "plt-eval") -> bytes:
    """The figure as a file of `form`, one of FORMATS, without dates or versions of programs.

    `salt` names the figure: ids inside an SVG are derived from it. Raises ValueError for another form.
    """
    if form not in FORMATS:
        raise ValueError(f"format {form!r}: expected one of {', '.join(FORMATS)}")
    metadata: dict[str, dict[str, Any]] = {
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
    }
    buffer = io.BytesIO()
    with drawing(), matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format=form, dpi=DPI, metadata=metadata[form])
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write the figure in the format that the name of `path` ends with. Raises OSError, ValueError."""
    path.write_bytes(to_bytes(figure, path.suffix.removeprefix("."), salt=path.stem))


def inline_svg(figure: Figure, name: str, alternative: str) -> str:
    """The figure as an <svg> element for an HTML page. `name` goes in front of every id, so that several figures of one
    page do not share any; `alternative` is what a screen reader says."""
    text = to_bytes(figure, "svg", salt=name).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    label = html.escape(" ".join(alternative.split()), quote=True)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
