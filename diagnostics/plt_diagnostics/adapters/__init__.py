"""Looped models of different families behind one protocol; see :mod:`plt_diagnostics.adapters.protocol`.

model = open_model(Path("checkpoint"), loops=4)

config.json's model_type picks the adapter. Another family needs no place here: an adapter of one's own goes straight
to :func:`plt_diagnostics.measure` (docs/adapters.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Protocol

import torch

from plt_model import PLTConfig
from plt_model.loading import config_values, load_model

from .hub import AdapterError
from .ouro import open_ouro
from .plt import PLTAdapter
from .protocol import LoopedModel


class Opener(Protocol):
    """How the models of one family are opened."""

    def __call__(
        self,
        folder: Path,
        *,
        loops: int | None,
        loop_mode: str | None,
        dtype: torch.dtype | None,
        device: str | torch.device,
        trust_remote_code: bool,
    ) -> LoopedModel:
        """As :func:`open_model`, for a folder of the family."""
        ...


def open_model(
    folder: Path,
    *,
    loops: int | None = None,
    loop_mode: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> LoopedModel:
    """The looped model of a checkpoint folder, behind the adapter of its family.

    loops, loop_mode, dtype: default to the checkpoint's own. trust_remote_code: code that comes with the folder may be
    run; families that need none (plt) do not look at it.
    Raises plt_model.loading.CheckpointError for a folder that cannot be read, and AdapterError, which is one, for a
    family without an adapter or a model that does not fit it: ValueErrors of one line.
    """
    kind = config_values(folder).get("model_type")
    opener = FAMILIES.get(kind) if isinstance(kind, str) else None
    if opener is None:
        raise AdapterError(
            f"{folder / 'config.json'}: model_type is {kind!r}: there are adapters for {', '.join(FAMILIES)}; for "
            "another family write one (plt_diagnostics.adapters.protocol) and hand it to plt_diagnostics.measure"
        )
    return opener(
        folder, loops=loops, loop_mode=loop_mode, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )


def _open_plt(
    folder: Path,
    *,
    loops: int | None,
    loop_mode: str | None,
    dtype: torch.dtype | None,
    device: str | torch.device,
    trust_remote_code: bool,  # noqa: ARG001 (the package brings the code)
) -> PLTAdapter:
    return PLTAdapter(load_model(folder, loops=loops, loop_mode=loop_mode, dtype=dtype, device=device))


FAMILIES: Final[dict[str, Opener]] = {PLTConfig.model_type: _open_plt, "ouro": open_ouro}
"""By config.json's model_type."""

__all__ = ["FAMILIES", "AdapterError", "LoopedModel", "open_model"]
