"""What `plt-eval bench` does with its options: check them, build the models, run one bench, print and store it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plt_eval.errors import UserError

if TYPE_CHECKING:
    import torch

    from plt_eval.bench.floor import Bandwidth
    from plt_eval.bench.outcome import Outcome, Setup


@dataclass(frozen=True)
class BenchOptions:
    """The options of all benches, by name. None means: not given."""

    shape: str | None = None
    model: str | None = None
    loops: str = "1,2,4"
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    batch: str = "1"
    context: str = "512"
    rounds: int = 5
    tokens: int = 32
    compile: str = "auto"
    attention: str | None = None
    baselines: str = "all"
    chunk: int | None = None
    requests: int = 32
    each: bool = False
    layers: int | None = None
    overhead: bool = False
    prefix: bool = False
    json: Path | None = None
    seed: int = 0


def report_bench(kind: str, options: BenchOptions) -> bool:
    """Run one bench, print its table to stdout and write --json; says whether every gate was green. Raises UserError;
    on Ctrl-C exits with 130."""
    import typer
    from rich.console import Console

    from plt_eval.bench.report import bench_json, print_outcome
    from plt_eval.journal import write_atomically

    console = Console(stderr=True, highlight=False)
    try:
        document, outcome = _run(kind, options, console)
    except KeyboardInterrupt:
        typer.echo("plt-eval: interrupted: nothing is written", err=True)
        raise typer.Exit(130) from None
    if options.json is not None:
        write_atomically(options.json, json.dumps({**document, **bench_json(outcome)}, indent=2) + "\n")
    print_outcome(outcome, document)
    for where, gates in outcome.refused().items():
        for gate in gates:
            typer.echo(f"plt-eval: red gate: {where}: {gate.line()}: no speed is printed for it", err=True)
    return not outcome.refused()


def _run(kind: str, options: BenchOptions, console: Any) -> tuple[dict[str, Any], Outcome]:
    _check_json(options.json)
    bench = BENCHES[kind](options)
    import torch

    from plt_eval.bench.floor import measure_bandwidth
    from plt_eval.bench.outcome import Setup
    from plt_eval.bench.progress import BenchProgress
    from plt_eval.bench.rounds import Stopwatch
    from plt_eval.cli.options import parse_loops
    from plt_eval.engines.checkpoint import pick_device

    first = () if kind == "diagnose" else (1,)
    loops = tuple(dict.fromkeys((*first, *parse_loops(options.loops))))
    device = pick_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    began = datetime.now(UTC)
    with BenchProgress(console, f"bench {kind}") as progress:
        family = make_family(kind, options, device)
        attention = family.attention(options.attention)
        setup = Setup(family, loops, options.rounds, Stopwatch(device), progress, options.seed)
        bandwidth = measure_bandwidth(device)
        outcome = bench(setup, bandwidth)
    attention = "vLLM's own" if kind == "vllm" else attention
    outcome.settings |= {"attention": attention, "loops": list(loops), "rounds": options.rounds, "seed": options.seed}
    return _document(kind, setup, bandwidth, began), outcome


def make_family(kind: str, options: BenchOptions, device: torch.device) -> Any:
    """The weights that --shape or --model names. Raises UserError and CheckpointError."""
    import torch

    from plt_eval.bench.subjects import SHAPES, Family
    from plt_eval.models import resolve_model

    if options.model is not None and options.shape is not None:
        raise UserError("give --shape or --model, not both")
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    if kind == "train":
        dtype = torch.float32  # the weights; --dtype is what the passes compute in
    if options.model is not None:
        resolved = resolve_model(options.model)
        return Family.checkpoint(resolved.folder, dtype=dtype, device=device)
    if kind == "diagnose" and options.shape == "paper":
        from plt_eval.bench.diagnostics import paper_family

        return paper_family(options.layers or 14, device, options.seed)
    shape = options.shape or "medium"
    if shape not in SHAPES:
        known = [*SHAPES, *(["paper"] if kind == "diagnose" else [])]
        raise UserError(f"--shape {shape}: expected one of {', '.join(known)}")
    return Family.random(shape, dtype=dtype or torch.bfloat16, device=device, seed=options.seed)


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """As in "1,8": rising or not, each at least 1. Raises UserError."""
    found = []
    for part in text.split(","):
        if not part.strip().isdecimal() or int(part) < 1:
            raise UserError(f"{flag} {text!r}: {part.strip()!r} is no number of at least 1; expected e.g. 1 or 1,8")
        found.append(int(part))
    return tuple(dict.fromkeys(found))


def _check_json(path: Path | None) -> None:
    """Before anything is measured: it would be a pity afterwards."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UserError(f"--json {path}: expected a file in a folder that exists")


def _decode_settings(options: BenchOptions) -> Callable[[Setup, Bandwidth], Outcome]:
    batches, contexts = numbers("--batch", options.batch), numbers("--context", options.context)
    chosen = _baselines(options.baselines)

    def bench(setup: Setup, bandwidth: Bandwidth) -> Outcome:
        from plt_eval.bench.decode import DecodeSettings, bench_decode

        settings = DecodeSettings(batches, contexts, options.tokens, options.compile, chosen)
        return bench_decode(setup, settings, bandwidth)

    return bench


def _baselines(text: str) -> tuple[str, ...]:
    from plt_eval.bench.decode import BASELINES as known

    if text in ("all", "none"):
        return known if text == "all" else ()
    parts = tuple(part.strip() for part in text.split(","))
    wrong = next((part for part in parts if part not in known), None)
    if wrong is not None:
        raise UserError(f"--baselines {text!r}: {wrong!r} is none; expected all, none or some of {', '.join(known)}")
    return parts


def _throughput_settings(options: BenchOptions) -> Callable[[Setup, Bandwidth], Outcome]:
    batches, contexts = numbers("--batch", options.batch), numbers("--context", options.context)

    def bench(setup: Setup, _: Bandwidth) -> Outcome:
        from plt_eval.bench.throughput import ThroughputSettings, bench_throughput

        return bench_throughput(
            setup, ThroughputSettings(batches, contexts, options.tokens, options.requests, options.compile)
        )

    return bench


def _prefill_settings(options: BenchOptions) -> Callable[[Setup, Bandwidth], Outcome]:
    batches, contexts = numbers("--batch", options.batch), numbers("--context", options.context)

    def bench(setup: Setup, _: Bandwidth) -> Outcome:
        from plt_eval.bench.prefill import PrefillSettings, bench_prefill

        return bench_prefill(setup, PrefillSettings(batches, contexts, options.chunk))

    return bench


def _train_settings(options: BenchOptions) -> Callable[[Setup, Bandwidth], Outcome]:
    batches, contexts = numbers("--batch", options.batch), numbers("--context", options.context)
    if options.dtype == "float16":
        raise UserError("--dtype float16: training computes in float32 or bfloat16")

    def bench(setup: Setup, _: Bandwidth) -> Outcome:
        import torch

        from plt_eval.bench.train import bench_train

        compute = torch.float32 if options.dtype == "float32" else torch.bfloat16
        return bench_train(setup, batches, contexts, compute)

    return bench


def _diagnose_settings(options: BenchOptions) -> Callable[[Setup, Bandwidth], Outcome]:
    contexts = numbers("--context", options.context)
    if options.layers is not None and options.shape != "paper":
        raise UserError("--layers has an effect with --shape paper only")
    if options.shape == "paper" and options.dtype not in ("auto", "float32"):
        raise UserError(f"--dtype {options.dtype}: --shape paper is measured in float32")

    def bench(setup: Setup, _: Bandwidth) -> Outcome:
        from plt_eval.bench.diagnostics import bench_diagnostics

        return bench_diagnostics(setup, contexts, each=options.each)

    return bench


def _vllm_settings(options: BenchOptions) -> Callable[[Setup, Bandwidth], Outcome]:
    batches, contexts = numbers("--batch", options.batch), numbers("--context", options.context)
    if options.overhead and options.prefix:
        raise UserError("--overhead and --prefix exclude each other: give one")

    def bench(setup: Setup, _: Bandwidth) -> Outcome:
        from plt_eval.bench.vllm import VLLMSettings, bench_prefix, bench_vllm
        from plt_eval.bench.vllm_overhead import bench_overhead

        settings = VLLMSettings(batches, contexts, options.tokens, options.compile == "off")
        if options.overhead:
            return bench_overhead(setup, settings, options.requests)
        return bench_prefix(setup, settings) if options.prefix else bench_vllm(setup, settings)

    return bench


BENCHES: dict[str, Callable[[BenchOptions], Callable[[Setup, Bandwidth], Outcome]]] = {
    "decode": _decode_settings,
    "throughput": _throughput_settings,
    "prefill": _prefill_settings,
    "train": _train_settings,
    "diagnose": _diagnose_settings,
    "vllm": _vllm_settings,
}
"""Each checks its options, and hands back what runs."""


def _document(kind: str, setup: Setup, bandwidth: Bandwidth, began: datetime) -> dict[str, Any]:
    """Where and of what: all of the JSON but the numbers."""
    import torch

    from plt_eval.provenance import git_state, hardware, packages
    from plt_model import PLTConfig

    git, family = git_state(), setup.family
    config: PLTConfig = family.config
    return {
        "bench": kind,
        "command": ["plt-eval", *sys.argv[1:]],
        "began": began.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - began).total_seconds(), 1),
        "model": {"name": family.name, "parameters": family.parameters(), "config": config.to_dict()},
        "dtype": str(family.dtype).removeprefix("torch."),
        "device": family.device.type,
        "threads": torch.get_num_threads(),
        "machine": hardware().model_dump(mode="json"),
        "packages": packages(),
        "git": None if git is None else git.model_dump(mode="json"),
        "bandwidth": dataclasses.asdict(bandwidth),
    }
