"""LLaVA behind the runner: vicuna-style prompts and LLaVA's image preparation."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor

import apet
from apet.eval.benchmarks import Question
from apet.eval.images import ImageError, Pictures
from apet.eval.prompts import Context, around_images
from apet.eval.sampling import draw_key
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import new_conversation
from llava.eval.generation import LoadedBatch, ModelAnswerer, Upload
from llava.eval.lengths import crops_of, room_of_prompt
from llava.eval.tower_features import TowerFeatures
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.processors.base import left_padded


@dataclass(frozen=True)
class PreparedQuestion:
    """A question ready for the device.

    Attributes:
        input_ids: (L,) int64 with -200 for the image.
        pixels: (3, H, W) or (crops, 3, H, W); None without an image, or where its features are known.
        image_size: Original (width, height), None without pixels.
        path: The image file, None if there is none.
        room: Tokens that the model's context leaves for the answer; None if it does not say.
        draw: What sets the question's random draws apart (`apet.eval.sampling.draw_key`).
    """

    input_ids: Tensor
    pixels: Tensor | None
    image_size: tuple[int, int] | None
    path: str | None = None
    room: int | None = None
    draw: str = ""

    @property
    def has_image(self) -> bool:
        """Whether the prompt shows an image."""
        return self.pixels is not None or self.path is not None


@dataclass(frozen=True)
class LlavaPreparer:
    """CPU side: builds the prompt and prepares the image.

    Attributes:
        tokenizer: Tokenizer of the checkpoint.
        image_processor: Image processor of the vision tower.
        config: Model config (`image_aspect_ratio`, `mm_use_im_start_end`, ...).
        conv_mode: Key of `llava.conversation.conv_templates`.
        known: Image files that need not be opened, because the answerer has their features.
        compression: What shortens prompts before they are held against the context.
        context: How long prompts may be.
        videos: Whether questions may be about videos.
    """

    tokenizer: Any
    image_processor: Any
    config: Any
    conv_mode: str
    known: Container[str] = frozenset()
    compression: apet.ApetConfig = apet.ApetConfig()
    context: Context = Context()
    videos: ClassVar[bool] = False

    def render(self, question: Question) -> str:
        """The prompt text, one user turn and an open assistant turn.

        The image stands where the question's text has `<image>`, or in front of it.

        Raises:
            PromptError: Markers in the text, but not one per image.
        """
        images = int(question.image is not None or question.image_base64 is not None)
        text = place_images(question.prompt, images, getattr(self.config, "mm_use_im_start_end", False))
        return new_conversation(self.conv_mode).ask(text)

    def prepare(self, question: Question, images: Sequence[Image]) -> PreparedQuestion:
        """Ids and pixels of a question.

        Raises:
            ImageError: A picture that cannot be opened or prepared, or a prompt that the model cannot be asked.
        """
        ids, draw = self.input_ids(question), draw_key(question)
        if not images:
            return PreparedQuestion(ids, None, None, room=self._room(ids), draw=draw)
        path = images.path if isinstance(images, Pictures) else None
        if path in self.known:
            # Features are kept for single crops only.
            return PreparedQuestion(ids, None, None, path, self._room(ids, ((1, 1), 1)), draw)
        size = images[0].size
        try:
            pixels = process_images(list(images), self.image_processor, self.config)[0]
        except (ValueError, MemoryError) as error:
            raise ImageError(f"the image of question {question.question_id!r} cannot be prepared: {error}") from error
        return PreparedQuestion(ids, pixels, size, path, self._room(ids, (size, crops_of(pixels))), draw)

    def _room(self, ids: Tensor, *images: tuple[tuple[int, int], int]) -> int | None:
        return room_of_prompt(self.context, self.config, self.compression, ids, images)

    def input_ids(self, question: Question) -> Tensor:
        """(L,) int64 ids of the prompt, -200 for the image."""
        return tokenizer_image_token(self.render(question), self.tokenizer, return_tensors="pt")


class LlavaAnswerer(ModelAnswerer):
    """Device side of a LLaVA model.

    Args:
        features: Where to look up what the vision tower gives for an image; None to run it for every question.
        **shared: As `ModelAnswerer`.
    """

    def __init__(self, *shared: Any, features: TowerFeatures | None = None, **named: Any) -> None:
        super().__init__(*shared, **named)
        self._features = features
        if features is not None:
            self.preparer = replace(self.preparer, known=features.known)

    def upload_inputs(self, prepared: Sequence[PreparedQuestion], upload: Upload) -> dict[str, Any]:
        """Ids with -200 for the image, mask, and pixels, unless these are looked up when the batch is answered."""
        ids, mask = left_padded([one.input_ids for one in prepared], self.model.generation_config.pad_token_id)
        inputs = {"input_ids": upload(ids), "attention_mask": upload(mask), "images": None, "image_sizes": None}
        if self._features is not None and any(one.has_image for one in prepared):
            return inputs
        pixels, sizes = _pixels(prepared)
        if isinstance(pixels, list):
            pixels = [upload(one, self.model.dtype) for one in pixels]
        elif pixels is not None:
            pixels = upload(pixels, self.model.dtype)
        return inputs | {"images": pixels, "image_sizes": sizes}

    def complete_inputs(self, loaded: LoadedBatch) -> Mapping[str, Any]:
        """Arguments of `generate`; where the tower's output is looked up, it takes the place of the pixels."""
        if self._features is None or not any(one.has_image for one in loaded.prepared):
            return loaded.inputs
        return {**loaded.inputs, "images": self._features.encode(self.model, loaded.prepared)}

    def own_settings(self) -> Mapping[str, Any]:
        """How images are prepared, and which weights the bundled sample has."""
        config = self.model.config
        return {name: getattr(config, name, None) for name in ("image_aspect_ratio", "sample_weights")}


def _pixels(prepared: Sequence[PreparedQuestion]) -> tuple[Any, list[tuple[int, int]] | None]:
    """Pixels, one entry per row; a row without an image gets a blank one that it never shows."""
    known = [one.pixels for one in prepared if one.pixels is not None]
    if not known:
        return None, None
    blank = torch.zeros_like(known[0][:1] if known[0].dim() == 4 else known[0])
    pixels = [blank if one.pixels is None else one.pixels for one in prepared]
    sizes = [one.image_size or (1, 1) for one in prepared]
    same = len({one.shape for one in pixels}) == 1
    return (torch.stack(pixels) if same else pixels), sizes


def place_images(text: str, images: int, start_end: bool) -> str:
    """The text with an image token for each of its `<image>` markers, or with `images` of them in front.

    Args:
        text: Of a user turn.
        images: Pictures it shows.
        start_end: The checkpoint has marks around image tokens (`mm_use_im_start_end`).

    Raises:
        PromptError: Markers in the text, but not one per image.
    """
    token = DEFAULT_IMAGE_TOKEN
    if start_end:
        token = DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN
    pieces = around_images(text, images)
    return token.join(pieces) if len(pieces) > 1 else f"{token}\n" * images + text
