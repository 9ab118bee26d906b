"""Scores for HumanEval+ and MBPP+: run the answer in the sandbox, compare what it returned with the official code."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Mapping
from typing import Any

from plt_benchmarks.evalplus_judge.candidate import Candidate, InputSet, JudgingError, Transcript, run_candidate
from plt_benchmarks.evalplus_judge.check import Request
from plt_benchmarks.evalplus_judge.official import FAULTS, always_fails, evalplus_folder
from plt_benchmarks.evalplus_judge.oracle import Expected, Oracle
from plt_benchmarks.evalplus_judge.pool import JudgePool
from plt_benchmarks.evalplus_judge.problem import SETS, Dataset, Problem
from plt_benchmarks.protocols import Answer, Sample, Sandbox, Score

OUTPUT_BYTES = 16 << 20
"""Besides twice the size of the expected outputs, what a candidate may return."""


class EvalPlusScorer:
    """A Scorer of one data set. Thread-safe. Raises SuiteError when the official scorer is not installed."""

    def __init__(self, dataset: Dataset, sandbox: Sandbox, oracle: Oracle | None = None) -> None:
        evalplus_folder()
        self._dataset: Dataset = dataset
        self._sandbox = sandbox
        self._oracle = oracle or Oracle(sandbox)
        self._judges = JudgePool()
        self._lock = threading.Lock()
        self._problems: dict[str, tuple[Mapping[str, Any], Problem]] = {}

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Values "base" and "plus" as the official command judges (plus means base too), "base_corrected" and
        "plus_corrected" without its faults."""
        try:
            problem = self._problem(sample)
            expected = self._oracle.expected(problem)
            transcript = self._run(problem, expected, answer)
            return self._verdict(problem, expected, transcript)
        except JudgingError as error:
            return Score(error=str(error))

    def close(self) -> None:
        """End the judging processes."""
        self._judges.close()
        self._oracle.close()

    def _problem(self, sample: Sample) -> Problem:
        with self._lock:
            known = self._problems.get(sample.id)
            if known is None or known[0] is not sample.data:
                known = sample.data, Problem.from_row(self._dataset, sample.data)
                self._problems[sample.id] = known
            return known[1]

    def _run(self, problem: Problem, expected: Mapping[str, Expected], answer: Answer) -> Transcript:
        candidate = Candidate(
            text=raw_solution(problem, answer),
            entry_point=problem.entry_point,
            sanitize=not answer.solution,
            iterate=problem.iterate,
            output_bytes=OUTPUT_BYTES + 2 * sum(part.size for part in expected.values()),
        )
        sets = [InputSet.official(name, problem.inputs[name], expected[name].times) for name in SETS]
        return run_candidate(self._sandbox, candidate, sets)

    def _verdict(self, problem: Problem, expected: Mapping[str, Expected], transcript: Transcript) -> Score:
        statuses: dict[str, str] = {}
        for name in SETS:
            if statuses.get("base", "pass") == "pass":
                statuses[name] = self._status(problem, expected, transcript, name)
        base = statuses["base"] == "pass"
        plus = base and statuses["plus"] == "pass"
        faulty = always_fails(problem.task_id, problem.entry_point)
        values = {"base": base, "plus": plus, "base_corrected": base, "plus_corrected": plus}
        detail: dict[str, Any] = {"post_processing": transcript.post_processing, **statuses}
        reasons = {name: transcript.sets[name].why for name in statuses if transcript.sets[name].why}
        if reasons:
            detail["why"] = reasons
        if faulty:
            fault = FAULTS[problem.task_id]
            values |= dict.fromkeys(fault.sets, False)
            detail["official_fault"] = f"{fault.fault}; corrected: {fault.cure}"
        return Score(values=values, judged=transcript.program, detail=detail)

    def _status(self, problem: Problem, expected: Mapping[str, Expected], transcript: Transcript, name: str) -> str:
        outcome = transcript.sets[name]
        if outcome.ended != "complete":
            return "timeout" if outcome.ended == "timeout" else "fail"
        if not problem.inputs[name]:
            return "pass"  # the official check has nothing to compare either, once the program has loaded
        request = Request(
            dataset=problem.dataset,
            entry_point=problem.entry_point,
            atol=problem.atol,
            expected=expected[name].path,
            expected_size=expected[name].size,
            inputs=problem.inputs[name],
            outputs=[pickle.PickleBuffer(output) for output in outcome.outputs],
            every_test=problem.entry_point == "find_zero" and always_fails(problem.task_id, "find_zero"),
        )
        try:
            return self._judges.check(request)
        except JudgingError:
            self._oracle.forget(problem)  # it may be a file of expected outputs that was damaged since
            raise


def raw_solution(problem: Problem, answer: Answer) -> str:
    """The text before post-processing: a base model's prompt and completion, or all that a chat model wrote, with tabs
    as the official decoders turn them; a solution as it is."""
    if answer.solution:
        return answer.text
    text = answer.text.replace("\t", "    ")
    return text if answer.chat else problem.prompt.strip() + "\n" + text
