"""The agent: mini-swe-agent's loop, prompts and observations, on one of our engines, in the instance's container.

Every instance gets a conversation, a container and a trajectory file. The engine is shared: see
plt_eval.engines.conversations.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from plt_benchmarks.protocols import SandboxError
from plt_benchmarks.swe.rows import Task
from plt_eval.engines.base import (
    Completion,
    Engine,
    GenerationRequest,
    Loglikelihood,
    LoglikelihoodRequest,
    health_lines,
)
from plt_eval.engines.conversations import SharedEngine
from plt_eval.errors import MissingExtra, UserError, one_line
from plt_eval.journal import DiskFull, write_atomically
from plt_eval.swe.containers import DockerHost
from plt_eval.swe.conversation import POLICY, ChatModel, EngineTrouble
from plt_eval.workers import as_completed

Actions = Literal["text", "tools"]
TRAJECTORIES = "trajectories"
CONFIGURATION = {"text": "swebench_backticks.yaml", "tools": "swebench.yaml"}
TRIES = 3
"""Attempts at an instance whose container breaks."""
GRACE_S = 10.0
"""How long the end of a run waits for containers that are being started, in seconds."""
OUTPUT_BYTES = 4 << 20
"""What is read of a command's output; the rest is read by nobody, and the command is ended."""

NO_PEEKING = r"""
set -e
cd {workdir}
rm -f /home/*.patch /home/fix-run.sh /home/test-run.sh /*.patch
git config --global --add safe.directory '*'
for remote in $(git remote); do git remote remove "$remote"; done
git for-each-ref --no-merged=HEAD --format='%(refname)' | while read -r ref; do git update-ref -d "$ref"; done
git stash clear
rm -rf .git/logs .git/FETCH_HEAD .git/ORIG_HEAD .git/MERGE_HEAD
git reflog expire --expire=now --expire-unreachable=now --all
git repack -a -d -q
git prune --expire=now
"""
"""Leave the agent the history up to the commit that it starts from, and neither what came later, nor where to fetch it,
nor the patches that some images carry."""


@dataclass(frozen=True)
class AgentSettings:
    """How long an agent may go on: `steps` model calls, `wall_time` seconds; `command_timeout` seconds a command.
    `actions` says how it names its commands. `context` overrides the engine's own limit, in tokens."""

    steps: int = 250
    wall_time: int = 3600
    command_timeout: int = 60
    actions: Actions = "text"
    context: int | None = None


class AgentEngine:
    """Turns instances into patches; an Engine. `workers` agents are at work at a time.

    Trajectories go to `folder`/trajectories, which has to be set first. Raises MissingExtra without mini-swe-agent.
    """

    def __init__(
        self,
        engine: Engine,
        tasks: Mapping[str, Task],
        host: DockerHost,
        *,
        settings: AgentSettings,
        workers: int,
        notify: Callable[[str], None] = print,
    ) -> None:
        mini_swe_agent()
        self.name = engine.name
        self.folder: Path | None = None
        self._engine = engine
        self._shared = SharedEngine(engine)
        self._tasks = tasks
        self._host = host
        self._settings = settings
        self._workers = workers
        self._notify = notify
        self._stopped = threading.Event()
        self._starting: set[str] = set()
        self._model = str(engine.identity().get("model", engine.name)).replace("/", "__")
        if settings.actions == "tools" and not getattr(engine, "takes_tools", False):
            raise UserError("--agent-actions tools: the model's chat template has no tools; use --agent-actions text")

    def identity(self) -> Mapping[str, Any]:
        """The engine's own, and what decides how the agent goes about it."""
        from importlib.metadata import version

        settings = self._settings
        agent = {
            "mini_swe_agent": version("mini-swe-agent"),
            "steps": settings.steps,
            "wall_time_s": settings.wall_time,
            "command_timeout_s": settings.command_timeout,
            "actions": settings.actions,
            "context": settings.context,
            "context_policy": POLICY,
            "prompts_sha256": hashlib.sha256(json.dumps(configuration(settings.actions)).encode()).hexdigest()[:16],
        }
        return {**self._engine.identity(), "agent": agent}

    def facts(self) -> Mapping[str, str]:
        return {**self._engine.facts(), "agents_at_a_time": str(self._workers)}

    def health(self) -> Sequence[str]:
        """The engine's own."""
        return health_lines(self._engine)

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Completion]:
        """A patch for each, as they are done. Raises what the engine raises when it cannot go on."""
        try:
            yield from as_completed(self._solve, requests, workers=self._workers)
        finally:
            self._stopped.set()

    def loglikelihood(self, requests: Iterable[LoglikelihoodRequest]) -> Iterator[Loglikelihood]:  # noqa: ARG002
        """Agents have no likelihoods: raises UserError."""
        raise UserError("an agent writes patches: it has no log-likelihoods")

    def close(self) -> None:
        """End all agents, with their containers."""
        self._stopped.set()
        self._shared.close()
        deadline = time.monotonic() + GRACE_S
        while True:
            self._host.remove_containers({})
            if not self._starting or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        self._engine.close()

    # --- one instance -------------------------------------------------------------------------------------

    def _solve(self, request: GenerationRequest) -> Completion:
        task = self._tasks[request.id.rpartition("#")[0]]
        trouble = ""
        for attempt in range(TRIES):
            if self._stopped.is_set():
                trouble = "the run was stopped"
                break
            if attempt:
                time.sleep(2.0**attempt)
            try:
                self._host.ensure(task)
                return self._attempt(request, task)
            except (SandboxError, subprocess.SubprocessError, ContainerLost) as error:
                trouble = _trouble_line(error)
            except EngineTrouble as error:
                self._host.release(task)
                return Completion(request.id, "", "error", error=f"the engine gave up: {_trouble_line(error)}")
        self._host.release(task)
        return Completion(request.id, "", "error", error=f"infrastructure: {trouble}")

    def _attempt(self, request: GenerationRequest, task: Task) -> Completion:
        agents = mini_swe_agent()
        settings = self._settings
        config = configuration(settings.actions, task.workdir)
        model = ChatModel(
            self._shared,
            request.id,
            request.decoding,
            config["model"],
            max_new_tokens=request.decoding.max_new_tokens or request.prompt.max_new_tokens,
            actions=settings.actions,
            context=settings.context,
        )
        started = time.monotonic()
        container = self._started(request.id, task, config["environment"])
        try:
            container.prepare(NO_PEEKING.format(workdir=shlex.quote(task.workdir)))
            ready = time.monotonic()
            assert self.folder is not None, "a folder comes first"
            path = self.folder / TRAJECTORIES / f"{task.id}-{request.id.rpartition('#')[2]}.traj.json"
            agent = agents.Agent(
                model,
                container,
                system_template=config["agent"]["system_template"],
                instance_template=config["agent"]["instance_template"],
                step_limit=settings.steps,
                cost_limit=0.0,  # the price of our models is unknown
                wall_time_limit_seconds=settings.wall_time,
                output_path=None,
            )
            agent.trajectory = path
            ending = agent.run(task.problem)
        finally:
            container.cleanup()
        done = time.monotonic()
        status = str(ending.get("exit_status", ""))
        detail = {
            "exit_status": status,
            "model": self._model,
            "steps": agent.n_calls,
            "agent_seconds": {
                "container": round(ready - started, 2),
                "agent": round(done - ready, 2),
                "model": round(model.seconds, 2),
            },
            "left_out_messages": model.left_out,
            "trajectory": str(path.relative_to(self.folder)),
        }
        return Completion(
            request.id,
            str(ending.get("submission", "")),
            "stop" if status == "Submitted" else "length",
            chat=model.chat,
            solution=True,
            prompt_tokens=model.prompt_tokens,
            completion_tokens=model.completion_tokens,
            seconds=done - started,
            detail=detail,
        )

    def _started(self, request_id: str, task: Task, environment: Mapping[str, Any]) -> Any:
        """A container for the agent. Raises ContainerLost when the run was stopped meanwhile, and what Docker does."""
        self._starting.add(request_id)
        try:
            if self._stopped.is_set():
                raise ContainerLost("the run was stopped")
            container = mini_swe_agent().Container(
                image=task.image,
                cwd=task.workdir,
                env={**environment["env"], "BASH_ENV": "/root/.bashrc"},
                timeout=self._settings.command_timeout,
                interpreter=environment["interpreter"],
                run_args=["--rm", *self._host.run_arguments()],
                container_timeout=str(self._settings.wall_time + 3600),
                pull_timeout=600,
            )
            if self._stopped.is_set():
                container.cleanup()
                raise ContainerLost("the run was stopped")
            return container
        finally:
            self._starting.discard(request_id)


class ContainerLost(Exception):
    """The agent's container ended under it, or could not be prepared."""


# --- mini-swe-agent -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MiniSweAgent:
    """Its two classes, as we use them."""

    Agent: Any
    Container: Any


@cache
def mini_swe_agent() -> MiniSweAgent:
    """Import it without its its_log, its configuration folder and its price list. Raises MissingExtra."""
    os.environ.setdefault("MSWEA_SILENT_STARTUP", "1")
    os.environ.setdefault("MSWEA_GLOBAL_CONFIG_DIR", tempfile.mkdtemp(prefix="plt-eval-mswea-"))
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    try:
        from minisweagent.agents.default import DefaultAgent
        from minisweagent.environments.docker import DockerEnvironment
    except ImportError:
        raise MissingExtra("mini-swe-agent", "swe", "the agent of a SWE suite") from None

    its_log = logging.getLogger("minisweagent")  # it prints to standard output, which is ours
    its_log.handlers.clear()
    its_log.setLevel(logging.CRITICAL)

    class Agent(DefaultAgent):
        """Keeps its trajectory after every step, in one piece."""

        trajectory: Path

        def save(self, path: Path | None, *extra_dicts: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
            data: dict[str, Any] = self.serialize(*extra_dicts)
            self.trajectory.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(data, indent=1, default=str)
            write_atomically(self.trajectory, text.encode("utf-8", "replace").decode())
            return data

        def handle_uncaught_exception(self, e: Exception) -> list[dict[str, Any]]:
            if isinstance(e, DiskFull | UserError | EngineTrouble):
                return []
            added: list[dict[str, Any]] = super().handle_uncaught_exception(e)
            return added

    class Container(DockerEnvironment):
        """Reads no more of an output than OUTPUT_BYTES, leaves nothing of a command that ran out of time, and is gone
        when `cleanup` returns."""

        def prepare(self, script: str) -> None:
            """Run `script` before the agent begins. Raises ContainerLost when it fails."""
            done = subprocess.run(
                ["docker", "exec", str(self.container_id), "sh", "-c", script],
                capture_output=True,
                text=True,
                timeout=600,
                errors="replace",
            )
            if done.returncode:
                raise ContainerLost(f"the container cannot be prepared: {(done.stderr or done.stdout).strip()[-300:]}")

        def execute(self, action: dict[str, Any], cwd: str = "", *, timeout: int | None = None) -> dict[str, Any]:
            command = ["docker", "exec", "-w", cwd or self.config.cwd]
            for name, value in self.config.env.items():
                command += ["-e", f"{name}={value}"]
            command += [str(self.container_id), *self.config.interpreter, action.get("command", "")]
            limit = timeout or self.config.timeout
            try:
                text, code, why = _bounded(command, limit)
            except (OSError, ValueError, TypeError) as error:  # a command with NUL, too long, or no text at all
                text, code, why = "", -1, f"The command cannot be run: {error}"
            else:
                if why:
                    self._end_everything()
            if code in (125, 126, 127, 137, 1) and not why and not self._alive():
                raise ContainerLost("the agent's container has ended")
            output: dict[str, Any] = {"output": text, "returncode": -1 if why else code, "exception_info": why}
            self._check_finished(output)
            return output

        def _end_everything(self) -> None:
            """End all processes but the container's first: what ran out of time must not run on."""
            with contextlib.suppress(subprocess.SubprocessError):
                subprocess.run(
                    ["docker", "exec", str(self.container_id), "sh", "-c", "kill -9 -1"],
                    capture_output=True,
                    timeout=30,
                )

        def _alive(self) -> bool:
            told = subprocess.run(
                ["docker", "inspect", "-f", "{{.State.Running}}", str(self.container_id)],
                capture_output=True,
                text=True,
                timeout=60,
            )
            return told.stdout.strip() == "true"

        def cleanup(self) -> None:
            container, self.container_id = getattr(self, "container_id", None), None
            if container is not None:
                with contextlib.suppress(subprocess.SubprocessError, OSError):
                    subprocess.run(["docker", "rm", "-f", "-v", container], capture_output=True, timeout=60)

    return MiniSweAgent(Agent, Container)


def _bounded(command: list[str], limit: float) -> tuple[str, int, str]:
    """Run `command`: its output (both streams, at most OUTPUT_BYTES), exit code, and why it was ended early or ""."""
    why = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) as child:
        timed_out = threading.Event()

        def end() -> None:
            timed_out.set()
            child.kill()

        timer = threading.Timer(limit, end)
        timer.start()
        try:
            assert child.stdout is not None
            data = child.stdout.read(OUTPUT_BYTES + 1)
            if len(data) > OUTPUT_BYTES:
                child.kill()
                why = f"The command wrote more than {OUTPUT_BYTES >> 20} MiB and was ended."
            code = child.wait()
        finally:
            timer.cancel()
            child.kill()
    if timed_out.is_set():
        why = f"The command ran for more than {limit:.0f} seconds and was ended."
    return data[:OUTPUT_BYTES].decode("utf-8", "replace"), code, why


def configuration(actions: Actions, workdir: str = "/testbed") -> dict[str, Any]:
    """mini-swe-agent's own prompts and templates for SWE-bench, for a repository that lies in `workdir`."""
    import minisweagent

    path = minisweagent.package_dir / "config" / "benchmarks" / CONFIGURATION[actions]
    text = path.read_text(encoding="utf-8").replace("/testbed", workdir)
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def _trouble_line(error: BaseException) -> str:
    if isinstance(error, subprocess.CalledProcessError) and error.stderr:
        return " ".join(str(error.stderr).split())[-300:]
    return one_line(error)
