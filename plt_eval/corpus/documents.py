"""What a source yields, which split it belongs to, and when two documents are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from plt_model.training.shards import Split

DEDUP_RULE = "a text is kept once over all sources and both splits; equal by SHA-256 without trailing white space"
HELD_OUT_RULE = (
    "held out when the first 8 bytes of SHA-256('plt-eval held-out 8' | 0 | key), as a fraction of 2**64, are below "
    "the share; the key is SHA-256 of the normalised text, for installed packages the name of the package or "
    "python-stdlib/top-level module, for trace programs the program with its variables renamed and no assertions"
)

_SALT = b"plt-eval held-out 8\0"
"""Of a few, the one that holds out about 4% of what a usual installation has, small and large packages both."""


@dataclass(frozen=True)
class Package:
    """The installed package that a file came from; `unit` is what is held out as a whole."""

    name: str
    version: str
    unit: str


@dataclass(frozen=True)
class Document:
    """One text. `name` is unique in its source and says where it is (a path, a file and line, a number); `size` is its
    share of the source's total, for the progress bar; `held_out` overrides the share of held-out documents; documents
    of equal `key` are held out together (default: the package's unit, or the normalised text)."""

    name: str
    text: str
    licence: str
    size: int
    package: Package | None = None
    held_out: float | None = None
    key: bytes | None = None


@dataclass(frozen=True)
class Rejected:
    """A record that is no document, and why, in a few words that are the same for all of their kind."""

    name: str
    reason: str
    size: int


@dataclass(frozen=True)
class Reading:
    """A source made ready to be read.

    `records(start)` yields its records from number `start` on, always in the same order. `fingerprint` changes when the
    input does, as far as that is seen without reading it. `total` is the sum of the records' sizes, None if unknown.
    """

    location: str
    revision: str | None
    fingerprint: str
    total: int | None
    records: Callable[[int], Iterator[Document | Rejected]]
    left_out: dict[str, int] = field(default_factory=dict)
    """Files of a package beyond the limit of bytes, by package."""
    skipped_packages: dict[str, str] = field(default_factory=dict)


def normalised(text: str) -> bytes:
    """The text as far as it counts for equality: lines ended by one newline, no white space at their ends, nor empty
    lines at the text's. Raises UnicodeEncodeError for lone surrogates."""
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip().encode("utf-8")


def digest(normal: bytes) -> bytes:
    """SHA-256 of a normalised text."""
    return hashlib.sha256(normal).digest()


def split_of(document: Document, normal_digest: bytes, share: float) -> Split:
    """Where a document belongs: decided by its own key alone, so that no other data ever moves it."""
    key = document.key or normal_digest
    if document.package is not None:
        key = document.package.unit.encode("utf-8")
    return "heldout" if fraction(key) < (share if document.held_out is None else document.held_out) else "train"


def fraction(key: bytes) -> float:
    """A number in [0, 1) that only `key` decides."""
    return int.from_bytes(hashlib.sha256(_SALT + key).digest()[:8], "big") / 2**64
