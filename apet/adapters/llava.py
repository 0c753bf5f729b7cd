"""LLaVA-1.5: one CLIP image of constant length per placeholder run, compressed before the projector."""

from torch import nn

from apet.adapters.base import Adapter, register


@register
class Llava(Adapter):
    """`LlavaForConditionalGeneration` and its subclasses."""

    family = "llava"
    model_types = ("llava",)

    @property
    def projector(self) -> nn.Module:
        """The two-layer projector: rows are mapped one by one, so only kept rows need to pass through it."""
        return self.base_model.multi_modal_projector

    def split_run(self, length: int) -> list[int]:
        """Every image has as many tokens as the tower has patches (plus CLS when the features keep it)."""
        config = self.model.config
        vision = config.vision_config
        per_image = (vision.image_size // vision.patch_size) ** 2
        per_image += config.vision_feature_select_strategy == "full"
        if length % per_image:
            raise ValueError(
                f"the prompt holds a run of {length} image placeholders, but an image has {per_image} tokens; an image "
                "was cut in two (prefill_chunk_size splits prompts: leave it out) or its placeholder was not expanded"
            )
        return [per_image] * (length // per_image)
