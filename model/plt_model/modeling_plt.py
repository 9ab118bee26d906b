"""The Parallel Loop Transformer on transformers: a Llama whose layers run R times per token, the passes in parallel.

    from plt_model import PLTForCausalLM
    model = PLTForCausalLM.from_pretrained("LoopCoder-V2", loops=2)

Pass 0 is a plain Llama. Pass r >= 1 reads a * E + b * shift(z), z being the output of pass r-1 and shift one position
to the right, so that it depends on the past alone (CLP). Its attention is y = g * global + (1-g) * local (G-SWA):
global reads pass 0's keys and values, local its own over a window, g is a learned gate. Reading a prompt takes R
trips through the layers; a new token takes one, with its R passes as R rows, each weight read once.

    B batch   S tokens   D model width   R passes   H query heads   G key/value heads   K head size   T positions seen

Sources: arXiv 2510.24824 (the mechanism), arXiv 2606.18023 (the released models).
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_plt import BACKENDS, attend_all, causal_attention, gated_attention, mixed
from .cache_plt import PLTCache, PLTCacheLayer
from .configuration_plt import PLTConfig

CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls a cache in generate() and in outputs: the former from 5.24 on. The models take both."""


class PLTRMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * w over the last axis, in at least float32 and never in less than x's own type."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class PLTGate(nn.Module):
    """How much each head relies on the global branch: g in (0, 1), one per head and token.

    Reads the layer's input through a norm of its own, g = sigmoid(W norm(x) + b); or, in query mode, each head's
    post-RoPE query, g = sigmoid(<q_h, W_h> + b_h). Zero-initialised: the blend starts even.
    """

    def __init__(self, config: PLTConfig) -> None:
        super().__init__()
        heads = config.num_attention_heads
        self.use_hidden_states = config.plt_gate_use_hidden_states
        assert config.head_dim is not None
        self.weight = nn.Parameter(
            torch.zeros(heads, config.hidden_size if self.use_hidden_states else config.head_dim)
        )
        self.bias = nn.Parameter(torch.zeros(heads))
        if self.use_hidden_states:
            self.gate_norm = PLTRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BSD: Tensor, q_BHSK: Tensor) -> Tensor:
        """-> g [B, H, S]."""
        if self.use_hidden_states:
            scores = nn.functional.linear(self.gate_norm(x_BSD), self.weight, self.bias).transpose(1, 2)
        else:
            scores = torch.einsum("bhsk,hk->bhs", q_BHSK, self.weight) + self.bias[:, None]
        return torch.sigmoid(scores)


class PLTAttention(nn.Module):
    """Projections, rotary positions and the gated mix of global and local attention."""

    def __init__(self, config: PLTConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.config = config
        self.head_dim, self.window = config.head_dim, config.window
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=bias)
        self.plt_gate = PLTGate(config)

    @property
    def backend(self) -> str:
        name = self.config._attn_implementation or "sdpa"
        if name not in BACKENDS:
            raise ValueError(f"attn_implementation is {name!r}: a PLT has {', '.join(BACKENDS)}")
        return str(name)

    def project(self, normed_BSD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """-> post-RoPE q [B, H, S, K], post-RoPE k and v [B, G, S, K]."""
        shape = (*normed_BSD.shape[:-1], -1, self.head_dim)
        q, k, v = (p(normed_BSD).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *rope)
        return q, k, v

    def output(self, y_BHSK: Tensor) -> Tensor:
        """Heads side by side, then o_proj -> [B, S, D]."""
        projected: Tensor = self.o_proj(y_BHSK.transpose(1, 2).flatten(2))
        return projected

    def first_pass(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Plain causal attention."""
        return causal_attention(q, k, v, mask, backend=self.backend)

    def later_pass(
        self,
        x_BSD: Tensor,
        q: Tensor,
        shared: tuple[Tensor, Tensor],
        own: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """G-SWA -> mixed heads [B, H, S, K] and the gate [B, H, S] (None without a local branch)."""
        if own is None:
            return causal_attention(q, *shared, mask, backend=self.backend), None
        gate = self.plt_gate(x_BSD, q)
        return gated_attention(q, shared, own, gate, mask, window=self.window, backend=self.backend), gate


class PLTDecoderLayer(GradientCheckpointingLayer):
    """A Llama pre-norm block, run as pass 0, as a later pass, or as all passes of one token at once."""

    def __init__(self, config: PLTConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.self_attn = PLTAttention(config)
        self.mlp = LlamaMLP(config)
        self.mlp.act_fn = ACT2FN[config.hidden_act]
        self.input_layernorm = PLTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = PLTRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        shared_keys: Tensor | None,
        shared_values: Tensor | None,
        *,
        index: int,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: int,
        past_key_values: PLTCacheLayer | None = None,
        rows: bool = False,
        local: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """One pass over S tokens, or (rows) the R passes of one token as R rows.

        x [B, S, D]; shared_keys and shared_values: None when this pass keeps its own full cache (pass 0, and every
        pass of the sequential baseline), else pass 0's. Returns the new x, the full keys and values [B, G, T, K], and
        the gate [B, H, S] or None.
        """
        attn = self.self_attn
        q, k, v = attn.project(self.input_layernorm(x), rope)
        gate = None
        if rows:
            assert past_key_values is not None
            y, shared_keys, shared_values, gate = self._rows(x, q, k, v, mask, past, past_key_values, local)
        elif shared_keys is None or shared_values is None:
            shared_keys, shared_values = (k, v) if past_key_values is None else past_key_values.update(k, v)
            assert shared_keys is not None
            assert shared_values is not None
            y = attn.first_pass(q, shared_keys, shared_values, mask)
        else:
            own = (k, v) if local else None
            if own is not None and past_key_values is not None:
                own = past_key_values.update_window(k, v, index - 1, past)
            y, gate = attn.later_pass(x, q, (shared_keys, shared_values), own, mask)
        x = x + attn.output(y)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, shared_keys, shared_values, gate

    def _rows(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        past: int,
        cache: PLTCacheLayer,
        local: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """All passes of one token: q [B, H, R, K], k and v [B, G, R, K], row r being pass r."""
        keys, values = cache.update(k[:, :, :1], v[:, :, :1])
        global_ = attend_all(q, keys, values, mask, backend=self.self_attn.backend)
        batch, heads, count, size = q.shape
        if count == 1 or not local:
            return global_, keys, values, None
        own_k, own_v = (t[:, :, 1:].transpose(1, 2)[:, :, :, None] for t in (k, v))  # [B, R-1, G, 1, K]
        own_k, own_v = cache.update_windows(own_k, own_v, past)
        seen = own_k.shape[-2]
        q_own = q[:, :, 1:].transpose(1, 2).reshape(batch * (count - 1), heads, 1, size)
        own_mask = None if mask is None else mask[:, -seen:].repeat_interleave(count - 1, dim=0)
        local_y = attend_all(q_own, own_k.flatten(0, 1), own_v.flatten(0, 1), own_mask, backend=self.self_attn.backend)
        local_y = local_y.reshape(batch, count - 1, heads, size).transpose(1, 2)
        gate: Tensor = self.self_attn.plt_gate(x[:, 1:], q[:, :, 1:])
        return (
            torch.cat([global_[:, :, :1], mixed(gate, global_[:, :, 1:], local_y)], dim=2),
            keys,
            values,
            gate,
        )


class PLTPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to load, save, dispatch and checkpoint a PLT."""

    config_class = PLTConfig
    config: PLTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["PLTDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = False
    _can_compile_fullgraph = False
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {"hidden_states": PLTDecoderLayer}

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **more: Any) -> str:
        """transformers' own check, which knows nothing of our kernels."""
        if attn_implementation == "triton":
            return attn_implementation
        checked: str = super()._check_and_adjust_attn_implementation(attn_implementation, *args, **more)
        return checked

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PLTGate):
            init.zeros_(module.weight)
            init.zeros_(module.bias)


@dataclass
class PLTModelOutput(BaseModelOutputWithPast):
    """transformers' output, and with `output_loop_states` what every pass did.

    loop_states: R tensors [B, S, D], the output of each pass before the final norm (raw).
    loop_normed: the same after the final norm.
    loop_gates: R-1 tensors [L, B, H, S]; empty where no gate is used.
    """

    loop_states: tuple[Tensor, ...] | None = None
    loop_normed: tuple[Tensor, ...] | None = None
    loop_gates: tuple[Tensor, ...] | None = None


@dataclass
class PLTCausalLMOutput(CausalLMOutputWithPast):
    """As :class:`PLTModelOutput`, with logits [B, S, V] of the last pass and the loss in nats per token."""

    loop_states: tuple[Tensor, ...] | None = None
    loop_normed: tuple[Tensor, ...] | None = None
    loop_gates: tuple[Tensor, ...] | None = None


@dataclass
class _Trace:
    """What the passes of one forward leave behind: the last one's normed state, and all raw ones and gates if asked."""

    wanted: bool
    raw: list[Tensor] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)
    last: Tensor | None = None

    def add(self, raw: Tensor, gates: list[Tensor]) -> None:
        if self.wanted:
            self.raw.append(raw)
            if gates:
                self.gates.append(torch.stack(gates))


class PLTModel(PLTPreTrainedModel):
    """Embedding, the shared layers run R times, final norm."""

    def __init__(self, config: PLTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(PLTDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = PLTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PLTCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_loop_states: bool = False,
        cache: PLTCache | None = None,
        **kwargs: Any,
    ) -> PLTModelOutput:
        """Read S tokens, after whatever `past_key_values` (newer name: `cache`) has read.

        attention_mask [B, past + S]: 0 at padding, which may stand on the left (or, without a cache, anywhere the loss
        ignores). Raises ValueError for inputs that contradict one another.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, not both and not neither")
        if kwargs.get("output_attentions"):
            raise ValueError("a PLT has two attention distributions per later pass: output_attentions is not offered")
        past_key_values = _one_of(past_key_values, cache)
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.gradient_checkpointing and self.training:
            if past_key_values is not None:
                raise ValueError(
                    "past_key_values cannot be read under gradient checkpointing: it would be written twice"
                )
            use_cache = False
        cache = self._cache(past_key_values, bool(use_cache))
        past = 0 if cache is None else cache.get_seq_length()
        mask = self._mask(attention_mask, embeds, past)
        rope = self.rope(embeds, position_ids, past, mask)
        trace = _Trace(wanted=output_loop_states)
        if cache is not None and embeds.shape[1] == 1 and self.config.one_trip_decode:
            self._one_trip(embeds, rope, mask, past, cache, trace)
        else:
            self._trips(embeds, rope, mask, past, cache, trace)
        return PLTModelOutput(
            last_hidden_state=trace.last,
            **{CACHE_NAME: cache},
            loop_states=tuple(trace.raw) if output_loop_states else None,
            loop_normed=tuple(self.norm(x) for x in trace.raw) if output_loop_states else None,
            loop_gates=tuple(trace.gates) if output_loop_states else None,
        )

    def _cache(self, given: PLTCache | None, wanted: bool) -> PLTCache | None:
        if given is None:
            return PLTCache(self.config) if wanted else None
        if not isinstance(given, PLTCache):
            raise ValueError(
                f"past_key_values is a {type(given).__name__}: a PLT keeps windows and carried states in a PLTCache"
            )
        if given.loops != self.config.plt_num_loops or given.sequential != (self.config.plt_loop_mode == "sequential"):
            raise ValueError(
                f"past_key_values was made for {given.loops} loops: the model runs {self.config.plt_num_loops}"
            )
        return given

    def _mask(self, attention_mask: Tensor | None, embeds: Tensor, past: int) -> Tensor | None:
        """[B, past + S], False at padding; None when nothing is padded."""
        if attention_mask is None:
            return None
        expected = (embeds.shape[0], past + embeds.shape[1])
        if attention_mask.dim() != 2 or tuple(attention_mask.shape) != expected:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}: "
                f"expected [batch, past + tokens] = {list(expected)}"
            )
        mask = attention_mask.to(device=embeds.device, dtype=torch.bool)
        return None if bool(mask.all()) else mask

    def rope(
        self, embeds: Tensor, position_ids: Tensor | None = None, past: int = 0, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines [1 or B, S, K] at the given positions, or at past..past+S-1, counted from each row's
        first token where `mask` [B, past + S] says that some are padding: a gate in query mode reads rotated queries,
        so a row's result would otherwise depend on its padding."""
        if position_ids is None and mask is not None:
            position_ids = (mask.cumsum(1) - 1).clamp_min(0)[:, past:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + embeds.shape[1], device=embeds.device)[None]
        cos, sin = self.rotary_emb(embeds, position_ids=position_ids)
        return cos, sin

    def loop_terms(self, embeds: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """a * E and b * z, whose sum a later pass reads."""
        a, b = self.config.plt_emb_scale, self.config.plt_hidden_scale
        return embeds * (1.0 if a is None else a), state * (1.0 if b is None else b)

    def _loop_input(self, embeds: Tensor, state: Tensor) -> Tensor:
        kept, handed_on = self.loop_terms(embeds, state)
        return kept + handed_on

    def handed_on(self, raw: Tensor) -> Tensor:
        """z: the state of a pass that the next pass and the next token read."""
        normed: Tensor = self.norm(raw) if self.config.plt_normalize_per_loop else raw
        return normed

    def _trips(
        self,
        embeds: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: int,
        cache: PLTCache | None,
        trace: _Trace,
    ) -> None:
        """R trips through the layers, each over all S tokens."""
        config = self.config
        sequential, count = config.plt_loop_mode == "sequential", len(self.layers)
        shared: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * count
        carried: list[Tensor] = []
        x = embeds
        for loop in range(config.plt_num_loops):
            if loop:
                state = self.handed_on(x)
                carried.append(state[:, -1])
                x = state if sequential else self._loop_input(embeds, self.shifted(state, loop, mask, past, cache))
            gates = []
            for i, layer in enumerate(self.layers):
                slot = None if cache is None else cache.layers[loop * count + i if sequential else i]
                x, keys, values, gate = layer(
                    x,
                    *shared[i],
                    index=loop,
                    rope=rope,
                    mask=mask,
                    past=past,
                    past_key_values=slot,
                    local=config.plt_gswa,
                )
                if not sequential:
                    shared[i] = (keys, values)
                if gate is not None:
                    gates.append(gate)
            trace.add(x, gates)
        trace.last = self.norm(x)
        if cache is not None and carried:
            cache.carry = torch.stack(carried, dim=1)

    def shifted(
        self, state: Tensor, loop: int, mask: Tensor | None, past: int = 0, cache: PLTCache | None = None
    ) -> Tensor:
        """shift(z): position t gets z of t-1; zeros at a request's first token and after padding."""
        if not self.config.plt_clp_shift:
            return state
        carry = None if cache is None else cache.carry
        first = torch.zeros_like(state[:, :1]) if carry is None else carry[:, loop - 1 : loop].to(state.device)
        shifted = torch.cat([first, state[:, :-1]], dim=1)
        if mask is None:
            return shifted
        left = nn.functional.pad(mask, (1, 0))[:, past : past + state.shape[1]]
        return shifted * left[..., None]

    def _one_trip(
        self,
        embeds: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: int,
        cache: PLTCache,
        trace: _Trace,
    ) -> None:
        """One trip with the R passes of one token as rows; the states of the token before come from the cache."""
        config = self.config
        loops = config.plt_num_loops
        carry = cache.carry
        if carry is None:
            carry = embeds.new_zeros(embeds.shape[0], loops - 1, embeds.shape[2])
        if mask is not None:
            if past:
                carry = carry * mask[:, past - 1, None, None]
            # A padded token sees at least itself: a row without any key would be NaN.
            mask = torch.cat([mask[:, :-1], torch.ones_like(mask[:, -1:])], dim=1)
        x = torch.cat([embeds, self._loop_input(embeds, carry.to(embeds.device))], dim=1)
        gates = []
        for i, layer in enumerate(self.layers):
            x, _, _, gate = layer(
                x, None, None, index=0, rope=rope, mask=mask, past=past, past_key_values=cache.layers[i], rows=True,
                local=config.plt_gswa,
            )  # fmt: skip
            if gate is not None:
                gates.append(gate)
        if loops > 1:
            cache.carry = self.handed_on(x[:, :-1])
        trace.last = self.norm(x[:, -1:])
        for r in range(loops):
            trace.add(x[:, r : r + 1], [g[:, :, r - 1 : r] for g in gates] if r else [])


class PLTForCausalLM(PLTPreTrainedModel, GenerationMixin):
    """A PLT with its head: load, train and generate as with any transformers causal language model."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PLTConfig) -> None:
        super().__init__(config)
        self.model = PLTModel(config)
        self.vocab_size = config.vocab_size
        if config.plt_num_loops == 1:  # no gate is used: a checkpoint without them is whole
            self._keys_to_ignore_on_load_missing = [r"\.plt_gate\."]
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PLTCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_loop_states: bool = False,
        cache: PLTCache | None = None,
        **kwargs: Any,
    ) -> PLTCausalLMOutput:
        """Logits of the last pass (only the last `logits_to_keep` tokens', if set), and the loss if labels are."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=_one_of(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_loop_states=output_loop_states,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        states = out.last_hidden_state if isinstance(keep, int) else out.last_hidden_state[:, keep]
        logits = self.lm_head(states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return PLTCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(out, CACHE_NAME)},
            hidden_states=out.hidden_states,
            loop_states=out.loop_states,
            loop_normed=out.loop_normed,
            loop_gates=out.loop_gates,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *_: Any
    ) -> None:
        """`generate` gets the cache that this model needs; another kind is refused, not ignored."""
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError("assisted generation is not supported: a PLT cache cannot take rejected tokens back")
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation is {kind!r}: a PLT keeps its own PLTCache; leave it unset")
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = PLTCache(self.config)

    @property
    def init_continuous_batching(self) -> NoReturn:
        """Paged continuous batching would let later passes overwrite the shared cache: not offered."""
        raise AttributeError("a PLT does not support transformers' paged continuous batching")

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        loops: int | None = None,
        loop_mode: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' own, with the loop count and mode to run (default: what the checkpoint says).

        Loads both spellings of the gate tensors. Warns when `loops` is not the checkpoint's own (a PLT is trained for
        one loop count), and when a checkpoint without gates gets more than one loop (the blend is then even).
        """
        config = kwargs.pop("config", None)
        if not isinstance(config, PreTrainedConfig):
            overrides = {k: kwargs.pop(k) for k in [k for k in kwargs if k.startswith("plt_")]}
            where = pretrained_model_name_or_path if config is None else config
            hub = {
                k: kwargs[k] for k in ("revision", "cache_dir", "token", "local_files_only", "subfolder") if k in kwargs
            }
            config = PLTConfig.from_pretrained(where, **hub, **overrides)
        set_loops(config, loops, loop_mode)
        kwargs.setdefault("key_mapping", {r"\.loop_gate_proj\.": ".plt_gate."})
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
        )
        # The mapping served to read the older spelling; saving writes the present one.
        model._weight_conversions = None
        gates = [name for name in info["missing_keys"] if ".plt_gate." in name]
        if gates and config.plt_num_loops > 1 and config.plt_loop_mode == "plt" and config.plt_gswa:
            warnings.warn(
                f"the checkpoint has no gate tensors ({gates[0]}, ...): the blend of passes >= 1 starts even (g = 0.5)",
                stacklevel=2,
            )
        return (model, info) if wants_info else model


def _one_of(older: PLTCache | None, newer: PLTCache | None) -> PLTCache | None:
    """The cache under either of its names."""
    if older is not None and newer is not None:
        raise ValueError("give the cache as past_key_values or as cache, not as both")
    return newer if older is None else older


def set_loops(config: PLTConfig, loops: int | None, loop_mode: str | None) -> None:
    """Apply what the caller asked for over what the checkpoint says."""
    if loops is not None and loops != config.plt_num_loops:
        if not isinstance(loops, int) or loops < 1:
            raise ValueError(f"loops is {loops!r}: expected an integer of at least 1")
        warnings.warn(
            f"running {loops} loops on a checkpoint made for {config.plt_num_loops}: "
            "a PLT is trained for one loop count, so expect worse text than its own",
            stacklevel=3,
        )
        config.plt_num_loops = loops
    if loop_mode is not None:
        if loop_mode not in ("plt", "sequential"):
            raise ValueError(f"loop_mode is {loop_mode!r}: expected 'plt' or 'sequential'")
        config.plt_loop_mode = loop_mode  # type: ignore[assignment]


__all__ = ["PLTCausalLMOutput", "PLTForCausalLM", "PLTModel", "PLTModelOutput", "PLTPreTrainedModel"]
