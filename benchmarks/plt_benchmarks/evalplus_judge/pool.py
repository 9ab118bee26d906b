"""Judges at work: as many processes as there are comparisons at one time, kept for the next ones."""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from typing import NoReturn

from plt_benchmarks.evalplus_judge.candidate import JudgingError
from plt_benchmarks.evalplus_judge.check import Request
from plt_benchmarks.evalplus_judge.judge import LENGTH

START_S = 120.0
REPLY_S = 1800.0


class Judge:
    """One judging process. Raises JudgingError when it does not start, dies or does not answer; it is dead then."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", "-m", "plt_benchmarks.evalplus_judge.judge"]
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the judge)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, start_new_session=True
        )
        self._read_reply(START_S)

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self, request: Request) -> str:
        """The official status of one set of outputs."""
        outputs: list[pickle.PickleBuffer] = []
        content = pickle.dumps(request, protocol=5, buffer_callback=outputs.append)
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(LENGTH.pack(len(outputs)))
            for part in (memoryview(content), *(output.raw() for output in outputs)):
                stdin.write(LENGTH.pack(len(part)))
                stdin.write(part)
            stdin.flush()
        except OSError:
            self._fail("died")
        answer = self._read_reply(REPLY_S)
        if "status" not in answer:
            raise JudgingError(f"the judge could not compare: {answer.get('error')}")
        return answer["status"]

    def _read_reply(self, seconds: float) -> dict[str, str]:
        stdout = self._process.stdout
        assert stdout is not None
        deadline, reply = time.monotonic() + seconds, b""
        while not reply.endswith(b"\n"):
            if not select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self._fail(f"gave no answer in {seconds:.0f} s")
            part = os.read(stdout.fileno(), 1 << 16)
            if not part:
                self._fail("died")
            reply += part
        answer: dict[str, str] = json.loads(reply)
        return answer

    def _fail(self, how: str) -> NoReturn:
        self.kill()
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()[-1:]
        self._close_streams()
        raise JudgingError(f"the judge {how}" + (f": {said[0][:300]}" if said else ""))

    def kill(self) -> None:
        """End the judge and everything it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End the judge."""
        self.kill()
        self._close_streams()

    def _close_streams(self) -> None:
        for stream in (self._process.stdin, self._process.stdout, self._said):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


class JudgePool:
    """Lends judges to threads; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Judge] = []
        self._busy: set[Judge] = set()
        self._closed = False

    def check(self, request: Request) -> str:
        """As Judge.check, on an idle judge or a new one. A judge that fails is replaced for the next request."""
        judge = self._take()
        try:
            status = judge.check(request)
        except BaseException:
            self._drop(judge)
            raise
        with self._lock:
            self._busy.discard(judge)
            if not self._closed:
                self._idle.append(judge)
                return status
        judge.close()
        return status

    def idle_pids(self) -> list[int]:
        """The processes that wait for work."""
        with self._lock:
            return [judge.pid for judge in self._idle]

    def _take(self) -> Judge:
        with self._lock:
            if self._closed:
                raise JudgingError("the scorer is closed")
            if self._idle:
                judge = self._idle.pop()
                self._busy.add(judge)
                return judge
        judge = Judge()
        with self._lock:
            self._busy.add(judge)
        return judge

    def _drop(self, judge: Judge) -> None:
        with self._lock:
            self._busy.discard(judge)
        judge.close()

    def close(self) -> None:
        """End all judges, also those at work."""
        with self._lock:
            self._closed = True
            judges = [*self._idle, *self._busy]
            self._idle = []
        for judge in judges:
            judge.kill()
        for judge in judges:
            if judge not in self._busy:
                judge.close()
