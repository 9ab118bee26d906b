"""The lenses: what one measurement says for or against one extra loop.

    context = Context(loops=4, trained=4, shifts=True, offset_variant="normed")
    for lens in LENSES:
        for loop in (2, 3, 4):
            lens.vote(Samples(rows), loop, context)      # None where the model has no such thing to measure

A lens sets one number of loop r against one line: a mean against 0, a ratio of two loops against 1, a share against an
even share. No line is a constant of some family of models, and no number has a unit that a line would have to know. The
vote is cast only if the number's 95% interval lies wholly on one side of the line. docs/recommendation.md says why each
lens reads what it reads, and what it cannot see; plt_diagnostics.recommend puts the votes together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from plt_diagnostics.bootstrap import MIN_SAMPLES, Estimate, Floats
from plt_diagnostics.synthesis import Cell

Stance = Literal["for", "against", "abstains"]
Mechanism = Literal["refinement", "prediction", "stability", "cost"]


class Evidence(Protocol):
    """What the lenses read: sample-level numbers of one model. synthesis.Samples is one, Published another."""

    @property
    def count(self) -> int | None:
        """Samples, None where unknown."""

    @property
    def loops(self) -> int:
        """R."""

    def __contains__(self, cell: Cell) -> bool: ...

    def nonfinite(self, cells: Iterable[Cell]) -> int: ...

    def estimate(self, cells: Sequence[Cell], function: Callable[[Floats], Floats]) -> Estimate: ...


class Published:
    """A table of means without the samples behind them, as papers print it: every vote is by value only."""

    def __init__(self, values: Mapping[tuple[str, str, int], float], *, samples: int | None = None) -> None:
        """`values` by (measurement, variant, loop). Shares do where only shares were published: lenses compare the
        loops of one measurement, or two measurements' changes."""
        self._values = {Cell(*key): float(value) for key, value in values.items()}
        self.count = samples

    @property
    def loops(self) -> int:
        return max((cell.loop for cell in self._values), default=0)

    def __contains__(self, cell: Cell) -> bool:
        return cell in self._values

    def nonfinite(self, cells: Iterable[Cell]) -> int:
        return sum(not np.isfinite(self._values[cell]) for cell in cells)

    def estimate(self, cells: Sequence[Cell], function: Callable[[Floats], Floats]) -> Estimate:
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(function(np.array([self._values[cell] for cell in cells])))
        return Estimate(value if np.isfinite(value) else None, None, None, self.count or 0)


@dataclass(frozen=True)
class Context:
    """What the lenses must know of the model. `loops` is R; `trained` the loop whose state the output head was trained
    to read; `shifts` whether a loop reads the state of the token before; `offset_variant` which state that is, raw or
    normed."""

    loops: int
    trained: int
    shifts: bool
    offset_variant: str


class Vote(BaseModel):
    """What one lens says about one extra loop.

    `value` [`low`, `high`] is the number in the words of `quantity`, `line` what it is held against, `above` and
    `below` what the vote is on either side of it, `n` the samples. Without an interval the vote is `by_value`. `margin`
    is how far the value is from the line: in half-widths of the interval on that side (below 1 the interval holds the
    line, and the lens abstains); by value, as a part of |value| + |line|. None: the interval has no width. A vote
    without a number has no line either: the lens had nothing to measure, and `reason` says why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lens: str
    mechanism: Mechanism
    loop: int
    stance: Stance
    quantity: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    line: float | None = None
    above: Stance = "abstains"
    below: Stance = "abstains"
    by_value: bool = False
    n: int = 0
    margin: float | None = None
    meaning: str
    """What the number says, in words alone."""
    reason: str
    """The same with the number behind it."""


@dataclass(frozen=True)
class _Test:
    """One number against one line, with what it means on either side of it."""

    quantity: str
    cells: tuple[Cell, ...]
    function: Callable[[Floats], Floats]
    line: float
    above: tuple[Stance, str]
    below: tuple[Stance, str]
    digits: str = ".2f"


@dataclass(frozen=True)
class Lens:
    """`name` for tables, `question` that it answers, `equation` of its number and line, and the `mechanism` that it
    bears on. `test` gives what to compare at loop r, a reason why there is nothing to compare, or None where the model
    has no such thing."""

    name: str
    mechanism: Mechanism
    question: str
    equation: str
    test: Callable[[int, Context], _Test | str | None]

    def vote(self, evidence: Evidence, loop: int, context: Context) -> Vote | None:
        """The vote about loop r >= 2; None where there is no such cost or gain in the model."""
        test = self.test(loop, context)
        if test is None:
            return None
        if isinstance(test, str):
            return self._abstain(loop, self.question, test)
        problem = _problem(evidence, test.cells)
        if problem is not None:
            return self._abstain(loop, test.quantity, problem)
        return self._judge(test, loop, evidence.estimate(test.cells, test.function), evidence)

    def _abstain(self, loop: int, quantity: str, reason: str) -> Vote:
        return Vote(
            lens=self.name,
            mechanism=self.mechanism,
            loop=loop,
            stance="abstains",
            quantity=quantity,
            meaning=reason,
            reason=reason,
        )

    def _judge(self, test: _Test, loop: int, found: Estimate, evidence: Evidence) -> Vote:
        by_value = isinstance(evidence, Published)
        if found.value is None:
            return self._abstain(loop, test.quantity, "not defined: no finite values, or none but zeros")
        if found.low is None and not by_value:
            why = f"{found.n} samples, fewer than the {MIN_SAMPLES} of an interval"
            return self._abstain(
                loop, test.quantity, why if found.n < MIN_SAMPLES else "no interval: zeros among means"
            )
        stance, meaning = _side(test, found)
        return Vote(
            lens=self.name,
            mechanism=self.mechanism,
            loop=loop,
            stance=stance,
            quantity=test.quantity,
            value=found.value,
            low=found.low,
            high=found.high,
            line=test.line,
            above=test.above[0],
            below=test.below[0],
            by_value=by_value,
            n=found.n,
            margin=_margin(found, test.line),
            meaning=meaning,
            reason=f"{meaning} ({_number(test, found)})",
        )


def _problem(evidence: Evidence, cells: Sequence[Cell]) -> str | None:
    """Why these cells cannot be read, if so."""
    missing = sorted({cell.loop for cell in cells if cell not in evidence})
    if missing:
        loops = ", ".join(map(str, missing))
        return f"{cells[0].measurement} was not measured at loop{'s' if len(missing) > 1 else ''} {loops}"
    wrong = evidence.nonfinite(cells)
    return f"{wrong:,} values of these loops are not finite: nothing read from them counts" if wrong else None


def _side(test: _Test, found: Estimate) -> tuple[Stance, str]:
    value = found.value
    assert value is not None
    low, high = (value, value) if found.low is None or found.high is None else (found.low, found.high)
    if low > test.line:
        return test.above
    if high < test.line:
        return test.below
    return "abstains", "no telling which side of the line it is on"


def _margin(found: Estimate, line: float) -> float | None:
    assert found.value is not None
    distance = abs(found.value - line)
    if found.low is None or found.high is None:
        scale = abs(found.value) + abs(line)
    else:
        scale = found.value - found.low if found.value > line else found.high - found.value
    if scale > 0:
        return distance / scale
    return None if distance > 0 else 0.0  # an interval without width: nothing that was seen would flip it


def _number(test: _Test, found: Estimate) -> str:
    """As in "43% [41%, 45%], line 50%"."""
    assert found.value is not None
    body = format(found.value, test.digits)
    if found.low is not None and found.high is not None:
        body += f" [{found.low:{test.digits}}, {found.high:{test.digits}}]"
    return f"{body}, line {test.line:{test.digits}}" + ("; by value only" if found.low is None else "")


# --- kinds of comparison -----------------------------------------------------------------------------------

_FIRST = ", which says nothing against it: later loops stand on it"


def _share_lens(
    name: str, question: str, does: str, of: str, measurement: str, variant: str = "", *, through_head: bool
) -> Lens:
    """Loop r's part of a sum over extra loops, against an even part. `does` and `of` are words: what the loop does, and
    what the share is of. `through_head`: read through the output head, which favours the loop it was trained on."""

    def test(loop: int, context: Context) -> _Test | str:
        favoured = through_head and loop >= context.trained
        among = _fair_peers(context, through_head=through_head) if loop == 2 else list(range(2, loop + 1))
        if len(among) < 2 or (loop == 2 and favoured):
            return "no other extra loop that it could fairly be compared with"
        at, others = among.index(loop), "an even share" if loop == 2 else "the extra loops before it on average"
        more = f"loop {loop} {does} more than {others}"
        less = f"loop {loop} {does} less than {others}"
        return _Test(
            quantity=f"loop {loop}'s share of {of} over loops {among[0]} to {among[-1]}",
            cells=tuple(Cell(measurement, variant, each) for each in among),
            function=lambda mean: mean[..., at] / mean.sum(axis=-1),
            line=1 / len(among),
            above=("abstains", more + _doubt(loop, context)) if favoured else ("for", more),
            below=("abstains", less + _FIRST) if loop == 2 else ("against", less),
            digits=".0%",
        )

    equation = (
        f"{measurement}(r) / sum of {measurement}(k) against an even share; k = 2..r, or all extra loops for r = 2"
    )
    return Lens(name, "refinement", question, equation, test)


def _doubt(loop: int, context: Context) -> str:
    """Why a change seen through the output head is no gain at this loop."""
    if loop > context.trained:
        return f"; but the model was trained at {context.trained} loops: a change past them need be no gain"
    return "; but the output head was trained on this loop, which alone can make it so"


def _fair_peers(context: Context, *, through_head: bool) -> list[int]:
    """The loops that loop 2 is compared with, itself among them: all extra ones, or through the output head those
    before the trained loop, if there are two."""
    everyone = list(range(2, context.loops + 1))
    untrained = [loop for loop in everyone if loop < context.trained]
    return untrained if through_head and len(untrained) > 1 else everyone


def _prediction_lens(name: str, measurement: str, variant: str, unit: str) -> Lens:
    """The true next token, read through the output head: paired difference from the loop before, against 0."""

    def test(loop: int, context: Context) -> _Test:
        nearer = f"loop {loop} brings the true next token nearer"
        return _Test(
            quantity=f"{unit} of the true next token, loop {loop} less loop {loop - 1}",
            cells=(Cell(measurement, variant, loop), Cell(measurement, variant, loop - 1)),
            function=lambda mean: mean[..., 0] - mean[..., 1],
            line=0.0,
            above=("against", f"loop {loop} moves away from the true next token"),
            below=("abstains", nearer + _doubt(loop, context)) if loop == context.trained else ("for", nearer),
            digits="+.3f",
        )

    return Lens(
        name, "prediction", "does the true next token come nearer?", f"{measurement}(r) - (r-1) against 0", test
    )


def _ratio_test(
    measurement: str, variant: str, loop: int, above: tuple[Stance, str], below: tuple[Stance, str]
) -> _Test:
    """Of a positive measurement at loop r and r-1, against 1."""
    return _Test(
        quantity=f"{measurement} of loop {loop} as a multiple of loop {loop - 1}'s",
        cells=(Cell(measurement, variant, loop), Cell(measurement, variant, loop - 1)),
        function=lambda mean: mean[..., 0] / mean[..., 1],
        line=1.0,
        above=above,
        below=below,
        digits=".3f",
    )


def _effective_rank(loop: int, _: Context) -> _Test:
    return _ratio_test(
        "effective_rank",
        "normed",
        loop,
        above=("for", f"the states of loop {loop} span more directions than those of loop {loop - 1}"),
        below=("against", f"the states narrow: loop {loop} spans fewer directions than loop {loop - 1}"),
    )


def _step_size(loop: int, _: Context) -> _Test | str:
    if loop == 2:
        return "the update before it is the whole first pass: no step that loop 2's compares with"
    return _ratio_test(
        "step_size",
        "raw",
        loop,
        above=("against", f"the step of loop {loop} is larger than the one before: no settling"),
        below=("for", f"the step of loop {loop} is smaller than the one before"),
    )


def _fixed_point_gap(loop: int, _: Context) -> _Test:
    return _ratio_test(
        "fixed_point_gap",
        "raw/as_next",
        loop,
        above=("against", f"after loop {loop} another loop would change the state more than after loop {loop - 1}"),
        below=("for", f"loop {loop} brings the state nearer to one that another loop would leave alone"),
    )


def _direction(loop: int, _: Context) -> _Test | str:
    if loop == 2:
        return (
            "the update before it is the whole first pass, from which any loop 2 turns back: two unrelated states of "
            "one length, with an embedding short beside them, give a cosine of -0.71"
        )
    return _Test(
        quantity=f"cosine between the updates of loops {loop} and {loop - 1}",
        cells=(Cell("angular_change", "raw", loop),),
        function=lambda mean: mean[..., 0],
        line=0.0,
        above=("for", f"loop {loop} goes on in the direction of loop {loop - 1}"),
        below=(
            "against",
            f"loop {loop} takes back part of loop {loop - 1}'s update (unrelated states would give -0.50)",
        ),
        digits="+.2f",
    )


def _offset_cost(loop: int, context: Context) -> _Test | str | None:
    if not context.shifts:
        return None
    if loop == 2:
        return "no extra loop before it whose cost for its gain it compares with"
    falls = f"the shift into loop {loop} distorts less for each nat of output shift than into loop {loop - 1}"
    return _Test(
        quantity=f"offset cost over output shift at loop {loop} as a multiple of loop {loop - 1}'s",
        cells=tuple(
            Cell(name, variant, at)
            for at in (loop, loop - 1)
            for name, variant in (("offset_cost", context.offset_variant), ("output_shift", ""))
        ),
        function=lambda m: (m[..., 0] / m[..., 1]) / (m[..., 2] / m[..., 3]),
        line=1.0,
        above=("against", f"the shift into loop {loop} distorts more for each nat of output shift than before"),
        below=("abstains", falls + _doubt(loop, context)) if loop >= context.trained else ("for", falls),
        digits=".3f",
    )


LENSES: tuple[Lens, ...] = (
    _share_lens(
        "output shift",
        "has the output shift collapsed?",
        "moves the output",
        "the output shift",
        "output_shift",
        through_head=True,
    ),
    _share_lens(
        "token breadth",
        "does it still move some tokens most?",
        "is the peak of tokens",
        "the tokens, by the loop that moves them most,",
        "peak_loop",
        through_head=True,
    ),
    _share_lens(
        "attention re-routing",
        "is attention still re-routed?",
        "re-routes attention",
        "the attention re-routing",
        "attention_kl",
        "mixed",
        through_head=False,
    ),
    _prediction_lens("next-token loss", "next_token_nll", "", "nats"),
    _prediction_lens("logit-lens rank", "logit_lens_rank", "log", "log rank"),
    Lens("update direction", "stability", "do the updates reverse?", "angular_change(r) against 0, r >= 3", _direction),
    Lens(
        "step size", "stability", "do the steps settle?", "step_size(r) / step_size(r-1) against 1, r >= 3", _step_size
    ),
    Lens(
        "fixed-point gap",
        "stability",
        "does the state come nearer to a fixed point?",
        "fixed_point_gap(r) / fixed_point_gap(r-1) against 1",
        _fixed_point_gap,
    ),
    Lens(
        "effective rank",
        "cost",
        "is the rank still rising?",
        "effective_rank(r) / effective_rank(r-1) against 1",
        _effective_rank,
    ),
    Lens(
        "cost over gain",
        "cost",
        "does the offset cost outgrow the gain?",
        "growth of offset_cost(r) / output_shift(r) from loop r-1 against 1, r >= 3",
        _offset_cost,
    ),
)
"""In the order of tables, each with the mechanism that it bears on."""
