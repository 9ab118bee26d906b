"""The paper's figures 2 to 7 (arXiv 2606.18023), from this project's own diagnoses.

    figure = FIGURES["fig3"]
    data = figure.prepare(selection.diagnoses, selection.name)     # a tidy pandas table; raises NoData
    with drawing():
        canvas = figure.draw(data)                                 # a matplotlib Figure

Each figure is one file with a prepare_ and a draw_ function; draw_ takes prepared rows and nothing else, and draws
into a figure it is given, or a new one. Published numbers have the rows with origin "published"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from plt_eval.report.figures.attention import draw_attention, prepare_attention
from plt_eval.report.figures.common import COLUMNS, Canvas, Diagnoses, NoData
from plt_eval.report.figures.heads import draw_heads, prepare_heads
from plt_eval.report.figures.outputs import draw_outputs, prepare_outputs
from plt_eval.report.figures.scissors import draw_scissors, prepare_scissors
from plt_eval.report.figures.shares import draw_shares, prepare_shares
from plt_eval.report.figures.states import draw_states, prepare_states

__all__ = [
    "COLUMNS",
    "FIGURES",
    "Canvas",
    "Diagnoses",
    "LoopFigure",
    "NoData",
    "draw_attention",
    "draw_heads",
    "draw_outputs",
    "draw_scissors",
    "draw_shares",
    "draw_states",
    "prepare_attention",
    "prepare_heads",
    "prepare_outputs",
    "prepare_scissors",
    "prepare_shares",
    "prepare_states",
]


@dataclass(frozen=True)
class LoopFigure:
    """One figure. `title` says what it shows; `loops` is what `plt-eval diagnose --loops` needs for it."""

    name: str
    title: str
    loops: str
    prepare: Callable[[Diagnoses, str], pd.DataFrame]
    draw: Callable[[pd.DataFrame], Canvas]


_EVERY = (
    LoopFigure("fig2", "states: step size, alignment, rank, fixed-point gap", "1-4", prepare_states, draw_states),
    LoopFigure("fig3", "gain-cost scissors: output shift and offset cost", "1-4", prepare_scissors, draw_scissors),
    LoopFigure("fig4", "similarity of heads by loop", "1-4", prepare_heads, draw_heads),
    LoopFigure("fig5", "attention entropy, re-routing, gate", "1-4", prepare_attention, draw_attention),
    LoopFigure("fig6", "rank of the next token, output shift, output entropy", "1-4", prepare_outputs, draw_outputs),
    LoopFigure("fig7", "each loop's share of refinement", "1-4", prepare_shares, draw_shares),
)
FIGURES = {each.name: each for each in _EVERY}
"""By name: fig2 to fig7, as the paper numbers them."""
