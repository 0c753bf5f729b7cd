"""InternVL: an image as tiles and an overview, a video as one tile per frame, named in the text."""

from collections.abc import Sequence

from PIL.Image import Image
from transformers import GotOcr2ImageProcessorPil

from llava.model.processors.base import Clip, Encoded, FamilyProcessor

_START, _END, _VIDEO = "<img>", "</img>", "<video>"


class InternVLProcessor(FamilyProcessor):
    """Prompts by the checkpoint's chat template; videos reach the model as images."""

    image_processor_class = GotOcr2ImageProcessorPil

    def marker(self, video: bool) -> str:
        """Videos have a marker of their own, which stands for no visual token."""
        return getattr(self.tokenizer, "video_token", _VIDEO) if video else super().marker(video)

    def placeholder_id(self, video: bool) -> int:
        """The id of a visual token, which is the same for images and frames."""
        return self.config.image_token_id

    @property
    def fewest_tokens(self) -> int:
        """Visual tokens of the smallest image, which is shown as one tile."""
        return self._tile

    def encode_images(self, images: Sequence[Image]) -> Encoded:
        """Each marker of an image becomes one run of placeholders for all of its tiles."""
        given = self.image_processor(images=list(images), crop_to_patches=True, return_tensors="pt")
        tiles = [int(count) for count in given["num_patches"]]
        return Encoded([self._run(count) for count in tiles], {"pixel_values": given["pixel_values"]})

    def encode_clip(self, clip: Clip) -> Encoded:
        """The marker of the video becomes a numbered line for every frame."""
        given = self.image_processor(images=list(clip.frames), crop_to_patches=False, return_tensors="pt")
        lines = [f"Frame{number}: {self._run(1)}" for number in range(1, len(clip.frames) + 1)]
        return Encoded(["\n".join(lines)], {"pixel_values": given["pixel_values"]})

    def _run(self, tiles: int) -> str:
        return (
            getattr(self.tokenizer, "start_image_token", _START)
            + self.placeholder(False) * (tiles * self._tile)
            + getattr(self.tokenizer, "end_image_token", _END)
        )

    @property
    def _tile(self) -> int:
        """Visual tokens of a tile."""
        vision = self.config.vision_config
        return int(vision.image_size[0] // vision.patch_size[0] * self.config.downsample_ratio) ** 2
