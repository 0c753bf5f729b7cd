"""Video-LLaVA: images padded to a square as in its own programs, videos as frames; prompts of `llava.conversation`."""

from collections.abc import Sequence

from PIL.Image import Image
from transformers import VideoLlavaForConditionalGeneration, VideoLlavaImageProcessor

from apet import ApetConfig
from apet.adapters.host import pixel_argument
from apet.config import FAMILY_PRESETS
from apet.eval.prompts import around_images
from apet.methods import keeps_positions
from apet.serving.counts import video_blocks
from llava.conversation import new_conversation
from llava.mm_utils import expand2square
from llava.model.processors.base import Clip, Encoded, FamilyProcessor, kept_counts

_PIXELS = pixel_argument(VideoLlavaForConditionalGeneration)


class VideoLlavaProcessor(FamilyProcessor):
    """An image is 256 visual tokens, a frame is a class token and 256 more."""

    image_processor_class = VideoLlavaImageProcessor
    templated = False

    def render(self, text: str, images: int, video: bool, conv_mode: str = "") -> str:
        """The prompt, with its pictures where the question has `<image>`, or in front of it on a line of their own."""
        pieces = around_images(text, 0 if video else images)
        conversation = new_conversation(conv_mode)
        if len(pieces) > 1:
            return conversation.ask(self.marker(video).join(pieces))
        shown = self.marker(video) * (1 if video else images)
        return conversation.ask(f"{shown}\n{text}" if shown else text)

    def decoder_tokens(self, compression: ApetConfig, visual: Sequence[int], frames: int | None) -> int:
        """As declared; class tokens take no budget, and frames with a budget of their own get the basis on top."""
        if keeps_positions(compression, FAMILY_PRESETS["video_llava"].position_mode):
            return sum(visual)
        if frames is None:
            extra = int(visual[0] > self._patches) if visual else 0
            return sum(kept_counts(compression, [count - extra for count in visual])) + extra * len(visual)
        preset = FAMILY_PRESETS["video_llava"]
        blocks, length, kept = video_blocks(compression, preset, frames, self._patches)
        if blocks > 1 and preset.frame.insertion == "append":
            kept = min(length, kept + compression.basis_token_num)
        return blocks * kept + frames

    @property
    def fewest_tokens(self) -> int:
        """Visual tokens of an image; all images have as many."""
        return self._patches

    def encode_images(self, images: Sequence[Image]) -> Encoded:
        """Images are padded to squares with the mean colour."""
        mean = tuple(int(value * 255) for value in self.image_processor.image_mean)
        pixels = self._pixels([expand2square(image, mean) for image in images])
        strategy = self.config.vision_feature_select_strategy
        run = self.placeholder(False) * (self._patches + (strategy == "full"))
        return Encoded([run] * len(images), {_PIXELS: pixels})

    def encode_clip(self, clip: Clip) -> Encoded:
        """The marker becomes one run of placeholders for all frames."""
        run = self.placeholder(True) * (len(clip.frames) * (self._patches + 1))
        return Encoded([run], {"pixel_values_videos": self._pixels(clip.frames)[None]})

    def _pixels(self, images: Sequence[Image]):
        options = {"return_legacy_image_output": False} if _PIXELS == "pixel_values" else {}
        return self.image_processor(images=list(images), return_tensors="pt", **options)[_PIXELS]

    @property
    def _patches(self) -> int:
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2
