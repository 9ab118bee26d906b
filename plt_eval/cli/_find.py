"""Which run a user means."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from plt_eval.errors import UserError

if TYPE_CHECKING:
    from plt_eval.store import Run


def find_run(text: str, results: Path) -> Run:
    """The evaluation whose directory, id, or beginning of the id is `text`. Raises UserError for none or several, and
    for a diagnosis."""
    from plt_eval.store import open_run

    return open_run(find_folder(text, results))


def find_folder(text: str, results: Path) -> Path:
    """The directory of the run, of whatever kind, that `text` names as in find_run. Raises UserError."""
    from plt_eval.store import MANIFEST

    if (Path(text) / MANIFEST).is_file():
        return Path(text)
    names = sorted(manifest.parent.name for manifest in results.glob(f"*/{MANIFEST}"))
    if text in names:
        return results / text
    matches = [name for name in names if name.startswith(text)]
    if len(matches) == 1:
        return results / matches[0]
    if matches:
        raise UserError(f"{text!r} is the beginning of {len(matches)} runs: {', '.join(matches)}")
    near = difflib.get_close_matches(text, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else f" (it holds {len(names)} runs)"
    raise UserError(f"no run {text!r} in {results}{hint}")
