"""A Ray cluster of two machines (two raylets on this one), kept for all tests of this folder."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.extend(str(HERE.parent / folder) for folder in ("cluster", "eval", "benchmarks"))


from ray_nodes import started  # noqa: E402  (the path comes first)
from toy_cluster import SMALL  # noqa: E402


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The cluster; this process is connected to it. Machines may be added, and removed again."""
    pytest.importorskip("ray", reason="needs ray: pip install 'plt-eval[ray]'")
    from plt_eval.cluster.connection import connect

    with started(SMALL, SMALL) as made:
        folder = Path.cwd()
        os.chdir(tmp_path_factory.mktemp("cwd"))  # Ray adds the working directory to where machines import from
        made.connection = connect(made.address, at_once=1)
        os.chdir(folder)
        yield made
        made.connection.close()
    logging.getLogger("ray").handlers.clear()
