"""The results store: journals, identities, locks, and reading."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_benchmarks.protocols import Metric
from plt_eval.errors import UserError
from plt_eval.journal import DiskFull, Journal, read_journal, write_atomically
from plt_eval.records import CompletionRecord, DecodingRecord, Identity, SampleRecord
from plt_eval.store import MANIFEST, SAMPLES, RunRequest, RunWriter, check_run_id, list_runs, open_run

IDENTITY = Identity(
    suite="sums+",
    suite_version="sums-1+evalplus",
    data_sha256="d" * 64,
    prompts_sha256="e" * 64,
    engine="hf",
    engine_identity={"model": "/models/My Model", "weights_sha256": "f" * 64, "loops": 2, "rope": {"theta": 1e4}},
    decoding=DecodingRecord(temperature=0.8, top_p=0.95, seed=1, max_new_tokens=None),
    n_samples=2,
    problems=3,
)
REQUEST = RunRequest(IDENTITY, total=6, data_revision="v1", data_source="here", command=("plt-eval", "run"))


def completion(sample_id: str, index: int = 0, error: str | None = None) -> CompletionRecord:
    return CompletionRecord(
        sample_id=sample_id,
        index=index,
        text="" if error else "pass",
        finish_reason="error" if error else "stop",
        chat=False,
        solution=False,
        prompt_tokens=3,
        completion_tokens=None,
        seconds=0.25,
        error=error,
        prompt_tail="def f():",
    )


def sample(sample_id: str, index: int = 0, right: bool = True, error: str | None = None) -> SampleRecord:
    values = {} if error else {"right": right, "share": 0.1}
    return SampleRecord(
        sample_id=sample_id, index=index, values=values, judged="pass", detail={"why": ["x", 1]}, error=error
    )


# --- journals -----------------------------------------------------------------------------------------


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3), max_size=6),
    data=st.data(),
)
@settings(max_examples=150)
def test_a_file_cut_at_any_byte_keeps_exactly_the_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    ends = [0]
    with Journal(path) as journal:
        for row in rows:
            journal.append(row)
            ends.append(path.stat().st_size)
    cut = data.draw(st.integers(0, ends[-1]))
    os.truncate(path, cut)
    whole = sum(end <= cut for end in ends) - 1
    assert [row for _, row in read_journal(path)] == rows[:whole], "readers skip the torn tail"
    assert path.stat().st_size == cut, "readers leave the file alone"
    with Journal(path) as journal:
        assert path.stat().st_size == ends[whole], "the writer cuts it off"
        journal.append({"after": "the cut"})
    assert [row for _, row in read_journal(path)] == [*rows[:whole], {"after": "the cut"}]


def test_a_torn_tail_longer_than_a_block_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"a":1}\n' + b'{"b":"' + b"x" * 200_000)
    Journal(path).close()
    assert path.read_bytes() == b'{"a":1}\n'
    path.write_bytes(b"\0" * 200_000)
    Journal(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("line", [b'{"a": 1', b"\0\0\0", b'{"a": "\xff"}', b"[1]", b""])
def test_a_damaged_line_names_file_and_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"a":1}\n' + line + b'\n{"a":2}\n')
    with pytest.raises(UserError, match=rf"{path}:2: "):
        list(read_journal(path))


def test_what_json_cannot_hold_leaves_the_journal_untouched(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.append({"a": 1})
        with pytest.raises(ValueError, match="JSON"):
            journal.append({"a": float("nan")})
        with pytest.raises(TypeError):
            journal.append({"a": object()})
        journal.append({"a": 2})
    assert [row for _, row in read_journal(tmp_path / "j.jsonl")] == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match="closed"):
        journal.append({"a": 3})


def test_journals_sync_in_batches_and_at_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    journal = Journal(tmp_path / "j.jsonl", sync_lines=3, sync_seconds=1000)
    for i in range(7):
        journal.append({"i": i})
    assert len(synced) == 2
    journal.close()
    assert len(synced) == 3
    timed = Journal(tmp_path / "t.jsonl", sync_lines=1000, sync_seconds=0)
    timed.append({})
    assert len(synced) == 4
    timed.close()


# --- full disks ---------------------------------------------------------------------------------------


def test_a_full_disk_keeps_every_line_written_before(small_disk: Path) -> None:
    path = small_disk / "j.jsonl"
    with pytest.raises(DiskFull, match=rf"disk full while writing {path}; nothing lost"):
        _fill(path)
    kept = path.read_bytes().count(b"\n")
    assert kept > 30
    assert path.read_bytes().endswith(b"\n"), "no half line stays"
    assert [row["i"] for _, row in read_journal(path)] == list(range(kept))
    old = small_disk / "metrics.json"
    with pytest.raises(DiskFull, match=r"metrics\.json"):
        write_atomically(old, "x" * 60_000)
    assert [p.name for p in small_disk.iterdir()] == ["j.jsonl"], "nothing is left of a failed replacement"
    os.truncate(path, 0)
    write_atomically(old, "new")
    assert old.read_text() == "new"
    old.unlink()


def _fill(path: Path) -> None:
    with Journal(path) as journal:
        for i in range(1000):
            journal.append({"i": i, "x": "y" * 999})


def test_a_file_size_limit_keeps_every_line_written_before(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    journal = Journal(path)
    journal.append({"i": 0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(DiskFull, match=rf"file size limit reached while writing {path}"):
            journal.append({"i": 1, "x": "longer than ten bytes"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b'{"i":0}\n'
    journal.append({"i": 2})
    journal.close()
    assert [row for _, row in read_journal(path)] == [{"i": 0}, {"i": 2}]


# --- identity -----------------------------------------------------------------------------------------

CHANGES = {
    "suite": {"suite": "other"},
    "suite_version": {"suite_version": "sums-2"},
    "data_sha256": {"data_sha256": "0" * 64},
    "prompts_sha256": {"prompts_sha256": "0" * 64},
    "engine": {"engine": "openai"},
    "engine_identity.loops": {"engine_identity": {**IDENTITY.engine_identity, "loops": 3}},
    "engine_identity.weights_sha256": {"engine_identity": {**IDENTITY.engine_identity, "weights_sha256": "0"}},
    "engine_identity.rope.theta": {"engine_identity": {**IDENTITY.engine_identity, "rope": {"theta": 1e5}}},
    "engine_identity.new": {"engine_identity": {**IDENTITY.engine_identity, "new": 1}},
    "decoding.temperature": {"decoding": IDENTITY.decoding.model_copy(update={"temperature": 0.7})},
    "decoding.top_p": {"decoding": IDENTITY.decoding.model_copy(update={"top_p": 1.0})},
    "decoding.seed": {"decoding": IDENTITY.decoding.model_copy(update={"seed": 2})},
    "decoding.max_new_tokens": {"decoding": IDENTITY.decoding.model_copy(update={"max_new_tokens": 9})},
    "n_samples": {"n_samples": 3},
    "problems": {"problems": 4},
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_ingredient_gives_another_directory_and_is_named(tmp_path: Path, name: str) -> None:
    other = IDENTITY.model_copy(update=CHANGES[name])
    assert other.sha256() != IDENTITY.sha256()
    assert other.default_run_id() != IDENTITY.default_run_id()
    assert [text.partition(":")[0] for text in IDENTITY.differences(other)] == [name]
    with RunWriter.open(tmp_path, replace(REQUEST, run_id="mine")) as writer:
        writer.begin(REQUEST)
    with pytest.raises(UserError, match=rf"mine holds another run; what differs: {name}: .* -> "):
        RunWriter.open(tmp_path, replace(REQUEST, identity=other, run_id="mine"))


def test_no_identity_field_escapes_the_test_above() -> None:
    assert {name.partition(".")[0] for name in CHANGES} == set(Identity.model_fields)
    assert {name.partition(".")[2] for name in CHANGES if name.startswith("decoding.")} == set(
        DecodingRecord.model_fields
    )


def test_the_order_of_fields_does_not_matter() -> None:
    turned = dict(reversed(IDENTITY.engine_identity.items()))
    assert IDENTITY.model_copy(update={"engine_identity": turned}).sha256() == IDENTITY.sha256()


def test_run_ids_are_readable() -> None:
    assert IDENTITY.default_run_id() == f"sums+-My-Model-r2-{IDENTITY.sha256()[:8]}"
    without = IDENTITY.model_copy(update={"engine_identity": {"model": "org/name"}})
    assert without.default_run_id() == f"sums+-name-{without.sha256()[:8]}"


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "-dash", "x" * 200, "sp ace", "new\nline"])
def test_run_ids_that_are_no_file_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="--run-id"):
        check_run_id(name)
    with pytest.raises(UserError, match="--run-id"):
        RunWriter.open(tmp_path, replace(REQUEST, run_id=name))
    assert not list(tmp_path.iterdir())


# --- writing and reading a run --------------------------------------------------------------------------


def test_a_run_is_written_resumed_and_read(tmp_path: Path) -> None:
    with RunWriter.open(tmp_path, REQUEST) as writer:
        writer.begin(REQUEST)
        writer.add_completion(completion("a", 0))
        writer.add_completion(completion("a", 1))
        writer.add_completion(completion("b", 0, error="no answer"))
        writer.add_sample(sample("a", 0))
        writer.add_sample(sample("a", 1, error="the judge broke"))
        run = open_run(writer.path)
        assert run.state() == "running"
        assert run.done() == 1
        assert run.metrics() is None
    assert open_run(writer.path).state() == "killed", "nobody holds the lock any more"
    with RunWriter.open(tmp_path, REQUEST) as writer:
        assert set(writer.samples) == {("a", 0)}
        assert set(writer.completions) == {("a", 1)}, "judge this one again; draw b again"
        writer.begin(REQUEST)
        for key in [("a", 1), ("b", 0), ("b", 1), ("c", 0), ("c", 1)]:
            writer.add_sample(sample(*key, right=key[1] == 0))
        writer.seal()
        assert writer.complete
        writer.end({"right": Metric(0.5, 3, 0.25, 0.75, "share")}, problems=3, missing=[])
    run = open_run(tmp_path / IDENTITY.default_run_id())
    assert run.state() == "complete"
    assert (run.manifest.resumed, run.manifest.done, run.manifest.missing) == (1, 6, 0)
    assert run.manifest.identity == IDENTITY
    assert run.manifest.sessions[0].ended is None
    assert run.manifest.sessions[1].ended is not None
    assert run.manifest.sessions[1].packages["plt-eval"]
    assert run.manifest.sessions[1].hardware.ram > 0
    metrics = run.metrics()
    assert metrics is not None
    assert metrics.metrics["right"].value == 0.5
    assert [s.key for s in run.samples()] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0), ("c", 1)]
    assert next(run.samples()).values == {"right": True, "share": 0.1}
    assert [s.failed() for s in run.samples()] == [False, True, False, True, False, True]
    assert [c.error for c in run.completions()] == [None, None, "no answer"]
    assert [r.manifest.run_id for r in list_runs(tmp_path)] == [run.manifest.run_id]


def test_a_new_session_takes_old_metrics_away(tmp_path: Path) -> None:
    with RunWriter.open(tmp_path, REQUEST) as writer:
        writer.begin(REQUEST)
        writer.add_sample(sample("a"))
        writer.seal()
        writer.end({"right": Metric(1.0, 1, 1.0, 1.0, "share")}, problems=1, missing=["b#0: broke"])
    run = open_run(writer.path)
    assert (run.state(), run.manifest.missing, run.manifest.missing_examples) == ("incomplete", 5, ("b#0: broke",))
    with RunWriter.open(tmp_path, REQUEST) as writer:
        writer.begin(REQUEST)
        assert open_run(writer.path).metrics() is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ('{"schema_version": 99}', "schema version 99, but this plt-eval reads 1"),
        ("[]", "schema version None"),
        ('{"schema_version": 1, "run_id": 3}', "field "),
    ],
)
def test_a_manifest_that_cannot_be_read_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        list_runs(tmp_path)
    assert str(tmp_path / "x" / MANIFEST) in str(caught.value)
    assert "\n" not in str(caught.value)
    problems: list[UserError] = []
    assert list_runs(tmp_path, problem=problems.append) == []
    assert len(problems) == 1


def test_a_line_of_another_shape_names_file_line_and_field(tmp_path: Path) -> None:
    with RunWriter.open(tmp_path, REQUEST) as writer:
        writer.begin(REQUEST)
        writer.add_sample(sample("a"))
    path = writer.path / SAMPLES
    path.write_text(path.read_text() + json.dumps({"sample_id": "b"}) + "\n")
    with pytest.raises(UserError, match=re.escape(f"{path}:2: field index")):
        RunWriter.open(tmp_path, REQUEST)
    path.write_text(path.read_text().splitlines()[0] + "\n")
    RunWriter.open(tmp_path, REQUEST).close()  # and the lock was let go


def test_nothing_there_is_no_run(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "nowhere") == []
    with pytest.raises(UserError, match="not a run directory"):
        open_run(tmp_path)


# --- the lock -----------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_store import REQUEST
from plt_eval.store import RunWriter
writer = RunWriter.open(Path(sys.argv[1]), REQUEST)
writer.begin(REQUEST)
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_told_who_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            folder = tmp_path / IDENTITY.default_run_id()
            assert open_run(folder).state() == "running"
            with pytest.raises(UserError, match=rf"{re.escape(str(folder))} is .*pid {holder.pid} on"):
                RunWriter.open(tmp_path, REQUEST)
        finally:
            holder.kill()
    assert open_run(folder).state() == "killed"
    with RunWriter.open(tmp_path, REQUEST) as writer:  # the kernel let go of the lock
        writer.begin(REQUEST)
        assert writer.manifest.resumed == 1
