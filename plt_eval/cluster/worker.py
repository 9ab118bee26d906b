"""What a machine does for a run somewhere else: say what it has, and judge.

Ray keeps the processes. Each keeps the scorer of the last order that it had, as the local runner keeps one: with the
sandbox of this machine, the time limits of this machine, and processes that wait for the next answer. A process judges
one answer at a time; when it dies, what it had started dies with it (see the sandboxes), or is removed by `sweep`.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

from plt_benchmarks.protocols import Answer, Sample, SandboxError, Score, Scorer, SuiteError
from plt_eval.cluster.orders import Introduction, Judgement, Order, differences, expectations
from plt_eval.errors import UserError, one_line


class Judge(Protocol):
    """A scorer and whatever is around it on this machine."""

    def judge(self, sample: Sample, answer: Answer) -> tuple[Score, bytes]: ...

    def close(self) -> None: ...


def introduce(order: Order, images: tuple[str, ...] = ()) -> Introduction:
    """Get ready to judge by `order`, and say what is here; also why it is not possible here."""
    from plt_eval.provenance import hardware, packages

    about: dict[str, Any] = {"packages": packages(), "hardware": hardware().model_dump()}
    try:
        _judge_for(order)
    except _REFUSALS as error:
        return Introduction(**about, refused=one_line(error, limit=500))
    if order.patches is None:
        return Introduction(**about)
    from plt_eval.cluster.patches import stock

    return Introduction(**about, **stock(order.patches, images))


def judge(order: Order, sample: Sample, answer: Answer) -> Judgement:
    """The verdict on one answer. A broken sandbox or installation is this machine's, and any other fault this sample's,
    as for the local runner."""
    node = _node()
    try:
        score, files = _judge_for(order).judge(sample, answer)
    except _REFUSALS as error:
        return Judgement(node, refused=one_line(error, limit=500))
    except Exception as error:
        score, files = Score(error=f"judging raised {type(error).__name__}: {error}"), b""
    if score.error is None:
        score = dataclasses.replace(score, detail={**score.detail, "judged_on": _name(node)})
    return Judgement(node, score, files=files)


def sweep(order: Order, *, over: bool) -> None:
    """Remove what dead processes left on this machine; when the run is over, all that is left of it."""
    with contextlib.suppress(*_REFUSALS):
        if order.patches is not None:
            from plt_eval.cluster.patches import sweep_patches

            sweep_patches(order.patches, over=over)
        elif order.sandbox == "docker":
            _open_sandbox(order)  # which removes orphans


_REFUSALS = (SandboxError, SuiteError, UserError)
_kept: tuple[str, Judge] | None = None


def _judge_for(order: Order) -> Judge:
    """The judge of this process. Raises what says that this machine cannot judge."""
    global _kept
    if _kept is None or _kept[0] != order.key:
        close()
        _kept = order.key, _made(order)
    return _kept[1]


@atexit.register
def close() -> None:
    """Put the judge of this process away."""
    global _kept
    gone, _kept = _kept, None
    if gone is not None:
        with contextlib.suppress(Exception):
            gone[1].close()


def _made(order: Order) -> Judge:
    suite = order.recipe.make()
    differing = differences(order.expected, expectations(suite))
    if differing:
        raise SuiteError(f"it would not judge alike ({'; '.join(differing)})")
    if order.patches is not None:
        from plt_benchmarks.swe.suites import SweSuite
        from plt_eval.cluster.patches import PatchJudge

        assert isinstance(suite, SweSuite)
        return PatchJudge(suite, order.patches)
    return _AnswerJudge(suite.scorer(_open_sandbox(order)))


def _open_sandbox(order: Order) -> Any:
    if order.sandbox is None:
        from plt_eval.sandbox.none import NoSandbox

        return NoSandbox(order.suite)
    from plt_eval.sandbox import open_sandbox

    return open_sandbox(order.sandbox, image=order.sandbox_image)


@dataclass(frozen=True)
class _AnswerJudge:
    scorer: Scorer

    def judge(self, sample: Sample, answer: Answer) -> tuple[Score, bytes]:
        return self.scorer.score(sample, answer), b""

    def close(self) -> None:
        self.scorer.close()


def _node() -> str:
    import importlib

    return str(importlib.import_module("ray").get_runtime_context().get_node_id())


def _name(node: str) -> str:
    import socket

    return f"{socket.gethostname()}/{node[:6]}"
