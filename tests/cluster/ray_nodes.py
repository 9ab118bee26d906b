"""Ray clusters of this machine, a raylet a node."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


def added(cluster: Any, options: dict[str, Any], tries: int = 3) -> Any:
    """One more node of a running cluster."""
    for _ in range(tries - 1):
        with suppress(Exception):
            return cluster.add_node(**options)
    return cluster.add_node(**options)


@contextmanager
def started(head: dict[str, Any], *nodes: dict[str, Any], tries: int = 3) -> Iterator[Any]:
    """A cluster with that head and those nodes. On a busy machine Ray's daemons may come too late for one another, and
    then a raylet gives up: so it is tried again. Afterwards SIGTERM does what it did before, not what Ray wants."""
    from ray.cluster_utils import Cluster

    before = signal.getsignal(signal.SIGTERM)
    try:
        for tries_left in reversed(range(tries)):
            made: Any = Cluster()
            try:
                for options in ({"include_dashboard": False, **head}, *nodes):
                    made.add_node(**options)
                break
            except Exception:
                with suppress(Exception):
                    made.shutdown()
                if not tries_left:
                    raise
        yield made
        made.shutdown()
    finally:
        signal.signal(signal.SIGTERM, before)
