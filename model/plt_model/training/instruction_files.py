"""Instruction data from files: prompts and answers, or conversations, each record checked.

    for record in read_instructions([Path("train.jsonl"), Path("more.parquet")]):
        record.id                      # "train.jsonl:17", for messages

A file is .jsonl, .jsonl.gz or .parquet. Each record of it is one of

    {"messages": [{"role": "system" | "user" | "assistant", "content": "..."}, ...]}
    {"prompt": "...", "completion": "..."}
    {"prompt": [messages], "completion": [messages]}

with the field names that TRL and OpenAI's fine-tuning use; a file may mix them, and other fields (an id, a source) are
passed over. A message's `"weight": 0`, as OpenAI has it, takes an assistant's turn out of the loss. What this training
cannot honour (tools, reasoning fields, images) is refused, never dropped.
"""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

_ROLES = ("system", "user", "assistant")
_UNSUPPORTED = ("tools", "functions", "documents", "images", "chat_template_kwargs")
_UNSUPPORTED_IN_MESSAGE = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking")
_EXPECTED = '"messages", or "prompt" and "completion"'
_JSON_NAMES = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    dict: "an object",
}
_ROWS = 1024


class InstructionError(ValueError):
    """Instruction data, or a tokenizer for them, that cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class Turn:
    """One message. `learn`: the answer is to be learnt (assistant's turns only)."""

    role: Role
    content: str
    learn: bool


@dataclass(frozen=True)
class Conversation:
    """Turns in order; `id` is "file:line" (in a parquet file the row), counted from 1."""

    id: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class PromptCompletion:
    """Plain text and how it goes on; `id` as in Conversation."""

    id: str
    prompt: str
    completion: str


Instruction = Conversation | PromptCompletion


def read_instructions(paths: Iterable[Path]) -> Iterator[Instruction]:
    """Every record of the files, in order, one at a time. Raises InstructionError at the first that is not sound, with
    its file and line, what was found and what was expected."""
    for path in paths:
        for number, row in _rows(path):
            yield parse_instruction(row, f"{path}:{number}")


def check_instructions(paths: Iterable[Path]) -> int:
    """How many records the files hold, all of them sound. Raises InstructionError, also when there is none."""
    files = list(paths)
    count = sum(1 for _ in read_instructions(files))
    if count == 0:
        raise InstructionError(f"{', '.join(map(str, files)) or 'no file'}: expected records, found none")
    return count


def parse_instruction(row: object, place: str) -> Instruction:
    """One record; `place` becomes its id and begins every message. Raises InstructionError."""
    if not isinstance(row, dict):
        raise InstructionError(f"{place}: expected an object with {_EXPECTED}, found {_found(row)}")
    fields = {name: value for name, value in row.items() if value is not None}
    _refuse(fields, _UNSUPPORTED, place)
    if "messages" in fields and "completion" in fields:
        raise InstructionError(f'{place}: expected {_EXPECTED}, found both "messages" and "completion"')
    if "messages" in fields:
        return _conversation(place, _turns(fields["messages"], f"{place}: messages"))
    if "prompt" not in fields or "completion" not in fields:
        names = ", ".join(json.dumps(name) for name in sorted(fields)) or "no field"
        raise InstructionError(f"{place}: expected {_EXPECTED}, found {_short(names)}")
    return _prompt_completion(fields["prompt"], fields["completion"], place)


# --- records ------------------------------------------------------------------------------------------


def _prompt_completion(prompt: object, completion: object, place: str) -> Instruction:
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = _turns(prompt, f"{place}: prompt")
        answered = _turns(completion, f"{place}: completion")
        if not any(turn.role == "assistant" for turn in answered):
            raise InstructionError(f"{place}: completion: expected an assistant's message, found none")
        return _conversation(place, [*(Turn(turn.role, turn.content, False) for turn in asked), *answered])
    if isinstance(prompt, str) and isinstance(completion, str):
        return PromptCompletion(place, _text(prompt, f"{place}: prompt"), _text(completion, f"{place}: completion"))
    raise InstructionError(
        f"{place}: expected prompt and completion to be two strings or two lists of messages, "
        f"found {_found(prompt)} and {_found(completion)}"
    )


def _conversation(place: str, turns: list[Turn]) -> Conversation:
    if not any(turn.role == "assistant" for turn in turns):
        raise InstructionError(f"{place}: expected an assistant's message, found none among {len(turns)}")
    return Conversation(place, tuple(turns))


def _turns(messages: object, where: str) -> list[Turn]:
    if not isinstance(messages, list) or not messages:
        raise InstructionError(f"{where}: expected a list of messages, found {_found(messages)}")
    return [_turn(message, f"{where}[{i}]") for i, message in enumerate(messages)]


def _turn(message: object, where: str) -> Turn:
    if not isinstance(message, dict):
        raise InstructionError(f'{where}: expected an object with "role" and "content", found {_found(message)}')
    fields = {name: value for name, value in message.items() if value is not None}
    _refuse(fields, _UNSUPPORTED_IN_MESSAGE, where)
    role = fields.get("role")
    if role not in _ROLES:
        expected = ", ".join(json.dumps(name) for name in _ROLES)
        raise InstructionError(f"{where}.role: expected one of {expected}, found {_found(role)}")
    weight = fields.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise InstructionError(f"{where}.weight: expected 0 or 1, found {_found(weight)}")
    content = _text(fields.get("content"), f"{where}.content")
    return Turn(role, content, role == "assistant" and weight == 1)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise InstructionError(f"{where}: expected a string, found {_found(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"half a surrogate pair (\\u{ord(value[error.start]):04x}) at character {error.start}"
        raise InstructionError(f"{where}: expected Unicode text, found {found}") from None
    return value


def _refuse(fields: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    for name in names:
        if fields.get(name):
            raise InstructionError(
                f'{where}: "{name}" is not supported; expected text only, found {_found(fields[name])}'
            )


def _found(value: object) -> str:
    """A value in a few words, as JSON names it."""
    if isinstance(value, list):
        return "an empty list" if not value else f"a list of {len(value)}"
    kind = _JSON_NAMES.get(type(value), type(value).__name__)
    return f"{kind} {_short(json.dumps(value))}" if isinstance(value, (bool, int, float, str)) else kind


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


# --- files --------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[int, object]]:
    """Each row with its number from 1; blank lines count but are passed over."""
    if not path.is_file():
        raise InstructionError(f"{path}: expected a file ({', '.join(SUFFIXES)}), found {_kind(path)}")
    if not path.name.endswith(SUFFIXES):
        raise InstructionError(f"{path}: expected a file whose name ends in {' or '.join(SUFFIXES)}")
    return _parquet_rows(path) if path.name.endswith(".parquet") else _json_rows(path)


def _kind(path: Path) -> str:
    return "a folder" if path.is_dir() else "nothing there"


def _json_rows(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InstructionError(f"{path}:{number}: expected a JSON object, found broken JSON ({error})") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise InstructionError(f"{path}: cannot be read after line {number} ({error})") from None


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InstructionError(f"{path}: needs pyarrow, which is not installed: pip install pyarrow") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of these
        why = " ".join(str(error).split())
        raise InstructionError(f"{path}: expected a parquet file, cannot be read after row {number} ({why})") from None
