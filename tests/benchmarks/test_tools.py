"""BFCL v3: problems, gold answers, verdicts, hostile answers, conversations, result files; by the official package."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar
from zipfile import ZipFile

import pytest

from plt_benchmarks.options import SuiteOptions
from plt_benchmarks.protocols import Answer, Prompt, Sample, Sandbox, SandboxJob, SandboxOutcome, Score, SuiteError
from plt_benchmarks.registry import get_suite
from plt_benchmarks.tools.package import ENVIRONMENT, archive, in_environment
from plt_benchmarks.tools.scorer import Judge, ToolsScorer
from plt_benchmarks.tools.suite import CATEGORIES, GOLD_MISSES, LIVE, MULTI_TURN, NON_LIVE, ToolsSuite
from plt_eval.cli.paper import _data
from plt_eval.engines.base import Completion, GenerationRequest, Loglikelihood, LoglikelihoodRequest
from plt_eval.errors import UserError
from plt_eval.report.columns import COLUMNS
from plt_eval.sandbox import open_sandbox
from plt_eval.tools_agent.calls import calls_of
from plt_eval.tools_agent.engine import TOO_LONG, ToolsEngine

official = pytest.mark.skipif(not ENVIRONMENT.present, reason="plt-eval install tools was not run")
PLT_EVAL = str(Path(sys.executable).with_name("plt-eval"))
MODES = ("prompt", "native")


def suite_of(selection: str | None = None, mode: str = "prompt") -> ToolsSuite:
    name = "tools" if selection is None else f"tools:{selection}"
    (suite,) = get_suite(name, SuiteOptions(tool_calls=mode))
    assert isinstance(suite, ToolsSuite)
    return suite


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return open_sandbox("bubblewrap")


@pytest.fixture(scope="module")
def problems() -> Callable[[str], dict[str, Sample]]:
    """All problems by id, for each mode read once."""
    read: dict[str, dict[str, Sample]] = {}

    def of(mode: str) -> dict[str, Sample]:
        if mode not in read:
            read[mode] = {sample.id: sample for sample in suite_of(mode=mode).load(None).samples}
        return read[mode]

    return of


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def scorer(mode: str, sandbox: Sandbox) -> Iterator[ToolsScorer]:
    made = ToolsScorer(mode, sandbox)
    yield made
    made.close()


def spread(samples: Iterable[Sample], single: int, several: int) -> list[Sample]:
    """Of each category some: every `single`th, and of conversations every `several`th."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.data["category"], []).append(sample)
    return [
        sample
        for category, inside in found.items()
        for sample in inside[:: several if category in MULTI_TURN else single]
    ]


def judge_all(scorer: ToolsScorer, answers: Sequence[tuple[Sample, str]]) -> dict[str, Score]:
    with ThreadPoolExecutor(2) as threads:
        scores = threads.map(lambda pair: scorer.score(pair[0], Answer(pair[1])), answers)
        return {sample.id: score for (sample, _), score in zip(answers, scores, strict=True)}


def right(scores: Mapping[str, Score]) -> set[str]:
    assert not [score.error for score in scores.values() if score.error]
    return {name for name, score in scores.items() if score.values["right"]}


# --- choosing -----------------------------------------------------------------------------------------


def test_selections() -> None:
    assert (suite_of().name, suite_of().problems) == ("tools", 4441)
    assert suite_of("all").name == "tools"
    assert suite_of("live").categories == tuple(LIVE)
    assert suite_of("multi_turn_base, Simple").categories == ("simple", "multi_turn_base")
    assert suite_of("multi_turn_base,simple").name == "tools-simple+multi_turn_base"
    assert len(suite_of("non_live,multi_turn_base").name) < 40
    assert suite_of().version != suite_of(mode="native").version


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("tools:simpel", SuiteOptions(), "did you mean simple"),
        ("tools:", SuiteOptions(), "expected a selection"),
        ("tools:simple,,java", SuiteOptions(), "no category ''"),
        ("tools", SuiteOptions(release="v1"), "--release has no effect on suite tools"),
        ("trace", SuiteOptions(tool_calls="native"), "--tool-calls has no effect on suite trace"),
    ],
)
def test_choices_that_there_are_not(name: str, options: SuiteOptions, said: str) -> None:
    with pytest.raises(SuiteError, match=said):
        get_suite(name, options)


def test_without_its_environment_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLT_EVAL_ENVIRONMENTS", str(tmp_path))
    with pytest.raises(SuiteError, match="plt-eval install tools"):
        suite_of().load(None)
    assert [need.present for need in suite_of().needs()] == [False]


# --- data ---------------------------------------------------------------------------------------------


@official
def test_the_data_is_the_packages_own(problems: Callable[[str], dict[str, Sample]]) -> None:
    samples = problems("prompt").values()
    counted = {category: sum(s.data["category"] == category for s in samples) for category in CATEGORIES}
    assert counted == CATEGORIES
    assert all(sample.id.rsplit("_", 1)[0] == sample.data["category"] for sample in samples)
    assert suite_of("simple").load(None).revision == "bfcl_eval-2025.7.17"
    assert suite_of("simple").load(None).sha256.startswith("f0ca380dde8d01ee")


@official
def test_prompts_tell_the_functions_in_one_of_two_ways(problems: Callable[[str], dict[str, Sample]]) -> None:
    asked = suite_of().prompt(problems("prompt")["simple_0"])
    assert [turn.role for turn in asked.messages] == ["system", "user"]
    assert asked.messages[0].content.startswith("You are an expert in composing functions.")
    assert "'name': 'calculate_triangle_area'" in asked.messages[0].content
    assert asked.text.endswith("height of 5 units.\n\n### assistant\n")
    native = problems("native")["simple_1"]
    assert [turn.role for turn in suite_of(mode="native").prompt(native).messages] == ["user"]
    assert [tool["function"]["name"] for tool in native.data["tools"]] == ["math_factorial"]
    assert native.data["tools"][0]["function"]["parameters"]["type"] == "object"


@official
@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "BFCL_v3_simple.json: cannot be read"),
        ({"BFCL_v3_simple.json": "{"}, "line 1: expected a JSON object, found broken JSON"),
        ({"BFCL_v3_simple.json": '{"id": 3}'}, "line 1: expected an object with a string 'id'"),
        ({"BFCL_v3_simple.json": '{"id": "one"}'}, "expected ids like simple_0"),
        (
            {"BFCL_v3_simple.json": '{"id": "simple_0"}', "possible_answer/BFCL_v3_simple.json": ""},
            "simple_0 has no 'question'",
        ),
        (
            {
                "BFCL_v3_simple.json": '{"id": "simple_0", "question": [[]], "function": []}',
                "possible_answer/BFCL_v3_simple.json": "",
            },
            "simple_0 has no ground_truth",
        ),
        (
            {
                "BFCL_v3_simple.json": '{"id": "simple_0", "question": [], "function": []}',
                "possible_answer/BFCL_v3_simple.json": '{"id": "simple_0", "ground_truth": []}',
            },
            "makes no prompt of simple_0",
        ),
        (
            {
                "BFCL_v3_simple.json": '{"id": "mine_0", "question": [[]], "function": []}',
                "possible_answer/BFCL_v3_simple.json": '{"id": "mine_0", "ground_truth": []}',
            },
            "expected ids like simple_0, found mine_0",
        ),
        (
            {
                "BFCL_v3_simple.json": '{"id": "simple_0", "question": [[{"role": "user", "content": ""}]], '
                '"function": []}',
                "possible_answer/BFCL_v3_simple.json": '{"id": "simple_0", "ground_truth": ["f(1)"]}',
            },
            "simple_0: expected ground_truth to be a list of calls",
        ),
    ],
)
def test_data_that_is_none(files: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(SuiteError, match=said):
        suite_of("simple").load(tmp_path)


@official
def test_data_of_ones_own(tmp_path: Path, problems: Callable[[str], dict[str, Sample]]) -> None:
    sample = problems("prompt")["simple_3"]
    (tmp_path / "possible_answer").mkdir()
    (tmp_path / "BFCL_v3_simple.json").write_text(json.dumps(dict(sample.data["entry"])))
    answer = {"id": "simple_3", "ground_truth": sample.data["answer"]}
    (tmp_path / "possible_answer" / "BFCL_v3_simple.json").write_text(json.dumps(answer))
    own = suite_of("simple").load(tmp_path)
    assert [found.data["messages"] for found in own.samples] == [sample.data["messages"]]
    assert own.revision == f"local:{tmp_path.name}"
    with pytest.raises(SuiteError, match="expected a folder"):
        suite_of("simple").load(tmp_path / "BFCL_v3_simple.json")


# --- verdicts -----------------------------------------------------------------------------------------


@official
def test_gold_answers_are_right_but_for_those_that_cannot_be(
    mode: str, scorer: ToolsScorer, problems: Callable[[str], dict[str, Sample]]
) -> None:
    samples = {sample.id: sample for sample in spread(problems(mode).values(), 25, 67)}
    samples |= {name: problems(mode)[name] for name in GOLD_MISSES}
    suite = suite_of(mode=mode)
    scores = judge_all(scorer, [(sample, suite.gold(sample).text) for sample in samples.values()])  # type: ignore[union-attr]
    assert samples.keys() - right(scores) == GOLD_MISSES.keys()
    assert all(scores[name].detail["why"] for name in GOLD_MISSES)


@official
@pytest.mark.slow
def test_all_gold_answers(mode: str, scorer: ToolsScorer, problems: Callable[[str], dict[str, Sample]]) -> None:
    suite = suite_of(mode=mode)
    answers = [(sample, suite.gold(sample).text) for sample in problems(mode).values()]  # type: ignore[union-attr]
    assert problems(mode).keys() - right(judge_all(scorer, answers)) == GOLD_MISSES.keys()


def empty_answer(sample: Sample, mode: str) -> str:
    if sample.data["category"] in MULTI_TURN:
        return json.dumps([[""] for _ in sample.data["answer"]])
    return "" if mode == "prompt" else '""'


@official
def test_an_empty_answer_is_right_where_no_call_is_wanted_and_nowhere_else(
    mode: str, scorer: ToolsScorer, problems: Callable[[str], dict[str, Sample]]
) -> None:
    samples = spread(problems(mode).values(), 50, 100)
    scores = judge_all(scorer, [(sample, empty_answer(sample, mode)) for sample in samples])
    assert right(scores) == {sample.id for sample in samples if "irrelevance" in sample.data["category"]}


@official
def test_answers_of_other_problems_are_wrong(
    mode: str, scorer: ToolsScorer, problems: Callable[[str], dict[str, Sample]]
) -> None:
    suite, samples = suite_of(mode=mode), spread(problems(mode).values(), 50, 67)
    answers = []
    for sample, other in zip(samples, [*samples[1:], samples[0]], strict=True):
        if sample.data["category"] == other.data["category"] and "relevance" not in sample.data["category"]:
            gold = suite.gold(other)
            assert gold is not None
            if sample.data["category"] in MULTI_TURN:
                turns = (json.loads(gold.text) + [["no"]] * 9)[: len(sample.data["answer"])]
                gold = Answer(json.dumps(turns))
            answers.append((sample, gold.text))
    assert len(answers) > 40
    assert not right(judge_all(scorer, answers))


@official
def test_a_call_is_wrong_where_none_is_wanted(sandbox: Sandbox, problems: Callable[[str], dict[str, Sample]]) -> None:
    judge = ToolsScorer("prompt", sandbox)
    try:
        wanted = ("irrelevance_0", "live_irrelevance_0-0-0", "live_relevance_0-0-0")
        samples = [problems("prompt")[name] for name in wanted]
        assert right(judge_all(judge, [(sample, "[f(x=1)]") for sample in samples])) == {"live_relevance_0-0-0"}
    finally:
        judge.close()


@official
def test_conversations_that_did_not_end_are_wrong(
    sandbox: Sandbox, problems: Callable[[str], dict[str, Sample]]
) -> None:
    sample = problems("prompt")["multi_turn_base_0"]
    gold = json.loads(suite_of().gold(sample).text)  # type: ignore[union-attr]
    judge = ToolsScorer("prompt", sandbox)
    try:
        for text in (json.dumps(gold[:-1]), TOO_LONG, json.dumps(TOO_LONG), "{}", json.dumps([1, 2, 3, 4])):
            score = judge.score(sample, Answer(text))
            assert score.error is None
            assert score.values == {"right": False}
        odd = [*gold[:-1], [{"no": "text"}, 7, None, *gold[-1]]]
        assert judge.score(sample, Answer(json.dumps(odd))).values == {"right": True}
    finally:
        judge.close()


@official
def test_the_same_problem_twice_in_one_process_starts_anew(
    sandbox: Sandbox, problems: Callable[[str], dict[str, Sample]]
) -> None:
    sample = problems("prompt")["multi_turn_base_0"]
    gold = suite_of().gold(sample)
    assert gold is not None
    judge = ToolsScorer("prompt", sandbox)
    try:
        assert all(judge.score(sample, gold).values["right"] for _ in range(3))
    finally:
        judge.close()


# --- the official arithmetic --------------------------------------------------------------------------


def scores_for(counts: Mapping[str, tuple[int, int]]) -> dict[str, list[Score]]:
    return {f"{c}_{i}": [Score({"right": i < good})] for c, (good, n) in counts.items() for i in range(n)}


OFFICIAL_COLUMNS = {
    "overall": "Overall Acc",
    "live": "Live Overall Acc",
    "non_live": "Non_Live Overall Acc",
    "multi_turn": "Multi Turn Overall Acc",
}


@official
@pytest.mark.parametrize("seed", range(3))
def test_overall_is_what_the_leaderboard_computes(seed: int) -> None:
    chance = random.Random(seed)
    counts = {category: (chance.randint(0, n), n) for category, n in CATEGORIES.items()}
    metrics = suite_of().metrics(scores_for(counts))
    judge = Judge()
    try:
        told = judge.ask({"kind": "table", "accuracies": {c: (good / n, n) for c, (good, n) in counts.items()}})
    finally:
        judge.close()
    tables = told["tables"]
    for name, column in OFFICIAL_COLUMNS.items():
        computed = tables[f"data_{name}.csv"][column]
        assert metrics[f"tools.{name}"].value == pytest.approx(computed, abs=1e-12)
    assert metrics["tools.overall"].n == 4441
    assert metrics["tools.overall"].low < metrics["tools.overall"].value < metrics["tools.overall"].high


def test_groups_are_measured_where_all_of_their_categories_are() -> None:
    some = suite_of("live,simple").metrics(scores_for({**dict.fromkeys(LIVE, (1, 2)), "simple": (1, 2)}))
    assert set(some) == {"tools.live", "tools.simple", *(f"tools.{c}" for c in LIVE)}
    assert not {"tools.live", "tools.overall"} & set(suite_of().metrics(scores_for({"simple": (1, 2)})))
    broken = {"simple_0": [Score(error="x")], "simple_1": [Score({"right": True}), Score({"right": False})]}
    assert suite_of("simple").metrics(broken)["tools.simple"].value == 0.5
    every = suite_of().metrics(scores_for(dict.fromkeys(CATEGORIES, (2, 2))))
    assert next(iter(every)) == "tools.overall"
    assert every["tools.overall"].value == 1.0
    assert set(NON_LIVE) | set(LIVE) | set(MULTI_TURN) == set(CATEGORIES)


# --- hostile answers ----------------------------------------------------------------------------------


def injected(expression: str) -> str:
    """A call whose argument the official code evaluates: it writes keys of dictionaries into a program as they are."""
    return f"[echo(content={{{json.dumps(f'''x': {expression}, 'y''')}: 1}})]"


FORGED = json.dumps({"turns": [{"steps": [{"calls": ["ls()"]}], "results": [["None"]], "state": {}}] * 4}).encode()
"""What an execution tells, as an answer may guess it: without the states that it should have come to."""


@official
def test_calls_cannot_read_the_gold_answers(sandbox: Sandbox, problems: Callable[[str], dict[str, Sample]]) -> None:
    from plt_benchmarks.tools.scorer import converse_step

    entry = problems("prompt")["multi_turn_base_0"].data["entry"]

    def gave(expression: str) -> str:
        told = converse_step(sandbox, entry, "prompt", [{"text": injected(expression), "calls": []}])
        return str(told["messages"][-1]["content"])

    assert "forty-two" in gave("'forty-' + 'two'")  # it is evaluated
    assert "nothing there" in gave(f"__import__('os').path.exists({str(ENVIRONMENT.folder)!r}) or 'nothing there'")
    with ZipFile(BytesIO(archive())) as code:
        assert {Path(name).suffix for name in code.namelist()} == {".py", ".pyc"}
        assert {Path(name).parts[0] for name in code.namelist()} == {"bfcl_eval", "inside", "mpmath"}


@official
@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')._exit(0)",
        "__import__('os').kill(1, 9) or 1",
        f"[__import__('os').write(3, {FORGED!r}), __import__('os')._exit(0)]",
        f"[__import__('os').write(3, {FORGED.replace(b'{}', b'null')!r}), __import__('os')._exit(0)]",
        "[__import__('os').write(3, b'{'), __import__('os')._exit(0)]",
        "[setattr(type(o), '__eq__', lambda a, b: True) for o in __import__('gc').get_objects() "
        "if type(o).__name__ in ('GorillaFileSystem', 'Directory', 'File')] and 1",
    ],
)
def test_calls_cannot_make_themselves_right(
    expression: str, sandbox: Sandbox, problems: Callable[[str], dict[str, Sample]]
) -> None:
    sample = problems("prompt")["multi_turn_base_0"]
    turns = [[injected(expression)] for _ in sample.data["answer"]]
    judge = ToolsScorer("prompt", sandbox)
    try:
        score = judge.score(sample, Answer(json.dumps(turns)))
        assert (score.error, score.values) == (None, {"right": False})
    finally:
        judge.close()


class Watched:
    """The sandbox, and what it was asked to run."""

    name = "watched"

    def __init__(self, inner: Sandbox) -> None:
        self.inner = inner
        self.kinds: list[str] = []

    def run(self, job: SandboxJob) -> SandboxOutcome:
        self.kinds.append(json.loads(job.stdin)["kind"])
        return self.inner.run(job)


@official
def test_what_the_decoder_evaluates_is_evaluated_in_the_sandbox(
    sandbox: Sandbox, problems: Callable[[str], dict[str, Sample]], tmp_path: Path
) -> None:
    watched, sample = Watched(sandbox), problems("prompt")["simple_0"]
    judge = ToolsScorer("prompt", watched)
    mark = tmp_path / "mark"
    try:
        assert judge.score(sample, Answer("[calculate_triangle_area(base=10, height=5)]")).values["right"]
        assert watched.kinds == []
        assert judge.score(sample, Answer("[calculate_triangle_area(base=10, height=2+3)]")).values["right"]
        assert not judge.score(sample, Answer("[calculate_triangle_area(base=10, height=2+4)]")).values["right"]
        assert watched.kinds == ["decode", "decode"]
        evil = f"[calculate_triangle_area(base=10, height=5 + (open({str(mark)!r}, 'w').write('x') and 0))]"
        score = judge.score(sample, Answer(evil))
        assert (score.error, score.values) == (None, {"right": False})
        assert not mark.exists()
    finally:
        judge.close()


@official
@pytest.mark.parametrize("text", ["[" * 5000, "f(" * 5000, "-" * 50000 + "1", "[f(x=\ud800)]", "\0", "(" * 99 + "é"])
def test_odd_texts_are_wrong(text: str, sandbox: Sandbox, problems: Callable[[str], dict[str, Sample]]) -> None:
    judge = ToolsScorer("prompt", sandbox)
    try:
        for name in ("simple_0", "java_0", "javascript_0", "live_relevance_0-0-0"):
            score = judge.score(problems("prompt")[name], Answer(text))
            assert (score.error, score.values) == (None, {"right": False})
    finally:
        judge.close()


@official
@pytest.mark.parametrize("depth", [300, 900, 960, 980, 990, 5000])
def test_deep_answers_are_wrong(depth: int, sandbox: Sandbox, problems: Callable[[str], dict[str, Sample]]) -> None:
    judge = ToolsScorer("native", sandbox)
    try:
        for name in ("simple_0", "multi_turn_base_0"):
            score = judge.score(problems("native")[name], Answer("[" * depth + "]" * depth))
            assert (score.error, score.values) == (None, {"right": False})
    finally:
        judge.close()


@official
def test_a_judge_that_was_killed_is_no_verdict(sandbox: Sandbox, problems: Callable[[str], dict[str, Sample]]) -> None:
    judge, sample = ToolsScorer("prompt", sandbox), problems("prompt")["simple_0"]
    try:
        judge._idle[0]._process.kill()
        judge._idle[0]._process.wait()
        assert "judging process ended" in str(judge.score(sample, Answer("x")).error)
        assert judge.score(sample, Answer("x")).error is None
    finally:
        judge.close()


# --- conversations ------------------------------------------------------------------------------------


class Scripted:
    """An engine that says `say(question, step)`, and remembers what it was asked."""

    name = "scripted"

    def __init__(self, say: Callable[[GenerationRequest], Completion], *, takes_tools: bool = False) -> None:
        self.say = say
        self.takes_tools = takes_tools
        self.asked: list[GenerationRequest] = []

    def identity(self) -> Mapping[str, Any]:
        return {"model": self.name}

    def facts(self) -> Mapping[str, str]:
        return {}

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Completion]:
        for request in requests:
            self.asked.append(request)
            yield self.say(request)

    def loglikelihood(self, requests: Iterable[LoglikelihoodRequest]) -> Iterator[Loglikelihood]:  # noqa: ARG002
        raise AssertionError

    def close(self) -> None: ...


class Reading(Scripted):
    """Says the gold answer of each turn, then a sentence, then on to the next turn."""

    def __init__(self, gold: Sequence[Any], mode: str) -> None:
        super().__init__(self._next, takes_tools=True)
        self.steps = [step for (first,) in gold for step in ([first, "Done."] if first != "Done." else ["Done."])]
        self.steps = [step for step in self.steps if isinstance(step, (str, list))]
        self.mode = mode

    def _next(self, request: GenerationRequest) -> Completion:
        step = self.steps[len(self.asked) - 1]
        if isinstance(step, str):
            return Completion(request.id, step, "stop", chat=True, prompt_tokens=3, completion_tokens=2)
        calls = [{"id": "x", "name": name, "arguments": given} for call in step for name, given in call.items()]
        return Completion(request.id, "", "stop", chat=True, detail={"tool_calls": calls})


def gold_turns(sample: Sample, mode: str) -> list[list[Any]]:
    """Refusals are one step, and so told from calls."""
    turns = json.loads(suite_of(mode=mode).gold(sample).text)  # type: ignore[union-attr]
    return [["Done."] if not calls else turn for turn, calls in zip(turns, sample.data["answer"], strict=True)]


UNBROKEN = """
import json, os, sys
request = json.load(sys.stdin)
out = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
from inside.official import answer_of, make_handler, open_package, plain_message
open_package()
seen = []
def asked(messages, tools):
    seen.append({"messages": [plain_message(message) for message in messages], "tools": tools})
    return answer_of(json.loads(json.dumps(request["said"][len(seen) - 1])))
result, _ = make_handler(request["mode"], asked).inference(request["entry"], False, True)
os.write(out, json.dumps({"seen": json.loads(json.dumps(seen)), "result": result}).encode())
"""


def unbroken(sample: Sample, mode: str, said: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The official conversation in one process, with these answers: what was asked, and the result."""
    command = in_environment("judge")
    command[-1] = command[-1].partition("from inside")[0].rstrip("; ") + "\n" + UNBROKEN
    request = json.dumps({"entry": sample.data["entry"], "mode": mode, "said": said})
    done = subprocess.run(command, input=request, capture_output=True, text=True, cwd=folder, check=True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@official
@pytest.mark.parametrize("category", ["multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param"])
def test_a_conversation_is_the_official_one(
    category: str, mode: str, sandbox: Sandbox, problems: Callable[[str], dict[str, Sample]], tmp_path: Path
) -> None:
    sample = problems(mode)[f"{category}_1"]
    suite = suite_of(mode=mode)
    engine = Reading(gold_turns(sample, mode), mode)
    tools = ToolsEngine(engine, suite, [sample], lambda: sandbox)
    (completion,) = tools.generate([GenerationRequest(f"{sample.id}#0", suite.prompt(sample))])
    assert completion.error is None
    assert len(engine.asked) == len(engine.steps) == completion.detail["steps"]
    assert len({request.id for request in engine.asked}) == len(engine.asked)

    said = []
    for number, step in enumerate(engine.steps):
        calls = [(name, given) for call in step for name, given in call.items()] if isinstance(step, list) else []
        named = [{"id": f"call_{number}_{i}", "name": n, "arguments": g} for i, (n, g) in enumerate(calls)]
        said.append({"text": "" if isinstance(step, list) else step, "calls": named})
    whole = unbroken(sample, mode, said, tmp_path)
    for request, seen in zip(engine.asked, whole["seen"], strict=True):
        assert [(m.role, m.content) for m in request.prompt.messages] == [
            (m["role"], m["content"]) for m in seen["messages"]
        ]
        assert list(request.tools) == seen["tools"]
    assert json.loads(completion.text) == whole["result"]

    judge = suite.scorer(sandbox)
    try:
        assert judge.score(sample, Answer(completion.text)).values == {"right": True}
    finally:
        judge.close()


@official
def test_functions_that_were_held_back_come_with_their_turn(
    sandbox: Sandbox, problems: Callable[[str], dict[str, Sample]]
) -> None:
    sample = problems("prompt")["multi_turn_miss_func_0"]
    engine = Scripted(lambda request: Completion(request.id, "nothing to call", "stop"))
    tools = ToolsEngine(engine, suite_of(), [sample], lambda: sandbox)
    (completion,) = tools.generate([GenerationRequest(f"{sample.id}#0", Prompt(""))])
    assert json.loads(completion.text) == [["nothing to call"]] * 5
    assert "'name': 'sort'" not in engine.asked[0].prompt.messages[0].content
    told = engine.asked[3].prompt.messages[-1].content
    assert "'name': 'sort'" in told
    assert told.endswith("What about now?")


@official
def test_a_turn_without_end_is_ended(sandbox: Sandbox, problems: Callable[[str], dict[str, Sample]]) -> None:
    sample = problems("prompt")["multi_turn_base_0"]
    engine = Scripted(lambda request: Completion(request.id, "[pwd()]", "stop"))
    tools = ToolsEngine(engine, suite_of(), [sample], lambda: sandbox)
    (completion,) = tools.generate([GenerationRequest(f"{sample.id}#0", Prompt(""))])
    assert json.loads(completion.text) == [["[pwd()]"] * 21]
    judge = suite_of().scorer(sandbox)
    try:
        assert judge.score(sample, Answer(completion.text)).detail["why"] == "the conversation ended in turn 1 of 4"
    finally:
        judge.close()


@official
def test_what_does_not_fit_and_what_breaks(sandbox: Sandbox, problems: Callable[[str], dict[str, Sample]]) -> None:
    samples = [problems("prompt")[name] for name in ("simple_0", "simple_1", "multi_turn_base_0")]
    requests = [GenerationRequest(f"{sample.id}#0", suite_of().prompt(sample)) for sample in samples]

    engine: Any = Scripted(lambda request: Completion(request.id, "x", "stop"))
    engine.context, engine.count_tokens = 1000, lambda request: 997 if request.id.startswith("simple_1") else 999
    found = {c.request_id: c for c in ToolsEngine(engine, suite_of(), samples, lambda: sandbox).generate(requests)}
    assert found["simple_1#0"].text == "x"
    assert [request.decoding.max_new_tokens for request in engine.asked] == [1]
    assert found["simple_0#0"].text == TOO_LONG
    assert found["multi_turn_base_0#0"].text == TOO_LONG

    broken = Scripted(lambda request: Completion(request.id, "", "error", error="no answer"))
    errors = ToolsEngine(broken, suite_of(), samples, lambda: sandbox).generate(requests)
    assert all("no answer" in str(completion.error) for completion in errors)

    def refuse(request: GenerationRequest) -> Completion:  # noqa: ARG001
        raise UserError("http://x refused: HTTP 400: maximum context length is 10 tokens")

    server: Any = Scripted(refuse)
    server.concurrent = True
    refused = ToolsEngine(server, suite_of(), samples, lambda: sandbox).generate(requests)
    assert [completion.text for completion in refused] == [TOO_LONG] * 3


@official
@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"messages": [{"role": "user", "content": "x", "tool_calls": 5}], "tools": []}, "executing the calls"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [1]}, "executing the calls"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": []}, "does not end"),
    ],
)
def test_questions_that_calls_have_shaped_end_the_conversation(
    told: dict[str, Any], said: str, problems: Callable[[str], dict[str, Sample]]
) -> None:
    class Shaped:
        name = "shaped"

        def run(self, job: SandboxJob) -> SandboxOutcome:  # noqa: ARG002
            return SandboxOutcome("exited", 0, json.dumps(told).encode(), b"", 0.1)

    sample = problems("prompt")["multi_turn_base_0"]
    engine = Scripted(lambda request: Completion(request.id, "[pwd()]", "stop"))
    tools = ToolsEngine(engine, suite_of(), [sample], Shaped)
    (completion,) = tools.generate([GenerationRequest(f"{sample.id}#0", Prompt(""))])
    assert said in completion.text
    assert len(engine.asked) <= 21 * len(sample.data["entry"]["question"])


# --- calls of tools -----------------------------------------------------------------------------------


@official
def test_tools_need_an_engine_that_takes_them() -> None:
    engine = Scripted(lambda request: Completion(request.id, "", "stop"))
    with pytest.raises(UserError, match="--tool-calls native: the model's chat template has no tools"):
        ToolsEngine(engine, suite_of(mode="native"), [], lambda: pytest.fail("no sandbox"))


TOOL = {"function": {"name": "f", "parameters": {"properties": {"n": {"type": "integer"}, "s": {"type": "string"}}}}}


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n</tool_call>', [("f", {"n": 1})]),
        ('<tool_call>{"name": "f", "arguments": {"n": "1"}}</tool_call>', [("f", {"n": "1"})]),
        ("<function=f>\n<parameter=n>\n12\n</parameter><parameter=s>\n12\n</parameter>\n</function>",
         [("f", {"n": 12, "s": "12"})]),
        ("<function=f><parameter=n>many</parameter></function>", [("f", {"n": "many"})]),
        ("f(n=1)", []),
        ("<tool_call>{broken}</tool_call>", []),
        ('<tool_call>{"name": "\\ud800", "arguments": "\\"\\udc00\\""}</tool_call>', [("\ufffd", "\ufffd")]),
        ('<tool_call>{"name": "f", "arguments": {"n": ' + "[" * 20_000 + "]" * 20_000 + "}}</tool_call>", []),
    ],
)  # fmt: skip
def test_calls_as_models_write_them(text: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    found = calls_of(Completion("x", text, "stop"), [TOOL])
    assert [(call["name"], json.loads(call["arguments"])) for call in found] == calls


def test_arguments_that_are_no_json_stay_as_they_are() -> None:
    written = '<tool_call>{"name": "f", "arguments": "no json"}</tool_call><function=f></function>'
    found = calls_of(Completion("x", written, "stop"), [TOOL])
    assert found == [{"name": "f", "arguments": "no json"}, {"name": "f", "arguments": "{}"}]


@official
def test_single_answers_of_tools_are_calls_or_texts(problems: Callable[[str], dict[str, Sample]]) -> None:
    sample = problems("native")["simple_1"]
    written = '<tool_call>{"name": "math_factorial", "arguments": {"number": 5}}</tool_call>'
    for text, told in ((written, [{"math_factorial": '{"number": 5}'}]), ('[{"f": "{}"}]', '[{"f": "{}"}]')):
        engine = Scripted(lambda request, text=text: Completion(request.id, text, "stop"), takes_tools=True)  # type: ignore[misc]
        tools = ToolsEngine(engine, suite_of(mode="native"), [sample], lambda: pytest.fail("no sandbox"))
        (completion,) = tools.generate([GenerationRequest("simple_1#0", Prompt(""))])
        assert json.loads(completion.text) == told
        assert [tool["function"]["name"] for tool in engine.asked[0].tools] == ["math_factorial"]


# --- the command --------------------------------------------------------------------------------------


def command(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PLT_EVAL, *words], capture_output=True, text=True, cwd=folder, check=False)


@official
def test_from_a_run_to_result_files(tmp_path: Path) -> None:
    run = ("run", "--suite", "tools:live_parallel,javascript", "--engine", "replay", "--completions", "gold", "--json")
    done = command(*run, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)
    assert {name: metric["value"] for name, metric in result["metrics"].items()} == {
        "tools.javascript": 0.98,
        "tools.live_parallel": 1.0,
    }
    assert "complete already" in command(*run, folder=tmp_path).stderr
    (folder,) = (tmp_path / "results" / "runs").iterdir()
    done = command("export", folder.name, "--format", "bfcl", "--out", "out", folder=tmp_path)
    assert "bfcl evaluate --model gpt-4o-2024-11-20 --test-category" in done.stdout
    (written,) = tmp_path.glob("out/result/gpt-4o-2024-11-20/BFCL_v3_live_parallel_result.json")
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(rows) == 16
    assert all(row["result"].startswith("[") for row in rows)

    assert command(*run, "--limit", "60", folder=tmp_path).returncode == 0
    (cut,) = set((tmp_path / "results" / "runs").iterdir()) - {folder}
    refused = command("export", cut.name, "--format", "bfcl", "--out", "cut", folder=tmp_path)
    assert (refused.returncode, "has 10 of 16 problems of live_parallel" in refused.stderr) == (2, True)
    partial = command("export", cut.name, "--format", "bfcl", "--out", "cut", "--partial", folder=tmp_path)
    assert partial.returncode == 0
    assert [path.name for path in tmp_path.glob("cut/result/*/*")] == ["BFCL_v3_javascript_result.json"]


class Endpoint(BaseHTTPRequestHandler):
    """Calls `pwd` once a turn, then says that it is done. `asked` are the requests."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        message: dict[str, Any] = {"role": "assistant", "content": "Done."}
        if body["messages"][-1]["role"] == "user":
            function = {"name": "pwd", "arguments": "{}"}
            message = {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": function}]}
        answer = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@official
def test_an_endpoint_is_given_tools_and_their_results(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        place = ("--endpoint", f"http://127.0.0.1:{server.server_port}/v1", "--api-model", "m", "--engine", "openai")
        run = ("run", "--suite", "tools:multi_turn_base", "--tool-calls", "native", "--limit", "1", "--json", *place)
        done = command(*run, folder=tmp_path)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["metrics"]["tools.multi_turn_base"]["value"] == 0
    assert len(Endpoint.asked) == 8
    last = Endpoint.asked[-1]
    assert "pwd" in [tool["function"]["name"] for tool in last["tools"]]
    assert [turn["role"] for turn in last["messages"]] == ["user", "assistant", "tool", "assistant"] * 3 + [
        "user",
        "assistant",
        "tool",
    ]
    assert "workspace" in last["messages"][2]["content"]
    assert last["messages"][2]["tool_call_id"] == last["messages"][1]["tool_calls"][0]["id"]


def test_the_paper_needs_no_folder_for_data_that_the_package_carries(tmp_path: Path) -> None:
    (column,) = [column for column in COLUMNS if column.name == "bfcl_v3"]
    assert _data(column, tmp_path) is None
    (tmp_path / "bfcl").mkdir()
    assert _data(column, tmp_path) == tmp_path / "bfcl"
    assert column.metric == "tools.overall"


@official
@pytest.mark.slow
@pytest.mark.skipif("PLT_EVAL_BFCL" not in os.environ, reason="PLT_EVAL_BFCL names no bfcl command")
def test_the_official_command_agrees(mode: str, tmp_path: Path, problems: Callable[[str], dict[str, Sample]]) -> None:
    """Of every four problems of a category two are answered rightly, one with another's answer, one with nothing."""
    suite, place = suite_of(mode=mode), dict.fromkeys(CATEGORIES, 0)
    by_category: dict[str, list[Sample]] = {}
    for sample in problems(mode).values():
        by_category.setdefault(sample.data["category"], []).append(sample)
    with (tmp_path / "mixed.jsonl").open("w") as file:
        for sample in problems(mode).values():
            category = sample.data["category"]
            place[category] += 1
            inside, part = by_category[category], place[category] % 4
            gold = suite.gold(inside[(place[category] + 6) % len(inside)] if part == 2 else sample)
            assert gold is not None
            text = gold.text if part else empty_answer(sample, mode)
            file.write(json.dumps({"task_id": sample.id, "completion": text}) + "\n")
    run = ("run", "--suite", "tools", "--engine", "replay", "--completions", "mixed.jsonl", "--tool-calls", mode)
    assert command(*run, folder=tmp_path).returncode == 0
    (folder,) = (tmp_path / "results" / "runs").iterdir()
    said = command("export", folder.name, "--format", "bfcl", "--out", "out", folder=tmp_path).stdout
    model = said.partition("--model ")[2].split()[0]
    environment = {**os.environ, "BFCL_PROJECT_ROOT": str(tmp_path / "out"), "OPENAI_API_KEY": "none"}
    subprocess.run(
        [os.environ["PLT_EVAL_BFCL"], "evaluate", "--model", model, "--test-category", "all"],
        env=environment, check=True, capture_output=True,
    )  # fmt: skip
    wrong = set()
    for path in (tmp_path / "out" / "score" / model).glob("*_score.json"):
        wrong |= {row["id"] for row in map(json.loads, path.read_text().splitlines()) if "id" in row}
    ours = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {row["sample_id"] for row in ours if not row["values"]["right"]} == wrong
