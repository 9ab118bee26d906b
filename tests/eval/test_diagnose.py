"""Diagnoses: real measurements of a small checkpoint, stopped and killed anywhere, and what is on disk afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pyarrow import parquet
from rich.console import Console
from safetensors.torch import load_file, save_file

from plt_diagnostics import MEASUREMENTS, MeasurementError, measure
from plt_eval.corpus.documents import Document, Rejected
from plt_eval.diagnosis import run as running
from plt_eval.diagnosis import writer as writing
from plt_eval.diagnosis.memory import PeakMemory
from plt_eval.diagnosis.records import DiagnosisIdentity
from plt_eval.diagnosis.run import DiagnosisInterrupted, Result, Settings, _pad, diagnose
from plt_eval.diagnosis.samples import Drawn, TextCorpus, draw
from plt_eval.diagnosis.store import HEADS, LOOPS, PARTS, SUMMARY, Diagnosis, list_diagnoses, open_diagnosis
from plt_eval.diagnosis.subject import Subject
from plt_eval.diagnosis.table import headline, loop_tables, number, warnings
from plt_eval.diagnosis.writer import DiagnosisWriter
from plt_eval.errors import UserError
from plt_eval.journal import DiskFull, Journal
from plt_eval.models import ResolvedModel
from plt_eval.store import MANIFEST, METRICS, SAMPLES, list_runs, open_run, run_kind

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "plt" / "a_r2_w4"
FINAL = (LOOPS, HEADS, SUMMARY, METRICS)
KEYS = ["sample", "loop", "measurement", "variant", "layer", "position"]
WORDS = [" ".join(map(str, range(3 * i, 5 * i))) or "a" for i in range(11)]
"""From one character to some hundred and thirty."""


def corpus() -> TextCorpus:
    def read() -> Iterator[Document | Rejected]:
        for place, text in enumerate(WORDS):
            yield Document(f"#{place}", text, "", len(text))

    return TextCorpus("words", "words", False, read)


def samples(length: int = 24, **changes: Any) -> Drawn:
    options = {"tokenizer": "bytes", "samples": 99, "sequence_length": length, **changes}
    return draw([corpus()], **options)


def subject(folder: Path = CHECKPOINT, loops: int | None = None, **changes: Any) -> Subject:
    return Subject.of(ResolvedModel(folder, "x", loops), device="cpu", **{"notify": lambda _: None, **changes})


def go(results: Path, drawn: Drawn | None = None, of: Subject | None = None, **changes: Any) -> Result:
    settings = Settings(**{"results": results, "batch_size": 4, "command": ("plt-eval", "diagnose"), **changes})
    return diagnose(of or subject(), drawn or samples(), settings, console=Console(stderr=True, width=200))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Diagnosis:
    """A diagnosis that nothing interrupted."""
    return go(tmp_path_factory.mktemp("whole")).diagnosis


def final(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FINAL}


def same_numbers(left: pd.DataFrame, right: pd.DataFrame) -> None:
    """Equal rows, values alike but for rounding."""
    left, right = (table.sort_values(KEYS).reset_index(drop=True) for table in (left, right))
    pd.testing.assert_frame_equal(left, right, check_categorical=False, rtol=2e-4, atol=2e-4)


# --- what comes out -----------------------------------------------------------------------------------------


def test_every_row_is_that_of_its_own_sample(finished: Diagnosis) -> None:
    """Measured alone, without padding, each sample gives the same numbers."""
    model = subject().open()
    alone = [
        measure(model, *_pad([sample]), [sample.index]).rows.to_pandas() for sample in samples().samples
    ]  # fmt: skip
    expected = pd.concat(alone).astype({"layer": "Int16", "position": "Int32"})
    for table in (expected, found := finished.rows()):
        for name in ("measurement", "variant"):
            table[name] = table[name].astype(str)
    same_numbers(found, expected)
    order = {name: place for place, name in enumerate(MEASUREMENTS)}
    keys = [found["sample"], found["loop"], found["measurement"].map(order), found["variant"]]
    keys += [found[name].fillna(-1) for name in ("layer", "position")]
    rows = list(zip(*keys, strict=True))
    assert rows == sorted(rows), "in an order that does not depend on the batches"
    assert {*finished.rows(["gate"])["measurement"]} == {"gate"}


def test_the_manifest_says_what_was_measured(finished: Diagnosis) -> None:
    manifest, drawn = finished.manifest, samples()
    assert finished.state() == manifest.status == "complete"
    assert (manifest.loops, manifest.model.trained_loops, manifest.adapter, manifest.shifts) == (2, 2, "plt", True)
    assert manifest.model.parameters == sum(t.numel() for t in load_file(CHECKPOINT / "model.safetensors").values())
    assert manifest.measurements == tuple(MEASUREMENTS)
    assert (manifest.defaults["step_size"], manifest.defaults["offset_cost"]) == ("raw", "normed")
    assert (manifest.total, manifest.done, manifest.tokens) == (11, 11, drawn.tokens)
    assert manifest.data.sha256 == manifest.identity.data_sha256 == drawn.sha256
    assert manifest.seconds == pytest.approx(sum(line.seconds for line in finished.samples()))
    # 0 where a process has enough to spare of what earlier tests took.
    assert manifest.peak_memory_bytes is None or 0 <= manifest.peak_memory_bytes < 1 << 32
    assert [line.index for line in finished.samples()] == list(range(11))
    assert [line.sha256 for line in finished.samples()] == [sample.sha256 for sample in drawn.samples]
    assert manifest.sessions[0].packages["plt-eval"]
    assert sorted(path.name for path in finished.path.iterdir() if not path.name.startswith("lock")) == sorted(
        [*FINAL, MANIFEST, SAMPLES]
    ), "the parts are gone"


def test_summary_and_metrics_are_of_the_rows(finished: Diagnosis) -> None:
    rows, summary, metrics = finished.rows(), finished.summary(), finished.metrics()
    assert metrics is not None
    whole = rows[rows["layer"].isna() & rows["position"].isna()]
    means = whole.groupby(["measurement", "variant", "loop"], observed=True)["value"].mean()
    assert len(metrics.rows) == len(means)
    for row in metrics.rows:
        assert row.value == pytest.approx(means[row.measurement, row.variant, row.loop])
        assert row.low is not None
        assert row.high is not None
        assert row.low <= row.value <= row.high
    assert [row.measurement for row in metrics.rows] == sorted(
        (row.measurement for row in metrics.rows), key=list(MEASUREMENTS).index
    )
    cell = summary.query("measurement == 'gate' and layer == 1")
    expected = rows[(rows["measurement"] == "gate") & (rows["layer"] == 1)]["value"].mean()
    assert cell["value"].tolist() == [pytest.approx(expected)]
    assert summary["position"].max() == 16


def test_tables_show_the_default_variants(finished: Diagnosis) -> None:
    metrics = finished.metrics()
    assert metrics is not None
    values = {(row.measurement, row.variant, row.loop): row.value for row in metrics.rows}
    shown = 0
    for table in loop_tables([finished]):
        for column in table.columns[2:]:
            name = str(column.header).replace(" ", "_")
            for loop, cell in enumerate(column.cells, start=1):
                value = values.get((name, finished.manifest.defaults[name], loop))
                assert str(cell).partition("\n")[0] == ("-" if value is None else number(value))
                shown += value is not None
    assert shown > 20


def test_heads_are_means_over_all_samples(finished: Diagnosis) -> None:
    model, tables = subject().open(), []
    for sample in samples().samples:
        tables.append(measure(model, *_pad([sample]), [0], ["head_cosine"]).heads.table().to_pandas())
    keys = ["loop", "layer", "head_i", "head_j"]
    expected = pd.concat(tables).groupby(keys)["cosine"].mean()
    found = finished.heads().set_index(keys)
    assert len(found) == len(expected) == 2 * 3 * 4 * 4
    assert found["cosine"].to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-4)
    assert set(found["count"]) == {11}


def test_batches_change_nothing_but_rounding(finished: Diagnosis, tmp_path: Path) -> None:
    for size in (1, 3, None):
        found = go(tmp_path / str(size), batch_size=size).diagnosis
        assert found.path.name == finished.path.name, "and are no part of the identity"
        same_numbers(found.rows(), finished.rows())
        np.testing.assert_allclose(found.heads()["cosine"], finished.heads()["cosine"], atol=1e-4)


def test_some_measurements_alone(finished: Diagnosis, tmp_path: Path) -> None:
    found = go(tmp_path, measurements=("gate", "step_size")).diagnosis
    assert found.manifest.measurements == ("step_size", "gate")
    assert set(found.manifest.defaults) == {"step_size", "gate"}
    wanted = finished.rows(["gate", "step_size"])
    same_numbers(found.rows(), wanted[wanted["measurement"].isin(["gate", "step_size"])])
    assert found.heads().empty
    with pytest.raises(MeasurementError, match="did you mean step_size"):
        go(tmp_path, measurements=("stepsize",))


def test_one_loop_has_no_second(tmp_path: Path) -> None:
    found = go(tmp_path, of=subject(loops=1), measurements=("output_shift",)).diagnosis
    assert found.rows().empty
    assert found.manifest.status == "complete"
    assert headline(found) == "-"
    (table,) = loop_tables([found])
    assert table.row_count == 1


def test_another_loop_count_than_that_of_the_training_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    found = go(tmp_path, of=subject(loops=3, notify=said.append)).diagnosis
    assert found.manifest.loops == 3
    assert found.manifest.model.trained_loops == 2
    assert any("3 loops" in line for line in said), said


# --- the run directory beside others ------------------------------------------------------------------------


def test_lists_hold_their_own_kind(finished: Diagnosis, tmp_path: Path) -> None:
    assert run_kind(finished.path) == "diagnosis"
    root = finished.path.parent
    assert list_runs(root) == []
    assert [one.manifest for one in list_diagnoses(root)] == [finished.manifest]
    with pytest.raises(UserError, match="is a diagnosis"):
        open_run(finished.path)
    with pytest.raises(UserError, match="not a run directory"):
        open_diagnosis(tmp_path)
    shutil.copytree(finished.path, tmp_path / "copy")
    manifest = json.loads((tmp_path / "copy" / MANIFEST).read_text())
    (tmp_path / "copy" / MANIFEST).write_text(json.dumps(manifest | {"schema_version": 99}))
    problems: list[UserError] = []
    assert list_diagnoses(tmp_path, problem=problems.append) == []
    assert "schema version 99" in str(problems[0])
    assert list_runs(tmp_path, problem=problems.append) == []
    assert len(problems) == 1


def test_what_is_complete_is_only_read(finished: Diagnosis, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.path.iterdir() if "lock" not in path.name}
    monkeypatch.setattr(running, "measure", None)
    monkeypatch.setattr(Subject, "open", None)
    again = go(finished.path.parent)
    assert again.reused
    assert again.diagnosis.manifest == finished.manifest
    assert {path: path.stat().st_mtime_ns for path in before} == before


IDENTITY = {
    "model": {"of": lambda: replace(subject(), label="y")},
    "weights_sha256": {"of": lambda: replace(subject(), weights_sha256="0")},
    "config_sha256": {"of": lambda: replace(subject(), config={**subject().config, "rope_theta": 1})},
    "loops": {"of": lambda: subject(loops=1)},
    "loop_mode": {"of": lambda: subject(loop_mode="sequential")},
    "dtype": {"of": lambda: subject(dtype="bfloat16")},
    "measurements": {"measurements": ("gate",)},
    "measurements_version": {"version": 0},
    "data": {"drawn": lambda: replace(samples(), name="other")},
    "data_sha256": {"drawn": lambda: samples(samples=8), "also": {"samples"}},
    "tokenizer_sha256": {"drawn": lambda: replace(samples(), tokenizer_sha256="0")},
    "sequence_length": {"drawn": lambda: samples(23), "also": {"data_sha256"}},
    "samples": {"drawn": lambda: samples(samples=3), "also": {"data_sha256"}},
    "seed": {"drawn": lambda: samples(seed=1), "also": {"data_sha256"}},
}


@pytest.mark.parametrize("name", IDENTITY)
def test_every_ingredient_gives_another_directory_and_is_named(
    finished: Diagnosis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shutil.copytree(finished.path, tmp_path / "mine")
    monkeypatch.setattr(running, "measure", None)
    assert go(tmp_path, run_id="mine").reused
    change = {key: value() if callable(value) else value for key, value in IDENTITY[name].items()}
    also = change.pop("also", set())
    monkeypatch.setattr(running, "VERSION", change.pop("version", running.VERSION))
    with pytest.raises(UserError, match="mine holds another run; what differs: ") as caught:
        go(tmp_path, run_id="mine", **change)
    differing = {
        part.partition(":")[0].strip() for part in str(caught.value).split("what differs: ")[1].split(";")[:-1]
    }
    assert differing == {name} | also


def test_no_identity_field_escapes_the_test_above() -> None:
    assert set(IDENTITY) == set(DiagnosisIdentity.model_fields)


# --- going on -----------------------------------------------------------------------------------------------


class Stop:
    """Calls of the functions that write, counted over all of them; the call number `at` is `what` instead."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, what: Callable[[], Any]) -> None:
        self.calls, self.at, self.what = 0, at, what
        patch.setattr(writing, "write_table", self.wrapped(writing.write_table))
        patch.setattr(writing, "write_atomically", self.wrapped(writing.write_atomically))
        patch.setattr(Journal, "append", self.wrapped(Journal.append))
        patch.setattr(running, "measure", self.wrapped(running.measure))

    def wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                self.what()
            return real(*arguments)

        return call


def interrupt() -> None:
    raise KeyboardInterrupt


def calls_of_a_whole_run(tmp_path: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        stop = Stop(patch, 0, interrupt)
        go(tmp_path / "counted")
        return stop.calls


def test_stopped_before_any_write_it_goes_on_to_the_same_end(finished: Diagnosis, tmp_path: Path) -> None:
    total = calls_of_a_whole_run(tmp_path)
    assert total > 25
    for at in (*range(1, total - 8, 3), *range(total - 8, total + 1)):
        with pytest.MonkeyPatch.context() as patch:
            Stop(patch, at, interrupt)
            with pytest.raises(KeyboardInterrupt):
                go(tmp_path / str(at))
        left = list_diagnoses(tmp_path / str(at))
        if left:
            assert left[0].state() in ("incomplete", "killed")
            assert left[0].metrics() is None
            with pytest.raises(UserError, match=r"not complete, it has no loops\.parquet yet"):
                left[0].rows()
        again = go(tmp_path / str(at)).diagnosis
        assert final(again.path) == final(finished.path), at
        assert again.manifest.done == 11
        assert not (again.path / PARTS).exists()


def test_killed_anywhere_it_goes_on_to_the_same_end(finished: Diagnosis, tmp_path: Path) -> None:
    """SIGKILL, again and again, each time a little further."""
    total = calls_of_a_whole_run(tmp_path)
    results, kills, at = tmp_path / "killed", 0, 2
    while at <= total:
        if fork(lambda at=at: killed_at(at, results)) == 0:
            break
        kills += 1
        (left,) = list_diagnoses(results) or [None]
        if left is not None:
            assert left.state() == "killed"
            assert 0 <= left.done() <= 11
        at += 3
    again = go(results).diagnosis
    assert kills > 3
    assert final(again.path) == final(finished.path)
    assert again.manifest.resumed >= kills - 1


def killed_at(at: int, results: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        go(results)


def fork(work: Callable[[], None]) -> int:
    """Do it in a process of its own -> its exit code, or less the number of the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_and_says_how_far_it_got(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = running.measure, []

    def measured(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return real(*arguments)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(running, "measure", measured)
    with pytest.raises(DiagnosisInterrupted, match="stopped with 4 of 11 samples done; run the same command again"):
        go(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    (left,) = list_diagnoses(tmp_path)
    assert (left.state(), left.done(), left.manifest.done) == ("incomplete", 4, 4)
    assert left.manifest.sessions[0].ended is not None
    calls.append(1)
    go(tmp_path)
    assert len(calls) == 5, "what was done is not done again"


def test_a_batch_with_a_line_missing_is_measured_again(finished: Diagnosis, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, 7, interrupt)  # within the first batch's lines
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path)
    (folder,) = tmp_path.iterdir()
    lines = (folder / SAMPLES).read_text().splitlines()
    assert 0 < len(lines) < 4
    (folder / PARTS / "000009-loops.parquet").write_bytes(b"half")
    with DiagnosisWriter.open(tmp_path, finished.manifest.identity) as writer:
        assert writer.done == {}
        assert list((folder / PARTS).iterdir()) == []
    assert final(go(tmp_path).diagnosis.path) == final(finished.path)


def test_a_damaged_part_is_one_line(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, 20, interrupt)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path)
    (part, *_) = sorted(tmp_path.glob(f"*/{PARTS}/*-loops.parquet"))
    part.write_bytes(b"not a table")
    with pytest.raises(UserError, match=r"000001-loops\.parquet: damaged: .*; delete it to measure again"):
        go(tmp_path)
    part.unlink()
    assert go(tmp_path).diagnosis.manifest.status == "complete"


def test_two_processes_never_write_one_run(finished: Diagnosis, tmp_path: Path) -> None:
    with (
        DiagnosisWriter.open(tmp_path, finished.manifest.identity),
        pytest.raises(UserError, match=rf"is being written by another process \(pid {os.getpid()} on"),
    ):
        go(tmp_path)


def test_a_full_disk_is_one_line_and_nothing_is_lost(finished: Diagnosis, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def full() -> None:
            raise DiskFull("disk full while writing")

        Stop(patch, 12, full)
        with pytest.raises(DiskFull):
            go(tmp_path)
    assert list_diagnoses(tmp_path)[0].state() == "incomplete"
    assert final(go(tmp_path).diagnosis.path) == final(finished.path)


def test_tables_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Diagnosis) -> None:
    table = parquet.read_table(finished.path / HEADS)
    path = tmp_path / "t.parquet"
    writing.write_table(path, table)
    monkeypatch.setattr("plt_eval.journal.os.fsync", lambda _: interrupt())
    with pytest.raises(KeyboardInterrupt):
        writing.write_table(path, table.slice(0, 1))
    assert [one.name for one in tmp_path.iterdir()] == ["t.parquet"]
    assert parquet.read_table(path).equals(table)


# --- memory, and numbers that are none ------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_is_halved(
    finished: Diagnosis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes, said = running.measure, [], []

    def measured(model: Any, ids: torch.Tensor, *arguments: Any) -> Any:
        sizes.append(len(ids))
        if len(ids) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, ids, *arguments)

    monkeypatch.setattr(running, "measure", measured)
    with pytest.raises(UserError, match="out of memory at batch size 4 on cpu; try a smaller --batch-size or --seq"):
        go(tmp_path / "fixed")
    sizes.clear()
    found = go(tmp_path / "auto", of=subject(notify=said.append), batch_size=None).diagnosis
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1]
    assert said == ["out of memory at batch size 8: going on with 4", "out of memory at batch size 4: going on with 2"]
    same_numbers(found.rows(), finished.rows())


def test_long_samples_come_in_smaller_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(running.MOST_TOKENS, "cpu", 60)
    real, shapes = running.measure, []

    def measured(model: Any, ids: torch.Tensor, *arguments: Any) -> Any:
        shapes.append(tuple(ids.shape))
        return real(model, ids, *arguments)

    monkeypatch.setattr(running, "measure", measured)
    go(tmp_path, samples(99), batch_size=None)
    assert [shape[1] for shape in shapes] == sorted((shape[1] for shape in shapes), reverse=True)
    assert all(rows == 1 or rows * width <= 60 for rows, width in shapes)
    assert shapes[0][0] == 1
    assert max(rows for rows, _ in shapes) > 1


def test_peak_memory_is_what_came_on_top() -> None:
    memory = PeakMemory(torch.device("cpu"))
    memory.look()
    small = memory.peak()
    block = np.ones(40_000_000)
    memory.look()
    del block
    memory.look()
    after = memory.peak()
    assert after is not None
    assert after > 300_000_000
    assert small is None or small < 100_000_000


def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(CHECKPOINT, folder)
    weights = load_file(folder / "model.safetensors")
    token = 3 + ord("0")
    weights["model.embed_tokens.weight"][token] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = go(tmp_path / "results", of=subject(folder)).diagnosis
    drawn = samples()
    hit = {sample.index for sample in drawn.samples if token in sample.ids}
    assert 0 < len(hit) < 11
    assert {line.index for line in found.samples() if line.nonfinite} == hit
    rows = found.rows(["step_size"])
    whole = rows[rows["layer"].isna() & rows["position"].isna()]
    assert set(whole[whole["nonfinite"] > 0]["sample"]) == hit
    assert np.isfinite(whole["value"].dropna()).all()
    (line,) = warnings([found])
    assert f"in {len(hit)} of 11 samples" in line
    assert "step_size" in line


def test_a_tokenizer_of_another_model_is_one_line(tmp_path: Path) -> None:
    def read() -> Iterator[Document | Rejected]:
        yield Document("here", "\N{ROCKET}", "", 4)

    other = draw([TextCorpus("x", "x", False, read)], tokenizer="bytes", samples=1, sequence_length=9)
    with pytest.raises(UserError, match="sample here has token 243, the model's vocabulary is 199: tokenizer"):
        go(tmp_path, other)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234.5, "1234"), (234.56, "234.6"), (12.345, "12.35"), (-0.7123, "-0.712"), (0.00012, "1.2e-04")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
