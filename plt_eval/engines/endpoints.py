"""Endpoints that serve one model: which is asked next, which rests, is down or out of service, and what each has done.

    pool = Endpoints(["http://a:8000/v1", "http://b:8000/v1"], at_a_time=8)
    asked = []
    while (endpoint := pool.take(asked)) is not None:
        asked.append(endpoint)
        try:
            answer = ask(endpoint.url)
            pool.answered(endpoint, seconds)
        except Trouble as trouble:
            pool.failed(endpoint, str(trouble))
        finally:
            pool.release(endpoint)

A request goes to the endpoint with the fewest under way for its speed, at most `at_a_time` each; one of a conversation
to where its conversation is, while that has a place. FAILURES failures in a row take an endpoint down (a circuit
breaker): then one request at a time tries it again, after waits that grow, and its first answer brings it back. One
that asks for patience (429, Retry-After) rests and is not down. While another can be asked, neither is; where none can,
all are, as one alone would be. One that refuses what the others take is out of service for good.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from plt_eval.errors import UserError

if TYPE_CHECKING:
    from plt_eval.engines.checkpoint import ServedModel

FAILURES = 3
"""Failures in a row after which an endpoint is down, and refusals of what others took after which it is out."""
SLOWEST = 4.0
"""An endpoint counts as at most so many times slower than the fastest: one slow answer must not starve it for ever."""
NEWEST = 0.2
"""What the newest answer weighs in an endpoint's average seconds an answer."""
RATE_OVER = 50
"""Answers that the rate is measured over."""


LOOPS_HEADER = "X-PLT-Loops"
"""Of an answer of our own servers: how many loops the model runs."""


def served_identity(model: str, checkpoint: ServedModel | None) -> dict[str, Any]:
    """What a run's identity says of the model that endpoints call `model`: no more than that, or what it is by the
    user's word, too."""
    return {"model": model} if checkpoint is None else {**checkpoint.identity(), "api_model": model}


class Closed(Exception):
    """The endpoints are not asked any more."""


@dataclass(eq=False)
class Endpoint:
    """One address, and how it does. `said` is its last trouble, `out` the refusal that put it out of service."""

    url: str
    under_way: int = 0
    answered: int = 0
    failed: int = 0
    said: str = ""
    out: str = ""
    down: bool = False
    trial: bool = False
    """While it is down: a request is trying it."""
    ready_at: float = 0.0
    """Until then it rests, or stays down."""
    seconds: float | None = None
    """Average of an answer."""
    failures: int = 0
    downs: int = 0
    rests: int = 0
    overruled: int = 0
    """In a row: failures, tries while down, rests, refusals of what another one took."""
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RATE_OVER))
    """When the last answers came."""

    def up(self, now: float) -> bool:
        """Neither out, nor down, nor resting."""
        return not self.out and not self.down and now >= self.ready_at

    def due(self, now: float) -> bool:
        """Down, and to be tried again."""
        return self.down and not self.out and not self.trial and now >= self.ready_at

    def state(self, now: float) -> str:
        """In words."""
        if self.out:
            return "out of service"
        if self.down:
            wait = max(0.0, self.ready_at - now)
            return "down, being tried" if self.trial else f"down, tried again in {wait:.0f} s"
        return "up" if now >= self.ready_at else f"resting for {self.ready_at - now:.0f} s"

    def rate(self, now: float) -> str:
        """Answers a second, lately."""
        if len(self.recent) < 2:
            return "-/s"
        speed = len(self.recent) / max(now - self.recent[0], 1e-3)
        return f"{speed:.1f}/s" if speed >= 1 else f"{speed * 60:.1f}/min"


class Endpoints:
    """The endpoints at `urls`. Thread-safe. `backoff_s` is about how long the first wait is, `max_wait_s` the longest;
    `notify` is told of every change of state, where there are several."""

    def __init__(
        self,
        urls: Iterable[str],
        *,
        at_a_time: int,
        backoff_s: float = 1.0,
        max_wait_s: float = 60.0,
        notify: Callable[[str], None],
    ) -> None:
        self.all = tuple(Endpoint(url) for url in urls)
        self._at_a_time = at_a_time
        self._backoff_s = backoff_s
        self._max_wait_s = max_wait_s
        self._notify = notify
        self._jitter = random.Random()
        self._homes: dict[str, Endpoint] = {}
        self._comebacks = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def several(self) -> bool:
        return len(self.all) > 1

    def in_service(self) -> list[Endpoint]:
        """All but those that were put out."""
        return [endpoint for endpoint in self.all if not endpoint.out]

    # --- choosing -----------------------------------------------------------------------------------------

    def take(self, asked: Collection[Endpoint], conversation: str = "") -> Endpoint | None:
        """The endpoint to ask next in a round that has asked `asked`; None when the round is over. Waits for a free
        place. Raises Closed."""
        with self._changed:
            while True:
                if self._closed:
                    raise Closed
                now = time.monotonic()
                left = [endpoint for endpoint in self.in_service() if endpoint not in asked]
                useful = self._useful(left, asked, now)
                if not useful:
                    return None
                free = [endpoint for endpoint in useful if endpoint.under_way < self._at_a_time]
                if free:
                    return self._taken(free, conversation, now)
                waits = [endpoint.ready_at - now for endpoint in left if endpoint.ready_at > now]
                self._changed.wait(min(waits, default=None))

    def _useful(self, left: list[Endpoint], asked: Collection[Endpoint], now: float) -> list[Endpoint]:
        useful = [endpoint for endpoint in left if endpoint.up(now) or endpoint.due(now)]
        if useful or any(endpoint.up(now) for endpoint in asked):
            return useful
        soonest = sorted(left, key=lambda endpoint: endpoint.ready_at)
        down = [endpoint for endpoint in soonest if endpoint.down]
        return down[:1] or ([] if asked else soonest[:1])

    def _taken(self, free: list[Endpoint], conversation: str, now: float) -> Endpoint:
        home = self._homes.get(conversation)
        due = [endpoint for endpoint in free if endpoint.down]
        chosen = home if home in free and home.up(now) else due[0] if due else self._least(free)
        chosen.under_way += 1
        chosen.trial = chosen.down
        return chosen

    def _least(self, free: list[Endpoint]) -> Endpoint:
        """Of those free, the one with the fewest under way for its speed; a new one counts as fast as the fastest."""
        best = min((endpoint.seconds for endpoint in free if endpoint.seconds is not None), default=0.0)

        def load(endpoint: Endpoint) -> tuple[float, int]:
            slower = 1.0 if endpoint.seconds is None or not best else min(endpoint.seconds / best, SLOWEST)
            return (endpoint.under_way + 1) * slower, endpoint.answered

        return min(free, key=load)

    # --- what became of it --------------------------------------------------------------------------------

    def release(self, endpoint: Endpoint) -> None:
        """A request to it has ended, one way or another."""
        with self._changed:
            endpoint.under_way -= 1
            endpoint.trial = False
            self._changed.notify_all()

    def answered(self, endpoint: Endpoint, seconds: float, conversation: str = "") -> None:
        """It answered, after `seconds`: there the conversation goes on."""
        with self._changed:
            if conversation:
                self._homes[conversation] = endpoint
            endpoint.answered += 1
            endpoint.recent.append(time.monotonic())
            endpoint.failures = endpoint.rests = endpoint.overruled = 0
            average = seconds if endpoint.seconds is None else endpoint.seconds
            endpoint.seconds = average + NEWEST * (seconds - average)
            back = self._back(endpoint)
        self._tell(back)

    def failed(self, endpoint: Endpoint, trouble: str, *, surely: bool = False) -> None:
        """It did not answer, or nothing that can be read. `surely` takes it down at once."""
        note = ""
        with self._changed:
            endpoint.failed += 1
            endpoint.failures += 1
            endpoint.said = trouble
            now = time.monotonic()
            known = endpoint.down and now < endpoint.ready_at  # this one was asked before it went down
            if not known and (endpoint.down or surely or endpoint.failures >= FAILURES):
                newly, endpoint.down = not endpoint.down, True
                endpoint.downs += 1
                endpoint.ready_at = now + self._growing(endpoint.downs)
                if newly:
                    others = any(not (other.down or other.out) for other in self.all)
                    then = "the others go on without it" if others else "none is up now, waiting for one"
                    note = f"{endpoint.url} is down ({trouble}); {then}"
        self._tell(note)

    def busy(self, endpoint: Endpoint, trouble: str, wait_s: float | None) -> None:
        """It asked for patience: for `wait_s` seconds, or did not say how long."""
        with self._changed:
            endpoint.failed += 1
            endpoint.failures = 0
            endpoint.said = trouble
            now = time.monotonic()
            back = self._back(endpoint)
            if now >= endpoint.ready_at:
                endpoint.rests += 1
            rest = self._growing(endpoint.rests) if wait_s is None else min(wait_s, self._max_wait_s)
            endpoint.ready_at = max(endpoint.ready_at, now + rest)
        self._tell(back)

    def put_out(self, endpoint: Endpoint, refusal: str) -> None:
        """It refuses what no other try will change: it is not asked again."""
        with self._changed:
            first, endpoint.out = not endpoint.out, endpoint.out or refusal
            endpoint.said = endpoint.out
            more = bool(self.in_service())
            self._changed.notify_all()
        if first and more:
            self._tell(f"{endpoint.url} is out of service, it refused: {refusal}")

    def refused(self, endpoint: Endpoint, refusal: str) -> None:
        """It refused one request for what is in it, and another one took that request."""
        with self._changed:
            endpoint.said = refusal
            endpoint.overruled += 1
            out = endpoint.overruled >= FAILURES
            back = self._back(endpoint)
        self._tell(back)
        if out:
            self.put_out(endpoint, f"{refusal} ({FAILURES} times in a row, and another endpoint took it)")

    def _back(self, endpoint: Endpoint) -> str:
        """It is there: what is to be told if it was down."""
        endpoint.downs = 0
        if not endpoint.down:
            return ""
        endpoint.down, endpoint.ready_at = False, 0.0
        self._comebacks += self.several  # one alone is not asked by all that wait as soon as it has a place for one
        self._changed.notify_all()
        return f"{endpoint.url} answers again"

    # --- waiting ------------------------------------------------------------------------------------------

    def pause(self, seconds: float) -> bool:
        """Wait, but no longer than until one of several endpoints comes back: whether that happened. Raises Closed."""
        with self._changed:
            before = self._comebacks
            back = self._changed.wait_for(lambda: self._closed or self._comebacks != before, timeout=seconds)
            if self._closed:
                raise Closed
            return back

    def close(self) -> None:
        """End all waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _growing(self, number: int) -> float:
        wait = self._backoff_s * 2.0 ** min(number - 1, 30)
        return min(wait, self._max_wait_s) * self._jitter.uniform(0.5, 1.0)

    # --- what is told -------------------------------------------------------------------------------------

    def health(self) -> list[str]:
        """A line an endpoint, for a display that is drawn again and again; none where there is but one."""
        if not self.several:
            return []
        now, width = time.monotonic(), max(len(endpoint.url) for endpoint in self.all)
        with self._changed:
            return [
                f"  {one.url:{width}}  {one.state(now)}, {one.under_way} under way, {one.answered} answered, "
                f"{one.failed} retried, {one.rate(now)}"
                for one in self.all
            ]

    def summary(self) -> list[str]:
        """A line an endpoint, for the end; none where there is but one, or nothing was asked."""
        if not self.several or not any(one.answered or one.failed or one.out for one in self.all):
            return []
        lines = []
        for one in self.all:
            ending = ""
            if one.out or one.down:
                ending = f"; {'out of service' if one.out else 'down'} at the end ({one.said})"
            lines.append(f"{one.url}: {one.answered} answered, {one.failed} retried{ending}")
        return lines

    def troubles(self) -> str:
        """What each said last, in one line."""
        return "; ".join(f"{one.url}: {one.said or 'nothing'}" for one in self.all)

    def _tell(self, note: str) -> None:
        if note and self.several and not self._closed:
            self._notify(note)


# --- addresses ----------------------------------------------------------------------------------------


def checked_endpoints(given: Sequence[str], notify: Callable[[str], None]) -> tuple[str, ...]:
    """The addresses, each once, in the order given. Raises UserError for one that is none or holds a secret."""
    found: dict[tuple[str, str, int | None, str], str] = {}
    for url in map(checked_endpoint, given):
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        place = (parts.scheme, parts.hostname or "", port, parts.path)
        if place in found:
            notify(f"--endpoint {url} was given twice; it is one endpoint")
        found.setdefault(place, url)
    if not found:
        raise UserError("--endpoint: expected an address like http://127.0.0.1:8000/v1")
    return tuple(found.values())


def checked_endpoint(endpoint: str) -> str:
    """The address without a slash at its end. Raises UserError for one that is none, or several, or holds a secret."""
    if ",http" in endpoint or len(endpoint.split()) > 1:
        raise UserError(f"--endpoint {endpoint!r}: expected one address; give --endpoint again for each other one")
    try:
        parts = urlsplit(endpoint)
        port_is_number = parts.port is None or parts.port >= 0
    except ValueError as error:
        raise UserError(f"--endpoint {endpoint!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_number:
        raise UserError(f"--endpoint {endpoint!r}: expected an address like http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            "--endpoint must hold no user, password or query (it is stored with the run); use --api-key-env"
        )
    return endpoint.rstrip("/")


def served_name(endpoints: Sequence[str], served_as: str | None = None) -> str:
    """What stands for the endpoints in a run's identity: `served_as`, or their addresses, whatever their order. Raises
    UserError."""
    if served_as is None:
        return " ".join(sorted(endpoints))
    addresses = "://" in served_as
    parts = served_as.split()
    if not parts or not served_as.isprintable():
        raise UserError(f"--served-as {served_as!r}: expected a name, or the addresses that the run began with")
    return " ".join(sorted(map(checked_endpoint, parts)) if addresses else parts)
