"""`plt-eval serve`: a model behind an OpenAI-compatible address."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from plt_eval.cli.run import Device, Dtype
from plt_eval.errors import UserError


class ServeEngine(StrEnum):
    """Whose server."""

    auto = "auto"
    vllm = "vllm"
    transformers = "transformers"


def serve(
    model: Annotated[str, typer.Option(help="Checkpoint folder, or a bundled model, as plt-tiny:r2.")],
    loops: Annotated[
        int | None, typer.Option(min=1, max=64, help="Loop count (default: the checkpoint's own).")
    ] = None,
    engine: Annotated[
        ServeEngine, typer.Option(help="Whose server: auto is vLLM's where it is installed, else transformers'.")
    ] = ServeEngine.auto,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 picks a free one.")] = 8000,
    dtype: Annotated[Dtype, typer.Option(help="Numbers to compute in.")] = Dtype.auto,
    device: Annotated[
        Device | None, typer.Option(help="Where to compute (transformers; vLLM computes on what it was built for).")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help='Tokenizer folder, or "bytes" (default: the checkpoint\'s own).')
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a chat template (default: the tokenizer's own).")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model (default: the folder's name, or the bundled one).")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the key that clients must send (default: none).")
    ] = None,
    tensor_parallel: Annotated[int | None, typer.Option(min=1, help="GPUs to split the model over (vLLM).")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer together (default: the model's context).")
    ] = None,
    rest: Annotated[
        list[str] | None, typer.Argument(help="After --: options for vLLM's or transformers' server, as they are.")
    ] = None,
) -> None:
    """Serve a model at an OpenAI-compatible address, for `run --engine openai` and any other client.

    Prints one line when the server is ready; its log goes to stderr. Ctrl-C ends it.
    """
    from plt_eval.serving.child import ServerDied
    from plt_eval.serving.command import ServeOptions, Stopped
    from plt_eval.serving.command import serve as start

    if rest and not rest[0].startswith("-"):
        raise UserError(f"unexpected argument {rest[0]!r}: options for the server itself come after --")
    options = ServeOptions(
        model=model,
        loops=loops,
        engine=engine.value,
        host=host,
        port=port,
        dtype=dtype.value,
        device=None if device is None else device.value,
        tokenizer=tokenizer,
        chat_template=chat_template,
        served_model_name=served_model_name,
        api_key_env=api_key_env,
        tensor_parallel=tensor_parallel,
        max_model_len=max_model_len,
        rest=tuple(rest or ()),
    )
    try:
        start(options)
    except Stopped as stopped:
        raise typer.Exit(128 + stopped.number) from None
    except ServerDied as died:
        if str(died):
            typer.echo(f"plt-eval: error: {died}", err=True)
        raise typer.Exit(2 if died.code == 2 else 1) from None
