"""The decode step as fast as the machine allows: compiled or with reordered weights on a CPU, a CUDA graph on a GPU.

    step = fast_step(DecodeStep(model))          # called as the step is: logits = step(cache, tokens, reach)
    logits = step(cache, tokens_n, step.reach(tokens, capacity))

What a compiler or a graph takes over is made once for each bucket: the number of slots, the reach and the cache's
size. Rows do not mix, so the rows of a bucket that hold no request disturb none that do. On a CPU the whole step is
compiled, weights and all; on a GPU one layer, for all layers, and the graph makes one launch of what they launch.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from ..kernels import KernelUnavailable
from ..kernels.gswa_decode import DTYPES, gswa_decode, why_not
from ..kernels.gswa_decode.cpu import load
from .step import DecodeStep, run_layer

MODES = ("auto", "on", "off")

FEW_ROWS = 4
"""Rows of a 16-bit matrix product on a CPU that the compiler's own loops take faster than oneDNN does: they read the
weights as fast as the memory gives them, and calculate in float32 (39M parameters, two threads: 2.3 and 3.1 ms a step
of one row, 2.9 and 3.5 of four, but 9.6 and 5.7 of eight)."""

SPARE = 4
"""Weights are kept a second time, reordered, where that takes at most 1/SPARE of the free memory."""


class Cache(Protocol):
    """What a step needs to know of its cache beyond its tensors."""

    slots: int
    capacity: int

    @property
    def lengths(self) -> Tensor: ...


Step = Callable[[Any, Tensor, int], Tensor]
"""(cache, tokens [n], reach) -> logits [n, V]; each of the first n slots is one token longer afterwards."""


def reach_bucket(tokens: int, capacity: int) -> int:
    """`tokens` rounded up to 256, 384, 512, 768, 1024, 1536, ...; at most `capacity`."""
    size = 256
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, capacity)


def fast_step(step: nn.Module, *, compile: str = "auto", notify: Callable[[str], None] = lambda _: None) -> FastStep:
    """The fast form of a DecodeStep (or of a baseline that is called alike), for the device its model is on.

    compile "on" compiles each bucket: on a CPU some 20 seconds each, for steps in half the time; "off" does not;
    "auto" does on a GPU, where fewer kernels are launched, and not on a CPU. `notify` hears what was chosen. The
    weights are taken as they are now: a step that is compiled or reordered does not see them change.
    Raises ValueError for another mode, and at the first call when "on" cannot be had.
    """
    if compile not in MODES:
        raise ValueError(f"compile is {compile!r}: expected one of {', '.join(MODES)}")
    return FastStep(step, compile, notify)


class FastStep:
    """See :func:`fast_step`. `about` says in words what runs."""

    def __init__(self, step: nn.Module, compile: str, notify: Callable[[str], None]) -> None:
        self.step, self.notify = step, notify
        self.device = next(step.parameters()).device
        self.on_gpu = self.device.type == "cuda"
        self.required = compile == "on"
        self.compiling = self.required or (compile == "auto" and self.on_gpu)
        self.compiled: dict[tuple[int, ...], Step] = {}
        self.graphs: dict[tuple[int, ...], Step] = {}
        self.kernel = self._take_kernel()
        self.about = "compiled" if self.compiling else "eager"
        if self.on_gpu:
            self.about += ", CUDA graphs"
        elif not self.compiling and self._reorder():
            self.about += ", reordered weights"
        if self.kernel:
            self.about += f", {self.kernel} attention"

    def reach(self, tokens: int, capacity: int) -> int:
        """How far a step must look for slots of up to `tokens` tokens, the new one included."""
        if self.kernel:  # it reads no further than each slot's length
            return capacity
        if self.compiling or self.on_gpu:
            return reach_bucket(tokens, capacity)
        return min(-(-tokens // 64) * 64, capacity)

    @torch.no_grad()
    def __call__(self, cache: Cache, tokens_n: Tensor, reach: int) -> Tensor:
        """Logits [n, V]; on a GPU they are overwritten by the next call of the same bucket."""
        if not (self.compiling or self.on_gpu):
            logits: Tensor = self.step(cache, tokens_n, reach)
            return logits
        bucket = (len(tokens_n), reach, cache.slots, cache.capacity)
        if not self.on_gpu:
            return self._compiled(bucket, cache, tokens_n)(cache, tokens_n, reach)
        key = (*bucket, id(cache))  # a graph holds the addresses of one cache's tensors
        if key not in self.graphs:
            self.graphs[key] = _Graph(self._compiled(bucket, cache, tokens_n), cache, tokens_n, reach)
        return self.graphs[key](cache, tokens_n, reach)

    def release(self) -> None:
        """Forget the graphs, which hold on to the caches that they were made for."""
        self.graphs.clear()

    def _compiled(self, bucket: tuple[int, ...], cache: Cache, tokens_n: Tensor) -> Step:
        """The step for one bucket, which holds for any cache of its size."""
        if bucket not in self.compiled:
            self.compiled[bucket] = self._make(cache, tokens_n, bucket[1])
        return self.compiled[bucket]

    def _make(self, cache: Cache, tokens_n: Tensor, reach: int) -> Step:
        if not self.compiling:
            return self.step
        _rehearse(self.step, cache, tokens_n, reach)  # what a first step makes for all others is not to be compiled
        run = layers_compiled(self.step) if self.on_gpu else _compiled(self.step, self._cpu_options(len(tokens_n)))
        try:
            with inductor_config.patch(freezing=not self.on_gpu):  # dynamo asks the setting itself, not its options
                _rehearse(run, cache, tokens_n, reach)
        except Exception as error:
            what = f"the decode step cannot be compiled here: {type(error).__name__}: {str(error).splitlines()[0]}"
            if self.required:
                raise ValueError(f"{what}; go without (compile off)") from error
            self.notify(f"{what}; going on without")
            self.compiling, self.about = False, self.about.replace("compiled", "eager")
            return self.step
        return run

    def _cpu_options(self, slots: int) -> dict[str, Any]:
        """Weights as constants, packed as the products read them; and who computes the products."""
        step, dtype = self.step, next(self.step.parameters()).dtype
        rows = slots * (step.config.plt_num_loops if isinstance(step, DecodeStep) else 1)
        options: dict[str, Any] = {"freezing": True, "cpp_wrapper": True}  # a call from Python costs as much as a loop
        if dtype == torch.float32:  # it would go to a library that is slow on other makers' processors
            options |= {"max_autotune": True, "max_autotune_gemm_backends": "ATEN,CPP"}
        elif rows <= FEW_ROWS:
            options |= {"max_autotune": True, "max_autotune_gemm_backends": "CPP"}
        return options

    def _take_kernel(self) -> str | None:
        """The language of the kernel that the step's attention is from now on: on a CPU C++, built where it never was;
        on a GPU Triton, for models whose attention is `triton`. None: it stays torch's."""
        step = _inner(self.step)
        if not isinstance(step, DecodeStep) or next(step.parameters()).dtype not in DTYPES:
            return None
        if self.on_gpu:
            if step.config._attn_implementation != "triton" or not _triton_serves(step):
                return None
            step.attend = gswa_decode
            return "Triton"
        try:
            step.attend = load()
        except KernelUnavailable as missing:
            self.notify(f"{missing}; going on with torch's attention")
            return None
        return "C++"

    def _reorder(self) -> bool:
        size = sum(weight.nbytes for weight in self.step.parameters())
        step = _inner(self.step)
        if not isinstance(step, DecodeStep) or not _onednn_takes(next(step.parameters()).dtype):
            return False
        if size * SPARE > psutil.virtual_memory().available:
            return False
        step.reorder()
        return True


def _onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    onednn = torch.ops.mkldnn
    halves = {torch.bfloat16: onednn._is_mkldnn_bf16_supported, torch.float16: onednn._is_mkldnn_fp16_supported}
    return dtype == torch.float32 or (dtype in halves and bool(halves[dtype]()))


def _triton_serves(step: DecodeStep) -> bool:
    """Whether the Triton kernel takes this model's rows and heads."""
    config = step.config
    place: dict[str, Any] = {"dtype": next(step.parameters()).dtype, "device": "meta"}
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None
    q = torch.empty(1, config.plt_num_loops, config.num_attention_heads, config.head_dim, **place)
    return why_not(q, torch.empty(1, config.num_key_value_heads, 1, config.head_dim, **place)) is None


def _inner(step: nn.Module) -> nn.Module:
    """The DecodeStep that a baseline is made of; a step itself."""
    inner: nn.Module = getattr(step, "step", step)
    return inner


def _compiled(step: nn.Module, options: dict[str, Any]) -> Step:
    """`step` compiled for one bucket. It checks nothing when it is called: a bucket's key says all that may differ, and
    walking through every layer's attributes takes as long as a layer. So it has code of its own, for torch keeps what
    it compiled beside the code."""

    def run(cache: Any, tokens_n: Tensor, reach: int) -> Tensor:
        logits: Tensor = step(cache, tokens_n, reach)
        return logits

    return _unguarded(run, options)


def layers_compiled(step: nn.Module) -> Step:
    """`step` for one bucket with a layer that is compiled once for all of them, their weights being its arguments: a
    fourteenth of the compiler's work for fourteen layers. (Once for each `first`, which only a trip a pass has many
    of.) Meant for a graph to record: a call still goes through Python layer by layer."""
    inner, made = _inner(step), dict[int, Callable[..., Tensor]]()
    assert isinstance(inner, DecodeStep)

    def run_compiled(layer: nn.Module, *inputs: Any) -> Tensor:
        first = inputs[5] if len(inputs) > 5 else 0

        def run(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, held: Any, places: Any) -> Tensor:
            return run_layer(layer, x, cos, sin, held, places, first)

        if first not in made:
            made[first] = _unguarded(run, {})
        return made[first](layer, *inputs[:5])

    def run_all(cache: Any, tokens_n: Tensor, reach: int) -> Tensor:
        before, inner.run_layer = inner.run_layer, run_compiled
        try:
            logits: Tensor = step(cache, tokens_n, reach)
        finally:
            inner.run_layer = before
        return logits

    return run_all


def _unguarded(run: Callable[..., Tensor], options: dict[str, Any]) -> Callable[..., Tensor]:
    """`run` compiled, to be called with what differs in numbers alone."""
    own = types.FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)
    options = options | {"guard_filter_fn": lambda guards: [False] * len(guards)}
    return torch.compile(own, fullgraph=True, dynamic=False, options=options)


def _rehearse(run: Step, cache: Cache, tokens_n: Tensor, reach: int) -> None:
    """One call that leaves no trace: what it writes, the call in earnest writes again."""
    lengths, carry = cache.lengths.clone(), getattr(cache, "carry", None)
    carried = None if carry is None else carry.clone()
    run(cache, tokens_n, reach)
    cache.lengths.copy_(lengths)
    if carry is not None and carried is not None:
        carry.copy_(carried)


class _Graph:
    """A step recorded as a CUDA graph: one launch a token, whatever the number of kernels."""

    def __init__(self, run: Step, cache: Cache, tokens_n: Tensor, reach: int) -> None:
        self.cache, self.tokens = cache, tokens_n.clone()  # the cache must live as long as what writes into it
        aside = torch.cuda.Stream(tokens_n.device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(tokens_n.device))
        with torch.cuda.stream(aside):
            for _ in range(2):
                _rehearse(run, cache, self.tokens, reach)
        torch.cuda.current_stream(tokens_n.device).wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # records, and runs nothing
            self.logits = run(cache, self.tokens, reach)

    def __call__(self, _: Any, tokens_n: Tensor, __: int) -> Tensor:
        self.tokens.copy_(tokens_n)
        self.graph.replay()
        return self.logits


__all__ = ["MODES", "FastStep", "fast_step", "reach_bucket"]
