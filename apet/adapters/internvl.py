"""InternVL: an image is a run of tiles of equal length; videos are sent as images, frame by frame."""

from apet.adapters.base import Adapter, register


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
