"""Every per-loop measurement computed a second time, slowly, in numpy float64: what the diagnostics are held against.

Written from the architecture's and the measurements' definitions alone; nothing comes from the modelling code or the
diagnostics. One sample at a time, no batch, no padding, whole S x S maps, singular values by SVD.

    model = ReferenceModel.read(Path("checkpoint"))          # raw weights and config.json
    trace = model.trace([1, 5, 9])                           # states, attention and outputs of every loop
    rows = measure(trace)                                    # {(loop, measurement, variant, layer, position): Cell}
    measure_heads([trace])                                   # {(loop, layer, head_i, head_j): (cosine, samples)}

    S tokens   D width   H heads   K head size   L layers   R loops   V vocabulary   w window

Distributions are kept as logarithms, so that what underflows in exp() still has its exact Kullback-Leibler divergence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
LOG_ZERO = -np.inf


# --- the forward pass ------------------------------------------------------------------------------------------------


@dataclass
class LayerAttention:
    """One layer in one loop. log_mixed_HSS always; the rest where the layer has two branches."""

    log_mixed_HSS: Array
    log_global_HSS: Array | None = None
    log_local_HSS: Array | None = None
    gate_HS: Array | None = None


@dataclass
class ReferenceTrace:
    """raw: h(0) .. h(R) before the final norm. further: loop R + 1's output, None for one loop. first: the block over
    z(1) .. z(R) as loop 1 runs it. attention[r - 1][layer]."""

    model: ReferenceModel
    ids: list[int]
    raw: list[Array]
    further: Array | None
    first: list[Array]
    attention: list[list[LayerAttention]] = field(repr=False)


@dataclass(frozen=True)
class ReferenceModel:
    """A checkpoint as its config and its weights say."""

    config: Mapping[str, Any]
    weights: Mapping[str, Array]

    @classmethod
    def read(cls, folder: Path, **changes: Any) -> ReferenceModel:
        """The checkpoint of a folder, with some keys of its config changed."""
        from safetensors import safe_open

        weights: dict[str, Array] = {}
        for file in sorted(folder.glob("*.safetensors")):
            if file.name == "expected.safetensors":
                continue
            with safe_open(file, framework="pt") as tensors:
                weights.update({name: tensors.get_tensor(name).double().numpy() for name in tensors.keys()})  # noqa: SIM118
        return cls(json.loads((folder / "config.json").read_text()) | changes, weights)

    def changed(self, **changes: Any) -> ReferenceModel:
        """The same weights under a changed config."""
        return replace(self, config=dict(self.config) | changes)

    # What the config says, with the released format's defaults.

    @property
    def loops(self) -> int:
        return int(self.config.get("plt_num_loops", 2))

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def window(self) -> int:
        return int((self.config.get("plt_window_size") or [64, 0])[0])

    @property
    def sequential(self) -> bool:
        return self.config.get("plt_loop_mode", "plt") == "sequential"

    @property
    def shifts(self) -> bool:
        return not self.sequential and bool(self.config.get("plt_clp_shift", True))

    @property
    def has_local(self) -> bool:
        return not self.sequential and bool(self.config.get("plt_gswa", True))

    @property
    def scales(self) -> tuple[float, float]:
        """a and b of the input a * E + b * shift(z)."""
        a, b = self.config.get("plt_emb_scale"), self.config.get("plt_hidden_scale")
        return (1.0 if a is None else float(a)), (1.0 if b is None else float(b))

    @property
    def hands_on(self) -> str:
        return "normed" if self.config.get("plt_normalize_per_loop", True) else "raw"

    # The parts.

    def rms_norm(self, x: Array, weight: str) -> Array:
        mean_square = (x * x).mean(-1, keepdims=True)
        return x / np.sqrt(mean_square + float(self.config["rms_norm_eps"])) * self.weights[weight]

    def norm(self, raw: Array) -> Array:
        """The final norm."""
        return self.rms_norm(raw, "model.norm.weight")

    def handed_on(self, raw: Array) -> Array:
        """z: what the next loop reads of a loop's output."""
        return self.norm(raw) if self.hands_on == "normed" else raw

    def log_probabilities(self, raw: Array) -> Array:
        """log p(r) [S, V]."""
        head = "model.embed_tokens.weight" if self.config.get("tie_word_embeddings") else "lm_head.weight"
        return log_softmax(self.norm(raw) @ self.weights[head].T)

    def loop_input(self, embedded: Array, z: Array) -> Array:
        """What a loop from the second on reads of the loop before."""
        if self.sequential:
            return z
        a, b = self.scales
        return a * embedded + b * (shifted(z) if self.shifts else z)

    def _heads_of(self, x: Array, name: str, count: int) -> Array:
        """A projection, split into heads: [count, S, K]."""
        y = x @ self.weights[name].T
        return y.reshape(len(x), count, -1).transpose(1, 0, 2)

    def rotate(self, x_HSK: Array) -> Array:
        """RoPE, half-split. The angles are float32 tables, as in the released model's own code."""
        theta = self.config.get("rope_theta") or (self.config.get("rope_parameters") or {}).get("rope_theta", 500000.0)
        size = x_HSK.shape[-1]
        exponents = np.arange(0, size, 2) / size
        frequencies = np.float32(1.0) / np.power(float(theta), exponents).astype(np.float32)
        angles = np.arange(x_HSK.shape[1], dtype=np.float32)[:, None] * frequencies[None, :]
        cos, sin = (f(angles.astype(np.float64)).astype(np.float32).astype(np.float64) for f in (np.cos, np.sin))
        left, right = x_HSK[..., : size // 2], x_HSK[..., size // 2 :]
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)

    def _gate_logits(self, layer: int, x: Array, q_HSK: Array) -> Array:
        """The gate before its sigmoid [H, S], from the layer's input or from each head's query."""
        name = f"model.layers.{layer}.self_attn.plt_gate."
        weight, bias = self.weights[name + "weight"], self.weights[name + "bias"]
        if self.config.get("plt_gate_use_hidden_states", False):
            return (self.rms_norm(x, name + "gate_norm.weight") @ weight.T + bias).T
        return np.stack([q_HSK[h] @ weight[h] + bias[h] for h in range(self.heads)])

    def block(self, x: Array, cache: list[tuple[Array, Array]] | None) -> tuple[Array, list[LayerAttention], list[Any]]:
        """The L layers over x. cache: loop 1's keys and values a layer; None runs the block as loop 1 does.
        Gives the output, the attention, and the block's own keys and values."""
        attention, own = [], []
        groups = int(self.config.get("num_key_value_heads") or self.heads)
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            normed = self.rms_norm(x, name + "input_layernorm.weight")
            q_HSK = self.rotate(self._heads_of(normed, name + "self_attn.q_proj.weight", self.heads))
            k_GSK = self.rotate(self._heads_of(normed, name + "self_attn.k_proj.weight", groups))
            v_GSK = self._heads_of(normed, name + "self_attn.v_proj.weight", groups)
            k_HSK, v_HSK = (np.repeat(t, self.heads // groups, axis=0) for t in (k_GSK, v_GSK))
            own.append((k_HSK, v_HSK))
            if cache is None:
                seen = LayerAttention(log_attention(q_HSK, k_HSK, None))
                y_HSK = np.exp(seen.log_mixed_HSS) @ v_HSK
            else:
                seen, y_HSK = self._two_branches(layer, x, q_HSK, cache[layer], (k_HSK, v_HSK))
            attention.append(seen)
            x = x + y_HSK.transpose(1, 0, 2).reshape(len(x), -1) @ self.weights[name + "self_attn.o_proj.weight"].T
            x = x + self._mlp(self.rms_norm(x, name + "post_attention_layernorm.weight"), name + "mlp.")
        return x, attention, own

    def _mlp(self, x: Array, name: str) -> Array:
        gate, up = x @ self.weights[name + "gate_proj.weight"].T, x @ self.weights[name + "up_proj.weight"].T
        return (gate * np.exp(log_sigmoid(gate)) * up) @ self.weights[name + "down_proj.weight"].T

    def _two_branches(self, layer: int, x: Array, q_HSK: Array, first: Any, own: Any) -> tuple[LayerAttention, Array]:
        log_global = log_attention(q_HSK, first[0], None)
        y_global = np.exp(log_global) @ first[1]
        if not self.has_local:
            return LayerAttention(log_global), y_global
        log_local = log_attention(q_HSK, own[0], self.window)
        logits_HS = self._gate_logits(layer, x, q_HSK)
        log_g, log_rest = log_sigmoid(logits_HS)[..., None], log_sigmoid(-logits_HS)[..., None]
        with np.errstate(invalid="ignore"):  # logaddexp(-inf, -inf) is -inf
            log_mixed = np.logaddexp(log_g + log_global, log_rest + log_local)
        y = np.exp(log_g) * y_global + np.exp(log_rest) * (np.exp(log_local) @ own[1])
        return LayerAttention(log_mixed, log_global, log_local, np.exp(log_g[..., 0])), y

    def trace(self, ids: Sequence[int]) -> ReferenceTrace:
        """All R loops over one sample, and one loop more where there is more than one."""
        embedded = self.weights["model.embed_tokens.weight"][np.asarray(ids)]
        raw, attention, cache = [embedded], [], None
        for loop in range(1, self.loops + (2 if self.loops > 1 else 1)):
            x = embedded if loop == 1 else self.loop_input(embedded, self.handed_on(raw[-1]))
            out, seen, own = self.block(x, None if self.sequential else cache)
            cache = own if cache is None else cache
            raw.append(out)
            attention.append(seen)
        further = raw.pop() if self.loops > 1 else None
        first = [self.block(self.handed_on(h), None)[0] for h in raw[1:]]
        return ReferenceTrace(self, list(ids), raw, further, first, attention[: self.loops])


def shifted(z: Array) -> Array:
    """One position to the right, zeros at the first token."""
    return np.concatenate([np.zeros_like(z[:1]), z[:-1]])


def log_sigmoid(x: Array) -> Array:
    return -np.logaddexp(0.0, -x)


def log_softmax(x: Array) -> Array:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def log_attention(q_HSK: Array, k_HSK: Array, window: int | None) -> Array:
    """log softmax(q k^T / sqrt(K)), causal: the token itself, and w positions before it where there is a window."""
    scores = q_HSK @ k_HSK.transpose(0, 2, 1) / math.sqrt(q_HSK.shape[-1])
    for query in range(scores.shape[1]):
        scores[:, query, query + 1 :] = LOG_ZERO
        if window is not None:
            scores[:, query, : max(0, query - window)] = LOG_ZERO
    return log_softmax(scores)


# --- the measures ----------------------------------------------------------------------------------------------------


def length(x: Array) -> Array:
    """L2 norm, per token."""
    return np.sqrt((x * x).sum(-1))


def has_moved(update: Array, state: Array) -> bool:
    """Whether an update is more than float64's rounding of the state. A loop may leave a token exactly where it was
    (the first one reads zeros for its neighbour in every loop); what rounding makes of such a zero has no direction."""
    size = length(update)
    return not (np.isfinite(size) and size <= 1e-13 * length(state))


def cosine(a: Array, b: Array) -> Array:
    return (a * b).sum(-1) / (length(a) * length(b))


def entropy(log_p: Array) -> Array:
    """-sum p ln p in nats; 0 ln 0 is 0."""
    return -np.where(log_p > LOG_ZERO, np.exp(log_p) * np.where(log_p > LOG_ZERO, log_p, 0.0), 0.0).sum(-1)


def divergence(log_p: Array, log_q: Array) -> Array:
    """KL(p || q) in nats; where p is 0 nothing is added, whatever q is."""
    seen = log_p > LOG_ZERO
    with np.errstate(invalid="ignore"):
        return np.where(seen, np.exp(log_p) * (np.where(seen, log_p, 0.0) - np.where(seen, log_q, 0.0)), 0.0).sum(-1)


def effective_rank(matrix: Array) -> float:
    """exp of the entropy of the singular values, normalised to sum 1."""
    if not np.isfinite(matrix).all():
        return math.nan
    values = np.linalg.svd(matrix, compute_uv=False)
    shares = values / values.sum()
    return math.exp(-sum(s * math.log(s) for s in shares if s > 0))


class Cell(NamedTuple):
    """value: mean over the finite ones, None where there are none."""

    value: float | None
    count: int
    nonfinite: int


Key = tuple[int, str, str, int | None, int | None]
"""loop, measurement, variant, layer, position."""
Rows = dict[Key, Cell]


def bin_of(position: int) -> int:
    """The first position of its bin: 0, 1, 2-3, 4-7, 8-15, ..."""
    return 0 if position == 0 else 2 ** math.floor(math.log2(position))


def cell(values: Array) -> Cell:
    finite = values[np.isfinite(values)]
    mean = float(finite.mean()) if finite.size else None
    return Cell(mean, int(finite.size), int(values.size - finite.size))


@dataclass
class _Sheet:
    """The rows of one sample."""

    rows: Rows = field(default_factory=dict)

    def sample(self, loop: int, name: str, variant: str, values: Array) -> None:
        """The sample-level row alone."""
        if values.size:
            self.rows[loop, name, variant, None, None] = cell(values)

    def tokens(self, loop: int, name: str, variant: str, values: Array, positions: Sequence[int]) -> None:
        """One value a token [n], at these positions."""
        self.sample(loop, name, variant, values)
        bins = np.asarray([bin_of(p) for p in positions], dtype=np.int64)
        for start in sorted(set(bins.tolist())):
            self.rows[loop, name, variant, None, start] = cell(values[bins == start])

    def layered(self, loop: int, name: str, variant: str, values: Array, positions: Sequence[int]) -> None:
        """One value a layer, a query and perhaps a head: [L, n] or [L, H, n]."""
        self.sample(loop, name, variant, values.reshape(-1))
        for layer, of_layer in enumerate(values):
            self.rows[loop, name, variant, layer, None] = cell(of_layer.reshape(-1))
        bins = np.asarray([bin_of(p) for p in positions], dtype=np.int64)
        for start in sorted(set(bins.tolist())):
            self.rows[loop, name, variant, None, start] = cell(values[..., bins == start].reshape(-1))


def measure(trace: ReferenceTrace) -> Rows:
    """Every cell of one sample."""
    sheet = _Sheet()
    with np.errstate(all="ignore"):
        measure_states(trace, sheet)
        measure_attention(trace, sheet)
        measure_outputs(trace, sheet)
    return sheet.rows


def measure_states(trace: ReferenceTrace, sheet: _Sheet) -> None:
    model, everywhere = trace.model, range(len(trace.ids))
    for state, of in (("raw", lambda h: h), ("normed", model.norm)):
        h = [of(x) for x in trace.raw]
        for r in range(1, model.loops + 1):
            sheet.tokens(r, "step_size", state, length(h[r] - h[r - 1]), everywhere)
            if np.any(h[r] != 0):
                sheet.sample(r, "effective_rank", state, np.asarray([effective_rank(h[r])]))
            following = (
                of(trace.raw[r + 1]) if r < model.loops else None if trace.further is None else of(trace.further)
            )
            if following is not None:
                sheet.tokens(r, "fixed_point_gap", f"{state}/as_next", length(h[r] - following), everywhere)
            sheet.tokens(r, "fixed_point_gap", f"{state}/as_first", length(h[r] - of(trace.first[r - 1])), everywhere)
        for r in range(2, model.loops + 1):
            now, before = h[r] - h[r - 1], h[r - 1] - h[r - 2]
            defined = [i for i in everywhere if has_moved(now[i], h[r][i]) and has_moved(before[i], h[r - 1][i])]
            sheet.tokens(r, "angular_change", state, cosine(now, before)[defined], defined)
            sheet.tokens(r, "offset_cost", state, length(h[r - 1][1:] - h[r - 1][:-1]), everywhere[1:])
    if model.shifts:
        a, b = model.scales
        for r in range(2, model.loops + 1):
            z, embedded = model.handed_on(trace.raw[r - 1]), trace.raw[0]
            moved, read = b * (z[1:] - z[:-1]), a * embedded[1:] + b * z[:-1]
            defined = [i for i in everywhere[:-1] if np.any(read[i] != 0)]
            ratios = (length(moved) / length(read))[defined]
            sheet.tokens(r, "effective_offset_cost", "", ratios, [i + 1 for i in defined])


def sampled_queries(n: int) -> list[int]:
    """Every k-th query, counted back from the last one; k = ceil(n / 256)."""
    return sorted(range(n - 1, -1, -math.ceil(n / 256)))


def head_cosines(log_rows_HS: Array) -> Array:
    """The cosine of every two heads' attention rows at one query [H, H]."""
    rows = np.exp(log_rows_HS)
    return np.asarray([[cosine(a, b) for b in rows] for a in rows])


def measure_attention(trace: ReferenceTrace, sheet: _Sheet) -> None:
    everywhere, queries = range(len(trace.ids)), sampled_queries(len(trace.ids))
    for r, layers in enumerate(trace.attention, start=1):
        mixed_LHSS = np.stack([a.log_mixed_HSS for a in layers])
        sheet.layered(r, "attention_entropy", "mixed", entropy(mixed_LHSS), everywhere)
        ranks = [[effective_rank(np.exp(of_layer[:, q])) for q in queries] for of_layer in mixed_LHSS]
        sheet.layered(r, "head_rank", "", np.asarray(ranks), queries)
        pairs = np.triu_indices(trace.model.heads, k=1)
        if len(pairs[0]):
            means = [[head_cosines(of_layer[:, q])[pairs].mean() for q in queries] for of_layer in mixed_LHSS]
            sheet.layered(r, "head_cosine", "", np.asarray(means), queries)
        if layers[0].gate_HS is not None:
            sheet.layered(r, "gate", "", np.stack([a.gate_HS for a in layers]), everywhere)
        if r == 1:
            continue
        before = trace.attention[r - 2]
        sheet.layered(r, "attention_kl", "mixed", _against(layers, before, "log_mixed_HSS"), everywhere)
        if layers[0].gate_HS is not None:
            for variant in ("global", "local"):
                branch = f"log_{variant}_HSS"
                entropies = entropy(np.stack([getattr(a, branch) for a in layers]))
                sheet.layered(r, "attention_entropy", variant, entropies, everywhere)
                sheet.layered(r, "attention_kl", variant, _against(layers, before, branch), everywhere)


def _against(layers: Sequence[LayerAttention], before: Sequence[LayerAttention], branch: str) -> Array:
    """KL of a branch against the same branch of the loop before; against plain attention where that is loop 1."""
    out = []
    for now, then in zip(layers, before, strict=True):
        old = getattr(then, branch)
        out.append(divergence(getattr(now, branch), then.log_mixed_HSS if old is None else old))
    return np.stack(out)


def measure_outputs(trace: ReferenceTrace, sheet: _Sheet) -> None:
    everywhere = range(len(trace.ids))
    log_p = [trace.model.log_probabilities(h) for h in trace.raw]
    shifts = []
    for r in range(1, trace.model.loops + 1):
        followed = list(everywhere[:-1])
        truth = np.asarray(trace.ids[1:], dtype=np.int64)
        of_truth = log_p[r][followed, truth]
        ranks = 1.0 + (log_p[r][followed] > of_truth[:, None]).sum(-1)
        ranks += ((log_p[r][followed] == of_truth[:, None]).sum(-1) - 1) / 2
        ranks[~np.isfinite(of_truth)] = math.nan
        sheet.tokens(r, "logit_lens_rank", "", ranks, followed)
        sheet.tokens(r, "logit_lens_rank", "log", np.log(ranks), followed)
        sheet.tokens(r, "next_token_nll", "", -of_truth, followed)
        sheet.tokens(r, "output_entropy", "", entropy(log_p[r]), everywhere)
        if r > 1:
            shifts.append(divergence(log_p[r], log_p[r - 1]))
            sheet.tokens(r, "output_shift", "", shifts[-1], everywhere)
    if shifts:
        peaks = np.argmax(np.stack(shifts), axis=0) + 2
        sound = np.isfinite(np.stack(shifts)).all(0)
        moved = np.max(np.stack(shifts), axis=0) > 1e-5
        for r in range(2, trace.model.loops + 1):
            sheet.sample(r, "peak_loop", "", np.where(sound, peaks == r, math.nan)[~sound | moved])


def unclear_peaks(trace: ReferenceTrace, margin: float) -> int:
    """Tokens whose peak loop rounding decides: the two largest output shifts differ by less than `margin` nats."""
    log_p = [trace.model.log_probabilities(h) for h in trace.raw]
    shifts = np.sort([divergence(log_p[r], log_p[r - 1]) for r in range(2, trace.model.loops + 1)], axis=0)
    return int((shifts[-1] - shifts[-2] < margin).sum()) if len(shifts) > 1 else 0


Heads = dict[tuple[int, int, int, int], tuple[float, int]]
"""(loop, layer, head_i, head_j): mean cosine over samples, and how many samples."""


def measure_heads(traces: Sequence[ReferenceTrace]) -> Heads:
    """Head x head cosines: the mean over samples of each sample's mean over its sampled queries."""
    found: dict[tuple[int, int, int, int], list[float]] = {}
    for trace in traces:
        queries = sampled_queries(len(trace.ids))
        for r, layers in enumerate(trace.attention, start=1):
            for layer, seen in enumerate(layers):
                mean_HH = np.mean([head_cosines(seen.log_mixed_HSS[:, q]) for q in queries], axis=0)
                for i, j in np.argwhere(np.isfinite(mean_HH)).tolist():
                    found.setdefault((r, layer, i, j), []).append(float(mean_HH[i, j]))
    return {key: (float(np.mean(values)), len(values)) for key, values in found.items()}
