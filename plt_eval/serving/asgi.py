"""What stands around both servers: their answers say how many loops the model runs."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from plt_eval.engines.endpoints import LOOPS_HEADER

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

LOOPS_VARIABLE = "PLT_EVAL_SERVED_LOOPS"
"""Environment variable of a server process that holds the loop count."""


class LoopsTold:
    """An ASGI application around another one, whose answers get the header."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.header = (LOOPS_HEADER.lower().encode(), os.environ[LOOPS_VARIABLE].encode())

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), self.header]}
            await send(message)

        await self.app(scope, receive, told if scope["type"] == "http" else send)
