"""One new token for every slot: the R passes as R rows of one trip through the layers.

    step = DecodeStep(model)
    logits_NV = step(cache, tokens_N, reach=512)        # and every slot is one token longer

Every projection is one matrix product over N * R rows; query, key and value weights lie packed, as do the two of the
feed-forward, and the model's own parameters are views of them. Shapes depend on (N, reach) alone and positions are
tensors, so that a compiler or a graph sees the same step again and again.

    N slots   R passes   H query heads   G key/value heads   K head size   D model width   T reach
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention

from ..attention_plt import mixed
from ..modeling_plt import PLTDecoderLayer, PLTForCausalLM
from .cache import StaticCache

FEWEST_ROWS = 4
"""Rows of a matrix product of an eager step on a CPU; fewer are padded with zeros. oneDNN reads the weights more slowly
for 1 and 2 rows than for 4 (39M parameters, bfloat16, two threads: 4.7, 4.5 and 3.7 ms a step): one loop alone would
look slower than it need be, and loops cheaper."""

FEW_GATES = 8
"""Rows of a gate that a compiled step on a GPU works out without a matrix product."""

GROWING_ROPE = ("dynamic", "longrope")
"""Kinds of RoPE whose frequencies change as a text grows."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor], Tensor]
"""As plt_model.kernels.gswa_decode.gswa_decode."""


class DecodeStep(nn.Module):
    """The step of one model. Raises ValueError for a model whose passes depend on one another within a token."""

    def __init__(self, model: PLTForCausalLM) -> None:
        super().__init__()
        config = model.config
        if not config.one_trip_decode:
            raise ValueError(
                f"loop mode {config.plt_loop_mode!r} without a shift takes one trip a pass: use generate()"
            )
        self.config, self.model = config, model
        self.layers = nn.ModuleList(_Layer(layer) for layer in model.model.layers)  # type: ignore[arg-type]
        self.head = _packed([model.lm_head])
        self.turns: dict[int, tuple[Tensor, Tensor]] = {}
        self.attend: Attend | None = None
        """The kernel of one step's attention; None: torch's own."""
        self.run_layer: Callable[..., Tensor] = run_layer
        """How a layer is called: itself, or compiled."""

    @torch.no_grad()
    def reorder(self) -> None:
        """Keep each weight once more in the order that oneDNN reads fastest (about half the time a step on a CPU, for
        as much memory again). A compiled step does so by itself and has no use for these."""
        for module in self.modules():
            if isinstance(module, _Packed):
                module.reordered = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), FEWEST_ROWS)

    @torch.no_grad()
    def forward(self, cache: StaticCache, tokens_N: Tensor, reach: int) -> Tensor:
        """Logits [N, V] after one token more in each of the first N slots. `reach`: at least the longest one's tokens
        and one."""
        base, loops, slots = self.model.model, self.config.plt_num_loops, len(tokens_N)
        positions = cache.lengths[:slots]
        embeds = base.embed_tokens(tokens_N)[:, None]
        x = embeds
        if loops > 1:
            kept, handed_on = base.loop_terms(embeds, cache.carry[:slots])
            x = torch.cat([embeds, kept + handed_on], dim=1)
        cos, sin = self.rope(embeds, positions, cache.capacity)
        places = self.places(cache, positions, reach)
        for i, layer in enumerate(self.layers):
            held = (cache.keys[i], cache.values[i], cache.ring_keys[i], cache.ring_values[i])
            x = self.run_layer(layer, x, cos, sin, held, places)
        if loops > 1:
            cache.carry[:slots].copy_(base.handed_on(x[:, :-1]))
        logits: Tensor = self.head(base.norm(x[:, -1]))
        positions += 1
        return logits

    def places(self, cache: StaticCache, positions_n: Tensor, reach: int) -> Places:
        """Where the next tokens go, the first n slots having read `positions_n` tokens."""
        ring, lengths = cache.window + 1, positions_n + 1
        seen = ring_seen = None
        if self.attend is None:
            seen = torch.arange(reach, device=lengths.device) < lengths[:, None]
            ring_seen = torch.arange(ring, device=lengths.device) < lengths[:, None]
        return Places(positions_n, positions_n % max(ring, 1), reach, self.attend, lengths, seen, ring_seen)

    def rope(self, embeds_N1D: Tensor, positions_N: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines [N, 1, K], read out of a table that is made at the first step: a compiler would work
        them out anew in every loop that reads them. Kinds of RoPE that depend on the length have no table."""
        rope = self.model.model.rope
        if (self.config.rope_parameters or {}).get("rope_type") in GROWING_ROPE:
            return rope(embeds_N1D, positions_N[:, None])
        rows = 1 << (capacity - 1).bit_length()
        if rows not in self.turns:
            cos, sin = rope(embeds_N1D, torch.arange(rows, device=embeds_N1D.device)[None])
            self.turns[rows] = cos[0].clone(), sin[0].clone()
        cos, sin = self.turns[rows]
        return cos[positions_N][:, None], sin[positions_N][:, None]


class Places(NamedTuple):
    """Where the new tokens of n slots go, and what they may see."""

    positions_n: Tensor
    ring_n: Tensor
    reach: int
    attend: Attend | None
    lengths_n: Tensor
    """The new token included; what `attend` asks for."""
    seen_nT: Tensor | None
    ring_seen_nw: Tensor | None
    """Masks, for torch's attention."""


class _Layer(nn.Module):
    """One layer's step, on packed weights."""

    def __init__(self, layer: PLTDecoderLayer) -> None:
        super().__init__()
        self.layer = layer
        attn, mlp = layer.self_attn, layer.mlp
        self.qkv = _packed([attn.q_proj, attn.k_proj, attn.v_proj])
        self.up = _packed([mlp.gate_proj, mlp.up_proj])
        self.out, self.down = _packed([attn.o_proj]), _packed([mlp.down_proj])
        assert attn.config.num_key_value_heads is not None
        self.size, self.groups = attn.head_dim, attn.config.num_key_value_heads
        self.heads = attn.config.num_attention_heads
        self.gswa = attn.config.plt_gswa

    def forward(
        self, x_NRD: Tensor, cos: Tensor, sin: Tensor, held: tuple[Tensor, ...], places: Places, first: int = 0
    ) -> Tensor:
        """Rows of passes first, first + 1, ...: all of them in one trip, or some of them in each of several."""
        slots, loops, _ = x_NRD.shape
        qkv = self.qkv(self.layer.input_layernorm(x_NRD)).view(slots, loops, -1, self.size)
        turned = _rotate(qkv[:, :, : self.heads + self.groups], cos[:, :, None], sin[:, :, None])
        q, k = turned[:, :, : self.heads], turned[:, :, self.heads :]
        v = qkv[:, :, self.heads + self.groups :]
        if first == 0:
            _write(held[0], k[:, 0], places.positions_n)
            _write(held[1], v[:, 0], places.positions_n)
        keys, values = held[0][:slots, :, : places.reach], held[1][:slots, :, : places.reach]
        plain = 1 if first == 0 or not self.gswa else 0  # pass 0, where it is among the rows, has no window
        if self.gswa and loops > plain:
            start = first + plain - 1
            _write_rings(held[2], k[:, plain:], places.ring_n, start)
            _write_rings(held[3], v[:, plain:], places.ring_n, start)
            ring_keys, ring_values = (ring[:slots, start : start + loops - plain] for ring in (held[2], held[3]))
            gates = self._gate(x_NRD[:, plain:], q[:, plain:])
            y = self._mixed(q, keys, values, ring_keys, ring_values, gates, places)
        else:
            y = self._plain(q, keys, values, places)
        x_NRD = x_NRD + self.out(y.reshape(slots, loops, -1))
        gate, up = self.up(self.layer.post_attention_layernorm(x_NRD)).chunk(2, dim=-1)
        out: Tensor = x_NRD + self.down(self.layer.mlp.act_fn(gate) * up)
        return out

    def _plain(self, q_NRHK: Tensor, keys: Tensor, values: Tensor, places: Places) -> Tensor:
        """Every row against the shared cache -> [N, R, H, K]."""
        if places.attend is not None:
            return places.attend(q_NRHK, keys, values, None, None, None, places.lengths_n)
        return _attend(q_NRHK, keys, values, places.seen_nT)

    def _mixed(
        self,
        q_NRHK: Tensor,
        keys: Tensor,
        values: Tensor,
        ring_keys_NrGwK: Tensor,
        ring_values_NrGwK: Tensor,
        gate_NrH: Tensor,
        places: Places,
    ) -> Tensor:
        """The same with the window of each of the last r rows mixed in."""
        slots, later = ring_keys_NrGwK.shape[:2]
        plain = q_NRHK.shape[1] - later
        if places.attend is not None and plain:
            return places.attend(q_NRHK, keys, values, ring_keys_NrGwK, ring_values_NrGwK, gate_NrH, places.lengths_n)
        y = self._plain(q_NRHK, keys, values, places)
        own = q_NRHK[:, plain:].reshape(slots * later, 1, self.heads, self.size)
        rings = ring_keys_NrGwK.flatten(0, 1), ring_values_NrGwK.flatten(0, 1)
        if places.attend is not None:
            lengths = places.lengths_n.clamp(max=ring_keys_NrGwK.shape[3])
            local = places.attend(own, *rings, None, None, None, lengths.repeat_interleave(later))
        else:
            assert places.ring_seen_nw is not None
            local = _attend(own, *rings, places.ring_seen_nw.repeat_interleave(later, dim=0))
        local = local.view(slots, later, self.heads, self.size)
        later_y = mixed(gate_NrH, y[:, plain:], local)
        return torch.cat([y[:, :1], later_y], dim=1) if plain else later_y

    def _gate(self, x_NRD: Tensor, q_NRHK: Tensor) -> Tensor:
        """The gate [N, R, H]. Compiled for a CPU, or for few rows on a GPU, it is written as a sum of products: one
        fused loop, where a matrix product with so few columns would cost a call of its own."""
        gate = self.layer.self_attn.plt_gate
        few = x_NRD.device.type == "cpu" or x_NRD.shape[0] * x_NRD.shape[1] <= FEW_GATES
        if not (torch.compiler.is_compiling() and gate.use_hidden_states and few):
            g: Tensor = gate(x_NRD, q_NRHK.transpose(1, 2)).transpose(1, 2)
            return g
        wide = torch.promote_types(x_NRD.dtype, torch.float32)
        products = gate.gate_norm(x_NRD)[:, :, None].to(wide) * gate.weight.to(wide)
        return torch.sigmoid(products.sum(-1).to(x_NRD.dtype) + gate.bias)


def run_layer(
    layer: nn.Module,
    x_NRD: Tensor,
    cos: Tensor,
    sin: Tensor,
    held: tuple[Tensor, ...],
    places: Places,
    first: int = 0,
) -> Tensor:
    """One layer of a DecodeStep, as it is."""
    out: Tensor = layer(x_NRD, cos, sin, held, places, first)
    return out


def _attend(q_NRHK: Tensor, keys_NGTK: Tensor, values_NGTK: Tensor, seen_NT: Tensor | None) -> Tensor:
    """Softmax attention -> [N, R, H, K]. The keys of a group are read once for all its rows; one query row alone is
    doubled where that is faster."""
    slots, loops, heads, size = q_NRHK.shape
    groups = keys_NGTK.shape[1]
    rows = heads // groups
    assert seen_NT is not None
    q = q_NRHK.view(slots, loops, groups, rows, size).permute(0, 2, 1, 3, 4).reshape(slots, groups, -1, size)
    mask = seen_NT[:, None, None, :]
    if q.shape[2] == 1 and q.dtype == torch.bfloat16 and not q.is_cuda:
        y = scaled_dot_product_attention(q.expand(-1, -1, 2, -1), keys_NGTK, values_NGTK, attn_mask=mask)[:, :, :1]
    else:
        y = scaled_dot_product_attention(q, keys_NGTK, values_NGTK, attn_mask=mask)
    return y.view(slots, groups, loops, rows, size).permute(0, 2, 1, 3, 4).reshape(slots, loops, heads, size)


def _write(held_NGTK: Tensor, new_nGK: Tensor, positions_n: Tensor) -> None:
    """One more position for each of the first n slots, in place also where compiled: a cache is never copied."""
    slots, groups = new_nGK.shape[:2]
    device = new_nGK.device
    row, group = torch.arange(slots, device=device)[:, None], torch.arange(groups, device=device)
    held_NGTK.index_put_((row, group, positions_n[:, None]), new_nGK)


def _write_rings(held_NRGWK: Tensor, new_nrGK: Tensor, place_n: Tensor, first: int) -> None:
    """The same for the rings first, first + 1, ... of each slot."""
    slots, loops, groups = new_nrGK.shape[:3]
    device = new_nrGK.device
    row = torch.arange(slots, device=device)[:, None, None]
    loop = torch.arange(first, first + loops, device=device)[:, None]
    group = torch.arange(groups, device=device)
    held_NRGWK.index_put_((row, loop, group, place_n[:, None, None]), new_nrGK)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class _Packed(nn.Module):
    """A projection of a few rows. `reordered`: its weight once more as oneDNN likes it, see DecodeStep.reorder."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), bias
        self.reordered: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        rows = flat.shape[0]
        if x.device.type == "cpu" and rows < FEWEST_ROWS and not torch.compiler.is_compiling():
            flat = pad(flat, (0, 0, 0, FEWEST_ROWS - rows))
        if self.reordered is None or torch.compiler.is_compiling():
            out = linear(flat, self.weight, self.bias)
        else:
            out = torch.ops.mkldnn._linear_pointwise(flat, self.reordered, self.bias, "none", [], "")
        return out[:rows].view(*x.shape[:-1], -1)


@torch.no_grad()
def _packed(parts: list[nn.Linear]) -> _Packed:
    """The projections as one; their weights become views of its weight, so that nothing is held twice, also when
    several models of the same weights are packed."""
    weight = _joined(*(part.weight for part in parts))
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    first = 0
    for part in parts:
        part.weight.data = weight[first : first + part.out_features]
        first += part.out_features
    return _Packed(weight, bias)


def _joined(*parts: Tensor) -> Tensor:
    """The matrices below one another: as they stand where they do so already, else in a copy."""
    rows, start = 0, parts[0]
    for part in parts:
        offset = start.storage_offset() + rows * start.shape[1]
        beside = part.untyped_storage().data_ptr() == start.untyped_storage().data_ptr()
        if not (beside and part.storage_offset() == offset and part.is_contiguous()):
            return torch.cat([part.detach() for part in parts])
        rows += part.shape[0]
    return start.detach().as_strided((rows, start.shape[1]), start.stride())
