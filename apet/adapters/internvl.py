"""InternVL: an image is a run of tiles of equal length; videos are sent as images, frame by frame."""

from apet.adapters.base import Adapter, UsualImage, register


@register
class InternVL(Adapter):
    """`InternVLForConditionalGeneration`. Tiles whose placeholders touch are one image."""

    family = "internvl"
    model_types = ("internvl",)
    classes = ("InternVLForConditionalGeneration",)
    proof = ("tests/test_patch_families.py",)
    runs_are_items = True
    single_crop = False
    no_class_token = "a token is made of four patches of the vision tower"

    @property
    def usual_image(self) -> UsualImage:
        """Four tiles and the thumbnail."""
        config, vision = self.model.config, self.model.config.vision_config
        (height, width), (patch_height, patch_width) = vision.image_size, vision.patch_size
        tile = int((height // patch_height) * (width // patch_width) * config.downsample_ratio**2)
        return UsualImage(f"one image of {2 * height} x {2 * width} pixels in 5 tiles", 5 * tile, 5)
