"""LLaVA-1.5: one CLIP image of constant length per placeholder run, compressed before the projector."""

from torch import nn

from apet.adapters.base import Adapter, register


@register
class Llava(Adapter):
    """`LlavaForConditionalGeneration` and its subclasses."""

    family = "llava"
    model_types = ("llava",)
    classes = ("LlavaForConditionalGeneration",)
    proof = ("tests/test_patch_reference.py",)

    @property
    def projector(self) -> nn.Module:
        """The two-layer projector: rows are mapped one by one, so only kept rows need to pass through it."""
        return self.base_model.multi_modal_projector

    @property
    def towers(self) -> list[nn.Module]:
        """CLIP, or whatever the checkpoint has instead."""
        return [self.base_model.vision_tower]

    @property
    def single_crop(self) -> bool:
        """Original 1.6 checkpoints are loaded into this class too; their images are several crops."""
        return getattr(self.model.config, "image_aspect_ratio", None) != "anyres"
