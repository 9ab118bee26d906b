"""`plt-eval diagnose`: open every loop of a model on held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plt_eval.cli.run import Device, Dtype, LoopMode


def diagnose(
    model: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint folder, or a bundled model: plt-tiny:r3 is one checkpoint, plt-tiny (default) the family, "
            "in which each loop count has a checkpoint that was trained with it."
        ),
    ] = None,
    loops: Annotated[
        str | None,
        typer.Option(
            help="Loop counts, as 2 or 1,2,4 or 1-4 (default: the checkpoint's own; of a family, all it has)."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Held-out text: a file (.txt, .py, ..., .jsonl, .parquet), a folder of such files, built token data, "
            "or a suite's name (humaneval, mbpp, trace). May be given again. Default: trace."
        ),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(help="Field of .jsonl and .parquet rows with the text; a+b joins two (default: looked for)."),
    ] = None,
    windows: Annotated[
        bool | None,
        typer.Option(
            "--windows/--no-windows",
            help="Cut texts into windows of --sequence-length tokens, each a sample, or read their beginnings only "
            "(default: windows for a single text file).",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples at most.")] = 500,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens a sample at most (default: the model's context, at most 2048).")
    ] = None,
    measure: Annotated[
        str | None, typer.Option(help="Measurements, with commas between them, as step_size,gate (default: all).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order in which samples are drawn.")] = 0,
    loop_mode: Annotated[LoopMode | None, typer.Option(help="How loops are wired (default: the checkpoint's).")] = None,
    batch_size: Annotated[
        str | None, typer.Option(help='Samples at a time, or "auto" (default): as many as fit.')
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Numbers to compute in (default auto).")] = None,
    device: Annotated[Device | None, typer.Option(help="Where to compute (default auto).")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help='Tokenizer folder, or "bytes" (default: the checkpoint\'s own).')
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings along.")
    ] = False,
    results: Annotated[Path, typer.Option(help="Where runs are stored.")] = Path("results/runs"),
    run_id: Annotated[
        str | None, typer.Option(help="Name of the run; of several, the beginning of their names.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of the tables.")] = False,
) -> None:
    """Open every loop: how far each moves the states, the attention and the predictions, and what it costs.

    One run directory for each loop count, and tables with one row a loop. Stopped or killed, the same command goes on
    where it stood; complete, it prints the stored result.
    """
    from plt_eval.diagnosis.command import DiagnoseOptions, report_diagnoses

    options = DiagnoseOptions(
        model=model,
        loops=loops,
        data=tuple(data or ()),
        field=field,
        windows=windows,
        samples=samples,
        sequence_length=sequence_length,
        measure=measure,
        seed=seed,
        loop_mode=None if loop_mode is None else loop_mode.value,
        batch_size=batch_size,
        dtype=None if dtype is None else dtype.value,
        device=None if device is None else device.value,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
        results=results,
        run_id=run_id,
    )
    report_diagnoses(options, as_json=json_)
