"""The parts of the SWE suites that need no container: rows, predictions, verdicts, conversations, the shared engine."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_benchmarks.protocols import Answer, Message, Sample, SuiteError
from plt_benchmarks.swe.child import multi_swe_verdict, swebench_verdict
from plt_benchmarks.swe.judge import PatchScorer, with_merged_streams
from plt_benchmarks.swe.rows import Task, load_rows, multi_swe_task, needs_network, swebench_task, task_of
from plt_benchmarks.swe.suites import MULTI_SWE, MULTI_SWE_BENCH, SWE
from plt_eval.cli.main import main
from plt_eval.engines.base import Completion, Decoding, GenerationRequest
from plt_eval.engines.conversations import SharedEngine, written_tool_calls
from plt_eval.errors import UserError
from plt_eval.swe.containers import GIB, RESERVE, estimated_bytes
from plt_eval.swe.conversation import ChatModel
from plt_eval.swe.predictions import PredictionsEngine, read_predictions, write_predictions

ROW: dict[str, Any] = {
    "repo": "a/b", "instance_id": "a__b-1", "base_commit": "0" * 40, "patch": "gold", "test_patch": "tests",
    "problem_statement": "It fails.", "version": "1", "FAIL_TO_PASS": '["t1"]', "PASS_TO_PASS": [],
    "eval_script": "#!/bin/bash\nset -uxo pipefail\ncd /testbed\n", "log_parser": "parse_log_pytest",
    "eval_type": "pass_and_fail", "image": "someone/a_1776_b-1:latest",
}  # fmt: skip
MULTI_ROW: dict[str, Any] = {
    "org": "o", "repo": "r", "number": 7, "title": "T", "body": "B", "base": {"sha": "1" * 40}, "fix_patch": "gold",
    "test_patch": "tests", "resolved_issues": [{"title": "Issue", "body": None}],
}  # fmt: skip
TASK = swebench_task("here", dict(ROW))


# --- rows -------------------------------------------------------------------------------------------------


def test_rows_of_both_forms() -> None:
    assert (TASK.id, TASK.image, TASK.workdir, TASK.gold) == ("a__b-1", ROW["image"], "/testbed", "gold")
    assert TASK.row["FAIL_TO_PASS"] == ["t1"]
    multi = multi_swe_task("here", dict(MULTI_ROW))
    assert (multi.id, multi.image, multi.workdir) == ("o__r-7", "mswebench/o_m_r:pr-7", "/home/r")
    assert multi.problem.startswith("Issue")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "expected 'image' to be text, found NoneType"),
        ({"PASS_TO_PASS": "nothing"}, "'PASS_TO_PASS': expected a list of tests"),
        ({"instance_id": "../../etc"}, "expected an image and an instance_id"),
    ],
)
def test_a_broken_row_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SuiteError, match=r"rows\.jsonl, line 3: ") as refused:
        swebench_task("rows.jsonl, line 3", {**ROW, **changes})
    assert message in str(refused.value)


def test_rows_of_before_swebench_5_are_refused_with_the_reason() -> None:
    old = {key: value for key, value in ROW.items() if key not in ("image", "eval_script", "log_parser", "eval_type")}
    with pytest.raises(SuiteError, match="rows of before swebench 5 have no image"):
        swebench_task("here", old)


def test_parquet_and_json_lines_are_the_same_data(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [ROW, {**ROW, "instance_id": "a__b-2"}]
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(
        pyarrow.Table.from_pylist([{**row, "PASS_TO_PASS": "[]"} for row in rows]), tmp_path / "t.parquet"
    )
    lines, table = SWE.load(tmp_path / "lines"), SWE.load(tmp_path / "t.parquet")
    assert lines.sha256 == table.sha256
    assert [sample.id for sample in table.samples] == ["a__b-1", "a__b-2"]
    assert task_of(lines.samples[1]) == task_of(table.samples[1])


def test_an_instance_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(2 * (json.dumps(ROW) + "\n"))
    with pytest.raises(SuiteError, match="line 2: instance a__b-1 is there for the second time"):
        SWE.load(tmp_path / "rows.jsonl")


def test_without_the_hub_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        SuiteError, match=r"cannot fetch https://huggingface.co/datasets/SWE-bench/.*; pass --data PATH"
    ):
        SWE.load(None)


def test_without_a_network_the_error_is_a_line_whatever_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class OfSomeLibrary(Exception):
        """The hub's releases use different ones."""

    def refuse(*_: object, **__: object) -> None:
        raise OfSomeLibrary("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    with pytest.raises(SuiteError, match=r"cannot fetch https://.*: no network; pass --data PATH"):
        SWE.load(None)


def test_what_fetches_needs_a_network_and_what_a_patch_says_does_not() -> None:
    assert needs_network("cd /testbed\npython -m pip install -e .\n")
    assert needs_network("cargo test\n")
    assert not needs_network("cd /testbed\n# pip install x\npytest -rA t.py\n")
    assert not needs_network("git apply -v - <<'EOF_114329324912'\n+pip install x\nEOF_114329324912\npytest\n")


@pytest.mark.skipif("PLT_EVAL_DATA" not in os.environ, reason="needs PLT_EVAL_DATA, the benchmarks' real data")
def test_all_real_rows_load_and_have_images_and_parsers_of_their_own() -> None:
    """All 500 of Verified and 300 of Multilingual, offline: the rows that the suites pin, an official name for every
    image, a parser that the installed harness has, and a specification that it accepts."""
    from swebench.harness import log_parsers
    from swebench.harness.utils import make_test_spec

    folder = Path(os.environ["PLT_EVAL_DATA"])
    for suite, name, count in ((SWE, "SWE-bench_Verified", 500), (MULTI_SWE, "SWE-bench_Multilingual", 300)):
        data = suite.load(folder / "swebench" / name)
        assert len(data.samples) == suite.hub.count == count
        assert data.sha256 == suite.hub.rows_sha256
        assert data.revision == f"{suite.hub.repo}#{data.sha256[:12]}"
        tasks = [task_of(sample) for sample in data.samples]
        assert len({task.image for task in tasks}) == count
        for task in tasks:
            official = task.id.lower().replace("__", "_1776_")
            assert task.image == f"swebench/sweb.eval.x86_64.{official}:latest"
            row = {**task.row, "eval_script": with_merged_streams(task.row["eval_script"])}
            spec = make_test_spec(row)
            assert spec.eval_script_list[0] == "exec 2>&1"
            assert callable(getattr(log_parsers, spec.log_parser))
            assert spec.FAIL_TO_PASS or spec.PASS_TO_PASS
    verified = [task_of(sample) for sample in SWE.load(folder / "swebench" / "SWE-bench_Verified").samples]
    assert sum(task.needs_network for task in verified) == 498
    multi = [task_of(sample) for sample in MULTI_SWE_BENCH.load(folder / "multi_swe_bench").samples]
    assert {task.image for task in multi if task.id == "tokio-rs__bytes-732"} == {"mswebench/tokio-rs_m_bytes:pr-732"}


@pytest.mark.skipif("PLT_EVAL_DATA" not in os.environ, reason="needs PLT_EVAL_DATA, the benchmarks' real data")
def test_multi_swe_bench_names_images_as_its_harness_does() -> None:
    """Its harness asks Docker for a client at import, so a daemon's address has to be there, but no daemon."""
    image = pytest.importorskip("multi_swe_bench.harness.image")
    instance = pytest.importorskip("multi_swe_bench.harness.instance")
    pytest.importorskip("multi_swe_bench.harness.repos")
    from multi_swe_bench.harness.dataset import Dataset

    data = MULTI_SWE_BENCH.load(Path(os.environ["PLT_EVAL_DATA"]) / "multi_swe_bench")
    for sample in data.samples:
        task = task_of(sample)
        row = Dataset.from_json(json.dumps(task.row))
        config = image.Config(need_clone=True, global_env=None, clear_env=True)
        assert instance.Instance.create(row, config).name() == task.image


# --- scripts and verdicts ---------------------------------------------------------------------------------


def test_streams_are_merged_before_the_first_command() -> None:
    script = "#!/bin/bash\nset -uxo pipefail\nsource a\nb\n"
    assert with_merged_streams(script) == "#!/bin/bash\nset -uxo pipefail\nexec 2>&1\nsource a\nb\n"


def _report(**found: list[str]) -> dict[str, Any]:
    empty: dict[str, Any] = {"resolved_ids": [], "unresolved_ids": [], "error_ids": [], "failure_reasons": {}}
    return empty | found


@pytest.mark.parametrize(
    ("report", "log", "verdict"),
    [
        (_report(resolved_ids=["i"]), "ran successfully", {"outcome": "resolved"}),
        (_report(unresolved_ids=["i"]), "", {"outcome": "unresolved"}),
        (_report(error_ids=["i"]), ">>>>> Patch Apply Failed:\nerror", {"outcome": "patch_failed"}),
        (_report(error_ids=["i"]), "Test timed out after 5 seconds.", {"outcome": "tests_timed_out"}),
        (
            _report(error_ids=["i"]),
            'container.exec_run(f"kill -TERM {exec_pid}", detach=True)\n400 Client Error: exec: "kill": executable '
            "file not found in $PATH",
            {"outcome": "tests_timed_out"},
        ),
        (
            _report(error_ids=["i"]),
            "ImageNotFound\nError: no image",
            {"error": "the harness judged nothing: Error: no image"},
        ),
        (_report(resolved_ids=["i"]), "Git diff before: + No space left on device", {"outcome": "resolved"}),
        (
            _report(error_ids=["i"]),
            "OSError: No space left on device",
            {"error": "disk full: OSError: No space left on device"},
        ),
    ],
)
def test_only_official_files_are_believed(report: Any, log: str, verdict: dict[str, Any]) -> None:
    assert swebench_verdict(report, "i", log, "") == verdict


def test_multi_swe_verdicts() -> None:
    failed = "error: patch failed: a.py:1\nerror: a.py: patch does not apply"
    unresolved = _report(unresolved_ids=["i"])
    assert multi_swe_verdict(unresolved, failed, "", timed_out=False) == {"outcome": "patch_failed"}
    compiler = "error: a.rs: does not exist\n" + "test a ... FAILED\n" * 30
    assert multi_swe_verdict(unresolved, compiler, "", timed_out=False) == {"outcome": "unresolved"}
    assert multi_swe_verdict(unresolved, "", "Error running i: no image", timed_out=False) == {
        "error": "the harness judged nothing: Error running i: no image"
    }
    assert "error" in multi_swe_verdict(
        _report(resolved_ids=["i"]), "test a ... ok", "Error running instance i", timed_out=False
    )
    binary = "error: cannot apply binary patch to 'a.png' without full index line"
    assert multi_swe_verdict(unresolved, binary, "", timed_out=False) == {"outcome": "patch_failed"}
    assert multi_swe_verdict(unresolved, "x", "", timed_out=True) == {"outcome": "tests_timed_out"}


class _Nowhere:
    """A host without an image to give."""

    def __init__(self) -> None:
        self.asked, self.released = 0, 0

    def ensure(self, task: Task) -> None:
        self.asked += 1
        raise OSError(f"missing image {task.image}")

    def release(self, task: Task) -> None:  # noqa: ARG002
        self.released += 1

    def container_options(self, task: Task) -> dict[str, Any]:  # noqa: ARG002
        return {}

    def remove_containers(self, labels: Any) -> None:
        pass


def test_infrastructure_is_tried_again_and_then_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plt_benchmarks.swe.judge.RETRY_WAITS_S", (0.0, 0.0))
    host = _Nowhere()
    scorer = PatchScorer("swebench", tmp_path, host, "t", 5, True)
    sample = Sample(TASK.id, {"task": TASK})
    score = scorer.score(sample, Answer("a patch"))
    assert score.error == f"infrastructure: missing image {TASK.image}"
    assert host.asked == 3
    gave_up = scorer.score(sample, Answer("", detail={"exit_status": "TimeExceeded", "steps": 3}))
    assert (gave_up.detail["outcome"], gave_up.detail["steps"], gave_up.values) == (
        "gave_up_time",
        3,
        {"resolved": False},
    )
    assert scorer.score(sample, Answer(" \n")).detail["outcome"] == "empty_patch"
    assert (host.asked, host.released) == (3, 3)


def test_a_harness_that_dies_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multi-SWE-bench ends its process on an error; and whatever stood in the folder before is not believed."""
    monkeypatch.setattr("plt_benchmarks.swe.judge.RETRY_WAITS_S", ())
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    host = _Nowhere()
    host.ensure = lambda _: None  # type: ignore[method-assign]
    scorer = PatchScorer("swebench", tmp_path / "judged", host, "t", 5, True)
    score = scorer.score(Sample(TASK.id, {"task": TASK}), Answer("a patch"))
    (folder,) = (tmp_path / "judged" / TASK.id).iterdir()
    assert score.error is not None
    assert "infrastructure: the harness ended with exit code 1" in score.error
    (folder / "verdict.json").write_text('{"outcome": "resolved"}')
    assert scorer.score(Sample(TASK.id, {"task": TASK}), Answer("a patch")).error is not None


def test_disk_is_estimated_by_images_and_environments() -> None:
    def tasks(count: int, environments: int) -> list[Task]:
        rows = [{**ROW, "version": f"1.{i % environments}", "instance_id": f"a__b-{i}"} for i in range(count)]
        return [swebench_task("row", row) for row in rows]

    everything = estimated_bytes(tasks(500, 100), "all")
    assert RESERVE + 100 * GIB < estimated_bytes(tasks(500, 100), "env") < everything
    assert estimated_bytes(tasks(500, 100), "none") == estimated_bytes(tasks(4, 4), "none") == RESERVE + 12 * GIB


# --- predictions ------------------------------------------------------------------------------------------


def test_predictions_in_all_official_forms(tmp_path: Path) -> None:
    record = {"instance_id": "a__b-1", "model_name_or_path": "m", "model_patch": "p"}
    forms = {
        "a.jsonl": json.dumps(record) + "\n\n",
        "b.json": json.dumps([record]),
        "c.json": json.dumps({"a__b-1": {"model_name_or_path": "m", "model_patch": "p"}}),
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        found = read_predictions(tmp_path / name)
        assert [(instance, p.model, p.patch) for instance, p in found.items()] == [("a__b-1", "m", "p")]
    (tmp_path / "d.jsonl").write_text(json.dumps({"org": "o", "repo": "r", "number": 7, "fix_patch": None}))
    assert read_predictions(tmp_path / "d.jsonl")["o__r-7"].patch == ""


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", "{", "p.jsonl:1: broken line"),
        ("p.jsonl", '{"instance_id": "a"}', "p.jsonl:1: expected the key 'model_patch'"),
        ("p.jsonl", '{"instance_id": "a", "model_patch": 3}', "expected the patch to be text, found int"),
        (
            "p.jsonl",
            2 * '{"instance_id": "a", "model_patch": ""}\n',
            "p.jsonl:2: instance a is there for the second time",
        ),
        ("p.json", '"x"', "expected a list or an object"),
        ("p.jsonl", '{"fix_patch": ""}', "expected the key 'org' beside fix_patch"),
    ],
)
def test_broken_predictions_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as refused:
        read_predictions(tmp_path / name)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    tasks = {"a__b-1": TASK, "o__r-7": multi_swe_task("here", dict(MULTI_ROW))}
    path = write_predictions(tmp_path, "org__m", {"a__b-1": "p\u2028\n", "o__r-7": "q"}, tasks)
    assert {instance: p.patch for instance, p in read_predictions(path).items()} == {
        "a__b-1": "p\u2028\n",
        "o__r-7": "q",
    }
    engine = PredictionsEngine.from_file(path, tasks)
    assert engine.current(("a__b-1", 0), "p\u2028\n")
    assert not engine.current(("a__b-1", 0), "p")
    with pytest.raises(UserError, match="1 of 2 instances are not in the data, first 'o__r-7'"):
        PredictionsEngine.from_file(path, {"a__b-1": TASK})


# --- conversations ----------------------------------------------------------------------------------------


class _Counting:
    """An engine that remembers its requests; a token is a character."""

    name = "counting"
    concurrent = True

    def __init__(self, context: int | None, text: str = "```mswea_bash_command\nls\n```") -> None:
        self.context, self.text = context, text
        self.asked: list[GenerationRequest] = []

    def count_tokens(self, request: GenerationRequest) -> int:
        return sum(len(turn.content) for turn in request.prompt.messages)

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Completion]:
        for request in requests:
            self.asked.append(request)
            yield Completion(request.id, self.text, "stop", chat=True, prompt_tokens=1, completion_tokens=2)


TEMPLATES = {"observation_template": "{{output.output}}", "format_error_template": "{{error}} {{finish_reason}}"}


def _chat(engine: Any, **options: Any) -> ChatModel:
    return ChatModel(SharedEngine(engine), "i#0", Decoding(), TEMPLATES, max_new_tokens=100, **options)


def _history(sizes: list[int]) -> list[dict[str, Any]]:
    """System prompt, issue, and a step for every size: an answer of 5 characters, and what came of it."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "S" * 40}, {"role": "user", "content": "ISSUE" * 8}]
    for number, size in enumerate(sizes):
        messages += [
            {"role": "assistant", "content": f"a{number:04}"},
            {"role": "user", "content": f"{number:04}" * size},
        ]
    return messages


@settings(max_examples=60)
@given(st.lists(st.integers(0, 400), max_size=12), st.integers(900, 4000))
def test_a_prompt_always_fits_and_keeps_the_issue_and_the_newest_step(sizes: list[int], context: int) -> None:
    engine = _Counting(context)
    message = _chat(engine).query(_history(sizes))
    (request,) = engine.asked
    assert message["extra"]["actions"] == [{"command": "ls"}]
    used = engine.count_tokens(request)
    assert used + (request.decoding.max_new_tokens or 0) <= context
    turns = request.prompt.messages
    assert turns[0].content == "S" * 40
    assert turns[1].content.startswith("ISSUE" * 8)
    if sizes:
        assert turns[-2].content == f"a{len(sizes) - 1:04}"
        assert turns[-1].content.startswith(f"{len(sizes) - 1:04}" * min(sizes[-1], 3))
    assert [turn.role for turn in turns[2:]] == ["assistant", "user"] * ((len(turns) - 2) // 2)
    left_out = 2 * len(sizes) + 2 - len(turns)
    assert (f"{left_out} earlier messages" in turns[1].content) == (left_out > 0)


def test_what_fits_is_left_alone() -> None:
    engine = _Counting(100_000)
    _chat(engine).query(_history([5, 6, 7]))
    assert [(turn.role, turn.content) for turn in engine.asked[0].prompt.messages] == [
        (message["role"], message["content"]) for message in _history([5, 6, 7])
    ]
    assert engine.asked[0].prompt.text.endswith("\n\n### assistant\n")


def test_an_issue_that_does_not_fit_ends_it() -> None:
    from minisweagent.exceptions import LimitsExceeded

    with pytest.raises(LimitsExceeded) as ended:
        _chat(_Counting(80)).query(_history([]))
    assert ended.value.messages[0]["extra"]["exit_status"] == "ContextExceeded"


@pytest.mark.parametrize(
    "refusal",
    ["HTTP 403: quota exceeded", "HTTP 404: no model long-context", "HTTP 400: max_tokens exceeds what is allowed"],
)
def test_another_refusal_of_an_endpoint_is_no_full_context(refusal: str) -> None:
    class Refusing(_Counting):
        def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Completion]:  # noqa: ARG002
            raise UserError(f"http://h/v1/chat/completions refused: {refusal}")

    with pytest.raises(UserError, match="refused"):
        _chat(Refusing(None)).query(_history([1]))


def test_an_answer_without_an_action_is_a_format_error() -> None:
    from minisweagent.exceptions import FormatError

    with pytest.raises(FormatError) as wrong:
        _chat(_Counting(None, text="no")).query(_history([]))
    assert "found 0" in wrong.value.messages[0]["content"]


@pytest.mark.parametrize(
    "text",
    [
        'I look.\n<tool_call>\n{"name": "bash", "arguments": {"command": "ls -a"}}\n</tool_call>',
        "I look.\n<tool_call>\n<function=bash>\n<parameter=command>\nls -a\n</parameter>\n</function>\n</tool_call>",
    ],
)
def test_tool_calls_are_read_in_both_written_forms(text: str) -> None:
    assert [(call["name"], json.loads(call["arguments"])) for call in written_tool_calls(text)] == [
        ("bash", {"command": "ls -a"})
    ]
    message = _chat(_Counting(None, text=text), actions="tools").query(_history([]))
    assert [action["command"] for action in message["extra"]["actions"]] == ["ls -a"]


def test_a_template_with_tools_gets_them(tmp_path: Path) -> None:  # noqa: ARG001
    from plt_benchmarks.protocols import Prompt
    from plt_eval.engines.hf_prompts import Prompts
    from plt_model.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    prompts = Prompts(tokenizer, use_chat=True, eos=[2])
    tool = {"type": "function", "function": {"name": "bash"}}
    assert prompts.takes_tools
    assert tokenizer.decode(prompts.encode(Prompt("", messages=(Message("user", "hi"),)), [tool])) == "[bash]hi"


# --- the shared engine ------------------------------------------------------------------------------------


class _OneAtATime:
    """An engine that only one thread may use."""

    name = "one"

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.busy = threading.Lock()

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Completion]:
        assert self.busy.acquire(blocking=False), "two threads at once"
        found = list(requests)
        self.batches.append(len(found))
        if any(request.id == "broken" for request in found):
            self.busy.release()
            raise UserError("no")
        for request in reversed(found):
            yield Completion(request.id, f"to {request.id}", "stop")
        self.busy.release()


def test_many_threads_share_one_engine_in_batches() -> None:
    from plt_benchmarks.protocols import Prompt

    engine = _OneAtATime()
    shared = SharedEngine(engine)  # type: ignore[arg-type]
    answers: dict[str, str] = {}

    def ask(name: str) -> None:
        for i in range(5):
            answers[f"{name}.{i}"] = shared.complete(GenerationRequest(f"{name}.{i}", Prompt("x"))).text

    threads = [threading.Thread(target=ask, args=(f"t{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {key: f"to {key}" for key in answers}
    assert (len(answers), sum(engine.batches)) == (40, 40)
    assert max(engine.batches) > 1
    with pytest.raises(UserError, match="no"):
        shared.complete(GenerationRequest("broken", Prompt("x")))
    assert shared.complete(GenerationRequest("after", Prompt("x"))).text == "to after"
    shared.close()
    with pytest.raises(RuntimeError, match="closed"):
        shared.complete(GenerationRequest("late", Prompt("x")))


# --- the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gold", "--predictions", "p.jsonl"], "--predictions and --gold exclude each other"),
        (["--gold", "--loops", "2"], "--loops has no effect with --gold: no model is asked"),
        (["--gold", "--agent-steps", "2"], "--agent-steps has no effect with --gold"),
        (["--gold", "--engine", "openai"], "--engine has no effect with --gold"),
        (["--engine", "replay"], "score stored patches with --predictions FILE"),
        (["--gold", "--n-samples", "2"], "--n-samples has no effect on suite swe: an instance is solved once"),
        (["--gold", "--scoring-workers", "2"], "use --workers"),
        (["--gold", "--instances", "a__b-3"], "no instance 'a__b-3' in rows.jsonl; did you mean a__b-1?"),
        (["--gold", "--wheels", "nowhere"], "--wheels nowhere: expected a folder of packages"),
        (["--predictions", "none.jsonl"], "--predictions none.jsonl: No such file"),
        (["--suite", "demo", "--gold"], "--gold has no effect on suite demo"),
        (["--suite", "multi-swe-bench", "--gold", "--split-streams"], "--split-streams has no effect"),
        (["--gold", "--data", "nowhere"], "data nowhere: no such file or folder"),
    ],
)
def test_mistakes_cost_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps(ROW) + "\n")
    with pytest.raises(SystemExit) as ended:
        main(["run", "--suite", "swe", "--data", "rows.jsonl", *arguments])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.strip().count("\n") == 0
    assert not Path("results").exists()


def test_load_rows_is_what_the_suites_use(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(MULTI_ROW) + "\n")
    assert load_rows(MULTI_SWE_BENCH.hub, tmp_path / "rows.jsonl", multi_swe_task) == MULTI_SWE_BENCH.load(
        tmp_path / "rows.jsonl"
    )
