"""transformers' own server (`transformers serve`) with one of our models in it:

    python -m plt_eval.serving.transformers_server SETTINGS [OPTIONS OF TRANSFORMERS SERVE]

SETTINGS is a JSON object, see Settings. transformers loads models by their names in its own package and calls their
generate(); here it is given the model as our engine loads it, any loop count included, and a generate() that hands its
work to a Writer. Threads of its own wait for that, so that requests are decoded side by side.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from inspect import signature
from typing import Any

import jinja2
import torch
from transformers import PreTrainedTokenizerBase
from transformers.cli.serving import model_manager, server, utils

from plt_eval.engines.hf import HFEngine
from plt_eval.errors import UserError
from plt_eval.serving.answers import held_back
from plt_eval.serving.asgi import LOOPS_VARIABLE, LoopsTold
from plt_eval.serving.asked import Asked, BadRequest, Reader
from plt_eval.serving.front import ASKED, Front
from plt_eval.serving.settings import KEY_VARIABLE, Settings
from plt_eval.serving.writer import Writer

NOT_THEIRS = frozenset(signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"documents", "kwargs"}
"""What a template is used with, which is no variable of it: a request that could set these would bring a template."""


def main(arguments: list[str]) -> None:
    """Serve until a signal comes. What the user has to mend is told in one line, with exit code 2."""
    try:
        _serve(Settings(**json.loads(arguments[0])), arguments[1:])
    except UserError as error:
        _notify(f"plt-eval: error: {error}")
        sys.exit(2)


def _serve(settings: Settings, rest: list[str]) -> None:
    engine = HFEngine(
        settings.model,
        loops=settings.loops,
        dtype=settings.dtype,
        device=settings.device,
        tokenizer=settings.tokenizer,
        label=settings.name,
        notify=_notify,
    )
    if settings.chat_template is not None:
        _use_template(engine.tokenizer, settings.chat_template)
    context = _context(engine, settings.max_model_len)
    writer = Writer(engine, context)
    writer.warm_up()
    _notify(f"decoder: {writer.about}; attention: {engine.facts()['attention']}")
    _teach(engine, writer, Reader(settings.name, context, _tokens(engine), _templated(engine)))

    from transformers.cli.transformers import main as transformers_command

    sys.argv = ["transformers", "serve", settings.name, *rest]
    transformers_command()


def _context(engine: HFEngine, asked: int | None) -> int | None:
    """Raises UserError for more than the model has."""
    if asked is not None and engine.context is not None and asked > engine.context:
        raise UserError(f"--max-model-len {asked}: {engine.folder} has a context of {engine.context} tokens")
    return engine.context if asked is None else asked


def _use_template(tokenizer: Any, template: str) -> None:
    """Raises UserError for one that is no Jinja."""
    tokenizer.chat_template = template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except jinja2.TemplateSyntaxError as wrong:
        raise UserError(f"--chat-template: line {wrong.lineno}: {wrong.message}") from wrong
    except Exception:
        pass


def _notify(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# --- prompts --------------------------------------------------------------------------------------------


def _tokens(engine: HFEngine) -> Callable[[str], list[int]]:
    return lambda text: engine.prompts.tokens(text) or [engine.prompts.first_id]


def _templated(engine: HFEngine) -> Callable[..., list[int]]:
    def ids(
        messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: Mapping[str, Any]
    ) -> list[int]:
        if taken := sorted(NOT_THEIRS & options.keys()):
            words = f"chat_template_kwargs: {taken[0]} is not for a request to set"
            raise BadRequest(words, param="chat_template_kwargs")
        if engine.tokenizer.chat_template is None:
            raise BadRequest("the model has no chat template: ask /v1/completions, or serve it with --chat-template")
        text = engine.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False, **options
        )
        return engine.prompts.tokens(text, add_special_tokens=False)

    return ids


# --- what transformers' server is taught ----------------------------------------------------------------


def _teach(engine: HFEngine, writer: Writer, reader: Reader) -> None:
    """Puts our model, our threads and our front into the places where `transformers serve` looks for its own."""

    class Models(model_manager.ModelManager):
        """Knows one model, which is loaded."""

        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id

        def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
            return engine.model, engine.tokenizer

    class Manager(Threads):
        """Its texts end before a stop string, and do so for that reason though it was the last token's."""

        def generate_streaming(
            self, model: Any, processor: Any, inputs: Any, config: Any, **options: Any
        ) -> tuple[Any, Any]:
            pieces, streamer = super().generate_streaming(model, processor, inputs, config, **options)
            return CutQueue(pieces, ASKED.get().job.stops, lambda: _unlimited(config)), streamer

        async def generate_non_streaming(
            self, model: Any, processor: Any, inputs: Any, config: Any, **options: Any
        ) -> tuple[str, int, Any]:
            _, prompt, ids = await super().generate_non_streaming(model, processor, inputs, config, **options)
            job = ASKED.get().job
            done = engine.prompts.completion(job, ids.tolist(), ended=len(ids) < job.limit, seconds=0.0)
            if done.finish_reason == "stop":
                _unlimited(config)
            return done.text, prompt, ids

    build, template = server.build_server, utils.get_response_template(engine.tokenizer, engine.model)

    def fronted(*arguments: Any, **options: Any) -> Any:
        app = build(*arguments, **options)
        app.add_middleware(Front, reader=reader, writer=writer, key=os.environ.get(KEY_VARIABLE), template=template)
        if os.environ.get(LOOPS_VARIABLE):
            app.add_middleware(LoopsTold)
        return app

    engine.model.generate = lambda **given: generate(writer, given["input_ids"], given.get("streamer"))
    model_manager.ModelManager = Models
    utils.GenerateManager = Manager
    utils.DirectStreamer = Streamer
    # Messages come to it as asked.py has read them, and what it hands out is text: calls are read by answers.py.
    utils.BaseHandler.get_processor_inputs_from_messages = staticmethod(lambda messages, _: messages)
    utils.get_response_template = lambda *_: None
    server.build_server = fronted


def generate(writer: Writer, input_ids: torch.Tensor, streamer: Any) -> torch.Tensor:
    """transformers' `model.generate` for the request of this thread: prompt and new tokens [1, S]; a streamer gets
    them one by one."""
    asked = ASKED.get()
    told = None
    if streamer is not None:
        streamer.put(input_ids)
        told = lambda token: _tell(streamer, asked, token)  # noqa: E731
    new = writer.write(asked, told)
    if streamer is not None:
        streamer.say(held_back("".join(streamer.said), new, writer.engine.tokenizer, skip_special_tokens=True))
        streamer.end()
    return torch.cat([input_ids, torch.tensor([new], dtype=input_ids.dtype, device=input_ids.device)], dim=1)


def _tell(streamer: Any, asked: Asked, token: int) -> None:
    try:
        streamer.put(torch.tensor([token]))
    except utils._GenerationCancelled:
        asked.gone.set()


class Streamer(utils.DirectStreamer):
    """Knows what it has said."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        if text:
            self._enqueue(text)

    def _enqueue(self, item: Any) -> None:
        if isinstance(item, str):
            self.said.append(item)
        super()._enqueue(item)


def _unlimited(config: Any) -> None:
    """By its limit alone transformers' server tells how a text ended. The configuration is this request's own."""
    config.max_new_tokens = None


class Threads(utils.GenerateManager):
    """A thread for each request under way, where transformers has one for all; each knows whose it is."""

    def __init__(self) -> None:
        pass  # no thread yet

    def submit(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                result = work(*arguments, **options)
            except Exception as failure:
                future.set_exception(failure)
            else:
                future.set_result(result)

        threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
        return future

    def async_submit(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> asyncio.Future[Any]:
        return asyncio.wrap_future(self.submit(work, *arguments, **options))


class CutQueue:
    """The pieces of a text as they come, until a stop string: what may be the beginning of one waits. `found` is
    called where there is one. Raises RuntimeError where the text broke off."""

    def __init__(
        self, pieces: asyncio.Queue[Any], stops: tuple[str, ...], found: Callable[[], Any] = lambda: None
    ) -> None:
        self.pieces, self.stops, self.found = pieces, stops, found
        self.held, self.over, self.ready = "", False, list[Any]()

    async def get(self) -> Any:
        while not self.ready:
            self._take(await self.pieces.get())
        piece = self.ready.pop(0)
        if isinstance(piece, utils._StreamError):
            raise RuntimeError(piece.msg or "the text broke off")
        return piece

    def get_nowait(self) -> Any:
        """Raises asyncio.QueueEmpty; so it does before an error, that what came earlier is sent."""
        while not self.ready:
            self._take(self.pieces.get_nowait())
        if isinstance(self.ready[0], utils._StreamError):
            raise asyncio.QueueEmpty
        return self.ready.pop(0)

    def _take(self, piece: Any) -> None:
        if not isinstance(piece, str):  # the end, or an error
            self.ready += [self.held, piece] if self.held else [piece]
            self.held = ""
        elif not self.over:
            self.held += piece
            cut = min((at for at in map(self.held.find, self.stops) if at >= 0), default=None)
            if cut is not None:
                self.over = True
                self.found()
            keep = 0 if self.over else max((_overlap(self.held, stop) for stop in self.stops), default=0)
            text = self.held[: len(self.held) - keep if cut is None else cut]
            self.held = self.held[len(self.held) - keep :] if keep else ""
            if text:
                self.ready.append(text)


def _overlap(text: str, stop: str) -> int:
    """How much of the text's end is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


if __name__ == "__main__":
    main(sys.argv[1:])
