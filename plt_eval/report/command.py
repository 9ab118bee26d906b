"""What `plt-eval figures` does with its options: find the runs, draw, write, and say what was left out.

    draw_everything(FiguresOptions(results=Path("results"), out=Path("figures")), say=print)

writes for each figure fig2.pdf, fig2.png and fig2.csv (what is plotted), for each table table2.csv, .md and .tex, and
sources.json: the runs behind them. The same runs give the same bytes.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from plt_eval.errors import UserError
from plt_eval.journal import naming_full_disk

if TYPE_CHECKING:
    from plt_eval.report.collect import Selection
    from plt_eval.report.figures import LoopFigure
    from plt_eval.report.tables import PaperTable

Say = Callable[[str], None]

SOURCES = "sources.json"
TABLE_FORMS = ("csv", "md", "tex")


@dataclass(frozen=True)
class FiguresOptions:
    """The options of `plt-eval figures`, by name. `only` and `formats` are comma-separated, "" means: not given."""

    results: Path = Path("results")
    out: Path = Path("figures")
    models: tuple[str, ...] = ()
    only: str = ""
    formats: str = "pdf,png"


def draw_everything(options: FiguresOptions, *, say: Say, warn: Say) -> None:
    """Write the figures and tables that the runs at hand allow. `say` gets a line for each written or left out, `warn`
    one for each run that cannot be read. Raises UserError for options that name nothing, and when nothing can be
    written to --out."""
    from plt_eval.report import style
    from plt_eval.report.collect import collect
    from plt_eval.report.figures import FIGURES
    from plt_eval.report.tables import TABLES

    wanted = _chosen("--only", options.only, [*FIGURES, *TABLES])
    formats = _chosen("--format", options.formats, style.FORMATS)
    selection = collect(options.results, options.models, problem=lambda error: warn(str(error)))
    for note in selection.notes:
        say(note)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"--out {options.out}: a file, expected a folder") from None
    with naming_full_disk(options.out):
        for name in wanted:
            if name in FIGURES:
                _write_figure(FIGURES[name], selection, options.out, formats, say)
            else:
                _write_table(TABLES[name](selection), selection, options.out, say)
        (options.out / SOURCES).write_text(sources(selection), encoding="utf-8")


def _chosen(flag: str, text: str, names: Sequence[str]) -> list[str]:
    """The comma-separated names of `text`, in the order of `names`; all of them for an empty text."""
    asked = [part.strip() for part in text.split(",")] if text.strip() else list(names)
    for name in asked:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"{flag} {name!r}: expected some of {', '.join(names)}{hint}")
    return [name for name in names if name in asked]


def _write_figure(figure: LoopFigure, selection: Selection, out: Path, formats: Sequence[str], say: Say) -> None:
    from plt_eval.report import style
    from plt_eval.report.figures import NoData

    try:
        data = figure.prepare(selection.diagnoses, selection.name)
    except NoData as reason:
        say(f"{figure.name} left out: {reason}; make it: {diagnose_command(selection)}{_old(out, figure.name)}")
        return
    with style.drawing():
        drawn = style.root_figure(figure.draw(data))
    for form in formats:
        style.save(drawn, out / f"{figure.name}.{form}")
    table = data.to_csv(index=False, float_format="%.10g", lineterminator="\n")
    (out / f"{figure.name}.csv").write_text(table, encoding="utf-8")
    say(f"{out / figure.name}.{{{','.join([*formats, 'csv'])}}}: {figure.title}")


def _write_table(table: PaperTable, selection: Selection, out: Path, say: Say) -> None:
    texts = {"csv": table.csv(), "md": table.markdown(), "tex": table.latex()}
    for form in TABLE_FORMS:
        (out / f"{table.name}.{form}").write_text(texts[form], encoding="utf-8")
    say(f"{out / table.name}.{{{','.join(TABLE_FORMS)}}}: {table.title.lower()}")
    if table.missing is not None:
        say(f"{table.name} holds published numbers only: {table.missing}; make own ones: {_command(table, selection)}")


def _command(table: PaperTable, selection: Selection) -> str:
    if table.name == "table3":
        return diagnose_command(selection)
    if table.name == "table4":
        return "plt-eval run --suite SUITE --model NAME-instruct, and the same for NAME-thinking"
    return f"plt-eval run --suite trace --model {_model(selection)} --loops 1-4"


def diagnose_command(selection: Selection) -> str:
    """What makes the diagnoses that a figure lacks."""
    return f"plt-eval diagnose --model {_model(selection)} --loops 1-4"


def _model(selection: Selection) -> str:
    return selection.name if selection.name and "," not in selection.name else "MODEL"


def _old(out: Path, name: str) -> str:
    """A word on files of an earlier call that still lie there."""
    old = sorted(path.name for path in out.glob(f"{name}.*"))
    return f" ({', '.join(old)} in {out} are from an earlier call)" if old else ""


def sources(selection: Selection) -> str:
    """sources.json: the model, the run ids behind the figures by loop count (and suite), the study, and the notes."""
    found = {
        "model": selection.name,
        "diagnoses": {str(loops): one.manifest.run_id for loops, one in selection.diagnoses.items()},
        "evaluations": {
            suite: {str(loops): run.manifest.run_id for loops, run in by_loops.items()}
            for suite, by_loops in selection.runs.items()
        },
        "study": None if selection.study is None else selection.study.folder.resolve().name,
        "notes": list(selection.notes),
    }
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"
