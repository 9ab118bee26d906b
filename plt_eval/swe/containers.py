"""The Docker daemon as the SWE suites use it: images there or pulled, containers labelled and cleared away.

Every container, the agent's and the harness', carries LABEL (which process it belongs to) and RUN_LABEL (which run).
Those of a run are removed when it ends, and those of dead processes when the next one begins. Where judging happens on
another machine for a command elsewhere, DRIVER_LABEL says for which.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from plt_benchmarks.protocols import SandboxError
from plt_benchmarks.swe.rows import Task
from plt_eval.errors import MissingExtra, UserError, one_line
from plt_eval.sandbox.owners import is_orphan, process_identity

LABEL = "plt-eval.swe"
RUN_LABEL = "plt-eval.run"
DRIVER_LABEL = "plt-eval.driver"
KeepImages = Literal["none", "env", "all"]
GIB = 1 << 30
FIRST_OF_ENVIRONMENT = 3 * GIB
"""What the first image of an environment is taken to need on disk: an estimate, on the safe side."""
NEXT_OF_ENVIRONMENT = GIB // 2
"""What each further image of that environment adds, as most layers are shared: an estimate."""
RESERVE = 5 * GIB
"""Disk that containers and logs need besides images."""
PIP_FOLDER = "/plt-eval-wheels"
_ANSWER_S = 600


@dataclass(frozen=True)
class ContainerLimits:
    """What each container may use: bytes, cores (None: all), processes. `pip_index` is an address, `wheels` a folder of
    packages, from which evaluation scripts install instead of the internet."""

    memory: int = 16 * GIB
    cpus: float | None = None
    pids: int = 4096
    pip_index: str | None = None
    wheels: Path | None = None


@dataclass
class DockerHost:
    """One run's images and containers; a plt_benchmarks.swe.judge.Host. Thread-safe once it is opened.

    `pulls` images are pulled at a time. `run` labels the containers.
    """

    limits: ContainerLimits = field(default_factory=ContainerLimits)
    keep: KeepImages = "all"
    pulls: int = 2
    notify: Callable[[str], None] = print
    run: str = ""
    at_once: int = 4
    """Images in use or waiting for a judgement at a time, at most; only for the reckoning of disk."""
    driver: str = ""
    """The process that the work is done for, where that is another one."""

    def __post_init__(self) -> None:
        self._client: Any = None

    def open(self, run: str) -> None:
        """Reach the daemon, and clear away what dead processes left. Raises MissingExtra without the docker package,
        and SandboxError without a daemon."""
        self.run = run
        try:
            import docker
        except ImportError:
            raise MissingExtra("docker", "swe", "a SWE suite") from None
        if shutil.which("docker") is None:
            raise SandboxError("the command `docker` is not installed: agents and the official harness call it")
        self._docker = docker
        _follow_the_commands_context()
        self._owner = process_identity(os.getpid())
        self._pull_slots = threading.BoundedSemaphore(self.pulls)
        self._lock = threading.Lock()
        self._image_locks: dict[str, threading.Lock] = {}
        self._waiting: Counter[str] = Counter()
        self._pulled: dict[str, str] = {}
        self._kept: set[str] = set()
        try:
            self._client = docker.from_env(timeout=_ANSWER_S, max_pool_size=64)
            self._info = self._client.info()
        except (docker.errors.DockerException, OSError) as error:
            raise SandboxError(
                f"no Docker daemon answers: does it run, and may this user reach it? ({one_line(error)})"
            ) from error
        self.remove_orphans()

    # --- images -------------------------------------------------------------------------------------------

    def plan(self, tasks: Sequence[Task]) -> None:
        """Count what `tasks` need, say how much is to be pulled, and refuse what cannot fit. Raises UserError."""
        self._waiting = Counter(task.image for task in tasks)
        missing = [task for task in _first_by_image(tasks) if not self.is_local(task.image)]
        if not missing:
            return
        need = estimated_bytes(missing, self.keep, self.at_once)
        free = self.free_disk()
        told = f"{len(missing)} of {len(self._waiting)} images are not on this machine"
        size = f"pulling them with --keep-images {self.keep} needs about {need / GIB:.0f} GiB"
        if free is None:
            self.notify(f"{told}; {size}")
            return
        self.notify(f"{told}; {size}, {free / GIB:.0f} GiB are free in {self._info['DockerRootDir']}")
        if need > free:
            raise UserError(
                f"{told}, and {size}, but only {free / GIB:.0f} GiB are free in {self._info['DockerRootDir']}: free "
                f"disk, or use --keep-images none, --limit or --instances"
            )

    def expect(self, task: Task) -> None:
        """Count one more judgement that needs the task's image: `plan` does so for many."""
        with self._lock:
            self._waiting[task.image] += 1

    def ensure(self, task: Task) -> None:
        """Make sure that the task's image is on this machine: found under its own name, else pulled. Raises
        SandboxError."""
        with self._lock:
            lock = self._image_locks.setdefault(task.image, threading.Lock())
        with lock:
            if self.is_local(task.image):
                return
            free = self.free_disk()
            if free is not None and free < RESERVE:
                raise SandboxError(f"disk full: {free / GIB:.1f} GiB are free, {task.image} was not pulled")
            with self._pull_slots, self._told(f"missing image {task.image}: it is not here and cannot be pulled"):
                repository, _, tag = task.image.rpartition(":") if ":" in task.image else (task.image, "", "latest")
                self._client.images.pull(repository, tag=tag)
            with self._lock:
                self._pulled[task.image] = task.environment

    def release(self, task: Task) -> None:
        """Remove the task's image if no other task needs it, this run pulled it, and --keep-images says so."""
        with self._lock:
            self._waiting[task.image] -= 1
            environment = self._pulled.get(task.image)
            if self._waiting[task.image] > 0 or environment is None or self.keep == "all":
                return
            if self.keep == "env" and environment not in self._kept:
                self._kept.add(environment)
                return
            del self._pulled[task.image]
        with contextlib.suppress(self._docker.errors.DockerException):
            self._client.images.remove(task.image, force=True)

    def is_local(self, image: str) -> bool:
        """Whether the image is on this machine. Raises SandboxError."""
        with self._told("the Docker daemon does not answer"):
            try:
                self._client.images.get(image)
            except self._docker.errors.ImageNotFound:
                return False
        return True

    def free_disk(self) -> int | None:
        """Bytes free where images lie; None where the daemon is not of this machine."""
        root = Path(self._info["DockerRootDir"])
        return shutil.disk_usage(root).free if root.is_dir() else None

    # --- containers ---------------------------------------------------------------------------------------

    @property
    def labels(self) -> dict[str, str]:
        driver = {DRIVER_LABEL: self.driver} if self.driver else {}
        return {LABEL: self._owner, RUN_LABEL: self.run, **driver}

    def container_options(self, task: Task) -> dict[str, Any]:
        """Arguments of docker.containers.create for the harness: no network unless the task's tests fetch."""
        limits = self.limits
        options: dict[str, Any] = {
            "labels": self.labels,
            "mem_limit": self._memory(),
            "pids_limit": limits.pids,
            "stop_signal": "SIGKILL",  # `docker stop` would wait 15 s for a `tail -f` that ignores SIGTERM
        }
        if limits.cpus is not None:
            options["nano_cpus"] = int(limits.cpus * 1e9)
        if limits.pip_index is not None:
            options["environment"] = {"PIP_INDEX_URL": limits.pip_index}
        if limits.wheels is not None:
            options["environment"] = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": PIP_FOLDER}
            options["volumes"] = {str(limits.wheels.resolve()): {"bind": PIP_FOLDER, "mode": "ro"}}
        if limits.wheels is not None or not task.needs_network:
            options["network_mode"] = "none"
        return options

    def run_arguments(self) -> list[str]:
        """Arguments of `docker run` for an agent: never a network, as the answers are out there."""
        arguments = ["--network", "none", "--stop-signal", "SIGKILL", "--security-opt", "no-new-privileges"]
        arguments += ["--memory", str(self._memory()), "--pids-limit", str(self.limits.pids), "--pull", "never"]
        if self.limits.cpus is not None:
            arguments += ["--cpus", str(self.limits.cpus)]
        for name, value in self.labels.items():
            arguments += ["--label", f"{name}={value}"]
        return arguments

    def remove_containers(self, labels: Mapping[str, str]) -> None:
        """Remove this process' containers of the run that also have `labels`; says nothing if the daemon is gone."""
        wanted = [f"{name}={value}" for name, value in {**self.labels, **labels}.items()]
        if self._client is not None:
            self._remove(lambda _: True, wanted)

    def remove_drivers(self) -> None:
        """Remove all containers of the process that the work is done for, of whatever process of this machine."""
        self._remove(lambda _: True, [f"{DRIVER_LABEL}={self.driver}"])

    def remove_orphans(self) -> None:
        """Remove the containers of processes of this machine that are dead."""
        self._remove(lambda owner: is_orphan(owner, self._owner), [LABEL])

    def _remove(self, chosen: Callable[[str], bool], labels: Iterable[str]) -> None:
        api = self._client.api
        with contextlib.suppress(self._docker.errors.DockerException, OSError):
            for found in api.containers(all=True, filters={"label": list(labels)}):
                if chosen(found["Labels"].get(LABEL, "")):
                    with contextlib.suppress(self._docker.errors.DockerException):
                        api.remove_container(found["Id"], force=True, v=True)

    def _memory(self) -> int:
        return min(self.limits.memory, int(psutil.virtual_memory().total))

    @contextlib.contextmanager
    def _told(self, what: str) -> Any:
        try:
            yield
        except (self._docker.errors.DockerException, OSError) as error:
            raise SandboxError(f"{what} ({one_line(error)})") from error


def _follow_the_commands_context() -> None:
    """Let us and our children ask the daemon that the command `docker` asks, whose context docker-py does not know."""
    if "DOCKER_HOST" in os.environ:
        return
    command = ["docker", "context", "inspect", "-f", "{{.Endpoints.docker.Host}}"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(command, capture_output=True, text=True, timeout=10)
        if told.returncode == 0 and told.stdout.strip().startswith(("unix://", "tcp://", "ssh://")):
            os.environ["DOCKER_HOST"] = told.stdout.strip()


def estimated_bytes(missing: Sequence[Task], keep: KeepImages, at_once: int = 4) -> int:
    """Disk that pulling the images of `missing` needs, by their number and their environments: an estimate."""
    return disk_of_images(len(missing), len({task.environment for task in missing}), keep, at_once)


def disk_of_images(images: int, environments: int, keep: KeepImages, at_once: int = 4) -> int:
    """Bytes that so many images of so many environments need: an estimate. Images that go again are there `at_once` at
    most."""
    further = images - environments
    if keep == "none":  # a few at a time
        environments, further = min(at_once, environments), 0
    elif keep == "env":
        further = min(at_once, further)
    return RESERVE + environments * FIRST_OF_ENVIRONMENT + further * NEXT_OF_ENVIRONMENT


def _first_by_image(tasks: Sequence[Task]) -> list[Task]:
    return list({task.image: task for task in reversed(tasks)}.values())
