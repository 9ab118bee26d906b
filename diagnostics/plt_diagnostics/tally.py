"""From values of single tokens to tidy rows: means by sample, by layer and by position, non-finite ones counted apart.

    tally = Tally(mask_BS, layers=14)
    tally.add("step_size", "raw", 2, values_BS)
    tally.rows(samples)          # pyarrow.Table of SCHEMA

Positions are binned by powers of two: [0], [1], [2, 3], [4..7], ...; a bin is named by its first position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

SCHEMA = pa.schema(
    [
        ("sample", pa.int32()),
        ("loop", pa.int16()),
        ("measurement", pa.dictionary(pa.int32(), pa.string())),
        ("variant", pa.dictionary(pa.int32(), pa.string())),
        ("layer", pa.int16()),
        ("position", pa.int32()),
        ("value", pa.float64()),
        ("count", pa.int64()),
        ("nonfinite", pa.int64()),
    ]
)
"""loops.parquet. `layer` and `position` are null in the row of the whole sample, `position` in those of a layer,
`layer` in those of a position bin. `value` is the mean of `count` finite values, null where there were none."""


class Tally:
    """Sums of one batch. mask_BS: False at padding, which counts nowhere."""

    def __init__(self, mask_BS: Tensor, layers: int) -> None:
        self.mask_BS = mask_BS
        self.layers = layers
        self._bins_BS = _bins(mask_BS)
        self._bins = int(self._bins_BS.max()) + 1
        self._cells: dict[tuple[str, str, int], _Cell] = {}

    def add(
        self,
        measurement: str,
        variant: str,
        loop: int,
        values: Tensor,
        where: Tensor | None = None,
        *,
        layer: int | None = None,
        positions: bool = True,
    ) -> None:
        """Count values: [B] one a sample, [B, S] one a token, or [B, H, S] one a head and token.

        where, [B] or [B, S]: False where the measurement is not defined; padding is left out by itself.
        """
        if values.dim() == 1:
            defined = torch.ones_like(values, dtype=torch.bool) if where is None else where
            spread, bins = values[:, None, None], None
            defined = defined[:, None, None]
        else:
            defined = self.mask_BS if where is None else self.mask_BS & where
            spread = values[:, None] if values.dim() == 2 else values
            defined = defined[:, None].expand_as(spread)
            bins = self._bins_BS if positions else None
        cell = self._cells.setdefault(
            (measurement, variant, loop),
            _Cell(len(self.mask_BS), self.layers if layer is not None else 0, self._bins if bins is not None else 0),
        )
        cell.add(spread, defined, layer, bins)

    def rows(self, samples: Sequence[int]) -> pa.Table:
        """Everything that was added, for the samples of these indices, in the batch's order. A cell in which nothing
        was defined has no row."""
        columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        for (measurement, variant, loop), cell in self._cells.items():
            for layer, position, sums in cell.parts():
                total, count, bad = sums
                for b in np.nonzero(count + bad)[0].tolist():
                    row = (samples[b], loop, measurement, variant, layer, position)
                    value = total[b] / count[b] if count[b] else None
                    for name, item in zip(SCHEMA.names, (*row, value, int(count[b]), int(bad[b])), strict=True):
                        columns[name].append(item)
        return pa.table(columns, schema=SCHEMA)


class _Cell:
    """One measurement, variant and loop: [3, B, ...] of sum, finite values and non-finite ones, by layer and by bin."""

    def __init__(self, batch: int, layers: int, bins: int) -> None:
        self.layers = np.zeros((3, batch, max(layers, 1)))
        self.bins = np.zeros((3, batch, bins))
        self.layered = layers > 0

    def add(self, values_BHS: Tensor, defined_BHS: Tensor, layer: int | None, bins_BS: Tensor | None) -> None:
        finite = values_BHS.isfinite()
        good, bad = defined_BHS & finite, defined_BHS & ~finite
        parts_3BS = torch.stack(
            [values_BHS.double().where(good, 0.0).sum(1), good.sum(1).double(), bad.sum(1).double()]
        ).cpu()
        self.layers[:, :, layer or 0] += parts_3BS.sum(-1).numpy()
        if bins_BS is not None:
            sums = parts_3BS.new_zeros(self.bins.shape)
            # On a GPU this would add in another order each time.
            sums.scatter_add_(2, bins_BS.expand_as(parts_3BS), parts_3BS)
            self.bins += sums.numpy()

    def parts(self) -> list[tuple[int | None, int | None, np.ndarray[Any, Any]]]:
        """(layer, position, [3, B]) of the whole, of each layer, of each bin."""
        found: list[tuple[int | None, int | None, np.ndarray[Any, Any]]] = [(None, None, self.layers.sum(-1))]
        if self.layered:
            found += [(i, None, self.layers[..., i]) for i in range(self.layers.shape[-1])]
        return found + [(None, 0 if i == 0 else 1 << (i - 1), self.bins[..., i]) for i in range(self.bins.shape[-1])]


def _bins(mask_BS: Tensor) -> Tensor:
    """The bin of each token: 0 for position 0, else the position's bit length."""
    positions = (mask_BS.cumsum(1) - 1).clamp_min(0)
    return torch.frexp(positions.cpu().double())[1].long()
