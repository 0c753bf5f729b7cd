"""Tiny models and inputs for the tests: random weights from configs, nothing downloaded."""

import torch
from transformers import CLIPVisionConfig, Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE_ID, PATCHES, VOCAB = 95, 25, 96


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights large enough that greedy choices are not decided by rounding."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        generator = torch.Generator().manual_seed(seed * 10_000 + index)
        fan_in = parameter.shape[-1] if parameter.dim() > 1 else 100
        std = 0.3 if name.startswith("lm_head") else 1.4 / fan_in**0.5
        noise = torch.randn(parameter.shape, generator=generator) * std
        parameter.data.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return model


def cut_decoder(model: torch.nn.Module, layers: int) -> torch.nn.Module:
    """Leave a LLaVA its first decoder layers only; returns it."""
    text = model.model.language_model
    del text.layers[layers:]
    text.config.num_hidden_layers = model.config.text_config.num_hidden_layers = layers
    return model


# Vision towers with a class token that a LLaVA may have.
TOWERS = {"clip": (CLIPVisionConfig, {"intermediate_size": 48}), "dinov2": (Dinov2Config, {"mlp_ratio": 2})}


def tiny_llava(
    attention: str = "sdpa", layers: int = 4, tower: str = "clip", depth: int = 3
) -> LlavaForConditionalGeneration:
    """A LLaVA-1.5 of 25 visual tokens per image (70 px, patch 14), 4 decoder layers, vocabulary 96.

    `depth` are the layers of its tower.
    """
    kind, own = TOWERS[tower]
    vision = kind(hidden_size=24, num_hidden_layers=depth, num_attention_heads=2, image_size=70, patch_size=14, **own)
    text = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_ID, vision_feature_layer=-2,
        vision_feature_select_strategy="default", attn_implementation=attention,
    )  # fmt: skip
    model = randomise(LlavaForConditionalGeneration(config)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def images(count: int, seed: int = 0) -> torch.Tensor:
    """Pixel values (count, 3, 70, 70)."""
    return torch.randn(count, 3, 70, 70, generator=torch.Generator().manual_seed(seed))


def prompt(length: int, image_at: tuple[int, ...], seed: int = 0) -> list[int]:
    """`length` text ids with an expanded image in front of each position of `image_at`."""
    generator = torch.Generator().manual_seed(seed + 77)
    text = torch.randint(3, 90, (length,), generator=generator).tolist()
    ids: list[int] = []
    for position, token in enumerate(text):
        for _ in range(image_at.count(position)):
            ids.extend([IMAGE_ID] * PATCHES)
        ids.append(token)
    return ids


def left_pad(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of a left-padded batch."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


# Five kinds of rows: (prompt ids, number of images).
MIXED_ROWS = [
    (prompt(9, (3,), 0), 1),
    (prompt(14, (1,), 1), 1),
    (prompt(7, (2, 5), 2), 2),
    (prompt(11, (), 3), 0),
    (prompt(5, (0, 0), 4), 2),
]


def batch(rows) -> dict[str, torch.Tensor]:
    """Left-padded model inputs of (ids, images) rows; images are numbered through MIXED_ROWS."""
    inputs = left_pad([ids for ids, _ in rows])
    pixels = []
    for ids, count in rows:
        index = next(i for i, row in enumerate(MIXED_ROWS) if row[0] == ids)
        first = sum(number for _, number in MIXED_ROWS[:index])
        pixels.append(images(10)[first : first + count])
    pixels = torch.cat(pixels)
    return inputs | ({"pixel_values": pixels} if len(pixels) else {})
