"""A small real suite and small real engines for the tests of store, runner and command line."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plt_benchmarks.protocols import (
    Answer,
    Metric,
    Need,
    Prompt,
    Sample,
    Sandbox,
    SandboxError,
    SandboxJob,
    SandboxOutcome,
    Score,
    Scorer,
    SuiteData,
    SuiteError,
)
from plt_eval.engines.base import Completion, GenerationRequest, Loglikelihood, LoglikelihoodRequest


class NoSandbox:
    """The toy suite judges by looking, though it asks for a sandbox: a job for this one is a mistake."""

    name = "none"

    def run(self, job: SandboxJob) -> SandboxOutcome:
        raise SandboxError(f"nothing runs here: {job.program!r}")


class SumSuite:
    """What is a + b? `score_s` is how long judging one answer takes; `before` is called with each sample first."""

    name = "sums"
    version = "sums-1+evalplus"
    summary = "additions"
    extra = None
    runs_code = True
    cost = "nothing"

    def __init__(
        self, problems: int = 20, *, score_s: float = 0.0, before: Callable[[Sample], None] | None = None
    ) -> None:
        self.problems = problems
        self.score_s = score_s
        self.before = before
        self.judged: list[str] = []

    def load(self, source: Path | None) -> SuiteData:
        if source is not None and not source.exists():
            raise SuiteError(f"{source}: no such file")
        samples = tuple(
            Sample(f"Sum/{i}", {"a": i, "b": 7 * i, "prompt": f"{i} + {7 * i} = ", "canonical_solution": str(8 * i)})
            for i in range(self.problems)
        )
        digest = hashlib.sha256(repr(samples).encode()).hexdigest()
        return SuiteData(samples, revision="v1", sha256=digest, source="built in")

    def prompt(self, sample: Sample) -> Prompt:
        return Prompt(sample.data["prompt"], stop=("\n",), max_new_tokens=8)

    def needs(self) -> Sequence[Need]:
        return ()

    def gold(self, sample: Sample) -> Answer | None:
        if "canonical_solution" not in sample.data:
            return None
        return Answer(sample.data["prompt"] + sample.data["canonical_solution"], solution=True)

    def scorer(self, sandbox: Sandbox) -> Scorer:
        return _SumScorer(self, sandbox)

    def metrics(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, Metric]:
        # Sorted and weighted by position, so that any change of the scores shows in the last digit.
        rates = [sum(bool(s.values["right"]) for s in row) / len(row) for _, row in sorted(scores.items())]
        weighted = sum(rate / (i + 2) for i, rate in enumerate(rates)) / len(rates)
        mean = sum(rates) / len(rates)
        return {
            "right": Metric(mean, len(rates), max(0.0, mean - 0.1), min(1.0, mean + 0.1), "share of right sums"),
            "weighted": Metric(weighted, len(rates), 0.0, 1.0, "right sums, later ones weighing less"),
        }


class _SumScorer:
    def __init__(self, suite: SumSuite, sandbox: Sandbox) -> None:
        self.suite = suite
        self.sandbox = sandbox
        self.closed = False

    def score(self, sample: Sample, answer: Answer) -> Score:
        assert not self.closed
        if self.suite.before is not None:
            self.suite.before(sample)
        time.sleep(self.suite.score_s)
        self.suite.judged.append(sample.id)
        text = answer.text.removeprefix(sample.data["prompt"]) if answer.solution else answer.text
        right = text.strip() == str(sample.data["a"] + sample.data["b"])
        return Score({"right": right}, judged=text, detail={"expected": sample.data["a"] + sample.data["b"]})

    def close(self) -> None:
        self.closed = True


class SumEngine:
    """Right two times in three, by request id. `log` gets a line a drawn request; `fail` names ids it gives up on."""

    name = "toy"

    def __init__(
        self,
        *,
        draw_s: float = 0.0,
        log: Path | None = None,
        fail: Iterable[str] = (),
        loops: int = 2,
        reverse: bool = False,
    ) -> None:
        self.draw_s = draw_s
        self.log = log
        self.fail = set(fail)
        self.loops = loops
        self.reverse = reverse
        self.drawn: list[str] = []

    def identity(self) -> dict[str, Any]:
        return {"model": "some/where/adder", "weights_sha256": "0" * 64, "loops": self.loops}

    def facts(self) -> dict[str, str]:
        return {"decoder": "by hand"}

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Completion]:
        for request in sorted(requests, key=lambda r: r.id, reverse=self.reverse):
            time.sleep(self.draw_s)
            self.drawn.append(request.id)
            if self.log is not None:
                with self.log.open("a") as stream:
                    stream.write(request.id + "\n")
            if request.id in self.fail:
                yield Completion(request.id, "", "error", error="the toy engine was told to fail")
                continue
            a, _, b, _ = request.prompt.text.split()
            luck = hashlib.sha256(f"{request.decoding.seed}:{request.id}".encode()).digest()[0] % 3
            yield Completion(request.id, f"{int(a) + int(b) + (luck == 0)}", "stop", completion_tokens=1)

    def loglikelihood(self, requests: Iterable[LoglikelihoodRequest]) -> Iterator[Loglikelihood]:
        for request in requests:
            yield Loglikelihood(request.id, -1.0, 1, True)

    def close(self) -> None:
        pass


class LoopEngine(SumEngine):
    """The toy engine behind the options of the in-process engine."""

    made: list[LoopEngine] = []  # noqa: RUF012 (tests look here)

    def __init__(
        self,
        model: str,
        *,
        loops: int | None = None,
        loop_mode: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        batch_size: int | str = "auto",
        chat_template: str = "auto",
        tokenizer: str | None = None,
        label: str | None = None,
        notify: Callable[[str], None] = print,
    ) -> None:
        super().__init__(loops=4 if loops is None else loops)
        self.options = {"model": model, "loop_mode": loop_mode, "dtype": dtype, "device": device}
        self.options |= {"batch_size": batch_size, "chat_template": chat_template}
        self.options |= {"tokenizer": tokenizer}
        self.label = label
        self.closed = False
        notify(f"loaded {model}")
        LoopEngine.made.append(self)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "loop_mode": self.options["loop_mode"]}

    def close(self) -> None:
        self.closed = True
