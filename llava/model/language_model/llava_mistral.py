"""LLaVA on Mistral decoders: the text model is chosen by the config, everything else is shared."""

from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM


class LlavaMistralForCausalLM(LlavaLlamaForCausalLM):
    """`LlavaLlamaForCausalLM` with a Mistral text config."""
