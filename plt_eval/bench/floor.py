"""The floor under decoding: bytes that one step must read, over the bytes a second that this machine reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from plt_model import PLTConfig, PLTForCausalLM
from plt_model.decode.cache import StaticCache

REPEATS = 7
"""Of each way to read; the fastest counts, for a floor is what the machine can do."""

LEAST_BUFFER, MOST_BUFFER = 1 << 28, 1 << 32
"""The buffer is 8 times the last-level cache, within these (and an eighth of the memory), in bytes. On a GPU it is as
large as it may be: 8 times the cache are read in a tenth of a millisecond, of which a launch would be a large part."""


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second of a streaming read of `buffer` bytes by `kernel`, the fastest of those tried; `cache`: the
    last-level cache in bytes (None: unknown). Weights that fit it may be read faster than this."""

    bytes_per_second: float
    kernel: str
    buffer: int
    cache: int | None


def measure_bandwidth(device: torch.device, *, clock: Callable[[], float] = time.perf_counter) -> Bandwidth:
    """Read a buffer that no cache holds, with as many threads as torch has now. Takes about a second."""
    cache = last_level_cache(device)
    least = LEAST_BUFFER if device.type == "cpu" else MOST_BUFFER
    wanted = min(max(8 * (cache or 0), least), MOST_BUFFER, _free(device) // 8)
    x = torch.ones(wanted // 4, device=device)
    matrix = x[: len(x) // 4096 * 4096].view(-1, 4096)
    vector = torch.ones(4096, device=device)
    half = len(x) // 2
    kernels: dict[str, tuple[Callable[[], object], int]] = {
        "sum": (lambda: x.sum(), x.nbytes),
        "dot": (lambda: torch.dot(x[:half], x[half : 2 * half]), 2 * half * 4),
        "matrix-vector": (lambda: matrix.mv(vector), matrix.nbytes),
    }
    best = {name: size / _fastest(work, device, clock) for name, (work, size) in kernels.items()}
    kernel = max(best, key=lambda name: best[name])
    return Bandwidth(best[kernel], kernel, x.nbytes, cache)


def last_level_cache(device: torch.device) -> int | None:
    """Bytes, or None where the machine does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * factor)
    return max(sizes, default=None)


def weight_bytes(model: PLTForCausalLM, *, trips: int = 1) -> int:
    """Bytes of weights that a step reads: the layers once a trip, the norm, the head. Of an untied embedding table one
    row a token, which is nothing; gates only where there are later passes."""
    gated = model.config.plt_num_loops > 1 and model.config.plt_gswa and model.config.plt_loop_mode == "plt"
    layers = sum(
        weight.nbytes for name, weight in model.model.layers.named_parameters() if gated or ".plt_gate." not in name
    )
    return trips * layers + int(model.lm_head.weight.nbytes) + int(model.model.norm.weight.nbytes)


def kv_bytes(config: PLTConfig, *, slots: int, context: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that `slots` texts of `context` tokens hold, by part: those of a StaticCache that is just full (no memory
    is taken), with a full cache a pass in the sequential baseline."""
    one = _one_pass(config) if config.plt_loop_mode == "sequential" else config
    held = StaticCache(one, slots=slots, capacity=context, dtype=dtype, device="meta").nbytes()
    passes = config.plt_num_loops if config.plt_loop_mode == "sequential" else 1
    return {part: passes * size for part, size in held.items()}


def must_read(model: PLTForCausalLM, *, slots: int, context: int, trips: int = 1) -> int:
    """Bytes that one step of `slots` texts with `context` tokens reads. Of R trips each reads the layers again, and
    pass 0's keys and values too."""
    held = kv_bytes(model.config, slots=slots, context=context, dtype=model.lm_head.weight.dtype)
    shared = held["shared"] * (trips if model.config.plt_loop_mode == "plt" else 1)
    return weight_bytes(model, trips=trips) + shared + held["windows"] + held["carry"]


def _one_pass(config: PLTConfig) -> PLTConfig:
    values = {**config.to_dict(), "plt_num_loops": 1}
    one: PLTConfig = PLTConfig.from_dict(values)
    return one


def _fastest(work: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    taken = []
    for _ in range(REPEATS + 1):
        _wait(device)
        began = clock()
        work()
        _wait(device)
        taken.append(clock() - began)
    return min(taken[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


__all__ = ["Bandwidth", "kv_bytes", "last_level_cache", "measure_bandwidth", "must_read", "weight_bytes"]
