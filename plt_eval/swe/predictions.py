"""Patches from files, in the official forms, and the data's own; and the patches of a run, written as the official
commands read them.

    {"instance_id": "...", "model_name_or_path": "...", "model_patch": "diff ..."}   swebench: a line, a list, or by id
    {"org": "...", "repo": "...", "number": 1, "fix_patch": "diff ..."}              Multi-SWE-bench: a line
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_benchmarks.swe.rows import Task
from plt_eval.engines.base import Completion, GenerationRequest, Loglikelihood, LoglikelihoodRequest
from plt_eval.errors import UserError
from plt_eval.journal import write_atomically

FILE_NAME = "predictions.jsonl"


@dataclass(frozen=True)
class Prediction:
    """One patch and the name of the model that it is from."""

    model: str
    patch: str


class PredictionsEngine:
    """Gives patches by instance id. `origin` is the file they are from, or "gold": it names the run, so that a file
    that was edited goes on in the same run, where the patches that changed are judged again."""

    name = "predictions"

    def __init__(self, predictions: Mapping[str, Prediction], origin: str) -> None:
        self._predictions = dict(predictions)
        self._origin = origin

    @classmethod
    def gold(cls, tasks: Iterable[Task]) -> PredictionsEngine:
        """The data's own patches."""
        return cls({task.id: Prediction("gold", task.gold) for task in tasks}, "gold")

    @classmethod
    def from_file(cls, path: Path, known: Collection[str]) -> PredictionsEngine:
        """Read a file of predictions for some of the instances `known`. Raises UserError."""
        found = read_predictions(path)
        unknown = [instance for instance in found if instance not in known]
        if unknown:
            raise UserError(
                f"--predictions {path}: {len(unknown)} of {len(found)} instances are not in the data, "
                f"first {unknown[0]!r}"
            )
        if not found:
            raise UserError(f"--predictions {path}: expected predictions, found none")
        return cls(found, str(path.resolve()))

    @property
    def instances(self) -> Collection[str]:
        """Ids of the instances that have a patch."""
        return self._predictions.keys()

    def identity(self) -> dict[str, Any]:
        models = sorted({prediction.model for prediction in self._predictions.values()})
        origin = hashlib.sha256(self._origin.encode()).hexdigest()[:16]
        return {"model": "+".join(models), "predictions": Path(self._origin).name, "origin_sha256": origin}

    def facts(self) -> dict[str, str]:
        """Nothing is computed."""
        return {}

    def current(self, key: tuple[str, int], text: str) -> bool:
        """Whether `text` is still the patch of that instance."""
        prediction = self._predictions.get(key[0])
        return prediction is not None and prediction.patch == text

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Completion]:
        """Raises UserError for an instance without a patch."""
        for request in requests:
            instance = request.id.rpartition("#")[0]
            if instance not in self._predictions:
                raise UserError(f"{self._origin}: no prediction for {instance}")
            prediction = self._predictions[instance]
            detail = {"model": prediction.model}
            yield Completion(request.id, prediction.patch, "stop", solution=True, detail=detail)

    def loglikelihood(self, requests: Iterable[LoglikelihoodRequest]) -> Iterator[Loglikelihood]:  # noqa: ARG002
        """Patches have no likelihoods: raises UserError."""
        raise UserError("--predictions has patches only")

    def close(self) -> None:
        """Nothing is held."""


def read_predictions(path: Path) -> dict[str, Prediction]:
    """By instance id, from .json (a list, or an object by id) or .jsonl. Raises UserError naming the record."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--predictions {path}: {getattr(error, 'strerror', None) or error}") from error
    found: dict[str, Prediction] = {}
    for place, record in _records(path, text):
        instance, prediction = _prediction(place, record)
        if instance in found:
            raise UserError(f"{place}: instance {instance} is there for the second time")
        found[instance] = prediction
    return found


def _records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".json":
        try:
            value = json.loads(text)
        except ValueError as error:
            raise UserError(f"--predictions {path}: broken JSON: {error}") from error
        if not isinstance(value, dict | list):
            raise UserError(f"--predictions {path}: expected a list or an object by instance id")
        if isinstance(value, list):
            yield from ((f"{path}, record {number}", record) for number, record in enumerate(value, 1))
            return
        for instance, record in value.items():
            yield f"{path}, {instance}", {"instance_id": instance, **record} if isinstance(record, dict) else record
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: broken line, not JSON: {error}") from error


def _prediction(place: str, record: Any) -> tuple[str, Prediction]:
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected an object, found {type(record).__name__}")
    if "fix_patch" in record:
        for key in ("org", "repo", "number"):
            if key not in record:
                raise UserError(f"{place}: expected the key {key!r} beside fix_patch")
        instance, patch = f"{record['org']}__{record['repo']}-{record['number']}", record["fix_patch"]
        model = record.get("model_name_or_path", "predictions")
    else:
        for key in ("instance_id", "model_patch"):
            if key not in record:
                raise UserError(f"{place}: expected the key {key!r}, found {', '.join(map(repr, record)) or 'none'}")
        instance, patch = record["instance_id"], record["model_patch"]
        model = record.get("model_name_or_path", "predictions")
    patch = "" if patch is None else patch
    for key, value in (("instance_id", instance), ("the patch", patch), ("model_name_or_path", model)):
        if not isinstance(value, str):
            raise UserError(f"{place}: expected {key} to be text, found {type(value).__name__}")
    return instance, Prediction(model, patch)


def write_predictions(folder: Path, model: str, patches: Mapping[str, str], tasks: Mapping[str, Task]) -> Path:
    """The official command's input for the patches of a run, as predictions.jsonl in its folder."""
    lines = []
    for instance, patch in patches.items():
        task = tasks[instance]
        if task.harness == "multi-swe-bench":
            record = {name: task.row[name] for name in ("org", "repo", "number")} | {"fix_patch": patch}
        else:
            record = {"instance_id": instance, "model_name_or_path": model, "model_patch": patch}
        lines.append(json.dumps(record) + "\n")
    path = folder / FILE_NAME
    write_atomically(path, "".join(lines))
    return path
