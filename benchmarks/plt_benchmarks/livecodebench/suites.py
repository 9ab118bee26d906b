"""LiveCodeBench's suites by name, made of what the user chose.

plt-eval run --suite lcb --release release_v5 --since 2024-08-01
"""

from __future__ import annotations

from plt_benchmarks.cruxeval import CRUXEVAL_I, CRUXEVAL_I_COT, CRUXEVAL_O, CRUXEVAL_O_COT
from plt_benchmarks.environments import Environment
from plt_benchmarks.livecodebench.generation import LcbGenerationSuite
from plt_benchmarks.livecodebench.prediction import LcbExecutionSuite, LcbTestOutputSuite
from plt_benchmarks.livecodebench.releases import DEFAULT_RELEASE, release
from plt_benchmarks.livecodebench.rows import Window
from plt_benchmarks.options import SuiteOptions
from plt_benchmarks.protocols import Suite, SuiteError

LCB_OFFICIAL = Environment(
    name="lcb",
    summary="LiveCodeBench's own scorer (to compare verdicts with; runs do not need it)",
    requirements=("nvidia-livecodebench==26.3", "numpy>=2,<3", "tqdm>=4.60,<5"),
    options=("--no-deps",),
)
"""Its scorer needs no more than these of the packages that it asks for."""

_SUITES = ("lcb-generation", "lcb-execution", "lcb-execution-cot", "lcb-test-output")
LCB_NAMES = ("lcb", *_SUITES, "reasoning")


def make_lcb(key: str, selection: str | None, options: SuiteOptions) -> list[Suite]:
    """The suites that one of LCB_NAMES stands for. Raises SuiteError."""
    if selection is not None:
        raise SuiteError(f"--suite {key}:{selection}: {key} has no parts to choose from; they are {', '.join(_SUITES)}")
    wanted = _SUITES if key in ("lcb", "reasoning") else (key,)
    options.only(key, ("release", "since", "until") if "lcb-generation" in wanted else ("since", "until"))
    window = Window(options.since, options.until)
    chosen = release(options.release or DEFAULT_RELEASE)
    suites: dict[str, Suite] = {
        "lcb-generation": LcbGenerationSuite(chosen, window, chosen=options.release is not None),
        "lcb-execution": LcbExecutionSuite(window),
        "lcb-execution-cot": LcbExecutionSuite(window, thinks=True),
        "lcb-test-output": LcbTestOutputSuite(window),
    }
    first: list[Suite] = [CRUXEVAL_I, CRUXEVAL_O, CRUXEVAL_I_COT, CRUXEVAL_O_COT] if key == "reasoning" else []
    return [*first, *(suites[name] for name in wanted)]
