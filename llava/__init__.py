"""Drop-in module paths for LLaVA scripts, on top of `apet`."""

from typing import Any

import llava._unmixed  # noqa: F401  refuses a folder that holds files of another `llava`

__all__ = ["LlavaLlamaForCausalLM"]


def __getattr__(name: str) -> Any:
    """The model class is imported when it is asked for, so that prompts and constants stay quick to import."""
    if name in __all__:
        from llava.model import LlavaLlamaForCausalLM

        return LlavaLlamaForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
