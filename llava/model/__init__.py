"""LLaVA models. Import errors are raised, never hidden."""

from transformers import LlavaConfig

from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llava.model.language_model.llava_mpt import LlavaMptForCausalLM

LlavaMistralConfig = LlavaMptConfig = LlavaConfig

__all__ = [
    "LlavaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaMistralConfig",
    "LlavaMistralForCausalLM",
    "LlavaMptConfig",
    "LlavaMptForCausalLM",
]
