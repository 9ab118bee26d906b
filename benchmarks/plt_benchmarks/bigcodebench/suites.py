"""BigCodeBench: write a function that calls the right functions of the right libraries; unittest cases judge it.

Data: 1,140 problems, release v0.1.4 (Apache-2.0), and the 148 of BigCodeBench-Hard. Paper: Zhuo et al. 2024,
"BigCodeBench: Benchmarking Code Generation with Diverse Function Calls and Complex Instructions". Two splits: complete
a function from its docstring, or write it from instructions (`-instruct`).
Prompts, stop strings and post-processing: bigcodebench 0.2.5. Judging: its `unsafe_execute`, in an environment of its
own (see environments.py, driver.py and judge.py), calibrated as its command does by default.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from plt_benchmarks.bigcodebench.environments import BIGCODEBENCH_VERSION, FULL, SMALL, environment, has_nltk_data
from plt_benchmarks.bigcodebench.judge import BigCodeBenchScorer, parsed
from plt_benchmarks.datafiles import DataFile, Release, open_data, suite_data
from plt_benchmarks.environments import Environment
from plt_benchmarks.protocols import (
    Answer,
    Message,
    Metric,
    Need,
    Prompt,
    Sample,
    Sandbox,
    SandboxJob,
    Score,
    Scorer,
    SuiteData,
    SuiteError,
)
from plt_benchmarks.statistics import pass_metrics

Subset = Literal["full", "hard"]
Split = Literal["complete", "instruct"]
JUDGE_VERSION = 1
VERSION = "v0.1.4"
INSTRUCTION = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
)
RESPONSE = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"
)
EOS = ("<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint(")
BASE_EOS = (*EOS, "\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert ")

RELEASE = Release(
    stem="BigCodeBench",
    version="v0.1.0_hf",
    url="https://raw.githubusercontent.com/bigcode-project/bigcodebench-annotation/"
    "d8a1b7b418b5c73b32e6d9731e062f549818c8d9/hf_data/BigCodeBench.jsonl.gz",
    md5="3522577434616e01948f44671882468e",
    sha256="33baf4f414eb34507f1a8fd55ef9bcd79c1f9b4c3e8e2544f023edac1b20afec",
)
"""The first release of these 1,140 problems. What the authors have corrected since, in ten of them, is applied to it
(data/bigcodebench_corrections.json), which makes it v0.1.4, the release of bigcodebench 0.2.5."""


@dataclass
class BigCodeBenchSuite:
    """One of the two sets with one of the two splits; a Suite. `where` is the environment that judges."""

    subset: Subset
    split: Split
    where: Environment = field(default_factory=environment)
    release: Release | None = field(init=False)
    extra: str | None = None
    runs_code: bool = True
    problems: int = field(init=False)
    cost: str = field(init=False)
    name: str = field(init=False)
    version: str = field(init=False)
    summary: str = field(init=False)

    def __post_init__(self) -> None:
        hard = self.subset == "hard"
        self.name = "bigcodebench" + ("-hard" if hard else "") + ("-instruct" if self.split == "instruct" else "")
        self.release = None if hard else RELEASE
        self.problems = 148 if hard else 1140
        self.cost = "5 min on 2 cores" if hard else "20 min on 2 cores"
        place = self.where.folder.name + ("+nltk" if has_nltk_data(self.where) else "")
        self.version = f"BigCodeBench-{VERSION}+bigcodebench-{BIGCODEBENCH_VERSION}+{place}+judge-{JUDGE_VERSION}"
        how = "from its docstring" if self.split == "complete" else "from instructions"
        which = "BigCodeBench-Hard" if hard else "BigCodeBench"
        self.summary = f"{which}: {self.problems:,} Python functions that use many libraries, each {how}"

    def needs(self) -> Sequence[Need]:
        """The environment, of which the small one does for most problems."""
        if self.where.name == SMALL.name:
            return (self.where.need(), replace(FULL.need(), what=f"environment {FULL.name}, for all problems"))
        return (self.where.need(),)

    def load(self, source: Path | None) -> SuiteData:
        """Read the problems from `source` (file or folder), or the official ones when None, but for those whose
        libraries the environment lacks. Raises SuiteError."""
        data = suite_data(self._file(source), _check_row)
        if data.revision == RELEASE.name:
            corrected = tuple(Sample(sample.id, _corrected(sample.data)) for sample in data.samples)
            data = replace(data, samples=corrected, revision=f"BigCodeBench-{VERSION}")
        if self.subset == "hard" and len(data.samples) != self.problems:
            note = f"{self.name}: expected {self.problems} problems in {data.source}, found {len(data.samples)}"
            data = replace(data, notes=(*data.notes, note))
        return self._runnable(data) if self.where.present else data

    def prompt(self, sample: Sample) -> Prompt:
        """The code to go on with, or the official instruction, with the beginning of the answer. The official command
        refuses base models the instruct split; here they go on with the same text."""
        row = sample.data
        task = row[f"{self.split}_prompt"].strip()
        asked = f"{INSTRUCTION}\n```\n{task}\n```\n" if self.split == "complete" else f"{INSTRUCTION}\n{task}\n"
        begun = f"{RESPONSE}\n```python\n"
        complete = self.split == "complete"
        return Prompt(
            text=row["complete_prompt"] if complete else f"{asked}{begun}",
            stop=BASE_EOS if complete else EOS,
            messages=(Message("user", asked),),
            prefill=begun,
            chat_stop=EOS,
            max_new_tokens=1280,
        )

    def gold(self, sample: Sample) -> Answer | None:
        """The canonical solution, as a whole program."""
        return Answer(f"{sample.data['complete_prompt']}\n{sample.data['canonical_solution']}", solution=True)

    def scorer(self, sandbox: Sandbox) -> Scorer:
        """Raises SuiteError when the environment is not installed, and SandboxError when jobs cannot see it."""
        scorer = BigCodeBenchScorer(self.where, sandbox, begins_with_prompt=self.split == "complete")
        sandbox.run(SandboxJob("", environment=self.where.folder))  # before a model is asked
        return scorer

    def metrics(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, Metric]:
        """pass@k for each k up to the fewest answers that any problem has, over all problems and over those that can
        be solved here; scores with an error count for nothing."""
        words = f"{self.summary}; all tests pass, as bigcodebench {BIGCODEBENCH_VERSION} judges, calibrated"
        failing = unsolvable(nltk_data=has_nltk_data(self.where))
        solvable = {task: found for task, found in scores.items() if task not in failing}
        but = f"{words}; without the problems whose own solution fails here"
        return pass_metrics(self.name, "right", scores, words) | pass_metrics(
            f"{self.name}.solvable", "right", solvable, but
        )

    def _file(self, source: Path | None) -> DataFile:
        if source is None and self.subset == "hard":
            raise SuiteError(
                f"{self.name} has no file of its own to fetch: pass --data PATH, bigcode/bigcodebench-hard of the hub, "
                f"split {VERSION}, as JSON lines (BigCodeBench-Hard.jsonl)"
            )
        file = open_data(RELEASE, None if source is None else _find(source, self.subset))
        if self.subset == "hard" and file.sha256 == RELEASE.sha256:
            raise SuiteError(f"{file.source}: expected the problems of BigCodeBench-Hard, found all of BigCodeBench")
        return file

    def _runnable(self, data: SuiteData) -> SuiteData:
        """`data` without the problems whose libraries are missing, which a note names."""
        told = {sample.id: _mentioned(sample.data) for sample in data.samples}
        found = _found(self.where, frozenset().union(*told.values()))
        doubtful = (sample for sample in data.samples if told[sample.id] - found)
        lacking = {sample.id: sorted(missing) for sample in doubtful if (missing := modules(sample.data) - found)}
        if not lacking:
            return data
        named = ", ".join(f"{task.rpartition('/')[2]} ({', '.join(found)})" for task, found in lacking.items())
        note = (
            f"{self.name}: {len(lacking)} of {len(told)} problems are left out, because environment "
            f"{self.where.name} lacks what they import: {named}"
        )
        kept = tuple(sample for sample in data.samples if sample.id not in lacking)
        if not kept:
            raise SuiteError(note)
        return replace(data, samples=kept, notes=(*data.notes, note))


# --- data ---------------------------------------------------------------------------------------------


def _find(source: Path, subset: Subset) -> Path:
    """`source` itself, or in it or its direct sub-folders the file of that subset."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise SuiteError(f"data {source}: no such file or folder")
    folders = [source, *sorted(path for path in source.iterdir() if path.is_dir())]
    found = [
        path
        for folder in folders
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.name.endswith((".jsonl", ".jsonl.gz"))
        and "bigcodebench" in path.name.lower()
        and ("hard" in path.name.lower()) == (subset == "hard")
    ]
    if not found:
        wanted = "BigCodeBench-Hard" if subset == "hard" else "BigCodeBench"
        raise SuiteError(f"data {source}: expected *{wanted}*.jsonl[.gz] in it or its sub-folders, found no such file")
    return found[0]


_KEYS = ("task_id", "complete_prompt", "instruct_prompt", "canonical_solution", "code_prompt", "test", "entry_point")


def _check_row(place: str, row: dict[str, Any]) -> None:
    """Raises SuiteError for a row that is not in the official format."""
    for key in _KEYS:
        if not isinstance(row.get(key), str):
            found = type(row[key]).__name__ if key in row else f"the keys {', '.join(sorted(row)) or 'none'}"
            raise SuiteError(f"{place}: expected {key!r} to be a string, found {found}")
    try:
        tree = parsed(row["test"])
    except (SyntaxError, ValueError) as error:
        raise SuiteError(f"{place}: expected 'test' to be a Python program, {error}") from None
    if not any(isinstance(node, ast.ClassDef) and node.name == "TestCases" for node in tree.body):
        raise SuiteError(f"{place}: expected 'test' to define the class TestCases")


@functools.cache
def _corrections() -> dict[str, list[dict[str, Any]]]:
    path = Path(__file__).parents[1] / "data" / "bigcodebench_corrections.json"
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def _corrected(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of the first release as it is in v0.1.4."""
    changed = dict(row)
    for change in _corrections().get(row["task_id"], ()):
        for key in change["keys"]:
            text = changed[key].replace(change["old"], change["new"]) if change["old"] else changed[key]
            changed[key] = change.get("before", "") + text
    return changed


def _mentioned(row: Mapping[str, Any]) -> set[str]:
    """Those of `modules`, and words that only look like it: quicker."""
    text = "\n".join((row["complete_prompt"], row["canonical_solution"], row["test"]))
    found = {name for line in _IMPORT.findall(text) for name in _NAME.findall(line)}
    return found | {"tkinter"} | {name.partition(".")[0] for name in _listed(row.get("libs"))}


_IMPORT = re.compile(r"\b(?:import|from)\s(.*)")
_NAME = re.compile(r"\w+")


def modules(row: Mapping[str, Any]) -> set[str]:
    """The top modules that a problem's own code and tests import, and those that its row names."""
    named = set(_listed(row.get("libs")))
    for source in (f"{row['complete_prompt']}\n{row['canonical_solution']}", row["test"]):
        try:
            nodes = list(ast.walk(parsed(source)))
        except (SyntaxError, ValueError):
            continue
        named |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        named |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    tops = {name.partition(".")[0] for name in named}
    return tops | {"tkinter"} if "turtle" in tops else tops


def _listed(text: Any) -> list[str]:
    try:
        found = ast.literal_eval(text) if isinstance(text, str) else []
    except (SyntaxError, ValueError):
        return []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


_FIND = """
import importlib.util, json, sys
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return name in sys.modules
print(json.dumps([name for name in json.load(sys.stdin) if there(name)]))
"""


@functools.cache
def _found(where: Environment, names: frozenset[str]) -> frozenset[str]:
    """Those of `names` that the environment's Python could import."""
    command = [str(where.python), "-I", "-c", _FIND]
    done = subprocess.run(command, input=json.dumps(sorted(names)), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise SuiteError(f"environment {where.name} does not work ({last}): plt-eval install --again {where.name}")
    return frozenset(json.loads(done.stdout))


@functools.cache
def unsolvable(*, nltk_data: bool) -> dict[str, str]:
    """Problems whose own solution fails in the full environment in the sandbox, and why: more of them without NLTK's
    data."""
    path = Path(__file__).parents[1] / "data" / "bigcodebench_unsolvable.json"
    groups = [group for group in json.loads(path.read_text()) if not (nltk_data and group.get("nltk"))]
    return {task: group["why"] for group in groups for task in group["tasks"]}


BIGCODEBENCH = BigCodeBenchSuite("full", "complete")
BIGCODEBENCH_INSTRUCT = BigCodeBenchSuite("full", "instruct")
BIGCODEBENCH_HARD = BigCodeBenchSuite("hard", "complete")
BIGCODEBENCH_HARD_INSTRUCT = BigCodeBenchSuite("hard", "instruct")
