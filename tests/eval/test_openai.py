"""The openai engine against a real local server that misbehaves when told to."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections import Counter
from email.utils import formatdate
from typing import Any

import pytest
from bad_server import Reply, Server, cut_short, drop, good, hang, raw, send, status

from plt_benchmarks.protocols import Message, Prompt
from plt_eval.engines import openai
from plt_eval.engines.base import Completion, Decoding, GenerationRequest, LoglikelihoodRequest
from plt_eval.engines.openai import GIVE_UP_AFTER, OpenAIEngine, derived_seed
from plt_eval.errors import UserError


def engine(server: Server, **options: Any) -> OpenAIEngine:
    defaults: dict[str, Any] = {"api": "completions", "retries": 2, "backoff_s": 0.01, "timeout_s": 5.0}
    return OpenAIEngine(endpoint=server.url, model="m", **(defaults | options))


def requests(count: int, prompt: Prompt | None = None, **decoding: Any) -> list[GenerationRequest]:
    prompt = prompt or Prompt("What is 6 x 7? ", max_new_tokens=9)
    return [GenerationRequest(f"q/{i}#0", prompt, Decoding(**decoding)) for i in range(count)]


def one(it: OpenAIEngine, prompt: Prompt | None = None, **decoding: Any) -> Completion:
    (completion,) = it.generate(requests(1, prompt, **decoding))
    return completion


# --- what is asked ------------------------------------------------------------------------------------


def test_a_text_completion(server: Server) -> None:
    completion = one(engine(server, api_key="sk-secret"))
    assert (completion.request_id, completion.text, completion.finish_reason) == ("q/0#0", "42", "stop")
    assert (completion.prompt_tokens, completion.completion_tokens, completion.chat) == (5, 2, False)
    assert completion.seconds is not None
    assert server.paths == ["/v1/completions"]
    assert server.asked == [{"model": "m", "prompt": "What is 6 x 7? ", "max_tokens": 9, "temperature": 0.0}]
    assert server.headers_seen[0]["Authorization"] == "Bearer sk-secret"


def test_a_chat_completion_sends_messages_and_no_prefill(server: Server) -> None:
    turns = (Message("system", "Be brief."), Message("user", "6 x 7?"))
    prompt = Prompt("text form", messages=turns, prefill="```python\n", chat_stop=("\n```",), stop=("\nclass",))
    server.plan = [good("Sure:\n```python\n42\n```\nDone.")]
    completion = one(engine(server, api="chat"), prompt)
    assert completion.chat
    assert completion.text == "Sure:\n```python\n42\n```\nDone.", "the stops of a prefilled answer do not apply"
    assert server.paths == ["/v1/chat/completions"]
    assert server.asked[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "6 x 7?"},
    ]
    assert "stop" not in server.asked[0]


def test_a_prompt_without_messages_is_one_user_turn(server: Server) -> None:
    server.plan = [good("a STOP b")]
    completion = one(engine(server, api="chat"), Prompt("hello", chat_stop=(" STOP",)))
    assert server.asked[0]["messages"] == [{"role": "user", "content": "hello"}]
    assert server.asked[0]["stop"] == [" STOP"]
    assert completion.text == "a"


def test_four_stops_are_sent_and_all_are_kept(server: Server) -> None:
    stops = ("<1>", "<2>", "<3>", "<4>", "<5>", "<6>")
    server.plan = [good("good <6> bad <5> worse", reason="length")]
    completion = one(engine(server), Prompt("x", stop=stops))
    assert server.asked[0]["stop"] == list(stops[:4])
    assert (completion.text, completion.finish_reason) == ("good ", "stop")


def test_sampling_sends_a_seed_of_its_own_for_every_request(server: Server) -> None:
    it = engine(server, concurrency=3)
    list(it.generate(requests(5, temperature=0.7, top_p=0.9, seed=11, max_new_tokens=33)))
    assert {body["seed"] for body in server.asked} == {derived_seed(11, f"q/{i}#0") for i in range(5)}
    assert len({body["seed"] for body in server.asked}) == 5
    assert {(b["top_p"], b["temperature"], b["max_tokens"]) for b in server.asked} == {(0.9, 0.7, 33)}
    assert all(0 <= derived_seed(s, "x") < 2**31 for s in range(100))


def test_length_and_empty_answers(server: Server) -> None:
    server.plan = [good("4", reason="length"), good(reason="length", text=None)]  # type: ignore[arg-type]
    assert one(engine(server)).finish_reason == "length"
    assert one(engine(server, api="chat")).text == "", "thinking used up every token"


def test_as_many_requests_at_a_time_as_asked_for(server: Server) -> None:
    server.always = good(slow_s=0.3)
    completions = list(engine(server, concurrency=4).generate(requests(12)))
    assert {c.request_id for c in completions} == {f"q/{i}#0" for i in range(12)}
    assert server.most_under_way == 4


def test_completions_come_as_they_arrive(server: Server) -> None:
    server.plan = [good("slow", slow_s=1.0)]
    order = [c.text for c in engine(server, concurrency=2).generate(requests(6))]
    assert order[-1] == "slow"


# --- trouble ------------------------------------------------------------------------------------------

TROUBLE: dict[str, Reply] = {
    "500": status(500),
    "503": status(503),
    "429": status(429),
    "nested-500": lambda handler, _: send(handler, 500, b"[" * 200_000),
    "no-such-charset": lambda handler, _: send(handler, 500, b"zz", Content_Type="text/plain; charset=hex"),
    "no-date": status(503, Retry_After="Mon, 01 Jan 99999999999999999999 00:00:00 GMT"),
    "surrogate-message": status(500, "\ud800"),
    "aborted": good("def half(", reason="abort"),
    "failed": good("def half(", reason="error"),
    "not-said-to-have-ended": good("def half(", reason=None),
    "nested": raw(b"[" * 200_000),
    "compressed": lambda handler, _: send(handler, 200, gzip.compress(b" " * 1_000_000), Content_Encoding="gzip"),
    "garbage": raw(b"<html>busy</html>"),
    "truncated": raw(b'{"choices": [{"text": "4'),
    "not-utf8": raw(b'{"choices": [{"text": "\xff"}]}'),
    "no-choices": raw(b'{"error": {"message": "overloaded"}}'),
    "empty-choices": raw(b'{"choices": []}'),
    "null-text": raw(b'{"choices": [{"text": null}]}'),
    "list": raw(b"[1]"),
    "null": raw(b"null"),
    "strange-choice": raw(b'{"choices": ["x"]}'),
    "dropped": drop,
    "cut-short": cut_short,
}


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_that_passes_is_retried(server: Server, name: str) -> None:
    server.plan = [TROUBLE[name], TROUBLE[name]]
    notes: list[str] = []
    completion = one(engine(server, notify=notes.append))
    assert (completion.text, completion.error) == ("42", None)
    assert len(server.asked) == 3
    assert len(notes) == 1, "each kind of trouble is told once"


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_that_stays_is_that_completions_error(server: Server, name: str) -> None:
    server.always = TROUBLE[name]
    completion = one(engine(server))
    assert (completion.text, completion.finish_reason) == ("", "error")
    assert completion.error is not None
    assert completion.error.endswith("(after 3 tries)")
    assert "\n" not in completion.error
    assert completion.error.encode(), "it can be told and stored"
    assert len(server.asked) == 3


@pytest.mark.parametrize("reason", ["stop", "eos_token", "tool_calls", "length", "model_length", "repetition"])
def test_what_servers_call_an_end(server: Server, reason: str) -> None:
    server.plan = [good(reason=reason)]
    completion = one(engine(server, retries=0))
    assert completion.text == "42"
    assert completion.finish_reason == ("length" if reason in ("length", "model_length", "repetition") else "stop")


def test_what_utf_8_cannot_hold_is_neither_sent_nor_read(server: Server) -> None:
    """JSON can write half a surrogate pair, and then the next request would hold it."""
    function = {"name": "f\ud800", "arguments": "{}\udc00"}
    message = {"content": "a\ud800b", "tool_calls": [{"id": "\ud800", "function": function}]}
    server.plan = [raw(json.dumps({"choices": [{"message": message, "finish_reason": "tool_calls"}]}).encode())]
    completion = one(engine(server, api="chat"), Prompt("say \ud800 or \U0001f600"))
    assert server.asked[0]["messages"][0]["content"] == "say \ufffd or \U0001f600"
    assert completion.text == "a\ufffdb"
    assert completion.detail["tool_calls"] == [{"id": "\ufffd", "name": "f\ufffd", "arguments": "{}\ufffd"}]


def test_an_answer_without_end_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "MOST_BYTES", 1 << 20)
    sent = 0

    def endless(handler: Any, _: dict[str, Any]) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.send_header("Content-Length", str(1 << 40))
        handler.end_headers()
        while True:
            sent += handler.wfile.write(b" " * (1 << 16))

    server.plan = [endless]
    notes: list[str] = []
    assert one(engine(server, notify=notes.append)).text == "42"
    assert notes == [f"{server.url}: ReadError: an answer of more than 1 MiB; trying again"]
    assert sent < 64 << 20


def test_an_answer_that_trickles_is_given_up_in_time(server: Server) -> None:
    def trickle(handler: Any, _: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(1000):
            handler.wfile.write(b" ")
            time.sleep(0.02)

    server.plan = [trickle]
    notes: list[str] = []
    began = time.monotonic()
    assert one(engine(server, timeout_s=1.0, notify=notes.append)).text == "42"
    assert 1 <= time.monotonic() - began < 10
    assert notes == [f"{server.url}: ReadTimeout: no whole answer in 1 s; trying again"]


def test_a_server_that_hangs_is_given_up(server: Server) -> None:
    server.plan = [hang]
    began = time.monotonic()
    assert one(engine(server, timeout_s=0.3)).text == "42"
    assert 0.3 <= time.monotonic() - began < 5


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    it = OpenAIEngine(endpoint=f"http://127.0.0.1:{port}/v1", model="m", retries=1, backoff_s=0.01)
    error = one(it).error
    assert error is not None
    assert "ConnectError" in error


def test_waits_grow_and_vary(server: Server) -> None:
    server.always = status(500)
    one(engine(server, retries=3, backoff_s=0.1))
    waits = [later - sooner for sooner, later in zip(server.times, server.times[1:], strict=False)]
    for number, wait in enumerate(waits):
        assert 0.05 * 2**number <= wait < 0.1 * 2**number + 5


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(server: Server, form: str) -> None:
    it = engine(server)
    when = "1" if form == "seconds" else formatdate(time.time() + 3, usegmt=True)
    server.plan = [status(429, Retry_After=when)]
    assert one(it).text == "42"
    assert 0.9 <= server.times[1] - server.times[0] < 5


def test_retry_after_is_bounded_and_nonsense_is_ignored(server: Server) -> None:
    server.plan = [status(429, Retry_After="86400"), status(503, Retry_After="soon")]
    assert one(engine(server, max_wait_s=0.2)).text == "42"
    assert server.times[1] - server.times[0] < 5


@pytest.mark.parametrize("code", [400, 401, 403, 404, 422, 301])
def test_refusals_end_the_run_at_once(server: Server, code: int) -> None:
    server.always = status(code, "no model named m\nhere")
    with pytest.raises(UserError) as caught:
        list(engine(server, concurrency=1).generate(requests(50)))
    assert str(caught.value) == f"{server.url}/completions refused: HTTP {code}: no model named m here"
    assert len(server.asked) == 1


def test_a_model_without_a_chat_template_is_asked_otherwise(server: Server) -> None:
    server.always = status(400, "you must provide a chat template")
    with pytest.raises(UserError) as caught:
        one(engine(server, api="chat"))
    assert str(caught.value).endswith("you must provide a chat template; --api completions asks without one")


def test_an_endpoint_that_stays_down_ends_the_run(server: Server) -> None:
    server.always = status(500)
    got = []
    with pytest.raises(UserError, match=rf"{GIVE_UP_AFTER} requests in a row failed for good, .*HTTP 500"):
        got.extend(engine(server, retries=0, concurrency=1).generate(requests(100)))
    assert len(server.asked) == GIVE_UP_AFTER


def test_one_success_starts_the_count_again(server: Server) -> None:
    bad = [status(500)] * (GIVE_UP_AFTER - 1)
    server.plan = [*bad, good(), *bad]
    completions = list(engine(server, retries=0, concurrency=1).generate(requests(2 * GIVE_UP_AFTER)))
    assert Counter(c.finish_reason for c in completions) == {"error": 2 * GIVE_UP_AFTER - 2, "stop": 2}


def test_closing_does_not_wait_for_requests_under_way(server: Server) -> None:
    server.always = hang
    server.plan = [good()]
    it = engine(server, concurrency=4, timeout_s=60.0)
    stream = it.generate(requests(8))
    assert next(stream).text == "42"
    began = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    it.close()
    assert time.monotonic() - began < 2


# --- addresses and keys ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "endpoint", ["localhost:8000", "ftp://x/v1", "", "http://", "http://h:port/v1", "http://h:99999"]
)
def test_addresses_that_are_none(endpoint: str) -> None:
    with pytest.raises(UserError, match="--endpoint"):
        OpenAIEngine(endpoint=endpoint, model="m")


@pytest.mark.parametrize("endpoint", ["http://me:secret@h/v1", "http://h/v1?api-key=secret"])
def test_addresses_with_secrets_are_refused_without_repeating_them(endpoint: str) -> None:
    with pytest.raises(UserError, match="--api-key-env") as caught:
        OpenAIEngine(endpoint=endpoint, model="m")
    assert "secret" not in str(caught.value)


def test_the_key_is_nowhere_to_be_seen(server: Server) -> None:
    it = engine(server, api_key=" sk-secret\n", retries=0)
    assert "secret" not in json.dumps(it.identity())
    server.plan = [status(500, "wrong key sk-secret"), status(401, "wrong key sk-secret")]
    assert one(it).error == "HTTP 500: wrong key *** (after 1 tries)"
    with pytest.raises(UserError) as caught:
        one(it)
    assert "secret" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        engine(server, api_key="sk-secret\nX: y")
    assert "secret" not in str(caught.value)


def test_identity(server: Server) -> None:
    it = OpenAIEngine(endpoint=server.url + "/", model="org/m", api="chat")
    assert it.identity() == {"model": "org/m", "endpoint": server.url, "api": "chat"}


# --- log-likelihoods ------------------------------------------------------------------------------------


def echo(tokens: list[tuple[str, float | None, dict[str, float] | None]]) -> Reply:
    text, values, top = zip(*tokens, strict=True)
    logprobs = {"tokens": text, "token_logprobs": values, "top_logprobs": top, "text_offset": []}
    body = json.dumps({"choices": [{"text": "".join(text), "logprobs": logprobs}]}).encode()
    return raw(body)


ECHOED: list[tuple[str, float | None, dict[str, float] | None]] = [
    ("<s>", None, None),
    ("a b", -1.0, {"x": -0.5}),
    (" c", -0.25, {" c": -0.25}),
    (" d", -0.5, {" d": -0.5}),
    ("generated", -9.0, {"generated": -9.0}),
]


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("a b", " c d", (-0.75, 2, True)),
        ("a", " b c d", (-1.75, 3, False)),  # "a b" straddles: it counts
        ("a b c", " d", (-0.5, 1, True)),
    ],
)
def test_log_likelihoods(server: Server, context: str, continuation: str, expected: tuple[float, int, bool]) -> None:
    server.plan = [echo(ECHOED)]
    (answer,) = engine(server).loglikelihood([LoglikelihoodRequest("q", context, continuation)])
    assert (answer.logprob, answer.tokens, answer.greedy) == expected
    assert server.asked[0]["prompt"] == "a b c d"
    assert server.asked[0]["echo"] is True


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (good(), "gives no log-probabilities of a prompt"),
        (echo([("other text", -1.0, {"x": -1.0})]), "did not echo the prompt of q"),
        (status(500), "no log-likelihood for q: HTTP 500"),
    ],
    ids=["no-logprobs", "no-echo", "down"],
)
def test_servers_without_log_likelihoods(server: Server, reply: Reply, message: str) -> None:
    server.always = reply
    with pytest.raises(UserError, match=message):
        list(engine(server).loglikelihood([LoglikelihoodRequest("q", "a b", " c d")]))


def test_chat_has_no_log_likelihoods(server: Server) -> None:
    with pytest.raises(UserError, match="--api completions"):
        list(engine(server, api="chat").loglikelihood([LoglikelihoodRequest("q", "a", "b")]))
