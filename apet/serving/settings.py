"""What ``additional_config["apet"]`` may say: the settings of a serving engine, checked when it starts.

An engine lays out a prompt before it encodes the images and keeps their embeddings for other prompts. So the number of
tokens of an image must follow from its size alone, and which tokens survive from the image alone.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apet.config import FAMILY_PRESETS, ApetConfig, FamilyPreset
from apet.methods import selector
from apet.methods.base import Selector

KEY = "apet"


@dataclass(frozen=True)
class Served:
    """A model class of vLLM and the one that takes its place when compression is configured.

    Attributes:
        architecture: Name in the checkpoint's config.json and in vLLM's registry.
        family: Key of the family's preset.
        model: Our class as vLLM's registry wants it, "module:class".
        position_mode: Positions of the surviving tokens in the engine.
        videos: Whether videos have budgets of their own.
        crops: Whether a budget may be for a crop or for the image.
    """

    architecture: str
    family: str
    model: str
    position_mode: str
    videos: bool = False
    crops: bool = False

    @property
    def registered(self) -> str:
        """Name under which our class stands in vLLM's registry."""
        return self.model.partition(":")[2]

    @property
    def preset(self) -> FamilyPreset:
        """Published settings of the family."""
        return FAMILY_PRESETS[self.family]


SERVED = (
    Served("LlavaForConditionalGeneration", "llava", "apet.serving.llava:ApetLlava", "compact", crops=True),
    Served(
        "LlavaNextForConditionalGeneration", "llava_next", "apet.serving.llava_next:ApetLlavaNext", "compact",
        crops=True,
    ),
    Served(
        "LlavaOnevisionForConditionalGeneration", "llava_onevision",
        "apet.serving.llava_onevision:ApetLlavaOnevision", "compact", videos=True,
    ),
    Served("InternVLForConditionalGeneration", "internvl", "apet.serving.internvl:ApetInternVL", "compact"),
    Served(
        "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", "apet.serving.qwen2_5_vl:ApetQwen2_5_VL", "keep",
        videos=True,
    ),
    Served("Qwen3VLForConditionalGeneration", "qwen3_vl", "apet.serving.qwen3_vl:ApetQwen3VL", "keep", videos=True),
)  # fmt: skip


def served(architecture: str) -> Served:
    """The row of an architecture, ours or vLLM's.

    Raises:
        ValueError: A model that the plugin does not serve.
    """
    for row in SERVED:
        if architecture in (row.architecture, row.registered):
            return row
    known = ", ".join(row.architecture for row in SERVED)
    raise ValueError(f"additional_config[{KEY!r}]: the model is a {architecture}; ApET serves {known} in vLLM")


def read_settings(additional_config: Any) -> ApetConfig | None:
    """The configuration in vLLM's `additional_config`, None where there is none.

    Raises:
        ValueError: An unknown field, a value out of range, or something an engine cannot do.
    """
    if not isinstance(additional_config, Mapping) or KEY not in additional_config:
        return None
    fields = additional_config[KEY]
    if not isinstance(fields, Mapping):
        raise ValueError(
            f"additional_config[{KEY!r}]={fields!r} must be an object of ApetConfig fields such as "
            '{"visual_token_num": 64}'
        )
    try:
        config = ApetConfig.from_dict(fields)
        _check(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"additional_config[{KEY!r}]: {error}") from None
    return config


def check_family(config: ApetConfig, row: Served) -> None:
    """Check what depends on the model.

    Raises:
        ValueError: A method or option that does not work for the family in an engine.
    """
    try:
        select = image_selector(config, row)
        if config.size_bias or config.method_options.get("size_bias"):
            raise ValueError("size_bias is not possible in vLLM, whose attention takes no sizes: leave it out")
        if select.adaptive:
            raise ValueError(
                f"method {config.method!r} with {config.method_options} gives images fewer tokens than their budget, "
                "but vLLM must know the number before it encodes an image; leave out what makes the method adaptive"
            )
        asked = config.position_mode, config.method_options.get("position_mode", "auto")
        if wrong := set(asked) - {"auto", row.position_mode}:
            raise ValueError(
                f"position_mode={wrong.pop()!r} is not possible for {row.family} in vLLM, which knows "
                f"{row.position_mode!r}: leave it out"
            )
        if not row.videos and (config.video_token_num is not None or config.video_budget_per != "auto"):
            raise ValueError(
                f"{row.family} takes no videos, or takes them as images; leave out video_token_num and video_budget_per"
            )
        if not row.crops and config.budget_per != "crop":
            raise ValueError(
                f"budget_per={config.budget_per!r} is about several crops that become one picture; leave it out for "
                f"{row.family}"
            )
    except ValueError as error:
        raise ValueError(f"additional_config[{KEY!r}]: {error}") from None


def image_selector(config: ApetConfig, row: Served) -> Selector:
    """The method at the vision stage of images.

    Raises:
        ValueError: It needs attention or text, or has no vision stage.
    """
    return selector(config, "vision", row.preset.vision, available=())


def cache_key(config: ApetConfig) -> str:
    """Short text that differs between settings; part of the keys of cached images."""
    text = json.dumps(config.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check(config: ApetConfig) -> None:
    """Raise ValueError for what no engine can do, whatever the model."""
    if config.layer_list:
        raise ValueError(
            f"layer_list={list(config.layer_list)} is not possible in vLLM: stages inside the decoder leave fewer "
            "tokens in later layers, and the engine's cache holds equally many in all; leave out layer_list and its "
            "budgets, and set visual_token_num or image_token_ratio"
        )
    if isinstance(config.visual_token_num, tuple):
        raise ValueError(
            f"visual_token_num={list(config.visual_token_num)} must be one number in vLLM: prompts come with any "
            "number of images, and a cached image does not know its place"
        )
    if config.budget_per == "prompt":
        raise ValueError("budget_per='prompt' is not possible in vLLM: images are encoded and cached one by one")
    if config.compat is not None:
        raise ValueError(
            f"compat={config.compat!r} is not possible in vLLM: padding that takes budget makes the number of tokens "
            "depend on the picture, and the engine must know it before"
        )
    if config.reduces_tower:
        raise ValueError(
            f"a tower stage (tower_mode={config.tower_mode!r}, tower_layer_list={list(config.tower_layer_list)}) is "
            "not possible in vLLM, whose vision towers are its own; leave it out"
        )
    if config.visual_token_num is None and config.image_token_ratio is None:
        raise ValueError("give visual_token_num or image_token_ratio; without either there is nothing to compress")
