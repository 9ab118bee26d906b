"""PLT on unmodified vLLM: `vllm serve DIR`, `LLM(DIR)` (how it works and what it takes: docs/vllm.md).

layout      how many layers and blocks of pages a PLT takes
pages       the KV cache layers that vLLM's block manager sees: the shared one, the windows, the carry
metadata    a batch's attention metadata, split into decode rows and the rest
model       the layers, run in one trip for decode rows and in R for the rest
checks      what is set and what is refused when an engine starts
"""

from __future__ import annotations

ARCHITECTURES = ("IQuestPLTCoderForCausalLM", "PLTForCausalLM")


def register() -> None:
    """What vLLM calls in every process of its own (entry point group vllm.general_plugins); any number of times.

    The model is named, not imported: vLLM imports it where it is built.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from plt_model.configuration_plt import PLTConfig

    from .checks import PLTChecks

    AutoConfig.register(PLTConfig.model_type, PLTConfig, exist_ok=True)
    for name in ARCHITECTURES:
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, "plt_model.vllm.model:PLTForCausalLM")
        MODELS_CONFIG_MAP[name] = PLTChecks
