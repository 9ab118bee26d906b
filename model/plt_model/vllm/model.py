"""The Parallel Loop Transformer on vLLM's layers.

A step's batch is read in two parts (plt_model.vllm.metadata). Decode rows take one trip through the layers: the R
passes of T tokens are R * T rows, pass after pass, pass r fed by what the token before handed on. The rest takes R
trips, pass r fed by pass r-1 shifted by one row, each request's first row by what its last chunk handed on.

    T tokens   N requests   D model width   R passes   H query heads   G key/value heads   K head size (H, G per rank)

The mechanism and its equations: plt_model.modeling_plt.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, make_layers, maybe_prefix
from vllm.model_executor.utils import set_weight_attrs
from vllm.sequence import IntermediateTensors

from .checks import Options, one_trip, refuse_unsound
from .metadata import ROWS, TRIPS, Part
from .pages import Carry, PagedAttention


class Normed(NamedTuple):
    """A norm's output, what it is the norm of, and on a CPU the output without the norm's weights. [T, D] each."""

    out: Tensor
    total: Tensor
    unit: Tensor | None


def make_norm(config: Any) -> RMSNorm:
    norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    norm.floor = torch.tensor(config.rms_norm_eps, dtype=torch.float32, device="cpu")
    return norm


def norm_of_sum(norm: RMSNorm, hidden: Tensor, residual: Tensor | None) -> Normed:
    """As vLLM has it, where `residual` may become the sum; but not on a CPU, for which it has no kernel: ten calls of
    torch, and calls make up a small model's step."""
    if hidden.device.type != "cpu" or hidden.dtype != torch.float32:
        if residual is None:
            return Normed(norm(hidden), hidden, None)
        normed, total = norm(hidden, residual)
        return Normed(normed, total, None)
    total = hidden if residual is None else hidden + residual
    length = torch.linalg.vector_norm(total, dim=-1, keepdim=True)
    unit = total * torch.addcmul(norm.floor, length, length, value=1 / total.shape[1]).rsqrt_()
    return Normed(unit * norm.weight, total, unit)


class PLTGate(nn.Module):
    """g = sigmoid(W norm(x) + b) of the layer's input, or in query mode sigmoid(<q_h, W_h> + b_h), for the heads of
    this rank."""

    def __init__(self, config: Any, heads: int) -> None:
        super().__init__()
        self.of_input = config.plt_gate_use_hidden_states
        width = config.hidden_size if self.of_input else config.head_dim
        self.weight = nn.Parameter(torch.empty(heads, width), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(heads), requires_grad=False)
        for parameter in (self.weight, self.bias):
            set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})
        if self.of_input:
            self.gate_norm = make_norm(config)

    def forward(self, x: Normed, q: Tensor, start: int = 0) -> Tensor:
        """Of the rows [start:] of a layer's input and q [T, H * K] -> [T - start, H, 1]."""
        if not self.of_input:
            scores = (q[start:].view(-1, *self.weight.shape) * self.weight).sum(-1) + self.bias
        elif x.unit is None:
            scores = linear(self.gate_norm(x.total[start:]), self.weight, self.bias)
        else:
            scores = linear(x.unit[start:], self.weight * self.gate_norm.weight, self.bias)
        return scores.sigmoid_()[..., None]


class PLTAttention(nn.Module):
    """Projections, rotary positions, and attention over the shared cache and the windows."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        ranks = get_tensor_model_parallel_world_size()
        self.loops = config.plt_num_loops
        self.heads = config.num_attention_heads // ranks
        self.groups = max(1, config.num_key_value_heads // ranks)
        self.head_dim = config.head_dim
        self.sizes = [self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.head_dim]
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = get_rope(
            self.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
        self._make_pages(vllm_config, prefix)

    def _make_pages(self, vllm_config: VllmConfig, prefix: str) -> None:
        config = vllm_config.model_config.hf_config
        shape: dict[str, Any] = {"heads": self.heads, "groups": self.groups, "head_dim": self.head_dim}
        later = range(1, self.loops)
        owner = f"{prefix}.attn"
        self.attn = PagedAttention(vllm_config, owner, role=TRIPS, **shape)
        self.local: Any = nn.ModuleList()
        self.windows: tuple[Any, ...] = ()
        if config.plt_loop_mode == "sequential":
            self.own: Any = nn.ModuleList(
                PagedAttention(vllm_config, f"{prefix}.attn_p{r}", role=TRIPS, **shape) for r in later
            )
            return
        if self.loops == 1:
            return
        self.shared = PagedAttention(vllm_config, f"{prefix}.shared", role=TRIPS, shares=owner, **shape)
        if one_trip(vllm_config):
            rows = {**shape, "heads": self.loops * self.heads}
            self.rows = PagedAttention(vllm_config, f"{prefix}.rows", role=ROWS, shares=owner, **rows)
        if config.plt_gswa:
            self.local.extend(
                PagedAttention(vllm_config, f"{prefix}.local_p{r}", window=config.window, **shape) for r in later
            )
            self.windows = tuple(self.local)  # torch looks modules up slowly
            self.plt_gate = PLTGate(config, self.heads)

    def _project(self, normed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> q [T, H * K] and k, v [T, G * K], rotated."""
        qkv, _ = self.qkv_proj(normed)
        q, k, v = qkv.split_with_sizes(self.sizes, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        return q, k, v

    def _output(self, y: Tensor) -> Tensor:
        out: Tensor = self.o_proj(y.flatten(1))[0]
        return out

    def one_pass(self, index: int, x: Normed, positions: Tensor, part: Part) -> Tensor:
        """Pass `index` over the tokens of a part."""
        q, k, v = self._project(x.out, positions)
        if index == 0 or hasattr(self, "own"):
            pages = self.attn if index == 0 else self.own[index - 1]
            pages.write(k, v, part)
            return self._output(pages.attend(q, part))
        y = self.shared.attend(q, part)
        if self.windows:
            pages = self.windows[index - 1]
            pages.write(k, v, part)
            y = torch.lerp(pages.attend(q, part), y, self.plt_gate(x, q))
        return self._output(y)

    def all_passes(self, x: Normed, positions: Tensor, part: Part) -> Tensor:
        """All passes: rows [R * T], pass after pass."""
        q, k, v = self._project(x.out, positions)
        loops, heads, groups, size = self.loops, self.heads, self.groups, self.head_dim
        tokens = len(q) // loops
        keys, values = k.chunk(loops), v.chunk(loops)
        self.attn.write(keys[0], values[0], part)
        # Heads that read the same keys side by side, those of one pass after those of another.
        folded = q.view(loops, tokens, groups, heads // groups, size).permute(1, 2, 0, 3, 4).reshape(tokens, -1)
        wide = self.rows.attend(folded, part).view(tokens, groups, loops, heads // groups, size)
        wide = wide.permute(2, 0, 1, 3, 4).reshape(loops, tokens, heads, size)
        wide = wide.flatten(0, 1)
        if not self.windows:
            return self._output(wide)
        near = []
        for pages, query, key, value in zip(self.windows, q.chunk(loops)[1:], keys[1:], values[1:], strict=True):
            pages.write(key, value, part)
            near.append(pages.attend(query, part))
        later = wide[tokens:]
        torch.lerp(near[0] if len(near) == 1 else torch.cat(near), later, self.plt_gate(x, q, tokens), out=later)
        return self._output(wide)


class PLTDecoderLayer(nn.Module):
    """A Llama pre-norm block."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.self_attn = PLTAttention(vllm_config, f"{prefix}.self_attn")
        self.mlp = LlamaMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            vllm_config.quant_config,
            bias=config.mlp_bias,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = make_norm(config)
        self.post_attention_layernorm = make_norm(config)

    def forward(
        self, index: int | None, hidden: Tensor, residual: Tensor | None, positions: Tensor, part: Part
    ) -> tuple[Tensor, Tensor]:
        """Pass `index`, or (None) all passes as rows. The layer's input is hidden + residual, as vLLM's norms add."""
        x = norm_of_sum(self.input_layernorm, hidden, residual)
        if index is None:
            hidden = self.self_attn.all_passes(x, positions, part)
        else:
            hidden = self.self_attn.one_pass(index, x, positions, part)
        hidden, residual, _ = norm_of_sum(self.post_attention_layernorm, hidden, x.total)
        return self.mlp(hidden), residual


class PLTModel(nn.Module):
    """Embedding, the shared layers run R times, final norm."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        refuse_unsound(vllm_config)
        self.config = config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        _, _, self.layers = make_layers(
            config.num_hidden_layers, lambda prefix: PLTDecoderLayer(vllm_config, prefix), prefix=f"{prefix}.layers"
        )
        self.norm = make_norm(config)
        self.first = self.layers[0].self_attn.attn.layer_name
        self.carry: Any = None
        if config.one_trip_decode and config.plt_num_loops > 1:
            self.carry = Carry(
                vllm_config,
                f"{prefix}.carry",
                groups=self.layers[0].self_attn.groups,
                head_dim=config.head_dim,
                window=config.window if config.plt_gswa else None,
                zeroed=Options.of(vllm_config).carry == "zero",
            )

    def forward(self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None) -> Tensor:
        """-> the last pass's normed states [T, D]."""
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        context = get_forward_context()
        metadata: Any = context.attn_metadata or None
        slots: Any = context.slot_mapping
        decodes = 0 if metadata is None else metadata[self.first].decodes
        out = []
        if decodes:
            part = Part("decode", slice(0, decodes), metadata, slots)
            out.append(self._one_trip(embeds[:decodes], positions[:decodes], part))
        if decodes < len(embeds):
            part = Part("rest", slice(decodes, len(embeds)), metadata, slots)
            out.append(self._trips(embeds[decodes:], positions[decodes:], part))
        return out[0] if len(out) == 1 else torch.cat(out)

    def _layers(self, index: int | None, x: Tensor, positions: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """-> the states after the final norm and before it."""
        residual = None
        for layer in self.layers:
            x, residual = layer(index, x, residual, positions, part)
        normed, raw, _ = norm_of_sum(self.norm, x, residual)
        return normed, raw

    def _input(self, embeds: Tensor, state: Tensor) -> Tensor:
        """a * E + b * z, as a new tensor."""
        a, b = self.config.plt_emb_scale, self.config.plt_hidden_scale
        return (embeds if a is None else embeds * a) + (state if b is None else state * b)

    def _handed_on(self, normed: Tensor, raw: Tensor) -> Tensor:
        """z: what the next pass and the next token read."""
        return normed if self.config.plt_normalize_per_loop else raw

    def _one_trip(self, embeds: Tensor, positions: Tensor, part: Part) -> Tensor:
        """All passes of T tokens, each of a request of its own, as R * T rows."""
        loops, tokens, carry = self.config.plt_num_loops, len(embeds), self.carry
        assert carry is not None
        places = carry.places(part)
        later = (self._input(embeds, carry.read(index, places)) for index in range(loops - 1))
        normed, raw = self._layers(None, torch.cat([embeds, *later]), positions.repeat(loops), part)
        states = torch.split(self._handed_on(normed, raw), tokens)
        for index in range(loops - 1):
            carry.write(index, states[index], places)
        return normed[-tokens:]

    def _trips(self, embeds: Tensor, positions: Tensor, part: Part) -> Tensor:
        """R trips. A request may start after a token that another one of the part computes: every pass keeps its
        outputs before the next one reads them."""
        carry, rows = self.carry, None
        if carry is not None and part.metadata is not None:
            places = carry.places(part)
            rows = part.of(carry.pages[0].layer_name).query_start_loc[:-1].long()
        normed, raw = self._layers(0, embeds.clone(), positions, part)  # vLLM's norms add in place
        for index in range(1, self.config.plt_num_loops):
            state = self._handed_on(normed, raw)
            if carry is not None:
                below = torch.cat([state[:1], state])
                if rows is not None:
                    carry.write(index - 1, state, places)
                    # Of padding the first row may be the one after the last.
                    below.index_copy_(0, rows, carry.read(index - 1, places))
                state = below[:-1]
            sequential = self.config.plt_loop_mode == "sequential"
            x = state.clone() if sequential else self._input(embeds, state)
            normed, raw = self._layers(index, x, positions, part)
        return normed


class PLTForCausalLM(nn.Module, SupportsQuant):
    """A PLT with its head."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={".loop_gate_proj.": ".plt_gate."},
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        },
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.quant_config = vllm_config.quant_config
        self.model = PLTModel(vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=self.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        embeds: Tensor = self.model.embed_tokens(input_ids)
        return embeds

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,  # noqa: ARG002 (of vLLM's interface)
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        out: Tensor = self.model(input_ids, positions, inputs_embeds)
        return out

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Raises ValueError where a checkpoint lacks the gates that its loop count needs. (Updates come in pieces.)"""
        mapper = self.hf_to_vllm_mapper
        pages = {name for name, module in self.named_modules() if isinstance(module, PagedAttention)}
        owners = {_owner(name) for name, _ in self.named_parameters()} - pages
        gates = {owner for owner in owners if ".plt_gate" in owner}
        if not gates:
            mapper = WeightsMapper(orig_to_new_substr={".plt_gate.": None, ".loop_gate_proj.": None}) | mapper
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=mapper)
        if gates and owners - {_owner(name) for name in loaded} == gates:
            raise ValueError(
                f"the checkpoint holds no gates: it can run plt_num_loops 1, not {self.config.plt_num_loops}"
            )
        return loaded


def _owner(name: str) -> str:
    """The module that a parameter belongs to: quantized ones have other parameters than a checkpoint's."""
    return name.rpartition(".")[0]
