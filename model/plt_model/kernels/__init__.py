"""Triton kernels of a PLT's attention, each folder with its truth in plain torch (`naive.py`) beside the fast code.

    gswa_prefill    many queries at once, differentiable: reading a prompt, training
    gswa_decode     one new token of many sequences, all its passes at once

Importing this package imports no Triton; calling a kernel does. `TRITON_INTERPRET=1`, set before anything imports
triton (transformers does), runs the kernels on the CPU: slow, and for tests.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch


class KernelUnavailable(ValueError):
    """The Triton kernels cannot run here, or not on these tensors; the message says what is missing."""


def require_triton(device: torch.device) -> None:
    """Raises KernelUnavailable unless triton is installed and can run kernels on tensors of `device`."""
    if find_spec("triton") is None:
        raise KernelUnavailable(
            "the Triton kernels need the package triton, which is not installed: pip install triton"
        )
    import triton

    if device.type != "cuda" and not (device.type == "cpu" and triton.knobs.runtime.interpret):
        raise KernelUnavailable(f"the Triton kernels need tensors on a CUDA device: these are on {str(device)!r}")
