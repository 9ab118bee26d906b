"""Every cell of the diagnostics on a CUDA device against the computation that shares no code with them."""

from __future__ import annotations

import pytest
import torch
from loops_cases import assert_heads, assert_rows, heads_of, random_model, rows_of, tokens
from loops_reference import measure as measure_reference
from loops_reference import measure_heads
from test_against_reference import tolerance_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "again"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_measurement_on_a_device(dtype: torch.dtype, backend: str, left: bool, keep: bool) -> None:
    case = random_model(dtype)
    case.model.set_attn_implementation(backend)
    samples = [tokens(count, seed=count) for count in (23, 9, 2, 1)]
    traces = [case.reference.trace(sample) for sample in samples]
    case.model.cuda()
    findings = case.measure(samples, left=left, keep=keep)
    for i, trace in enumerate(traces):
        assert_rows(rows_of(findings, i), measure_reference(trace), tolerance_of(case, trace), f"sample {i}")
    assert_heads(heads_of(findings), measure_heads(traces), 1e-6)
