"""What a study is to do, and the folder that it does it in.

OUT/study.json, OUT/summary.md         what came out; see records.py
OUT/data/<entry>/                      token data, as `plt-eval data build` writes them (or --data elsewhere)
OUT/train/r<R>-s<seed>/                one training; its model in model/
OUT/heldout/r<R>-s<seed>-<entry>.*     scores of held-out documents, and what they were measured with
OUT/runs/                              runs of suites, readable by `plt-eval ls --results OUT/runs`
OUT/diagnosis/                         each model's loops, opened, readable by `plt-eval ls --results OUT/diagnosis`
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from plt_eval.errors import UserError
from plt_eval.study.records import STUDY, read_study

LOCK = "lock"
DIAGNOSES = "diagnosis"
QUICK = "quick"
"""The recipe of --quick."""

QUICK_LIMIT, QUICK_HELDOUT_TOKENS, QUICK_DIAGNOSIS_SAMPLES = 170, 60_000, 64
"""Its problems a suite, held-out tokens an entry, and texts to open loops on: minutes on two cores for four loop
counts."""

DIAGNOSIS_SAMPLES = 200
"""Texts on which each model's loops are opened."""


@dataclass(frozen=True)
class StudyPlan:
    """`recipe` is a file or a bundled name, `loops` and `seeds` what it is trained at (None: the recipe's own seed).
    `limit` takes the first so many problems of each suite (None: all), `heldout_tokens` at most as many held-out tokens
    of each entry; `diagnosis_samples` is the number of held-out texts on which each model's loops are opened (0: they
    are not); `context` is the length at which caches are compared, in tokens; `data` None is OUT/data."""

    recipe: str
    out: Path
    loops: tuple[int, ...] = (1, 2, 3, 4)
    seeds: tuple[int, ...] | None = None
    suites: tuple[str, ...] = ("trace",)
    data: Path | None = None
    limit: int | None = None
    heldout_tokens: int = 200_000
    diagnosis_samples: int = DIAGNOSIS_SAMPLES
    context: int = 4096
    sandbox: str = "bubblewrap"
    sandbox_image: str | None = None
    command: tuple[str, ...] = ()

    @property
    def data_folder(self) -> Path:
        return self.out / "data" if self.data is None else self.data

    @property
    def runs(self) -> Path:
        return self.out / "runs"

    def training(self, loops: int, seed: int) -> Path:
        """The folder of one training."""
        return self.out / "train" / f"r{loops}-s{seed}"


def check_folder(out: Path, recipe_sha256: str, recipe_name: str) -> None:
    """Refuse a folder that is another recipe's, or that holds anything but a study. Raises UserError."""
    if not out.exists():
        return
    if (out / STUDY).exists():
        found = read_study(out)
        if found.recipe_sha256 != recipe_sha256:
            raise UserError(
                f"--out {out} is a study of another recipe ({found.recipe.get('name')}, {found.recipe_sha256[:12]}; "
                f"asked for {recipe_name}, {recipe_sha256[:12]}): choose another --out"
            )
        return
    if not out.is_dir() or any(path.name not in (LOCK, "data") for path in out.iterdir()):
        raise UserError(f"--out {out} exists and is no study (it has no {STUDY}): choose another --out")


@contextmanager
def held(out: Path) -> Iterator[None]:
    """The folder is this process' alone while open. Raises UserError when another process works in it."""
    import filelock

    out.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=1.0, poll_interval=0.05)
    except filelock.Timeout:
        raise UserError(f"--out {out} is being written by another process; wait for it or stop it") from None
    try:
        yield
    finally:
        lock.release()
