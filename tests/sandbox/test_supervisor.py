"""What becomes of a job whose end is heard of late, by the loop that watches it or by the Docker daemon."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack

import pytest

from plt_benchmarks.protocols import SandboxLimits
from plt_eval.sandbox.docker import ran_out
from plt_eval.sandbox.supervisor import Collector, Ending, Wiring, supervise

WALL_S = 0.2


def watched(*, ended: bool, says_so: bool, written: bytes = b"all of it") -> tuple[Ending, bytes]:
    """A job that has written something and `ended` before the first look at its usage, which takes longer than it may
    run. `says_so`: by a descriptor of its own, not by ending its outputs."""
    with ExitStack() as stack:
        output, told = os.pipe()
        ends, end = os.pipe()
        nothing, stdin = os.pipe()
        for fd in (output, ends, nothing):
            stack.callback(os.close, fd)
        os.set_blocking(told, False)
        assert os.write(told, written) == len(written)
        open_still = [end] if says_so else []
        if ended:
            os.close(told)
            if says_so:
                os.close(end)
                open_still = []
        else:
            open_still.append(told)
        out = Collector(1 << 20)
        wiring = Wiring(
            input_fd=stdin,
            end_input=lambda: os.close(stdin),
            outputs={output: out.add},
            exit_fd=ends if says_so else None,
            usage=lambda: time.sleep(2 * WALL_S),
            kill=lambda: [os.close(fd) for fd in open_still] and None,
        )
        ending = supervise(wiring, b"", SandboxLimits(wall_s=WALL_S))
        if not says_so:
            os.close(end)
        return ending, bytes(out.data)


@pytest.mark.parametrize("says_so", [True, False])
@pytest.mark.parametrize("written", [b"all of it", b"x" * 60_000])
def test_a_job_that_had_ended_in_time_is_not_over_its_limit(says_so: bool, written: bytes) -> None:
    ending, out = watched(ended=True, says_so=says_so, written=written)
    assert (ending.limit, out) == (None, written)
    assert ending.wall_s >= WALL_S, "it was in time to hear of the end"


@pytest.mark.parametrize("says_so", [True, False])
def test_one_that_had_not_is(says_so: bool) -> None:
    ending, out = watched(ended=False, says_so=says_so)
    assert (ending.limit, out) == ("wall_limit", b"all of it")


class Daemon:
    """One that hears at its `at`-th answer that the kernel killed for want of memory."""

    def __init__(self, at: float) -> None:
        self.at, self.asked = at, 0

    def inspect_container(self, container: str) -> dict[str, dict[str, bool]]:
        assert container == "c"
        self.asked += 1
        return {"State": {"OOMKilled": self.asked >= self.at}}


@pytest.mark.parametrize(
    ("at", "wait", "found", "most"),
    [(1, False, True, 1), (3, True, True, 3), (3, False, False, 1), (99, True, False, 12)],
)
def test_a_daemon_may_hear_late_that_memory_ran_out(at: int, wait: bool, found: bool, most: int) -> None:
    daemon, began = Daemon(at), time.monotonic()
    assert ran_out(daemon, "c", wait=wait) is found
    assert daemon.asked <= most
    assert time.monotonic() - began < 10
