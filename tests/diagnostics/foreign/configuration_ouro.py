"""Configuration of a small universal transformer, with the keys of Ouro's public config.json."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig


class OuroConfig(PreTrainedConfig):
    model_type: ClassVar[str] = "ouro"

    def __init__(self, **keys: Any) -> None:
        defaults: dict[str, Any] = {
            "vocab_size": 41,
            "hidden_size": 24,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000.0,
            "max_position_embeddings": 64,
            "use_cache": True,
            "use_sliding_window": False,
            "sliding_window": None,
            "total_ut_steps": 4,
            "early_exit_threshold": 1.0,
        }
        for name, value in defaults.items():
            setattr(self, name, keys.pop(name, value))
        kinds = keys.pop("layer_types", None)
        self.layer_types = kinds or ["full_attention"] * self.num_hidden_layers
        super().__init__(**keys)
