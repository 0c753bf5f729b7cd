"""Qwen2.5-VL of lmms-eval, compressed."""

from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL as Chat
from lmms_eval.models.simple.qwen2_5_vl import Qwen2_5_VL as Simple

from apet.harness.compressed import Compressed


class Qwen2_5_VL(Compressed, Chat):
    """For tasks whose prompts are chats."""


class Qwen2_5_VLSimple(Compressed, Simple):
    """For tasks whose prompts are texts."""
