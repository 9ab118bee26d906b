"""Which licences let anybody train on the text: permissive ones, and nothing that has to be guessed.

package_licence(importlib.metadata.metadata("rich"))       # "MIT"
is_permissive("Apache-2.0 OR GPL-3.0-only")                # True: one may choose the first
is_permissive("MIT AND MPL-2.0")                           # False: both hold
"""

from __future__ import annotations

import re
from typing import Protocol

PERMISSIVE = frozenset(
    {
        "0bsd",
        "apache-2.0",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsl-1.0",
        "cc0-1.0",
        "cnri-python",
        "isc",
        "mit",
        "mit-0",
        "psf-2.0",
        "python-2.0",
        "unlicense",
        "zlib",
    }
)
"""SPDX identifiers in lower case."""

_CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "MIT No Attribution License (MIT-0)": "MIT-0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
    "Zero-Clause BSD (0BSD)": "0BSD",
    "zlib/libpng License": "Zlib",
}

_APPROVALS = ("OSI Approved", "DFSG approved")
"""Classifiers that praise a licence without naming it."""

_SPELLINGS = {
    "2-clause bsd license": "BSD-2-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "apache": "Apache-2.0",
    "apache 2": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "bsd 2-clause license": "BSD-2-Clause",
    "bsd 3-clause": "BSD-3-Clause",
    "bsd 3-clause license": "BSD-3-Clause",
    "isc license": "ISC",
    "mit license": "MIT",
    "psf": "PSF-2.0",
    "python software foundation license": "PSF-2.0",
}


class Metadata(Protocol):
    """What importlib.metadata gives for a distribution."""

    def get_all(self, name: str, failobj: None = None) -> list[str] | None: ...


def package_licence(metadata: Metadata) -> str | None:
    """The licence that a package declares, as an SPDX expression where it is known: from License-Expression, else from
    its licence classifiers, else from the License field. None when it declares none.

    Classifiers that name several licences are all taken to hold. "BSD" without a number of clauses is read as
    BSD-3-Clause, its stricter common form.
    """
    expression = _first(metadata, "License-Expression")
    if expression:
        return expression
    declared = [value for value in metadata.get_all("Classifier") or [] if value.startswith("License ::")]
    names = [value.rsplit("::", 1)[1].strip() for value in declared]
    names = [name for name in names if name not in _APPROVALS]
    if names:
        return " AND ".join(dict.fromkeys(_CLASSIFIERS.get(name, _as_identifier(name)) for name in names))
    text = _first(metadata, "License")
    if not text or "\n" in text.strip():
        return None  # a whole licence text is not a name
    return _SPELLINGS.get(text.strip().lower(), text.strip())


def is_permissive(licence: str) -> bool:
    """Whether an SPDX expression (or a licence's usual name) certainly allows any use with at most a notice kept:
    of "A AND B" both must, of "A OR B" one. False for anything not understood."""
    try:
        tokens = re.findall(r"\(|\)|[^\s()]+", _SPELLINGS.get(licence.strip().lower(), licence))
        verdict, rest = _either(tokens)
    except IndexError:
        return False
    return verdict and not rest


def _either(tokens: list[str]) -> tuple[bool, list[str]]:
    left, tokens = _both(tokens)
    while tokens and tokens[0].upper() == "OR":
        right, tokens = _both(tokens[1:])
        left = left or right
    return left, tokens


def _both(tokens: list[str]) -> tuple[bool, list[str]]:
    left, tokens = _one(tokens)
    while tokens and tokens[0].upper() == "AND":
        right, tokens = _one(tokens[1:])
        left = left and right
    return left, tokens


def _one(tokens: list[str]) -> tuple[bool, list[str]]:
    head, tokens = tokens[0], tokens[1:]
    if head == "(":
        inner, tokens = _either(tokens)
        if tokens[0] != ")":
            raise IndexError
        return inner, tokens[1:]
    if tokens and tokens[0].upper() == "WITH":
        tokens = tokens[2:]  # an exception only ever adds permissions
    return head.lower() in PERMISSIVE, tokens


def _first(metadata: Metadata, name: str) -> str | None:
    values = metadata.get_all(name)
    return values[0] if values else None


def _as_identifier(name: str) -> str:
    """One word, so that an unknown name cannot be read as an expression."""
    return "LicenseRef-" + re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
