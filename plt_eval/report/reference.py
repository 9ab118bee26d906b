"""The published numbers: what arXiv 2606.18023 and 2510.24824 print, to stand beside our own and never among them.

    published("table3")                                   one file of results/reference/, as a table
    published("figure7", quantity="peak_loop_share")      only one quantity of it

The files' one home is results/reference/ of the project (its README.md describes the columns); a wheel carries them as
plt_eval/report/published/. Values are numbers here and keep what was printed in the column `printed`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

NAMES = ("table2", "table3", "table4", "figure3", "figure4", "figure7", "plt")
"""The files, without their ".csv"."""

COLUMNS = ("source", "item", "model", "loops", "loop", "quantity", "unit", "value")

LABEL = "published (7B)"
"""What every published number of LoopCoder-v2 is called in figures and tables."""

ORIGINS = ("own", "published")
"""The values of the column `origin` in every table of plotted data: measured by this project, or printed in a paper."""


def reference_folder() -> Path:
    """Where the files of this installation are: inside the package for a wheel, the project's own for a checkout."""
    installed = Path(__file__).with_name("published")
    return installed if installed.is_dir() else Path(__file__).parents[2] / "results" / "reference"


def published(name: str, *, quantity: str | None = None) -> pd.DataFrame:
    """The rows of one file, in its order, with the columns COLUMNS and `printed`.

    `loops` and `loop` are Int64 (NA where the paper names none), `value` is float64, the rest text. Raises KeyError for
    a `name` that is none of NAMES, FileNotFoundError for an installation that lacks its files.
    """
    import pandas as pd

    if name not in NAMES:
        raise KeyError(f"{name}: expected one of {', '.join(NAMES)}")
    rows = pd.read_csv(reference_folder() / f"{name}.csv", dtype=str, keep_default_na=False)
    rows["printed"] = rows["value"]
    rows["value"] = rows["value"].astype(float)
    for column in ("loops", "loop"):
        rows[column] = pd.to_numeric(rows[column].replace("", None)).astype("Int64")
    if quantity is not None:
        rows = rows[rows["quantity"] == quantity]
    return rows.reset_index(drop=True)
