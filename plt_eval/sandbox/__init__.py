"""Where code that a model wrote runs.

>>> sandbox = open_sandbox("bubblewrap")
>>> sandbox.run(SandboxJob("print(6 * 7)")).stdout
b'42\\n'
"""

from __future__ import annotations

import difflib

from plt_benchmarks.protocols import Sandbox, SandboxError, SandboxJob, SandboxLimits
from plt_eval.errors import UserError

SANDBOXES = ("bubblewrap", "docker", "unsafe-subprocess")
"""The names that :func:`open_sandbox` takes; the first is the default. The last isolates nothing."""

__all__ = ["SANDBOXES", "open_sandbox"]


def open_sandbox(name: str, *, image: str | None = None) -> Sandbox:
    """The sandbox called `name`, after it has run one job to show that it works. `image` is the local container
    image of "docker", and of no other.

    Raises UserError for an unknown name and for a sandbox that does not work here, with what mends it.
    """
    if name not in SANDBOXES:
        near = difflib.get_close_matches(name, SANDBOXES, 1, 0.4)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UserError(f"--sandbox {name}: unknown{hint} (there are {', '.join(SANDBOXES)})")
    if image is not None and name != "docker":
        raise UserError(f"--sandbox-image {image}: only --sandbox docker has an image, found --sandbox {name}")
    try:
        sandbox = _backend(name, image)
        _check(sandbox)
    except SandboxError as error:
        raise UserError(f"--sandbox {name}: {error}") from error
    return sandbox


def _backend(name: str, image: str | None) -> Sandbox:
    if name == "bubblewrap":
        from plt_eval.sandbox.bubblewrap import Bubblewrap

        return Bubblewrap()
    if name == "docker":
        from plt_eval.sandbox.docker import Docker

        return Docker(image)
    from plt_eval.sandbox.unsafe import UnsafeSubprocess

    return UnsafeSubprocess()


def _check(sandbox: Sandbox) -> None:
    """Run one small job. Raises SandboxError when it does not do as it should."""
    job = SandboxJob("print(input())", stdin=b"works", limits=SandboxLimits(wall_s=30, cpu_s=30))
    outcome = sandbox.run(job)
    if outcome.stdout.strip() != b"works":
        said = outcome.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no output"]
        ended = outcome.status if outcome.exit_code is None else f"exit code {outcome.exit_code}"
        raise SandboxError(f"a first small program did not run ({ended}): {said[0]}")
