"""`plt-eval data`: text into token data to train on, and what such data is made of."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plt_eval.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from plt_model.training.shards import Manifest

app = typer.Typer(
    help="Build the token data that models are trained on, and show what it is made of.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("build")
def build_data(
    out: Annotated[Path, typer.Option(help="Folder for the data; with --recipe, one folder below it for each entry.")],
    recipe: Annotated[
        str | None, typer.Option(help="Build the data of this training recipe (a YAML file, or a bundled one's name).")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="Where text comes from, as kind=folder,path=src,glob=**/*.py (may be given again); kinds: folder, "
            "jsonl, parquet, hub, installed, trace."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="[--source] What to call the data (default: the folder).")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help='[--source] "bytes" (default) or the folder of a Hugging Face tokenizer.')
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            help="Share of the documents kept from training (default 0.01, with --recipe what the data that are there "
            "have; a source installed has its own)."
        ),
    ] = None,
    shard_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens a file (default 134217728, with --recipe what the data that are there have)."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that tokenise; not for the tokenizer bytes.")] = 1,
) -> None:
    """Tokenise text into shards with a manifest.

    Stopped or killed, the same command goes on where it stood and ends with the same files; complete, it prints what
    there is.
    """
    from plt_eval.tables import output_console

    if (recipe is None) == (not source):
        raise UserError("give either --recipe or --source")
    if recipe is not None:
        for flag, value in (("--name", name), ("--tokenizer", tokenizer)):
            if value is not None:
                raise UserError(f"{flag} has no effect with --recipe: the recipe says it")
    settings = _Settings(held_out, shard_tokens, workers, ("plt-eval", *sys.argv[1:]))
    try:
        if recipe is not None:
            manifests = _build_recipe(recipe, out, settings)
        else:
            chosen = name or out.resolve().name
            manifests = {chosen: _build_sources(source or [], tokenizer or "bytes", out, chosen, settings)}
    except KeyboardInterrupt as stop:
        typer.echo(f"plt-eval: interrupted: {str(stop) or 'the same command goes on'}", err=True)
        raise typer.Exit(130) from None
    output_console().print(_splits_table(manifests))
    for built in manifests.values():
        _warn_of_empty_splits(built)


@app.command("show")
def show_data(
    folder: Annotated[Path, typer.Argument(help="A data folder, or a folder of data folders.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every file against its SHA-256.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the manifests as JSON.")] = False,
) -> None:
    """Show what token data is made of.

    Splits, sources, packages and licences. Exit code 2 when a file is missing or differs from the manifest.
    """
    from plt_eval.corpus.show import display_names, open_folders, source_tables, verify_folder
    from plt_eval.tables import output_console

    manifests = open_folders(folder)
    if verify:
        for path, manifest in manifests.items():
            verify_folder(path, manifest)
    if json_:
        _print_json(manifests)
        return
    console = output_console()
    names = display_names(manifests)
    console.print(_splits_table({names[path]: manifest for path, manifest in manifests.items()}))
    for path, manifest in manifests.items():
        for table in source_tables(manifest, names[path]):
            console.print(table)
        typer.echo(f"held out: {manifest.held_out_rule}")
    if verify:
        typer.echo("every file has the SHA-256 that its manifest says")


@dataclass(frozen=True)
class _Settings:
    """The options that --recipe and --source share."""

    held_out: float | None
    shard_tokens: int | None
    workers: int
    command: tuple[str, ...]

    def share(self, kinds: list[str]) -> float | None:
        """--held-out. Raises UserError where it would have no effect."""
        if self.held_out is not None and set(kinds) == {"installed"}:
            raise UserError(
                "--held-out has no effect: installed packages are held out whole; say held_out=SHARE in the source"
            )
        return self.held_out


def _build_sources(texts: list[str], tokenizer: str, out: Path, name: str, settings: _Settings) -> Manifest:
    from plt_eval.corpus import build, parse_source_option
    from plt_eval.corpus.builder import HELD_OUT, SHARD_TOKENS

    sources = [parse_source_option(text) for text in texts]
    held_out = settings.share([source.kind for source in sources])
    return build(
        sources,
        tokenizer,
        out,
        name=name,
        held_out=HELD_OUT if held_out is None else held_out,
        shard_tokens=SHARD_TOKENS if settings.shard_tokens is None else settings.shard_tokens,
        workers=settings.workers,
        command=settings.command,
    )


def _build_recipe(recipe: str, out: Path, settings: _Settings) -> dict[str, Manifest]:
    from plt_eval.corpus import build_recipe_data
    from plt_model.training.recipe import load_recipe

    loaded = load_recipe(recipe)
    return build_recipe_data(
        loaded,
        out,
        held_out=settings.share([str(entry.source.get("kind")) for entry in loaded.data if entry.source is not None]),
        shard_tokens=settings.shard_tokens,
        workers=settings.workers,
        command=settings.command,
    )


def _splits_table(manifests: dict[str, Manifest]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("data", overflow="fold")
    table.add_column("split")
    for heading in ("documents", "bytes", "tokens", "files"):
        table.add_column(heading, justify="right")
    for name, manifest in manifests.items():
        for split, record in manifest.splits.items():
            counts = (record.documents, record.bytes, record.tokens, len(record.shards))
            table.add_row(Text(name), split, *(f"{count:,}" for count in counts))
    return table


def _warn_of_empty_splits(manifest: Manifest) -> None:
    for split, record in manifest.splits.items():
        if not record.documents and (split == "train" or manifest.held_out):
            typer.echo(f"warning: {manifest.name}: no document is in the split {split}", err=True)


def _print_json(manifests: dict[Path, Manifest]) -> None:
    import json

    rows = {str(path): manifest.model_dump(mode="json") for path, manifest in manifests.items()}
    typer.echo(json.dumps(rows, indent=2))
