"""The sandbox of a suite that runs no code."""

from __future__ import annotations

from plt_benchmarks.protocols import SandboxError, SandboxJob, SandboxOutcome


class NoSandbox:
    """What a suite is given that says that it runs no code."""

    name = ""

    def __init__(self, suite: str) -> None:
        self._suite = suite

    def run(self, job: SandboxJob) -> SandboxOutcome:  # noqa: ARG002
        raise SandboxError(
            f"suite {self._suite} says that it runs no code, and gave the sandbox a program; it was not run"
        )
