"""Per-loop measurements on the states, attention and outputs of a looped transformer, and what follows from them.

    from plt_diagnostics import measure, open_model
    model = open_model(Path("checkpoint"), loops=4)
    findings = measure(model, ids, mask, samples=[0, 1])

What is measured: plt_diagnostics.registry. Other model families: plt_diagnostics.adapters.protocol.
"""

from . import measurements  # noqa: F401 (registers them)
from .adapters import open_model
from .registry import MEASUREMENTS, MeasurementError, default_variant, select
from .trace import Findings, measure

__all__ = ["MEASUREMENTS", "Findings", "MeasurementError", "default_variant", "measure", "open_model", "select"]
