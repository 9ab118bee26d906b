"""Where the assistant's answers stand in a conversation that a chat template has rendered, for any template.

    tokenizer = with_chat_template(tokenizer, None)         # the tokenizer's own template, or CHAT_TEMPLATE
    text, spans = ChatAnswers(tokenizer).find(turns, wanted=[1, 3])

A template that puts `{% generation %}` around the assistant's turns says where they are. With any other, what comes
before a turn and the turn itself are rendered alone; both must be how the whole conversation begins. A template that
fits neither way is refused: a loss on the wrong tokens is worse than none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from .instruction_files import InstructionError, Turn

Span = tuple[int, int]

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] + '\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""For tokenizers that bring none: roles in plain text, so that it needs no token of its own, and the end-of-text token
at the end of each assistant's turn."""

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "the-answer-would-stand-here"
_ADD_MARKERS = "put {% generation %} and {% endgeneration %} around the assistant's turns in it"
_NO_END = "no token ends an assistant's turn, so that a model would never stop"
_RENDER_ERRORS = (TemplateError, ValueError, TypeError, LookupError, AttributeError)


def with_chat_template(tokenizer: Any, template: str | None) -> Any:
    """The tokenizer itself, now with a chat template that its `save_pretrained` saves: `template` (Jinja text), or when
    None its own, or when it has none CHAT_TEMPLATE. Raises InstructionError, and leaves the tokenizer as it was, when
    the template cannot render a question and its answer so that the answer is found again."""
    kept = tokenizer.chat_template
    tokenizer.chat_template = template if template is not None else (kept or CHAT_TEMPLATE)
    turns = (Turn("user", "a question", False), Turn("assistant", "an answer", True))
    try:
        ChatAnswers(tokenizer).find(turns, wanted=(1,))
    except InstructionError:
        tokenizer.chat_template = kept
        raise
    return tokenizer


def check_eos(tokenizer: Any) -> None:
    """Raises InstructionError for a tokenizer without an end-of-text token."""
    if tokenizer.eos_token is None:
        raise InstructionError("the tokenizer has no end-of-text token, so that no answer could end; set its eos_token")


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Matches the text of any token that the tokenizer takes out of a text whole (blank ones apart)."""
    names = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    longest_first = sorted((name for name in names if name.strip()), key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


class ChatAnswers:
    """Finds answers with the chat template that `tokenizer` has now. Raises InstructionError when it has none."""

    def __init__(self, tokenizer: Any) -> None:
        check_eos(tokenizer)
        try:
            self._template: str = tokenizer.get_chat_template()
        except ValueError:
            raise InstructionError("the tokenizer has no chat template, and there are conversations") from None
        self._marked = _MARKER.search(self._template) is not None
        self._names = dict(tokenizer.special_tokens_map)
        self._special = special_tokens(tokenizer)

    def find(self, turns: Sequence[Turn], wanted: Sequence[int]) -> tuple[str, list[Span]]:
        """The rendered conversation, and of each turn in `wanted` (indices of assistant's turns, ascending) the
        characters (begin, end) of its content and of what ends it. Raises InstructionError."""
        text, marked = self._render(turns)
        if self._marked:
            return text, self._marked_spans(text, turns, marked, wanted)
        return text, [self._rendered_span(text, turns, i) for i in wanted]

    def _render(self, turns: Sequence[Turn], *, prompt: bool = False) -> tuple[str, list[Span]]:
        """The text, as the tokenizer's apply_chat_template renders it, and where its generation markers are. (That
        function gives the markers as a mask of tokens only, which leaves out the last bytes of a character in pieces.)
        """
        try:
            (text,), spans = render_jinja_template(
                conversations=[[{"role": turn.role, "content": turn.content} for turn in turns]],
                chat_template=self._template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=self._marked,
                **self._names,
            )
        except _RENDER_ERRORS as error:
            why = " ".join(str(error).split())[:200]
            raise InstructionError(f"the chat template cannot render this conversation ({why})") from None
        return text, list(spans[0]) if self._marked else []

    def _marked_spans(
        self, text: str, turns: Sequence[Turn], marked: Sequence[Span], wanted: Sequence[int]
    ) -> list[Span]:
        """The spans that the template's own markers give, checked against the turns."""
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if len(marked) != len(answers):
            raise _unusable(f"it marks {len(marked)} answers of {len(answers)}", "mark each assistant's turn once")
        spans = dict(zip(answers, marked, strict=True))
        return [self._checked(text, spans[i], turns[i].content) for i in wanted]

    def _checked(self, text: str, span: Span, content: str) -> Span:
        """The span, drawn out over the token that ends the turn where the template marks the content alone."""
        begin, end = span
        answer = text[begin:end]
        # The last line is what templates keep for certain: some trim the ends, some drop the reasoning in front.
        if content.strip().rpartition("\n")[2] not in answer:
            raise _unusable("its generation markers are not around the answer", "use none inside a macro")
        if not content.strip().endswith(answer.strip()):
            return span
        closing = self._special.match(text, end)
        if closing is None:
            raise _unusable(_NO_END, "end it with eos_token, within the markers")
        return begin, closing.end()

    def _rendered_span(self, text: str, turns: Sequence[Turn], i: int) -> Span:
        """Turn i from renderings of what comes before it, of all up to it, and of a probe in its place."""
        before, _ = self._render(turns[:i], prompt=True)
        through, _ = self._render(turns[: i + 1])
        probe, _ = self._render([*turns[:i], Turn("assistant", _PROBE, True)])
        _, found, tail = probe.rpartition(_PROBE)
        if not (text.startswith(through) and through.startswith(before)):
            raise _unusable("a conversation's beginning is not rendered as the whole conversation begins", _ADD_MARKERS)
        begin, end = len(before), len(through) - len(tail)
        if not found or not through.endswith(tail) or end <= begin:
            raise _unusable("it drops or changes the assistant's turn", _ADD_MARKERS)
        closing = self._special.search(tail)
        if closing is None and not tail.strip():
            raise _unusable(_NO_END, "end it with eos_token")
        return begin, end + (len(tail.rstrip()) if closing is None else closing.end())


def _unusable(why: str, remedy: str) -> InstructionError:
    return InstructionError(f"the chat template is unusable for masking: {why}; {remedy}")
