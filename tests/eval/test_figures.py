"""The paper's figures and tables: what they are drawn from, what they leave out, and that they stay the same."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_diagnosis import DEFAULTS, HEADS_EACH, SAMPLES, mean, write_diagnosis
from toy_parts import NoSandbox, SumEngine, SumSuite

from plt_eval.cli.main import main
from plt_eval.diagnosis.store import open_diagnosis
from plt_eval.engines.base import Decoding
from plt_eval.errors import UserError
from plt_eval.report import reference, style
from plt_eval.report.collect import collect
from plt_eval.report.figures import FIGURES, LoopFigure, NoData
from plt_eval.report.figures.heads import CELL, MEAN
from plt_eval.report.figures.shares import LENSES
from plt_eval.report.reference import LABEL, published
from plt_eval.report.tables import TABLES, _tex, benchmark_table, signature_table, thinking_table
from plt_eval.runner import Settings
from plt_eval.runner import run as run_suite

PROJECT = Path(__file__).parents[2]
EACH = pytest.mark.parametrize("figure", FIGURES.values(), ids=FIGURES)
MEANS = pytest.mark.parametrize(
    "figure", [FIGURES[name] for name in ("fig2", "fig3", "fig5", "fig6")], ids=lambda f: f.name
)


class Cli:
    """main() in this process: (exit code, stdout, stderr)."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = self.capsys.readouterr()
        return int(caught.value.code or 0), out, err


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family, toy, with members of 1 to 4 loops; its member of 3 loops also run at 4."""
    root = tmp_path_factory.mktemp("results")
    for loops in (1, 2, 3, 4):
        write_diagnosis(root / "runs", f"toy:r{loops}", loops, started=loops)
    write_diagnosis(root / "runs", "toy:r3", 4, started=9)
    return root


def evaluate(root: Path, model: str, loops: int, *, problems: int = 20, **changes: Any) -> None:
    class Named(SumEngine):
        def identity(self) -> dict[str, Any]:
            return {**super().identity(), "model": model, **changes}

    suite = SumSuite(problems)
    run_suite(suite, suite.load(None), Named(loops=loops), NoSandbox, Settings(root / "runs", Decoding()))


# --- the published numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", reference.NAMES)
def test_every_published_file_has_the_same_columns_and_numbers_as_printed(name: str) -> None:
    rows = published(name)
    assert [*rows.columns] == [*reference.COLUMNS, "printed"]
    assert len(rows) > 0
    assert np.isfinite(rows["value"]).all()
    assert [float(text) for text in rows["printed"]] == [*rows["value"]]
    assert set(rows["source"]) <= {"2606.18023", "2510.24824"}
    assert not rows.duplicated(["model", "loops", "loop", "quantity"]).any()


@pytest.mark.parametrize(
    ("name", "where", "value"),
    [
        ("table2", {"model": "LoopCoder-v2", "loops": 2, "quantity": "swe_bench_verified"}, 64.4),
        ("table2", {"model": "LoopCoder-v2", "loops": 3, "quantity": "swe_bench_verified"}, 27.6),
        ("table2", {"model": "Gemini-3-Pro", "quantity": "average"}, 68.2),
        ("table3", {"loop": 4, "quantity": "step_size"}, 1014.0),
        ("table3", {"loop": 2, "quantity": "angular_change"}, -0.72),
        ("table4", {"model": "LoopCoder-v2 thinking", "quantity": "livecodebench"}, 62.3),
        ("figure4", {"loop": 3}, 0.71),
        ("figure7", {"loop": 3, "quantity": "peak_loop_share"}, 13.0),
        ("plt", {"quantity": "latency_below_sequential_loop"}, 47.0),
    ],
    ids=str,
)
def test_published_numbers_are_the_papers(name: str, where: dict[str, Any], value: float) -> None:
    rows = published(name)
    for column, wanted in where.items():
        rows = rows[rows[column] == wanted]
    assert [*rows["value"]] == [value]


def test_shares_that_are_published_add_up_and_missing_benchmarks_have_no_row() -> None:
    assert {*published("figure7").groupby("quantity")["value"].sum()} == {100.0}
    table = published("table2")
    assert "bfcl_v3" not in set(table[table["model"] == "Seed-Coder-8B-Instruct"]["quantity"])


def test_published_files_are_in_the_wheel_and_found_there(tmp_path: Path) -> None:
    wheel = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["sources"]["results/reference"] == "plt_eval/report/published"
    installed = tmp_path / "plt_eval" / "report"
    shutil.copytree(PROJECT / "results" / "reference", installed / "published")
    shutil.copy(Path(reference.__file__), installed)
    spec = importlib.util.spec_from_file_location("installed_reference", installed / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.reference_folder() == installed / "published"
    assert len(module.published("table3")) == len(published("table3"))


def test_an_unknown_published_file_names_the_known_ones() -> None:
    with pytest.raises(KeyError, match="table2, table3"):
        published("table5")


# --- which runs ---------------------------------------------------------------------------------------


def test_a_family_is_its_members_each_at_its_own_loop_count(results: Path) -> None:
    found = collect(results)
    assert found.name == "toy"
    labels = {loops: one.manifest.model.label for loops, one in found.diagnoses.items()}
    assert labels == {1: "toy:r1", 2: "toy:r2", 3: "toy:r3", 4: "toy:r4"}
    assert any("drawn for toy (4 diagnoses)" in note and "toy:r3" in note for note in found.notes)


def test_one_checkpoint_at_several_loop_counts_goes_by_its_label(results: Path) -> None:
    found = collect(results, ["toy:r3"])
    assert {one.manifest.model.label for one in found.diagnoses.values()} == {"toy:r3"}
    assert [*found.diagnoses] == [3, 4]


def test_what_is_drawn_is_told_from_what_is_stored(tmp_path: Path) -> None:
    for started, data in enumerate(("python", "trace", "trace")):
        write_diagnosis(tmp_path, "toy:r2", 2, data=data, started=started)
    write_diagnosis(tmp_path, "toy:r3", 3, data="trace", started=9)
    found = collect(tmp_path)
    assert list(found.diagnoses) == [2, 3]
    assert found.notes[0] == "drawn for toy (2 of 4 diagnoses); --model chooses another: toy:r2, toy:r3"
    assert found.notes[1].startswith("diagnoses left out because they repeat or do not compare: ")
    assert len(collect(tmp_path, ["toy"]).notes) == 1, "who names a model is not told which"


def test_results_may_be_the_runs_folder_itself(results: Path) -> None:
    assert [*collect(results / "runs").diagnoses] == [1, 2, 3, 4]


def test_diagnoses_on_other_data_or_wiring_are_not_mixed_and_are_named(tmp_path: Path) -> None:
    for loops in (1, 2, 3):
        write_diagnosis(tmp_path / "runs", loops=loops)
    others = [
        write_diagnosis(tmp_path / "runs", loops=4, data="poems", started=50),
        write_diagnosis(tmp_path / "runs", loops=4, loop_mode="sequential", started=51),
    ]
    found = collect(tmp_path)
    assert [*found.diagnoses] == [1, 2, 3]
    assert all(any(other.name in note for note in found.notes) for other in others)


def test_of_equal_diagnoses_the_most_complete_then_the_newest_counts(tmp_path: Path) -> None:
    write_diagnosis(tmp_path / "runs", loops=2, started=0)
    newest = write_diagnosis(tmp_path / "runs", loops=2, started=5)
    write_diagnosis(tmp_path / "runs", loops=2, started=9, measurements=["step_size"])
    assert collect(tmp_path).diagnoses[2].path == newest


def test_an_incomplete_diagnosis_is_left_out_and_named(tmp_path: Path) -> None:
    write_diagnosis(tmp_path / "runs", loops=2)
    cut = write_diagnosis(tmp_path / "runs", loops=3, started=1, status="incomplete")
    found = collect(tmp_path)
    assert [*found.diagnoses] == [2]
    assert any(cut.name in note and "not complete" in note for note in found.notes)


def test_a_damaged_run_is_warned_of_and_left_out(tmp_path: Path, cli: Cli) -> None:
    write_diagnosis(tmp_path / "runs", loops=2)
    (write_diagnosis(tmp_path / "runs", loops=3) / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest"):
        collect(tmp_path)
    code, _, err = cli("figures", "--results", tmp_path, "--out", tmp_path / "out", "--only", "table3")
    assert code == 0
    assert "warning" in err
    assert "manifest.json" in err


def test_the_bundled_study_gives_table_2(tmp_path: Path) -> None:
    shutil.copytree(PROJECT / "results" / "plt-tiny", tmp_path / "plt-tiny")
    found = collect(tmp_path)
    table = benchmark_table(found)
    study = json.loads((tmp_path / "plt-tiny" / "study.json").read_text())
    own = table.data[(table.data["origin"] == "own") & (table.data["quantity"] == "python: held-out bits per byte")]
    assert [*own["value"]] == [row["heldout"]["python"]["bits_per_byte"]["value"] for row in study["summary"]]
    exact = table.data[(table.data["origin"] == "own") & (table.data["quantity"] == "trace.exact")]
    assert [*exact["value"]] == pytest.approx(
        [100 * row["metrics"]["trace.exact"]["value"] for row in study["summary"]]
    )
    assert set(own["source"]) == {"study plt-tiny"}


def test_a_study_of_other_weights_is_not_mixed_with_evaluations(tmp_path: Path) -> None:
    shutil.copytree(PROJECT / "results" / "plt-tiny", tmp_path / "plt-tiny")
    evaluate(tmp_path, "plt-tiny:r2", 2)
    own = benchmark_table(collect(tmp_path, ["plt-tiny"])).data
    assert {*own[own["origin"] == "own"]["quantity"]} == {"sums.right", "sums.weighted"}
    study = json.loads((tmp_path / "plt-tiny" / "study.json").read_text())
    shutil.rmtree(tmp_path / "runs")
    weights = next(one["weights_sha256"] for one in study["variants"] if one["loops"] == 2)
    evaluate(tmp_path, "plt-tiny:r2", 2, weights_sha256=weights)
    own = benchmark_table(collect(tmp_path, ["plt-tiny"])).data
    assert {"sums.right", "trace.exact", "python: held-out bits per byte"} <= {*own["quantity"]}


# --- figures ------------------------------------------------------------------------------------------


def prepared(figure: LoopFigure, results: Path) -> pd.DataFrame:
    found = collect(results, ["toy"])
    return figure.prepare(found.diagnoses, found.name)


@MEANS
def test_own_rows_are_the_default_variants_means_over_all_layers(figure: LoopFigure, results: Path) -> None:
    own = prepared(figure, results).query("origin == 'own' and measurement in @DEFAULTS")
    assert {*own["model"]} == {"toy"}
    assert {*own["n"]} == {SAMPLES}
    for row in own.itertuples():
        assert row.variant == DEFAULTS[row.measurement]
        assert row.value == pytest.approx(mean(row.measurement, row.loops, row.loop), rel=0.1, abs=0.05)
        assert row.low <= row.value <= row.high
    assert not own.duplicated(["loops", "loop", "measurement"]).any()
    summary = open_diagnosis(next((results / "runs").glob("*toy-r4-r4*"))).summary()
    row = own[(own["loops"] == 4) & (own["loop"] == 3)].iloc[0]
    same = summary[(summary["measurement"] == row["measurement"]) & (summary["loop"] == 3)]
    same = same[same["layer"].isna() & (same["variant"] == row["variant"])]
    assert [*same["value"]] == [row["value"]]


@EACH
def test_published_rows_are_the_papers_and_only_those(figure: LoopFigure, results: Path) -> None:
    data = prepared(figure, results)
    assert {*data["origin"]} <= {"own", "published"}
    printed = data[data["origin"] == "published"]
    known = pd.concat([published(name) for name in reference.NAMES])
    for row in printed.itertuples():
        match = known[(known["quantity"] == row.measurement) & (known["value"] == row.value)]
        assert len(match) >= 1, row
    assert not {*printed["model"]} & {"toy"}
    assert printed[["low", "high", "n"]].isna().all(axis=None)
    own = data[data["origin"] == "own"]
    assert not own["value"].isin(published("table3")["value"]).any()


def test_loop_one_is_not_where_it_is_not_defined(results: Path) -> None:
    own = prepared(FIGURES["fig3"], results).query("origin == 'own'")
    assert own["loop"].min() == 2
    assert {*own["loops"]} == {2, 3, 4}


def test_the_ratio_is_cost_over_gain(results: Path) -> None:
    own = prepared(FIGURES["fig3"], results).query("origin == 'own' and loops == 4").set_index(["measurement", "loop"])
    for loop in (2, 3, 4):
        ratio = own.loc[("offset_cost", loop), "value"] / own.loc[("output_shift", loop), "value"]
        assert own.loc[("offset_cost_over_output_shift", loop), "value"] == pytest.approx(ratio)


def test_heads_are_means_over_layers_and_pairs_of_different_heads(results: Path) -> None:
    data = prepared(FIGURES["fig4"], results).query("origin == 'own'")
    assert {*data["loops"]} == {3}, "the paper shows its three-loop model"
    cells = data[(data["measurement"] == CELL) & (data["loop"] == 2)]
    assert len(cells) == HEADS_EACH**2
    cell = cells[(cells["head_i"] == 0) & (cells["head_j"] == 3)]["value"].iloc[0]
    assert cell == pytest.approx(0.2 + 0.025 + 0.06)
    pairs = [0.2 + 0.025 + 0.02 * abs(i - j) for i in range(4) for j in range(4) if i != j]
    found = data[(data["measurement"] == MEAN) & (data["loop"] == 2)]["value"].iloc[0]
    assert found == pytest.approx(np.mean(pairs))


def test_heads_of_the_most_loops_where_three_were_not_run(tmp_path: Path) -> None:
    write_diagnosis(tmp_path, loops=2)
    found = collect(tmp_path)
    data = FIGURES["fig4"].prepare(found.diagnoses, found.name).query("origin == 'own'")
    assert {*data["loops"]} == {2}


def test_shares_are_percents_of_a_hundred_from_three_loops_on(results: Path) -> None:
    own = prepared(FIGURES["fig7"], results).query("origin == 'own'")
    assert {*own["loops"]} == {3, 4}
    assert {*own["measurement"]} == {*LENSES}
    assert [*own.groupby(["loops", "measurement"])["value"].sum()] == pytest.approx([100.0] * 6)


@pytest.mark.parametrize(
    ("name", "loops", "measurements", "words"),
    [
        ("fig2", [1], tuple(DEFAULTS), "2 or more loops"),
        ("fig7", [1, 2], tuple(DEFAULTS), "3 or more loops"),
        ("fig3", [2], ("output_shift",), "no offset_cost"),
        ("fig7", [3], ("step_size",), "no output_shift and no attention_kl and no peak_loop"),
        ("fig7", [3], ("output_shift", "peak_loop"), "no attention_kl"),
        ("fig6", [2], ("output_shift", "offset_cost"), "no logit_lens_rank and no output_entropy"),
    ],
)
def test_what_is_missing_is_said(
    name: str, loops: list[int], measurements: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    for count in loops:
        write_diagnosis(tmp_path, loops=count, measurements=measurements)
    found = collect(tmp_path)
    with pytest.raises(NoData, match=words):
        FIGURES[name].prepare(found.diagnoses, found.name)


def test_a_diagnosis_that_measured_less_stands_beside_others(tmp_path: Path) -> None:
    write_diagnosis(tmp_path, loops=3)
    write_diagnosis(tmp_path, loops=4, measurements=["output_shift", "step_size"])
    found = collect(tmp_path)
    for name in ("fig2", "fig3", "fig7"):
        data = FIGURES[name].prepare(found.diagnoses, found.name)
        with style.drawing():
            FIGURES[name].draw(data)
        assert 3 in {*data.query("origin == 'own'")["loops"]}


def test_a_models_name_never_breaks_a_headline(tmp_path: Path) -> None:
    write_diagnosis(tmp_path, label="a$b_{" + "x" * 80 + "$", loops=2)
    found = collect(tmp_path)
    with style.drawing():
        canvas = FIGURES["fig5"].draw(FIGURES["fig5"].prepare(found.diagnoses, found.name))
    assert style.to_bytes(style.root_figure(canvas), "svg")
    assert "…" in canvas.get_suptitle()


def test_a_model_without_a_gate_still_has_figure_5(tmp_path: Path) -> None:
    write_diagnosis(tmp_path, loops=2, measurements=["attention_entropy", "attention_kl"])
    found = collect(tmp_path)
    with style.drawing():
        canvas = FIGURES["fig5"].draw(FIGURES["fig5"].prepare(found.diagnoses, found.name))
    assert any("no gate" in text.get_text() for axes in canvas.axes for text in axes.texts)


@EACH
def test_published_numbers_are_drawn_grey_open_and_labelled(figure: LoopFigure, results: Path) -> None:
    data = prepared(figure, results)
    with style.drawing():
        canvas = figure.draw(data)
    own = {round(float(value), 9) for value in data[data["origin"] == "own"]["value"]}
    grey_lines = 0
    for axes in canvas.axes:
        lines = [line for line in axes.get_lines() if line.get_marker() not in ("None", None, "")]
        grey = [line for line in lines if line.get_color() == style.PUBLISHED]
        grey_lines += len(grey)
        for line in lines:
            drawn = {round(float(value), 9) for value in np.asarray(line.get_ydata(), float)}
            assert drawn <= own or line in grey
            assert not drawn & own or line not in grey
        for line in grey:
            assert line.get_markerfacecolor() == "white"
            assert LABEL in axes.get_title() + str(line.get_label())
        assert not grey or len(grey) == len(lines) or figure.name == "fig4", "only cosines share a scale"
    titles = [axes.get_title() for axes in canvas.axes]
    printed = data[data["origin"] == "published"]
    assert grey_lines > 0 or figure.name == "fig7" or printed.empty
    assert figure.name != "fig7" or sum(LABEL in title for title in titles) == 1


@EACH
def test_figures_draw_into_a_figure_that_is_given(figure: LoopFigure, results: Path) -> None:
    data = prepared(figure, results)
    with style.drawing():
        page = style.new_figure(10, 10)
        part = page.subfigures(2, 1)[1]
        assert figure.draw(data, part) is part  # type: ignore[call-arg]
    assert style.root_figure(part) is page
    assert len(page.axes) == len(part.axes) > 0


def test_loop_counts_differ_in_more_than_colour() -> None:
    looks = [style.look(number) for number in range(1, 8)]
    for part in ("colour", "marker", "line", "hatch"):
        assert len({str(getattr(look, part)) for look in looks}) == len(looks), part


def test_no_label_is_cut_off_or_covers_another(results: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for figure in FIGURES.values():
        with style.drawing():
            canvas = style.root_figure(figure.draw(prepared(figure, results)))
            agg = FigureCanvasAgg(canvas)
            agg.draw()
            frame = canvas.bbox
            labels = [axes.title for axes in canvas.axes] + [axes.yaxis.label for axes in canvas.axes]
            labels += [axes.xaxis.label for axes in canvas.axes]
            boxes = [(text, text.get_window_extent()) for text in labels if text.get_text() and text.get_visible()]
        for text, box in boxes:
            assert frame.x0 <= box.x0 + 1, (figure.name, text)
            assert box.x1 <= frame.x1 + 1, (figure.name, text)
            assert frame.y0 <= box.y0 + 1, (figure.name, text)
            assert box.y1 <= frame.y1 + 1, (figure.name, text)
            for other, its in boxes:
                assert other is text or not box.overlaps(its), (figure.name, text, other)


# --- bytes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", style.FORMATS)
def test_a_figure_is_the_same_bytes_whatever_the_users_settings(
    form: str, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepared(FIGURES["fig5"], results)

    def drawn() -> bytes:
        with style.drawing():
            canvas = FIGURES["fig5"].draw(data)
        return style.to_bytes(style.root_figure(canvas), form)

    first = drawn()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "svg.hashsalt": "x"}):
        assert drawn() == first
    assert not re.search(rb"CreationDate|Producer|Software|dc:date", first)


def test_a_pdf_embeds_its_fonts(results: Path) -> None:
    with style.drawing():
        canvas = FIGURES["fig5"].draw(prepared(FIGURES["fig5"], results))
    pdf = style.to_bytes(style.root_figure(canvas), "pdf")
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf


def test_svgs_of_one_page_share_no_ids(results: Path) -> None:
    def inline(name: str) -> ElementTree.Element:
        with style.drawing():
            canvas = FIGURES["fig5"].draw(prepared(FIGURES["fig5"], results))
        text = style.inline_svg(style.root_figure(canvas), name, 'of "a" & <b>')
        assert text.startswith("<svg ")
        references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
        assert references <= set(re.findall(r'\bid="([^"]+)"', text))
        assert references
        return ElementTree.fromstring(text)

    first, second = inline("a"), inline("b")
    ids = [{node.get("id") for node in svg.iter() if node.get("id")} for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert first.get("aria-label") == 'of "a" & <b>'


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="pdf, png, svg"):
        style.to_bytes(style.new_figure(1, 1), "gif")


# --- tables -------------------------------------------------------------------------------------------


def test_signatures_have_own_and_published_numbers_in_blocks_of_their_own(results: Path) -> None:
    found = collect(results, ["toy"])
    table = signature_table(found)
    own, printed = table.blocks
    assert own.title.startswith("own: toy")
    assert LABEL in printed.title
    assert [row[0] for row in own.rows] == ["R=2, r=2", "R=3, r=2", "R=3, r=3", "R=4, r=2", "R=4, r=3", "R=4, r=4"]
    assert printed.rows[0] == ("R=4, r=2", "846", "1.75", "174.6", "-0.72")
    assert not any("846" in cell for row in own.rows for cell in row)
    data = table.data
    assert {*data[data["origin"] == "published"]["source"]} == {"2606.18023"}
    ids = {one.manifest.run_id for one in found.diagnoses.values()}
    assert {*data[data["origin"] == "own"]["source"]} <= ids


@pytest.mark.parametrize("others", [{"api": "chat"}, {"api": "completions", "agent": {"steps": 9}}])
def test_runs_that_were_asked_otherwise_do_not_compare(tmp_path: Path, others: dict[str, Any]) -> None:
    for loops in (1, 2):
        evaluate(tmp_path, f"toy:r{loops}", loops, api="completions")
    evaluate(tmp_path, "toy:r4", 4, **others)
    found = collect(tmp_path)
    assert [*found.runs["sums"]] == [1, 2]
    assert any("left out" in note for note in found.notes)


def test_benchmarks_of_evaluations_stand_by_loop_count(tmp_path: Path) -> None:
    for loops in (1, 2):
        evaluate(tmp_path, f"toy:r{loops}", loops)
    evaluate(tmp_path, "toy:r4", 4, problems=7)
    found = collect(tmp_path)
    table = benchmark_table(found)
    own, printed = table.blocks
    assert own.heads == ("loops", "sums.right (%)", "sums.weighted (%)")
    assert [row[0] for row in own.rows] == ["R=1", "R=2"], "the run on fewer problems does not compare"
    metrics = found.runs["sums"][2].metrics()
    assert metrics is not None
    right = metrics.metrics["right"]
    assert own.rows[1][1] == f"{100 * right.value:.1f} [{100 * right.low:.1f}, {100 * right.high:.1f}]"
    assert len(printed.rows) == 18
    assert printed.rows[1][:3] == ("LoopCoder-v2, R=2", "84.1", "73.9")
    assert any("left out" in note for note in found.notes)


def test_instruct_against_thinking_needs_a_pair(tmp_path: Path) -> None:
    evaluate(tmp_path, "Coder-Instruct", 2)
    alone = thinking_table(collect(tmp_path))
    assert [block.origin for block in alone.blocks] == ["published"]
    assert "There are no own numbers" in alone.markdown()
    evaluate(tmp_path, "Coder-Thinking", 2)
    evaluate(tmp_path, "Other-Thinking", 2)
    evaluate(tmp_path, "Coder-Thinkingly", 2)
    both = thinking_table(collect(tmp_path))
    own, printed = both.blocks
    assert both.missing is None
    assert own.title == "own: coder, R=2 (%)"
    assert own.heads == ("benchmark", "instruct", "thinking")
    assert len(own.rows) == 2
    assert printed.rows[0] == ("LiveCodeBench", "35.4", "62.3")
    assert {*both.data[both.data["origin"] == "own"]["model"]} == {"Coder-Instruct", "Coder-Thinking"}


@given(st.text(alphabet="ab%&_#${}~^\\±`", max_size=30))
def test_latex_has_no_character_that_means_something(text: str) -> None:
    written = _tex(text)
    for known in (r"\textbackslash{}", r"\textasciitilde{}", r"\textasciicircum{}", r"$\pm$"):
        written = written.replace(known, "")
    assert not re.search(r"(?<!\\)[%&_#${}~^]", written)
    assert not re.search(r"\\(?![%&_#${}])", written)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_whole_in_every_form(name: str, results: Path) -> None:
    table = TABLES[name](collect(results, ["toy"]))
    for line in table.markdown().splitlines():
        assert not line.startswith("|") or line.count(" | ") + 1 in {len(block.heads) for block in table.blocks}
    latex = table.latex()
    assert latex.count("\\begin{tabular}") == latex.count("\\end{tabular}") == len(table.blocks)
    assert latex.count("{") == latex.count("}")
    assert {*pd.read_csv(pd.io.common.StringIO(table.csv()))["origin"]} >= {"published"}


# --- the command --------------------------------------------------------------------------------------


def test_the_command_writes_the_same_bytes_again(results: Path, tmp_path: Path, cli: Cli) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    asked = ["figures", "--results", results, "--model", "toy", "--format", "pdf", "--out"]
    code, text, err = cli(*asked, first, "--only", "fig2,fig7,table2,table3,table4")
    assert (code, err) == (0, "")
    assert "fig2.{pdf,csv}" in text
    names = sorted(path.name for path in first.iterdir())
    figures = [f"fig{n}.{form}" for n in (2, 7) for form in ("csv", "pdf")]
    tables = [f"table{n}.{form}" for n in (2, 3, 4) for form in ("csv", "md", "tex")]
    assert names == sorted([*figures, *tables, "sources.json"])
    assert cli(*asked, again, "--only", "table4,fig7,table2,table3")[0] == 0
    for path in again.iterdir():
        assert path.read_bytes() == (first / path.name).read_bytes(), path.name
    assert {path.name for path in again.iterdir()} == {"fig7.pdf", "fig7.csv", *tables, "sources.json"}
    for name in ("fig2", "fig7"):
        table = prepared(FIGURES[name], results).to_csv(index=False, float_format="%.10g", lineterminator="\n")
        assert (first / f"{name}.csv").read_text() == table
    assert [*json.loads((first / "sources.json").read_text())["diagnoses"]] == ["1", "2", "3", "4"]


def test_missing_runs_leave_figures_out_with_the_command_that_makes_them(tmp_path: Path, cli: Cli) -> None:
    write_diagnosis(tmp_path / "runs", "toy:r2", 2)
    out = tmp_path / "out"
    out.mkdir()
    (out / "fig7.pdf").write_text("old")
    code, text, err = cli("figures", "--results", tmp_path, "--model", "toy", "--out", out, "--only", "fig7,table2")
    assert (code, err) == (0, "")
    line = next(line for line in text.splitlines() if line.startswith("fig7 left out"))
    assert "plt-eval diagnose --model toy --loops 1-4" in line
    assert "fig7.pdf" in line, "an older file must not pass for a new one"
    assert not (out / "fig7.csv").exists()
    assert "table2 holds published numbers only" in text
    assert "plt-eval run --suite trace --model toy --loops 1-4" in text


def test_results_without_runs_still_give_the_published_tables(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "empty").mkdir()
    code, text, _ = cli("figures", "--results", tmp_path / "empty", "--out", tmp_path / "out")
    assert code == 0
    assert text.count("left out") == 6
    assert {*pd.read_csv(tmp_path / "out" / "table3.csv")["origin"]} == {"published"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "fig33"], ["--only 'fig33'", "did you mean fig3?"]),
        (["--only", "fig3,"], ["--only ''", "fig2, fig3"]),
        (["--format", "pgn"], ["--format 'pgn'", "did you mean png?"]),
        (["--model", "toi"], ["--model toi", "did you mean toy?"]),
        (["--results", "nowhere"], ["--results nowhere", "no such folder"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_bad_flags_are_one_line(
    arguments: list[str], words: list[str], results: Path, tmp_path: Path, cli: Cli
) -> None:
    given = ["--results", str(results), "--out", str(tmp_path / "out"), *arguments]
    code, out, err = cli("figures", *given)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file_is_one_line(results: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, err = cli("figures", "--results", results, "--out", tmp_path / "file", "--only", "table4")
    assert code == 2
    assert "--out" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_help_loads_nothing_heavy() -> None:
    import subprocess

    heavy = "{'torch', 'pandas', 'matplotlib'}"
    code = f"import sys; from plt_eval.cli import main; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_real_diagnoses_of_the_bundled_family_are_drawn(tmp_path: Path, cli: Cli) -> None:
    runs = ["--results", tmp_path / "runs", "--samples", "9", "--sequence-length", "48"]
    code, _, err = cli("diagnose", "--model", "plt-tiny", "--loops", "1,3", *runs, "--device", "cpu")
    assert code == 0, err
    only = ["--only", "fig2,fig4", "--format", "svg"]
    code, text, err = cli("figures", "--results", tmp_path, "--out", tmp_path / "out", *only)
    assert (code, err) == (0, "")
    assert "drawn for plt-tiny" in text
    for name in ("fig2", "fig4"):
        ElementTree.parse(tmp_path / "out" / f"{name}.svg")
    found = collect(tmp_path)
    for figure in FIGURES.values():
        own = figure.prepare(found.diagnoses, found.name).query("origin == 'own'")
        assert {*own["model"]} == {"plt-tiny"}
        assert {*own["n"]} == {9}
    summary = found.diagnoses[3].summary()
    drawn = pd.read_csv(tmp_path / "out" / "fig2.csv")
    drawn = drawn.query("measurement == 'step_size' and loops == 3 and origin == 'own'")
    rows = summary[(summary["measurement"] == "step_size") & (summary["variant"] == "raw") & summary["position"].isna()]
    assert [*drawn["value"]] == pytest.approx([*rows.sort_values("loop")["value"]])
