"""Run a candidate program on inputs in the sandbox and collect what it returned (see driver.py, which is what runs)."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from plt_benchmarks.evalplus_judge import frames
from plt_benchmarks.evalplus_judge.official import (
    MIN_TIME_LIMIT_S,
    SET_EXTRA_S,
    SET_LIMIT_S,
    TIME_LIMIT_FACTOR,
    evalplus_source,
)
from plt_benchmarks.protocols import Sandbox, SandboxJob, SandboxLimits, SandboxOutcome

SANITIZE_CPU_S = 60
"""Post-processing is quadratic in the number of lines; what takes longer is judged as it is."""
WALL_FACTOR, WALL_EXTRA_S = 5.0, 60.0
"""Real time for so much processor time: only those who sleep or wait ever meet it."""
CALL_WALL_FACTOR, CALL_WALL_EXTRA_S = 10.0, 10.0
ENCODE_CPU_S = 120.0
"""For turning outputs into bytes; most take microseconds, a gigabyte of tuples some twenty seconds."""
JOB_MEMORY = 5 << 30
"""Above the official address space of a process."""


class JudgingError(RuntimeError):
    """The judging itself broke, whatever the answer was; one line."""


@dataclass(frozen=True)
class InputSet:
    """Inputs of one set of tests, with the processor time that each call may take (seconds) and all together."""

    name: str
    inputs: Sequence[Any]
    limits: Sequence[float]
    total_s: float

    @classmethod
    def official(cls, name: str, inputs: Sequence[Any], reference_s: Sequence[float]) -> InputSet:
        """With the official limits, from the reference solution's times."""
        limits = [max(MIN_TIME_LIMIT_S, TIME_LIMIT_FACTOR * t) for t in reference_s]
        return cls(name, inputs, limits, min(SET_LIMIT_S, sum(limits)) + SET_EXTRA_S)


@dataclass(frozen=True)
class Candidate:
    """A program to run, and how: `sanitize` has the official post-processing applied to the text first;
    `iterate` lets any iterable stand for its items; `output_bytes` bounds what all outputs take."""

    text: str
    entry_point: str
    sanitize: bool = False
    iterate: bool = False
    output_bytes: int = 1 << 30


@dataclass
class SetTranscript:
    """What one set of tests gave. `outputs` are encoded, one per call that returned, in order, and `times` their
    processor seconds. `ended`: "complete" when every call returned; otherwise `why` says more."""

    outputs: list[memoryview] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    loaded: bool = False
    ended: Literal["complete", "raised", "timeout", "died", "not run"] = "not run"
    why: str = ""


@dataclass(frozen=True)
class Transcript:
    """What a candidate did. `program` is what was run, `post_processing` what made it of the text: "none", "sanitized",
    "timed out" or "failed" (the last two leave the text as it is)."""

    program: str
    post_processing: Literal["none", "sanitized", "timed out", "failed"]
    sets: dict[str, SetTranscript]
    python: str


def run_candidate(sandbox: Sandbox, candidate: Candidate, sets: Sequence[InputSet]) -> Transcript:
    """Run `candidate` on `sets` in order, stopping at the first that is not complete. Raises JudgingError when the
    sandbox did not do its part."""
    try:
        outcome = sandbox.run(_job(candidate, sets))
    except OSError as error:
        raise JudgingError(f"sandbox {sandbox.name}: {error}") from error
    return _read(outcome, sets)


def _job(candidate: Candidate, sets: Sequence[InputSet]) -> SandboxJob:
    runs = [
        {
            "inputs": list(tests.inputs),
            "limits": list(tests.limits),
            "wall_limits": [CALL_WALL_FACTOR * limit + CALL_WALL_EXTRA_S for limit in tests.limits],
            "cpu_s": tests.total_s,
            "wall_s": _wall(tests.total_s),
            "encode_cpu_s": ENCODE_CPU_S,
        }
        for tests in sets
    ]
    plan = {
        "text": candidate.text,
        "entry_point": candidate.entry_point,
        "iterate": candidate.iterate,
        "output_bytes": candidate.output_bytes,
        "sanitize": candidate.sanitize,
        "sanitize_cpu_s": SANITIZE_CPU_S,
        "sanitize_wall_s": _wall(SANITIZE_CPU_S),
        "runs": runs,
    }
    cpu_s = sum(tests.total_s for tests in sets) + ENCODE_CPU_S + SANITIZE_CPU_S + 10
    wall_s = sum(_wall(tests.total_s) for tests in sets) + _wall(SANITIZE_CPU_S) + _wall(ENCODE_CPU_S)
    limits = SandboxLimits(wall_s, cpu_s, JOB_MEMORY, output_bytes=candidate.output_bytes)
    files = {
        "encoding.py": _our_source("encoding.py"),
        "frames.py": _our_source("frames.py"),
        "official_utils.py": evalplus_source("eval/utils.py"),
        "sanitize.py": evalplus_source("sanitize.py"),
        "syncheck.py": evalplus_source("syncheck.py"),
    }
    program = _our_source("driver.py").decode()
    return SandboxJob(program, pickle.dumps(plan, protocol=4), files, limits)


@functools.cache
def _our_source(name: str) -> bytes:
    """A file beside this one; read once, so that all of a run is by one version."""
    return Path(__file__).with_name(name).read_bytes()


def _wall(cpu_s: float) -> float:
    return WALL_FACTOR * cpu_s + WALL_EXTRA_S


_POST_PROCESSING: tuple[Literal["none", "sanitized", "timed out", "failed"], ...] = (
    "none",
    "sanitized",
    "timed out",
    "failed",
)


def _read(outcome: SandboxOutcome, sets: Sequence[InputSet]) -> Transcript:
    records = frames.unpack(outcome.stdout)
    hello = next(records, None)
    program = next(records, None)
    if program is not None and program.kind == frames.FAILED:
        raise JudgingError(program.text)
    if hello is None or program is None or hello.kind != frames.HELLO or program.kind != frames.PROGRAM:
        said = outcome.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        ended = outcome.status if outcome.exit_code is None else f"exit code {outcome.exit_code}"
        raise JudgingError(f"the driver did not come to run the program in the sandbox ({ended}): {said[0]}")
    transcripts = {tests.name: SetTranscript() for tests in sets}
    for frame in records:
        if frame.run < len(sets):
            _add(transcripts[sets[frame.run].name], frame, len(sets[frame.run].inputs))
    _explain_deaths(outcome, sets, transcripts)
    text = bytes(program.payload).decode("utf-8", "surrogatepass")
    return Transcript(text, _POST_PROCESSING[program.run], transcripts, hello.text)


def _add(transcript: SetTranscript, frame: frames.Frame, calls: int) -> None:
    """Take one record; those that are out of order, and all after the end, count for nothing."""
    if transcript.ended not in ("not run", "died"):
        return
    if frame.kind == frames.LOADED and not transcript.loaded:
        transcript.loaded, transcript.ended = True, "died"
    elif frame.kind == frames.VALUE and transcript.loaded and frame.call == len(transcript.outputs):
        transcript.outputs.append(frame.payload)
        transcript.times.append(frame.cpu_s)
    elif frame.kind in (frames.RAISED, frames.TIMEOUT):
        transcript.ended = "raised" if frame.kind == frames.RAISED else "timeout"
        where = "loading" if frame.call == frames.NO_CALL else f"call {frame.call}"
        transcript.why = f"{where}: {frame.text[:200] or 'time limit'}"
    else:
        transcript.ended, transcript.why = "died", "records out of order"
        return
    if transcript.loaded and len(transcript.outputs) == calls and transcript.ended == "died":
        transcript.ended = "complete"


def _explain_deaths(outcome: SandboxOutcome, sets: Sequence[InputSet], transcripts: dict[str, SetTranscript]) -> None:
    """Say of sets that neither completed nor reported why what is known about the end of their process. The text is
    for the reader alone: a candidate could have written it."""
    lines = outcome.stderr[:65536].decode(errors="replace").splitlines()
    ends = {number: end for number, _, end in (line.split(" ", 2) for line in lines if line.count(" ") >= 2)}
    for number, tests in enumerate(sets):
        transcript = transcripts[tests.name]
        started = all(transcripts[earlier.name].ended == "complete" for earlier in sets[:number])
        if not started or transcript.ended not in ("not run", "died"):
            continue
        end = ends.get(str(number), outcome.status)
        limit = end in ("SIGXCPU", "wall limit", "wall_limit", "cpu_limit")
        transcript.ended = "timeout" if limit else "died"
        transcript.why = transcript.why or f"after {len(transcript.outputs)} of {len(tests.inputs)} calls: {end}"[:200]
