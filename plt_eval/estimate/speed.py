"""Seconds: a few numbers fitted to one machine's measurements, and what they predict.

A decoding step of N texts at R loops takes

    x * max(bytes to read / bandwidth, FLOPs / rate) + L * (a + b [R > 1] + c (R - 1) N) + d N

a prompt FLOPs / rate + e L R, and a training step of T tokens and P parameters that AdamW moves

    FLOPs / rate + L R (e + f T) + g P

`bandwidth` is that of a streaming read, `rate` what reading prompts reached. x, a, ..., g are fitted by least squares
of relative errors, none below 0 (x not below 1). The measurements over what was fitted give the range.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from plt_eval.estimate.constants import DeviceRecord, Measured, MuonPoint, Point, Range
from plt_eval.estimate.memory import element_size, slot, weights_read
from plt_eval.estimate.shapes import Shape
from plt_model.training.flops import forward_flops, training_flops
from plt_model.training.optimizers import is_matrix_of_a_layer

Row = tuple[float, ...]


@dataclass(frozen=True)
class Fit:
    """Coefficients, and the extremes of measured over fitted."""

    coefficients: Row
    low: float
    high: float

    def __call__(self, row: Row) -> float:
        return float(np.dot(self.coefficients, row))

    def spread(self, scenario: int) -> float:
        """By what to multiply: 0 the low end, 1 the middle, 2 the high end."""
        return (self.low, 1.0, self.high)[scenario]


def fit(rows: Sequence[Row], points: Sequence[Point | MuonPoint], *, first_at_least: float = 0.0) -> Fit:
    """Least squares of relative errors over coefficients that are not negative; the first has a floor of its own."""
    scaled = np.array([np.array(row) / point.seconds for row, point in zip(rows, points, strict=True)])
    wanted = 1.0 - first_at_least * scaled[:, 0]
    best, error = np.zeros(scaled.shape[1]), float(np.sum(wanted**2))
    for count in range(1, scaled.shape[1] + 1):
        for chosen in itertools.combinations(range(scaled.shape[1]), count):
            found = np.linalg.lstsq(scaled[:, chosen], wanted, rcond=None)[0]
            left = float(np.sum((scaled[:, chosen] @ found - wanted) ** 2))
            if (found >= 0).all() and left < error * (1 - 1e-9):
                best = np.zeros(scaled.shape[1])
                best[list(chosen)], error = found, left
    best[0] += first_at_least
    fitted = [point.seconds * float(row @ best) for row, point in zip(scaled, points, strict=True)]
    lows = [(_end(point, "low") / value) for point, value in zip(points, fitted, strict=True)]
    highs = [(_end(point, "high") / value) for point, value in zip(points, fitted, strict=True)]
    return Fit(tuple(map(float, best)), min(1.0, *lows), max(1.0, *highs))


def _end(point: Point | MuonPoint, name: str) -> float:
    return float(getattr(point, name, None) or point.seconds)


@dataclass(frozen=True)
class Speed:
    """What one device does, by the measurements of the machine `measured`, which may be another."""

    device: DeviceRecord
    measured: Measured

    # --- prompts --------------------------------------------------------------------------------------

    @cached_property
    def reading(self) -> Fit:
        """Of prompts: (share of the peak's time, passes through layers)."""
        points = self.measured.prefill
        work = [prompt_flops(Shape.named(p.shape), p.loops, p.context) * p.batch for p in points]
        return fit(_work_rows(work, points, self.measured.flops), points)

    def prefill(
        self,
        shape: Shape,
        loops: int,
        length: int,
        dtype: str,
        *,
        scenario: int = 1,
        share: int = 1,
        together: int = 1,
    ) -> float:
        """Seconds of reading one prompt of `length` tokens, of `together` read side by side, on `share` GPUs."""
        peak = self.device.flops * element_size(self.measured.prefill[0].dtype) / element_size(dtype)
        passes = loops * shape.at(1).num_hidden_layers / together
        row = prompt_flops(shape, loops, length) / peak / share, passes
        return self.reading(row) * self.reading.spread(scenario)

    def rate(self, dtype: str) -> float:
        """FLOP/s that reading prompts reaches here; numbers of twice the size take twice as long."""
        measured = element_size(self.measured.prefill[0].dtype)
        return self.device.flops / (self.reading.coefficients[0] or 1.0) * measured / element_size(dtype)

    # --- decoding -------------------------------------------------------------------------------------

    @cached_property
    def decoding(self) -> Fit:
        """Of a step: (x, a, b, c, d) above."""
        points = self.measured.decode
        bandwidth = self.measured.bandwidth * self.measured.read_share
        rate = self.measured.flops / (self.reading.coefficients[0] or 1.0)
        rows = []
        for p in points:
            shape = Shape.named(p.shape)
            roof = max(roofs(shape, p.loops, p.batch, p.context, p.dtype, bandwidth, rate))
            rows.append(_step_row(shape, p.loops, p.batch, roof))
        return fit(rows, points, first_at_least=1.0)

    def step(
        self, shape: Shape, loops: int, batch: float, context: float, dtype: str, *, scenario: int = 1, share: int = 1
    ) -> float:
        """Seconds of one decoding step of `batch` texts that hold `context` tokens each. Beyond the batches that were
        measured, the high end neither overlaps reading and computing."""
        bandwidth = self.device.bandwidth * self.measured.read_share
        both = roofs(shape, loops, batch, context, dtype, bandwidth * share, self.rate(dtype) * share)
        beyond = batch * loops > max(p.batch * p.loops for p in self.measured.decode)
        roof = sum(both) if scenario == 2 and beyond else max(both)
        return self.decoding(_step_row(shape, loops, batch, roof)) * self.decoding.spread(scenario)

    # --- training -------------------------------------------------------------------------------------

    @cached_property
    def training(self) -> Fit:
        """Of a step: see training_row."""
        points = self.measured.train
        rows = []
        for p in points:
            shape = Shape.named(p.shape)
            rows.append(training_row(shape, p.loops, p.context, p.batch, shape.parameters, peak=self.measured.flops))
        one_shape = len({point.shape for point in points}) == 1
        told = 1 if one_shape else 4 if self.tokens_told else 2  # more the points cannot tell apart
        return fit([(*row[:told], *[0.0] * (4 - told)) for row in rows], points)

    @property
    def tokens_told(self) -> bool:
        """Whether training steps of one shape with different numbers of tokens were measured."""
        points = self.measured.train
        return len({(p.shape, p.batch * p.context) for p in points}) > len({p.shape for p in points})

    def muon(self, shape: Shape) -> float | None:
        """Seconds of Muon's step for the layers' matrices: q + p FLOPs each; None where it was not measured."""
        points = self.measured.muon
        if not points:
            return None
        each = fit([(1.0, _muon_flops(point.rows, point.columns)) for point in points], points)
        return sum(each((1.0, _muon_flops(*size))) for size in matrices(shape))

    def utilisation(self) -> Range:
        """Share of the peak in training, of the model's own FLOPs: not measured at the size of interest, so between
        what the small model reached in training and what the large one reached in reading prompts."""
        slow = 1 / max(self.training.coefficients[0], 1e-9) / self.training.high
        fast = 1 / max(self.reading.coefficients[0], 1e-9) / self.reading.low
        low, high = sorted((slow, fast))
        return Range(low=low, middle=(low * high) ** 0.5, high=high)


def matrices(shape: Shape) -> list[torch.Size]:
    """Those that Muon moves, where it does."""
    return [weight.shape for name, weight in shape.model(1).named_parameters() if is_matrix_of_a_layer(name, weight)]


def training_row(
    shape: Shape, loops: int, length: int, batch: int, by_adamw: int, *, peak: float, turns: int = 1
) -> Row:
    """(share of the peak's time, passes through layers, tokens through layers, parameters that AdamW moves)."""
    config, tokens = shape.at(loops), batch * length
    layers = loops * config.num_hidden_layers
    return training_flops(config, length) * tokens / peak, turns * layers, layers * tokens, by_adamw


def prompt_flops(shape: Shape, loops: int, length: int) -> float:
    """Of reading `length` tokens; the head is for the last alone."""
    config = shape.at(loops)
    return length * (forward_flops(config, length) - 2 * config.hidden_size * config.vocab_size)


def step_flops(shape: Shape, loops: int, batch: float, context: float) -> float:
    """Of one new token of each text: products with all layers for every pass, attention to what is there, the head."""
    config = shape.at(loops)
    wide = config.num_attention_heads * (config.head_dim or 0)
    attention = 4 * wide * config.num_hidden_layers * (loops * context + (loops - 1) * (config.window + 1))
    head = 2 * config.hidden_size * config.vocab_size
    return batch * (2 * loops * shape.layer_parameters + attention + head)


def roofs(
    shape: Shape, loops: int, batch: float, context: float, dtype: str, bandwidth: float, rate: float
) -> tuple[float, float]:
    """Seconds that a step takes at least: to read weights and caches, and to compute."""
    one = slot(shape.at(loops), max(1, round(context)), dtype).total
    reads = weights_read(shape, loops, dtype) + batch * one
    return reads / bandwidth, step_flops(shape, loops, batch, context) / rate


def _muon_flops(rows: int, columns: int) -> float:
    """Of five steps of Newton and Schulz: three products each."""
    few, many = sorted((rows, columns))
    return 5 * (4.0 * few * few * many + 2.0 * few**3)


def _work_rows(work: list[float], points: tuple[Point, ...], peak: float) -> list[Row]:
    """(share of the peak's time, passes through layers); one shape alone cannot tell the two apart."""
    several = len({point.shape for point in points}) > 1
    layers = [point.loops * Shape.named(point.shape).at(1).num_hidden_layers for point in points]
    return [(flops / peak, float(several * count)) for flops, count in zip(work, layers, strict=True)]


def _step_row(shape: Shape, loops: int, batch: float, roof: float) -> Row:
    layers = shape.at(1).num_hidden_layers
    return roof, layers, layers * (loops > 1), layers * (loops - 1) * batch, batch


__all__ = ["Fit", "Speed", "fit", "prompt_flops", "roofs", "step_flops", "training_row"]
