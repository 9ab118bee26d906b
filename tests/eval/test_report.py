"""The report on real diagnoses of the bundled family: one page that stands alone, and a twin that says the same."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_parts import NoSandbox, SumEngine, SumSuite

from plt_eval.cli.main import main
from plt_eval.diagnosis.run import Settings, diagnose
from plt_eval.diagnosis.samples import draw, open_corpus
from plt_eval.diagnosis.store import open_diagnosis
from plt_eval.diagnosis.subject import Subject
from plt_eval.engines.base import Decoding
from plt_eval.errors import UserError
from plt_eval.models import BUNDLED, resolve_model
from plt_eval.report.blocks import Folded, Page, Section, Table, Text, markdown_text, render
from plt_eval.report.evidence import Evidence, agreement, compare_with_evaluation, find_diagnoses, gather
from plt_eval.report.page import Written, answer_sentence, build_page, report_json
from plt_eval.report.scores import Gap, Measured, Score, find_studies, run_scores, study_scores
from plt_eval.report.sections.account import warnings
from plt_eval.report.sections.cells import interval_digits, with_interval
from plt_eval.report.sections.evaluation import scores
from plt_eval.report.sections.rule import STANCES
from plt_eval.runner import Settings as RunSettings
from plt_eval.runner import run
from plt_eval.store import Run
from plt_eval.study.records import read_study

HOSTILE = "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=x> $\\frac{ [a](javascript:x) | `b`"


# --- what is reported on ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Diagnoses of plt-tiny at 1, 2 and 4 loops on 12 short samples."""
    folder = tmp_path_factory.mktemp("results")
    for loops in (1, 2, 4):
        _diagnose(folder / "runs", loops)
    return folder


def _diagnose(out: Path, loops: int, *, samples: int = 12, measurements: tuple[str, ...] | None = None) -> Path:
    subject = Subject.of(resolve_model(f"plt-tiny:r{loops}"), device="cpu")
    drawn = draw([open_corpus("trace")], tokenizer="bytes", samples=samples, sequence_length=40)
    command = ("plt-eval", "diagnose", "--model", f"plt-tiny:r{loops}")
    return diagnose(subject, drawn, Settings(out, measurements, command=command)).diagnosis.path


@pytest.fixture(scope="session")
def evidence(results: Path) -> Evidence:
    notes: list[str] = []
    return gather(find_diagnoses([], results, notes), results, notes)


@pytest.fixture(scope="session")
def arguments(results: Path) -> tuple[str, ...]:
    """What writes the page."""
    return ("report", "--results", str(results), "--out", str(results / "deep" / "page.html"))


@pytest.fixture(scope="session")
def page(evidence: Evidence, arguments: tuple[str, ...]) -> Page:
    return build_page(evidence, ("plt-eval", *arguments))


@pytest.fixture(scope="session")
def html_text(page: Page) -> str:
    return render(page, "html")


@pytest.fixture(scope="session")
def markdown(page: Page) -> str:
    return render(page, "md")


# --- the page -----------------------------------------------------------------------------------------

VOID = {"meta", "br", "img", "link", "hr", "input"}


class _Page(HTMLParser):
    """Start and end tags must match; gathers attributes, ids and the text outside pictures and styles."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "svg" not in self.open and "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def parsed(text: str) -> _Page:
    reader = _Page()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_is_well_formed(html_text: str) -> None:
    assert html_text.lstrip().startswith("<!DOCTYPE html>")
    reader = parsed(html_text)
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert len(ids) == len(set(ids)), "an id is there twice"
    for picture in re.findall(r"<svg.*?</svg>", html_text, re.DOTALL):
        ElementTree.fromstring(picture)  # also well-formed as XML


def test_the_page_needs_nothing_from_elsewhere(html_text: str) -> None:
    reader = parsed(html_text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in reader.tags}
    for tag, attrs in reader.tags:
        for name, value in attrs.items():
            if name.startswith("xmlns"):
                continue
            assert not name.startswith("on"), f"<{tag} {name}> is a script"
            assert not re.search(r"(?i)https?:|^//|javascript:|file:", value or ""), f"<{tag} {name}={value!r}>"
            if name in ("src", "href", "xlink:href", "action", "poster", "srcset"):
                assert (value or "").startswith(("#", "data:")), f"<{tag} {name}={value!r}>"
    assert "@import" not in html_text
    assert not re.search(r"url\((?!['\"]?#)", html_text)


def test_the_page_can_be_read_aloud_and_by_keyboard(html_text: str) -> None:
    reader = parsed(html_text)
    assert ("html", {"lang": "en"}) in reader.tags
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("h1") == tags.count("main") == 1
    ids = {attrs["id"] for _, attrs in reader.tags if "id" in attrs}
    for tag, attrs in reader.tags:
        if tag == "a":
            assert str(attrs["href"]).removeprefix("#") in ids
        if attrs.get("class") == "scroll":
            assert attrs["tabindex"] == "0"
            assert attrs["aria-label"]
    pictures = [attrs for tag, attrs in reader.tags if tag == "svg"]
    assert len(pictures) >= 7
    for attrs in pictures:
        assert attrs["role"] == "img"
        assert "plt-tiny" in str(attrs["aria-label"])


def test_every_vote_is_there_with_its_number_interval_and_reason(evidence: Evidence, html_text: str) -> None:
    words = parsed(html_text).words
    assert len(evidence.answer.votes) >= 20
    for vote in evidence.answer.votes:
        row = f"{vote.lens} {STANCES[vote.stance]}"
        if vote.value is None:
            assert f"{row} - - {vote.quantity} {' '.join(vote.reason.split())}" in words
        else:
            cell = with_interval(vote.value, vote.low, vote.high, line=vote.line).replace("\n", " ")
            assert vote.low is None or "[" in cell
            assert f"{row} {cell} {vote.line:.3g} {vote.quantity} {vote.meaning}" in words
    for loop in (2, 3, 4):
        assert sum(vote.loop == loop for vote in evidence.answer.votes) == len(evidence.answer.votes) // 3


def test_the_answer_is_that_of_the_largest_model_and_both_forms_say_it(
    evidence: Evidence, page: Page, html_text: str, markdown: str
) -> None:
    assert evidence.answer.measured == 4
    assert list(evidence.advice) == [1, 2, 4]
    assert page.answer == answer_sentence(evidence)
    assert page.answer in parsed(html_text).words
    assert f"**{page.answer}**" in markdown


def test_both_forms_have_the_same_tables(page: Page, html_text: str, markdown: str) -> None:
    words = parsed(html_text).words
    tables = list(_tables(page.sections))
    assert len(tables) >= 15
    for table in tables:
        assert " ".join(table.caption.split()) in words
        for row in table.rows:
            flat = " ".join(" ".join(cell.split()) for cell in row)
            assert " ".join(flat.split()) in words
            assert "| " + " | ".join(markdown_text(cell) for cell in row) + " |" in markdown


def _tables(sections: tuple[Section, ...]) -> Iterator[Table]:
    for section in sections:
        for block in section.blocks:
            yield from (
                each for each in (block.blocks if isinstance(block, Folded) else (block,)) if isinstance(each, Table)
            )


def test_the_sections_are_all_there_in_order(page: Page) -> None:
    names = [section.name for section in page.sections]
    assert " ".join(names) == (
        "evidence scissors shares breadth scores change loops breakdowns published methods warnings reproduce"
    )


def test_published_numbers_are_told_apart(html_text: str) -> None:
    rows = re.findall(r'<tr role="row"( class="published")?>(.*?)</tr>', html_text)
    grey = [row for mark, row in rows if mark]
    assert len(grey) >= 15
    for mark, row in rows:
        assert bool(mark) == ("published (7B)" in row) or "points" in row or _benchmark(row)


def _benchmark(row: str) -> bool:
    return bool(
        re.search(r">(humaneval_plus|\w+_v\d|average|mind2web|livecodebench|multipl_e|bigcode\w+|swe_\w+)<", row)
    )


def test_how_it_was_measured_names_hashes_versions_and_commands(
    evidence: Evidence, html_text: str, arguments: tuple[str, ...]
) -> None:
    words = parsed(html_text).words
    for diagnosis in evidence.diagnoses.values():
        manifest = diagnosis.manifest
        for fact in (manifest.model.weights_sha256[:16], manifest.data.sha256[:16], manifest.run_id, manifest.dtype):
            assert fact in words
    assert "torch 2" in words
    for loops in (1, 2, 4):
        assert f"plt-eval diagnose --model plt-tiny:r{loops}" in words
    assert f"plt-eval {shlex.join(arguments)}" in words


# --- other people's words -----------------------------------------------------------------------------


def _rewritten(path: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a run directory with another manifest."""
    shutil.copytree(path, target)
    manifest = json.loads((target / "manifest.json").read_text())
    change(manifest)
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def test_hostile_names_are_text_and_nothing_else(evidence: Evidence, tmp_path: Path) -> None:
    def poison(manifest: dict[str, Any]) -> None:
        manifest["model"] |= {"label": HOSTILE, "family": None}
        manifest["data"] |= {"name": HOSTILE, "source": HOSTILE, "tokenizer": HOSTILE}
        manifest["adapter"] = HOSTILE
        manifest["sessions"][0]["command"] = ["plt-eval", HOSTILE, "```\nrm -rf /"]
        manifest["sessions"][0]["hardware"]["cpu"] = HOSTILE

    copy = _rewritten(evidence.diagnoses[2].path, tmp_path / "runs" / "bad", poison)
    found = gather({2: open_diagnosis(copy)}, tmp_path, [HOSTILE])
    page = build_page(found, ("plt-eval", "report", HOSTILE))
    text, twin = render(page, "html"), render(page, "md")
    reader = parsed(text)
    test_the_page_needs_nothing_from_elsewhere(_without_labels(text))
    assert not {"script", "img"} & {tag for tag, _ in reader.tags}
    assert HOSTILE in reader.words
    assert html.escape(HOSTILE, quote=False).split(" ")[0] in text
    for line in _outside_fences(twin):
        assert "<script" not in line
        assert "<img" not in line
        assert not re.search(r"(?<!\\)\]\(", line)
    assert twin.count("```") == 2


def _without_labels(text: str) -> str:
    return re.sub(r'aria-label="[^"]*"', 'aria-label="x"', text)


def _outside_fences(text: str) -> list[str]:
    inside, lines = False, []
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            lines.append(line)
    return lines


@given(st.text(max_size=60))
def test_markdown_text_is_one_harmless_line(text: str) -> None:
    found = markdown_text(text)
    assert "\n" not in found
    assert "<" not in found
    assert not re.search(r"(?<!\\)(\\\\)*\|", found)
    assert not re.search(r"(?<!\\)(\\\\)*\]\(", found)


# --- answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loops", "safe", "measured", "said"),
    [
        (2, 2, 4, "Run 2 loops."),
        (1, 1, 4, "Run 1 loop."),
        (4, 4, 4, "Run 4 loops, all that were measured; more may do more."),
        (None, 2, 4, "Not enough evidence to say; the diagnostics speak for 2 loops and leave loop 3 open."),
        (None, 1, 4, "Not enough evidence to say; the diagnostics speak for 1 loop and leave loop 2 open."),
        (None, 1, 1, "Not enough evidence to say; a model that runs one loop shows nothing of what another would do."),
    ],
)
def test_the_answer_in_one_sentence(evidence: Evidence, loops: int | None, safe: int, measured: int, said: str) -> None:
    found = evidence.answer.model_copy(update={"loops": loops, "safe": safe, "measured": measured})
    assert answer_sentence(dataclasses.replace(evidence, advice={measured: found})) == said


def test_one_loop_alone_gives_a_page_that_says_so(evidence: Evidence, tmp_path: Path) -> None:
    found = gather({1: evidence.diagnoses[1]}, tmp_path)
    page = build_page(found, ())
    text = render(page, "html")
    assert "a model that runs one loop shows nothing" in page.answer
    assert "it needs a diagnosis at 2 or more loops" in parsed(text).words
    assert not page.sure
    assert found.name == "plt-tiny:r1"
    assert evidence.name == "plt-tiny"


def test_values_that_are_not_finite_are_said(evidence: Evidence) -> None:
    summaries = dict(evidence.summaries)
    table = summaries[4].copy()
    whole = table["layer"].isna() & table["position"].isna() & (table["measurement"] == "gate") & (table["loop"] == 3)
    assert whole.sum() == 1
    table.loc[whole, "nonfinite"] = 1234
    summaries[4] = table
    text, rows = warnings(dataclasses.replace(evidence, summaries=summaries)).blocks[:2]
    assert isinstance(text, Text)
    assert text.tone == "warning"
    assert isinstance(rows, Table)
    assert rows.rows == (("gate", "4", "3", "1,234", "mean of the others"),)
    assert warnings(evidence).blocks[0] == Text("All measured values were finite.")


def test_a_diagnosis_of_two_measurements_has_a_page(tmp_path: Path) -> None:
    path = _diagnose(tmp_path / "runs", 3, measurements=("gate", "step_size"))
    found = gather({3: open_diagnosis(path)}, tmp_path)
    words = parsed(render(build_page(found, ()), "html")).words
    assert found.answer.loops is None
    assert "Not drawn: gain-cost scissors" in words
    assert "output_shift was not measured" in words
    assert "Step size (raw)" in words
    assert "Offset cost" not in words


def test_few_samples_are_a_warning(markdown: str) -> None:
    assert "Fewer than 30 samples at R=1, R=2, R=4" in markdown


# --- what evaluation says -----------------------------------------------------------------------------


def measured(gaps: dict[int, tuple[float, float | None, float | None]], *, best: int) -> Measured:
    """Scores of which `best` is the best, and their gaps to it."""
    values = tuple(Score(loops, -1.0 if loops == best else 0.0, None, None, 10) for loops in gaps)
    found = {loops: Gap(loops, *gap, "same documents") for loops, gap in gaps.items()}
    return Measured("x", "bits per byte", "here", 0, "", values, found)


CLEAR, LEVEL, UNKNOWN, SELF = (0.3, 0.1, 0.5), (0.1, -0.1, 0.3), (0.1, None, None), (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("gaps", "best", "recommended", "verdict", "level"),
    [
        ({1: CLEAR, 2: SELF, 3: CLEAR}, 2, 2, "agrees", 2),
        ({1: CLEAR, 2: LEVEL, 3: SELF}, 3, 2, "agrees", 2),
        ({1: CLEAR, 2: LEVEL, 3: SELF}, 3, 3, "cannot tell", 2),
        ({1: LEVEL, 2: SELF, 3: CLEAR}, 2, 2, "cannot tell", 1),
        ({1: CLEAR, 2: SELF, 3: CLEAR}, 2, 3, "disagrees", 2),
        ({1: CLEAR, 2: SELF, 3: CLEAR}, 2, 1, "disagrees", 2),
        ({1: SELF, 2: CLEAR}, 1, 1, "agrees", 1),
        ({1: CLEAR, 2: SELF}, 2, None, "cannot tell", 2),
        ({1: CLEAR, 2: SELF}, 2, 4, "cannot tell", 2),
        ({1: UNKNOWN, 2: SELF}, 2, 2, "cannot tell", None),
        ({1: UNKNOWN, 2: SELF}, 2, 1, "cannot tell", None),
    ],
)
def test_agreement(
    gaps: dict[int, tuple[float, float | None, float | None]],
    best: int,
    recommended: int | None,
    verdict: str,
    level: int | None,
) -> None:
    found = measured(gaps, best=best)
    assert found.best == best
    assert found.level == level
    assert agreement(found, recommended).verdict == verdict


def test_a_study_says_which_loop_count_is_best() -> None:
    study = next(found for found in find_studies([BUNDLED], []) if found.folder.name == "plt-tiny")
    found = {each.name: each for each in study_scores(study, seed=0)}
    bits = {v.loops: v.heldout["python"].bits_per_byte for v in study.study.variants}
    mine = found["python: held-out bits per byte"]
    assert mine.best == min(bits, key=lambda loops: bits[loops])
    gains = {row.loops: row.heldout["python"].against_first for row in study.study.summary}
    gap, gain = mine.gaps[1], gains[mine.best]
    assert gain is not None
    assert mine.best != 1
    assert (gap.value, gap.low, gap.high) == pytest.approx((-gain.value, -(gain.high or 0), -(gain.low or 0)))
    exact = {v.loops: v.suites["trace"].metrics["trace.exact"].value for v in study.study.variants}
    assert found["trace.exact"].best == max(sorted(exact), key=lambda loops: exact[loops])
    assert found["trace.exact"].headline
    assert not found["trace.exact/chase"].headline


def test_gaps_are_paired_where_documents_are_kept(tmp_path: Path) -> None:
    from plt_eval.heldout import DocumentScores, difference

    folder = tmp_path / "plt-tiny"
    shutil.copytree(BUNDLED / "plt-tiny", folder, ignore=shutil.ignore_patterns("r*", "data"))
    (folder / "heldout").mkdir()
    rng = np.random.default_rng(0)
    count = np.arange(40)
    kept = {}
    for loops in (1, 2, 3, 4):
        nats = rng.gamma(4.0, size=40) + (loops != 4)
        kept[loops] = DocumentScores(count, nats, np.full(40, 9), np.full(40, 9), count)
        kept[loops].save(folder / "heldout" / f"r{loops}-s0-python.npz")
    (found,) = find_studies([tmp_path, BUNDLED], [])  # the same study twice: the one that kept its documents
    assert found.folder == folder
    mine = {each.name: each for each in study_scores(found, seed=0)}["python: held-out bits per byte"]
    value, low, high = difference(kept[2], kept[mine.best])
    gap = mine.gaps[2]
    assert gap.how == "same documents"
    assert (gap.value, gap.low, gap.high) == (value, low, high)


def test_gaps_of_runs_are_paired_over_problems(tmp_path: Path) -> None:
    runs: dict[int, Run] = {}
    for loops in (1, 2):
        suite, engine = SumSuite(40), SumEngine(loops=loops)
        settings = RunSettings(tmp_path, Decoding(temperature=0.5, seed=loops), scoring_workers=1)
        runs[loops] = run(suite, suite.load(None), engine, NoSandbox, settings).run
    found = {each.name: each for each in run_scores("sums", runs, "here")}
    values = {loops: {s.sample_id: float(s.values["right"]) for s in runs[loops].samples()} for loops in runs}
    mine = found["right"]
    other = 3 - mine.best
    gap = mine.gaps[other]
    expected = np.mean([values[other][p] - values[mine.best][p] for p in values[1]])
    assert gap.how == "same problems"
    assert gap.value == pytest.approx(expected)
    assert found["weighted"].gaps[3 - found["weighted"].best].how == "from the two intervals"  # no value a problem


@given(st.floats(0.2, 0.8), st.floats(0.2, 0.8), st.floats(0.01, 0.2), st.floats(0.01, 0.2))
def test_a_gap_of_two_intervals_is_wider_than_each(a: float, b: float, wide_a: float, wide_b: float) -> None:
    from plt_eval.report.scores import _combined

    gap = _combined(
        Score(1, a, a - wide_a, a + wide_a, 9), Score(2, b, b - wide_b, b + wide_b, 9), "from the two intervals"
    )
    assert gap.low is not None
    assert gap.high is not None
    assert gap.high - gap.low >= 2 * max(wide_a, wide_b) - 1e-12
    assert gap.high - gap.low <= 2 * (wide_a + wide_b) + 1e-12
    assert gap.value == pytest.approx(a - b)


def test_the_rule_is_held_against_the_study_of_the_same_weights(results: Path) -> None:
    (case,) = compare_with_evaluation("plt-tiny", results)
    assert case.diagnosis.manifest.loops == 4
    assert case.advice == gather({4: case.diagnosis}, results).answer
    assert {each.measured.name for each in case.agreements} >= {"python: held-out bits per byte", "trace.exact"}
    for each in case.agreements:
        assert each == agreement(each.measured, case.advice.loops)


def test_validating_needs_a_diagnosis_of_those_weights(results: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"plt-eval diagnose --model .* --loops 4"):
        compare_with_evaluation("plt-tiny", tmp_path)
    with pytest.raises(UserError, match="no study of that name"):
        compare_with_evaluation("plt-tinny", results)


def test_scores_of_other_weights_are_not_shown(evidence: Evidence, tmp_path: Path) -> None:
    def retrained(manifest: dict[str, Any]) -> None:
        manifest["model"]["weights_sha256"] = "0" * 64

    copy = _rewritten(evidence.main.path, tmp_path / "runs" / "retrained", retrained)
    found = gather({4: open_diagnosis(copy)}, tmp_path)
    assert found.agreements == ()
    assert any("other weights" in note for note in found.notes)
    (said,) = scores(found).blocks
    assert isinstance(said, Text)
    assert said.text.startswith("No task scores of these models were found")
    assert evidence.agreements


def test_evaluation_runs_of_the_same_weights_and_loops_are_shown(evidence: Evidence, tmp_path: Path) -> None:
    opened = {loops: evidence.diagnoses[loops] for loops in (2, 4)}
    own = {loops: one.manifest.model.weights_sha256 for loops, one in opened.items()}
    for name, loops, weights in (("two", 2, own[2]), ("four", 4, own[4]), ("other", 1, "0" * 64), ("moved", 3, own[4])):
        suite, engine = SumSuite(12), SumEngine(loops=loops)
        settings = RunSettings(tmp_path / name, Decoding(temperature=0.5), scoring_workers=1)
        path = run(suite, suite.load(None), engine, NoSandbox, settings).run.path

        def named(manifest: dict[str, Any], weights: str = weights) -> None:
            manifest["identity"]["engine_identity"]["weights_sha256"] = weights

        _rewritten(path, tmp_path / "results" / "runs" / name, named)
    found = gather(opened, tmp_path / "results")
    shown = {each.measured.name: each.measured for each in found.agreements}
    assert [score.loops for score in shown["right"].scores] == [2, 4]
    assert shown["right"].source == f"evaluation runs in {tmp_path / 'results' / 'runs'}"
    assert {gap.how for gap in shown["right"].gaps.values()} == {"itself", "same problems"}


# --- which runs ---------------------------------------------------------------------------------------


def test_runs_are_found_by_directory_id_and_beginning(results: Path, evidence: Evidence) -> None:
    two, four = evidence.diagnoses[2].path, evidence.main.path
    assert list(find_diagnoses([str(four), two.name], results, [])) == [2, 4]
    assert list(find_diagnoses([four.name[:-3]], results, [])) == [4]
    assert find_diagnoses([four.name, str(four)], results, []).keys() == {4}
    with pytest.raises(UserError, match=r"is the name or the beginning of 3 runs"):
        find_diagnoses(["diagnosis-"], results, [])
    with pytest.raises(UserError, match=f"did you mean {four.name}"):
        find_diagnoses([f"x{four.name}"], results, [])


def test_without_runs_the_family_is_taken_and_said(results: Path) -> None:
    notes: list[str] = []
    assert list(find_diagnoses([], results, notes)) == [1, 2, 4]
    assert notes[0].startswith("no RUN given: the newest complete set of plt-tiny at R=1, R=2, R=4")


def test_what_does_not_compare_is_refused(results: Path, evidence: Evidence, tmp_path: Path) -> None:
    other = _diagnose(tmp_path / "runs", 2, samples=9)
    with pytest.raises(UserError, match="measured on different samples"):
        find_diagnoses([str(evidence.main.path), str(other)], results, [])
    with pytest.raises(UserError, match="two diagnoses of R=2"):
        find_diagnoses([str(evidence.diagnoses[2].path), str(other)], results, [])

    def stopped(manifest: dict[str, Any]) -> None:
        manifest["status"] = "incomplete"

    half = _rewritten(evidence.main.path, tmp_path / "half", stopped)
    with pytest.raises(UserError, match="this diagnosis is incomplete"):
        find_diagnoses([str(half)], results, [])
    with pytest.raises(UserError, match="no complete diagnosis"):
        find_diagnoses([], BUNDLED.parent / "demo", [])


# --- numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0.802, 0.7967, 0.8083), "0.802\n[0.797, 0.808]"),
        ((1.0009, 0.9974, 1.0042), "1.0009\n[0.9974, 1.0042]"),
        ((199.1, 198.0, 200.2), "199.1\n[198.0, 200.2]"),
        ((12345.6, 11000.0, 13000.0), "12,346\n[11,000, 13,000]"),
        ((1.0, 1.0, 1.0), "1.00"),
        ((0.5, None, None), "0.500"),
        ((float("nan"), 0.0, 1.0), "-"),
        ((None, None, None), "-"),
        ((-1.2e-9, -2e-9, -1e-9), "-1e-09"),
        ((1e-9, -0.05, 0.06), "0.00\n[-0.05, 0.06]"),
        ((-0.00001, -0.05, 0.05), "0.00\n[-0.05, 0.05]"),
    ],
)
def test_numbers_have_the_digits_that_their_interval_bears(
    numbers: tuple[float | None, float | None, float | None], text: str
) -> None:
    assert with_interval(*numbers) == text


def test_an_end_never_looks_as_if_it_were_the_line() -> None:
    assert with_interval(-0.0764, -0.157, 0.0042) == "-0.08\n[-0.16, 0.00]"
    assert with_interval(-0.0764, -0.157, 0.0042, line=0.0) == "-0.076\n[-0.157, 0.004]"
    assert with_interval(0.1, 0.0, 0.2, line=0.0) == "0.10\n[0.00, 0.20]"  # it is the line


@given(st.floats(1e-5, 1e5), st.floats(1e-5, 1e5))
def test_digits_tell_the_ends_of_an_interval_apart(middle: float, width: float) -> None:
    text = with_interval(middle, middle - width, middle + width)
    low, high = re.findall(r"-?[\d,.]+", text.partition("\n")[2].replace("[", "").replace("]", ""))[:2]
    assert low.rstrip(",") != high
    assert interval_digits(2 * width) <= 6


# --- the command --------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["plt-eval", *arguments])
    with pytest.raises(SystemExit) as done:
        main(arguments)
    return int(done.value.code or 0)


def test_the_command_prints_the_answer_and_writes_the_same_bytes_again(
    evidence: Evidence,
    arguments: tuple[str, ...],
    html_text: str,
    markdown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, *arguments) == 0
    printed, out = capsys.readouterr(), Path(arguments[-1])
    assert printed.out.splitlines() == [answer_sentence(evidence), str(out), str(out.with_suffix(".md"))]
    assert printed.err.splitlines()[-1].startswith("no RUN given: the newest complete set of plt-tiny")
    assert out.read_text() == html_text
    assert out.with_suffix(".md").read_text() == markdown


def test_json_is_for_programs(evidence: Evidence, tmp_path: Path) -> None:
    written = Written(answer_sentence(evidence), tmp_path / "r.html", tmp_path / "r.md")
    found = json.loads(json.dumps(report_json(evidence, written), allow_nan=False))
    assert found["answer"] == answer_sentence(evidence)
    assert found["loops"] == evidence.answer.loops
    assert len(found["recommendations"]["4"]["votes"]) == len(evidence.answer.votes)
    assert {each["measure"] for each in found["evaluation"]} >= {"trace.exact"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--out", "page.htm"), "--out page.htm: expected a file that ends in .html"),
        (("nothing-like-it",), "no run 'nothing-like-it'"),
        (("--results", "nowhere"), "--results nowhere: no such folder"),
    ],
)
def test_mistakes_are_one_line(
    results: Path,
    arguments: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given_results = () if "--results" in arguments else ("--results", str(results))
    assert command(monkeypatch, "report", *arguments, *given_results) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert said in errors[0]


def test_the_validating_script_runs(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "validate_rule.py"))
    assert script["main"](["plt-tiny", "--results", str(results), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    headline = [line for line in lines if line.startswith("| plt-tiny | 0 | 12 samples of trace |")]
    assert len(headline) == 1 + len(read_study(BUNDLED / "plt-tiny").variants[0].heldout)
    assert any(line.startswith("| always R=1 | 1 |") or line.startswith("| always R=1 | 0 |") for line in lines)
    assert script["main"](["no-such-family", "--results", str(results)]) == 2
