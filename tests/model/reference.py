"""The Parallel Loop Transformer written out slowly, token by token, in float64: the truth of these tests.

Nothing here comes from the modelling code. One request at a time, no batch, no padding, no cache: what a cache would
have to remember is said by `chunks` (where the pieces of the prompt begin), which changes nothing unless a mistake of
the cache is asked for. `mistake` computes one of the known misreadings of the architecture instead.

    S tokens   D width   H heads   G key/value heads   K head size   L layers   R passes   V vocabulary   w window

    Reference(config, weights).run([1, 5, 9]).logits            # [S, V]
    Reference(config, weights, mistake="no shift").run(...)

Every tensor of `weights` may ask for gradients: the result is differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MISTAKES: dict[str, str] = {
    "no shift": "passes >= 1 read the previous pass's state of the token itself",
    "shift wraps around": "the request's first token reads the state of its last token, in place of zeros",
    "window one short": "the local branch sees w positions, itself included",
    "window one long": "the local branch sees w + 2 positions, itself included",
    "gate swapped": "g weighs the local branch, 1 - g the global one",
    "gate after input norm": "the gate reads the layer's input after input_layernorm",
    "global on own K/V": "the global branch reads the keys and values of its own pass",
    "local on pass 0's K/V": "the local branch reads the keys and values of pass 0",
    "pass 0 scaled": "pass 0 reads the embeddings times plt_emb_scale",
    "no norm between passes": "the state handed on is always taken before the final norm",
    "interleaved RoPE": "rotary pairs are neighbours, in place of the two halves of a head",
    "carry zeroed": "the first token of a later chunk reads zeros in place of its left neighbour's states",
    "ring one slot short": "a later chunk remembers w - 1 keys of the local branch, in place of w",
}


@dataclass
class Trace:
    """What one run computed. `gates` is [R-1][L] tensors [S, H]; empty lists where no gate is used."""

    logits: Tensor
    states: list[Tensor] = field(default_factory=list)
    """Per pass [S, D], before the final norm."""
    normed: list[Tensor] = field(default_factory=list)
    """Per pass [S, D], after the final norm."""
    handed: list[Tensor] = field(default_factory=list)
    """Per pass but the last, [S, D]: what the next pass reads (the carried vectors, at the last token)."""
    gates: list[list[Tensor]] = field(default_factory=list)

    def carry(self, token: int) -> Tensor:
        """What a cache must carry once `token` was read: [R-1, D]."""
        return torch.stack([z[token] for z in self.handed])


class Reference:
    """One model: `config` holds the keys of a config.json, `weights` the tensors of a checkpoint by their names."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], mistake: str | None = None) -> None:
        assert mistake is None or mistake in MISTAKES, mistake
        self.mistake = mistake
        self.weights = {name: w if w.dtype == torch.float64 else w.double() for name, w in weights.items()}
        self.loops = config.get("plt_num_loops", 2)
        self.layers = config["num_hidden_layers"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.eps = config.get("rms_norm_eps", 1e-5)
        self.theta = float(config.get("rope_theta", 500000.0))
        self.window = (config.get("plt_window_size") or [64, 0])[0]
        self.normalize = config.get("plt_normalize_per_loop", True)
        self.emb_scale = _scale(config.get("plt_emb_scale"))
        self.hidden_scale = _scale(config.get("plt_hidden_scale"))
        self.gate_reads_hidden = config.get("plt_gate_use_hidden_states", False)
        self.sequential = config.get("plt_loop_mode", "plt") == "sequential"
        self.shift = config.get("plt_clp_shift", True)
        self.gswa = config.get("plt_gswa", True)
        self.tied = config.get("tie_word_embeddings", False)

    def run(self, ids: Sequence[int], chunks: Sequence[int] = ()) -> Trace:
        """Read the request `ids`. `chunks` are the positions where the second, third, ... piece of it begins."""
        embedded = self.weights["model.embed_tokens.weight"][torch.tensor(ids)]
        tables = rope_tables(len(ids), self.head_dim, self.theta)
        trace = Trace(logits=embedded)
        shared: list[tuple[Tensor, Tensor]] = []  # pass 0's keys and values, by layer
        for r in range(self.loops):
            x = self._input(r, embedded, trace, chunks)
            gates: list[Tensor] = []
            for i in range(self.layers):
                x = self._layer(i, r, x, tables, shared, gates, chunks)
            normed = self._norm(x, "model.norm.weight")
            trace.states.append(x)
            trace.normed.append(normed)
            if r:
                trace.gates.append(gates)
            if r < self.loops - 1:
                after_norm = self.normalize and self.mistake != "no norm between passes"
                trace.handed.append(normed if after_norm else x)
        head = self.weights["model.embed_tokens.weight" if self.tied else "lm_head.weight"]
        trace.logits = trace.normed[-1] @ head.T
        return trace

    def _input(self, r: int, embedded: Tensor, trace: Trace, chunks: Sequence[int]) -> Tensor:
        """What pass r reads, [S, D]."""
        if r == 0:
            return embedded * self.emb_scale if self.mistake == "pass 0 scaled" else embedded
        z = trace.handed[r - 1]
        if self.sequential:
            return z
        rows = []
        for t in range(len(z)):
            if not self.shift or self.mistake == "no shift":
                neighbour = z[t]
            elif t == 0:
                neighbour = z[-1] if self.mistake == "shift wraps around" else torch.zeros_like(z[0])
            elif t in chunks and self.mistake == "carry zeroed":
                neighbour = torch.zeros_like(z[0])
            else:
                neighbour = z[t - 1]
            rows.append(self.emb_scale * embedded[t] + self.hidden_scale * neighbour)
        return torch.stack(rows)

    def _layer(
        self,
        i: int,
        r: int,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        shared: list[tuple[Tensor, Tensor]],
        gates: list[Tensor],
        chunks: Sequence[int],
    ) -> Tensor:
        """Layer i of pass r on its input x [S, D]. Appends to `shared` in pass 0 and to `gates` later."""
        attention = f"model.layers.{i}.self_attn"
        inner = self._norm(x, f"model.layers.{i}.input_layernorm.weight")
        interleaved = self.mistake == "interleaved RoPE"
        q = rotate(self._split(self._linear(inner, f"{attention}.q_proj")), tables, interleaved)
        k = rotate(self._split(self._linear(inner, f"{attention}.k_proj")), tables, interleaved)
        v = self._split(self._linear(inner, f"{attention}.v_proj"))
        k, v = self._share_heads(k), self._share_heads(v)
        if r == 0:
            shared.append((k, v))
        if r == 0 or self.sequential:
            y = attend(q, k, v, [range(t + 1) for t in range(len(x))])
        else:
            g = self._gate(i, x, inner, q)
            gates.append(g)
            y = self._mixed(q, (k, v), shared[i], g, chunks)
        x = x + self._linear(y.flatten(1), f"{attention}.o_proj")
        inner = self._norm(x, f"model.layers.{i}.post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(self._linear(inner, f"model.layers.{i}.mlp.gate_proj"))
        up = self._linear(inner, f"model.layers.{i}.mlp.up_proj")
        return x + self._linear(gate * up, f"model.layers.{i}.mlp.down_proj")

    def _mixed(
        self,
        q: Tensor,
        own: tuple[Tensor, Tensor],
        first: tuple[Tensor, Tensor],
        g: Tensor,
        chunks: Sequence[int],
    ) -> Tensor:
        """Passes >= 1: global attention to pass 0's keys and values, local to this pass's own, [S, H, K]."""
        causal = [range(t + 1) for t in range(len(q))]
        far = attend(q, *(own if self.mistake == "global on own K/V" else first), causal)
        if not self.gswa:
            return far
        seen = [range(self._oldest(t, chunks), t + 1) for t in range(len(q))]
        near = attend(q, *(first if self.mistake == "local on pass 0's K/V" else own), seen)
        g = g.unsqueeze(-1)
        if self.mistake == "gate swapped":
            g = 1 - g
        return g * far + (1 - g) * near

    def _oldest(self, t: int, chunks: Sequence[int]) -> int:
        """The first position that token t sees in the local branch."""
        reach = self.window + {"window one short": -1, "window one long": 1}.get(self.mistake or "", 0)
        oldest = max(0, t - reach)
        if self.mistake == "ring one slot short":
            start = max([c for c in chunks if c <= t], default=0)
            oldest = max(oldest, start - (self.window - 1)) if start else oldest
        return oldest

    def _gate(self, i: int, x: Tensor, inner: Tensor, q: Tensor) -> Tensor:
        """g, [S, H]: the weight of the global branch."""
        if not self.gswa:
            return q.new_ones(q.shape[:2])
        name = f"model.layers.{i}.self_attn.plt_gate"
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        if self.gate_reads_hidden:
            read = inner if self.mistake == "gate after input norm" else x
            return torch.sigmoid(self._norm(read, f"{name}.gate_norm.weight") @ weight.T + bias)
        return torch.sigmoid((q * weight).sum(-1) + bias)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weights[name]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def _split(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self.head_dim)

    def _share_heads(self, x: Tensor) -> Tensor:
        """[S, G, K] -> [S, H, K]: query head h reads key/value head h // (H / G)."""
        return x[:, [h // (self.heads // self.kv_heads) for h in range(self.heads)]]


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Sequence[range]) -> Tensor:
    """softmax(q k / sqrt(K)) v, where token t sees the positions `seen[t]`; all are [S, H, K]."""
    out = []
    for t, positions in enumerate(seen):
        keys, values = k[positions.start : positions.stop], v[positions.start : positions.stop]
        scores = (q[t] * keys).sum(-1) / math.sqrt(q.shape[-1])
        out.append((torch.softmax(scores, dim=0).unsqueeze(-1) * values).sum(0))
    return torch.stack(out)


def rope_tables(tokens: int, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, [S, K/2]: computed in float32 whatever the model's precision, as the released code does."""
    frequency = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    angle = torch.arange(tokens, dtype=torch.float32)[:, None] * frequency
    return angle.cos().double(), angle.sin().double()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor], interleaved: bool = False) -> Tensor:
    """Turn the pairs of each head of x [S, H, K] by the angles of their positions."""
    cos, sin = (table.unsqueeze(1) for table in tables)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def next_token_loss(logits: Tensor, labels: Sequence[int]) -> Tensor:
    """Mean of -log p(label) in nats, where the logits at t predict the label at t + 1; labels below 0 do not count."""
    terms = [
        torch.logsumexp(logits[t], -1) - logits[t, labels[t + 1]] for t in range(len(labels) - 1) if labels[t + 1] >= 0
    ]
    return torch.stack(terms).mean()


def _scale(value: float | None) -> float:
    return 1.0 if value is None else float(value)
