"""lm-eval's tasks by name: what a name stands for, what is not run here and why, and the tasks themselves.

All that can be said of a task is said before its data is asked for, and before a model is loaded.
"""

from __future__ import annotations

import contextlib
import difflib
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from plt_benchmarks.hub import switched_off
from plt_eval.errors import UserError, one_line
from plt_eval.lm_harness.answers import Kind, request_keys
from plt_eval.lm_harness.official import need_lm_eval

OWN = {"humaneval": "humaneval", "mbpp": "mbpp", "cruxeval": "cruxeval"}
"""Beginning of a task's name -> the suite of ours that asks the same."""
FILE_READERS = ("json", "csv", "text", "parquet", "arrow", "pandas", "xml", "webdataset")
"""What stands for a data set in a task that reads files of its own."""
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""lm-eval's own defaults."""
PROBE_S = 3.0
"""How long the hub may take to answer at all, in seconds."""


@dataclass
class Chosen:
    """What one name stands for, loaded. `parts`: every task and group in it -> the groups between the name and it, and
    itself; the name's own task or group has none."""

    name: str
    loaded: dict[str, Any]
    parts: dict[str, tuple[str, ...]]

    @property
    def tasks(self) -> dict[str, Any]:
        """The tasks, by name, in lm-eval's order."""
        return dict(self.loaded["tasks"])


@dataclass(frozen=True)
class Asked:
    """One request, and the names under which its answers are kept: one for each time it is asked."""

    task: str
    doc_id: int
    kind: Kind
    arguments: tuple[Any, ...]
    keys: tuple[str, ...]


@dataclass
class Requests:
    """Everything that one evaluation asks, in lm-eval's order."""

    asked: list[Asked] = field(default_factory=list)

    @property
    def keys(self) -> set[str]:
        """The answers that it needs."""
        return {key for one in self.asked for key in one.keys}


@cache
def _manager(include_path: str | None) -> Any:
    """lm-eval's index, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


class Catalogue:
    """lm-eval's tasks, and those of the folder `include_path`. Raises UserError without lm-eval."""

    def __init__(self, include_path: Path | None = None) -> None:
        need_lm_eval("--suite lm-eval")
        with quiet():
            self._manager = _manager(None if include_path is None else str(include_path.resolve()))
        self._include_path = include_path

    def check(self, names: Sequence[str]) -> None:
        """Raises UserError for a name that is none, and for tasks that cannot or must not be run here."""
        for name in names:
            if name not in self._manager.task_index:
                raise UserError(f"--suite lm-eval:{name}: {self._unknown(name)}")
        for name in names:
            found = list(self._configs(name))
            for task, config in found:
                refuse_unsafe(name, task, unsafe=bool(config.get("unsafe_code")))
            self._check_data(name, found)

    def load(self, name: str) -> Chosen:
        """The tasks behind `name`, with their data. Raises UserError."""
        seed_all()
        try:
            with quiet():
                loaded = self._manager.load([name])
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"lm-eval:{name} cannot be loaded: {told(error)}") from error
        for task in loaded["tasks"].values():
            refuse_unsafe(name, task.task_name, unsafe=bool(getattr(task, "UNSAFE_CODE", False)))
            if getattr(task, "MULTIMODAL", False):
                raise UserError(f"lm-eval:{name}: task {task.task_name} shows images or plays sounds to the model")
        return Chosen(name, dict(loaded), _parts(name, loaded))

    # --- names ----------------------------------------------------------------------------------------

    def _unknown(self, name: str) -> str:
        known = self._manager.all_tasks
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        near += [other for other in known if other.startswith(name) and other not in near][: 3 - len(near)]
        where = "lm-eval" if self._include_path is None else f"lm-eval, nor of {self._include_path}"
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `plt-eval lm-eval ls tasks` lists them"
        return f"no such task, group or tag of {where}{hint}"

    def _configs(self, name: str, given: Mapping[str, Any] | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(task, its configuration) of all that `name` stands for."""
        entry = self._manager.task_index.get(name)
        if entry is None:
            yield name, dict(given or {})
            return
        config = {**(entry.cfg or {}), **(given or {})}
        members = config.get("task") if entry.kind.name == "GROUP" else None
        if entry.kind.name == "TAG":
            for task in sorted(entry.tags):
                yield from self._configs(task, given)
        elif members is None:
            yield name, config
        for member in members if isinstance(members, list) else ():
            yield from self._member(member)

    def _member(self, member: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if isinstance(member, str):
            yield from self._configs(member)
        elif "group" in member and member["group"] not in self._manager.task_index:
            for inner in member.get("task") or ():
                yield from self._member(inner)
        else:
            name = member.get("group") or member.get("task")
            yield from self._configs(
                name, {key: value for key, value in member.items() if key not in ("group", "task")}
            )

    # --- data -----------------------------------------------------------------------------------------

    def _check_data(self, name: str, found: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Raises UserError where data has to come from the hub, and the hub is out of reach."""
        sources: dict[str, str] = {}
        for task, config in found:
            if (source := hub_source(config)) is not None:
                sources.setdefault(source, task)
        missing = {source: task for source, task in sources.items() if not is_cached(source)}
        why = _hub_trouble() if missing else None
        if why is not None:
            source, task = next(iter(missing.items()))
            whose = "" if task == name else f" (task {task})"
            raise UserError(
                f"lm-eval:{name}{whose} takes its data from the Hugging Face hub ({source}), and {why}; where there is "
                "no way to it, copy a cache (HF_HOME) here, or define the task on a file with --include-path"
            )


def refuse_unsafe(name: str, task: str, *, unsafe: bool) -> None:
    """Raises UserError for a task that runs what the model wrote."""
    if not unsafe:
        return
    suite = next((suite for start, suite in OWN.items() if task.startswith(start)), None)
    whose = "" if task == name else f": task {task}"
    why = "lm-eval runs what the model wrote for it outside of the sandbox"
    if suite == "cruxeval":
        why += ", and misreads answers (the data's own outputs score about half)"
    instead = f"use --suite {suite}" if suite else "there is no suite of plt-eval's own for it"
    raise UserError(f"lm-eval:{name}{whose} is not run: {why}; {instead}")


def hub_source(config: Mapping[str, Any]) -> str | None:
    """The data set of the hub that a task reads; None where it reads files, or makes its data by itself."""
    source = config.get("dataset_path")
    if not isinstance(source, str) or config.get("custom_dataset") is not None or Path(source).exists():
        return None
    if source not in FILE_READERS:
        return source
    files = str((config.get("dataset_kwargs") or {}).get("data_files"))
    remote = re.search(r"(?:https?|hf)://[^'\"\s,\]}]+", files)
    return remote[0] if remote else None


def is_cached(source: str) -> bool:
    """Whether an earlier download of the data set may be here; whether all of it is, loading finds out."""
    import datasets
    from huggingface_hub import constants

    folders = {
        f"datasets--{source.replace('/', '--')}".lower(): Path(constants.HF_HUB_CACHE),
        source.replace("/", "___").lower(): Path(datasets.config.HF_DATASETS_CACHE),
    }
    return any(
        folder.is_dir() and any(entry.name.lower() == name for entry in folder.iterdir())
        for name, folder in folders.items()
    )


def _hub_trouble() -> str | None:
    """Why the hub cannot be asked; None where it answers."""
    import httpx
    from huggingface_hub import constants

    if (name := switched_off()) is not None:
        return f"{name} is set"
    try:
        httpx.head(constants.ENDPOINT, timeout=PROBE_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})"
    return None


# --- preparing an evaluation, as lm-eval does ---------------------------------------------------------


def prepare(chosen: Chosen, num_fewshot: int | None, options: Mapping[str, Any], notify: Callable[[str], None]) -> None:
    """Give the tasks what the user chose: examples before the question, and `options` for written text. Raises
    UserError for what would have no effect."""
    tasks = chosen.tasks
    writing = [name for name, task in tasks.items() if task.get_config("output_type") == "generate_until"]
    if options and not writing:
        flags = {"temperature": "--temperature", "top_p": "--top-p", "max_gen_toks": "--max-new-tokens"}
        flag = next(flags[name] for name in options if name in flags)
        raise UserError(f"{flag} has no effect on lm-eval:{chosen.name}: the model writes no text there")
    for name in writing if options else ():
        tasks[name].set_config(key="generation_kwargs", value=dict(options), update=True)
    fixed = [name for name, task in tasks.items() if task.get_config("num_fewshot") == 0 and not _was_chosen(task)]
    if num_fewshot and fixed:
        if len(fixed) == len(tasks):
            raise UserError(
                f"--num-fewshot {num_fewshot} has no effect on lm-eval:{chosen.name}: the task itself says 0, which "
                "lm-eval never overrides"
            )
        notify(f"--num-fewshot has no effect on {', '.join(fixed[:5])}: these say 0, which lm-eval never overrides")
    for name, task in tasks.items():
        if num_fewshot is not None and name not in fixed:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.plt_eval_prepared = True
        task.set_fewshot_seed(seed=SEEDS["fewshot"])


def _was_chosen(task: Any) -> bool:
    """Whether an earlier call has set its examples already."""
    return bool(getattr(task, "plt_eval_prepared", False))


@contextlib.contextmanager
def built(chosen: Chosen, lm: Any, limit: int | None, *, chat: bool) -> Iterator[Requests]:
    """All requests, built once: within the block lm-eval's evaluate() finds them, and does not build them again.
    Raises UserError."""
    seed_all()
    for task in chosen.tasks.values():
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
        try:
            with quiet():
                task.build_all_requests(
                    limit=limit,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                    chat_template=lm.apply_chat_template if chat else None,
                    tokenizer_name=lm.tokenizer_name if chat else "",
                )
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"lm-eval: task {task.task_name} cannot be put into prompts: {told(error)}") from error
        task.build_all_requests = _built_already
    try:
        yield Requests(_named(chosen))
    finally:
        for task in chosen.tasks.values():
            del task.build_all_requests


def _built_already(**_: Any) -> None:
    """In place of a task's own."""


def _named(chosen: Chosen) -> list[Asked]:
    """The requests with their keys, which count repetitions in the order in which lm-eval asks."""
    instances = [(name, one) for name, task in chosen.tasks.items() for one in task.instances]
    keys: dict[int, list[str]] = {}
    for kind in dict.fromkeys(one.request_type for _, one in instances):
        asked = [one for _, one in instances if one.request_type == kind for _ in range(one.repeats)]
        for one, key in zip(asked, request_keys(kind, (one.args for one in asked)), strict=True):
            keys.setdefault(id(one), []).append(key)
    return [Asked(name, one.doc_id, one.request_type, one.args, tuple(keys[id(one)])) for name, one in instances]


def seed_all() -> None:
    """lm-eval's seeds, set when lm-eval sets them: some tasks shuffle their data."""
    import numpy as np
    import torch

    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's bars off the screen, and what it prints off standard output, which is for results."""
    import datasets
    import lm_eval.api.task as module

    bar = module.tqdm
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    module.tqdm = lambda items, **_: items
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        module.tqdm = bar
        if not shown:
            datasets.enable_progress_bars()


def _parts(name: str, loaded: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    from lm_eval.api.group import Group

    groups = loaded.get("groups") or {}
    parts: dict[str, tuple[str, ...]] = {}

    def walk(group: Any, path: tuple[str, ...]) -> None:
        parts.setdefault(group.name, path)
        for child in group:
            if isinstance(child, Group):
                walk(child, (*path, child.name))
            else:
                parts.setdefault(child.task_name, (*path, child.task_name))

    if name in groups:
        walk(groups[name], ())
    for task in loaded["tasks"]:
        parts.setdefault(task, () if task == name else (task,))
    return parts


def told(error: Exception) -> str:
    """An error of lm-eval's or of a task's in one line."""
    text = one_line(str(error), limit=400)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
