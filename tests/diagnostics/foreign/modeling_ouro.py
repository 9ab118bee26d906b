"""A universal transformer in the outward shape of Ouro (arXiv 2510.25741), written for tests and slow on purpose.

What a reader from outside can rely on is as in the public model: the modules' names, the four norms of a layer, the
final norm after every step and handed on, `total_ut_steps` read from the model, an exit gate, the base model's tuple
of (output, states after the norm, gates), a KV cache entry per step and layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_ouro import OuroConfig


class OuroRMSNorm(nn.Module):
    def __init__(self, config: OuroConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


class OuroRotaryEmbedding(nn.Module):
    def __init__(self, config: OuroConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)

    def frequencies(self) -> Tensor:
        size = self.config.head_dim
        return torch.tensor([self.config.rope_theta ** (-i / size) for i in range(0, size, 2)], device="cpu")

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.einsum("bs,k->bsk", position_ids.to(self.inv_freq), self.inv_freq).repeat(1, 1, 2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class OuroAttention(nn.Module):
    """Every weight is formed and returned, as eager attention does."""

    def __init__(self, config: OuroConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.scaling = config.head_dim**-0.5
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        width, queries, keys = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(width, queries * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, keys * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, keys * self.head_dim, bias=False)
        self.o_proj = nn.Linear(queries * self.head_dim, width, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: dict[str, Tensor],
        past_key_values: DynamicCache | None = None,
        current_ut: int = 0,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (
            part(hidden_states).unflatten(-1, (-1, self.head_dim)).movedim(2, 1)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = turned(q, *position_embeddings), turned(k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, current_ut * self.config.num_hidden_layers + self.layer_idx)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        visible = attention_mask[self.config.layer_types[self.layer_idx]]
        scores = torch.einsum("bhqk,bhsk->bhqs", q, k) * self.scaling
        weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
        return self.o_proj((weights @ v).movedim(1, 2).flatten(2)), weights


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + K/2) of x [B, H, S, K] turned by their position's angles."""
    first, second = x.chunk(2, dim=-1)
    c, s = (part[:, None, :, : first.shape[-1]] for part in (cos, sin))
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1)


class OuroMLP(nn.Module):
    def __init__(self, config: OuroConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class OuroDecoderLayer(nn.Module):
    def __init__(self, config: OuroConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = OuroAttention(config, layer_idx)
        self.mlp = OuroMLP(config)
        self.input_layernorm = OuroRMSNorm(config)
        self.input_layernorm_2 = OuroRMSNorm(config)
        self.post_attention_layernorm = OuroRMSNorm(config)
        self.post_attention_layernorm_2 = OuroRMSNorm(config)

    def forward(self, hidden_states: Tensor, **how: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **how)
        x = hidden_states + self.input_layernorm_2(attended)
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))


class OuroPreTrainedModel(PreTrainedModel):
    config_class = OuroConfig
    base_model_prefix = "model"
    _supports_sdpa = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Weights large enough that attention is far from even, norms that are far from 1."""
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.4)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, OuroRMSNorm):
            init.uniform_(module.weight, 0.3, 1.7)
        elif isinstance(module, OuroRotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies())


class OuroModel(OuroPreTrainedModel):
    def __init__(self, config: OuroConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OuroDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = OuroRMSNorm(config)
        self.rotary_emb = OuroRotaryEmbedding(config)
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)
        self.total_ut_steps = config.total_ut_steps
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> tuple[BaseModelOutputWithPast, list[Tensor], list[Tensor]]:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        x = self.embed_tokens(input_ids)
        positions = torch.arange(past, past + x.shape[1], device=x.device)[None]
        how = {
            "attention_mask": self._visible(attention_mask, positions[0], past + x.shape[1]),
            "position_embeddings": self.rotary_emb(x, positions),
            "past_key_values": past_key_values,
        }
        states, gates = [], []
        for step in range(self.total_ut_steps):
            for layer in self.layers:
                x = layer(x, current_ut=step, **how)
            x = self.norm(x)
            states.append(x)
            gates.append(self.early_exit_gate(x))
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values), states, gates

    def _visible(self, mask: Tensor | None, queries: Tensor, length: int) -> dict[str, Tensor]:
        i, j = queries[:, None], torch.arange(length, device=queries.device)[None]
        causal = (j <= i)[None, None]
        if mask is not None:
            causal = causal & mask[:, None, None].bool()
        window = self.config.sliding_window or length
        return {"full_attention": causal, "sliding_attention": causal & (j > i - window)}


class OuroForCausalLM(OuroPreTrainedModel):
    def __init__(self, config: OuroConfig) -> None:
        super().__init__(config)
        self.model = OuroModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **how: Any) -> CausalLMOutputWithPast:
        output, _, _ = self.model(input_ids, attention_mask, **how)
        return CausalLMOutputWithPast(
            logits=self.lm_head(output.last_hidden_state), past_key_values=output.past_key_values
        )
