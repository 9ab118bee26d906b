"""The scorers of a run over machines: what to tell the machines, and what a judgement takes of each."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from plt_benchmarks.multilingual.suite import MultilingualSuite
from plt_benchmarks.options import SuiteOptions
from plt_benchmarks.protocols import Portable, Sample, Suite
from plt_benchmarks.swe.suites import SweSuite
from plt_eval.cluster.connection import Connection
from plt_eval.cluster.machines import Machines, Needs
from plt_eval.cluster.orders import Order, PatchOrder, Recipe, expectations
from plt_eval.cluster.patches import JUDGED, unpack
from plt_eval.cluster.scorer import ClusterScorer
from plt_eval.sandbox.owners import process_identity
from plt_eval.swe.command import PatchWork
from plt_eval.swe.containers import GIB

PATCH_MEMORY = 2 * GIB
"""What tests of a repository usually take; the container's own limit is far above."""


def recipe_of(suite: Suite, key: str, options: SuiteOptions | None) -> Recipe:
    """How other machines make `suite`, which --suite `key` stands for."""
    changes = {}
    if isinstance(suite, MultilingualSuite):
        changes = {"chosen": suite.judged}  # "all that are here" would be others there
    elif isinstance(suite, SweSuite):
        changes = {name: getattr(suite, name) for name in ("test_timeout", "merge_streams", "packages")}
    return Recipe(key, options or SuiteOptions(), suite.name, changes)


def open_scorer(
    connection: Connection,
    suite: Suite,
    recipe: Recipe,
    sandbox: str,
    sandbox_image: str | None,
    notify: Callable[[str], None],
) -> ClusterScorer:
    """Have `suite` judged by the machines of `connection`. Raises UserError where none can."""
    order = Order(suite.name, recipe, expectations(suite))
    if suite.runs_code:
        order = replace(order, sandbox=sandbox, sandbox_image=sandbox_image)
    needs = Needs(memory=GIB if suite.runs_code else GIB // 4)
    machines = _met(Machines(connection, order, connection.ray.put(order), needs, notify))
    return ClusterScorer(machines, carried=partial(_carried, suite))


def open_patch_scorer(
    connection: Connection,
    suite: SweSuite,
    recipe: Recipe,
    work: PatchWork,
    notify: Callable[[str], None],
) -> ClusterScorer:
    """Have patches judged with the Docker of the machines of `connection`; what the harness writes goes to the run's
    folder. Raises UserError where no machine can."""
    limits, folder = work.limits, work.folder
    patches = PatchOrder(limits, work.keep, suite.token, folder.name, process_identity(os.getpid()))
    order = Order(suite.name, recipe, expectations(suite), patches=patches)
    needs = Needs(cpus=max(1, math.ceil(limits.cpus or 1)), memory=min(PATCH_MEMORY, limits.memory), docker=1)
    images = {task.image: task.environment for task in work.tasks}
    machines = _met(Machines(connection, order, connection.ray.put(order), needs, notify, images))

    def store(files: bytes) -> None:
        unpack(files, folder / JUDGED)

    return ClusterScorer(machines, keep=store, began=work.began)


def _met(machines: Machines) -> Machines:
    machines.meet()
    if not machines.fit():
        raise machines.none_fit()
    return machines


def _carried(suite: Suite, sample: Sample) -> Sample:
    return suite.carried(sample) if isinstance(suite, Portable) else sample
