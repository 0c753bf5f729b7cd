"""LLaVA behind the runner: vicuna-style prompts, LLaVA's image preparation, batched generation."""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

import apet
from apet.adapters import host
from apet.eval.answerer import Answer
from apet.eval.benchmarks import Question
from apet.eval.images import ImageError, Pictures
from apet.eval.prompts import Context, around_images
from apet.eval.sampling import QuestionSampling, draw_key, draw_seed
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import new_conversation
from llava.eval.lengths import context_of, crops_of, room_of_prompt
from llava.eval.tower_features import TowerFeatures
from llava.eval.weights import weights_fingerprint
from llava.mm_utils import process_images, tokenizer_image_token

T = TypeVar("T")


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
        conversation = new_conversation(self.conv_mode)
        conversation.append_message(conversation.roles[0], text)
        conversation.append_message(conversation.roles[1], None)
        return conversation.get_prompt()

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


@dataclass(frozen=True)
class GenerationSettings:
    """Decoding flags. Temperature 0 is greedy; `compile` compiles the decoding step."""

    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    max_new_tokens: int = 128
    compile: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"--temperature {self.temperature} must be a number of at least 0; 0 is greedy")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p} must be a number above 0 and at most 1")
        for name in ("num_beams", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.compile and self.num_beams > 1:
            raise ValueError(f"--compile does not go with --num_beams {self.num_beams}; leave one of them out")

    def kwargs(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        chosen = sampling if self.temperature > 0 else {"do_sample": False}
        return {"num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens, "use_cache": True, **chosen}

    def draws(self, seed: int, draws: Sequence[str], stored: GenerationConfig) -> dict[str, Any]:
        """Arguments of `generate`, over `kwargs`, that let every row draw by itself; none where nothing is drawn.

        Args:
            seed: Of the run.
            draws: What sets each row apart (`apet.eval.sampling.draw_key`).
            stored: The checkpoint's defaults.

        Raises:
            ValueError: Several questions at a time with beams.
        """
        if self.temperature == 0:
            return {}
        seeds = [draw_seed(seed, draw) for draw in draws]
        if self.num_beams > 1:
            self.check_batch(len(draws))
            torch.manual_seed(seeds[0])  # transformers draws beams from the global generator
            return {}
        noise = QuestionSampling(seeds, self.temperature, self.top_p, stored)
        greedy = {"do_sample": False, "temperature": None, "top_p": None}
        return greedy | {"logits_processor": LogitsProcessorList([noise])}

    def check_batch(self, size: int | str) -> None:
        """Raise ValueError for batches in which the draws of a question would depend on the others."""
        if self.temperature > 0 and self.num_beams > 1 and size != 1:
            raise ValueError(
                f"--num_beams {self.num_beams} with --temperature {self.temperature} draws one question at a time; "
                "give --batch_size 1, or --temperature 0"
            )

    def record(self) -> dict[str, Any]:
        """The settings as a run record has them. Runs from before there was a choice are runs without compilation."""
        settings = {name: value for name, value in vars(self).items() if name != "compile" or value}
        # Answers from before that were drawn in another way are not continued.
        return settings if self.temperature == 0 else settings | {"draws": "by question"}


class LlavaAnswerer:
    """Device side: a loaded model, patched with the configured compression.

    Args:
        model: What `load_pretrained_model` returned.
        preparer: The CPU side.
        generation: Decoding flags.
        config: Compression.
        model_id: Name in the answer lines.
        model_path: Checkpoint, for the record.
        features: Where to look up what the vision tower gives for an image; None to run it for every question.
        new_tokens: For measurements: every answer has exactly so many tokens.
    """

    def __init__(
        self,
        model: Any,
        preparer: LlavaPreparer,
        generation: GenerationSettings,
        config: apet.ApetConfig,
        model_id: str,
        model_path: str,
        features: TowerFeatures | None = None,
        new_tokens: int | None = None,
    ) -> None:
        self.model = apet.apply_patch(model, config)
        known = preparer.known if features is None else features.known
        self.preparer = replace(preparer, known=known, compression=config, context=context_of(model.config))
        self.model_id = model_id
        self.device = str(model.device)
        self._generation, self._config, self._path, self._features = generation, config, model_path, features
        exactly = {} if new_tokens is None else {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        self._generate = generation.kwargs() | exactly
        most = self._generate["max_new_tokens"]
        self._compiled = CompiledDecoding(self.model, most) if generation.compile else None

    def load(self, prepared: Sequence[PreparedQuestion]) -> "LoadedQuestions":
        """A batch on its way to the device: on a GPU from pinned memory, in a stream of its own."""
        count = len(prepared)
        prepared = self._compiled.filled_up(prepared) if self._compiled else prepared
        ids, mask = _left_pad([one.input_ids for one in prepared], self._pad_id)
        upload = Upload(self.model.device)
        has_image, draws = tuple(one.has_image for one in prepared[:count]), tuple(one.draw for one in prepared)
        rooms = tuple(one.room for one in prepared[:count])
        if self._features is not None and any(has_image):
            looked_up = tuple(prepared)
            return LoadedQuestions(upload(ids), upload(mask), None, None, has_image, rooms, upload, draws, looked_up)
        pixels, sizes = self._pixels(prepared)
        images = [upload(one, self.model.dtype) for one in pixels] if isinstance(pixels, list) else pixels
        if isinstance(images, Tensor):
            images = upload(images, self.model.dtype)
        return LoadedQuestions(upload(ids), upload(mask), images, sizes, has_image, rooms, upload, draws)

    def answer(self, prepared: "Sequence[PreparedQuestion] | LoadedQuestions") -> list[Answer]:
        """Answers of a batch of prepared questions, or of what `load` made of them."""
        loaded = prepared if isinstance(prepared, LoadedQuestions) else self.load(prepared)
        loaded.upload.finish()
        images = self._features.encode(self.model, loaded.looked_up) if loaded.looked_up else loaded.images
        output = self.model.generate(
            loaded.input_ids,
            attention_mask=loaded.attention_mask,
            images=images,
            image_sizes=loaded.image_sizes,
            **self._generate | self._generation.draws(self._config.seed, loaded.draws, self.model.generation_config),
            **(self._compiled.kwargs() if self._compiled else {}),
        )
        if self._compiled:
            self._compiled.answered(len(output))
        shown_rows = zip(output[: len(loaded.has_image)].tolist(), loaded.rooms, strict=True)
        new_ids = [until_end(row, self.model.generation_config, room) for row, room in shown_rows]
        texts = self.preparer.tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        visual = apet.last_result(self.model).layer_averaged_tokens[:: self._generation.num_beams][: len(texts)]
        return [
            Answer(text.strip(), len(new), tokens if shown else None)
            for text, new, tokens, shown in zip(texts, new_ids, visual, loaded.has_image, strict=True)
        ]

    def settings(self) -> Mapping[str, Any]:
        """Everything that can change an answer."""
        model = self.model
        return {
            **model_settings(model, self._path, self.model_id),
            "conv_mode": self.preparer.conv_mode,
            "image_aspect_ratio": getattr(model.config, "image_aspect_ratio", None),
            "sample_weights": getattr(model.config, "sample_weights", None),
            "generation": self._generation.record(),
            "compression": self._config.to_dict(),
        }

    @property
    def _pad_id(self) -> int:
        return self.model.generation_config.pad_token_id

    def _pixels(self, prepared: Sequence[PreparedQuestion]) -> tuple[Any, list[tuple[int, int]] | None]:
        """Pixels, one entry per row; a row without an image gets a blank one that it never shows."""
        known = [one.pixels for one in prepared if one.pixels is not None]
        if not known:
            return None, None
        blank = torch.zeros_like(known[0][:1] if known[0].dim() == 4 else known[0])
        pixels = [blank if one.pixels is None else one.pixels for one in prepared]
        sizes = [one.image_size or (1, 1) for one in prepared]
        same = len({one.shape for one in pixels}) == 1
        return (torch.stack(pixels) if same else pixels), sizes


def model_settings(model: torch.nn.Module, path: str, model_id: str) -> dict[str, Any]:
    """What a run record says of the loaded checkpoint, whatever its family."""
    return {
        "model_path": path,
        "model_id": model_id,
        "weights": weights_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": host.attention_name(model.config),
    }


def until_end(ids: list[int], generation: GenerationConfig, room: int | None = None) -> list[int]:
    """Generated ids up to the end token, which counts, without the padding of shorter rows.

    Where the model's context ends, after `room` tokens, the answer ends: what follows depends on positions the model
    was not made for. Rows of a batch end each at their own, so that answers do not depend on the batch.
    """
    end = generation.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or ())
    stop = next((index for index, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: stop + 1][:room]


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


class CompiledDecoding:
    """What `generate` needs to compile its decoding step once and to use it for every batch.

    Args:
        model: The model that generates.
        new_tokens: Most tokens of an answer.
    """

    def __init__(self, model: Any, new_tokens: int) -> None:
        self._cache = apet.PromptCache(model, new_tokens)
        self._compile = apet.compile_config()
        self._rows = 0

    def filled_up(self, prepared: Sequence[T]) -> list[T]:
        """The batch, with repetitions of its first question up to the largest batch so far: its step is compiled."""
        return [*prepared, *[prepared[0]] * (self._rows - len(prepared))]

    def answered(self, rows: int) -> None:
        """A batch of so many rows was answered."""
        self._rows = max(self._rows, rows)

    def kwargs(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        self._cache.reset()
        return host.with_cache(self._cache) | {"compile_config": self._compile}


class Upload:
    """Copies to a device that do not hold up its work: from pinned memory, in a stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._sent: list[Tensor] = []

    def __call__(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the device, converted before it travels; complete after `finish`."""
        tensor = tensor if dtype is None else tensor.to(dtype)
        if self._stream is None:
            return tensor.to(self._device)
        with torch.cuda.stream(self._stream):
            sent = tensor.pin_memory().to(self._device, non_blocking=True)
        self._sent.append(sent)
        return sent

    def finish(self) -> None:
        """Let the work that follows on the device wait for the copies; the host does not wait."""
        if self._stream is None:
            return
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for tensor in self._sent:
            tensor.record_stream(computing)  # its memory is not given away while the work reads it


@dataclass(frozen=True)
class LoadedQuestions:
    """A batch on the device.

    Attributes:
        input_ids: (B, L) int64, padded on the left, with -200 for images.
        attention_mask: (B, L).
        images: (B, 3, H, W), a list with one tensor per row, or None.
        image_sizes: (width, height) per row, or None.
        has_image: Which of the questions have an image. Rows behind them only fill up the batch.
        rooms: Most tokens of each question's answer, None where the model does not say.
        upload: The copies under way.
        draws: What sets the random draws of each row apart; rows that fill up the batch too.
        looked_up: Questions whose images are encoded, or their features looked up, when they are answered.
    """

    input_ids: Tensor
    attention_mask: Tensor
    images: Tensor | list[Tensor] | None
    image_sizes: list[tuple[int, int]] | None
    has_image: tuple[bool, ...]
    rooms: tuple[int | None, ...]
    upload: Upload
    draws: tuple[str, ...]
    looked_up: tuple[PreparedQuestion, ...] = ()


def _left_pad(rows: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids (B, L) and mask (B, L) of rows padded on the left."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return ids, mask
