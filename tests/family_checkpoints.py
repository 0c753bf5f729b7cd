"""Tiny checkpoints of every family as Hugging Face publishes them: weights, tokenizer, chat template, image processor.

The models are those of `tests/families.py` with a byte tokenizer.
"""

import json
from pathlib import Path

import families
import transformers
from tiny import randomise
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# With this one no family gives the same answer to everything.
SEED = 1
_QWEN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
_CHAT = {
    "qwen": (_QWEN, "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"),
    "llava_onevision": ("<|im_start|>user {content}<|im_end|><|im_start|>assistant\n", "<image>\n", "<video>\n"),
    "internvl": ("<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n", "<IMG_CONTEXT>\n", "<video>\n"),
}
_QWEN_TOKENS = {
    "image": "<|image_pad|>", "video": "<|video_pad|>", "start": "<|vision_start|>", "end": "<|vision_end|>",
}  # fmt: skip
_TOKENS = {
    "video_llava": {"image": "<image>", "video": "<video>"},
    "llava_onevision": {"image": "<image>", "video": "<video>"},
    "internvl": {"image": "<IMG_CONTEXT>", "video": "<video>", "start": "<img>", "end": "</img>"},
}
_MEAN, _STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]


def write_checkpoint(family: str, folder: Path) -> Path:
    """A checkpoint of `family` in `folder`."""
    tokens = _TOKENS.get(family, _QWEN_TOKENS)
    tokenizer = _tokenizer(family, tokens)
    one = families.FAMILIES[family]
    model = one.make("sdpa")
    config = model.config
    ids = {kind: tokenizer.convert_tokens_to_ids(name) for kind, name in tokens.items()}
    config.get_text_config().vocab_size = len(tokenizer)
    names = ("image_token_index", "video_token_index") if "llava" in family else ("image_token_id", "video_token_id")
    setattr(config, names[0], ids["image"])
    if hasattr(config, names[1]):
        setattr(config, names[1], ids["video"])
    if "qwen" in family:
        config.vision_start_token_id, config.vision_end_token_id = ids["start"], ids["end"]
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config.get_text_config().eos_token_id, config.get_text_config().pad_token_id = end, pad
    model = randomise(type(model)(config), seed=SEED).eval()
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[end], pad_token_id=pad, repetition_penalty=1.05 if "qwen" in family else None
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_image_processor(family, one)))
    return folder


def _tokenizer(family: str, tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *tokens.values()]})
    if family in _CHAT or "qwen" in family:
        frame, image, video = _CHAT.get(family, _CHAT["qwen"])
        before, after = frame.split("{content}")
        tokenizer.chat_template = (
            "{{- '" + before.replace("\n", "\\n") + "' -}}{%- for part in messages[0]['content'] -%}"
            "{%- if part['type'] == 'image' -%}{{- '" + image.replace("\n", "\\n") + "' -}}"
            "{%- elif part['type'] == 'video' -%}{{- '" + video.replace("\n", "\\n") + "' -}}"
            "{%- else -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}"
            "{{- '" + after.replace("\n", "\\n") + "' -}}"
        )  # fmt: skip
    return tokenizer


def _image_processor(family: str, one: families.Family) -> dict:
    if "qwen" in family:
        return {
            "image_processor_type": "Qwen2VLImageProcessor", "patch_size": one.patch, "merge_size": 2,
            "temporal_patch_size": 2, "image_mean": _MEAN, "image_std": _STD,
        }  # fmt: skip
    if family == "video_llava":
        side = {"height": one.side, "width": one.side}
        return {
            "image_processor_type": "VideoLlavaImageProcessor", "size": {"shortest_edge": one.side}, "crop_size": side,
            "image_mean": _MEAN, "image_std": _STD,
        }  # fmt: skip
    size = {"height": one.side, "width": one.side}
    if family == "llava_onevision":
        return {
            "image_processor_type": "LlavaOnevisionImageProcessor", "size": size, "image_mean": _MEAN,
            "image_std": _STD, "image_grid_pinpoints": [[42, 84], [84, 42], [84, 84]],
        }  # fmt: skip
    return {
        "image_processor_type": "GotOcr2ImageProcessor", "size": size, "image_mean": _MEAN, "image_std": _STD,
        "max_patches": 4, "min_patches": 1,
    }  # fmt: skip
