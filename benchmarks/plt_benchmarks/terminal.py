"""Terminal-Bench: an agent does tasks in a terminal of a container, and each task's own tests judge what it left there.

Data: `terminal-bench-core==0.1.1` (80 tasks; suite `terminal`, the paper's "v1") and `terminal-bench@2.0` (89 tasks;
suite `terminal-2`), Apache-2.0. Paper: The Terminal-Bench Team 2025, "Terminal-Bench: A Benchmark for AI Agents in
Terminal Environments".

The official runners do everything: `tb` (package terminal-bench) for the first, `harbor` for the second, with their own
agent Terminus 2. They need Python 3.12 and live in environments of their own; this module finds them, reads the folder
of tasks, and reads the files that they leave. Whoever runs them gives each task's trial as the `detail` of an Answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from plt_benchmarks.datafiles import cache_folder
from plt_benchmarks.environments import Environment
from plt_benchmarks.protocols import (
    Answer,
    Message,
    Metric,
    Need,
    Prompt,
    Sample,
    Sandbox,
    Score,
    Scorer,
    SuiteData,
    SuiteError,
)
from plt_benchmarks.statistics import wilson_interval

JUDGE_VERSION = 1
Program = Literal["tb", "harbor"]

TERMINAL_ENVIRONMENT = Environment(
    "terminal", "suite terminal (Terminal-Bench 1)", ("terminal-bench==0.2.18",), oldest_python=(3, 12)
)
TERMINAL_2_ENVIRONMENT = Environment(
    "terminal-2", "suite terminal-2 (Terminal-Bench 2)", ("harbor==0.26.0",), oldest_python=(3, 12)
)

OUTCOMES = {
    "resolved": "all tests of the task pass",
    "unresolved": "some test fails",
    "agent_timeout": "the agent used up its time, and some test fails",
    "test_timeout": "the tests did not end in time",
    "parse_error": "the tests left no result that can be read",
    "context_length_exceeded": "the conversation outgrew the model's context, and some test fails",
    "output_length_exceeded": "an answer of the model was cut off, and some test fails",
    "fatal_llm_parse_error": "the model's answers could not be read, and some test fails",
}
"""What can become of a task; faults of the infrastructure are none of these."""
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Trial:
    """What the official runner says of one task: its outcome, or the `error` of the infrastructure that let it have
    none. `detail` is in JSON types."""

    task: str
    outcome: str = ""
    error: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


class UnreadableTrial(ValueError):
    """A result file that is not in the official format, or not written to its end."""


@dataclass(frozen=True)
class Official:
    """One of the two official runners: its `program`, the `package` with it, and the file that makes a folder a task
    of it."""

    program: Program
    package: str
    environment: Environment
    task_file: str

    def executable(self) -> Path:
        """The program, of the environment if that was installed, else the one on PATH. Raises SuiteError."""
        own = self.environment.folder / "bin" / self.program
        if self.environment.present and own.is_file():
            return own
        found = shutil.which(self.program)
        if found is None:
            raise SuiteError(
                f"{self.environment.summary} needs the official runner {self.program!r}: "
                f"plt-eval install {self.environment.name}, or put it on PATH"
            )
        return Path(found)

    def version(self, executable: Path) -> str:
        """The release of the package that `executable` belongs to, "unknown" where its installation does not say."""
        prefix = executable.resolve().parent.parent
        name = self.package.replace("-", "_")
        found = sorted(prefix.glob(f"lib/python3.*/site-packages/{name}-*.dist-info"))
        return found[-1].name.removeprefix(f"{name}-").removesuffix(".dist-info") if found else "unknown"

    def need(self) -> Need:
        """The runner, for listings."""
        present = self.environment.present or shutil.which(self.program) is not None
        return Need(f"environment {self.environment.name}", present, f"plt-eval install {self.environment.name}")

    def download(self, dataset: str, folder: Path) -> list[str]:
        """The official command that fetches `dataset` into `folder`, or into a folder in it."""
        if self.program == "tb":
            return ["datasets", "download", "--dataset", dataset, "--output-dir", str(folder)]
        return ["dataset", "download", dataset, "--export", "--output-dir", str(folder)]

    def trials(self, folder: Path, *, ended: bool) -> Iterator[Trial]:
        """What is known so far of the tasks of one call, which writes to `folder`. A file that is being written is left
        out until the call has `ended`; from then on it is an error."""
        read = _tb_trial if self.program == "tb" else _harbor_trial
        pattern = "*/*/results.json" if self.program == "tb" else "*/result.json"
        seen = set()
        for path in sorted(folder.glob(pattern)):
            try:
                trial = read(str(path), _json(path))
            except UnreadableTrial as reason:
                if not ended:
                    continue
                trial = Trial(_task_of(self.program, path), error=str(reason))
            seen.add(trial.task)
            yield trial
        if ended and self.program == "tb":
            yield from (trial for trial in _failed_tb_trials(folder / "results.json") if trial.task not in seen)

    def projects(self, folder: Path) -> list[str]:
        """Names of the Compose projects that one call, which writes to `folder`, may have started."""
        pattern, more = ("*/*", "") if self.program == "tb" else ("*", "__env")
        names = sorted(path.name for path in folder.glob(pattern) if path.is_dir())
        return [re.sub(r"[^a-z0-9_-]", "-", f"{name}{more}".lower()) for name in names]


TB = Official("tb", "terminal-bench", TERMINAL_ENVIRONMENT, "task.yaml")
HARBOR = Official("harbor", "harbor", TERMINAL_2_ENVIRONMENT, "task.toml")


@dataclass
class TerminalSuite:
    """One release of the tasks with its runner; a Suite. `runner_version` is part of the version once it is known."""

    name: str
    title: str
    official: Official
    dataset: str
    problems: int
    summary: str
    cost: str
    extra: str | None = None
    runs_code: bool = False  # not in the sandbox: the runner makes a container for each task
    runner_version: str = ""
    version: str = field(init=False)

    def __post_init__(self) -> None:
        parts = [self.dataset, f"judge-{JUDGE_VERSION}"]
        if self.runner_version:
            parts.append(f"{self.official.package}-{self.runner_version}")
        self.version = "+".join(parts)

    @property
    def kept(self) -> Path:
        """Where the tasks lie once they were fetched."""
        return cache_folder() / "data" / re.sub(r"[=@]+", "-", self.dataset)

    @property
    def release(self) -> TaskSource:
        """Where the data comes from."""
        return TaskSource(f"https://www.tbench.ai (as {self.dataset}, fetched by {self.official.program})", self.kept)

    def needs(self) -> Sequence[Need]:
        """The runner, Docker, and its Compose plugin."""
        return (
            self.official.need(),
            Need("Docker", shutil.which("docker") is not None, "apt-get install docker.io"),
            Need("Docker Compose 2", compose_plugin() is not None, "install Docker's package docker-compose-plugin"),
        )

    def load(self, source: Path | None) -> SuiteData:
        """The tasks in the folder `source`, or those of the release, which the official runner fetches when they are
        not in the cache. Raises SuiteError."""
        folder = self._tasks(self._released() if source is None else source)
        names = sorted(path.parent.name for path in folder.glob(f"*/{self.official.task_file}"))
        odd = next((name for name in names if not _TASK_NAME.fullmatch(name)), None)
        if odd is not None:
            raise SuiteError(f"data {folder}: task {odd!r}: expected letters, digits and . _ - in a task's name")
        samples = tuple(
            Sample(name, {"folder": str(folder), "instruction": self._instruction(folder / name)}) for name in names
        )
        revision = f"{self.dataset}" if source is None else f"local:{folder.name}"
        notes = []
        if len(samples) != self.problems:
            notes.append(f"{folder} has {len(samples)} tasks; {self.dataset} has {self.problems}")
        return SuiteData(samples, revision, _digest(folder, names), str(folder), tuple(notes))

    def prompt(self, sample: Sample) -> Prompt:
        """The task's instruction; the official agent builds its own conversation around it."""
        text = str(sample.data["instruction"])
        return Prompt(text=text, messages=(Message("user", text),))

    def gold(self, sample: Sample) -> Answer | None:  # noqa: ARG002
        """The tasks' own solutions are scripts that the official runners' `oracle` agent runs; no text answers."""
        return None

    def scorer(self, sandbox: Sandbox) -> Scorer:  # noqa: ARG002
        """Takes the official runner's word."""
        return TerminalScorer()

    def metrics(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, Metric]:
        """The share of tasks resolved, and below it what became of all."""
        counted = [score for found in scores.values() for score in found if score.error is None]
        metrics = {}
        for outcome, meaning in OUTCOMES.items():
            hits = sum(score.detail.get("outcome") == outcome for score in counted)
            if not counted or (outcome != "resolved" and not hits):
                continue
            share = hits / len(counted)
            low, high = wilson_interval(share, len(counted))
            name = f"{self.name}.resolved" if outcome == "resolved" else f"{self.name}.outcome/{outcome}"
            words = f"{self.title}: share of tasks with outcome {outcome} ({meaning}), 95% Wilson interval"
            metrics[name] = Metric(share, len(counted), low, high, words)
        return metrics

    # --- the tasks ------------------------------------------------------------------------------------------

    def _released(self) -> Path:
        if self.kept.is_dir():
            return self.kept
        executable = self.official.executable()
        partial = self.kept.with_name(f"{self.kept.name}.{os.getpid()}")
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            command = [str(executable), *self.official.download(self.dataset, partial)]
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL,
                env={**os.environ, **QUIET},
            )  # fmt: skip
            if done.returncode or not partial.is_dir():
                raise SuiteError(
                    f"{self.official.program} cannot fetch {self.dataset}: {last_words(done.stdout + done.stderr)}; "
                    f"pass --data FOLDER, the folder of its tasks"
                )
            with suppress(OSError):  # another process may have been faster
                os.rename(partial, self.kept)
        except OSError as error:
            raise SuiteError(f"cannot keep {self.dataset} in {self.kept}: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return self.kept

    def _tasks(self, source: Path) -> Path:
        """`source` itself, or the one folder in it, or in a folder of that, that has tasks."""
        if not source.is_dir():
            found = "a file" if source.exists() else "none"
            raise SuiteError(f"data {source}: expected a folder of tasks, found {found}")
        marks = f"*/{self.official.task_file}"
        for depth in ("", "*", "*/*"):
            places = [source] if not depth else sorted(path for path in source.glob(depth) if path.is_dir())
            having = [place for place in places if any(place.glob(marks))]
            if len(having) > 1:
                raise SuiteError(f"data {source}: tasks in several folders, as {having[0]} and {having[1]}: name one")
            if having:
                return having[0].absolute()
        raise SuiteError(f"data {source}: expected folders with a {self.official.task_file} each, found none")

    def _instruction(self, task: Path) -> str:
        try:
            if self.official.program == "harbor":
                return (task / "instruction.md").read_text(encoding="utf-8")
            import yaml

            row = yaml.safe_load((task / "task.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise SuiteError(f"data {task}: cannot be read: {' '.join(str(error).split())}") from None
        instruction = row.get("instruction") if isinstance(row, dict) else None
        if not isinstance(instruction, str):
            raise SuiteError(f"data {task / 'task.yaml'}: expected 'instruction' to be text, found {instruction!r:.60}")
        return instruction


@dataclass(frozen=True)
class TaskSource:
    """Where tasks come from, for listings."""

    url: str
    kept: Path

    @property
    def present(self) -> bool:
        """Whether they were fetched before."""
        return self.kept.is_dir()


class TerminalScorer:
    """Takes a trial as it was read. Thread-safe."""

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Value "resolved"; the detail says what became of the task."""
        outcome = answer.detail.get("outcome")
        if outcome not in OUTCOMES:
            return Score(error=f"{sample.id}: the official runner gave no outcome")
        return Score({"resolved": outcome == "resolved"}, detail=dict(answer.detail))

    def close(self) -> None:
        """Nothing is held."""


QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONUNBUFFERED": "1"}
"""For the environment of the official runners: no price list is fetched before each call."""


def last_words(output: str) -> str:
    """The last line of an output that says what went wrong, without colours and frames."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    lines = [line.strip(" │╭╰╮╯─❱\t") for line in plain.splitlines()]
    lines = [line for line in lines if line]
    telling = [line for line in lines if re.search(r"[Ee]rror|not found|[Ff]ailed", line)]
    return (telling or lines or ["it said nothing"])[-1][:300]


def compose_plugin() -> Path | None:
    """Docker's Compose plugin, which both runners call as `docker compose`."""
    own = os.environ.get("DOCKER_CONFIG")
    folders = [Path(own) if own else Path.home() / ".docker"]
    folders += [Path(place, "docker") for place in ("/usr/local/lib", "/usr/local/libexec", "/usr/lib", "/usr/libexec")]
    return next((found for folder in folders if (found := folder / "cli-plugins" / "docker-compose").is_file()), None)


# --- the official files -----------------------------------------------------------------------------------


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableTrial(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


def _task_of(program: Program, path: Path) -> str:
    """The task of a result file, by its place."""
    return path.parent.parent.name if program == "tb" else path.parent.name.rpartition("__")[0]


def _tb_trial(place: str, row: Any) -> Trial:
    """results.json of a trial, as terminal_bench.harness.models.TrialResults writes it."""
    task = _field(place, row, "task_id", str)
    resolved = _field(place, row, "is_resolved", bool, optional=True)
    failure = _field(place, row, "failure_mode", str)
    tests = _field(place, row, "parser_results", dict, optional=True) or {}
    detail: dict[str, Any] = {
        "failure_mode": failure,
        "tests": {str(name): str(status) for name, status in tests.items()},
        "input_tokens": _field(place, row, "total_input_tokens", int, optional=True),
        "output_tokens": _field(place, row, "total_output_tokens", int, optional=True),
        "started": _field(place, row, "trial_started_at", str, optional=True),
        "ended": _field(place, row, "trial_ended_at", str, optional=True),
    }
    if resolved:
        return Trial(task, "resolved", detail=detail)
    if failure in ("unset", "none") and resolved is False:
        return Trial(task, "unresolved", detail=detail)
    if failure in OUTCOMES and failure not in ("resolved", "unresolved"):
        return Trial(task, failure, detail=detail)
    return Trial(task, error=f"{place}: the official runner broke off: {failure}", detail=detail)


def _failed_tb_trials(path: Path) -> Iterator[Trial]:
    """Tasks that broke before they had a result file of their own: they are only in the file of the whole call."""
    if not path.is_file():
        return
    try:
        rows = _field(str(path), _json(path), "results", list)
        for number, row in enumerate(rows):
            trial = _tb_trial(f"{path}, result {number}", row)
            yield Trial(trial.task, error=trial.error or f"{path}: {trial.task} has no result file of its own")
    except UnreadableTrial:
        return


def _harbor_trial(place: str, row: Any) -> Trial:
    """result.json of a trial, as harbor.models.trial.result.TrialResult writes it. Harbor itself says which of its
    exceptions leave a valid reward behind (`reward_valid`)."""
    task = _harbor_task(place, row)
    broken = _field(place, row, "exception_info", dict, optional=True)
    judged = _field(place, row, "verifier_result", dict, optional=True) or {}
    rewards = _field(f"{place}, verifier_result", judged, "rewards", dict, optional=True) or {}
    if _field(place, row, "finished_at", str, optional=True) is None:
        raise UnreadableTrial(f"{place}: expected 'finished_at', found none: the trial was cut short")
    kind = None if broken is None else _field(f"{place}, exception_info", broken, "exception_type", str)
    usage = _field(place, row, "agent_result", dict, optional=True) or {}
    detail: dict[str, Any] = {
        "exception": kind,
        "rewards": rewards,
        "input_tokens": _field(f"{place}, agent_result", usage, "n_input_tokens", int, optional=True),
        "output_tokens": _field(f"{place}, agent_result", usage, "n_output_tokens", int, optional=True),
        "started": _field(place, row, "started_at", str, optional=True),
        "ended": row["finished_at"],
    }
    if not _field(place, row, "reward_valid", bool) or "reward" not in rewards:
        told = "" if broken is None else f": {' '.join(str(broken.get('exception_message', '')).split())[:200]}"
        return Trial(task, error=f"{place}: no valid reward ({kind or 'no exception'}{told})", detail=detail)
    reward = _field(f"{place}, rewards", rewards, "reward", (int, float))
    if reward == 1:
        return Trial(task, "resolved", detail=detail)
    return Trial(task, _HARBOR_OUTCOMES.get(kind or "", "unresolved"), detail=detail)


_HARBOR_OUTCOMES = {
    "AgentTimeoutError": "agent_timeout",
    "ContextLengthExceededError": "context_length_exceeded",
    "ContextWindowExceededError": "context_length_exceeded",
    "OutputLengthExceededError": "output_length_exceeded",
    "OutputTokenExceededError": "output_length_exceeded",
}


def _harbor_task(place: str, row: Any) -> str:
    """The name of the task's folder: the official one may have an organisation before it."""
    where = _field(place, row, "task_id", dict)
    return Path(_field(f"{place}, task_id", where, "path", str)).name


def _field(place: str, row: Any, name: str, kind: Any, *, optional: bool = False) -> Any:
    """The entry `name` of an official record. Raises UnreadableTrial for one of another type; bool is no number."""
    if not isinstance(row, Mapping):
        raise UnreadableTrial(f"{place}: expected an object, found {type(row).__name__}")
    value = row.get(name)
    if value is None and optional:
        return None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = getattr(kind, "__name__", "number")
        raise UnreadableTrial(f"{place}: expected {name!r} to be {wanted}, found {value!r:.80}")
    return value


def _digest(folder: Path, names: Sequence[str]) -> str:
    """Hash of all files of the tasks `names`."""
    digest = hashlib.sha256()
    for name in names:
        for path in sorted((folder / name).rglob("*")):
            if path.is_file() and not path.is_symlink():
                digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode("utf-8", "surrogateescape"))
                with path.open("rb") as stream:
                    while chunk := stream.read(1 << 20):
                        digest.update(chunk)
    return digest.hexdigest()


def trial_detail(trial: Trial, kept: str) -> dict[str, Any]:
    """A trial as an Answer's detail; `kept` is where its files are."""
    return {"outcome": trial.outcome, **asdict(trial)["detail"], "files": kept}


TERMINAL = TerminalSuite(
    name="terminal",
    title="Terminal-Bench 1",
    official=TB,
    dataset="terminal-bench-core==0.1.1",
    problems=80,
    summary="Terminal-Bench 1 (core 0.1.1): 80 tasks in a terminal (the official agent, Docker, --engine openai)",
    cost="hours, by the agent; tens of GiB of images",
)
TERMINAL_2 = TerminalSuite(
    name="terminal-2",
    title="Terminal-Bench 2",
    official=HARBOR,
    dataset="terminal-bench@2.0",
    problems=89,
    summary="Terminal-Bench 2.0: 89 tasks in a terminal (the official agent, Docker, --engine openai)",
    cost="a day or more, by the agent; tens of GiB of images",
)
