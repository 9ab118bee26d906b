"""Open every loop of a model on a batch of samples.

    model = open_model(Path("checkpoint"), loops=4)
    findings = measure(model, ids, mask, samples=[0, 1])
    findings.rows            # pyarrow.Table of plt_diagnostics.tally.SCHEMA
    findings.heads.table()   # head x head similarity

One forward pass gives the states of all loops. What is large is then read in chunks, each freed before the next: the
attention of one layer, a block of queries at a time, for all loops together; the outputs, a slice of tokens at a time,
for all loops together. A measurement sees chunks and nothing else.

All is computed in float32 or wider, whatever the type of the weights, and on the model's device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from .adapters.protocol import LoopedModel
from .attention import AttentionBlock, blocks
from .chunks import OutputChunk, StateChunk
from .heads import HeadSimilarity
from .registry import Measurement, Values, select
from .tally import Tally

OUTPUT_BYTES = 8 * 2**20
"""Of one loop's probabilities in an OutputChunk."""

HEAD_QUERIES = 256
"""Queries of a sample at which heads are compared, at most."""


class LoopTrace:
    """One batch, opened: the chunks that measurements read. `needs` says which will be asked for."""

    def __init__(self, model: LoopedModel, ids_BS: Tensor, mask_BS: Tensor, needs: set[str], further: bool) -> None:
        self.model = model
        self.run = model.run(ids_BS, mask_BS, further=further, keep="attention" in needs)
        self.sampled_BS = _sampled(mask_BS)

    def attention(self) -> Iterator[Iterator[AttentionBlock]]:
        """For each layer an iterator of its blocks; to be read in order, each once."""
        for layer, loops in enumerate(self.model.attention(self.run)):
            yield blocks(layer, loops, self.run.key_mask_BS, self.sampled_BS)

    def states(self) -> StateChunk:
        """The states of all loops."""
        return StateChunk(self.model, self.run)

    def outputs(self) -> Iterator[OutputChunk]:
        """What all loops predict, a slice of tokens at a time."""
        batch, length = self.run.ids_BS.shape
        count = max(1, OUTPUT_BYTES // (batch * self.model.shape.vocab * 4))
        for first in range(0, length, count):
            yield OutputChunk(self.model, self.run, first, min(first + count, length))


@dataclass(frozen=True)
class Findings:
    """What was measured on a batch: tidy rows (tally.SCHEMA) and the heads' similarity (empty if not asked for)."""

    rows: pa.Table
    heads: HeadSimilarity


@torch.inference_mode()
def measure(
    model: LoopedModel,
    ids_BS: Tensor,
    mask_BS: Tensor,
    samples: Sequence[int],
    measurements: Sequence[str] | None = None,
) -> Findings:
    """Measure every loop on a batch.

    ids_BS: token ids, int64. mask_BS: False at padding, on either side. samples: the samples' indices, for the rows.
    measurements: names, None for all. Raises MeasurementError for an unknown name, ValueError for tensors that do not
    fit one another, no sample, or a sample without a token.
    """
    chosen = select(measurements)
    _check(model, ids_BS, mask_BS, samples)
    ids_BS, mask_BS = ids_BS.to(model.device), mask_BS.to(model.device, torch.bool)
    ids_BS, mask_BS = _aligned(ids_BS, mask_BS)
    needs = {measurement.reads for measurement in chosen}
    further = any(measurement.name == "fixed_point_gap" for measurement in chosen)
    trace = LoopTrace(model, ids_BS, mask_BS, set(needs), further)
    tally = Tally(mask_BS, model.shape.layers)
    heads = HeadSimilarity.empty(model.shape)
    layer_heads = heads if any(m.name == "head_cosine" for m in chosen) else None
    if "attention" in needs:
        _read_attention(trace, [m for m in chosen if m.reads == "attention"], tally, layer_heads)
    if "states" in needs:
        _read_states(trace, [m for m in chosen if m.reads == "states"], tally)
    if "outputs" in needs:
        _read_outputs(trace, [m for m in chosen if m.reads == "outputs"], tally)
    return Findings(tally.rows(samples), heads)


def _read_states(trace: LoopTrace, chosen: Sequence[Measurement], tally: Tally) -> None:
    chunk = trace.states()
    for measurement in chosen:
        for found in measurement.measure(chunk):
            tally.add(
                measurement.name, found.variant, found.loop, found.values, found.where, positions=measurement.positioned
            )


def _read_attention(
    trace: LoopTrace, chosen: Sequence[Measurement], tally: Tally, heads: HeadSimilarity | None
) -> None:
    """Layer by layer. The values of a layer's blocks are put together before they are counted."""
    for layer, layer_blocks in enumerate(trace.attention()):
        parts: dict[tuple[str, str, int], list[Values]] = {}
        for block in layer_blocks:
            for measurement in chosen:
                for found in measurement.measure(block):
                    parts.setdefault((measurement.name, found.variant, found.loop), []).append(found)
            if heads is not None:
                heads.add(block)
        if heads is not None:
            heads.finish_layer(layer, trace.sampled_BS.sum(1))
        for (name, variant, loop), pieces in parts.items():
            tally.add(name, variant, loop, *_joined(pieces), layer=layer)


def _read_outputs(trace: LoopTrace, chosen: Sequence[Measurement], tally: Tally) -> None:
    """Slice by slice; values are put together before they are counted."""
    parts: dict[tuple[Measurement, str, int], list[Values]] = {}
    for chunk in trace.outputs():
        for measurement in chosen:
            for found in measurement.measure(chunk):
                parts.setdefault((measurement, found.variant, found.loop), []).append(found)
    for (measurement, variant, loop), pieces in parts.items():
        tally.add(measurement.name, variant, loop, *_joined(pieces), positions=measurement.positioned)


def _joined(pieces: Sequence[Values]) -> tuple[Tensor, Tensor | None]:
    """Values and where of consecutive chunks, side by side."""
    where = [piece.where for piece in pieces if piece.where is not None]
    return torch.cat([piece.values for piece in pieces], dim=-1), torch.cat(where, dim=-1) if where else None


def _sampled(mask_BS: Tensor) -> Tensor:
    """The queries at which heads are compared: every k-th of a sample's tokens, its last one among them, k being the
    smallest that leaves at most HEAD_QUERIES -> [B, S]."""
    lengths = mask_BS.sum(1, keepdim=True)
    stride = (lengths + HEAD_QUERIES - 1) // HEAD_QUERIES
    from_the_end = lengths - mask_BS.cumsum(1)
    sampled: Tensor = mask_BS & (from_the_end % stride == 0)
    return sampled


def _aligned(ids_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """All samples from the first column on, with their own first token as padding. On the left, padding would shift
    positions, which a gate in query mode reads; and a padding token whose embedding is not finite would reach the
    others, since 0 times NaN is NaN."""
    order_BS = (~mask_BS).int().argsort(dim=1, stable=True)
    ids_BS, mask_BS = ids_BS.gather(1, order_BS), mask_BS.gather(1, order_BS)
    return ids_BS.where(mask_BS, ids_BS[:, :1]), mask_BS


def _check(model: LoopedModel, ids_BS: Tensor, mask_BS: Tensor, samples: Sequence[int]) -> None:
    if ids_BS.dim() != 2 or ids_BS.shape != mask_BS.shape or len(samples) != len(ids_BS):
        raise ValueError(
            f"ids {list(ids_BS.shape)}, mask {list(mask_BS.shape)}, {len(samples)} samples: expected [B, S] twice and B"
        )
    if not len(ids_BS) or ids_BS.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{len(ids_BS)} samples of {ids_BS.dtype} ids: expected at least one, of int64")
    if not bool(mask_BS.bool().any(1).all()):
        raise ValueError("a sample without a token cannot be measured")
    real = ids_BS[mask_BS.bool()]
    bad = real[(real < 0) | (real >= model.shape.vocab)]
    if len(bad):
        raise ValueError(f"token id {int(bad[0])} is outside of the model's vocabulary of {model.shape.vocab}")
