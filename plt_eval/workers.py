"""Threads for work that waits on others: judging in a sandbox, asking a server.

They are daemons: a process that was told to stop does not wait for a request or a judgement that takes minutes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class WorkerPool(Generic[T]):
    """`workers` threads that call `work(item)` for what is submitted; at most `backlog` items wait.

    The first exception of `work` stops the pool and is raised by the next `submit` or `drain`.
    """

    def __init__(self, work: Callable[[T], None], *, workers: int, backlog: int) -> None:
        self._work = work
        self._backlog = backlog
        self._waiting: deque[T] = deque()
        self._busy = 0
        self._stopped = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._workers = 0
        self.grow(workers)

    def grow(self, workers: int) -> None:
        """Have at least so many threads from here on."""
        with self._changed:
            new = range(self._workers, workers)
            self._workers = max(self._workers, workers)
        for number in new:
            threading.Thread(target=self._loop, name=f"worker-{number}", daemon=True).start()

    def submit(self, item: T) -> None:
        """Queue `item`; waits while the backlog is full. Raises the first failure of any item."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < self._backlog or self._stopped)
            self._raise_failure()
            self._waiting.append(item)
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until everything submitted is done. Raises the first failure of any item."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not (self._waiting or self._busy))
            self._raise_failure()

    def stop(self, grace_s: float = 0.0) -> None:
        """Forget what waits, and give what is being worked on at most `grace_s` seconds to end."""
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._changed.notify_all()
            deadline = time.monotonic() + grace_s
            self._changed.wait_for(lambda: not self._busy, timeout=max(0.0, deadline - time.monotonic()))

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        assert not self._stopped, "the pool was stopped"

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if self._stopped:
                    return
                item = self._waiting.popleft()
                self._busy += 1
                self._changed.notify_all()
            failure: BaseException | None = None
            try:
                self._work(item)
            except BaseException as error:  # handed to the thread that submits
                failure = error
            with self._changed:
                self._busy -= 1
                if failure is not None and self._failure is None:
                    self._failure, self._stopped = failure, True
                    self._waiting.clear()
                self._changed.notify_all()


def as_completed(function: Callable[[T], R], items: Iterable[T], *, workers: int) -> Iterator[R]:
    """`function(item)` of every item, each as soon as it is there, with at most `workers` under way or unread.

    Takes items only as fast as it can start them. Raises the first exception of `function`. Closing the iterator
    abandons what is under way.
    """
    results: SimpleQueue[R | _Failure] = SimpleQueue()

    def work(item: T) -> None:
        try:
            results.put(function(item))
        except BaseException as error:  # handed to the thread that reads
            results.put(_Failure(error))

    pool: WorkerPool[T] = WorkerPool(work, workers=workers, backlog=workers)
    source = iter(items)
    pending = 0
    exhausted = False
    try:
        while pending or not exhausted:
            while pending < workers and not exhausted:
                try:
                    pool.submit(next(source))
                except StopIteration:
                    exhausted = True
                else:
                    pending += 1
            if pending:
                result = results.get()
                pending -= 1
                if isinstance(result, _Failure):
                    raise result.error
                yield result
    finally:
        pool.stop()


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error
