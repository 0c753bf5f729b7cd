"""Tiny random checkpoints on disk that vLLM can load: weights from configs, tokenizers of one word per id."""

import json
from pathlib import Path

import numpy as np
import transformers
from families import END, IMAGE, START, VIDEO, VOCAB
from PIL import Image
from safetensors.torch import save_file
from tiny import randomise
from tokenizers import Tokenizer, models, pre_tokenizers

TEXT = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN_NAMES = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": END}
PROMPT = [1, 17, 23, 5]  # text ids in front of a picture
QUESTION = [41, 8, 66, 30, 12]  # and behind it


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A picture of smooth noise, so that resizing leaves something to see."""
    small = np.random.default_rng(seed).integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_qwen(folder: Path) -> Path:
    """A Qwen2.5-VL of 14-pixel patches, merged two by two."""
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14, "out_hidden_size": 64,
        "tokens_per_second": 2, "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=TEXT | rope, **QWEN_IDS)
    _write(transformers.Qwen2_5_VLForConditionalGeneration(config), folder, QWEN_NAMES)
    _write_qwen_processors(folder, 14, ("Qwen2VLImageProcessor", "Qwen2VLVideoProcessor", "Qwen2_5_VLProcessor"))
    return folder


def write_qwen3(folder: Path) -> Path:
    """A Qwen3-VL of 16-pixel patches, merged two by two, two of whose vision layers add features to the decoder."""
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 16, "out_hidden_size": 64,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        vision_config=vision, text_config=TEXT | {"head_dim": 32, "rope_parameters": rope}, **QWEN_IDS
    )
    _write(transformers.Qwen3VLForConditionalGeneration(config), folder, QWEN_NAMES)
    _write_qwen_processors(folder, 16, ("Qwen2VLImageProcessor", "Qwen3VLVideoProcessor", "Qwen3VLProcessor"))
    return folder


def _write_qwen_processors(folder: Path, patch: int, classes: tuple[str, str, str]) -> None:
    images, videos, both = classes
    size = {"shortest_edge": (4 * patch) ** 2, "longest_edge": (20 * patch) ** 2}
    # vLLM normalises on the device with the numbers of the file.
    colours = {"do_normalize": True, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    patches = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2, **colours}
    _json(folder / "preprocessor_config.json", {"image_processor_type": images, "size": size, **patches})
    _json(
        folder / "video_preprocessor_config.json",
        {"video_processor_type": videos, "size": size, "do_sample_frames": False, **patches},
    )
    _json(folder / "processor_config.json", {"processor_class": both})


def write_llava_onevision(folder: Path) -> Path:
    """A LLaVA-OneVision of 42-pixel crops with 9 patches each."""
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14,
        vision_use_head=False,
    )  # fmt: skip
    pinpoints = [[42, 84], [84, 42], [84, 84], [126, 84]]
    config = transformers.LlavaOnevisionConfig(
        vision_config=vision, text_config=transformers.Qwen2Config(**TEXT), image_token_index=IMAGE,
        video_token_index=VIDEO, image_grid_pinpoints=pinpoints, vision_aspect_ratio="anyres_max_9",
        vision_feature_select_strategy="full", tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlavaOnevisionForConditionalGeneration(config)
    _write(model, folder, {"<image>": IMAGE, "<video>": VIDEO})
    _long_names(model, folder)
    size = {"size": {"height": 42, "width": 42}, "image_grid_pinpoints": pinpoints}
    _json(folder / "preprocessor_config.json", {"image_processor_type": "LlavaOnevisionImageProcessor", **size})
    _json(
        folder / "video_preprocessor_config.json",
        {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": size["size"], "do_sample_frames": False},
    )
    fields = {"num_image_tokens": 9, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
    _json(folder / "processor_config.json", {"processor_class": "LlavaOnevisionProcessor", **fields})
    return folder


def write_internvl(folder: Path) -> Path:
    """An InternVL (Hugging Face classes) of 84-pixel tiles with 9 tokens each."""
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": [84, 84], "patch_size": [14, 14],
    }  # fmt: skip
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=transformers.Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=9,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.InternVLForConditionalGeneration(config)
    names = {"context_image_token": IMAGE, "start_image_token": START, "end_image_token": END, "video_token": VIDEO}
    texts = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
    texts |= {"video_token": "<video>"}
    _write(model, folder, {texts[name]: number for name, number in names.items()}, extra_special_tokens=texts)
    size = {"size": {"height": 84, "width": 84}}
    tiles = {"crop_to_patches": True, "min_patches": 1, "max_patches": 4}
    _json(folder / "preprocessor_config.json", {"image_processor_type": "GotOcr2ImageProcessor", **size, **tiles})
    _json(folder / "video_preprocessor_config.json", {"video_processor_type": "InternVLVideoProcessor", **size})
    _json(folder / "processor_config.json", {"processor_class": "InternVLProcessor", "image_seq_length": 9})
    return folder


def write_llava_next(folder: Path) -> Path:
    """A LLaVA-NeXT of 70-pixel crops with 25 patches each."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=70, patch_size=14
    )
    config = transformers.LlavaNextConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**TEXT), image_token_index=IMAGE,
        image_grid_pinpoints=[[70, 140], [140, 70], [140, 140], [210, 70], [70, 210]], tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlavaNextForConditionalGeneration(config)
    _write(model, folder, {"<image>": IMAGE})
    _long_names(model, folder)
    side = {"shortest_edge": 70}
    crop = {"height": 70, "width": 70}
    pinpoints = {"image_grid_pinpoints": config.image_grid_pinpoints}
    _json(
        folder / "preprocessor_config.json",
        {"image_processor_type": "LlavaNextImageProcessorPil", "size": side, "crop_size": crop, **pinpoints},
    )
    fields = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    _json(folder / "processor_config.json", {"processor_class": "LlavaNextProcessor", **fields})
    return folder


def _long_names(model, folder: Path) -> None:
    """Write the tensors again: vLLM reads a tower under its level `vision_model`, left out by newer transformers."""
    short = "model.vision_tower."
    tensors = {name.replace(short, short + "vision_model."): one for name, one in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _write(model, folder: Path, special: dict[str, int], **tokenizer_fields) -> None:
    randomise(model).eval()
    model.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    names = {number: name for name, number in special.items()} | {0: "<pad>", 1: "<s>", 2: "</s>"}
    vocabulary = {names.get(number, f"w{number}"): number for number in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([*names.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
    _json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **roles, **tokenizer_fields})


def _json(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields))
