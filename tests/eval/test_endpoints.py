"""The openai engine against several endpoints: real local servers that are killed, hang, refuse, or are slow."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from bad_server import Server, ServerProcess, drop, good, hang, raw, send, status, summing
from rich.console import Console
from test_cli import PLT_EVAL, Cli, cli
from toy_parts import NoSandbox, SumSuite

from plt_benchmarks.protocols import Message, Prompt, Sample
from plt_eval.engines import openai
from plt_eval.engines.base import Completion, Decoding, GenerationRequest, LoglikelihoodRequest
from plt_eval.engines.conversations import SharedEngine, refused_for_length
from plt_eval.engines.endpoints import FAILURES, Closed, Endpoint, Endpoints, checked_endpoints
from plt_eval.engines.openai import GIVE_UP_AFTER, OpenAIEngine
from plt_eval.errors import UserError
from plt_eval.progress import RunProgress
from plt_eval.records import Identity
from plt_eval.runner import Result, Settings, run
from plt_eval.store import COMPLETIONS, list_runs
from plt_eval.swe.conversation import ChatModel

__all__ = ["cli"]

GONE = "http://127.0.0.1:9/v1"
"""Nobody is there."""


def engine(*servers: Server | ServerProcess | str, **options: Any) -> OpenAIEngine:
    defaults: dict[str, Any] = {"api": "completions", "retries": 0, "backoff_s": 0.02, "timeout_s": 5.0}
    urls = [one if isinstance(one, str) else one.url for one in servers]
    return OpenAIEngine(endpoint=urls, model="m", **(defaults | {"concurrency": 2} | options))


def requests(count: int, prompt: str = "6 + 7 = ", **more: Any) -> list[GenerationRequest]:
    return [GenerationRequest(f"q/{i}#0", Prompt(prompt, max_new_tokens=9), **more) for i in range(count)]


def drawn(it: OpenAIEngine, count: int, **more: Any) -> list[Completion]:
    completions = list(it.generate(requests(count, **more)))
    assert {completion.request_id for completion in completions} == {f"q/{i}#0" for i in range(count)}
    return completions


def assert_all_well(completions: list[Completion]) -> None:
    assert {(completion.text, completion.error) for completion in completions} == {("42", None)}


# --- which one is asked (no server) -----------------------------------------------------------------------


class Pool(Endpoints):
    """Endpoints with names for addresses, whose notes are kept."""

    def __init__(self, names: str, **options: Any) -> None:
        self.notes: list[str] = []
        options = {"at_a_time": 8, "backoff_s": 30.0, "notify": self.notes.append} | options
        super().__init__(list(names), **options)

    def __getitem__(self, name: str) -> Endpoint:
        return next(endpoint for endpoint in self.all if endpoint.url == name)

    def asks(self, *asked: str, conversation: str = "") -> str:
        """Who is asked next in a round that has asked `asked`; "" when it is over."""
        taken = self.take([self[name] for name in asked], conversation)
        return "" if taken is None else taken.url

    def asked(self, *asked: str, conversation: str = "") -> str:
        """... and it has answered, or not, by now."""
        name = self.asks(*asked, conversation=conversation)
        if name:
            self.release(self[name])
        return name

    def fails(self, names: str, times: int = FAILURES) -> None:
        for name in names * times:
            self.failed(self[name], "HTTP 500: broken")


def test_those_of_one_speed_are_asked_alike() -> None:
    pool = Pool("abc")
    assert Counter(pool.asks() for _ in range(12)) == {"a": 4, "b": 4, "c": 4}


def test_a_faster_one_gets_more() -> None:
    pool = Pool("ab", at_a_time=100)
    pool.answered(pool["a"], 1.0)
    pool.answered(pool["b"], 3.0)
    assert Counter(pool.asks() for _ in range(40)) == {"a": 30, "b": 10}


def test_one_slow_answer_does_not_starve_an_endpoint() -> None:
    pool = Pool("ab")
    pool.answered(pool["a"], 0.1)
    pool.answered(pool["b"], 600.0)
    assert Counter(pool.asks() for _ in range(8))["b"] >= 1


def test_a_round_asks_each_once_and_the_better_first() -> None:
    pool = Pool("ab")
    pool.asks()
    assert (pool.asked(), pool.asked("b"), pool.asked("b", "a")) == ("b", "a", "")


def test_a_conversation_stays_where_it_is_while_that_has_a_place() -> None:
    pool = Pool("abc", at_a_time=2)
    home = pool.asked(conversation="x")
    for name in "abc":
        pool.answered(pool[name], 9.0 if name == home else 1.0, "x" if name == home else "y")
    assert {pool.asked(conversation="x") for _ in range(5)} == {home}, "though the others are faster"
    pool.asks(conversation="x")
    pool.asks(conversation="x")
    moved = pool.asked(conversation="x")
    assert moved != home, "it is full"
    pool.answered(pool[moved], 1.0, "x")
    pool.release(pool[home])
    assert pool.asked(conversation="x") == moved
    pool.fails(moved)
    assert pool.asked(conversation="x") not in (moved, ""), "it is down"


def test_failures_in_a_row_take_one_down_and_an_answer_brings_it_back() -> None:
    pool = Pool("ab")
    pool.fails("a", FAILURES - 1)
    pool.answered(pool["a"], 1.0)
    pool.fails("a", FAILURES - 1)
    assert not pool["a"].down
    assert pool.notes == []
    pool.fails("a", 5)
    assert pool["a"].down
    assert pool.notes == ["a is down (HTTP 500: broken); the others go on without it"]
    assert {pool.asked() for _ in range(5)} == {"b"}
    pool["a"].ready_at = time.monotonic()
    assert pool.asks() == "a", "one tries it"
    assert {pool.asked() for _ in range(5)} == {"b"}, "and only one"
    pool.answered(pool["a"], 1.0)
    pool.release(pool["a"])
    assert pool.notes[1:] == ["a answers again"]
    assert {pool.asks() for _ in range(4)} == {"a", "b"}


def test_waits_of_one_that_stays_down_grow() -> None:
    pool = Pool("ab", backoff_s=200.0, max_wait_s=1000.0)
    for most in (200.0, 400.0, 800.0, 1000.0, 1000.0):
        pool["a"].ready_at = time.monotonic()
        pool.fails("a", 8)
        assert 0.4 * most < pool["a"].ready_at - time.monotonic() <= most
    assert len(pool.notes) == 1


def test_where_all_are_down_all_are_asked() -> None:
    pool = Pool("abc")
    pool.fails("abc")
    assert pool.notes[-1] == "c is down (HTTP 500: broken); none is up now, waiting for one"
    first = pool.asked()
    second = pool.asked(first)
    assert {first, second, pool.asked(first, second)} == {"a", "b", "c"}
    assert pool.asked("a", "b", "c") == ""


def test_one_that_asks_for_patience_rests_and_is_not_down() -> None:
    pool = Pool("ab")
    pool.busy(pool["a"], "HTTP 429: slow down", 20.0)
    assert {pool.asked() for _ in range(5)} == {"b"}
    assert pool.asked("b") == "", "not even where the other failed"
    pool.busy(pool["b"], "HTTP 429: slow down", 10.0)
    assert pool.asked() == "b", "the one that is ready sooner"
    assert pool.notes == []
    assert [line.split()[1] for line in pool.health()] == ["resting", "resting"]


def test_one_out_of_service_is_not_asked_again() -> None:
    pool = Pool("ab")
    pool.put_out(pool["a"], "HTTP 401: wrong key")
    pool.put_out(pool["a"], "HTTP 401: wrong key")
    assert {pool.asked() for _ in range(5)} == {"b"}
    assert pool.notes == ["a is out of service, it refused: HTTP 401: wrong key"]
    pool.put_out(pool["b"], "HTTP 401: wrong key")
    assert pool.asked() == ""
    assert len(pool.notes) == 1, "the error says it"


def test_waiting_ends_when_one_comes_back_or_all_is_over() -> None:
    from threading import Timer

    pool = Pool("ab")
    pool.fails("ab")
    began = time.monotonic()
    Timer(0.1, lambda: pool.answered(pool["a"], 1.0)).start()
    assert pool.pause(20.0)
    Timer(0.1, pool.close).start()
    with pytest.raises(Closed):
        pool.pause(20.0)
    with pytest.raises(Closed):
        pool.take([])
    assert time.monotonic() - began < 5


def test_one_alone_that_comes_and_goes_wakes_nobody_before_the_time() -> None:
    """It has a place for one: all that wait would only use up their tries."""
    from threading import Timer

    pool = Pool("a")
    pool.fails("a")
    timer = Timer(0.05, lambda: pool.answered(pool["a"], 1.0))
    timer.start()
    assert not pool.pause(0.2)
    timer.join()
    assert not pool["a"].down


# --- runs over real processes -----------------------------------------------------------------------------


class Action:
    """Calls what it is given once so many samples are judged."""

    def __init__(self, *steps: tuple[int, Callable[[], object]]) -> None:
        self.steps = list(steps)
        self.judged = 0

    def __call__(self, _: Sample) -> None:
        self.judged += 1
        if self.steps and self.judged >= self.steps[0][0]:
            self.steps.pop(0)[1]()


def evaluated(tmp_path: Path, it: OpenAIEngine, before: Callable[[Sample], None] | None = None) -> Result:
    suite = SumSuite(60, before=before)
    settings = Settings(tmp_path, Decoding(temperature=0.5, seed=3), n_samples=2, scoring_workers=1, run_id="x")
    console = Console(file=io.StringIO())
    try:
        return run(suite, suite.load(None), it, NoSandbox, settings, console=console)
    finally:
        it.close()


def outcome(result: Result) -> tuple[Any, ...]:
    """What has to be the same, whoever answered."""
    texts = {record.key: (record.text, record.finish_reason, record.error) for record in result.run.completions()}
    verdicts = {record.key: record.values for record in result.run.samples()}
    return result.metrics.missing, result.metrics.metrics, texts, verdicts


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """A run on one server to which nothing happens."""
    alone = ServerProcess()
    got = outcome(evaluated(tmp_path_factory.mktemp("runs"), engine(alone)))
    alone.kill()
    assert 0.5 < got[1]["right"].value < 0.8
    assert got[0] == 0
    return got


def test_killing_one_of_two_loses_no_sample_and_changes_no_score(
    processes: tuple[ServerProcess, ServerProcess], undisturbed: tuple[Any, ...], tmp_path: Path
) -> None:
    notes: list[str] = []
    one, other = processes
    it = engine(one, other, notify=notes.append)
    result = evaluated(tmp_path, it, Action((20, other.kill)))
    assert outcome(result) == undisturbed
    assert sum(f"{other.url} is down" in note for note in notes) == 1
    assert one.count() > 120 / 2
    assert [note.partition(" answered")[0] for note in notes[-2:]] == [
        f"{endpoint.url}: {endpoint.answered}" for endpoint in it._endpoints.all
    ]
    assert sum(endpoint.answered for endpoint in it._endpoints.all) == 120
    facts = result.run.manifest.sessions[0].engine_facts
    assert facts == {"endpoints": f"{one.url}, {other.url}", "requests_at_a_time": "2 each"}


def test_one_that_is_restarted_comes_back(
    processes: tuple[ServerProcess, ServerProcess], undisturbed: tuple[Any, ...], tmp_path: Path
) -> None:
    notes: list[str] = []
    one, other = processes
    it = engine(one, other, notify=notes.append)
    result = evaluated(tmp_path, it, Action((10, other.kill), (30, other.start)))
    assert outcome(result) == undisturbed
    assert f"{other.url} answers again" in notes
    assert other.count() > 5, "since it was started again"


def test_killing_both_stops_the_run_and_the_same_command_goes_on(
    processes: tuple[ServerProcess, ServerProcess], undisturbed: tuple[Any, ...], tmp_path: Path
) -> None:
    one, other = processes

    def kill_both() -> None:
        one.kill()
        other.kill()

    with pytest.raises(UserError) as caught:
        evaluated(tmp_path, engine(one, other, retries=1), Action((20, kill_both)))
    line = str(caught.value)
    assert line.startswith(f"{GIVE_UP_AFTER} requests in a row failed for good; {one.url}: ")
    assert f"; {other.url}: " in line
    assert "\n" not in line
    (stopped,) = list_runs(tmp_path)
    assert stopped.state() == "incomplete"
    assert 19 <= stopped.done() < 120, "the twentieth is judged, and may not be stored, when both are killed"
    one.start()
    other.start()
    resumed = evaluated(tmp_path, engine(other, one))
    assert resumed.run.manifest.resumed == 1
    assert outcome(resumed) == undisturbed


def test_waiting_requests_survive_a_restart_of_both(
    processes: tuple[ServerProcess, ServerProcess], undisturbed: tuple[Any, ...], tmp_path: Path
) -> None:
    one, other = processes

    def restart_both() -> None:
        one.kill()
        other.kill()
        time.sleep(0.2)
        one.start()
        other.start()

    it = engine(one, other, retries=8, backoff_s=0.05)
    assert outcome(evaluated(tmp_path, it, Action((20, restart_both)))) == undisturbed


def test_a_run_goes_on_at_other_addresses_under_a_name(
    processes: tuple[ServerProcess, ServerProcess], undisturbed: tuple[Any, ...], tmp_path: Path
) -> None:
    one, other = processes

    def stop() -> None:
        raise UserError("enough for today")

    with pytest.raises(UserError, match="enough"):
        evaluated(tmp_path, engine(one), Action((50, stop)))
    with pytest.raises(UserError, match=r"what differs: engine_identity\.endpoint: http://127.* -> http://127"):
        evaluated(tmp_path, engine(one, other))
    result = evaluated(tmp_path, engine(other, served_as=one.url + "/"))
    assert outcome(result) == undisturbed
    assert result.run.manifest.identity.engine_identity["endpoint"] == one.url
    assert [s.engine_facts.get("endpoints") for s in result.run.manifest.sessions] == [None, other.url]


# --- slow, broken and hanging ones ------------------------------------------------------------------------


def test_a_slow_one_gets_less(server: Server, second: Server) -> None:
    server.always, second.always = good(slow_s=0.01), good(slow_s=0.25)
    assert_all_well(drawn(engine(server, second), 60))
    assert len(server.asked) > 3 * len(second.asked) > 0
    assert max(server.most_under_way, second.most_under_way) == 2, "each as many as asked for"


@pytest.mark.parametrize("trouble", [raw(b"<html>hello</html>"), drop, status(500)], ids=["garbage", "drop", "500"])
def test_a_broken_one_is_taken_down(server: Server, second: Server, trouble: Any) -> None:
    notes: list[str] = []
    second.always = trouble
    assert_all_well(drawn(engine(server, second, notify=notes.append, backoff_s=30.0), 60))
    assert FAILURES <= len(second.asked) <= FAILURES + 2
    assert server.most_under_way == 2, "no more than before"
    assert sum("is down" in note for note in notes) == 1
    assert len(notes) == 2, "one of the trouble, one of the state"


def test_one_that_hangs_is_survived_while_the_other_goes_on(server: Server, second: Server) -> None:
    second.always = hang
    server.always = good(slow_s=0.01)
    notes: list[str] = []
    it = engine(server, second, timeout_s=5.0, backoff_s=30.0, notify=notes.append, concurrency=4)
    completions = drawn(it, 100)
    assert_all_well(completions)
    waited = [completion.seconds is not None and completion.seconds >= 5.0 for completion in completions]
    assert sum(waited) == 4
    assert waited.index(True) > 10, "nobody waits for those that hang"
    assert len(second.asked) == 4
    assert any(f"{second.url} is down (ReadTimeout" in note for note in notes)


def test_one_that_is_frozen_is_not_tried_with_a_request(server: Server, second: Server) -> None:
    """It takes connections and says nothing: its models are asked for first, which costs less than a time-out."""
    second.always, second.frozen, second.models = hang, True, ["m"]
    server.always = good(slow_s=0.02)
    assert_all_well(drawn(engine(server, second, timeout_s=0.3, backoff_s=0.1, retries=3), 60))
    assert second.asked == []


def test_one_whose_model_alone_hangs_is_tried_again_and_again(server: Server, second: Server) -> None:
    second.always, second.models = hang, ["m"]
    server.always = good(slow_s=0.02)
    assert_all_well(drawn(engine(server, second, timeout_s=0.3, backoff_s=0.05, retries=3), 100))
    assert 2 < len(second.asked) < 20


def test_patience_moves_requests_away(server: Server, second: Server) -> None:
    notes: list[str] = []
    second.plan = [status(429, "slow down", Retry_After="30")] * 2
    began = time.monotonic()
    it = engine(server, second, notify=notes.append, max_wait_s=60.0)
    assert_all_well(drawn(it, 60))
    assert time.monotonic() - began < 10
    assert len(second.asked) <= 2
    assert notes == [f"{second.url}: HTTP 429: slow down; trying elsewhere"]
    assert "resting for" in it.health()[1]


def test_a_request_that_nobody_can_answer_does_not_stop_the_others(server: Server, second: Server) -> None:
    def poison(handler: Any, body: dict[str, Any]) -> None:
        (status(500, "poison") if body["prompt"] == "bad" else good())(handler, body)

    server.always = second.always = poison
    mixed = requests(30)
    mixed[3] = GenerationRequest("q/3#0", Prompt("bad"))
    completions = {one.request_id: one for one in engine(server, second, retries=1).generate(mixed)}
    lost = completions.pop("q/3#0")
    assert lost.error is not None
    assert lost.error.count("HTTP 500: poison") == 2, "what each said"
    assert lost.error.endswith("(after 2 tries)")
    assert_all_well(list(completions.values()))


def test_both_down_is_one_line_that_names_each(server: Server) -> None:
    server.always = status(503, "loading")
    with pytest.raises(UserError) as caught:
        list(engine(server, GONE).generate(requests(60)))
    assert str(caught.value).startswith(
        f"{GIVE_UP_AFTER} requests in a row failed for good; {server.url}: HTTP 503: loading; {GONE}: ConnectError"
    )


def test_time_outs_use_up_the_tries_of_a_request(server: Server, second: Server) -> None:
    """An answer that takes too long everywhere is not waited for twice as long with twice the endpoints."""
    server.always = second.always = hang
    (lost,) = drawn(engine(server, second, timeout_s=0.2, retries=2), 1)
    assert lost.error is not None
    assert lost.error.count("ReadTimeout") == 2
    assert len(server.asked) + len(second.asked) <= 4, "not 3 each"


def test_the_same_is_asked_elsewhere(server: Server, second: Server) -> None:
    server.always = second.always = status(500)
    decoding = Decoding(temperature=0.7, top_p=0.9, seed=11)
    drawn(engine(server, second, concurrency=1), 1, decoding=decoding)
    assert server.asked == second.asked
    assert server.asked[0]["seed"] == openai.derived_seed(11, "q/0#0")


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [401, 403, 404])
def test_one_that_refuses_is_put_out_of_service_with_one_note(server: Server, second: Server, code: int) -> None:
    notes: list[str] = []
    second.always = status(code, "no model m")
    assert_all_well(drawn(engine(server, second, notify=notes.append), 40))
    assert 1 <= len(second.asked) <= 2
    assert notes == [f"{second.url} is out of service, it refused: HTTP {code}: no model m"]


def test_the_run_ends_when_all_refuse(server: Server, second: Server) -> None:
    server.always, second.always = status(404, "no model m"), status(401, "wrong key")
    with pytest.raises(UserError) as caught:
        list(engine(server, second).generate(requests(40)))
    assert str(caught.value) == (
        f"{server.url}/completions refused: HTTP 404: no model m; {second.url}/completions refused: HTTP 401: wrong key"
    )


def test_a_refusal_does_not_end_the_run_while_another_one_may_come_back(server: Server, second: Server) -> None:
    server.always = status(404, "no model m")
    second.plan = [status(500)] * 3
    assert_all_well(drawn(engine(server, second, concurrency=1, retries=5), 10))


def test_a_refusal_of_the_request_is_what_it_was(server: Server, second: Server) -> None:
    """All refuse it: an error that agents understand, and nobody is out of service."""
    too_long = "This model's maximum context length is 4096 tokens"

    def some(handler: Any, body: dict[str, Any]) -> None:
        (status(400, too_long) if body["prompt"] == "long" else good())(handler, body)

    server.always = second.always = some
    notes: list[str] = []
    it = engine(server, second, notify=notes.append)
    for _ in range(5):
        with pytest.raises(UserError) as caught:
            list(it.generate(requests(1, "long")))
        assert refused_for_length(caught.value)
        assert str(caught.value).endswith(f"/v1/completions refused: HTTP 400: {too_long}")
    asked = len(server.asked), len(second.asked)
    assert asked == (5, 5), "each was asked"
    assert_all_well(drawn(it, 20))
    assert len(server.asked) > 5 < len(second.asked)
    assert not any("out of service" in note for note in notes)


def test_one_that_refuses_what_the_other_takes(server: Server, second: Server) -> None:
    notes: list[str] = []
    second.always = status(400, "unknown model")
    assert_all_well(drawn(engine(server, second, notify=notes.append), 40))
    assert FAILURES <= len(second.asked) < 4 * FAILURES
    assert notes[-1] == (
        f"{second.url} is out of service, it refused: HTTP 400: unknown model "
        f"({FAILURES} times in a row, and another endpoint took it)"
    )


# --- at the start -----------------------------------------------------------------------------------------


def test_what_does_not_serve_the_model_is_said_in_one_line(server: Server, second: Server) -> None:
    notes: list[str] = []
    server.models, second.models = ["m", "x"], ["c", "a", "b", "d"]
    assert_all_well(drawn(engine(server, second, notify=notes.append), 4))
    assert notes == [f"--api-model m is not among what {second.url} serves: a, b, c and 1 more"]


def test_one_that_answers_nonsense_about_its_models_is_fine(server: Server, second: Server) -> None:
    class Nested(second.RequestHandlerClass):  # type: ignore[name-defined,misc]
        def do_GET(self) -> None:
            send(self, 200, b"[" * 200_000)

    second.RequestHandlerClass = Nested
    notes: list[str] = []
    assert_all_well(drawn(engine(server, second, notify=notes.append), 4))
    assert notes == []


def test_one_that_is_not_there_at_the_start_is_said_in_one_line(server: Server) -> None:
    notes: list[str] = []
    assert_all_well(drawn(engine(GONE, server, notify=notes.append, backoff_s=30.0), 30))
    (note,) = notes
    assert note.startswith(f"{GONE} is down (ConnectError: ")
    assert note.endswith("; the others go on without it")


def test_a_single_one_is_not_looked_at(server: Server) -> None:
    server.models = ["another"]
    notes: list[str] = []
    it = engine(server, notify=notes.append)
    assert_all_well(drawn(it, 4))
    it.close()
    assert (notes, it.health(), it.facts()) == ([], [], {})


def test_every_one_gets_the_key(server: Server, second: Server) -> None:
    drawn(engine(server, second, api_key="sk-x"), 12)
    seen = server.headers_seen + second.headers_seen
    assert len(server.headers_seen) > 0 < len(second.headers_seen)
    assert {headers["Authorization"] for headers in seen} == {"Bearer sk-x"}


def test_where_the_key_goes_unencrypted_is_said(server: Server) -> None:
    notes: list[str] = []
    assert_all_well(drawn(engine(server, "https://127.0.0.1:9/v1", api_key="sk-x", notify=notes.append), 6))
    assert notes[0] == f"the API key goes to every endpoint, to {server.url} without encryption"


# --- addresses and identity -------------------------------------------------------------------------------


def identity(*urls: str, **options: Any) -> dict[str, Any]:
    return OpenAIEngine(endpoint=urls, model="org/m", **options).identity()


def test_each_address_counts_once() -> None:
    notes: list[str] = []
    given = ["http://H:80/v1/", "https://h/v1", "http://h/v1", "http://h:81/v1"]
    assert checked_endpoints(given, notes.append) == ("http://H:80/v1", "https://h/v1", "http://h:81/v1")
    assert notes == ["--endpoint http://h/v1 was given twice; it is one endpoint"]


@pytest.mark.parametrize("given", ["http://a/v1,http://b/v1", "http://a/v1 http://b/v1"])
def test_several_in_one_are_refused(given: str) -> None:
    with pytest.raises(UserError, match="expected one address; give --endpoint again"):
        checked_endpoints([given], print)


def test_order_and_repetition_do_not_matter() -> None:
    both = identity("http://a/v1", "http://b/v1")
    assert both == {"model": "org/m", "endpoint": "http://a/v1 http://b/v1", "api": "chat"}
    assert identity("http://b/v1/", "http://a/v1", "http://b/v1") == both
    assert identity("http://a/v1") == identity("http://a/v1", "http://a/v1/") != both


def test_a_name_stands_for_the_addresses() -> None:
    named = identity("http://a/v1", served_as="mine r2")
    assert named == identity("http://c/v1", "http://b/v1", served_as="mine r2")
    assert named == {"model": "org/m", "endpoint": "mine r2", "api": "chat"}
    before = identity("http://a/v1", "http://b/v1")
    assert identity("http://c/v1", served_as="http://b/v1 http://a/v1/") == before


@pytest.mark.parametrize("name", ["", "  ", "a\x07b", "http://", "http://me:secret@h/v1"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UserError) as caught:
        identity("http://a/v1", served_as=name)
    assert "secret" not in str(caught.value)


def test_runs_of_one_endpoint_are_the_ones_they_were() -> None:
    """The name of a stored run hangs on this hash."""
    fields: dict[str, Any] = {"suite": "s", "suite_version": "1", "data_sha256": "d", "prompts_sha256": "p"}
    decoding = {"temperature": 0.0, "top_p": 1.0, "seed": 0, "max_new_tokens": None}
    own = identity("http://127.0.0.1:8000/v1")
    run_identity = Identity(**fields, engine="openai", engine_identity=own, decoding=decoding, n_samples=1, problems=2)
    assert run_identity.default_run_id() == "s-m-7662e144"


# --- conversations, log-likelihoods, display, command line ----------------------------------------------------


def test_a_conversation_stays_at_its_endpoint_and_moves_when_that_dies(
    processes: tuple[ServerProcess, ServerProcess],
) -> None:
    it = engine(*processes, api="chat")

    def turns(count: int) -> Iterator[Completion]:
        for _ in range(count):
            prompt = Prompt("", messages=(Message("user", "6 + 7 = "),))
            yield from it.generate([GenerationRequest("q#0.1", prompt, conversation="q#0")])

    list(turns(6))
    counts = [process.count() for process in processes]
    assert sorted(counts) == [0, 6]
    processes[counts.index(6)].kill()
    assert [turn.error for turn in turns(4)] == [None] * 4
    assert processes[counts.index(0)].count() == 4


def test_an_agent_stays_at_its_endpoint_and_is_shortened_where_all_refuse(server: Server, second: Server) -> None:
    def short(handler: Any, body: dict[str, Any]) -> None:
        refusal = status(400, "This model's maximum context length is 9 tokens")
        (refusal if len(body["messages"]) > 4 else good())(handler, body)

    server.always = second.always = short
    notes: list[str] = []
    it = engine(server, second, api="chat", notify=notes.append)
    agent = ChatModel(SharedEngine(it), "q#0", Decoding(), {}, max_new_tokens=9)
    said = [Message("system", "Be good."), Message("user", "6 x 7?")]
    for _ in range(4):
        assert agent._complete(said).text == "42"
        said += [Message("assistant", "42"), Message("user", "And now?")]
    assert agent.left_out == 4
    taken = [[body for body in one.asked if len(body["messages"]) <= 4] for one in (server, second)]
    assert sorted(map(len, taken)) == [0, 4], "where it began"
    assert not any("out of service" in note for note in notes)


def test_log_likelihoods_of_several(server: Server, second: Server) -> None:
    columns = {"tokens": ["a", " b"], "token_logprobs": [None, -1.0], "top_logprobs": [None, {" b": -1.0}]}
    server.always = raw(json.dumps({"choices": [{"text": "a b", "logprobs": columns}]}).encode())
    second.always = status(500)
    asked = [LoglikelihoodRequest(str(i), "a", " b") for i in range(20)]
    assert [answer.logprob for answer in engine(server, second).loglikelihood(asked)] == [-1.0] * 20
    second.always, server.always = good(), status(500)
    with pytest.raises(UserError, match=f"{second.url} gives no log-probabilities"):
        list(engine(server, second).loglikelihood(asked))


def test_each_endpoint_has_a_line_under_the_bar(server: Server) -> None:
    it = engine(server, GONE)
    drawn(it, 10)
    screen = io.StringIO()
    with RunProgress(Console(file=screen, force_terminal=True, width=160), "toy", total=9, below=it.health):
        time.sleep(0.2)
    lines = screen.getvalue()
    assert f"{server.url}  up, 0 under way, 10 answered, 0 retried" in lines
    assert "down, tried again in" in lines


def test_the_command_takes_several(cli: Cli, server: Server, second: Server) -> None:
    server.always = second.always = summing()
    base = ("--engine", "openai", "--api-model", "m", "--api", "completions")
    code, out, err = cli.run(*base, "--endpoint", server.url, "--endpoint", second.url, "--json")
    assert code == 0, err
    assert 0 < json.loads(out)[0]["metrics"]["right"]["value"] < 1
    assert f"note: {second.url}: {len(second.asked)} answered, 0 retried\n" in err
    assert len(server.asked) + len(second.asked) == 20
    code, again, err = cli.run(*base, "--endpoint", second.url + "/", "--endpoint", server.url, "--json")
    assert (code, again) == (0, out)
    assert "complete already" in err
    assert "answered" not in err
    named = ("--served-as", f"{server.url} {second.url}")
    assert cli.run(*base, "--endpoint", "http://127.0.0.1:9/v1", *named, "--json")[:2] == (0, out)
    assert len(server.asked) + len(second.asked) == 20, "one run"


def test_both_dead_is_one_line_of_the_command(cli: Cli) -> None:
    base = ("--engine", "openai", "--api-model", "m", "--retries", "0")
    line = cli.error("run", *base, "--endpoint", GONE, "--endpoint", "http://127.0.0.1:10/v1")
    assert line.startswith(f"{GIVE_UP_AFTER} requests in a row failed for good; {GONE}: ConnectError")


# --- models that are served for real ----------------------------------------------------------------------


@contextmanager
def served(log: Path) -> Iterator[tuple[str, int]]:
    """A bundled model behind `plt-eval serve`: its address and its process group."""
    command = [PLT_EVAL, "serve", "--model", "plt-tiny:r2", "--engine", "transformers", "--port", "0"]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert process.stdout is not None
    try:
        told = process.stdout.readline()
        found = re.search(r"http://\S+/v1", told)
        assert found, log.read_text()
        yield found[0], process.pid
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_killing_one_of_two_served_models_loses_no_sample_and_changes_no_score(tmp_path: Path) -> None:
    pytest.importorskip("transformers.cli.serving", reason="needs transformers' server")
    command = [
        PLT_EVAL,
        "run",
        "--suite",
        "trace",
        "--limit",
        "100",
        "--engine",
        "openai",
        "--api-model",
        "plt-tiny:r2",
    ]
    command += [
        "--api",
        "completions",
        "--retries",
        "0",
        "--concurrency",
        "2",
        "--json",
        "--results",
        tmp_path / "runs",
    ]
    with served(tmp_path / "one.log") as (one, _), served(tmp_path / "other.log") as (other, group):
        alone = subprocess.run([*command, "--run-id", "alone", "--endpoint", one], capture_output=True, text=True)
        assert alone.returncode == 0, alone.stderr
        both = [*command, "--run-id", "both", "--endpoint", one, "--endpoint", other]
        process = subprocess.Popen(both, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        journal = tmp_path / "runs" / "both" / COMPLETIONS
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= 20):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.killpg(group, signal.SIGKILL)
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"{other} is down" in err
    assert f"note: {other}: 0 answered" not in err, "it had its part"
    told, expected = json.loads(out)[0], json.loads(alone.stdout)[0]
    assert (told["metrics"], told["missing"]) == (expected["metrics"], 0)
    texts = [{r.key: r.text for r in found.completions()} for found in list_runs(tmp_path / "runs")]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 100
