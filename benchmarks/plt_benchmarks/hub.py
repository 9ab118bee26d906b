"""Data sets of the Hugging Face hub: where its cache keeps them, and their files at a commit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from plt_benchmarks.protocols import SuiteError

ANSWER_S = 10
"""How long the hub may take to answer, in seconds."""


def hub_url(repo: str) -> str:
    """The data set's page."""
    return f"https://huggingface.co/datasets/{repo}"


def switched_off() -> str | None:
    """The variable that keeps the hub's libraries from asking it, None where none does."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), None)


def hub_cache(repo: str) -> Path:
    """Where the hub's own cache keeps the data set, whether it is there or not."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE, f"datasets--{repo.replace('/', '--')}")


def fetch_hub(repo: str, patterns: Sequence[str], *, revision: str | None = None, instead: str) -> tuple[Path, str]:
    """The folder with the data set's files that match `patterns`, and the commit that they are of: the one that
    `revision` names, or the newest. Raises SuiteError, which ends with `instead`, what a user may do otherwise."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        # Asked first: this fails at once where a download tries again and again.
        commit = HfApi().dataset_info(repo, revision=revision, timeout=ANSWER_S).sha or revision
        folder = snapshot_download(repo, repo_type="dataset", revision=commit, allow_patterns=list(patterns))
    except Exception as error:  # the hub's own errors, and those of whichever HTTP library its release uses
        why = " ".join(str(error).split())[:200] or type(error).__name__
        at = f" at {revision[:7]}" if revision else ""
        raise SuiteError(f"cannot fetch {hub_url(repo)}{at}: {why}; {instead}") from None
    return Path(folder), str(commit)
