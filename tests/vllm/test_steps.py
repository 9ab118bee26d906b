"""The thread that owns a vLLM, when it ends: nobody waits for it in vain, and nothing of it stays."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from plt_eval.engines import vllm_steps
from plt_eval.engines.vllm_steps import Asked, Steps


class Idle:
    """A vLLM that takes requests and never writes a token."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=1)),
            engine_core=SimpleNamespace(shutdown=lambda: None),
            add_request=lambda name, *_: self.taken.append(name),
            abort_request=lambda _: None,
            step=self.step,
        )

    def step(self) -> list[Any]:
        time.sleep(0.01)
        return []


def test_who_waits_hears_that_the_engine_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[weakref.ref[Idle]] = []
    held: list[bool] = []

    def start() -> Any:
        made = Idle()
        ended.append(weakref.ref(made))
        return made

    def given_back() -> None:
        gc.collect()
        held.append(ended[0]() is not None)

    monkeypatch.setattr(vllm_steps, "give_memory_back", given_back)
    steps = Steps(start)
    said: list[str] = []

    def ask() -> None:
        try:
            list(steps.run([Asked("seated", [1], None), Asked("waits", [1], None)]))
        except RuntimeError as error:
            said.append(str(error))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    while not steps.call(lambda llm: list(llm.taken)):
        time.sleep(0.01)
    steps.close()
    asking.join(10)
    assert said == [vllm_steps.CLOSED]
    assert held == [False]
    with pytest.raises(RuntimeError, match=vllm_steps.CLOSED):
        list(steps.run([Asked("late", [1], None)]))
    with pytest.raises(RuntimeError, match=vllm_steps.CLOSED):
        steps.call(lambda llm: llm)
