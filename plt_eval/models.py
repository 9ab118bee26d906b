"""What `--model` may say: a checkpoint folder, or the name of a family that the package brings along.

A family holds one checkpoint for each loop count it was trained for, alike in everything else:

    plt_eval/bundled/<family>/family.json     Family: its name, its members, where it comes from
    plt_eval/bundled/<family>/r<R>/           the member that was trained with R loops: an ordinary checkpoint folder

`plt-tiny:r3` is one member; `plt-tiny` alone is, at each loop count, the member trained with it:

    resolve_models("plt-tiny", [1, 3])    the members r1 and r3, each at its own loop count
    resolve_models("plt-tiny:r3", [2])    the member r3, run at 2 loops
    resolve_models("./plt-tiny", None)    the folder of that name: only a path, with its slash, is never a name
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from plt_eval.errors import UserError

BUNDLED = Path(__file__).with_name("bundled")
"""Where the families of this installation are."""

DEFAULT_FAMILY = "plt-tiny"
"""The family that is meant where no model is named."""

_MEMBER = re.compile(r"(?P<family>[^:/\\]+)(?::r(?P<loops>[1-9]\d{0,3}))?")


class Family(BaseModel):
    """family.json. `loops` are its members, in the order of tables; the other fields are for people."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    loops: tuple[int, ...] = Field(min_length=1)
    summary: str = ""
    recipe: str = ""
    """The recipe that trained it: its name, or a file of the project."""

    def members(self) -> str:
        """As in "plt-tiny:r1, plt-tiny:r2"."""
        return ", ".join(f"{self.name}:r{loops}" for loops in self.loops)


@dataclass(frozen=True)
class ResolvedModel:
    """A checkpoint to run. `label` is its name in records and tables: "plt-tiny:r3", or a folder's own name.
    `loops` None means the checkpoint's own count; `family` is None for a folder that a user gave."""

    folder: Path
    label: str
    loops: int | None
    family: str | None = None


def bundled_families(root: Path | None = None) -> dict[str, Family]:
    """The families below `root` (default: this installation's), by name. Raises UserError for a damaged one."""
    root = BUNDLED if root is None else root
    families = (_read_family(path) for path in sorted(root.glob("*/family.json")))
    return {family.name: family for family in families}


def names_family(name: str, *, root: Path | None = None) -> bool:
    """Whether `name` is that of a bundled family, with or without a member: then it is never a folder."""
    return name.partition(":")[0] in bundled_families(root)


def resolve_models(name: str, loops: Sequence[int] | None, *, root: Path | None = None) -> list[ResolvedModel]:
    """What to run for `--model name --loops loops`, one for each loop count, in the order asked for.

    Without `loops`, a family stands for all its members and anything else for itself at its own loop count. Raises
    UserError for a member that the family does not have, and for a name that is neither bundled nor a folder.
    """
    if loops is not None:
        return [resolve_model(name, count, root=root) for count in loops]
    family = bundled_families(root).get(name)
    if family is None:
        return [resolve_model(name, None, root=root)]
    return [resolve_model(name, count, root=root) for count in family.loops]


def resolve_model(name: str, loops: int | None = None, *, root: Path | None = None) -> ResolvedModel:
    """What to run for `name` at `loops`. Raises UserError as resolve_models does, and for a family without a loop
    count, which stands for several models."""
    families = bundled_families(root)
    match = _MEMBER.fullmatch(name)
    family = families.get(name.partition(":")[0])
    if family is None:
        folder = Path(name)
        if not name:
            raise UserError("--model is empty: expected a checkpoint folder or the name of a bundled model")
        if not folder.is_dir():
            raise UserError(f"--model {no_such_model(name, root=root)}")
        return ResolvedModel(folder, folder.resolve().name, loops)
    if match is None:
        raise UserError(f"--model {name}: a member of {family.name} is one of {family.members()}")
    if match["loops"] is None and loops is None:
        raise UserError(f"--model {name}: that is a family of {len(family.loops)}; choose one of {family.members()}")
    trained = int(match["loops"] or loops or 0)
    if trained not in family.loops:
        asked = f"--model {name}" if match["loops"] else f"--model {name} at {trained} loops"
        raise UserError(f"{asked}: no such member of the family; it has {family.members()}")
    folder = (BUNDLED if root is None else root) / family.name / f"r{trained}"
    return ResolvedModel(folder, f"{family.name}:r{trained}", loops or trained, family.name)


def no_such_model(name: str, *, root: Path | None = None) -> str:
    """The line for a `name` that is no folder and no bundled name, with the names that come near."""
    families = bundled_families(root)
    bare, _, member = name.partition(":")
    line = f"{name}: no such model folder"
    if os.sep in name or not families:
        return line
    near = difflib.get_close_matches(bare.lower(), families, n=2, cutoff=0.5)
    hints = [f"{family}:{member}" if member else family for family in near]
    guess = f" (did you mean {' or '.join(hints)}?)" if hints else ""
    return f"{line}, nor a bundled model{guess}; bundled: {', '.join(families)}"


def _read_family(path: Path) -> Family:
    try:
        family = Family.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise UserError(f"{path}: field {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}") from error
    if family.name != path.parent.name:
        raise UserError(f"{path}: the name is {family.name!r}, but the folder is {path.parent.name!r}")
    missing = [loops for loops in family.loops if not (path.parent / f"r{loops}" / "config.json").is_file()]
    if missing:
        raise UserError(f"{path}: names the member r{missing[0]}, but r{missing[0]}/config.json does not exist")
    return family
