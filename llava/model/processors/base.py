"""What the families share: a chat turn as text, markers replaced by placeholders, ids, and left-padded batches."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer
from transformers.utils import cached_file

from apet import ApetConfig
from apet.adapters.stages import budget_for
from apet.eval.prompts import around_images


class Clip(Protocol):
    """Frames of a video: RGB pictures of one size, the second at which each is shown, the length in seconds."""

    frames: Sequence[Image]
    times: Sequence[float]
    seconds: float


@dataclass(frozen=True)
class Limits:
    """Smallest and largest picture in pixels; None for the family's own."""

    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if any(one is not None and one < 1 for one in (self.min_pixels, self.max_pixels)):
            raise ValueError(f"--min_pixels {self.min_pixels} and --max_pixels {self.max_pixels} must be at least 1")
        if None not in (self.min_pixels, self.max_pixels) and self.min_pixels > self.max_pixels:
            raise ValueError(f"--min_pixels {self.min_pixels} is above --max_pixels {self.max_pixels}")


@dataclass(frozen=True)
class Inputs:
    """A prompt ready for the device.

    Attributes:
        input_ids: (L,) int64, placeholders expanded.
        tensors: Further inputs of the model; the first dimension runs over pictures, patches or tiles.
        pictures: Images and videos shown.
        visual: Visual tokens of each.
        room: Tokens that the model's context leaves for the answer; None if it does not say.
        draw: What sets the question's random draws apart (`apet.eval.sampling.draw_key`).
    """

    input_ids: Tensor
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    pictures: int = 0
    visual: tuple[int, ...] = ()
    room: int | None = None
    draw: str = ""

    @property
    def has_image(self) -> bool:
        """Whether the prompt shows an image or a video."""
        return self.pictures > 0


@dataclass(frozen=True)
class Encoded:
    """Pictures of one prompt: what replaces the marker of each, and the model's inputs."""

    replacements: Sequence[str]
    tensors: Mapping[str, Tensor]


class FamilyProcessor:
    """One family. Instances are sent to worker processes, so they must be picklable.

    Attributes:
        image_processor_class: Of the checkpoint's image processor, the implementation on PIL and numpy.
        typed: Whether the model wants `mm_token_type_ids`: 1 at image placeholders, 2 at those of videos.
        sized: Whether pictures keep their own size, between limits.
        templated: Whether prompts come from the checkpoint's chat template.

    Args:
        tokenizer: Of the checkpoint.
        image_processor: Of the checkpoint, without torchvision.
        config: Of the model.
        files: JSON objects of the checkpoint's processor files, by file name.
    """

    image_processor_class: ClassVar[type]
    typed: ClassVar[bool] = False
    sized: ClassVar[bool] = False
    templated: ClassVar[bool] = True

    def __init__(self, tokenizer: Any, image_processor: Any, config: Any, files: Mapping[str, Any]) -> None:
        self.tokenizer, self.image_processor, self.config = tokenizer, image_processor, config
        self.files = files
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    @classmethod
    def from_pretrained(cls, path: str, config: Any, limits: Limits) -> "FamilyProcessor":
        """Read the files of a checkpoint; errors as `load_processor`."""
        if not cls.sized and limits != Limits():
            raise ValueError(
                f"--min_pixels and --max_pixels are for models that see pictures in their own size; {path} does not"
            )
        names = ("processor_config.json", "video_preprocessor_config.json", "chat_template.json")
        files = {name: found for name in names if (found := _read(path, name)) is not None}
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            image_processor = cls.image_processor_class.from_pretrained(path)
        except OSError as error:
            raise FileNotFoundError(f"{path} lacks files of its tokenizer or image processor: {error}") from error
        if tokenizer.chat_template is None:
            tokenizer.chat_template = files.get("chat_template.json", {}).get("chat_template")
        if cls.templated and tokenizer.chat_template is None:
            raise ValueError(f"{path} has no chat template (chat_template.jinja, or in tokenizer_config.json)")
        processor = cls(tokenizer, image_processor, config, files)
        processor.limit(limits)
        return processor

    def limit(self, limits: Limits) -> None:
        """Set the smallest and the largest picture."""

    def __call__(
        self, text: str, images: Sequence[Image] = (), clip: Clip | None = None, conv_mode: str = ""
    ) -> Inputs:
        """Ids and pixels of a question about images or about a video.

        Args:
            text: The question.
            images: RGB pictures, shown where it has `<image>`, or in front of it.
            clip: Frames of a video, shown in front of it.
            conv_mode: Prompt template, where the checkpoint has none.

        Raises:
            PromptError: `<image>` markers in the text, but not one per image.
            ValueError: A text that holds the family's own markers, a picture that the family cannot show.
        """
        around_images(text, len(images))
        encoded = Encoded((), {})
        if clip is not None:
            encoded = self.encode_clip(clip)
        elif images:
            encoded = self.encode_images(images)
        prompt = self.render(text, len(images), clip is not None, conv_mode)
        marker = self.marker(clip is not None)
        pieces = prompt.split(marker)
        if len(pieces) - 1 != len(encoded.replacements):
            raise ValueError(
                f"the prompt shows {len(encoded.replacements)} pictures but has {len(pieces) - 1} markers {marker!r}; "
                f"the question must not hold the marker: {text!r}"
            )
        prompt = "".join(word for pair in zip(pieces, [*encoded.replacements, ""], strict=True) for word in pair)
        shown = tuple(one.count(self.placeholder(clip is not None)) for one in encoded.replacements)
        return Inputs(self._ids(prompt), encoded.tensors, len(shown), shown)

    def render(self, text: str, images: int, video: bool, conv_mode: str = "") -> str:
        """The prompt with one marker per picture: one user turn, and an open assistant turn."""
        first, *rest = around_images(text, 0 if video else images)
        picture = {"type": "video" if video else "image"}
        content = [] if rest else [picture] * (1 if video else images)
        content += [{"type": "text", "text": first}] if first or not rest else []
        for piece in rest:
            content += [picture, *([{"type": "text", "text": piece}] if piece else [])]
        turns = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def marker(self, video: bool) -> str:
        """What stands for a picture in a rendered prompt."""
        return self.placeholder(video)

    def placeholder_id(self, video: bool) -> int:
        """Id that stands for a visual token."""
        return self.config.video_token_id if video else self.config.image_token_id

    def placeholder(self, video: bool) -> str:
        """Token that stands for a visual token."""
        return self.tokenizer.convert_ids_to_tokens(self.placeholder_id(video))

    @property
    def fewest_tokens(self) -> int:
        """Visual tokens of the smallest image."""
        raise NotImplementedError

    def encode_images(self, images: Sequence[Image]) -> Encoded:
        """The images of a prompt."""
        raise NotImplementedError

    def encode_clip(self, clip: Clip) -> Encoded:
        """The video of a prompt."""
        raise NotImplementedError

    def decoder_tokens(self, compression: ApetConfig, visual: Sequence[int], frames: int | None) -> int:
        """The most visual tokens of a prompt that enter the decoder; families of several tiles count all of them.

        Args:
            compression: The compression.
            visual: Visual tokens of every picture before it.
            frames: Of the video; None for images.
        """
        return sum(visual)

    def collate(self, rows: Sequence[Inputs]) -> dict[str, Tensor]:
        """Inputs of a batch: `input_ids` and `attention_mask` (B, L), left-padded, and all else joined."""
        ids, mask = left_padded([row.input_ids for row in rows], 0)
        # The repetition penalty of transformers reads padding too; the prompt's own first id adds nothing to it.
        ids = torch.where(mask == 1, ids, torch.stack([row.input_ids[:1] for row in rows]))
        names = dict.fromkeys(name for row in rows for name in row.tensors)
        joined = {name: self.join(name, [row.tensors[name] for row in rows if name in row.tensors]) for name in names}
        if self.typed:
            types = (ids == self.placeholder_id(False)).int() + 2 * (ids == self.placeholder_id(True)).int()
            joined["mm_token_type_ids"] = types * mask.int()
        return {"input_ids": ids, "attention_mask": mask, **joined, **self.batch_inputs(rows)}

    def join(self, name: str, values: Sequence[Tensor]) -> Tensor:
        """One of the model's inputs for a batch."""
        return torch.cat(list(values))

    def batch_inputs(self, rows: Sequence[Inputs]) -> dict[str, Tensor]:
        """Inputs that only a batch has."""
        return {}

    def settings(self) -> dict[str, Any]:
        """What can change an answer, as JSON types."""
        return {"family": self.config.model_type}

    def _ids(self, prompt: str) -> Tensor:
        starts = self.tokenizer.bos_token is not None and prompt.startswith(self.tokenizer.bos_token)
        ids = self.tokenizer(prompt, add_special_tokens=not starts, return_attention_mask=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)


def left_padded(rows: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids (B, L) int64 and mask (B, L) int64 of rows of ids, padded on the left."""
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    ones = [torch.ones_like(row) for row in rows]
    return ids, pad_sequence(ones, batch_first=True, padding_side="left")


def kept_counts(compression: ApetConfig, visual: Sequence[int]) -> list[int]:
    """Tokens that the vision stage leaves of images of one block each."""
    budget = compression.stage_budgets[0]
    if compression.budget_per == "prompt" and visual:
        return [budget_for(budget, sum(visual), 0, 1)]
    return [budget_for(budget, count, item, len(visual)) for item, count in enumerate(visual)]


def _read(path: str, name: str) -> Any:
    """A JSON file of a checkpoint; None where it has none."""
    file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
