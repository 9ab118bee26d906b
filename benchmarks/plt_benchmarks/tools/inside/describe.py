"""The problems, and what the official package asks a model for each: run in the package's environment."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

from .official import conversation, data_folder, open_package

PREFIX = "BFCL_v3"


class BadData(Exception):
    """The data is not in the official form; the message is one line for the user."""


def main() -> None:
    """Read {"data", "mode", "categories"} from standard input; write {"samples", "sha256"} or {"error"}."""
    request = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    open_package()
    try:
        told = _told(request)
    except BadData as bad:
        told = {"error": str(bad)}
    json.dump(told, out)
    out.close()


def _told(request: dict[str, Any]) -> dict[str, Any]:
    folder = Path(request["data"]) if request["data"] else data_folder()
    digest = hashlib.sha256()
    samples = []
    for category in request["categories"]:
        path = folder / f"{PREFIX}_{category}.json"
        entries = _rows(path, digest)
        answers = {} if "relevance" in category else {
            row["id"]: row for row in _rows(folder / "possible_answer" / path.name, digest)
        }  # fmt: skip
        samples += [_sample(path, category, entry, answers, request["mode"]) for entry in _complete(path, entries)]
    return {"samples": samples, "sha256": digest.hexdigest()}


def _rows(path: Path, digest: Any) -> list[dict[str, Any]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadData(f"data {path}: cannot be read, {error.strerror}") from None
    digest.update(content)
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadData(f"{place}: expected a JSON object, found broken JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("id"), str):
            raise BadData(f"{place}: expected an object with a string 'id'")
        rows.append(row)
    sort_key = import_module("bfcl_eval.utils").sort_key
    try:
        rows.sort(key=sort_key)
    except (IndexError, ValueError):
        raise BadData(f"{path}: expected ids like simple_0, found others") from None
    return rows


def _complete(path: Path, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the functions of multi-turn problems, which are kept in files of their own."""
    for entry in entries:
        wanted = ("initial_config", "involved_classes") if "multi_turn" in entry["id"] else ("function",)
        for key in ("question", *wanted):
            if key not in entry:
                raise BadData(f"{path}: {entry['id']} has no {key!r}")
    generation: Any = import_module("bfcl_eval._llm_response_generation")
    own = path.parent / "multi_turn_func_doc"
    if own.is_dir():
        generation.MULTI_TURN_FUNC_DOC_PATH = own
    try:
        done: list[dict[str, Any]] = generation.process_multi_turn_test_case(entries)
    except (KeyError, OSError) as error:
        raise BadData(f"{path}: a class without functions ({error})") from None
    return done


def _sample(
    path: Path, category: str, entry: dict[str, Any], answers: dict[str, dict[str, Any]], mode: str
) -> dict[str, Any]:
    if entry["id"].rsplit("_", 1)[0] != category:
        raise BadData(f"{path}: expected ids like {category}_0, found {entry['id']}")
    if "relevance" not in category and "ground_truth" not in answers.get(entry["id"], {}):
        raise BadData(f"{path.parent / 'possible_answer' / path.name}: {entry['id']} has no ground_truth")
    question = conversation(deepcopy(entry), mode, ())
    if "done" in question:
        raise BadData(f"{path}: the official package makes no prompt of {entry['id']}: {question['done']}")
    gold = answers[entry["id"]]["ground_truth"] if answers else None
    if gold is not None and not _is_gold(gold, category):
        wanted = "a list of turns" if "multi_turn" in category else "a list of calls"
        where = path.parent / "possible_answer" / path.name
        raise BadData(f"{where}: {entry['id']}: expected ground_truth to be {wanted}, found {str(gold)[:80]}")
    return {"id": entry["id"], "category": category, "entry": entry, "answer": gold, **question}


def _is_gold(gold: Any, category: str) -> bool:
    if not isinstance(gold, list):
        return False
    if "multi_turn" in category:
        return all(isinstance(turn, list) for turn in gold)
    return all(isinstance(call, dict) and all(isinstance(given, dict) for given in call.values()) for call in gold)
