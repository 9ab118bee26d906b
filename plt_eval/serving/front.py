"""What stands before transformers' server: keys, the rules of asked.py, log-probabilities, tools, clients that go away.

An ASGI application around another one. What it hands on are checked requests for text; all else it answers itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import sys
import time
import traceback
import uuid
from collections.abc import Mapping, MutableMapping
from contextvars import ContextVar
from typing import Any

from plt_eval.errors import one_line
from plt_eval.serving.answers import chat_answer, chat_chunk, completion_answer
from plt_eval.serving.asgi import App, Message, Receive, Send
from plt_eval.serving.asked import Asked, BadRequest, Reader
from plt_eval.serving.writer import Writer

MAX_BODY = 32 * 2**20
"""Bytes that a request may have."""

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

ASKED: ContextVar[Asked] = ContextVar("asked")
"""The request that this task, and every thread that works for it, is about."""


class Front:
    """Serves `app` to those who have the `key` (None: to all). By the response `template` it reads calls of tools."""

    def __init__(
        self,
        app: App,
        *,
        reader: Reader,
        writer: Writer,
        key: str | None,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        self.app, self.reader, self.writer, self.key, self.template = app, reader, writer, key, template
        self.started = int(time.time())

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        if scope["path"] == "/health":
            await _send_json(send, 200, {"status": "ok", "running": self.writer.running})
            return
        try:
            self._check_key(scope)
            if scope["path"] == "/v1/models" and scope["method"] == "GET":
                await _send_json(send, 200, self._models())
                return
            if scope["path"] not in (CHAT, COMPLETIONS) or scope["method"] != "POST":
                raise BadRequest(f"{scope['method']} {scope['path']}: no such service here", status=404)
            _check_kind(scope)
            asked = self._read(scope["path"], await _body(receive))
        except BadRequest as refused:
            await _send_json(send, refused.status, refused.body())
            return
        await self._answer(asked, scope, receive, send)

    def _check_key(self, scope: MutableMapping[str, Any]) -> None:
        if self.key is None:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self.key.encode()):
            raise BadRequest("the API key is missing or wrong", status=401, code="invalid_api_key")

    def _models(self) -> dict[str, Any]:
        card = {"id": self.reader.model, "object": "model", "created": self.started, "owned_by": "plt-eval"}
        return {"object": "list", "data": [card | {"max_model_len": self.reader.context}]}

    def _read(self, path: str, body: bytes) -> Asked:
        try:
            value = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is no JSON: {error}") from error
        return self.reader.chat(value) if path == CHAT else self.reader.completion(value)

    async def _answer(self, asked: Asked, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Let the answer be made while the client is there."""
        gone = asyncio.ensure_future(_until_gone(receive))
        work = asyncio.ensure_future(self._work(asked, scope, gone, send))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                asked.gone.set()
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
        finally:
            asked.gone.set()
            gone.cancel()

    async def _work(
        self, asked: Asked, scope: MutableMapping[str, Any], gone: asyncio.Future[None], send: Send
    ) -> None:
        """Makes the answer. What goes wrong is told in OpenAI's form, in a stream after what has been sent of it."""
        reply = _Reply(send, asked.stream)
        try:
            await self._make(asked, scope, gone, reply)
            await reply.end()
        except Exception as failure:
            traceback.print_exception(failure, file=sys.stderr)
            await reply.fail(failure)

    async def _make(
        self, asked: Asked, scope: MutableMapping[str, Any], gone: asyncio.Future[None], send: Send
    ) -> None:
        if asked.top is not None or asked.echo is not None or asked.tools:
            await self._own_answer(asked, send)
            return
        ASKED.set(asked)
        body = json.dumps(asked.body).encode()
        length = (b"content-length", str(len(body)).encode())
        headers = [pair for pair in scope["headers"] if pair[0] != b"content-length"] + [length]
        await self.app({**scope, "headers": headers}, _replay(body, gone), send)

    async def _own_answer(self, asked: Asked, send: Send) -> None:
        new = await asyncio.to_thread(self.writer.write, asked)
        prompt, top = asked.job.ids, asked.top
        first = 0 if asked.echo is not None else len(prompt)
        scores = (
            None
            if top is None
            else await asyncio.to_thread(self.writer.score, prompt + new, first=first, top=max(top, 1))
        )
        prompts = self.writer.engine.prompts
        if asked.job.chat:
            answer = chat_answer(asked, new, scores, prompts, self.template)
        else:
            answer = completion_answer(asked, new, scores, prompts)
        answer |= {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.reader.model}
        if not asked.stream:
            await _send_json(send, 200, answer)
            return
        chunk = chat_chunk(answer) if asked.job.chat else answer
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", EVENTS)]})
        await send({"type": "http.response.body", "body": _event(chunk)})


# --- ASGI -----------------------------------------------------------------------------------------------

EVENTS, DONE = b"text/event-stream", b"data: [DONE]\n\n"


def _check_kind(scope: MutableMapping[str, Any]) -> None:
    """A web page may send anything else to any address in its reader's reach, unasked. Raises BadRequest."""
    kind = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise BadRequest(f"Content-Type: expected application/json, found {kind.decode('latin-1')!r}", status=415)


async def _body(receive: Receive) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("the request was cut short")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            raise BadRequest(f"the body has more than {MAX_BODY} bytes", status=413)
        if not message.get("more_body"):
            return b"".join(parts)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _replay(body: bytes, gone: asyncio.Future[None]) -> Receive:
    """The body in one piece; after that the client's leaving, when it comes."""
    waiting = [body]

    async def receive() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        await asyncio.shield(gone)
        return {"type": "http.disconnect"}

    return receive


class _Reply:
    """Sends an answer on. A stream ends here, not where its maker ends it: an error may follow that. Its last line is
    the one by which many clients know the end."""

    def __init__(self, send: Send, stream: bool) -> None:
        self.send, self.stream = send, stream
        self.began = self.events = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.began = True
            self.events = self.stream and any(value.startswith(EVENTS) for _, value in message["headers"])
        elif self.events:
            message = {**message, "more_body": True}
        await self.send(message)

    async def end(self) -> None:
        if self.events:
            await self.send({"type": "http.response.body", "body": DONE})

    async def fail(self, failure: Exception) -> None:
        words = one_line(f"{type(failure).__name__}: {failure}")
        told = {"error": {"message": words, "type": "server_error", "param": None, "code": None}}
        if not self.began:
            await _send_json(self.send, 500, told)
        elif self.events:
            await self({"type": "http.response.body", "body": _event(told)})
            await self.end()


def _event(value: Any) -> bytes:
    return b"data: " + _json(value) + b"\n\n"


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


async def _send_json(send: Send, status: int, value: Any) -> None:
    body = _json(value)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
