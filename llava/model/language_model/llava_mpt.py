"""LLaVA on MPT decoders is not supported: transformers has no such model."""

from typing import Any


class LlavaMptForCausalLM:
    """Named for scripts that import it; says why it cannot be used."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("MPT-based LLaVA checkpoints are not supported; use a Llama- or Mistral-based one")

    from_pretrained = classmethod(lambda cls, *args, **kwargs: cls())
