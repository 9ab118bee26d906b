"""`plt-eval train` and `plt-eval sft`: train a model at a loop count, and fine-tune it on instructions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plt_eval.cli.run import Device

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from plt_model.training.run import TrainResult

Fsdp = Annotated[bool, typer.Option("--fsdp", help="Shard the model over torchrun's processes (FSDP2).")]
ReportTo = Annotated[
    list[str] | None, typer.Option(help="Also report to trackio, wandb or tensorboard (may be given again).")
]
Seed = Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Instead of the recipe's seed.")]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]


def train(
    recipe: Annotated[str, typer.Option(help="Recipe file, or the name of a bundled recipe.")],
    loops: Annotated[str, typer.Option(help="Loop count, or several as 1,2,4 or 1-4.")],
    data: Annotated[Path, typer.Option(help="Where `plt-eval data build --recipe` put the data; built if missing.")],
    out: Annotated[Path, typer.Option(help="Folder of the training; of several, r1, r2, ... in it.")],
    seed: Seed = None,
    device: DeviceOption = Device.auto,
    fsdp: Fsdp = False,
    report_to: ReportTo = None,
) -> None:
    """Pre-train a PLT from a recipe.

    Models of one recipe and seed differ in the loop count only: same initial weights, same data in the same order, same
    schedule. Stopped or killed, the same command goes on where it stood.
    """
    from plt_eval.cli.options import parse_loops

    counts = parse_loops(loops)

    def work(console: Console) -> list[TrainResult]:
        from plt_eval.corpus import build_recipe_data
        from plt_model.training.recipe import load_recipe
        from plt_model.training.run import Engine, check_engine
        from plt_model.training.run import train as train_one

        loaded = load_recipe(recipe)
        for count in counts:
            loaded.config(count)
        check_engine(loaded, Engine(tuple(report_to or ()), fsdp, device.value, console))
        if _is_main():
            build_recipe_data(loaded, data, console)
        _wait_for_main(device)
        return [
            train_one(
                loaded,
                loops=count,
                data=data,
                out=out / f"r{count}" if len(counts) > 1 else out,
                seed=seed,
                console=console,
                report_to=report_to or (),
                fsdp=fsdp,
                device=device.value,
            )
            for count in counts
        ]

    _report(work)


def sft(
    recipe: Annotated[str, typer.Option(help="Fine-tuning recipe: a file, or the name of a bundled one.")],
    model: Annotated[str, typer.Option(help="Checkpoint folder, or a bundled model's name.")],
    data: Annotated[
        list[Path], typer.Option(help="Instructions, as .jsonl(.gz) or .parquet (may be given again).", exists=True)
    ],
    out: Annotated[Path, typer.Option(help="Folder of the training.")],
    tokenizer: Annotated[
        str | None, typer.Option(help='Tokenizer folder, or "bytes" (default: the checkpoint\'s own).')
    ] = None,
    seed: Seed = None,
    device: DeviceOption = Device.auto,
    fsdp: Fsdp = False,
    report_to: ReportTo = None,
) -> None:
    """Fine-tune a PLT on instructions, with a loss on the answers only.

    Records are {"prompt", "completion"} or {"messages": [{"role", "content"}, ...]}. The model keeps its loop count.
    The chat template that the data were put in is saved with the tokenizer.
    """

    def work(console: Console) -> list[TrainResult]:
        from plt_eval.models import resolve_model
        from plt_model.training.recipe import load_tuning_recipe
        from plt_model.training.tuning import tune

        return [
            tune(
                load_tuning_recipe(recipe),
                model=resolve_model(model, None).folder,
                data=data,
                out=out,
                tokenizer=tokenizer,
                seed=seed,
                console=console,
                report_to=report_to or (),
                fsdp=fsdp,
                device=device.value,
            )
        ]

    _report(work)


def _report(work: Callable[[Console], list[TrainResult]]) -> None:
    """Do the work; say what came out, in one table. On Ctrl-C says where it stands, and exits with 130."""
    from rich.console import Console

    try:
        results = work(Console(stderr=True, highlight=False))
    except KeyboardInterrupt as stop:
        typer.echo(f"plt-eval: interrupted: {str(stop) or 'the same command goes on'}", err=True)
        raise typer.Exit(130) from None
    if _is_main():
        _print_table(results)


def _print_table(results: list[TrainResult]) -> None:
    from rich.table import Table

    from plt_eval.tables import output_console

    table = Table("model", "loops", "parameters", "tokens", "loss (nats/token)", "tokens/s", "peak memory", "device")
    for result in results:
        table.add_row(
            str(result.model),
            str(result.loops),
            f"{result.parameters:,}",
            f"{result.tokens:,}",
            f"{result.loss:.4f}",
            f"{result.tokens_per_second:,.0f}",
            f"{result.peak_memory_bytes / 2**30:.2f} GiB",
            result.device,
        )
    output_console().print(table)


def _is_main() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


def _wait_for_main(device: Device) -> None:
    """The other processes read the data that the first one builds, however long that takes."""
    import os
    from datetime import timedelta

    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    import torch
    from accelerate import PartialState

    on_cpu = device is Device.cpu or not torch.cuda.is_available()
    PartialState(cpu=on_cpu, timeout=timedelta(days=7)).wait_for_everyone()
