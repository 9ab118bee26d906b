"""Studies: real tiny trainings and evaluations, stopped everywhere and gone on with, and what is written of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from plt_eval.cli.main import main
from plt_eval.diagnosis.store import list_diagnoses, open_diagnosis
from plt_eval.errors import UserError
from plt_eval.heldout import DocumentScores, bits_per_byte
from plt_eval.records import MetricRecord
from plt_eval.store import list_runs
from plt_eval.study import measure, run
from plt_eval.study.command import StudyOptions, make_plan, parse_seeds
from plt_eval.study.plan import DIAGNOSES, StudyPlan, held
from plt_eval.study.records import (
    SUMMARY,
    CacheRecord,
    DecodeRecord,
    Estimate,
    HeldOutRecord,
    Study,
    SuiteRecord,
    TrainingRecord,
    Variant,
    read_study,
)
from plt_eval.study.run import run_study
from plt_eval.study.summary import _size, study_markdown, study_table, summarise_loops
from plt_model import PLTCache, PLTConfig, PLTForCausalLM
from plt_model.loading import load_model, weights_hash
from plt_model.training.shards import TokenData

RECIPE = """\
name: minute
description: Words and programs, for a test.
model: {vocab_size: 259, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2,
  num_key_value_heads: 1, head_dim: 8, plt_window_size: [4, 0], rope_theta: 10000}
tokenizer: bytes
data:
  - {name: words, weight: 1, source: {kind: jsonl, path: TEXTS, text: text, licence: CC0-1.0}}
  - {name: trace, weight: 1, source: {kind: trace, seed: 0, programs: 1200}}
sequence_length: 32
tokens: 2048
batch_tokens: 256
optimizer: {lr: 1.0e-2}
checkpoint: {every: 4, keep: 2}
"""
TRAININGS = ["r1-s0", "r2-s0"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of two entries whose texts lie beside it."""
    folder = tmp_path_factory.mktemp("recipe")
    rng = np.random.default_rng(0)
    lines = [" ".join(map(str, rng.integers(0, 50, size=int(rng.integers(5, 30))))) for _ in range(1500)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    path = folder / "minute.yaml"
    path.write_text(RECIPE.replace("TEXTS", str(folder / "texts.jsonl")))
    return path


def plan(recipe: Path, out: Path, **changes: Any) -> StudyPlan:
    small = {"loops": (1, 2), "limit": 9, "context": 50, "diagnosis_samples": 20}
    return StudyPlan(**{"recipe": str(recipe), "out": out, **small, **changes})


def console() -> Console:
    return Console(stderr=True, width=200)


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyPlan, Study]:
    """A study of two loop counts that nothing interrupted."""
    whole = plan(recipe, tmp_path_factory.mktemp("study") / "out")
    return whole, run_study(whole, console())


def lasting(study: Study) -> list[dict[str, Any]]:
    """Of the variants, what does not depend on the clock."""
    clock = {"seconds", "step_seconds", "tokens_per_second", "peak_memory_bytes"}
    return [variant.model_dump(exclude={"training": clock, "decode": {"seconds"}}) for variant in study.variants]


def files(folder: Path) -> dict[str, int]:
    """When every file was written; but for lock files, which filelock may touch whenever it takes them."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in found}


# --- what comes out -----------------------------------------------------------------------------------------


def test_every_number_is_that_of_its_own_model(finished: tuple[StudyPlan, Study]) -> None:
    whole, study = finished
    assert study.status == "complete"
    assert [variant.name for variant in study.variants] == TRAININGS
    for variant in study.variants:
        folder = whole.out / variant.model
        model = load_model(folder, dtype=torch.float32)
        assert model.config.plt_num_loops == variant.loops
        assert variant.weights_sha256 == weights_hash(folder)
        assert variant.parameters == sum(p.numel() for p in model.parameters())
        assert variant.embedding_parameters == 2 * 259 * 16
        assert (variant.training.steps, variant.training.tokens) == (8, 2048)
        for entry in ("words", "trace"):
            data = TokenData.open(whole.out / "data" / entry, "heldout")
            again = bits_per_byte(model, data, sequence_length=32, limit_tokens=whole.heldout_tokens)
            assert variant.heldout[entry].bits_per_byte == pytest.approx(again.bits_per_byte, rel=1e-6)
            assert variant.heldout[entry].documents == data.documents > 1
    assert study.variants[0].weights_sha256 != study.variants[1].weights_sha256


def test_the_runs_are_ordinary_runs_of_the_models(finished: tuple[StudyPlan, Study]) -> None:
    whole, study = finished
    runs = {found.path.name: found for found in list_runs(whole.runs)}
    assert len(runs) == 2
    for variant in study.variants:
        suite = variant.suites["trace"]
        manifest, metrics = runs[suite.run_id].manifest, runs[suite.run_id].metrics()
        assert metrics is not None
        assert (manifest.identity.model, manifest.identity.loops) == (f"minute:{variant.name}", variant.loops)
        assert manifest.identity.engine_identity["weights_sha256"] == variant.weights_sha256
        assert (suite.total, suite.missing, suite.metrics) == (9, 0, metrics.metrics)


def test_what_is_written_is_what_is_returned(finished: tuple[StudyPlan, Study]) -> None:
    whole, study = finished
    assert read_study(whole.out) == study
    assert study.recipe["name"] == "minute"
    text = (whole.out / SUMMARY).read_text()
    assert text == study_markdown(study, whole.out)
    assert text.startswith("# Study: minute\n\nWords and programs, for a test.\n\n## Gain\n\n|  | R=1 | R=2 |\n")
    for row in ("trace: against R=1", "trace.exact/chase", "KV cache at 50 tokens", "training step (s)"):
        assert f"\n| {row} | " in text
    assert f"| parameters | {study.variants[0].parameters:,} |" in text
    gain, parts = text.split("## In parts")
    assert "\n| trace.exact/chase/k1 | " in parts
    assert "trace.exact/chase/k" not in gain
    assert "say nothing of what another seed would give" in text


def test_a_complete_study_is_only_read(
    finished: tuple[StudyPlan, Study], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, study = finished
    before = files(whole.out)
    monkeypatch.setattr(run, "HFEngine", None)
    assert run_study(whole, console()) == study
    assert files(whole.out) == before
    assert "complete already" in capsys.readouterr().err


# --- going on -----------------------------------------------------------------------------------------------

STOPS = [
    ("plt_eval.corpus.build_recipe_data", 0),
    ("plt_model.training.run.train", 0),
    ("plt_model.training.run.train", 1),
    ("plt_eval.study.measure.measure_heldout", 1),
    ("plt_eval.study.measure.measure_heldout", 3),
    ("plt_eval.study.measure.measure_suites", 0),
    ("plt_eval.study.measure.measure_cache", 1),
    ("plt_eval.study.measure.measure_diagnosis", 1),
]


def test_a_study_stopped_at_any_stage_goes_on_to_the_same_end(
    finished: tuple[StudyPlan, Study], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped again and again, each time one stage further, by a Ctrl-C that comes before the stage."""
    _, study = finished
    mine = plan(recipe, tmp_path / "out")
    trained: list[int] = []
    for stage, calls in STOPS:
        with monkeypatch.context() as patch:
            stop_before(patch, stage, calls)
            with pytest.raises(KeyboardInterrupt, match="run the same command again to go on"):
                run_study(mine, console())
        assert read_study(mine.out).status == "running"
        results = sorted(mine.out.glob("train/*/result.json"))
        assert all(
            path.stat().st_mtime_ns in trained or trained.append(path.stat().st_mtime_ns) is None for path in results
        )
    again = run_study(mine, console())
    assert lasting(again) == lasting(study)
    assert again.summary[1].heldout == study.summary[1].heldout
    assert len(again.sessions) == len(STOPS) + 1
    assert len(trained) == 2, "and nothing was trained twice"
    assert again.started == again.sessions[0].started


def stop_before(
    patch: pytest.MonkeyPatch, name: str, calls: int, error: type[BaseException] | BaseException = KeyboardInterrupt
) -> None:
    """Make call number `calls` of the function `name` a Ctrl-C, or another error."""
    module, _, attribute = name.rpartition(".")
    real = getattr(sys.modules[module], attribute)
    left = [calls]

    def stopped(*arguments: Any, **options: Any) -> Any:
        if not left[0]:
            raise error
        left[0] -= 1
        return real(*arguments, **options)

    patch.setattr(name, stopped)


def test_a_killed_study_goes_on_to_the_same_end(
    finished: tuple[StudyPlan, Study], recipe: Path, tmp_path: Path
) -> None:
    whole, study = finished
    out = tmp_path / "out"
    line = [sys.executable, "-m", "plt_eval.cli.main", "study", "--recipe", recipe, "--out", out, "--loops", "2"]
    line += ["--limit", "9", "--context", "50", "--data", whole.data_folder]
    with subprocess.Popen([*map(str, line)], stderr=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 300
        while not list(out.glob("train/r2-s0/metrics.jsonl")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    assert read_study(out).status == "running"
    mine = plan(recipe, out, loops=(2,), data=whole.data_folder)
    assert lasting(run_study(mine, console())) == lasting(study)[1:]


def test_a_study_grows_by_what_is_asked_for_more(
    finished: tuple[StudyPlan, Study], recipe: Path, tmp_path: Path
) -> None:
    whole, study = finished
    mine = plan(recipe, tmp_path / "out", data=whole.data_folder, loops=(2,), suites=())
    first = run_study(mine, console())
    assert [variant.suites for variant in first.variants] == [{}]
    before = files(mine.out)
    larger = run_study(plan(recipe, mine.out, data=whole.data_folder, loops=(2, 1), seeds=(0, 1), suites=()), console())
    assert [variant.name for variant in larger.variants] == ["r2-s0", "r2-s1", "r1-s0", "r1-s1"]
    after = files(mine.out)
    unchanged = [name for name in before if name.startswith(("train/", "heldout/"))]
    assert unchanged
    assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}
    assert larger.variants[0].heldout == study.variants[1].heldout
    assert larger.variants[0].weights_sha256 != larger.variants[1].weights_sha256
    assert [row.seeds for row in larger.summary] == [(0, 1)] * 2
    assert larger.summary[0].heldout["words"].against_first is None, "the first count asked for is what the others meet"
    assert "Mean ± standard deviation over 2 seeds" in (mine.out / SUMMARY).read_text()


STEPS = [
    ("plt_eval.corpus.build_recipe_data", 0, False),
    ("plt_model.training.run.train", 2, True),
    ("plt_eval.study.measure.measure_heldout", 1, False),
]


def test_what_an_earlier_study_recorded_outlives_one_that_fails(
    finished: tuple[StudyPlan, Study], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for a third loop count and fewer problems, in vain, it is what it was but for the session's trace."""
    whole, study = finished
    out = tmp_path / "out"
    shutil.copytree(whole.out, out)
    larger = plan(recipe, out, loops=(1, 2, 3), limit=5)
    sessions = list(study.sessions)
    for stage, calls, something in STEPS:
        before = (out / "study.json").read_bytes()
        with monkeypatch.context() as patch:
            stop_before(patch, stage, calls, UserError("no"))
            with pytest.raises(UserError, match="no"):
                run_study(larger, console())
        kept = read_study(out)
        assert (kept.status, kept.variants, kept.limit, kept.ended) == ("complete", study.variants, 9, study.ended)
        assert something or (out / "study.json").read_bytes() == before, "not touched before there is something new"
        assert (out / SUMMARY).read_bytes() == (whole.out / SUMMARY).read_bytes()
        sessions += kept.sessions[len(sessions) :]
        assert kept.sessions == tuple(sessions)
        assert study_markdown(kept, whole.out) == study_markdown(study, whole.out), "of the session that made it"
    assert len(sessions) == 2
    assert sessions[-1].ended is None
    assert run_study(plan(recipe, out), console()) == kept, "and is complete for who asks for what it is"
    again = run_study(larger, console())
    assert (again.status, len(again.variants), len(again.sessions)) == ("complete", 3, 3)
    assert read_study(out) == again


def test_a_study_that_is_gone_on_with_keeps_the_models_it_has(
    finished: tuple[StudyPlan, Study], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, study = finished
    out = tmp_path / "out"
    shutil.copytree(whole.out, out)
    (out / "study.json").write_text(study.model_copy(update={"status": "running"}).model_dump_json())
    for calls in (0, 2):
        stop_before(monkeypatch, "plt_eval.study.measure.measure_heldout", calls, UserError("no"))
        with pytest.raises(UserError, match="no"):
            run_study(plan(recipe, out, loops=(1, 2, 3)), console())
        monkeypatch.undo()
        found = read_study(out)
        assert (found.status, found.variants) == ("running", study.variants)
    assert len(run_study(plan(recipe, out), console()).sessions) == len(study.sessions) + 3


def test_scores_are_made_again_when_what_they_are_of_changes(finished: tuple[StudyPlan, Study], tmp_path: Path) -> None:
    whole, study = finished
    engine = run.HFEngine(str(whole.out / study.variants[1].model), notify=lambda _: None)
    entry, out = whole.data_folder / "words", tmp_path / "r2-s0-words"
    found, scores = measure.measure_heldout(engine, entry, out, sequence_length=32, limit_tokens=None)
    assert found == study.variants[1].heldout["words"]
    np.savez(out.with_name(out.name + ".npz"), **{**vars(scores), "nats": 2 * scores.nats})
    doubled, _ = measure.measure_heldout(engine, entry, out, sequence_length=32, limit_tokens=None)
    assert doubled.bits_per_byte == pytest.approx(2 * found.bits_per_byte), "read, not made"
    other, _ = measure.measure_heldout(engine, entry, out, sequence_length=16, limit_tokens=None)
    assert other.bits_per_byte != doubled.bits_per_byte
    again, _ = measure.measure_heldout(engine, entry, out, sequence_length=32, limit_tokens=None)
    assert again == found
    out.with_name(out.name + ".npz").unlink()
    assert measure.measure_heldout(engine, entry, out, sequence_length=32, limit_tokens=None)[0] == found
    for name in ("device", "dtype"):  # another machine's, and another type's
        settings = json.loads(out.with_name(out.name + ".json").read_text())
        assert settings[name] == {"device": "cpu", "dtype": "float32"}[name]
        out.with_name(out.name + ".json").write_text(json.dumps({**settings, name: "other"}))
        np.savez(out.with_name(out.name + ".npz"), **{**vars(scores), "nats": 2 * scores.nats})
        assert measure.measure_heldout(engine, entry, out, sequence_length=32, limit_tokens=None)[0] == found
    fewer, _ = measure.measure_heldout(engine, entry, out, sequence_length=32, limit_tokens=100)
    assert fewer.documents < found.documents


def test_a_kill_between_scores_and_their_settings_mixes_nothing(
    finished: tuple[StudyPlan, Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, study = finished
    engine = run.HFEngine(str(whole.out / study.variants[0].model), notify=lambda _: None)
    entry, out = whole.data_folder / "words", tmp_path / "r1-s0-words"
    found, _ = measure.measure_heldout(engine, entry, out, sequence_length=32, limit_tokens=None)
    with monkeypatch.context() as patch:
        patch.setattr(measure, "write_atomically", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            measure.measure_heldout(engine, entry, out, sequence_length=32, limit_tokens=60)
    again, _ = measure.measure_heldout(engine, entry, out, sequence_length=32, limit_tokens=None)
    assert again == found


@pytest.mark.parametrize(("length", "vocabulary", "windows"), [(256, 259, 16), (2048, 32768, 2), (4096, 150_000, 1)])
def test_large_vocabularies_are_scored_in_smaller_batches(length: int, vocabulary: int, windows: int) -> None:
    assert measure._windows_at_a_time(length, vocabulary) == windows


def test_an_entry_too_small_to_hold_out_is_trained_on_and_said(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small.jsonl"
    small.write_text("".join(json.dumps({"text": f"{word} " * 50}) + "\n" for word in ("one", "two", "three")))
    other = tmp_path / "other.yaml"
    other.write_text(re.sub(r"path: \S+,", f"path: {small},", recipe.read_text()))
    study = run_study(plan(other, tmp_path / "out", loops=(1,), suites=()), console())
    assert list(study.variants[0].heldout) == ["trace"]
    assert "warning: data entry words has no held-out text" in capsys.readouterr().err
    assert "trace: held-out bits per byte" in (tmp_path / "out" / SUMMARY).read_text()


# --- refusals -----------------------------------------------------------------------------------------------


def test_another_recipe_in_the_same_folder_is_refused(
    finished: tuple[StudyPlan, Study], recipe: Path, tmp_path: Path
) -> None:
    whole, _ = finished
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text().replace("lr: 1.0e-2", "lr: 1.0e-3"))
    before = files(whole.out)
    with pytest.raises(UserError, match=r"is a study of another recipe \(minute, .*choose another --out"):
        run_study(plan(other, whole.out), console())
    assert files(whole.out) == before
    other.write_text(recipe.read_text().replace("Words and programs", "The same, in other words"))
    assert run_study(plan(other, whole.out), console()).status == "complete", "a description decides nothing"


def test_a_folder_of_something_else_is_refused(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="exists and is no study"):
        run_study(plan(recipe, tmp_path), console())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_one_process_at_a_time(recipe: Path, tmp_path: Path) -> None:
    with held(tmp_path / "out"), pytest.raises(UserError, match="is being written by another process"):
        run_study(plan(recipe, tmp_path / "out"), console())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--recipe is missing: give a recipe's file or name, or --quick"),
        ({"quick": True, "recipe": "x.yaml"}, "--quick is the recipe quick: it cannot be had with --recipe x.yaml"),
        ({"recipe": "x", "loops": "0"}, "--loops '0': '0' is not within"),
        ({"recipe": "x", "seeds": "1,x"}, "--seeds '1,x': 'x' is no seed"),
        ({"recipe": "x", "seeds": "3-1"}, "--seeds '3-1': '3-1' is not rising"),
        ({"recipe": "x", "sandbox_image": "i"}, "--sandbox-image has no effect with --sandbox bubblewrap"),
    ],
)
def test_mistakes_in_the_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        make_plan(StudyOptions(**options))


def test_what_the_options_mean() -> None:
    found = make_plan(StudyOptions(recipe="a/b.yaml", loops="1,3-4", seeds="2,0-1", suites=("demo", "trace", "demo")))
    assert (found.loops, found.seeds, found.suites) == ((1, 3, 4), (2, 0, 1), ("demo", "trace"))
    assert (found.out, found.data_folder) == (Path("results/studies/b"), Path("results/studies/b/data"))
    assert (found.limit, found.heldout_tokens) == (None, 200_000)
    quick = make_plan(StudyOptions(quick=True, limit=5, data=Path("d")))
    assert (quick.recipe, quick.limit, quick.heldout_tokens, quick.data_folder) == ("quick", 5, 60_000, Path("d"))
    assert parse_seeds("0") == (0,)


class Cli:
    """The command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["study", *map(str, arguments)])
        return int(caught.value.code or 0), *self.capsys.readouterr()


def test_the_command(
    finished: tuple[StudyPlan, Study],
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, study = finished
    cli, common = Cli(capsys), ("--recipe", recipe, "--out", whole.out, "--loops", "1-2", "--limit", "9")
    common += ("--diagnosis-samples", "20")
    code, out, err = cli(*common, "--context", "50")
    assert (code, "complete already" in err) == (0, True)
    assert "words: held-out bits per byte" in out
    assert f"{study.summary[1].heldout['words'].bits_per_byte.value:.4f}" in out
    assert f"plt-eval ls --results {whole.runs}" in out
    assert f"plt-eval ls --results {whole.out / DIAGNOSES}" in out
    assert json.loads(cli(*common, "--context", "50", "--json")[1]) == json.loads(study.model_dump_json())
    assert "no such file or bundled recipe" in cli("--recipe", "no/where.yaml", "--out", tmp_path / "x")[2]
    assert "unknown suite 'trcae'" in cli("--recipe", recipe, "--out", tmp_path / "x", "--suite", "trcae")[2]
    assert not (tmp_path / "x").exists()
    monkeypatch.setattr(run, "_load", _interrupt)
    code, out, err = cli(*common)
    assert (code, out) == (130, "")
    assert err.startswith("plt-eval: interrupted:")


def _interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_a_mistake_of_the_trainers_is_one_line(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: tuple[StudyPlan, Study]
) -> None:
    out = tmp_path / "out"
    (out / "train" / "r1-s0").mkdir(parents=True)
    (out / "train" / "r1-s0" / "thesis.tex").write_text("")
    (out / "study.json").write_text((finished[0].out / "study.json").read_text().replace('"complete"', '"running"'))
    common = ("--recipe", recipe, "--out", out, "--data", finished[0].data_folder, "--loops", "1")
    code, _, err = Cli(capsys)(*common)
    assert (code, err.splitlines()[-1]) == (
        2,
        f"plt-eval: error: --out {out}/train/r1-s0: not empty, and no training is in it: choose a new folder",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged:"),
        ('{"schema_version": 99}', "schema version 99, but this plt-eval reads 1"),
        ('{"schema_version": 1, "status": "complete"}', "field recipe: Field required"),
    ],
)
def test_a_damaged_record_names_its_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(UserError, match=r"study\.json: ") as caught:
        read_study(tmp_path)
    assert message in str(caught.value)


# --- cost and diagnosis -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode",
    [{}, {"plt_gswa": False}, {"plt_clp_shift": False}, {"plt_loop_mode": "sequential"}],
    ids=["plt", "no-gswa", "no-shift", "sequential"],
)
@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_caches_bytes_are_those_of_a_real_one(mode: dict[str, Any], loops: int, dtype: torch.dtype) -> None:
    config = PLTConfig(
        vocab_size=50, hidden_size=16, intermediate_size=8, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, plt_num_loops=loops, plt_window_size=[5, 0], **mode,
    )  # fmt: skip
    cache = PLTCache(config)
    model = PLTForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        model(input_ids=torch.ones(1, 40, dtype=torch.long), past_key_values=cache)
        model(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    found = measure.measure_cache(config, 41, dtype)
    assert {part: getattr(found, part) for part in ("shared", "windows", "carry")} == cache.nbytes()
    assert found.total == sum(cache.nbytes().values())
    assert (found.context, found.dtype) == (41, str(dtype).removeprefix("torch."))


def test_a_tokens_time_is_measured_once_for_each_model(
    finished: tuple[StudyPlan, Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, study = finished
    one, two = (run.HFEngine(str(whole.out / v.model), device="cpu", notify=lambda _: None) for v in study.variants)
    out = tmp_path / "decode" / "x.json"
    real = measure._decode_seconds(two.model, two.device)
    assert len(real) == 48
    assert min(real) > 0
    monkeypatch.setattr(measure, "_decode_seconds", lambda *_: [1.0, 5.0, 3.0])
    assert measure.measure_decode(two, out).seconds == 3.0
    monkeypatch.setattr(measure, "_decode_seconds", lambda *_: [7.0])
    assert measure.measure_decode(two, out) == DecodeRecord(
        seconds=3.0, context=256, tokens=48, device="cpu", dtype="float32"
    )
    assert measure.measure_decode(one, out).seconds == 7.0, "another model's time is its own"
    out.write_text("{")
    assert measure.measure_decode(one, out).seconds == 7.0


def test_a_token_is_timed_as_it_is_decoded(finished: tuple[StudyPlan, Study], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the cache, one token a step, each step behind all before it."""
    whole, study = finished
    model = load_model(whole.out / study.variants[1].model, dtype=torch.float32)
    seen: list[tuple[int, int]] = []
    real = model.forward

    def watched(input_ids: torch.Tensor, past_key_values: PLTCache) -> Any:
        seen.append((input_ids.shape[1], past_key_values.get_seq_length()))
        return real(input_ids=input_ids, past_key_values=past_key_values)

    monkeypatch.setattr(model, "forward", watched)
    measure._decode_seconds(model, torch.device("cpu"))
    assert seen == [(256, 0), *((1, 256 + step) for step in range(52))]


def test_tied_tables_count_once() -> None:
    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    counts = [
        measure.count_parameters(PLTForCausalLM(PLTConfig(**shape, tie_word_embeddings=t))) for t in (True, False)
    ]
    assert counts[0][0] - counts[0][1] == counts[1][0] - counts[1][1]
    assert (counts[0][1], counts[1][1]) == (800, 1600)


def test_every_models_loops_are_opened_on_the_studys_held_out_text(finished: tuple[StudyPlan, Study]) -> None:
    whole, study = finished
    found = list_diagnoses(whole.out / DIAGNOSES)
    assert [variant.diagnosis for variant in study.variants] == [f"diagnosis/{one.path.name}" for one in found]
    assert study.diagnosis_samples == 20
    for variant, one in zip(study.variants, found, strict=True):
        manifest = open_diagnosis(whole.out / str(variant.diagnosis)).manifest
        assert manifest == one.manifest
        assert manifest.status == "complete"
        assert (manifest.loops, manifest.total, manifest.model.label) == (variant.loops, 20, f"minute:{variant.name}")
        assert manifest.model.weights_sha256 == variant.weights_sha256
        assert manifest.data.sequence_length == 32
        entries = [sample.id.partition(":")[0] for sample in one.samples()]
        assert entries == ["words", "trace"] * 10, "both entries, in turns"
    first, second = ([sample.sha256 for sample in one.samples()] for one in found)
    assert first == second, "the models meet the same texts"


def test_loops_can_be_left_unopened(finished: tuple[StudyPlan, Study], recipe: Path, tmp_path: Path) -> None:
    mine = plan(
        recipe, tmp_path / "out", data=finished[0].data_folder, loops=(1,), suites=(), diagnosis_samples=0
    )  # fmt: skip
    (variant,) = run_study(mine, console()).variants
    assert variant.diagnosis is None
    assert not (mine.out / DIAGNOSES).exists()
    again = run_study(replace(mine, diagnosis_samples=4), console())
    assert again.variants[0].diagnosis is not None, "what was complete without them goes on for them"
    assert again.variants[0].training == variant.training


# --- summing up ---------------------------------------------------------------------------------------------


NAMES = ("s.a", "s.a/b", "s.a/b/c")


def variant(loops: int, seed: int, bits: float, exact: float) -> Variant:
    """A made-up model."""
    return Variant(
        loops=loops,
        seed=seed,
        model="m",
        weights_sha256="0",
        parameters=1000,
        embedding_parameters=400,
        training=TrainingRecord(
            steps=10, tokens=100, loss=1.0, seconds=5.0, step_seconds=0.1 * loops, tokens_per_second=1000.0 / loops,
            peak_memory_bytes=1000 + seed,
        ),
        cache=CacheRecord(context=64, dtype="bfloat16", shared=2048, windows=loops, carry=0),
        decode=DecodeRecord(seconds=0.01 * loops, context=256, tokens=48, device="cpu", dtype="float32"),
        heldout={"text": HeldOutRecord(bits_per_byte=bits, low=bits - 0.1, high=bits + 0.1, nats_per_token=bits / 2,
                                       tokens=10, bytes=10, documents=3, units=3)},
        suites={"s": SuiteRecord(run_id="r", total=4, missing=0, metrics={
            name: MetricRecord(value=exact, n=4, low=0.0, high=1.0, definition="") for name in NAMES
        })},
        diagnosis=None,
    )  # fmt: skip


def scores(*nats: float) -> DocumentScores:
    size = np.full(len(nats), 10)
    return DocumentScores(np.arange(len(nats)), np.array(nats) * np.log(2), size, size, np.arange(len(nats)))


def made_up(variants: list[Variant], of: dict[tuple[int, int, str], DocumentScores]) -> Study:
    return Study(
        status="complete", recipe={"name": "made-up"}, recipe_sha256="0" * 64,
        loops=tuple(dict.fromkeys(v.loops for v in variants)), seeds=tuple(dict.fromkeys(v.seed for v in variants)),
        suites=("s",), limit=None, heldout_tokens=10, context=64, data="data", started=datetime.now(UTC), ended=None,
        sessions=(), variants=tuple(variants), summary=summarise_loops(variants, of),
    )  # fmt: skip


def test_one_seed_keeps_its_intervals() -> None:
    of = {(1, 0, "text"): scores(*range(10, 90, 10)), (2, 0, "text"): scores(*range(9, 89, 10))}
    study = made_up([variant(1, 0, 2.0, 0.25), variant(2, 0, 1.9, 0.5)], of)
    one, two = study.summary
    assert two.heldout["text"].bits_per_byte == Estimate(value=1.9, low=1.9 - 0.1, high=1.9 + 0.1)
    assert one.heldout["text"].against_first is None
    gain = two.heldout["text"].against_first
    assert gain is not None
    assert (gain.value, gain.low, gain.high) == (pytest.approx(-0.1), pytest.approx(-0.1), pytest.approx(-0.1))
    assert list(two.metrics) == ["s.a", "s.a/b"]
    assert (two.metrics["s.a"].value, two.metrics["s.a"].low) == (0.5, 0.0)


def test_several_seeds_are_a_mean_and_a_spread() -> None:
    of = {(1, 0, "text"): scores(10, 20), (2, 0, "text"): scores(9, 19)}
    of |= {(1, 1, "text"): scores(10, 20), (2, 1, "text"): scores(13, 23)}
    variants = [variant(1, 0, 2.0, 0.2), variant(1, 1, 2.2, 0.2), variant(2, 0, 1.0, 0.4), variant(2, 1, 2.0, 0.6)]
    study = made_up(variants, of)
    one, two = study.summary
    assert one.heldout["text"].bits_per_byte.value == pytest.approx(2.1)
    assert one.heldout["text"].bits_per_byte.spread == pytest.approx(0.1 * 2**0.5)
    assert one.heldout["text"].bits_per_byte.low is None
    gain = two.heldout["text"].against_first
    assert gain is not None
    assert (gain.value, gain.spread) == (pytest.approx(0.1), pytest.approx(0.2 * 2**0.5))
    assert two.metrics["s.a"].value == pytest.approx(0.5)
    assert (two.seeds, two.peak_memory_bytes) == ((0, 1), 1001)
    text = study_markdown(study, Path("x"))
    assert "| text: against R=1 | - | +0.1000 ± 0.2828 |" in text
    assert "| s.a | 20.0% ± 0.0 | 50.0% ± 14.1 |" in text


def test_too_few_packages_for_an_interval_are_said() -> None:
    few = HeldOutRecord(bits_per_byte=2.0, low=None, high=None, nats_per_token=1.0, tokens=1234, bytes=10, documents=11,
                        units=2)  # fmt: skip
    one = few.model_copy(update={"documents": 1, "units": 1})
    of = {(1, 0, "text"): scores(10, 20, 30), (2, 0, "text"): scores(9, 19, 29)}
    known = made_up([variant(1, 0, 2.0, 0.25), variant(2, 0, 1.9, 0.5)], of)
    assert "fewer than" not in study_markdown(known, Path("x"))
    assert "Held-out text: text 10 tokens of 3 documents; every" in study_markdown(known, Path("x"))
    variants = [
        variant(loops, 0, 2.0, 0.25).model_copy(update={"heldout": {"text": few, "one": one}}) for loops in (1, 2)
    ]
    study = made_up(variants, of)
    text = study_markdown(study, Path("x"))
    assert "| text: held-out bits per byte | 2.0000 | 2.0000 |" in text
    assert "| text: against R=1 | - | -0.1000 |" in text
    assert "no interval over fewer than 8 of them (text: 2 packages, one: 1 document)." in text
    assert "text 1,234 tokens of 11 documents of 2 packages, one 1,234 tokens of 1 document; every" in text
    said = Console(record=True, width=400)
    said.print(study_table(study))
    assert "fewer than 8 of them (text: 2 packages" in " ".join(said.export_text().split())


def test_the_table_is_the_same_in_the_terminal() -> None:
    study = made_up([variant(1, 0, 2.0, 0.25), variant(4, 0, 1.9, 0.5)], {})
    said = Console(record=True, width=100)
    said.print(study_table(study))
    text = said.export_text()
    assert [cell.strip() for cell in text.splitlines()[1].strip("┃").split("┃")] == ["", "R=1", "R=4"]
    rows = {line.strip("│").split("│")[0].strip(): line for line in text.splitlines() if "│" in line}
    assert "25.0%" in rows["s.a"]
    assert "2.00 KiB" in rows["KV cache at 64 tokens"]
    assert "600" in rows["without embeddings"]
    assert "against R=1" not in text, "no scores, no difference"
    markdown = study_markdown(study, Path("x")).splitlines()
    assert "| training step (s) | 0.100 | 0.400 ×4.000 |" in markdown
    assert "| decoding a token (ms) | 10.00 | 40.00 ×4.000 |" in markdown
    assert "| KV cache at 64 tokens | 2.00 KiB | 2.00 KiB ×1.001 |" in markdown


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1500, "1.46 KiB"), (10_240, "10.0 KiB"),
     (1_047_552, "1023 KiB"), (1 << 20, "1.00 MiB"), (5 << 30, "5.00 GiB")],
)  # fmt: skip
def test_sizes(count: int | None, text: str) -> None:
    assert _size(count) == text
