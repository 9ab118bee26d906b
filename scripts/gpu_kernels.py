"""The fused prefill kernel against what it replaces, and against the device's own ceiling.

    python scripts/gpu_kernels.py [--tiny] [--device cpu] [--json FILE]

The baseline is two attention calls and the blend: flash-attn's where it is installed, else torch's flash SDPA for the
global branch and FlexAttention for the window. Times are medians of interleaved rounds, forward, and forward with
backward. The kernel's matrix products a second stand beside those of a large square product of the same type. The gate
comes first: output and gradients against the plain definition; no speed beside a red gate. `--tiny --device cpu` runs
the whole flow in Triton's interpreter (TRITON_INTERPRET=1) and times nothing that means anything.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from plt_eval.bench.rounds import Job, Spread, Stopwatch, interleave, ratio, warm_up
from plt_model.attention_plt import causal_attention, mixed, window_attention
from plt_model.kernels import KernelUnavailable, require_triton
from plt_model.kernels.gswa_prefill import gswa, naive

ROUNDS = 20
NAMES = ("q", "shared keys", "shared values", "own keys", "own values", "gate")
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference of an output or gradient, relative to the definition's norm."""


def inputs(size: int, *, tiny: bool, device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, both pairs of keys and values, and the gate, of the released 7B's heads: H = 40, G = 8, K = 128."""
    heads, groups, head = (4, 2, 16) if tiny else (40, 8, 128)
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1, heads, size, head), *[(1, groups, size, head)] * 4]
    made = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]
    made.append(torch.rand(1, heads, size, generator=generator, device=device, dtype=dtype))
    return [tensor.requires_grad_() for tensor in made]


def unfused(window: int, tensors: list[Tensor]) -> Tensor:
    """Two calls and the blend."""
    q, k, v, own_k, own_v, gate = tensors
    if find_spec("flash_attn") is not None and q.is_cuda:
        global_ = causal_attention(q, k, v, backend="flash_attention_2")
        local = window_attention(q, own_k, own_v, window=window, backend="flash_attention_2")
    else:
        global_ = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        backend = "flex_attention" if q.is_cuda else "sdpa"
        local = window_attention(q, own_k, own_v, window=window, backend=backend)
    return mixed(gate, global_, local)


def gate_of(window: int, *, tiny: bool, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Relative differences of output and gradients, at a size that the definition can hold."""
    tensors = inputs(48 if tiny else 1000, tiny=tiny, device=device, dtype=dtype)
    found, expected = (run(*tensors, window=window) for run in (gswa, naive.gswa))
    weight = torch.randn_like(expected)
    grads = [torch.autograd.grad(y, tensors, weight) for y in (found, expected)]
    pairs = {"output": (found.detach(), expected.detach())}
    pairs |= {f"gradient of {name}": pair for name, *pair in zip(NAMES, *grads, strict=True)}
    return {name: float((a.double() - b.double()).norm() / b.double().norm()) for name, (a, b) in pairs.items()}


def matmul_ceiling(device: str, dtype: torch.dtype, watch: Stopwatch, side: int) -> float:
    """Floating-point operations a second of a square matrix product."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    job = Job("matmul", lambda: a @ a)
    timed = interleave([job], {"matmul": warm_up(job, watch)}, rounds=ROUNDS, watch=watch)
    return 2 * side**3 / Spread.of(timed["matmul"].seconds()).median


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_kernels.py: --device cuda: torch sees no CUDA device (--tiny --device cpu for a dry run)")
        return 2
    try:
        require_triton(torch.device(args.device))
    except KernelUnavailable as unavailable:
        print(f"gpu_kernels.py: {unavailable} (or, for a dry run, TRITON_INTERPRET=1 with --tiny --device cpu)")
        return 2
    dtype = torch.float32 if args.tiny else torch.bfloat16
    window, size = (5, 64) if args.tiny else (64, 4096)
    gaps = gate_of(window, tiny=args.tiny, device=args.device, dtype=dtype)
    for name, gap in gaps.items():
        print(f"{'green' if gap <= ALLOWED[dtype] else 'RED'}: {name} is {gap:.2g} of its norm from the definition")
    if max(gaps.values()) > ALLOWED[dtype]:
        return 1

    tensors = inputs(size, tiny=args.tiny, device=args.device, dtype=dtype)
    weight = torch.randn_like(tensors[0])

    def backward(run: object) -> object:
        assert callable(run)
        return lambda: torch.autograd.grad(run(), tensors, weight)

    forms = {"fused": lambda: gswa(*tensors, window=window), "two calls": lambda: unfused(window, tensors)}
    jobs = [Job(name, work) for name, work in forms.items()]
    jobs += [Job(f"{name}, backward too", backward(work)) for name, work in forms.items()]
    watch = Stopwatch(torch.device(args.device))
    timed = {job.name: warm_up(job, watch) for job in jobs}
    timed = interleave(jobs, timed, rounds=2 if args.tiny else ROUNDS, watch=watch)
    ceiling = matmul_ceiling(args.device, dtype, watch, 256 if args.tiny else 8192)
    _, heads, _, head = tensors[0].shape
    operations = 4 * heads * head * (size * (size + 1) / 2 + size * (window + 1))
    found = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "positions": size,
        "ms": {name: Spread.of(one.seconds()).times(1000).median for name, one in timed.items()},
        "fused_over_two_calls": ratio(timed["fused"], timed["two calls"]).median,
        "fused_over_two_calls_with_backward": ratio(
            timed["fused, backward too"], timed["two calls, backward too"]
        ).median,
        "of_the_matmul_ceiling": operations / Spread.of(timed["fused"].seconds()).median / ceiling,
        "matmul_tflops": ceiling / 1e12,
    }
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.write_text(json.dumps({"gates": gaps, **found}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
