"""The options of `plt-eval run`, and which of them contradict each other, miss each other or have no effect."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plt_eval.errors import UserError

if TYPE_CHECKING:
    from plt_benchmarks.options import SuiteOptions
    from plt_eval.swe.command import SweOptions


@dataclass(frozen=True)
class RunOptions:
    """The options of `plt-eval run`, by name. None means: not given."""

    suite: str
    engine: str = "hf"
    data: Path | None = None
    limit: int | None = None
    n_samples: int | None = None
    results: Path = Path("results/runs")
    run_id: str | None = None
    sandbox: str = "bubblewrap"
    sandbox_image: str | None = None
    scoring_workers: int | None = None
    ray: str | None = None
    model: str | None = None
    loops: str | None = None
    loop_mode: str | None = None
    batch_size: str | None = None
    dtype: str | None = None
    device: str | None = None
    chat_template: str | None = None
    tokenizer: str | None = None
    decoder: str | None = None
    attention: str | None = None
    compile: str | None = None
    tensor_parallel: int | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    endpoint: tuple[str, ...] | None = None
    served_as: str | None = None
    api_model: str | None = None
    api: str | None = None
    api_key_env: str | None = None
    concurrency: int | None = None
    retries: int | None = None
    request_timeout: float | None = None
    completions: tuple[str, ...] | None = None
    chosen: SuiteOptions | None = None
    swe: SweOptions | None = None


ONLY_WITH = {
    **dict.fromkeys(("model", "loops"), ("hf", "vllm", "openai")),
    **dict.fromkeys(("loop_mode", "batch_size", "dtype", "chat_template", "tokenizer", "compile"), ("hf", "vllm")),
    **dict.fromkeys(("device", "decoder", "attention"), ("hf",)),
    **dict.fromkeys(("tensor_parallel", "max_model_len", "gpu_memory_utilization"), ("vllm",)),
    **dict.fromkeys(
        ("endpoint", "served_as", "api_model", "api", "api_key_env", "concurrency", "retries", "request_timeout"),
        ("openai",),
    ),
    **dict.fromkeys(("temperature", "top_p", "seed", "max_new_tokens"), ("hf", "vllm", "openai")),
    "completions": ("replay",),
}
"""Option -> the engines with which it has an effect; the others have one with all."""
NEEDED = {"hf": (), "vllm": (), "openai": ("endpoint", "api_model"), "replay": ("completions",)}
MOST_LOOPS = 64


def check_options(options: RunOptions, *, tasks_draw: bool = False) -> None:
    """Raises UserError for options that contradict each other, miss each other, or have no effect. `tasks_draw`:
    without a --temperature the suite's tasks may draw text at random by themselves, so that a seed has an effect."""
    for field in fields(options):
        given = getattr(options, field.name) is not None
        engines = ONLY_WITH.get(field.name)
        if given and engines and options.engine not in engines:
            raise UserError(
                f"{flag(field.name)} has no effect with --engine {options.engine}: "
                f"it belongs to --engine {' or '.join(engines)}"
            )
    for name in NEEDED[options.engine]:
        if not getattr(options, name):
            raise UserError(f"--engine {options.engine} needs {flag(name)}")
    if options.sandbox_image is not None and options.sandbox != "docker":
        raise UserError(f"--sandbox-image has no effect with --sandbox {options.sandbox}: it belongs to docker")
    if options.compile is not None and options.decoder == "generate":
        raise UserError(f"--compile {options.compile} has no effect with --decoder generate: it belongs to session")
    _check_decoding(options, tasks_draw=tasks_draw)
    if options.loops is not None:
        counts = parse_loops(options.loops)
        if options.engine == "openai" and options.model is None:
            raise UserError("--loops has no effect with --engine openai without --model: the checkpoint that is served")
        if options.engine == "openai" and len(counts) > 1:
            raise UserError(f"--loops {options.loops}: with --engine openai expected one, that of what is served")
    parse_batch_size(options.batch_size)
    share = options.gpu_memory_utilization
    if share is not None and not 0 < share <= 1:
        raise UserError(f"--gpu-memory-utilization {share}: expected a number above 0 and at most 1")
    if options.request_timeout is not None and not options.request_timeout > 0:
        raise UserError(f"--request-timeout {options.request_timeout}: expected a number of seconds above 0")


def parse_loops(text: str) -> list[int]:
    """ "1,2,4" or "1-4" or both, each count once, in the order given. Raises UserError."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*", part)
        if match is None:
            raise UserError(f'--loops {text!r}: {part.strip()!r} is no loop count; expected e.g. "2", "1,2,4" or "1-4"')
        first, last = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= last <= MOST_LOOPS:
            raise UserError(f"--loops {text!r}: {part.strip()!r} is not within 1 to {MOST_LOOPS}, rising")
        counts += range(first, last + 1)
    return list(dict.fromkeys(counts))


def _check_decoding(options: RunOptions, *, tasks_draw: bool) -> None:
    if options.temperature is not None and not math.isfinite(options.temperature):
        raise UserError(f"--temperature {options.temperature}: expected a finite number, 0 or above")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise UserError(f"--top-p {options.top_p}: expected a number above 0 and at most 1")
    if options.temperature or options.engine == "replay":
        return
    if (options.n_samples or 1) > 1:
        raise UserError(
            f"--n-samples {options.n_samples} at temperature 0 would draw the same text every time: add --temperature"
        )
    for name in ("top_p",) if tasks_draw and options.temperature is None else ("top_p", "seed"):
        if getattr(options, name) is not None:
            raise UserError(f"{flag(name)} has no effect at temperature 0: add --temperature")


def parse_batch_size(text: str | None) -> Any:
    """--batch-size: "auto", or a number from 1. Raises UserError."""
    if text is None or text == "auto":
        return "auto"
    if not re.fullmatch(r"[1-9][0-9]{0,17}", text):
        raise UserError(f'--batch-size {text!r}: expected "auto" or a number from 1')
    return int(text)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# --- suites of their own kind ---------------------------------------------------------------------------


def check_swe(name: str, options: RunOptions, swe: SweOptions) -> None:
    """Raises UserError for options that have no effect on a SWE suite, or contradict each other there."""
    if swe.predictions is not None and swe.gold:
        raise UserError("--predictions and --gold exclude each other: give one")
    if options.engine == "replay":
        raise UserError(f"--engine replay has no effect on suite {name}: score stored patches with --predictions FILE")
    instead = {
        "n_samples": "an instance is solved once",
        "scoring_workers": "use --workers",
        "sandbox_image": "each instance has its own image",
    }
    if options.ray is not None:  # the agents are here, the judgements there
        del instead["scoring_workers"]
    for field, why in instead.items():
        if getattr(options, field) is not None:
            raise UserError(f"{flag(field)} has no effect on suite {name}: {why}")
    if not swe.stored:
        return
    how = "--gold" if swe.gold else "--predictions"
    given = [field for field in ONLY_WITH if getattr(options, field) is not None]
    given += [field.name for field in fields(swe) if field.name.startswith("agent_") and getattr(swe, field.name)]
    if options.engine != "hf":
        given.append("engine")
    if given:
        raise UserError(f"{flag(given[0])} has no effect with {how}: no model is asked")


def refuse_swe_options(options: RunOptions) -> None:
    for field in fields(options.swe) if options.swe is not None else ():
        if getattr(options.swe, field.name) is not None:
            raise UserError(
                f"{flag(field.name)} has no effect on suite {options.suite}: it belongs to swe, swe-lite, multi-swe "
                "and multi-swe-bench"
            )


def check_lm_eval(options: RunOptions) -> None:
    """Raises UserError for options that have no effect on lm-eval's tasks."""
    refuse_swe_options(options)
    instead = {
        "n_samples": "a task says itself how often it asks (repeats)",
        "data": "give tasks of your own, with their data, by --include-path",
        "scoring_workers": "lm-eval scores all answers together",
        "ray": "lm-eval scores all answers together, in this process",
        "sandbox_image": "nothing that a model writes is run",
    }
    for field, why in instead.items():
        if getattr(options, field) is not None:
            raise UserError(f"{flag(field)} has no effect on suite lm-eval: {why}")
    if options.engine == "replay":
        raise UserError("--engine replay has no effect on suite lm-eval: its tasks ask for more than completions")
