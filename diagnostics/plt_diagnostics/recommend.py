"""How many loops to run, from the diagnostics of one model: the votes of all lenses, put together loop by loop.

    found = recommend(rows, shifts=True, defaults={"offset_cost": "normed"}, trained_loops=4)
    found.loops, found.sentence                          # None: not enough evidence
    for vote in found.votes: print(vote.loop, vote.lens, vote.stance, vote.reason)

The rule, for each extra loop r = 2..R (docs/recommendation.md says why):

1. Every lens votes for or against loop r, or abstains; see plt_diagnostics.lenses.
2. The lenses of one mechanism are one voice: for or against if all that vote agree, split if they do not, silent if
   none votes. A mechanism is credited only if at least two of its lenses vote and all that vote agree.
3. Loop r earned its place if a credited gain (refinement or prediction) speaks for it, no credited mechanism against
   it, and more voices are for it than against it. It did not if a credited mechanism speaks against it, no credited
   gain for it, and more voices are against it than for it. Everything else is undecided.
4. The recommendation is the last loop up to which each extra loop earned its place: walk from loop 2 while they do.
   The first that did not ends the walk: run the loops before it. The first that is undecided ends it without an
   answer, with the loops before it as what is safe to say. All earned: R, the most that this model was seen to run.

What the loop that the output head was trained on gains cannot be told from one model: what that head reads there is
better by training alone. So open a model with more loops than you think of running; its last loop can be found wanting,
but it cannot earn its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict

from plt_diagnostics.bootstrap import MIN_SAMPLES, RESAMPLES
from plt_diagnostics.lenses import LENSES, Context, Evidence, Mechanism, Published, Stance, Vote
from plt_diagnostics.synthesis import Samples

Voice = Literal["for", "against", "split", "silent"]
Outcome = Literal["earned", "not earned", "undecided"]

MECHANISMS: tuple[Mechanism, ...] = ("refinement", "prediction", "stability", "cost")
GAINS: tuple[Mechanism, ...] = ("refinement", "prediction")
"""Without one of these a loop cannot earn its place: a loop that does nothing is stable and costs nothing."""

READS_AS: dict[tuple[Mechanism, str], str] = {
    ("refinement", "for"): "it moves the model",
    ("refinement", "against"): "refinement is spent",
    ("prediction", "for"): "predictions get better",
    ("prediction", "against"): "predictions get worse",
    ("stability", "for"): "the states settle",
    ("stability", "against"): "the states oscillate or drift",
    ("cost", "for"): "no sign of distortion",
    ("cost", "against"): "the states are distorted",
}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MechanismVoice(_Record):
    """What the lenses of one mechanism say together about one loop; `lenses` are those that vote. `credited`: at least
    two, and they agree."""

    mechanism: Mechanism
    loop: int
    says: Voice
    credited: bool
    lenses: tuple[str, ...]

    @property
    def reads_as(self) -> str:
        """In a few words, as in "refinement is spent"; "" where it says nothing."""
        return READS_AS.get((self.mechanism, self.says), "")


class Verdict(_Record):
    """On one extra loop: did it earn its place, and by whose voices."""

    loop: int
    outcome: Outcome
    voices: tuple[MechanismVoice, ...]
    sentence: str


class Change(_Record):
    """One vote that would change the answer: with `to` for its `stance`, the answer would be `loops` (None: not enough
    evidence). `margin` as in Vote: the smaller, the nearer; None for a number that nothing seen would flip."""

    loop: int
    lens: str
    stance: Stance
    to: Stance
    loops: int | None
    margin: float | None
    sentence: str


class Recommendation(_Record):
    """How many loops to run.

    `loops` is None where there is not enough evidence; `safe` is then still the last loop up to which every extra loop
    earned its place (1 if loop 2 did not). `measured` is R. `what_would_change` holds single votes, the nearest to
    flipping first; `nearest` says the same in a sentence, also where no single vote would do. `credited` are the
    mechanisms in which the lenses agree, of all loops. `samples` is None where unknown; `by_value`: read from a table
    without intervals.
    """

    loops: int | None
    safe: int
    measured: int
    sentence: str
    verdicts: tuple[Verdict, ...]
    votes: tuple[Vote, ...]
    what_would_change: tuple[Change, ...]
    nearest: str
    credited: tuple[MechanismVoice, ...]
    samples: int | None
    by_value: bool


def recommend(
    rows: pd.DataFrame | Evidence,
    *,
    shifts: bool,
    defaults: Mapping[str, str] | None = None,
    trained_loops: int | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Recommendation:
    """How many loops the diagnostics of one model speak for: tidy rows (see synthesis), Samples, or a Published table.

    `shifts` says whether a loop reads the state of the token before: without, there is no offset cost to weigh.
    `defaults` names the variants that tables show; offset_cost's is read, the state that is shifted ("normed" if it is
    not named). `trained_loops` is the loop count that the model was trained at (None: the one it was run at): its
    output head reads that loop. Raises synthesis.RowsError for rows that cannot be read, ValueError for trained_loops
    below 1.
    """
    if trained_loops is not None and trained_loops < 1:
        raise ValueError(f"trained_loops {trained_loops}: expected at least 1")
    evidence = Samples(rows, seed=seed, resamples=resamples) if isinstance(rows, pd.DataFrame) else rows
    context = Context(
        loops=evidence.loops,
        trained=trained_loops or evidence.loops,
        shifts=shifts,
        offset_variant=(defaults or {}).get("offset_cost", "normed"),
    )
    cast = (lens.vote(evidence, loop, context) for loop in range(2, evidence.loops + 1) for lens in LENSES)
    votes = tuple(vote for vote in cast if vote is not None)
    verdicts = judge(votes)
    loops, safe = decide(verdicts, evidence.loops)
    changes = tuple(sorted(_changes(votes, loops, evidence.loops), key=_nearness))
    return Recommendation(
        loops=loops,
        safe=safe,
        measured=evidence.loops,
        sentence=_sentence(loops, safe, verdicts, evidence, context),
        verdicts=verdicts,
        votes=votes,
        what_would_change=changes,
        nearest=_nearest(changes, [vote for vote in votes if vote.loop <= safe + 1]),
        credited=tuple(voice for verdict in verdicts for voice in verdict.voices if voice.credited),
        samples=evidence.count,
        by_value=isinstance(evidence, Published),
    )


# --- the rule ----------------------------------------------------------------------------------------------


def judge(votes: Sequence[Vote]) -> tuple[Verdict, ...]:
    """One verdict for each loop that there are votes about, in order: rules 2 and 3."""
    return tuple(
        _verdict(loop, [vote for vote in votes if vote.loop == loop]) for loop in sorted({vote.loop for vote in votes})
    )


def decide(verdicts: Sequence[Verdict], loops: int) -> tuple[int | None, int]:
    """The recommendation (None: not enough evidence) and the last loop up to which all earned their place: rule 4."""
    safe = 1
    for verdict in verdicts:
        if verdict.outcome == "undecided":
            return None, safe
        if verdict.outcome == "not earned":
            return safe, safe
        safe = verdict.loop
    return (safe if loops >= 2 else None), safe


def _verdict(loop: int, votes: Sequence[Vote]) -> Verdict:
    voices = tuple(_voice(mechanism, loop, votes) for mechanism in MECHANISMS)
    ahead = sum((voice.says == "for") - (voice.says == "against") for voice in voices)
    gain = any(voice.credited and voice.says == "for" and voice.mechanism in GAINS for voice in voices)
    objection = any(voice.credited and voice.says == "against" for voice in voices)
    outcome: Outcome = "undecided"
    if gain and not objection and ahead > 0:
        outcome = "earned"
    elif objection and not gain and ahead < 0:
        outcome = "not earned"
    return Verdict(loop=loop, outcome=outcome, voices=voices, sentence=_because(loop, outcome, voices))


def _voice(mechanism: Mechanism, loop: int, votes: Sequence[Vote]) -> MechanismVoice:
    cast = [vote for vote in votes if vote.mechanism == mechanism and vote.stance != "abstains"]
    stances = {vote.stance for vote in cast}
    says: Voice = "silent"
    if len(stances) > 1:
        says = "split"
    elif stances:
        says = "for" if "for" in stances else "against"
    credited = len(stances) == 1 and len(cast) >= 2
    return MechanismVoice(
        mechanism=mechanism, loop=loop, says=says, credited=credited, lenses=tuple(vote.lens for vote in cast)
    )


# --- what would change it ----------------------------------------------------------------------------------


def _changes(votes: Sequence[Vote], answer: int | None, loops: int) -> Iterator[Change]:
    """Every single vote that has a number and, cast otherwise, would give another answer."""
    for at, vote in enumerate(votes):
        if vote.line is None:
            continue
        for to in _alternatives(vote):
            flipped = vote.model_copy(update={"stance": to})
            found, _ = decide(judge([*votes[:at], flipped, *votes[at + 1 :]]), loops)
            if found != answer:
                yield Change(
                    loop=vote.loop,
                    lens=vote.lens,
                    stance=vote.stance,
                    to=to,
                    loops=found,
                    margin=vote.margin,
                    sentence=f"{_flip(vote, to)}, the answer would be {_answer(found)}",
                )


def _alternatives(vote: Vote) -> list[Stance]:
    """Stances that the vote would have with its number on the other side of its line, or too near to it."""
    return [to for to in dict.fromkeys((vote.above, vote.below, "abstains")) if to != vote.stance]


def _nearness(change: Change) -> float:
    return float("inf") if change.margin is None else change.margin


def _flip(vote: Vote, to: Stance) -> str:
    voted = {"for": "voted for it", "against": "voted against it", "abstains": "abstained"}[to]
    return f"if {vote.lens} at loop {vote.loop} {voted}"


def _answer(loops: int | None) -> str:
    return "open" if loops is None else f"{loops} loop{'' if loops == 1 else 's'}"


def _nearest(changes: Sequence[Change], votes: Sequence[Vote]) -> str:
    if changes:
        return f"Nearest to changing this: {changes[0].sentence}."
    numbers = [vote for vote in votes if vote.margin is not None]
    if not numbers:
        return "There is no vote with a number that could change this."
    nearest = min(numbers, key=lambda vote: vote.margin or 0.0)
    return f"No single vote would change this; the nearest to flipping is {nearest.lens} at loop {nearest.loop}."


# --- sentences ---------------------------------------------------------------------------------------------


def _because(loop: int, outcome: Outcome, voices: Sequence[MechanismVoice]) -> str:
    def named(says: Voice) -> str:
        return ", ".join(
            f"{voice.reads_as or voice.mechanism}{'' if voice.credited or says == 'split' else ' (one lens)'}"
            for voice in voices
            if voice.says == says
        )

    parts = [f"{label}: {named(says)}" for says, label in _LABELS if named(says)]
    what = {"earned": "earned its place", "not earned": "did not earn its place", "undecided": "is undecided"}[outcome]
    return f"loop {loop} {what} ({'; '.join(parts) or 'no lens votes'})"


_LABELS: tuple[tuple[Voice, str], ...] = (("for", "for"), ("against", "against"), ("split", "lenses disagree on"))


def _sentence(loops: int | None, safe: int, verdicts: Sequence[Verdict], evidence: Evidence, context: Context) -> str:
    read = "" if not isinstance(evidence, Published) else " By value only: the numbers came without intervals."
    if evidence.loops < 2:
        return "Not enough evidence: a model that runs one loop shows nothing of what another would do."
    if not isinstance(evidence, Published) and (evidence.count or 0) < MIN_SAMPLES:
        return f"Not enough evidence: {evidence.count} samples, and no interval below {MIN_SAMPLES}."
    reached = verdicts[: safe if loops is None or loops < evidence.loops else None]
    because = "; ".join(verdict.sentence for verdict in reached)
    if loops is None:
        advice = _advice(verdicts[safe - 1], context)
        return f"Not enough evidence to go beyond {_answer(safe)} or to stop there: {because}.{advice}{read}"
    if loops == evidence.loops:
        return f"Run {_answer(loops)}, all that were measured: {because}. More loops may do more.{read}"
    return f"Run {_answer(loops)}: {because}.{read}"


def _advice(open_loop: Verdict, context: Context) -> str:
    if open_loop.loop != context.trained or any(v.credited and v.says == "against" for v in open_loop.voices):
        return ""
    return (
        f" What loop {open_loop.loop} gains cannot be told from what the output head was trained on: "
        "open a model trained with more loops, or compare scores."
    )
