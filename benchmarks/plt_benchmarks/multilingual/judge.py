"""Runs programs in the sandbox as the official evaluation does, and says how each ended."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass
from typing import Any, Literal

from plt_benchmarks.multilingual.languages import Language
from plt_benchmarks.multilingual.programs import program, text_of, with_impossible_test
from plt_benchmarks.multilingual.rows import Problem, problem_of
from plt_benchmarks.protocols import (
    Answer,
    Sample,
    Sandbox,
    SandboxError,
    SandboxJob,
    SandboxLimits,
    SandboxOutcome,
    Score,
    SuiteError,
)

Status = Literal["OK", "SyntaxError", "Exception", "Timeout"]
"""As the official evaluation names them."""

MOST_CHARACTERS = 200_000
"""Longer answers are wrong without being run."""
FORGED = "it passes even a test that nothing can pass: it ends before its tests do, or silences them"
_SLOW = 4
"""A job's wall time is so many times its processor time: a busy machine does not fail right programs."""
_STARTING_S = 10


class DriverEnded(RuntimeError):
    """Our own driver ended before the program began, so there is no verdict on it."""


@dataclass(frozen=True)
class Verdict:
    """How a program ended, and the last that it said."""

    status: Status
    why: str = ""


class MultilingualScorer:
    """Judges answers in any of the languages. Thread-safe. Raises SuiteError when the sandbox lacks a toolchain."""

    def __init__(self, sandbox: Sandbox, languages: tuple[Language, ...]) -> None:
        self._sandbox = sandbox
        self._versions = {language.key: version(sandbox, language) for language in languages}

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Value "right". The detail says how the program ended, and with what toolchain."""
        try:
            return self._score(problem_of(sample), answer)
        except DriverEnded as error:
            return Score(error=str(error))

    def close(self) -> None:
        """Nothing is held."""

    def _score(self, problem: Problem, answer: Answer) -> Score:
        if len(answer.text) > MOST_CHARACTERS:
            return Score({"right": False}, detail={"why": f"the answer has {len(answer.text)} characters"})
        solution, tests = program(problem.language, problem.row, answer)
        text = text_of(solution, tests)
        verdict = run(self._sandbox, problem.language, text)
        right = verdict.status == "OK"
        detail: dict[str, Any] = {"status": verdict.status, "toolchain": self._version(problem)}
        if right and not self._fails_when_it_should(problem, solution, tests):
            right = False
            detail["why"] = FORGED
        elif verdict.why:
            detail["why"] = verdict.why
        return Score({"right": right}, judged=text, detail=detail)

    def _version(self, problem: Problem) -> str:
        return self._versions.get(problem.language.key, "")

    def _fails_when_it_should(self, problem: Problem, solution: str, tests: str) -> bool:
        text = text_of(solution, with_impossible_test(problem.language, tests))
        return run(self._sandbox, problem.language, text).status != "OK"


def run(sandbox: Sandbox, language: Language, text: str) -> Verdict:
    """Compile and run a program. Raises SandboxError when the sandbox cannot, and DriverEnded."""
    return verdict_on(language, sandbox.run(job(language, text)))


def job(language: Language, text: str) -> SandboxJob:
    """What the sandbox is given: our driver compiles, says so, and then becomes the program."""
    commands = [command for command in (language.compile, language.run) if command]
    seconds = [language.compile_s] * bool(language.compile) + [language.run_s]
    request = {
        "file": language.file,
        "text": text,
        "commands": commands,
        "seconds": seconds,
        "environment": dict(language.environment),
    }
    return SandboxJob(_DRIVER, stdin=json.dumps(request).encode(), limits=_limits(sum(seconds)))


def _limits(seconds: int) -> SandboxLimits:
    return SandboxLimits(
        wall_s=_SLOW * seconds + _STARTING_S,
        cpu_s=seconds + 2,
        memory=3 << 30,
        processes=256,
        file_bytes=256 << 20,
        tmp_bytes=512 << 20,
        output_bytes=4 << 20,
    )


def version(sandbox: Sandbox, language: Language) -> str:
    """What the toolchain in the sandbox calls itself. Raises SuiteError when it is missing there or does not work."""
    request = {
        "programs": language.programs,
        "patterns": language.libraries,
        "check": language.check,
        "environment": dict(language.environment),
    }
    outcome = sandbox.run(SandboxJob(_PROBE, stdin=json.dumps(request).encode(), limits=_limits(language.compile_s)))
    said = outcome.stdout.decode(errors="replace").strip()
    if outcome.status != "exited" or outcome.exit_code:
        why = said or _last_words(outcome)
        raise SuiteError(
            f"{language.title}: the sandbox {sandbox.name} has no toolchain that works ({why}): {language.mend}, or "
            f"leave {language.key} out of --suite"
        )
    return next((line.strip()[:120] for line in said.splitlines() if line.strip()), "")


# --- what happened --------------------------------------------------------------------------------------


def verdict_on(language: Language, outcome: SandboxOutcome) -> Verdict:
    """The official verdict. What the driver says comes before anything that the program can say. Raises SandboxError
    when there is no toolchain after all, and DriverEnded."""
    word, _, printed = outcome.stdout.decode(errors="replace").partition("\n")
    said = outcome.stderr.decode(errors="replace")
    if word.startswith("broken "):
        raise SandboxError(f"{language.title}: {word.removeprefix('broken ')}")
    if word != "ready":
        if outcome.status == "exited" and not word:
            raise DriverEnded(f"{language.title}: the driver ended early: {_last_words(outcome)}")
        return Verdict("SyntaxError", _last_words(outcome))
    if outcome.status in ("wall_limit", "cpu_limit") or outcome.exit_code == -signal.SIGXCPU:
        return Verdict("Timeout", f"it took more than {language.run_s} s")
    if outcome.status != "exited":
        return Verdict("Exception", outcome.status.replace("_", " "))
    failed = outcome.exit_code != 0 or any(bad in printed or bad in said for bad in language.failure)
    if not failed and not (language.silent and said):
        return Verdict("OK")
    unreadable = any(sign in printed or sign in said for sign in language.syntax)
    return Verdict("SyntaxError" if unreadable else "Exception", _last_words(outcome))


def _last_words(outcome: SandboxOutcome) -> str:
    said = outcome.stderr or outcome.stdout.partition(b"\n")[2]
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|exception|fail|panic|assert", line, re.IGNORECASE)]
    ended = outcome.status if outcome.exit_code is None else f"exit code {outcome.exit_code}"
    return (telling or lines[-1:] or [ended])[0][:300]


_COMMON = """
import glob, json, os, resource, shutil, subprocess, sys
request = json.load(sys.stdin)
environment = {**os.environ, "TMPDIR": "/tmp", **request["environment"]}
null = os.open("/dev/null", os.O_RDONLY)

def found(names):
    return next((path for path in map(shutil.which, names.split("|")) if path), None)
"""

_DRIVER = (
    _COMMON
    + """
source = os.path.abspath(request["file"])
folder = os.path.dirname(source)
parts = {"{source}": source, "{program}": os.path.join(folder, "program"), "{folder}": folder}

def filled(command):
    for part, value in parts.items():
        command = [word.replace(part, value) for word in command]
    path = found(command[0])
    if path is None and command[0] != parts["{program}"]:
        say("broken the sandbox has no " + command[0])
        sys.exit(3)
    return [path or command[0], *command[1:]]

def say(word):
    os.write(1, word.encode() + b"\\n")

def limit(seconds):
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    used = resource.getrusage(resource.RUSAGE_SELF)
    wanted = int(used.ru_utime + used.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (wanted if hard < 0 else min(wanted, hard), hard))

with open(source, "w", encoding="utf-8", errors="replace") as file:
    file.write(request["text"])
*compilers, last = request["commands"]
for command, seconds in zip(compilers, request["seconds"]):
    done = subprocess.run(
        filled(command), stdin=null, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
        preexec_fn=lambda: limit(seconds),
    )
    if done.returncode:
        say("compile %d" % done.returncode)
        os.write(2, done.stdout[:8000])
        sys.exit(1)
last = filled(last)
say("ready")
os.dup2(null, 0)
limit(request["seconds"][-1])
os.execve(last[0], last, environment)
"""
)
"""Runs trusted compilers on the program, and then becomes it: how the job ends is how the program ends, and nothing of
ours runs beside it."""

_PROBE = (
    _COMMON
    + """
missing = [names for names in request["programs"] if found(names) is None]
if not missing and request["patterns"] and not any(glob.glob(pattern) for pattern in request["patterns"]):
    missing = [request["patterns"][0]]
if missing:
    print("no " + ", ".join(missing))
    sys.exit(1)
first, *rest = request["check"]
done = subprocess.run([found(first), *rest], stdin=null, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                      env=environment)
sys.stdout.buffer.write(done.stdout[:1000])
sys.exit(done.returncode)
"""
)
