"""`plt-eval bench`: what loops cost here, beside honest baselines, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plt_eval.cli.run import Compile, Device, Dtype

app = typer.Typer(
    help="Time decoding, prompts, training and diagnostics by loops; no speed without a green correctness gate.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Shape = Annotated[
    str | None, typer.Option(help="Random weights of a shape: tiny, small, medium (default, 40M parameters) or 7b.")
]
Model = Annotated[str | None, typer.Option(help="A checkpoint folder or a bundled model in place of --shape.")]
Loops = Annotated[str, typer.Option(help="Loop counts, as 2 or 1,2,4 or 1-4; 1 is always among them.")]
Rounds = Annotated[int, typer.Option(min=1, help="Interleaved rounds.")]
Type = Annotated[Dtype, typer.Option(help="Numbers to compute in (auto: bfloat16, or the checkpoint's).")]
Place = Annotated[Device, typer.Option(help="Where to compute.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads on a CPU (default: torch's).")]
Batch = Annotated[str, typer.Option(help="Texts side by side, as 1 or 1,8.")]
Attention = Annotated[str | None, typer.Option(help="Attention implementation (default: the model's choice).")]
Json = Annotated[Path | None, typer.Option("--json", help="Write everything, all rounds too, to this file.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of weights.")]
CompileOption = Annotated[Compile, typer.Option("--compile", help="Compile the decode step.")]

RED = 1
"""The exit code when a gate was red."""


@app.command("decode")
def decode(
    shape: Shape = None,
    model: Model = None,
    loops: Loops = "1,2,4",
    batch: Batch = "1",
    context: Annotated[str, typer.Option(help="Tokens that are there before, as 512 or 512,4096.")] = "512",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens of each text a round.")] = 32,
    rounds: Rounds = 5,
    baselines: Annotated[
        str, typer.Option(help="all, none, or some of trips,looped,llama: see the module plt_eval.bench.decode.")
    ] = "all",
    dtype: Type = Dtype.auto,
    device: Place = Device.auto,
    threads: Threads = None,
    compile_: CompileOption = Compile.auto,
    attention: Attention = None,
    seed: Seed = 0,
    json_: Json = None,
) -> None:
    """A new token: one trip for all loops, against R=1, a trip a pass, a looped transformer, and Llama's generate()."""
    from plt_eval.bench.command import BenchOptions

    _report(
        "decode",
        BenchOptions(
            shape=shape, model=model, loops=loops, batch=batch, context=context, tokens=tokens, rounds=rounds,
            baselines=baselines, dtype=dtype.value, device=device.value, threads=threads, compile=compile_.value,
            attention=attention, seed=seed, json=json_,
        ),
    )  # fmt: skip


@app.command("throughput")
def throughput(
    shape: Shape = None,
    model: Model = None,
    loops: Loops = "1,2,4",
    batch: Batch = "8",
    context: Annotated[str, typer.Option(help="Tokens of the longest prompt; the shortest has an eighth.")] = "256",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens of the longest text; the shortest an eighth.")] = 128,
    requests: Annotated[int, typer.Option(min=1, help="Texts a round.")] = 32,
    rounds: Rounds = 3,
    dtype: Type = Dtype.auto,
    device: Place = Device.auto,
    threads: Threads = None,
    compile_: CompileOption = Compile.auto,
    attention: Attention = None,
    seed: Seed = 0,
    json_: Json = None,
) -> None:
    """Many texts of unequal lengths: slots that refill, against Llama's generate() on static batches."""
    from plt_eval.bench.command import BenchOptions

    _report(
        "throughput",
        BenchOptions(
            shape=shape, model=model, loops=loops, batch=batch, context=context, tokens=tokens, requests=requests,
            rounds=rounds, dtype=dtype.value, device=device.value, threads=threads, compile=compile_.value,
            attention=attention, seed=seed, json=json_,
        ),
    )  # fmt: skip


@app.command("prefill")
def prefill(
    shape: Shape = None,
    model: Model = None,
    loops: Loops = "1,2,4",
    batch: Batch = "1",
    context: Annotated[str, typer.Option(help="Tokens of the prompt, as 4096 or 4096,8192,16384,32768.")] = "4096",
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Positions read at once (default: the decode engine's).")
    ] = None,
    rounds: Rounds = 3,
    dtype: Type = Dtype.auto,
    device: Place = Device.auto,
    threads: Threads = None,
    attention: Attention = None,
    seed: Seed = 0,
    json_: Json = None,
) -> None:
    """Reading a prompt: time and peak memory by loops and length."""
    from plt_eval.bench.command import BenchOptions

    _report(
        "prefill",
        BenchOptions(
            shape=shape, model=model, loops=loops, batch=batch, context=context, chunk=chunk, rounds=rounds,
            dtype=dtype.value, device=device.value, threads=threads, attention=attention, seed=seed, json=json_,
        ),
    )  # fmt: skip


@app.command("train")
def train(
    shape: Shape = None,
    model: Model = None,
    loops: Loops = "1,2,4",
    batch: Batch = "1",
    context: Annotated[str, typer.Option(help="Tokens of a sequence.")] = "512",
    rounds: Rounds = 5,
    dtype: Type = Dtype.auto,
    device: Place = Device.auto,
    threads: Threads = None,
    attention: Attention = None,
    seed: Seed = 0,
    json_: Json = None,
) -> None:
    """A training step: forward, backward and AdamW, by loops."""
    from plt_eval.bench.command import BenchOptions

    _report(
        "train",
        BenchOptions(
            shape=shape, model=model, loops=loops, batch=batch, context=context, rounds=rounds, dtype=dtype.value,
            device=device.value, threads=threads, attention=attention, seed=seed, json=json_,
        ),
    )  # fmt: skip


@app.command("vllm")
def vllm(
    shape: Shape = None,
    model: Model = None,
    loops: Loops = "1,2",
    batch: Annotated[str, typer.Option(help="Requests side by side, as 1 or 1,8; with --overhead seats.")] = "1,8",
    context: Annotated[str, typer.Option(help="Tokens of a prompt.")] = "256",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens of each request a round.")] = 32,
    overhead: Annotated[
        bool, typer.Option("--overhead", help="Time --engine vllm against `vllm bench throughput` instead.")
    ] = False,
    requests: Annotated[int, typer.Option(min=1, help="Texts a round of --overhead.")] = 32,
    prefix: Annotated[
        bool, typer.Option("--prefix", help="Time the first token of a prompt in the prefix cache instead.")
    ] = False,
    rounds: Rounds = 5,
    dtype: Annotated[Dtype, typer.Option(help="Numbers to compute in (auto: the checkpoint's).")] = Dtype.float32,
    device: Place = Device.auto,
    threads: Threads = None,
    compile_: Annotated[Compile, typer.Option("--compile", help="off: vLLM runs eagerly.")] = Compile.auto,
    seed: Seed = 0,
    json_: Json = None,
) -> None:
    """A PLT in vLLM: decoding by loops, beside a trip a pass; what --engine vllm adds; hits of the prefix cache."""
    from plt_eval.bench.command import BenchOptions

    _report(
        "vllm",
        BenchOptions(
            shape=shape, model=model, loops=loops, batch=batch, context=context, tokens=tokens, overhead=overhead,
            requests=requests, prefix=prefix, rounds=rounds, dtype=dtype.value, device=device.value, threads=threads,
            compile=compile_.value, seed=seed, json=json_,
        ),
    )  # fmt: skip


@app.command("diagnose")
def diagnose(
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights of a shape: tiny, small, medium (default), 7b, or paper: the paper's attention shape, "
            "made to fit a laptop."
        ),
    ] = None,
    model: Model = None,
    loops: Loops = "2",
    context: Annotated[str, typer.Option(help="Tokens of the sample.")] = "2048",
    each: Annotated[bool, typer.Option("--each", help="Time each measurement alone too.")] = False,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of --shape paper (default 14).")] = None,
    rounds: Rounds = 5,
    dtype: Type = Dtype.auto,
    device: Place = Device.auto,
    threads: Threads = None,
    attention: Attention = None,
    seed: Seed = 0,
    json_: Json = None,
) -> None:
    """All measurements of `plt-eval diagnose` against a plain forward pass."""
    from plt_eval.bench.command import BenchOptions

    _report(
        "diagnose",
        BenchOptions(
            shape=shape, model=model, loops=loops, context=context, each=each, layers=layers,
            rounds=rounds, dtype=dtype.value, device=device.value, threads=threads, attention=attention, seed=seed,
            json=json_,
        ),
    )  # fmt: skip


def _report(kind: str, options: object) -> None:
    from plt_eval.bench.command import BenchOptions, report_bench

    assert isinstance(options, BenchOptions)
    if not report_bench(kind, options):
        raise typer.Exit(RED)
