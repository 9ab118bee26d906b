"""Jobs in containers of the local Docker daemon, from an image that is already there.

A container has no network, a read-only root, a private /tmp in memory, no capabilities, an ordinary user, and the job's
limits as its own; Docker's own profile filters its system calls. Its first process is
:mod:`plt_eval.sandbox.launcher`. The driver and the files lie in an anonymous volume that belongs to root. The image
must hold Python 3.11 or later as `python3`, and whatever the drivers import.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import socket
import struct
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from plt_benchmarks.protocols import SandboxError, SandboxJob, SandboxLimits, SandboxOutcome
from plt_eval.errors import MissingExtra
from plt_eval.sandbox.job import DRIVER, JOB_FOLDER, environment, job_files, limits_text, outcome, was_killed
from plt_eval.sandbox.launch import BARE_PYTHON, LAUNCHER
from plt_eval.sandbox.owners import is_orphan, process_identity
from plt_eval.sandbox.supervisor import Collector, Wiring, supervise
from plt_eval.sandbox.usage import Usage

LABEL = "plt-eval.sandbox"
"""The label of our containers; its value says which process they belong to."""
DEFAULT_IMAGE = f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
_JOB_ID = 65534
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_REPORT_BYTES = 256
_LOOK_S = 0.25  # between two questions to the daemon about a container
_ANSWER_S = 60
_HEARD_S = 1.0  # so long after a container's end the daemon may still hear that memory had run out
_LATE_S = 30  # a container whose harness died ends by itself so much after its wall limit
_SHARED_BYTES = 64 << 20  # /dev/shm, which counts besides /tmp
_LAUNCHER_BYTES = 32 << 20  # what the launcher takes besides the job


class Docker:
    """Containers as a sandbox. Raises MissingExtra without the docker package, and SandboxError without a daemon
    or the image."""

    name = "docker"

    def __init__(self, image: str | None = None) -> None:
        try:
            import docker
        except ImportError:
            raise MissingExtra("docker", "docker", "--sandbox docker") from None
        self._image = image or DEFAULT_IMAGE
        self._api_error = docker.errors.APIError
        self._errors = (docker.errors.DockerException, OSError)
        self._owner = process_identity(os.getpid())
        with self._broken("does the Docker daemon run, and may this user reach it?"):
            self._api: Any = docker.APIClient(
                **docker.utils.kwargs_from_env(), version="auto", timeout=_ANSWER_S, num_pools=4, max_pool_size=64
            )
            self._cores = min(2, self._api.info()["NCPU"])
            self._remove_orphans()
        try:
            self._api.inspect_image(self._image)
        except docker.errors.ImageNotFound:
            raise SandboxError(
                f"--sandbox-image {self._image}: there is no such image on this machine: "
                f"docker pull {self._image}, or name one that is there"
            ) from None

    def run(self, job: SandboxJob) -> SandboxOutcome:
        """Run `job` to its end. Thread-safe. Raises SandboxError when the daemon refuses or fails."""
        if job.environment is not None:
            raise SandboxError(f"an image cannot see {job.environment}, which the job needs: pass --sandbox bubblewrap")
        mark = secrets.token_hex(8)
        streams = _Streams(job.limits.output_bytes)
        with self._broken("the Docker daemon did not do as asked"), contextlib.ExitStack() as stack:
            container = self._create(job, mark)
            stack.callback(self._remove, container)
            self._api.put_archive(container, JOB_FOLDER, _archive(job_files(job)))
            line = self._attach(container, stack)
            output = os.dup(line.fileno())
            stack.callback(os.close, output)
            killer = threading.Thread(target=self._kill, args=(container,))
            wiring = Wiring(
                input_fd=line.fileno(),
                end_input=lambda: _half_close(line),
                outputs={output: streams.add},
                exit_fd=None,
                usage=_Gauge(self._api, container).read,
                # The daemon answers once it has got rid of the output, for which we must go on reading.
                kill=killer.start,
            )
            self._api.start(container)
            ending = supervise(wiring, job.stdin, job.limits)
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            killer.join()
            self._api.wait(container, timeout=_ANSWER_S)
            stderr, report = streams.report(mark)
            if ending.limit is None and ran_out(self._api, container, wait=was_killed(report)):
                ending = replace(ending, limit="memory_limit")
        if ending.limit is None and len(stderr) > job.limits.output_bytes:
            ending = replace(ending, limit="output_limit")
        stderr = stderr[: job.limits.output_bytes]
        return outcome(ending, bytes(streams.out.data), stderr, report, job.limits)

    def _create(self, job: SandboxJob, mark: str) -> str:
        limits = job.limits
        host_config = self._api.create_host_config(
            network_mode="none",
            read_only=True,
            tmpfs={
                "/tmp": f"rw,nosuid,nodev,exec,mode=1777,uid={_JOB_ID},gid={_JOB_ID},size={max(1, limits.tmp_bytes)}"
            },
            shm_size=max(1, min(_SHARED_BYTES, limits.tmp_bytes)),
            ipc_mode="private",
            mounts=[{"Type": "volume", "Target": JOB_FOLDER}],
            mem_limit=limits.memory + _LAUNCHER_BYTES,
            memswap_limit=limits.memory + _LAUNCHER_BYTES,
            pids_limit=limits.processes + 1,
            nano_cpus=self._cores * 1_000_000_000,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            ulimits=_ulimits(limits),
            log_config={"Type": "none"},
        )
        channel = f"stderr:{mark}:{int(limits.wall_s) + _LATE_S}"
        address_space = "" if limits.address_space is None else f"AS={limits.address_space}"
        job_command = ["python3", "-I", DRIVER]
        created = self._api.create_container(
            self._image,
            entrypoint=["python3", *BARE_PYTHON, LAUNCHER, channel, "keep", address_space, *job_command],
            command=[],
            user=f"{_JOB_ID}:{_JOB_ID}",
            environment=environment(_PATH),
            working_dir="/",
            stdin_open=True,
            host_config=host_config,
            labels={LABEL: self._owner},
        )
        return str(created["Id"])

    def _attach(self, container: str, stack: contextlib.ExitStack) -> socket.socket:
        """The line that carries the container's standard streams."""
        streams = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
        raw = self._api.attach_socket(container, params=streams)
        stack.callback(raw.close)
        return stack.enter_context(socket.socket(fileno=os.dup(raw.fileno())))

    def _kill(self, container: str) -> None:
        with contextlib.suppress(self._api_error):  # it has ended by itself
            self._api.kill(container)

    def _remove(self, container: str) -> None:
        with contextlib.suppress(self._api_error):  # somebody else was faster
            self._api.remove_container(container, force=True, v=True)

    def _remove_orphans(self) -> None:
        """Remove the containers of harnesses of this machine that are dead."""
        for found in self._api.containers(all=True, filters={"label": LABEL}):
            if is_orphan(found["Labels"][LABEL], self._owner):
                self._remove(found["Id"])

    @contextlib.contextmanager
    def _broken(self, what: str) -> Iterator[None]:
        try:
            yield
        except SandboxError:
            raise
        except self._errors as error:
            raise SandboxError(f"{what} ({' '.join(str(error).split())})") from error


def ran_out(api: Any, container: str, *, wait: bool) -> bool:
    """Whether the kernel killed in this container, which has ended, for want of memory. The daemon may hear of that
    after it has heard of the end: `wait` a moment for it."""
    until = time.monotonic() + (_HEARD_S if wait else 0)
    while not api.inspect_container(container)["State"]["OOMKilled"]:
        if time.monotonic() >= until:
            return False
        time.sleep(_HEARD_S / 10)
    return True


@dataclass
class _Streams:
    """Takes the container's two outputs apart again: each piece has a head of 8 bytes, its stream and length."""

    limit: int
    out: Collector = field(init=False)
    err: Collector = field(init=False)
    _buffer: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self.out, self.err = Collector(self.limit), Collector(self.limit + _REPORT_BYTES)

    def add(self, chunk: bytes) -> bool:
        self._buffer += chunk
        within, start = True, 0
        while len(self._buffer) >= start + 8:
            stream, length = struct.unpack_from(">BxxxI", self._buffer, start)
            if len(self._buffer) < start + 8 + length:
                break
            collector = self.err if stream == 2 else self.out
            within &= collector.add(bytes(self._buffer[start + 8 : start + 8 + length]))
            start += 8 + length
        del self._buffer[:start]
        return within

    def report(self, mark: str) -> tuple[bytes, bytes]:
        """The standard error without the launcher's report at its end, and the report: nothing may come after
        it, so nothing in the job can forge it."""
        before, found, report = bytes(self.err.data).rpartition(f"\0{mark} ".encode())
        if found and report.endswith(b"\n") and len(report) < _REPORT_BYTES:
            return before, report
        return bytes(self.err.data), b""


@dataclass
class _Gauge:
    """What a container uses, by the daemon's word; it takes milliseconds, so it is asked for only now and then."""

    api: Any
    container: str
    _last: Usage | None = None
    _next: float = 0.0

    def read(self) -> Usage | None:
        if time.monotonic() >= self._next:
            self._last = self._ask() or self._last
            self._next = time.monotonic() + _LOOK_S
        return self._last

    def _ask(self) -> Usage | None:
        told = self.api.stats(self.container, stream=False, one_shot=True)
        memory, detail = told["memory_stats"], told["memory_stats"].get("stats", {})
        if "usage" not in memory:  # it has ended, or is not quite there yet
            return None
        kind = "total_" if "total_inactive_file" in detail else ""
        files = detail.get(f"{kind}inactive_file", 0) + detail.get(f"{kind}active_file", 0)
        nanoseconds = told["cpu_stats"]["cpu_usage"]["total_usage"]
        return Usage(nanoseconds / 1e9, max(0, memory["usage"] - files - _LAUNCHER_BYTES), 0)  # the daemon counts


def _half_close(line: socket.socket) -> None:
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_WR)


def _archive(files: dict[str, bytes]) -> bytes:
    """A tar of `files` that only root can change."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        folder = tarfile.TarInfo("files")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(folder)
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o444
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def _ulimits(limits: SandboxLimits) -> list[dict[str, Any]]:
    """The limits of each process that the daemon can set: all but the address space."""
    pairs = (item.split("=") for item in limits_text(limits, None).split(","))
    values = {name.lower(): int(value) for name, value in pairs if name != "AS"}
    return [{"Name": name, "Soft": value, "Hard": value + (name == "cpu")} for name, value in values.items()]
