"""Suites by name.

>>> [suite.name for suite in get_suite("code")]
['humaneval', 'mbpp']
"""

from __future__ import annotations

import difflib

from plt_benchmarks.code import HUMANEVAL, MBPP
from plt_benchmarks.demo import DEMO
from plt_benchmarks.protocols import Suite, SuiteError
from plt_benchmarks.swe.suites import MULTI_SWE, MULTI_SWE_BENCH, SWE, SWE_LITE
from plt_benchmarks.trace.suite import TRACE

_NAMES: dict[str, tuple[Suite, ...]] = {
    "code": (HUMANEVAL, MBPP),
    "humaneval": (HUMANEVAL,),
    "humaneval+": (HUMANEVAL,),
    "mbpp": (MBPP,),
    "mbpp+": (MBPP,),
    "demo": (DEMO,),
    "trace": (TRACE,),
    "swe": (SWE,),
    "swe-lite": (SWE_LITE,),
    "multi-swe": (MULTI_SWE,),
    "multi-swe-bench": (MULTI_SWE_BENCH,),
}


def get_suite(name: str) -> list[Suite]:
    """The suites that `name` stands for, in upper or lower case. Raises SuiteError for an unknown name."""
    found = _NAMES.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), _NAMES, n=2, cutoff=0.5)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise SuiteError(f"unknown suite {name!r}{hint}; known: {', '.join(suite_names())}")
    return list(found)


def all_suites() -> list[Suite]:
    """Every suite once, in the order of listings."""
    return list({id(suite): suite for found in _NAMES.values() for suite in found}.values())


def suite_names() -> list[str]:
    """Every name that get_suite takes."""
    return list(_NAMES)
