"""Suites by name.

>>> [suite.name for suite in get_suite("code")]
['humaneval', 'mbpp']

A name may be followed by a selection, for suites that have parts to choose from: `multilingual:js,java`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from plt_benchmarks.bigcodebench.environments import FULL as BIGCODEBENCH_ENVIRONMENT
from plt_benchmarks.bigcodebench.environments import SMALL as BIGCODEBENCH_SMALL_ENVIRONMENT
from plt_benchmarks.bigcodebench.suites import (
    BIGCODEBENCH,
    BIGCODEBENCH_HARD,
    BIGCODEBENCH_HARD_INSTRUCT,
    BIGCODEBENCH_INSTRUCT,
)
from plt_benchmarks.code import HUMANEVAL, MBPP
from plt_benchmarks.cruxeval import CRUXEVAL_I, CRUXEVAL_I_COT, CRUXEVAL_O, CRUXEVAL_O_COT
from plt_benchmarks.demo import DEMO
from plt_benchmarks.eleuther import chosen_tasks
from plt_benchmarks.environments import Environment
from plt_benchmarks.livecodebench.suites import LCB_NAMES, LCB_OFFICIAL, make_lcb
from plt_benchmarks.mind2web import MIND2WEB
from plt_benchmarks.multilingual.suite import chosen_languages
from plt_benchmarks.options import SuiteOptions
from plt_benchmarks.protocols import Suite, SuiteError
from plt_benchmarks.swe.suites import MULTI_SWE, MULTI_SWE_BENCH, SWE, SWE_LITE
from plt_benchmarks.terminal import TERMINAL, TERMINAL_2, TERMINAL_2_ENVIRONMENT, TERMINAL_ENVIRONMENT
from plt_benchmarks.tools.package import ENVIRONMENT as TOOLS_ENVIRONMENT
from plt_benchmarks.tools.suite import tools_suites
from plt_benchmarks.trace.suite import TRACE

_NAMES: dict[str, tuple[Suite, ...]] = {
    "code": (HUMANEVAL, MBPP),
    "humaneval": (HUMANEVAL,),
    "humaneval+": (HUMANEVAL,),
    "mbpp": (MBPP,),
    "mbpp+": (MBPP,),
    "demo": (DEMO,),
    "trace": (TRACE,),
    "cruxeval": (CRUXEVAL_I, CRUXEVAL_O, CRUXEVAL_I_COT, CRUXEVAL_O_COT),
    "cruxeval-i": (CRUXEVAL_I,),
    "cruxeval-o": (CRUXEVAL_O,),
    "cruxeval-i-cot": (CRUXEVAL_I_COT,),
    "cruxeval-o-cot": (CRUXEVAL_O_COT,),
    "bigcodebench": (BIGCODEBENCH,),
    "bigcodebench-instruct": (BIGCODEBENCH_INSTRUCT,),
    "bigcodebench-hard": (BIGCODEBENCH_HARD,),
    "bigcodebench-hard-instruct": (BIGCODEBENCH_HARD_INSTRUCT,),
    "swe": (SWE,),
    "swe-lite": (SWE_LITE,),
    "multi-swe": (MULTI_SWE,),
    "multi-swe-bench": (MULTI_SWE_BENCH,),
    "terminal": (TERMINAL,),
    "terminal-2": (TERMINAL_2,),
    "mind2web": (MIND2WEB,),
}
"""Suites that are as they are."""

_CHOSEN: dict[str, Callable[[str, str | None, SuiteOptions], list[Suite]]] = {
    **dict.fromkeys(LCB_NAMES, make_lcb),
    "lm-eval": chosen_tasks,
    "multilingual": chosen_languages,
    "multilingual-mbpp": chosen_languages,
    "tools": tools_suites,
}
"""Suites made of what the user chose: name -> (that name, selection after the colon or None, options) -> suites. They
raise SuiteError for a selection and options that they do not know."""

_ENVIRONMENTS: tuple[Environment, ...] = (
    BIGCODEBENCH_ENVIRONMENT,
    BIGCODEBENCH_SMALL_ENVIRONMENT,
    TOOLS_ENVIRONMENT,
    TERMINAL_ENVIRONMENT,
    TERMINAL_2_ENVIRONMENT,
    LCB_OFFICIAL,
)
"""What `plt-eval install` knows."""


class UnknownSuite(SuiteError):
    """No suite has that name."""


def get_suite(name: str, options: SuiteOptions | None = None) -> list[Suite]:
    """The suites that `name` stands for, in upper or lower case, with the selection after a colon. Raises SuiteError
    for an unknown name or selection, and for options that have no effect."""
    options = options or SuiteOptions()
    key, colon, selection = name.partition(":")
    key = key.lower()
    if key in _CHOSEN:
        if colon and not selection.strip():
            raise SuiteError(f"--suite {name}: expected a selection after the colon, found none")
        return _CHOSEN[key](key, selection if colon else None, options)
    found = _NAMES.get(key)
    if found is None:
        near = difflib.get_close_matches(key, suite_names(), n=2, cutoff=0.5)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise UnknownSuite(f"unknown suite {key!r}{hint}; known: {', '.join(suite_names())}")
    if colon:
        raise SuiteError(f"--suite {name}: {key} has no parts to choose from")
    options.only(key)
    return list(found)


def all_suites() -> list[Suite]:
    """Every suite once, in the order of listings; of those made of what the user chooses, the usual choice."""
    found = [suite for suites in _NAMES.values() for suite in suites]
    found += [suite for key, make in _CHOSEN.items() for suite in make(key, None, SuiteOptions())]
    return list({suite.name: suite for suite in found}.values())


def suite_names() -> list[str]:
    """Every name that get_suite takes, without selections."""
    return [*_NAMES, *_CHOSEN]


def environments() -> dict[str, Environment]:
    """The environments that suites run official packages in, by name."""
    return {environment.name: environment for environment in _ENVIRONMENTS}
