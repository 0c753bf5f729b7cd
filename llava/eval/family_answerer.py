"""The families of `llava.model.processors` behind the runner: their own prompts and processing, batched generation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from PIL.Image import Image
from torch import Tensor

import apet
from apet.eval.answerer import Answer
from apet.eval.benchmarks import Question
from apet.eval.images import ImageError
from apet.eval.prompts import Context, PromptError
from apet.eval.sampling import draw_key
from apet.eval.videos import read_clip
from llava.eval.answerer import CompiledDecoding, GenerationSettings, Upload, model_settings, until_end
from llava.eval.lengths import context_of
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

    def prompt_length(self, question: Question) -> int:
        """Tokens of a question's prompt, its picture counted as one marker."""
        video = question.video is not None
        images = int(not video and (question.image is not None or question.image_base64 is not None))
        prompt = self.processor.render(question.prompt, images, video, self.conv_mode)
        return len(self.processor.tokenizer(prompt).input_ids)


@dataclass(frozen=True)
class LoadedInputs:
    """A batch on the device.

    Attributes:
        inputs: What `generate` takes.
        shown: Which rows have a picture.
        rooms: Most tokens of each answer, None where the model does not say.
        upload: The copies under way.
        draws: What sets the random draws of each row apart; rows that fill up the batch too.
    """

    inputs: Mapping[str, Tensor]
    shown: tuple[bool, ...]
    rooms: tuple[int | None, ...]
    upload: Upload
    draws: tuple[str, ...]


class FamilyAnswerer:
    """Device side: a loaded model, patched with the configured compression.

    Args:
        model: What `load_pretrained_model` returned.
        preparer: The CPU side.
        generation: Decoding flags.
        config: Compression.
        model_id: Name in the answer lines.
        model_path: Checkpoint, for the record.
        new_tokens: For measurements: every answer has exactly so many tokens.
    """

    def __init__(
        self,
        model: Any,
        preparer: FamilyPreparer,
        generation: GenerationSettings,
        config: apet.ApetConfig,
        model_id: str,
        model_path: str,
        new_tokens: int | None = None,
    ) -> None:
        self.model = apet.apply_patch(model, config)
        self.preparer = replace(preparer, compression=config, context=context_of(model.config))
        self.model_id = model_id
        self.device = str(model.device)
        self._generation, self._config, self._path = generation, config, model_path
        exactly = {} if new_tokens is None else {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        self._generate = generation.kwargs() | exactly
        most = self._generate["max_new_tokens"]
        self._compiled = CompiledDecoding(self.model, most) if generation.compile else None

    def load(self, prepared: Sequence[Inputs]) -> LoadedInputs:
        """A batch on its way to the device."""
        upload = Upload(self.model.device)
        filled = self._compiled.filled_up(prepared) if self._compiled else prepared
        inputs = {
            name: upload(value, self.model.dtype if name.startswith("pixel_values") else None)
            for name, value in self.preparer.processor.collate(filled).items()
        }
        shown, rooms = tuple(one.pictures > 0 for one in prepared), tuple(one.room for one in prepared)
        return LoadedInputs(inputs, shown, rooms, upload, tuple(one.draw for one in filled))

    def answer(self, prepared: "Sequence[Inputs] | LoadedInputs") -> list[Answer]:
        """Answers of a batch of prepared questions, or of what `load` made of them."""
        loaded = prepared if isinstance(prepared, LoadedInputs) else self.load(prepared)
        loaded.upload.finish()
        compiled = self._compiled.kwargs() if self._compiled else {}
        draws = self._generation.draws(self._config.seed, loaded.draws, self.model.generation_config)
        output = self.model.generate(**loaded.inputs, **self._generate | draws, **compiled)
        if self._compiled:
            self._compiled.answered(len(output))
        start = loaded.inputs["input_ids"].shape[1]
        rows = zip(output[: len(loaded.shown), start:].tolist(), loaded.rooms, strict=True)
        new_ids = [until_end(row, self.model.generation_config, room) for row, room in rows]
        texts = self.preparer.processor.tokenizer.batch_decode(
            new_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        visual = apet.last_result(self.model).layer_averaged_tokens[:: self._generation.num_beams][: len(texts)]
        return [
            Answer(text.strip(), len(new), tokens if shown else None)
            for text, new, tokens, shown in zip(texts, new_ids, visual, loaded.shown, strict=True)
        ]

    def settings(self) -> Mapping[str, Any]:
        """Everything that can change an answer."""
        model = self.model
        return {
            **model_settings(model, self._path, self.model_id),
            "conv_mode": self.preparer.conv_mode,
            **self.preparer.processor.settings(),
            "num_frames": self.preparer.frames,
            "generation": self._generation.record()
            | {"repetition_penalty": model.generation_config.repetition_penalty},
            "compression": self._config.to_dict(),
        }
