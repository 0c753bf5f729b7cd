"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision of lmms-eval, compressed."""

from lmms_eval.models.chat.llava_hf import LlavaHf as Chat
from lmms_eval.models.simple.llava_hf import LlavaHf as Simple

from apet.harness.compressed import Compressed


class LlavaHf(Compressed, Chat):
    """For tasks whose prompts are chats."""


class LlavaHfSimple(Compressed, Simple):
    """For tasks whose prompts are texts."""
