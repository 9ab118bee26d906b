"""Answers with log-probabilities, in OpenAI's words for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

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


def chat_answer(asked: Asked, new: list[int], scores: list[TokenScore] | None, prompts: Prompts) -> dict[str, Any]:
    """A chat completion."""
    text, reason = _text(asked, new, prompts)
    content = [] if scores is None else _content(scores, asked.top or 0, prompts.tokenizer)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": reason,
        "logprobs": {"content": content},
    }
    return {"object": "chat.completion", "choices": [choice], "usage": _usage(asked, new)}


def chat_chunk(answer: dict[str, Any]) -> dict[str, Any]:
    """The whole chat completion as the one piece of a stream."""
    (choice,) = answer["choices"]
    delta = {"delta": choice["message"]} | {key: value for key, value in choice.items() if key != "message"}
    return answer | {"object": "chat.completion.chunk", "choices": [delta]}


def _text(asked: Asked, new: list[int], prompts: Prompts) -> tuple[str, str]:
    done = prompts.completion(asked.job, new, ended=len(new) < asked.job.limit, seconds=0.0)
    return done.text, done.finish_reason


def _usage(asked: Asked, new: list[int]) -> dict[str, int]:
    prompt = len(asked.job.ids)
    return {"prompt_tokens": prompt, "completion_tokens": len(new), "total_tokens": prompt + len(new)}


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
    """What each token adds to the text: a character of several tokens comes with the last of them."""
    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer.backend_tokenizer, token) or "" for token in ids]


def _word(token: int, tokenizer: Any) -> str:
    return str(tokenizer.decode([token]))
