"""The report: one self-contained HTML page and its Markdown twin.

    evidence = gather(find_diagnoses([], results, notes), results, notes)
    written = write_report(evidence, Path("report.html"), command=["plt-eval", "report"])
    written.answer, written.html, written.markdown

Both say the same: they are rendered from the same blocks (blocks.py), which sections.py fills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_eval.errors import UserError
from plt_eval.journal import write_atomically
from plt_eval.report.blocks import Page, render
from plt_eval.report.evidence import Evidence
from plt_eval.report.sections import all_sections
from plt_eval.report.sections.evaluation import agreement_sentence
from plt_eval.words import count_of

NAME = "report.html"
"""The page, where the user names none: beside the diagnosis with the most loops."""

QUESTION = "How many loops should this model run, and why?"


@dataclass(frozen=True)
class Written:
    """What was written, and the answer in one sentence."""

    answer: str
    html: Path
    markdown: Path


def answer_sentence(evidence: Evidence) -> str:
    """As in "Run 2 loops." or "Not enough evidence to say; ..."."""
    found = evidence.answer
    if found.loops is None:
        if found.measured < 2:
            return "Not enough evidence to say; a model that runs one loop shows nothing of what another would do."
        open_ = f"leave loop {found.safe + 1} open"
        return f"Not enough evidence to say; the diagnostics speak for {count_of(found.safe, 'loop')} and {open_}."
    if found.loops == found.measured:
        return f"Run {count_of(found.loops, 'loop')}, all that were measured; more may do more."
    return f"Run {count_of(found.loops, 'loop')}."


def build_page(evidence: Evidence, command: Sequence[str]) -> Page:
    """The report as blocks. `command` is what writes it again."""
    main = evidence.main.manifest
    measured = ", ".join(f"R={loops}" for loops in evidence.diagnoses)
    facts = (
        ("Model", evidence.name),
        ("Diagnosed", f"{measured}; the answer is read from R={main.loops}"),
        ("Read on", f"{count_of(main.done, 'sample')}, {count_of(main.tokens, 'token')} of {main.data.name}"),
        ("What evaluation says", agreement_sentence(evidence)),
    )
    return Page(
        title=f"{evidence.name}: how many loops?",
        question=QUESTION,
        answer=answer_sentence(evidence),
        sure=evidence.answer.loops is not None,
        facts=facts,
        sections=all_sections(evidence, command),
        footer=f"Written by plt-eval {_version()} from run directories alone; the same files give the same page.",
    )


def write_report(evidence: Evidence, out: Path, *, command: Sequence[str]) -> Written:
    """Write the page to `out` (which ends in .html) and its twin beside it, with .md. Raises UserError for another
    ending, DiskFull and OSError where it cannot be written."""
    if out.suffix != ".html":
        raise UserError(f"--out {out}: expected a file that ends in .html; the Markdown twin goes beside it")
    page = build_page(evidence, command)
    out.parent.mkdir(parents=True, exist_ok=True)
    twin = out.with_suffix(".md")
    write_atomically(out, render(page, "html"))
    write_atomically(twin, render(page, "md"))
    return Written(page.answer, out, twin)


def report_json(evidence: Evidence, written: Written) -> dict[str, Any]:
    """The report for programs: the answer, every vote, and what each measure of evaluation says."""
    return {
        "answer": written.answer,
        "loops": evidence.answer.loops,
        "safe": evidence.answer.safe,
        "model": evidence.name,
        "runs": {str(loops): str(one.path) for loops, one in evidence.diagnoses.items()},
        "recommendations": {str(loops): one.model_dump(mode="json") for loops, one in evidence.advice.items()},
        "evaluation": [
            {
                "measure": each.measured.name,
                "source": each.measured.source,
                "seed": each.measured.seed,
                "unit": each.measured.unit,
                "headline": each.measured.headline,
                "scores": {str(s.loops): [s.value, s.low, s.high] for s in each.measured.scores},
                "best": each.measured.best,
                "smallest_level": each.measured.level,
                "verdict": each.verdict,
                "reason": each.reason,
            }
            for each in evidence.agreements
        ],
        "notes": list(evidence.notes),
        "html": str(written.html),
        "markdown": str(written.markdown),
    }


def _version() -> str:
    from importlib.metadata import version

    return version("plt-eval")
