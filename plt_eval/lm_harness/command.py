"""What `plt-eval run` does for lm-eval's tasks: one run of our store for each name, model and loop count.

lm-eval asks for all of a run's answers before it scores any. So the resume point is the journal of answers; what became
of each document is written when the last one is there.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import MofNCompleteColumn

from plt_benchmarks.eleuther import LmEvalSuite
from plt_eval.engines.base import Engine, health_lines
from plt_eval.errors import UserError, one_line
from plt_eval.journal import DiskFull, write_atomically
from plt_eval.lm_harness.answers import AnswerRecord, JournaledAnswers, Unanswered, samples_text
from plt_eval.lm_harness.results import documents, metrics_of, sample_id
from plt_eval.lm_harness.tasks import Catalogue, Chosen, Requests, built, hub_source, prepare, quiet, told
from plt_eval.progress import LoggedBar, Rate
from plt_eval.records import DecodingRecord, Identity
from plt_eval.runner import Result, RunInterrupted, Settings
from plt_eval.store import RunRequest, RunWriter, open_run

if TYPE_CHECKING:
    from rich.console import Console

    from plt_eval.lm_harness.models import AnsweringLM

RESULTS = "lm_eval.json"
"""lm-eval's own results, in the run's folder."""
BOOTSTRAPS = 100_000
"""lm-eval's own default."""


class AnswersProgress(LoggedBar):
    """A bar over the requests of one run."""

    def __init__(
        self, console: Console, title: str, *, total: int, done: int, below: Callable[[], Sequence[str]]
    ) -> None:
        super().__init__(console, title, MofNCompleteColumn(), Rate(), total=total, below=below)
        # Restarted, so that the rate and the time left are of this session's work.
        self._bar.reset(self._task, completed=done, start=True)

    def answered(self, _: AnswerRecord) -> None:
        """One more answer is there."""
        self._bar.update(self._task, advance=1)
        self._log()

    def _line(self) -> str:
        task = self._bar.tasks[0]
        return f"{task.description}: {task.completed:.0f}/{task.total:.0f} requests answered"


@dataclass(frozen=True)
class Job:
    """One run: what is asked, of whom, and how it is kept."""

    chosen: Chosen
    lm: AnsweringLM
    requests: Requests
    settings: Settings
    request: RunRequest
    chat: bool
    version: str


def run_lm_eval(
    suite: LmEvalSuite,
    make_engines: Callable[[], Sequence[Callable[[], Engine]]],
    settings: Settings,
    named: Callable[[Settings, str, Engine], Settings],
    console: Console,
    notify: Callable[[str], None],
    *,
    greedy: bool = False,
    seeded: bool = False,
) -> list[Result]:
    """Each engine of `make_engines` on each of the suite's names. `greedy`: no text is drawn at random, whatever tasks
    say; `seeded`: the seed was chosen, so that something has to be drawn. Raises UserError (before a model is loaded,
    as far as that can be known) and RunInterrupted."""
    if not suite.tasks:
        raise UserError("--suite lm-eval names no task: expected lm-eval:TASK,..., as lm-eval:gsm8k,hellaswag")
    results = []
    with _warnings_to(notify):
        catalogue = Catalogue(suite.include_path)
        catalogue.check(suite.tasks)
        chosen = [catalogue.load(name) for name in suite.tasks]
        for one in chosen:
            prepare(one, suite.num_fewshot, _written(settings, greedy=greedy), notify)
        for make in make_engines():
            with closing(make()) as engine:
                for one in chosen:
                    own = named(settings, f"lm-eval:{one.name}", engine)
                    results.append(_run_one(one, engine, own, console, notify, seeded=seeded))
    return results


class _Notes(logging.Handler):
    """Hands on what lm-eval warns of, each warning once."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._notify, self._told = notify, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        text = one_line(record.getMessage(), limit=400)
        if text not in self._told:
            self._told.add(text)
            self._notify(f"lm-eval: {text}")


@contextmanager
def _warnings_to(notify: Callable[[str], None]) -> Iterator[None]:
    logger, handler = logging.getLogger("lm_eval"), _Notes(notify)
    kept, up = list(logger.handlers), logger.propagate
    logger.handlers[:], logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = kept, up


def _written(settings: Settings, *, greedy: bool) -> dict[str, Any]:
    """How text is to be written, in lm-eval's names: what was chosen instead of the tasks' own."""
    decoding = settings.decoding
    options: dict[str, Any] = {"do_sample": False, "temperature": 0.0} if greedy else {}
    if decoding.temperature > 0:
        options = {"do_sample": True, "temperature": decoding.temperature}
        if decoding.top_p < 1:
            options["top_p"] = decoding.top_p
    if decoding.max_new_tokens is not None:
        options["max_gen_toks"] = decoding.max_new_tokens
    return options


def _model_of(engine: Engine, seed: int) -> tuple[AnsweringLM, bool]:
    """The engine as a model of lm-eval, and whether prompts are conversations. Raises UserError."""
    from plt_eval.engines.hf import HFEngine
    from plt_eval.engines.vllm import VLLMEngine
    from plt_eval.lm_harness.models import EndpointLM, ModelLM

    if isinstance(engine, HFEngine | VLLMEngine):
        return ModelLM(engine, seed=seed), engine.prompts.use_chat
    if engine.name == "openai":
        lm = EndpointLM(engine, seed=seed)
        return lm, lm.chat
    raise UserError(f"--engine {engine.name} has no effect on suite lm-eval: its tasks ask a model")


def _run_one(
    chosen: Chosen,
    engine: Engine,
    settings: Settings,
    console: Console,
    notify: Callable[[str], None],
    *,
    seeded: bool,
) -> Result:
    lm, chat = _model_of(engine, settings.decoding.seed)
    with built(chosen, lm, settings.limit, chat=chat) as requests:
        for one in requests.asked:
            if (why := lm.refusal(one.kind, one.arguments)) is not None:
                raise UserError(f"lm-eval:{chosen.name} on {one.task}: {why}")
        drawn = any(one.kind == "generate_until" and samples_text(one.arguments[1]) for one in requests.asked)
        if seeded and not drawn:
            raise UserError(f"--seed has no effect on lm-eval:{chosen.name}: nothing is drawn there; add --temperature")
        version = f"lm-eval {_installed()}"
        request = _request(chosen, requests, engine, settings, version)
        job = Job(chosen, lm, requests, settings, request, chat, version)
        with RunWriter.open(settings.results, request) as writer:
            if writer.complete and writer.manifest.status == "complete":
                stored = open_run(writer.path)
                metrics = stored.metrics()
                if metrics is not None:
                    return Result(stored, metrics, reused=True)
            if chat:
                notify(
                    "prompts are conversations, examples as turns, as with lm-eval's --apply_chat_template "
                    "(--chat-template off: as without)"
                )
            return _evaluate(job, writer, console)


def _evaluate(job: Job, writer: RunWriter, console: Console) -> Result:
    writer.begin(job.request)
    answers = JournaledAnswers(writer.path)
    needed = job.requests.keys
    done = sum(key in answers for key in needed)
    identity = writer.manifest.identity
    title = identity.suite + ("" if identity.loops is None else f" r{identity.loops}")
    below = functools.partial(health_lines, job.lm.engine)
    progress = AnswersProgress(console, title, total=len(needed), done=done, below=below)
    answers.told = progress.answered
    job.lm.answers = answers
    missing: list[str] = []
    try:
        with progress:
            results = _ask(job)
        if isinstance(results, Unanswered):
            missing = [one_line(results)]
            console.print(
                f"warning: {job.chosen.name}: {missing[0]}; run the same command again to try them again",
                style="yellow",
                markup=False,
                soft_wrap=True,
            )
        else:
            for completion, sample in documents(job.chosen, results, job.requests, answers, chat=job.chat):
                if sample.key not in writer.samples:
                    writer.add_completion(completion)
                    writer.add_sample(sample)
            write_atomically(writer.path / RESULTS, _own_file(results))
        answers.close()
        writer.seal()
        metrics = (
            {} if isinstance(results, Unanswered) else metrics_of(job.chosen, results, identity.suite, job.version)
        )
        writer.end(metrics, 0 if missing else identity.problems, missing)
    except BaseException as error:
        _abandon(writer, answers)
        if isinstance(error, KeyboardInterrupt):
            got = sum(key in answers for key in needed)
            raise RunInterrupted(
                f"{writer.path}: stopped with {got} of {len(needed)} requests answered; run the same command again to "
                "go on"
            ) from error
        raise
    stored = open_run(writer.path)
    told = stored.metrics()
    assert told is not None
    return Result(stored, told, reused=False)


def _ask(job: Job) -> Any:
    """lm-eval's results, or Unanswered. Raises UserError for a task that breaks."""
    from lm_eval.evaluator import evaluate

    try:
        with quiet():
            return evaluate(
                lm=job.lm,
                task_dict=job.chosen.loaded,
                limit=job.settings.limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=True,
                apply_chat_template=job.chat,
                fewshot_as_multiturn=job.chat,
            )
    except Unanswered as left:
        return left
    except (UserError, OSError):
        raise
    except Exception as error:
        raise UserError(
            f"lm-eval:{job.chosen.name} broke off with {told(error)} (PLT_EVAL_DEBUG=1 shows where)"
        ) from error


def _abandon(writer: RunWriter, answers: JournaledAnswers) -> None:
    """Stop in good order after an exception, which is the one to report."""
    with suppress(DiskFull, OSError, UserError):
        answers.close()
    with suppress(DiskFull, OSError, UserError):
        writer.seal()
        writer.end(None, 0, [])


# --- which run it is ----------------------------------------------------------------------------------


def _request(chosen: Chosen, requests: Requests, engine: Engine, settings: Settings, version: str) -> RunRequest:
    data, prompts = hashlib.sha256(), hashlib.sha256()
    ids = list(dict.fromkeys(sample_id(one.task, one.doc_id) for one in requests.asked))
    for one in requests.asked:
        prompts.update(
            json.dumps([one.task, one.doc_id, one.kind, one.arguments], sort_keys=True, default=str).encode()
        )
    for task in chosen.tasks.values():
        docs = {instance.doc_id: instance.doc for instance in task.instances}
        data.update(json.dumps([task.task_name, list(docs.items())], sort_keys=True, default=str).encode())
    identity = Identity(
        suite=f"lm-eval:{chosen.name}",
        suite_version=f"{version}, {_versions(chosen)}, {_configuration(chosen)}",
        data_sha256=data.hexdigest(),
        prompts_sha256=prompts.hexdigest(),
        engine=engine.name,
        engine_identity=dict(engine.identity()),
        decoding=DecodingRecord(**asdict(settings.decoding)),
        n_samples=1,
        problems=len(ids),
    )
    sources = list(dict.fromkeys(_source(task) for task in chosen.tasks.values()))
    more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
    return RunRequest(
        identity=identity,
        total=len(ids),
        data_revision=_versions(chosen),
        data_source=", ".join(sources[:3]) + more,
        command=settings.command,
        engine_facts=engine.facts(),
        run_id=settings.run_id,
    )


def _versions(chosen: Chosen) -> str:
    """The tasks' own versions, in words."""
    versions = sorted({str(task.VERSION) for task in chosen.tasks.values()})
    return f"version{'s' if len(versions) > 1 else ''} {', '.join(versions[:5])}"


def _configuration(chosen: Chosen) -> str:
    """A hash of what the tasks say of their scoring: a changed metric or filter makes another run."""
    told = {}
    for name, task in chosen.tasks.items():
        config = task.config.to_dict(keep_callable=True)
        for elsewhere in ("metadata", "dataset_path", "dataset_name", "dataset_kwargs"):
            config.pop(elsewhere, None)
        if not type(task).__module__.startswith("lm_eval.api"):
            config["class"] = type(task)
        told[name] = config
    text = json.dumps(told, sort_keys=True, default=_steady)
    return f"configuration {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _steady(value: Any) -> str:
    """The same text for the same thing in every process: of a function or class the file that it stands in, since it
    may call what stands beside it; and what a partial one was given."""
    if isinstance(value, functools.partial):
        return json.dumps([_steady(value.func), value.args, value.keywords], sort_keys=True, default=_steady)
    if callable(value):
        with suppress(TypeError, OSError):
            source = Path(inspect.getfile(value)).read_bytes()
            return f"{getattr(value, '__qualname__', '')} {hashlib.sha256(source).hexdigest()}"
    return str(getattr(value, "__qualname__", None) or type(value).__qualname__)


def _source(task: Any) -> str:
    config = {
        name: task.get_config(name) for name in ("dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset")
    }
    hub = hub_source(config)
    if hub is not None:
        return f"{hub} ({config['dataset_name']})" if config["dataset_name"] else hub
    return str((config["dataset_kwargs"] or {}).get("data_files") or config["dataset_path"] or "made by the task")


def _own_file(results: Mapping[str, Any]) -> str:
    """lm-eval's results without its samples, as JSON; functions and numpy's numbers as lm-eval writes them."""
    from lm_eval.utils import handle_non_serializable

    told = {name: value for name, value in results.items() if name != "samples"}
    return json.dumps(told, indent=2, default=handle_non_serializable, ensure_ascii=True) + "\n"


def _installed() -> str:
    from importlib.metadata import version

    return version("lm_eval")
