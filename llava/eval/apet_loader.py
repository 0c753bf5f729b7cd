"""Checkpoints for the programs of `apet` that run whole models (`apet.compare`, `apet.vis`).

They find this module by the entry point `apet.loaders` or beside `apet`; it has what `apet.eval.loader` documents.
"""

import argparse
from typing import Any

import numpy as np
from torch import nn

import apet
import llava._unmixed  # noqa: F401  here too, where another `llava` has replaced `llava/__init__.py`
from apet.adapters import adapter_for
from apet.eval.benchmarks import Question
from apet.eval.scoring_cli import Parser
from apet.methods import get_method
from llava.conversation import new_conversation, plain_conv_mode
from llava.eval.answerer import LlavaAnswerer, LlavaPreparer, PreparedQuestion
from llava.eval.family_answerer import FamilyAnswerer, FamilyPreparer
from llava.eval.generation import GenerationSettings
from llava.eval.program import add_decoding_flags, add_model_flags, load_model
from llava.eval.tower_features import TowerFeatures
from llava.mm_utils import get_model_name_from_path
from llava.model.multimodal_encoder.builder import resolve_vision_tower
from llava.model.processors import FamilyProcessor, Inputs

__all__ = ["LoadedFamily", "LoadedLlava", "add_flags", "load", "resolve_vision_tower"]

# What a method's vision stage may ask for without a look into the tower.
BEHIND_TOWER = {"text_embeddings", "vision_features"}


def add_flags(parser: Parser) -> None:
    """Add the flags of checkpoint, prompt and decoding."""
    add_model_flags(parser)
    add_decoding_flags(parser, 0.0, 128, "vicuna_v1")


def load(args: argparse.Namespace) -> "LoadedLlava | LoadedFamily":
    """The checkpoint of the model flags.

    Raises:
        ValueError: It is no vision-language checkpoint, or one that sees an image as several crops.
    """
    generation = GenerationSettings(args.temperature, args.top_p, args.num_beams, args.max_new_tokens, args.compile)
    conv_mode = plain_conv_mode(get_model_name_from_path(args.model_path), args.conv_mode)
    new_conversation(conv_mode)
    tokenizer, model, image_processor = load_model(args)
    family = isinstance(image_processor, FamilyProcessor)
    if not adapter_for(model).single_crop or getattr(model.config, "image_aspect_ratio", None) == "anyres":
        raise ValueError(
            f"{args.model_path} sees an image as several crops; budgets per image and pictures of its tokens exist for "
            "checkpoints of one crop only (LLaVA-1.5, Qwen-VL, Video-LLaVA)"
        )
    if family:
        return LoadedFamily(model, FamilyPreparer(image_processor, conv_mode), generation, args.model_path)
    preparer = LlavaPreparer(tokenizer, image_processor, model.config, conv_mode)
    return LoadedLlava(model, preparer, generation, args.model_path)


class _Loaded:
    """What both kinds of checkpoint have."""

    def __init__(self, model: nn.Module, preparer: Any, generation: GenerationSettings, model_path: str) -> None:
        self.model = model
        self.model_id = get_model_name_from_path(model_path)
        self.layers = model.config.get_text_config().num_hidden_layers
        self._preparer, self._generation, self._path = preparer, generation, model_path


class LoadedLlava(_Loaded):
    """A LLaVA checkpoint of one crop per image."""

    def __init__(
        self, model: nn.Module, preparer: LlavaPreparer, generation: GenerationSettings, model_path: str
    ) -> None:
        super().__init__(model, preparer, generation, model_path)
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        self.grid, self.image_tokens = (side, side), side * side
        self._features = TowerFeatures()

    def answerer(
        self, config: apet.ApetConfig, *, share_tower: bool = False, new_tokens: int | None = None
    ) -> LlavaAnswerer:
        """The model with this compression."""
        inside = get_method(config.method, **config.method_options).needs("vision").keys() - BEHIND_TOWER
        features = self._features if share_tower and not inside and not config.reduces_tower else None
        return LlavaAnswerer(
            self.model, self._preparer, self._generation, config, self.model_id, self._path, new_tokens,
            features=features,
        )  # fmt: skip

    def prompt_length(self, question: Question) -> int:
        """Tokens of a question's prompt."""
        return len(self._preparer.input_ids(question))

    def seen(self, prepared: PreparedQuestion) -> np.ndarray:
        """(H, W, 3) uint8 picture that the vision tower gets."""
        processor = self._preparer.image_processor
        pixels = prepared.pixels.permute(1, 2, 0).double().numpy()
        pixels = pixels * np.array(processor.image_std) + np.array(processor.image_mean)
        return (pixels.clip(0, 1) * 255).round().astype(np.uint8)


class LoadedFamily(_Loaded):
    """A checkpoint of another family."""

    @property
    def image_tokens(self) -> int:
        """Visual tokens of the smallest image: every image can meet a budget below that."""
        return self._preparer.processor.fewest_tokens

    @property
    def grid(self) -> tuple[int, int]:
        """There is no grid that all images share.

        Raises:
            ValueError: Always.
        """
        raise self._no_grid()

    def answerer(
        self, config: apet.ApetConfig, *, share_tower: bool = False, new_tokens: int | None = None
    ) -> FamilyAnswerer:
        """The model with this compression; its vision model runs for every question."""
        return FamilyAnswerer(
            self.model, self._preparer, self._generation, config, self.model_id, self._path, new_tokens
        )

    def prompt_length(self, question: Question) -> int:
        """Tokens of a question's prompt, its picture counted as one."""
        return self._preparer.prompt_length(question)

    def seen(self, prepared: Inputs) -> np.ndarray:
        """There is no picture in the shape of a grid; raises as `grid`."""
        raise self._no_grid()

    def _no_grid(self) -> ValueError:
        return ValueError(f"{self._path} has no fixed grid of tokens; pictures of them are drawn for LLaVA-1.5 only")
