"""Ray clusters of this machine, a raylet a node."""

from __future__ import annotations

from contextlib import suppress
from typing import Any


def started(head: dict[str, Any], *nodes: dict[str, Any], tries: int = 3) -> Any:
    """A cluster with that head and those nodes. On a busy machine Ray's daemons may come too late for one another, and
    then a raylet gives up: so it is tried again."""
    from ray.cluster_utils import Cluster

    for last in (*[False] * (tries - 1), True):
        made = Cluster()
        try:
            for options in ({"include_dashboard": False, **head}, *nodes):
                made.add_node(**options)
        except Exception:
            with suppress(Exception):
                made.shutdown()
            if last:
                raise
        else:
            return made
    raise AssertionError("no tries")
