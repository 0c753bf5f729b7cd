"""The families of `llava.model.processors` behind the runner: their own prompts and processing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from PIL.Image import Image
from torch import Tensor

import apet
from apet.eval.benchmarks import Question
from apet.eval.images import ImageError
from apet.eval.prompts import Context, PromptError
from apet.eval.sampling import draw_key
from apet.eval.videos import read_clip
from llava.eval.generation import ModelAnswerer, Upload
from llava.model.processors import FamilyProcessor, Inputs

FRAMES = 8


@dataclass(frozen=True)
class FamilyPreparer:
    """CPU side: decodes the video or takes the images, and builds the prompt.

    Attributes:
        processor: Of the checkpoint.
        conv_mode: Key of `llava.conversation.conv_templates`, where the checkpoint has no chat template.
        frames: Frames taken from a video.
        compression: What shortens prompts before they are held against the context.
        context: How long prompts may be.
        videos: Whether questions may be about videos.
    """

    processor: FamilyProcessor
    conv_mode: str
    frames: int = FRAMES
    compression: apet.ApetConfig = apet.ApetConfig()
    context: Context = Context()
    videos: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"--num_frames {self.frames} must be at least 1")

    def prepare(self, question: Question, images: Sequence[Image]) -> Inputs:
        """Ids and pixels of a question.

        Raises:
            ImageError: A picture or video that cannot be decoded, a picture whose shape the family refuses, or a prompt
                that the model cannot be asked.
        """
        clip = None if question.video is None else read_clip(images.video, self.frames)
        pictures = list(images)
        try:
            inputs = self.processor(question.prompt, pictures, clip, self.conv_mode)
        except PromptError:
            raise
        except (ValueError, MemoryError) as error:
            raise ImageError(f"question {question.question_id!r} cannot be prepared: {error}") from error
        frames = None if clip is None else len(clip.frames)
        visual = sum(inputs.visual)
        kept = self.processor.decoder_tokens(self.compression, inputs.visual, frames)
        room = self.context.room(len(inputs.input_ids) - visual, visual, kept)
        return replace(inputs, room=room, draw=draw_key(question))

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self.processor.tokenizer

    def prompt_length(self, question: Question) -> int:
        """Tokens of a question's prompt, its picture counted as one marker."""
        video = question.video is not None
        images = int(not video and (question.image is not None or question.image_base64 is not None))
        prompt = self.processor.render(question.prompt, images, video, self.conv_mode)
        return len(self.processor.tokenizer(prompt).input_ids)


class FamilyAnswerer(ModelAnswerer):
    """Device side of a model of `llava.model.processors`."""

    decoding = {"clean_up_tokenization_spaces": False}
    echoes = True

    def upload_inputs(self, prepared: Sequence[Inputs], upload: Upload) -> dict[str, Tensor]:
        """The inputs that the processor makes of prompts and pictures."""
        return {
            name: upload(value, self.model.dtype if name.startswith("pixel_values") else None)
            for name, value in self.preparer.processor.collate(prepared).items()
        }

    def own_settings(self) -> Mapping[str, Any]:
        """The settings of the processor, and how many frames of a video are shown."""
        return {**self.preparer.processor.settings(), "num_frames": self.preparer.frames}

    def settings(self) -> Mapping[str, Any]:
        """Everything that can change an answer; the repetition penalty among it, which stays the checkpoint's."""
        shared = super().settings()
        penalty = {"repetition_penalty": self.model.generation_config.repetition_penalty}
        return {**shared, "generation": shared["generation"] | penalty}
