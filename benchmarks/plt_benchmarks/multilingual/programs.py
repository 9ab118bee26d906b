"""From an answer to a program: where the function ends, what a chat model's code block needs around it, and the tests
that follow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from plt_benchmarks.multilingual.languages import Language
from plt_benchmarks.protocols import Answer

_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_CLASSES = ("java", "cs", "scala")
"""Languages whose functions live in a class Problem."""
_MAINS = {
    "cpp": r"^[ \t]*(?:int|void|auto)\s+main\s*\(",
    "rs": r"^[ \t]*(?:pub\s+)?fn\s+main\s*\(",
    "go": r"^func\s+main\s*\(",
    "d": r"^[ \t]*(?:int|void)\s+main\s*\(",
    "java": r"^[ \t]*(?:public\s+)?static\s+void\s+main\s*\(",
    "cs": r"^[ \t]*(?:public\s+)?static\s+(?:void|int)\s+Main\s*\(",
    "scala": r"^[ \t]*def\s+main\s*\(",
}
"""Where a main function of the answer's own begins: the tests bring theirs."""
_EXPORT = re.compile(
    r"^export\s+(?:default\s+)?(?=(?:async\s+)?function|(?:abstract\s+)?class|const|let|var|type|interface|enum)"
    r"|^(?:export\s+(?:default\s+\w+|\{[^}]*\})|module\.exports\s*=\s*(?:\w+|\{[^}]*\}))[ \t]*;?[ \t]*$",
    re.MULTILINE,
)
"""Exports: the tests follow in the same file, which is no module."""
_LITERAL = re.compile(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'|//[^\n]*|/\*.*?\*/', re.DOTALL)


def program(language: Language, row: Mapping[str, Any], answer: Answer) -> tuple[str, str]:
    """The solution and the tests, which are a program together. A base model's answer continues the prompt up to the
    first of the row's stop tokens; a chat model's holds the whole function."""
    if answer.solution:
        return answer.text, row["tests"]
    if not answer.chat:
        return row["prompt"] + until_stop(answer.text, row["stop_tokens"]), row["tests"]
    return _whole(language, row, code_block(answer.text, row["name"])), _without_closing(row["tests"])


def text_of(solution: str, tests: str) -> str:
    """The program, as the official evaluation puts it together."""
    return f"{solution}\n{tests}"


def with_impossible_test(language: Language, tests: str) -> str:
    """The tests, and after the last of them one that no program passes. The row was checked to have a test."""
    *_, last = re.finditer(language.test, tests, re.MULTILINE)
    return f"{tests[: last.end()]}\n{language.impossible}{tests[last.end() :]}"


def until_stop(text: str, stops: list[str]) -> str:
    """`text` up to the first of the stop tokens."""
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]


def code_block(text: str, name: str) -> str:
    """The first fenced block of an answer that speaks of the problem's function, else the first one, else all of it.
    Thoughts before the answer do not count."""
    said = text.rpartition("</think>")[2]
    blocks = [match[1] for match in _FENCED.finditer(said)]
    wanted = entry(name)
    return next((block for block in blocks if wanted in _plain(block)), blocks[0] if blocks else said)


def entry(name: str) -> str:
    """The function's name in lower case without separators, which languages write in their own ways:
    HumanEval_0_has_close_elements -> hascloseelements."""
    return _plain(re.sub(r"^[A-Za-z]+_\d+_", "", name))


def _plain(text: str) -> str:
    return re.sub(r"[_-]", "", text).lower()


# --- what a whole function needs around it --------------------------------------------------------------


def header(language: Language, prompt: str) -> str:
    """What stands in a prompt above the documented function."""
    found = re.search(language.body, prompt, re.MULTILINE)
    return prompt[: found.start()] if found else ""


def _whole(language: Language, row: Mapping[str, Any], code: str) -> str:
    above = header(language, row["prompt"])
    if language.key in _MAINS:
        code = _without_block(code, _MAINS[language.key])
    if language.key in _CLASSES:
        return _in_class(language, above, code, entry(row["name"]))
    if language.key == "go":
        return _go(above, code)
    if language.key == "php":
        return above + re.sub(r"<\?php|\?>", "", code)
    if language.key == "rkt":
        return above + re.sub(r"^#lang .*", "", code, flags=re.MULTILINE)
    if language.key in ("js", "ts"):
        return _EXPORT.sub("", code)
    if language.key == "cpp" and re.search(r"^(?:union|struct)\s", code, re.MULTILINE):
        above = "".join(re.findall(r"^#include.*\n", above, re.MULTILINE))  # the answer repeats the prompt's types
    return above + code


def _in_class(language: Language, above: str, code: str, wanted: str) -> str:
    """The functions of the answer in a class Problem that its tests will close; imports and other classes before it."""
    imports = re.findall(r"^[ \t]*(?:import|using)\s[^({\n]*$", code, re.MULTILINE)
    for line in imports:
        code = code.replace(line, "", 1)
    functions, others = code, ""
    # Possessive: an answer may be a hundred thousand spaces.
    begins = r"^[ \t]*+(?:\w++[ \t]++)*?(?:class|object)\s++\w++[^{;\n]*+\s*+\{"
    for found in re.finditer(begins, code, re.MULTILINE):
        end = _end_of_block(code, found.end() - 1)
        if wanted in _plain(code[found.end() : end]):
            functions, others = code[found.end() : end - 1], code[: found.start()] + code[end:]
            break
    opened = "object Problem {" if language.key == "scala" else "class Problem {"
    return "\n".join([above.rstrip("\n"), *imports, others.strip("\n"), opened, functions.rstrip()])


def _go(above: str, code: str) -> str:
    """The answer's imports, but for those that the prompt has, after the prompt's."""
    code = re.sub(r"^package\s+\w+", "", code, flags=re.MULTILINE)
    imports: list[str] = []
    for pattern in (r"^import\s*\(([^)]*)\)", r"^import\s+([^(\n]+)$"):
        for group in re.findall(pattern, code, re.MULTILINE):
            imports += [line.strip() for line in re.split(r"[\n;]", group) if line.strip()]
        code = re.sub(pattern, "", code, flags=re.MULTILINE)
    new = [line for line in dict.fromkeys(imports) if line not in above]
    return above + "".join(f"import {line}\n" for line in new) + code


def _without_closing(tests: str) -> str:
    """Tests of some languages begin with the end of the function, which a whole function has itself."""
    return tests.replace("}", "", 1) if tests.lstrip().startswith("}") else tests


def _without_block(code: str, pattern: str) -> str:
    found = re.search(pattern, code, re.MULTILINE)
    brace = code.find("{", found.end()) if found else -1
    if found is None or brace < 0:
        return code
    return code[: found.start()] + code[_end_of_block(code, brace) :]


def _end_of_block(code: str, brace: int) -> int:
    """Where the block that opens at `brace` has ended; the end of the text if it does not end."""
    blank = _LITERAL.sub(lambda match: " " * len(match[0]), code)
    depth = 0
    for at in range(brace, len(blank)):
        depth += {"{": 1, "}": -1}.get(blank[at], 0)
        if depth == 0:
            return at + 1
    return len(code)
