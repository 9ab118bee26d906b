"""Which run a user means."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from plt_eval.errors import UserError

if TYPE_CHECKING:
    from plt_eval.store import Run


def find_run(text: str, results: Path) -> Run:
    """The run whose directory, id, or beginning of the id is `text`. Raises UserError for none or several."""
    from plt_eval.store import MANIFEST, open_run

    if (Path(text) / MANIFEST).is_file():
        return open_run(Path(text))
    names = sorted(manifest.parent.name for manifest in results.glob(f"*/{MANIFEST}"))
    if text in names:
        return open_run(results / text)
    matches = [name for name in names if name.startswith(text)]
    if len(matches) == 1:
        return open_run(results / matches[0])
    if matches:
        raise UserError(f"{text!r} is the beginning of {len(matches)} runs: {', '.join(matches)}")
    near = difflib.get_close_matches(text, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else f" (it holds {len(names)} runs)"
    raise UserError(f"no run {text!r} in {results}{hint}")
