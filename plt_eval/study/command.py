"""What `plt-eval study` does with its options: check them, run the study, print its table."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from plt_eval.errors import UserError
from plt_eval.study.plan import (
    DIAGNOSES,
    DIAGNOSIS_SAMPLES,
    QUICK,
    QUICK_DIAGNOSIS_SAMPLES,
    QUICK_HELDOUT_TOKENS,
    QUICK_LIMIT,
    StudyPlan,
)
from plt_eval.study.records import SUMMARY

HELDOUT_TOKENS = 200_000
MOST_SEEDS = 100


@dataclass(frozen=True)
class StudyOptions:
    """The options of `plt-eval study`, by name. None means: not given."""

    recipe: str | None = None
    loops: str = "1-4"
    out: Path | None = None
    seeds: str | None = None
    suites: tuple[str, ...] = ()
    data: Path | None = None
    quick: bool = False
    limit: int | None = None
    heldout_tokens: int | None = None
    diagnosis_samples: int | None = None
    context: int = 4096
    sandbox: str = "bubblewrap"
    sandbox_image: str | None = None


def report_study(options: StudyOptions, *, as_json: bool) -> bool:
    """Do the study, print its table (or JSON) to stdout, and say whether samples are missing.
    Raises what run_study does; on Ctrl-C says how to go on, and exits with 130."""
    import typer
    from rich.console import Console

    plan = make_plan(options)
    try:
        from plt_eval.study.run import run_study

        study = run_study(plan, Console(stderr=True, highlight=False))
    except KeyboardInterrupt as stop:
        typer.echo(f"plt-eval: interrupted: {str(stop) or 'the same command goes on'}", err=True)
        raise typer.Exit(130) from None
    if as_json:
        print(study.model_dump_json(indent=2))
    else:
        from plt_eval.study.summary import study_table
        from plt_eval.tables import output_console

        output_console().print(study_table(study))
        typer.echo(f"in words and files: {plan.out / SUMMARY}; every sample: plt-eval ls --results {plan.runs}")
        if any(variant.diagnosis for variant in study.variants):
            typer.echo(f"every loop: plt-eval ls --results {plan.out / DIAGNOSES}")
    return any(suite.missing for variant in study.variants for suite in variant.suites.values())


def make_plan(options: StudyOptions) -> StudyPlan:
    """The plan that the options ask for. Raises UserError for options that contradict or miss each other."""
    from plt_eval.cli.options import parse_loops

    if options.quick and options.recipe not in (None, QUICK):
        raise UserError(f"--quick is the recipe {QUICK}: it cannot be had with --recipe {options.recipe}")
    recipe = QUICK if options.quick else options.recipe
    if recipe is None:
        raise UserError("--recipe is missing: give a recipe's file or name, or --quick")
    if options.sandbox_image is not None and options.sandbox != "docker":
        raise UserError(f"--sandbox-image has no effect with --sandbox {options.sandbox}: it belongs to docker")
    opened = QUICK_DIAGNOSIS_SAMPLES if options.quick else DIAGNOSIS_SAMPLES
    limit, tokens = (QUICK_LIMIT, QUICK_HELDOUT_TOKENS) if options.quick else (None, HELDOUT_TOKENS)
    return StudyPlan(
        recipe=recipe,
        out=options.out or Path("results/studies") / Path(recipe).name.removesuffix(".yaml"),
        loops=tuple(parse_loops(options.loops)),
        seeds=None if options.seeds is None else parse_seeds(options.seeds),
        suites=tuple(dict.fromkeys(options.suites)) or ("trace",),
        data=options.data,
        limit=limit if options.limit is None else options.limit,
        diagnosis_samples=opened if options.diagnosis_samples is None else options.diagnosis_samples,
        heldout_tokens=tokens if options.heldout_tokens is None else options.heldout_tokens,
        context=options.context,
        sandbox=options.sandbox,
        sandbox_image=options.sandbox_image,
        command=("plt-eval", *sys.argv[1:]),
    )


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "0,1,2" or "0-2" or both, each seed once, in the order given. Raises UserError."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part, re.ASCII)
        if match is None:
            raise UserError(f'--seeds {text!r}: {part.strip()!r} is no seed; expected e.g. "0", "0,1,2" or "0-2"')
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < first + MOST_SEEDS:
            raise UserError(f"--seeds {text!r}: {part.strip()!r} is not rising, or more than {MOST_SEEDS} seeds")
        seeds += range(first, last + 1)
    return tuple(dict.fromkeys(seeds))
