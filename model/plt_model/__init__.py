"""The Parallel Loop Transformer. Importing this package teaches transformers the released format:

import plt_model
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/to/checkpoint")
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .cache_plt import PLTCache
from .configuration_plt import PLTConfig
from .modeling_plt import PLTForCausalLM, PLTModel

AutoConfig.register(PLTConfig.model_type, PLTConfig, exist_ok=True)
AutoModelForCausalLM.register(PLTConfig, PLTForCausalLM, exist_ok=True)

__all__ = ["PLTCache", "PLTConfig", "PLTForCausalLM", "PLTModel"]
