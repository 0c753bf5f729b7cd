"""LLaVA behind the runner: vicuna-style prompts, LLaVA's image preparation, batched generation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

import apet
from apet.eval.answerer import Answer
from apet.eval.benchmarks import Question
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import new_conversation
from llava.mm_utils import process_images, tokenizer_image_token


@dataclass(frozen=True)
class PreparedQuestion:
    """A question ready for the device.

    Attributes:
        input_ids: (L,) int64 with -200 for the image.
        pixels: (3, H, W) or (crops, 3, H, W), None without an image.
        image_size: Original (width, height), None without an image.
    """

    input_ids: Tensor
    pixels: Tensor | None
    image_size: tuple[int, int] | None


@dataclass(frozen=True)
class LlavaPreparer:
    """CPU side: builds the prompt and prepares the image.

    Attributes:
        tokenizer: Tokenizer of the checkpoint.
        image_processor: Image processor of the vision tower.
        config: Model config (`image_aspect_ratio`, `mm_use_im_start_end`, ...).
        conv_mode: Key of `llava.conversation.conv_templates`.
    """

    tokenizer: Any
    image_processor: Any
    config: Any
    conv_mode: str

    def render(self, question: Question) -> str:
        """The prompt text, one user turn and an open assistant turn."""
        text = question.prompt
        if question.image is not None or question.image_base64 is not None:
            image = DEFAULT_IMAGE_TOKEN
            if getattr(self.config, "mm_use_im_start_end", False):
                image = DEFAULT_IM_START_TOKEN + image + DEFAULT_IM_END_TOKEN
            text = f"{image}\n{text}"
        conversation = new_conversation(self.conv_mode)
        conversation.append_message(conversation.roles[0], text)
        conversation.append_message(conversation.roles[1], None)
        return conversation.get_prompt()

    def prepare(self, question: Question, images: Sequence[Image]) -> PreparedQuestion:
        """Ids and pixels of a question."""
        ids = tokenizer_image_token(self.render(question), self.tokenizer, return_tensors="pt")
        if not images:
            return PreparedQuestion(ids, None, None)
        pixels = process_images(list(images), self.image_processor, self.config)[0]
        return PreparedQuestion(ids, pixels, images[0].size)


@dataclass(frozen=True)
class GenerationSettings:
    """Decoding flags. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"--temperature {self.temperature} must not be negative")
        if self.num_beams < 1 or self.max_new_tokens < 1:
            raise ValueError("--num_beams and --max_new_tokens must be at least 1")

    def kwargs(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        chosen = sampling if self.temperature > 0 else {"do_sample": False}
        return {"num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens, "use_cache": True, **chosen}


class LlavaAnswerer:
    """Device side: a loaded model, patched with the configured compression.

    Args:
        model: What `load_pretrained_model` returned.
        preparer: The CPU side.
        generation: Decoding flags.
        config: Compression.
        model_id: Name in the answer lines.
        model_path: Checkpoint, for the record.
    """

    def __init__(
        self,
        model: Any,
        preparer: LlavaPreparer,
        generation: GenerationSettings,
        config: apet.ApetConfig,
        model_id: str,
        model_path: str,
    ) -> None:
        self.model = apet.apply_patch(model, config)
        self.preparer = preparer
        self.model_id = model_id
        self.device = str(model.device)
        self._generation, self._config, self._path = generation, config, model_path

    def answer(self, prepared: Sequence[PreparedQuestion]) -> list[Answer]:
        """Answers of a batch of prepared questions."""
        ids, mask = _left_pad([one.input_ids for one in prepared], self._pad_id)
        images, sizes = self._images(prepared)
        output = self.model.generate(
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            images=images,
            image_sizes=sizes,
            **self._generation.kwargs(),
        )
        new_ids = [self._until_end(row) for row in output.tolist()]
        texts = self.preparer.tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        visual = apet.last_result(self.model).layer_averaged_tokens[:: self._generation.num_beams]
        return [
            Answer(text.strip(), len(new), tokens if one.pixels is not None else None)
            for text, new, tokens, one in zip(texts, new_ids, visual, prepared, strict=True)
        ]

    def settings(self) -> Mapping[str, Any]:
        """Everything that can change an answer."""
        model = self.model
        return {
            "model_path": self._path,
            "model_id": self.model_id,
            "conv_mode": self.preparer.conv_mode,
            "image_aspect_ratio": getattr(model.config, "image_aspect_ratio", None),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attn_implementation": model.config._attn_implementation,
            "sample_weights": getattr(model.config, "sample_weights", None),
            "generation": vars(self._generation),
            "compression": self._config.to_dict(),
        }

    @property
    def _pad_id(self) -> int:
        return self.model.generation_config.pad_token_id

    def _images(self, prepared: Sequence[PreparedQuestion]) -> tuple[Any, list[tuple[int, int]] | None]:
        """Pixels on the device, one entry per row; a row without an image gets a blank one that it never shows."""
        known = [one.pixels for one in prepared if one.pixels is not None]
        if not known:
            return None, None
        device, dtype = self.model.device, self.model.dtype
        blank = torch.zeros_like(known[0][:1] if known[0].dim() == 4 else known[0])
        pixels = [(blank if one.pixels is None else one.pixels).to(device, dtype) for one in prepared]
        sizes = [one.image_size or (1, 1) for one in prepared]
        same = len({one.shape for one in pixels}) == 1
        return (torch.stack(pixels) if same else pixels), sizes

    def _until_end(self, ids: list[int]) -> list[int]:
        """Generated ids up to the end token, which counts, without the padding of shorter rows."""
        end = self.model.generation_config.eos_token_id
        ends = {end} if isinstance(end, int) else set(end or ())
        stop = next((index for index, token in enumerate(ids) if token in ends), len(ids) - 1)
        return ids[: stop + 1]


def _left_pad(rows: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids (B, L) and mask (B, L) of rows padded on the left."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return ids, mask
