"""What the diagnostics cost: time against a plain forward pass, and memory above it.

    python scripts/bench_diagnostics.py time --loops 2                # 40M parameters, S = 2048, float32
    python scripts/bench_diagnostics.py time --loops 4 --dtype bfloat16 --each
    python scripts/bench_diagnostics.py memory --loops 2              # L = 14, H = 40, D = 5120, S = 4096, float32

Before anything is timed, the streamed measurements are compared with whole S x S maps on a small model; if they
disagree, nothing is printed but that. Times are medians of ratios over interleaved rounds in one process. Memory is the
peak of the resident set above what it was with the model loaded; the layers of the large model share one set of
weights, and its feed-forward is narrow, so that it fits a laptop: neither changes what the diagnostics hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from plt_diagnostics import MEASUREMENTS, measure
from plt_diagnostics.adapters.plt import PLTAdapter
from plt_model import PLTConfig, PLTForCausalLM

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
MEDIUM = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
LARGE = {
    "vocab_size": 8192,
    "hidden_size": 5120,
    "intermediate_size": 1024,
    "num_hidden_layers": 14,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
}


def model_of(
    sizes: dict[str, int], head_dim: int, loops: int, dtype: torch.dtype, *, one_layer: bool = False
) -> PLTForCausalLM:
    """A random model; with one_layer all layers are the same module."""
    config = PLTConfig(
        **{"vocab_size": 300, **sizes}, head_dim=head_dim, plt_num_loops=loops, plt_window_size=[64, 0],
        plt_gate_use_hidden_states=True, plt_hidden_scale=0.3, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    if not one_layer:
        return PLTForCausalLM(config).to(dtype).eval()
    count, config.num_hidden_layers = config.num_hidden_layers, 1
    model = PLTForCausalLM(config).to(dtype).eval()
    model.model.layers = nn.ModuleList([model.model.layers[0]] * count)
    config.num_hidden_layers = count
    return model


def gate() -> float:
    """The largest difference between streamed entropy and KL and those of whole maps, in nats, in float32."""
    model = model_of(SMALL, 8, 3, torch.float32)
    nn.init.normal_(model.model.layers[0].self_attn.plt_gate.weight)
    adapter = PLTAdapter(model)
    ids, mask = torch.randint(0, 300, (1, 200)), torch.ones(1, 200, dtype=torch.bool)
    rows = measure(adapter, ids, mask, [0], ["attention_entropy", "attention_kl"]).rows.to_pandas()
    rows = rows[rows.layer.notna() & (rows.variant == "mixed")]
    worst = 0.0
    with torch.inference_mode():
        run = adapter.run(ids, mask, further=False, keep=True)
        for layer, loops in enumerate(adapter.attention(run)):
            maps = [_whole(branches) for branches in loops]
            for r, whole in enumerate(maps, 1):
                found = {"attention_entropy": float(torch.special.entr(whole).sum(-1).mean())}
                if r > 1:
                    terms = torch.special.xlogy(whole, whole / maps[r - 2]).nan_to_num(0.0)
                    found["attention_kl"] = float(terms.sum(-1).mean())
                for name, value in found.items():
                    streamed = rows[(rows.layer == layer) & (rows.loop == r) & (rows.measurement == name)].value
                    worst = max(worst, abs(float(streamed.iloc[0]) - value))
    return worst


def _whole(branches: tuple) -> Tensor:
    whole = torch.zeros(())
    for branch in branches:
        q, k = branch.q_BHSK.double(), branch.k_BGSK.double()
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        if branch.window is not None:
            seen = seen.triu(-branch.window)
        part = (q @ k.transpose(-1, -2) * branch.scale).masked_fill(~seen, float("-inf")).softmax(-1)
        whole = whole + (part if branch.weight_BHS is None else part * branch.weight_BHS.double()[..., None])
    return whole


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bench_time(options: argparse.Namespace) -> dict[str, object]:
    """Ratios of the battery, and with --each of every measurement alone, to a plain forward pass."""
    model = model_of(MEDIUM, 64, options.loops, getattr(torch, options.dtype))
    adapter = PLTAdapter(model)
    ids = torch.randint(0, MEDIUM["vocab_size"], (1, options.length))
    mask = torch.ones_like(ids, dtype=torch.bool)

    def forward() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)

    jobs: dict[str, Callable[[], object]] = {"forward": forward, "all": lambda: measure(adapter, ids, mask, [0])}
    if options.each:
        jobs |= {name: (lambda name=name: measure(adapter, ids, mask, [0], [name])) for name in MEASUREMENTS}
    forward()
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(options.rounds):
        for name, job in jobs.items():
            taken[name].append(seconds(job))
    plain = statistics.median(taken["forward"])
    ratios = {name: [t / f for t, f in zip(times, taken["forward"], strict=True)] for name, times in taken.items()}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "length": options.length,
        "loops": options.loops,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "forward_seconds": round(plain, 3),
        "ratio_to_forward": {
            name: {"median": round(statistics.median(r), 2), "low": round(min(r), 2), "high": round(max(r), 2)}
            for name, r in ratios.items()
            if name != "forward"
        },
    }


def bench_memory(options: argparse.Namespace) -> dict[str, object]:
    """Peaks in MiB above the loaded model: of a plain forward pass, and of all measurements."""
    model = model_of({**LARGE, "num_hidden_layers": options.layers}, 128, options.loops, torch.float32, one_layer=True)
    adapter = PLTAdapter(model)
    ids = torch.randint(0, LARGE["vocab_size"], (1, options.length))

    def forward() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)

    def battery() -> None:
        measure(adapter, ids, torch.ones_like(ids, dtype=torch.bool), [0])

    plain_peak, plain_seconds = _peak(forward)
    peak, taken = _peak(battery)
    return {
        "layers": options.layers,
        "heads": LARGE["num_attention_heads"],
        "width": LARGE["hidden_size"],
        "length": options.length,
        "loops": options.loops,
        "forward_peak_mib": plain_peak,
        "battery_peak_mib": peak,
        "above_forward_mib": peak - plain_peak,
        "forward_seconds": round(plain_seconds, 1),
        "battery_seconds": round(taken, 1),
    }


def _peak(work: Callable[[], object]) -> tuple[int, float]:
    """(peak resident MiB above what is resident now, seconds)."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    taken = seconds(work)
    return (_resident("VmHWM") - before) // 1024, taken


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: expected at least 1")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benches = parser.add_subparsers(dest="what", required=True)
    timed = benches.add_parser("time", help="ratio to a plain forward pass")
    timed.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    timed.add_argument("--rounds", type=_positive, default=5)
    timed.add_argument("--each", action="store_true", help="time each measurement alone too")
    memory = benches.add_parser("memory", help="peak above the loaded model")
    memory.add_argument("--layers", type=_positive, default=14)
    for bench, length in ((timed, 2048), (memory, 4096)):
        bench.add_argument("--loops", type=_positive, default=2)
        bench.add_argument("--length", type=_positive, default=length, help=f"tokens (default {length})")
        bench.add_argument("--threads", type=_positive, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    worst = gate()
    if not worst < 1e-5:
        print(f"streamed and whole maps differ by {worst:.1e} nats: nothing is measured", file=sys.stderr)
        return 1
    found = bench_time(options) if options.what == "time" else bench_memory(options)
    print(json.dumps({"gate_nats": worst, **found}, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
