"""An official Terminal-Bench runner as an engine: it is started once for all open tasks, and each task's trial is a
completion as soon as its result file is there.

    official/001/output.log     what the runner printed
    official/001/plt-.../       the runner's own folder: its results, the agent's conversations, recordings

Every session has a folder of its own. A trial that ended in an earlier one, but was not recorded before that was
killed, is taken from there; one that the infrastructure broke is done again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plt_benchmarks.terminal import QUIET, TerminalSuite, Trial, last_words, trial_detail
from plt_eval.engines.base import Completion, GenerationRequest, Loglikelihood, LoglikelihoodRequest
from plt_eval.engines.endpoints import served_identity
from plt_eval.errors import UserError

if TYPE_CHECKING:
    from plt_eval.engines.checkpoint import ServedModel

AGENT = "terminus-2"
SESSIONS = "official"
OUTPUT = "output.log"
POLL_S = 0.5
TIDY_S = 180.0
"""How long a runner that has judged everything may take to tidy up, in seconds."""
GRACE_S = 15.0
"""How long a runner that is told to stop may take, in seconds."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class AgentModel:
    """The endpoint that the agent asks. `key` reaches it through the environment alone; `served` is what stands for the
    endpoint in the run's identity, and `checkpoint` what it serves, if the user says so."""

    name: str
    endpoint: str
    key: str | None
    temperature: float
    served: str
    checkpoint: ServedModel | None = None


@dataclass(frozen=True)
class AgentLimits:
    """What an agent may use; None leaves it to the task and the runner. `workers` tasks are done at a time."""

    workers: int
    steps: int | None = None
    wall_time: int | None = None
    test_timeout: int | None = None


class OfficialEngine:
    """Does the tasks in the folder `tasks` with the official runner `executable`; an Engine. `folder`, that of the run,
    has to be set first."""

    name = "openai"

    def __init__(
        self, suite: TerminalSuite, executable: Path, tasks: Path, model: AgentModel, limits: AgentLimits
    ) -> None:
        self.folder: Path | None = None
        self._tasks = tasks
        self._suite = suite
        self._executable = executable
        self._model = model
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._session: Path | None = None

    def identity(self) -> Mapping[str, Any]:
        """The endpoint's model, the agent, and what decides how far it goes."""
        limits = self._limits
        agent = {
            "name": AGENT,
            "runner": f"{self._suite.official.package} {self._suite.runner_version or 'unknown'}",
            "steps": limits.steps,
            "wall_time_s": limits.wall_time,
            "test_timeout_s": limits.test_timeout,
        }
        model = self._model
        served = served_identity(model.name, model.checkpoint)
        return {**served, "endpoint": model.served, "api": "chat", "agent": agent}

    def facts(self) -> Mapping[str, str]:
        asked = {} if self._model.served == self._model.endpoint else {"endpoints": self._model.endpoint}
        return {"runner": str(self._executable), "agents_at_a_time": str(self._limits.workers), **asked}

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Completion]:
        """A completion for each task, as they are done. Raises UserError when the runner cannot be started."""
        assert self.folder is not None, "a folder comes first"
        waiting = {request.id.rpartition("#")[0]: request for request in requests}
        sessions = sorted(path for path in (self.folder / SESSIONS).glob("*") if path.is_dir())
        for session in reversed(sessions):
            self._remove_containers(session)
            for trial in self._trials(session, ended=True):
                if trial.task in waiting and trial.error is None:
                    yield self._completion(waiting.pop(trial.task), trial, session)
        if waiting:
            number = int(sessions[-1].name) + 1 if sessions else 1
            yield from self._done(waiting, self.folder / SESSIONS / f"{number:03d}")

    def _done(self, waiting: dict[str, GenerationRequest], session: Path) -> Iterator[Completion]:
        process = self._start(session, list(waiting))
        broken: dict[str, Trial] = {}
        tidy_until = None
        try:
            while True:
                ended = process.poll() is not None
                for trial in self._trials(session, ended=ended):
                    if trial.task not in waiting:
                        continue
                    if trial.error is not None:
                        broken[trial.task] = trial
                        continue
                    yield self._completion(waiting.pop(trial.task), trial, session)
                if not waiting.keys() - broken.keys() and tidy_until is None:
                    tidy_until = time.monotonic() + TIDY_S
                if ended or (tidy_until is not None and time.monotonic() > tidy_until):
                    break
                time.sleep(POLL_S)
            why = f"the official runner ended with exit code {process.poll()}: {_words(session)}"
            for task, request in waiting.items():
                reason = broken[task].error if task in broken else why
                yield Completion(request.id, "", "error", error=f"infrastructure: {reason}")
        finally:
            self.close()

    def loglikelihood(self, requests: Iterable[LoglikelihoodRequest]) -> Iterator[Loglikelihood]:  # noqa: ARG002
        """Agents have no likelihoods: raises UserError."""
        raise UserError("an agent does tasks: it has no log-likelihoods")

    def close(self) -> None:
        """End the runner, with its containers."""
        process, session = self._process, self._session
        self._process = None
        if process is None or session is None:
            return
        if process.poll() is None:
            for word, patience in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, GRACE_S)):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, word)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(patience)
                    break
        self._remove_containers(session)

    # --- the runner -----------------------------------------------------------------------------------------

    def command(self, session: Path, tasks: list[str]) -> list[str]:
        """The official command line for `tasks`."""
        limits, model = self._limits, self._model
        folder, own = str(self._tasks), _own_name(session)
        kwargs = {"api_base": model.endpoint, "temperature": str(model.temperature)}
        if self._suite.official.program == "tb":
            command = ["run", "--dataset-path", folder, "--output-path", str(session), "--run-id", own]
            command += ["--n-concurrent", str(limits.workers), "--no-upload-results"]
            if limits.wall_time is not None:
                command += ["--global-agent-timeout-sec", str(limits.wall_time)]
            if limits.test_timeout is not None:
                command += ["--global-test-timeout-sec", str(limits.test_timeout)]
            steps, keyword, task = "max_episodes", "--agent-kwarg", "--task-id"
        else:
            command = ["run", "--path", folder, "--jobs-dir", str(session), "--job-name", own, "--yes", "--quiet"]
            command += ["--n-concurrent", str(limits.workers)]
            steps, keyword, task = "max_turns", "--agent-kwarg", "--include-task-name"
        if limits.steps is not None:
            kwargs[steps] = str(limits.steps)
        command += ["--agent", AGENT, "--model", f"openai/{model.name}"]
        for name, value in kwargs.items():
            command += [keyword, f"{name}={value}"]
        for name in tasks:
            command += [task, name]
        return [str(self._executable), *command]

    def _start(self, session: Path, tasks: list[str]) -> subprocess.Popen[bytes]:
        session.mkdir(parents=True)
        unwanted = ("PYTHONPATH", "PYTHONHOME", "OPENAI_API_BASE", "OPENAI_BASE_URL")
        own = {name: value for name, value in os.environ.items() if name not in unwanted}
        own |= {**QUIET, "OPENAI_API_KEY": self._model.key or "none"}
        with (session / OUTPUT).open("wb") as log:
            try:
                process = subprocess.Popen(
                    self.command(session.absolute(), tasks), cwd=session, env=own, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_die_with_parent,
                )  # fmt: skip
            except OSError as error:
                raise UserError(f"cannot start {self._executable}: {error}") from error
        self._process, self._session = process, session
        return process

    def _completion(self, request: GenerationRequest, trial: Trial, session: Path) -> Completion:
        assert self.folder is not None, "a folder comes first"
        detail = trial.detail
        return Completion(
            request.id,
            "",
            "stop",
            chat=True,
            solution=True,
            prompt_tokens=detail.get("input_tokens"),
            completion_tokens=detail.get("output_tokens"),
            detail=trial_detail(trial, str(_out(session).relative_to(self.folder))),
        )

    def _trials(self, session: Path, *, ended: bool) -> Iterator[Trial]:
        return self._suite.official.trials(_out(session), ended=ended)

    def _remove_containers(self, session: Path) -> None:
        """What a runner that was killed left behind; it names its Compose projects after its folders."""
        projects = self._suite.official.projects(_out(session))
        for kind, shown in (("container", "ps"), ("network", "ls")):
            for project in projects:
                label = f"label=com.docker.compose.project={project}"
                every = ["--all"] if kind == "container" else []
                found = _docker(kind, shown, *every, "--quiet", "--filter", label).split()
                if found:
                    _docker(kind, "rm", *(["--force", "--volumes"] if kind == "container" else []), *found)


def _docker(*arguments: str) -> str:
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, timeout=120)
        return done.stdout
    return ""


def _words(session: Path) -> str:
    with suppress(OSError):
        return last_words((session / OUTPUT).read_text(encoding="utf-8", errors="replace"))
    return "it left no output"


_LIBC = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    """Runs in the child: it must not outlive us, whatever ends us."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _own_name(session: Path) -> str:
    """The runner's name for a session: containers are called after it, and two runs may do the same task at once."""
    return "plt-" + hashlib.sha256(str(session.absolute()).encode()).hexdigest()[:8]


def _out(session: Path) -> Path:
    """The runner's folder in that of a session, also where the run's directory was moved."""
    return next(iter(sorted(session.glob("plt-*"))), session / _own_name(session))
