"""How alike the heads of a layer attend: head x head cosines, as means over samples.

similarity = HeadSimilarity.empty(model.shape)
similarity.add(block)
similarity.finish_layer(layer, mask)
similarity.table()      # pyarrow.Table of SCHEMA: means with their counts, so that batches can be merged
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from .adapters.protocol import Shape
from .attention import AttentionBlock

SCHEMA = pa.schema(
    [
        ("loop", pa.int16()),
        ("layer", pa.int16()),
        ("head_i", pa.int16()),
        ("head_j", pa.int16()),
        ("cosine", pa.float64()),
        ("count", pa.int64()),
    ]
)
"""heads.parquet. `cosine` is the mean over samples of each sample's mean over its sampled queries; `count` the samples
that have a finite one. A pair without any has no row."""


@dataclass
class HeadSimilarity:
    """sums and counts over samples, [R, L, H, H]."""

    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]
    _open: dict[int, list[Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def empty(cls, shape: Shape) -> Self:
        """Of a model of this shape, before any sample."""
        size = (shape.loops, shape.layers, shape.heads, shape.heads)
        return cls(np.zeros(size), np.zeros(size, dtype=np.int64))

    def add(self, block: AttentionBlock) -> None:
        """Take in a block of queries of the layer that is being read."""
        weight = block.sampled_Bn[:, block.rows].double()[..., None, None]
        for loop, cosines_BrHH in enumerate(block.cosines):
            self._open.setdefault(loop, []).append((cosines_BrHH.where(weight > 0, 0.0)).sum(1))

    def finish_layer(self, layer: int, queries_B: Tensor) -> None:
        """All blocks of `layer` were added, with so many sampled queries in each sample."""
        for loop, parts in self._open.items():
            means = (torch.stack(parts).sum(0) / queries_B[:, None, None]).cpu().numpy()
            finite = np.isfinite(means)
            self.sums[loop, layer] += np.where(finite, means, 0.0).sum(0)
            self.counts[loop, layer] += finite.sum(0)
        self._open.clear()

    def table(self) -> pa.Table:
        """One row a loop (from 1), layer and pair of heads."""
        index = np.nonzero(self.counts)
        loop, layer, i, j = (axis.astype(np.int16) for axis in index)
        columns: list[npt.NDArray[Any]] = [loop + np.int16(1), layer, i, j]
        columns += [self.sums[index] / self.counts[index], self.counts[index]]
        return pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)
