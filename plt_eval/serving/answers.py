"""Answers with log-probabilities or calls of tools, in OpenAI's words for them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from plt_eval.engines.base import first_stop
from plt_eval.engines.hf_prompts import Prompts
from plt_eval.serving.asked import Asked
from plt_eval.serving.writer import TokenScore


def completion_answer(
    asked: Asked, new: list[int], scores: list[TokenScore] | None, prompts: Prompts
) -> dict[str, Any]:
    """A text completion. With echo its text begins with the prompt's, and its log-probabilities with the prompt's
    tokens."""
    text, reason = _text(asked, new, prompts)
    choice = {
        "index": 0,
        "text": (asked.echo or "") + text,
        "finish_reason": reason,
        "logprobs": None if scores is None else _columns(scores, asked.top or 0, prompts.tokenizer),
    }
    return {"object": "text_completion", "choices": [choice], "usage": _usage(asked, new)}


def chat_answer(
    asked: Asked,
    new: list[int],
    scores: list[TokenScore] | None,
    prompts: Prompts,
    template: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A chat completion; by the response `template` calls of tools are read. A text that its limit has cut may end in
    half a call: it is told as it is."""
    text, reason = _text(asked, new, prompts)
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if asked.tools and reason != "length":
        said, calls = _calls(_raw(asked, new, prompts.tokenizer), asked.tools, template, prompts.tokenizer)
        if calls:
            message, reason = message | {"content": said or None, "tool_calls": calls}, "tool_calls"
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": reason,
        "logprobs": None if scores is None else {"content": _content(scores, asked.top or 0, prompts.tokenizer)},
    }
    return {"object": "chat.completion", "choices": [choice], "usage": _usage(asked, new)}


def chat_chunk(answer: dict[str, Any]) -> dict[str, Any]:
    """The whole chat completion as the one piece of a stream."""
    (choice,) = answer["choices"]
    delta = dict(choice["message"])
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": i} | call for i, call in enumerate(delta["tool_calls"])]
    piece = {"delta": delta} | {key: value for key, value in choice.items() if key != "message"}
    return answer | {"object": "chat.completion.chunk", "choices": [piece]}


def _text(asked: Asked, new: list[int], prompts: Prompts) -> tuple[str, str]:
    done = prompts.completion(asked.job, new, ended=len(new) < asked.job.limit, seconds=0.0)
    return done.text, done.finish_reason


def _usage(asked: Asked, new: list[int]) -> dict[str, int]:
    prompt = len(asked.job.ids)
    return {"prompt_tokens": prompt, "completion_tokens": len(new), "total_tokens": prompt + len(new)}


def _raw(asked: Asked, new: list[int], tokenizer: Any) -> str:
    """The text with its special tokens, which some models write calls by, cut before the first stop string."""
    text = str(tokenizer.decode(new, skip_special_tokens=False))
    return text[: first_stop(text, asked.job.stops)]


def _calls(
    text: str, tools: list[dict[str, Any]], template: Mapping[str, Any] | None, tokenizer: Any
) -> tuple[str, list[dict[str, Any]]]:
    """What the text says besides its calls, and these: none where one of them cannot be read. Thoughts are a part of
    the text, as our engines have it."""
    fields = (template or {}).get("fields", {})
    if "tool_calls" not in fields:
        return text, []
    rest = {"content": "text", "content_args": {"strip": False}, "repeats": True, "join": ""}
    try:
        known = {"tool_calls": fields["tool_calls"], "content": rest}
        reduced = {**(template or {}), "defaults": {}, "fields": known}
        told = tokenizer.parse_response(text, reduced, prefix="", tools=tools)
        calls = [_call(call["function"]) for call in told.get("tool_calls") or ()]
    except Exception:  # the template is by the model's makers, the text by the model
        return text, []
    said = str(told.get("content", ""))
    for special in tokenizer.all_special_tokens:
        said = said.replace(special, "")
    return said, calls


def _call(function: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for what is no call, and what a look into that may raise."""
    name, arguments = function["name"], function["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("no call")
    told = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": told}


def _columns(scores: Sequence[TokenScore], top: int, tokenizer: Any) -> dict[str, Any]:
    tokens = _pieces([row.token for row in scores], tokenizer)
    offsets = [0]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [row.logprob for row in scores],
        "top_logprobs": [
            None if row.logprob is None else {_word(token, tokenizer): value for token, value in row.top[: max(top, 1)]}
            for row in scores
        ],
        "text_offset": offsets[:-1],
    }


def _content(scores: Sequence[TokenScore], top: int, tokenizer: Any) -> list[dict[str, Any]]:
    tokens = _pieces([row.token for row in scores], tokenizer)
    return [
        _entry(token, row.logprob or 0.0)
        | {"top_logprobs": [_entry(_word(other, tokenizer), value) for other, value in row.top[:top]]}
        for token, row in zip(tokens, scores, strict=True)
    ]


def _entry(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode("utf-8", "replace"))}


def _pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text: a character of several tokens comes with the last of them, and so does the
    beginning of one that the text ends in."""
    stream = DecodeStream(skip_special_tokens=False)
    pieces = [stream.step(tokenizer.backend_tokenizer, token) or "" for token in ids]
    if pieces:
        pieces[-1] += held_back("".join(pieces), ids, tokenizer, skip_special_tokens=False)
    return pieces


def held_back(said: str, ids: Sequence[int], tokenizer: Any, *, skip_special_tokens: bool) -> str:
    """What a DecodeStream that has `said` so much of the tokens' text still waits with."""
    whole = str(tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))
    return whole.removeprefix(said) if whole.startswith(said) else ""


def _word(token: int, tokenizer: Any) -> str:
    return str(tokenizer.decode([token]))
