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
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision, text_config=TEXT | rope, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    special = {
        "<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": END,
    }  # fmt: skip
    _write(transformers.Qwen2_5_VLForConditionalGeneration(config), folder, special)
    size = {"shortest_edge": 56 * 56, "longest_edge": 280 * 280}
    # vLLM normalises on the device with the numbers of the file.
    colours = {"do_normalize": True, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, **colours}
    _json(
        folder / "preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor", "size": size, **patches}
    )
    _json(
        folder / "video_preprocessor_config.json",
        {"video_processor_type": "Qwen2VLVideoProcessor", "size": size, "do_sample_frames": False, **patches},
    )
    _json(folder / "processor_config.json", {"processor_class": "Qwen2_5_VLProcessor"})
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
    # vLLM reads CLIP under its level `vision_model`, which newer transformers leave out of the names.
    short = "model.vision_tower."
    tensors = {name.replace(short, short + "vision_model."): one for name, one in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
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


def _write(model, folder: Path, special: dict[str, int]) -> None:
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
    _json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **roles})


def _json(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields))
