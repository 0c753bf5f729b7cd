"""Answers of a loaded model, whatever its family: decoding flags, batches on their way to the device, generation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

import apet
from apet.adapters import host
from apet.eval.answerer import Answer
from apet.eval.sampling import QuestionSampling, draw_seed
from llava.eval.lengths import context_of
from llava.eval.weights import weights_fingerprint

T = TypeVar("T")


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


@dataclass(frozen=True)
class LoadedBatch:
    """A batch on the device.

    Attributes:
        prepared: The prepared questions, each with `has_image`, `room` and `draw`; behind them repetitions that only
            fill up the batch.
        count: How many of them are questions.
        inputs: What `generate` takes.
        upload: The copies under way.
    """

    prepared: Sequence[Any]
    count: int
    inputs: Mapping[str, Any]
    upload: "Upload"


class ModelAnswerer:
    """Device side: a loaded model, patched with the configured compression.

    What differs between families is the inputs of a batch, the record, and the fields below.

    Attributes:
        decoding: Arguments of `tokenizer.batch_decode`.
        echoes: Whether `generate` returns the prompt in front of the answer.

    Args:
        model: What `load_pretrained_model` returned.
        preparer: The CPU side, with the checkpoint's `tokenizer`.
        generation: Decoding flags.
        config: Compression.
        model_id: Name in the answer lines.
        model_path: Checkpoint, for the record.
        new_tokens: For measurements: every answer has exactly so many tokens.
    """

    decoding: ClassVar[Mapping[str, Any]] = {}
    echoes: ClassVar[bool] = False

    def __init__(
        self,
        model: Any,
        preparer: Any,
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

    def upload_inputs(self, prepared: Sequence[Any], upload: "Upload") -> Mapping[str, Any]:
        """Arguments of `generate` for prepared questions, tensors on their way to the device."""
        raise NotImplementedError

    def complete_inputs(self, loaded: LoadedBatch) -> Mapping[str, Any]:
        """Arguments of `generate`, with what is computed only now."""
        return loaded.inputs

    def own_settings(self) -> Mapping[str, Any]:
        """What can change an answer beside what `settings` has for every family."""
        raise NotImplementedError

    def load(self, prepared: Sequence[Any]) -> LoadedBatch:
        """A batch on its way to the device: on a GPU from pinned memory, in a stream of its own."""
        upload = Upload(self.model.device)
        filled = self._compiled.filled_up(prepared) if self._compiled else prepared
        return LoadedBatch(filled, len(prepared), self.upload_inputs(filled, upload), upload)

    def answer(self, prepared: "Sequence[Any] | LoadedBatch") -> list[Answer]:
        """Answers of a batch of prepared questions, or of what `load` made of them."""
        loaded = prepared if isinstance(prepared, LoadedBatch) else self.load(prepared)
        loaded.upload.finish()
        inputs, stored = self.complete_inputs(loaded), self.model.generation_config
        draws = self._generation.draws(self._config.seed, [one.draw for one in loaded.prepared], stored)
        compiled = self._compiled.kwargs() if self._compiled else {}
        output = self.model.generate(**inputs, **self._generate | draws, **compiled)
        if self._compiled:
            self._compiled.answered(len(output))
        questions = loaded.prepared[: loaded.count]
        start = inputs["input_ids"].shape[1] if self.echoes else 0
        rows = zip(output[: loaded.count, start:].tolist(), questions, strict=True)
        new_ids = [until_end(row, stored, question.room) for row, question in rows]
        texts = self.preparer.tokenizer.batch_decode(new_ids, skip_special_tokens=True, **self.decoding)
        visual = apet.last_result(self.model).layer_averaged_tokens[:: self._generation.num_beams][: loaded.count]
        return [
            Answer(text.strip(), len(new), tokens if question.has_image else None)
            for text, new, tokens, question in zip(texts, new_ids, visual, questions, strict=True)
        ]

    def settings(self) -> Mapping[str, Any]:
        """Everything that can change an answer."""
        return {
            "model_path": self._path,
            "model_id": self.model_id,
            "weights": weights_fingerprint(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attn_implementation": host.attention_name(self.model.config),
            "conv_mode": self.preparer.conv_mode,
            **self.own_settings(),
            "generation": self._generation.record(),
            "compression": self._config.to_dict(),
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
