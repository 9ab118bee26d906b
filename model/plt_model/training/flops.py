"""Floating-point operations of a training step, for the model FLOP utilisation (MFU) that is shown on GPUs."""

from __future__ import annotations

from plt_model.configuration_plt import PLTConfig

PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "A10": 125e12,
}
"""Dense bf16 FLOP/s of one device by the vendors' data sheets, by a part of the device's name."""


def forward_flops(config: PLTConfig, length: int) -> float:
    """Multiply-adds (counted as 2) of one forward pass, per token of a sequence of `length` tokens: the matrix products
    of every loop, causal attention over half the sequence on average, and from loop 2 on the window as well."""
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    wide = config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    hidden = config.hidden_size
    layer = 2 * hidden * (2 * wide + 2 * narrow + 3 * config.intermediate_size)
    causal, window = 4 * wide * (length + 1) / 2, 4 * wide * min(config.window + 1, (length + 1) / 2)
    later = causal + (window if config.plt_loop_mode == "plt" and config.plt_gswa else 0)
    loops = config.plt_num_loops
    passes = loops * layer + causal + (loops - 1) * later
    return config.num_hidden_layers * passes + 2 * hidden * config.vocab_size


def training_flops(config: PLTConfig, length: int) -> float:
    """Of forward and backward (twice the forward), per token. What gradient checkpointing repeats does not count:
    utilisation is of the work that the model needs."""
    return 3 * forward_flops(config, length)


def peak_flops(device: str) -> float | None:
    """The bf16 peak of a device by its name; None when it is not known."""
    return next((peak for part, peak in PEAK_BF16.items() if part in device), None)
