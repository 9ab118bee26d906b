"""Looped models of different families behind one protocol; see :mod:`plt_diagnostics.adapters.protocol`.

model = open_model(Path("checkpoint"), loops=4)
"""

from __future__ import annotations

from pathlib import Path

import torch

from plt_model.loading import load_model

from .plt import PLTAdapter
from .protocol import LoopedModel


def open_model(
    folder: Path,
    *,
    loops: int | None = None,
    loop_mode: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> LoopedModel:
    """The looped model of a checkpoint folder, behind the adapter of its family. `loops`, `loop_mode` and `dtype`
    default to the checkpoint's own. Raises plt_model.loading.CheckpointError for a folder that cannot be loaded."""
    return PLTAdapter(load_model(folder, loops=loops, loop_mode=loop_mode, dtype=dtype, device=device))
