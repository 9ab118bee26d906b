"""Tidy rows with known answers: sample-level values drawn around given means."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

Means = Mapping[tuple[str, str, int], float]


def made_rows(means: Means, *, samples: int = 64, spread: float = 0.05, seed: int = 0) -> pd.DataFrame:
    """One sample-level row for each sample and each (measurement, variant, loop) of `means`. A sample's values are
    `spread` times as wide as the mean's size, shifted so that their mean is exactly `means`."""
    rng = np.random.default_rng(seed)
    parts = []
    for (measurement, variant, loop), mean in means.items():
        noise = rng.normal(size=samples)
        noise -= noise.mean()
        parts.append(
            pd.DataFrame(
                {
                    "sample": np.arange(samples),
                    "loop": loop,
                    "measurement": measurement,
                    "variant": variant,
                    "layer": pd.array([pd.NA] * samples, dtype="Int16"),
                    "position": pd.array([pd.NA] * samples, dtype="Int32"),
                    "value": mean + spread * max(abs(mean), 0.01) * noise,
                    "count": 10,
                    "nonfinite": 0,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
