"""Models of published dimensions with random weights, made on the device: speed does not depend on what they know.

A preset is data: a transformers class with its configuration, how an image (or clip) enters it, and which fields of
`ApetConfig` spend an average of T tokens per image over the decoder layers. The stages are those of the published
settings: 1.5 T tokens until the middle layer, T / 2 behind it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from apet.config import ApetConfig
from apet.cost import ModelDims, tokens_per_layer

_TEXT_BEFORE = 35  # tokens in front of the image: the system prompt of LLaVA-1.5
_VICUNA_VOCAB = 32064
_SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


@dataclass(frozen=True)
class Preset:
    """One model to measure.

    Attributes:
        name: What users type.
        model_class: Name of the transformers class.
        config: Makes its configuration.
        image_tokens: Visual tokens of an image (or clip), newlines and class tokens included.
        tokens: Default budget, averaged over the decoder layers.
        budget: (T, decoder layers) -> fields of `ApetConfig`.
        pixels: (batch, device, dtype) -> what the model takes beside ids.
        kind: "image", or "video" where the prompt holds a clip.
        shape: Crops or grid of patches, as `apet.cost.ModelDims.of` takes them.
    """

    name: str
    model_class: str
    config: Callable[[], Any]
    image_tokens: int
    tokens: int
    budget: Callable[[int, int], Mapping[str, Any]]
    pixels: Callable[[int, torch.device, torch.dtype], dict[str, Tensor]]
    kind: str = "image"
    shape: Mapping[str, Any] = field(default_factory=dict)

    def dims(self) -> ModelDims:
        """Dimensions, for the cost model."""
        return ModelDims.of(self.config(), **self.shape)

    def shrunk(self) -> "Preset":
        """The preset with few narrow layers: the same prompts, budgets and code paths in seconds on a laptop."""
        config = self.config()
        for name, value in (_SMALL | {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 16}).items():
            setattr(config.text_config, name, value)
        vision = config.vision_config
        if hasattr(vision, "depth"):
            vision.depth, vision.hidden_size, vision.intermediate_size = 3, 32, 48
            vision.num_heads, vision.fullatt_block_indexes, vision.out_hidden_size = 1, [1], 64
            config.text_config.rope_parameters["mrope_section"] = [2, 3, 3]
        else:
            for name, value in (_SMALL | {"num_hidden_layers": 3, "projection_dim": 64}).items():
                setattr(vision, name, value)
        return replace(self, config=lambda: config)

    def visual_tokens(self, config: ApetConfig | None) -> list[int]:
        """Visual tokens of every decoder layer, without the newlines that LLaVA-NeXT keeps beside the budget."""
        layers, crops = self.config().text_config.num_hidden_layers, self.shape.get("crops", 1)
        if config is not None and config.video_token_num is not None:
            # Every frame also has its class token and the basis.
            return [crops * (config.video_token_num + config.basis_token_num + 1)] * layers
        return tokens_per_layer(config, self.image_tokens, layers, crops)

    def build(self, device: torch.device, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
        """The model with random weights, made where it stays and in its precision."""
        config = self.config()
        with torch.device(device):
            model = getattr(transformers, self.model_class)._from_config(
                config, dtype=dtype, attn_implementation=attention
            )
        # No end token: every answer has the length that was asked for.
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model.eval()

    def compression(self, method: str, tokens: int | None = None, **changes: Any) -> ApetConfig:
        """The configuration that spends `tokens` (the preset's if None), averaged over the decoder layers.

        Raises:
            ValueError: As `ApetConfig`.
        """
        layers = self.config().text_config.num_hidden_layers
        fields = dict(self.budget(self.tokens if tokens is None else tokens, layers))
        return ApetConfig.from_dict(fields | {"method": method} | changes)

    def inputs(self, batch: int, text_tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Inputs of `batch` equal-length prompts: text, one image or clip, text; `text_tokens` in all.

        Raises:
            ValueError: Fewer text tokens than one.
        """
        if batch < 1 or text_tokens < 1:
            raise ValueError(f"--batch {batch} and --text_tokens {text_tokens} must be at least 1")
        config = self.config()
        names = ("image_token_id", "image_token_index") if self.kind == "image" else ("video_token_id",)
        placeholder = next(getattr(config, name) for name in names if hasattr(config, name))
        generator = torch.Generator().manual_seed(0)
        # Ids from 100 on are below every placeholder and above every special token of the presets.
        text = torch.randint(100, 1000, (batch, text_tokens), generator=generator)
        front = min(_TEXT_BEFORE, text_tokens - 1)
        image = torch.full((batch, self.image_tokens), placeholder)
        ids = torch.cat([text[:, :front], image, text[:, front:]], 1).to(device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | self.pixels(batch, device, dtype)
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (ids == placeholder).int()
        return inputs


def get_preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: An unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown --preset {name!r}; choose one of: {', '.join(PRESETS)}")
    return PRESETS[name]


def _noise(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)


def _pictures(side: int, crops: int | None = None, sizes: tuple[int, int] | None = None):
    """Pixels of square pictures, of several crops each where `crops` is given."""

    def make(batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        shape = (batch, 3, side, side) if crops is None else (batch, crops, 3, side, side)
        made = {"pixel_values": _noise(*shape, device=device, dtype=dtype)}
        return made | ({"image_sizes": torch.tensor([sizes] * batch)} if sizes else {})

    return make


def _clip(side: int, frames: int):
    def make(batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"pixel_values_videos": _noise(batch, frames, 3, side, side, device=device, dtype=dtype)}

    return make


def _patches(side: int):
    """Flattened 14 x 14 patches of square pictures of `side` patches, as Qwen2.5-VL takes them."""

    def make(batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        values = _noise(batch * side * side, 3 * 2 * 14 * 14, device=device, dtype=dtype)
        return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, side, side]] * batch, device=device)}

    return make


def _published(crops: int = 1):
    """Budgets of LLaVA: per crop in front of the decoder, per image inside it."""

    def budget(tokens: int, layers: int) -> dict[str, Any]:
        vision = max(1, round(1.5 * tokens / crops))
        return {
            "visual_token_num": vision,
            "layer_list": [layers // 2],
            "image_token_list": [max(1, 2 * tokens - vision * crops)],
        }

    return budget


def _shares(image_tokens: int):
    """Budgets of Qwen2.5-VL: shares of the image, and behind the middle layer a third of what is left."""

    def budget(tokens: int, layers: int) -> dict[str, Any]:
        return {
            "image_token_ratio": 1.5 * tokens / image_tokens,
            "layer_list": [layers // 2],
            "image_token_ratio_list": [1 / 3],
        }

    return budget


def _per_frame(tokens: int, layers: int) -> dict[str, Any]:
    return {"video_token_num": tokens}


def _clip_tower(side: int = 336, width: int = 1024, layers: int = 24) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model", "hidden_size": width, "intermediate_size": 4 * width,
        "num_hidden_layers": layers, "num_attention_heads": width // 64, "image_size": side, "patch_size": 14,
        "projection_dim": width,
    }  # fmt: skip


def _llama(width: int, mlp: int, layers: int, vocab: int = _VICUNA_VOCAB) -> dict[str, Any]:
    heads = width // 128 if width >= 4096 else width // 64
    return {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": width, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def _llava(text: dict[str, Any], tower: dict[str, Any] | None = None) -> Callable[[], Any]:
    return lambda: transformers.LlavaConfig(
        vision_config=tower or _clip_tower(), text_config=text, image_token_id=text["vocab_size"] - 64
    )


def _llava_next() -> Any:
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return transformers.LlavaNextConfig(
        vision_config=_clip_tower(), text_config=_llama(4096, 11008, 32), image_grid_pinpoints=pinpoints,
        image_token_id=32000,
    )  # fmt: skip


def _qwen2_5_vl() -> Any:
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 3584, "tokens_per_second": 2,
    }  # fmt: skip
    text = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    ids = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
    return transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids)


def _video_llava() -> Any:
    return transformers.VideoLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_clip_tower(224)),
        text_config=transformers.LlamaConfig(**_llama(4096, 11008, 32)),
        image_token_index=32000, video_token_index=32001,
    )  # fmt: skip


_DINOV2 = {
    "model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 336,
    "patch_size": 14,
}  # fmt: skip
_SMOLLM2 = _llama(576, 1536, 30, vocab=49216) | {
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
_LLAVA = "LlavaForConditionalGeneration"
PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("llava-1.5-7b", _LLAVA, _llava(_llama(4096, 11008, 32)), 576, 64, _published(), _pictures(336)),
        Preset("llava-1.5-13b", _LLAVA, _llava(_llama(5120, 13824, 40)), 576, 64, _published(), _pictures(336)),
        Preset(
            # 672 x 672 pixels: five crops of 576, and a newline at the end of each of the 48 rows of the four tiles.
            "llava-next-7b", "LlavaNextForConditionalGeneration", _llava_next, 2880 + 48, 320, _published(5),
            _pictures(336, 5, (672, 672)), shape={"crops": 5},
        ),
        # 1008 x 1008 pixels: 72 x 72 patches, 36 x 36 tokens; 259 are 20 %.
        Preset(
            "qwen2.5-vl-7b", "Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl, 1296, 259, _shares(1296), _patches(72),
            shape={"grid": (72, 72)},
        ),
        # Eight frames of a class token and 256 patches; the budget is a frame's, class token and basis come on top.
        Preset(
            "video-llava-7b", "VideoLlavaForConditionalGeneration", _video_llava, 8 * 257, 22, _per_frame,
            _clip(224, 8), "video", {"crops": 8},
        ),
        Preset(
            "cpu-small", _LLAVA, _llava(_llama(768, 2048, 12, vocab=4096), _clip_tower(336, 384, 8)), 576, 64,
            _published(), _pictures(336),
        ),
        # The proportions of examples/sample_vlm/real: DINOv2 ViT-S/14 and SmolLM2-135M, grouped-query attention.
        Preset(
            "dinov2-smollm2", _LLAVA, _llava(_SMOLLM2, _DINOV2), 576, 64, _published(), _pictures(336),
        ),
        # For the tests: LLaVA of 25 visual tokens.
        Preset(
            "tiny", _LLAVA, _llava(_llama(128, 256, 4, vocab=1100), _clip_tower(70, 64, 3)), 25, 12, _published(),
            _pictures(70),
        ),
    )
}  # fmt: skip
