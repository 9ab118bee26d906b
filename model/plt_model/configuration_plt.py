"""Configuration of the Parallel Loop Transformer (PLT), in the format of the released checkpoints.

A PLT is a Llama-style decoder whose layers run `plt_num_loops` times per token. Every key that the released
`config.json` may hold is an attribute here; `loop_mode`, `clp_shift` and `gswa` (with the same `plt_` prefix) are
this project's baselines and ablations, off by default.

    PLTConfig.from_pretrained("LoopCoder-V2").plt_num_loops
"""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LOOP_MODES = ("plt", "sequential")


@strict
class PLTConfig(PreTrainedConfig):
    """What a PLT checkpoint says about itself. The fields of a Llama, and:

    plt_num_loops: passes R through the shared layers; 1 is the plain Llama path.
    plt_window_size: [w, 0]: the local branch of passes >= 1 sees the last w positions and itself (w + 1 keys).
    plt_normalize_per_loop: the state handed to the next pass is taken after the final norm (else before it).
    plt_emb_scale, plt_hidden_scale: a and b in the input a * E + b * shift(z) of passes >= 1; None means 1.
    plt_gate_use_hidden_states: the gate reads the layer's input (else the query of its head).
    plt_loop_mode: "plt", or "sequential": the standard looped transformer h(r) = f(h(r-1)): every pass reads the
        previous pass's state of the same token as it is (no embedding added, no scale, no shift), attends causally
        to its own keys and values, and so keeps R full KV caches. No gate is used.
    plt_clp_shift: False reads z of the same token in place of its left neighbour's (passes of one token then depend
        on one another, and decode takes R trips).
    plt_gswa: False drops the local branch: passes >= 1 attend to pass 0's keys and values only (g = 1).

    Raises huggingface_hub's StrictDataclassError: the key, what was found and what was expected.
    """

    model_type: ClassVar[str] = "iquestpltcoder"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    default_theta: ClassVar[float] = 500000.0
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 76800
    hidden_size: int = 5120
    intermediate_size: int = 27648
    num_hidden_layers: int = 14
    num_attention_heads: int = 40
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    plt_num_loops: int = 2
    plt_window_size: list[int] | None = None
    plt_normalize_per_loop: bool = True
    plt_emb_scale: float | int | None = None
    plt_hidden_scale: float | int | None = None
    plt_gate_use_hidden_states: bool = False
    plt_loop_mode: Literal["plt", "sequential"] = "plt"
    plt_clp_shift: bool = True
    plt_gswa: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.eos_token_id is None:
            self.eos_token_id = [2, 75864, 75869] if self.vocab_size > 75869 else 2
        if self.plt_window_size is None:
            self.plt_window_size = [64, 0]
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Reject what the model cannot be built from (called by the strict dataclass after __post_init__)."""
        for key in ("plt_num_loops", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}: expected at least 1")
        size = self.plt_window_size
        if size is None or len(size) != 2 or size[0] < 0 or size[1] != 0:
            raise ValueError(f"plt_window_size is {size}: expected [w, 0] with w >= 0 (positions to the left)")
        groups = self.num_key_value_heads
        if groups is None or groups < 1 or self.num_attention_heads % groups:
            raise ValueError(
                f"num_key_value_heads is {groups}: expected a divisor of num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim is None or self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: expected an even number, for rotary positions")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act is {self.hidden_act!r}: no such activation in transformers")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id is {self.pad_token_id}: expected an id below {self.vocab_size}")
        self._check_rope()

    def _check_rope(self) -> None:
        rope = self.rope_parameters or {}
        kind, theta = rope.get("rope_type", "default"), rope.get("rope_theta", self.default_theta)
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            raise ValueError(f"rope_type is {kind!r}: expected default or one of {', '.join(ROPE_INIT_FUNCTIONS)}")
        if not isinstance(theta, int | float) or theta <= 0:
            raise ValueError(f"rope_theta is {theta!r}: expected a number above 0")

    @property
    def window(self) -> int:
        """w: how many positions to the left of itself a token sees in the local branch."""
        assert self.plt_window_size is not None
        return self.plt_window_size[0]

    @property
    def one_trip_decode(self) -> bool:
        """Whether all passes of a new token can run as rows of one trip through the layers."""
        return self.plt_loop_mode == "plt" and self.plt_clp_shift

    def to_dict(self) -> dict[str, Any]:
        """In the released format's spelling: the RoPE base as `rope_theta` (beside transformers' own), and its name for
        the architecture."""
        out: dict[str, Any] = super().to_dict()
        if out.get("architectures") == ["PLTForCausalLM"]:
            out["architectures"] = ["IQuestPLTCoderForCausalLM"]
        theta = (out.get("rope_parameters") or {}).get("rope_theta")
        if theta is not None:
            out["rope_theta"] = theta
        return out


__all__ = ["LOOP_MODES", "PLTConfig"]
