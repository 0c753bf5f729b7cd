"""Write a LLaVA-1.5 checkpoint in the Hugging Face layout, which serving engines read.

The prompt is part of the format: the chat template reproduces a conversation mode of `llava.conversation`, the
tokenizer file gives the ids of `tokenizer_image_token` with one `<image>` id in place of -200, and the image processor
pads as LLaVA does. All of it is checked against the original before anything is written.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import AddedToken, Tokenizer
from transformers import GenerationConfig, LlavaConfig

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import SeparatorStyle, conv_templates, new_conversation
from llava.mm_utils import get_model_name_from_path, tokenizer_image_token
from llava.model.builder import load_pretrained_model

# The names every transformers with LLaVA reads, and vLLM: CLIP's level `vision_model` is written out.
_FILE_NAMES = {
    r"^model\.language_model\.": "language_model.model.",
    r"^lm_head\.": "language_model.lm_head.",
    r"^model\.vision_tower\.(vision_model\.)?": "vision_tower.vision_model.",
    r"^model\.multi_modal_projector\.": "multi_modal_projector.",
}
_TURN = (
    "{%- set ns = namespace(system=__SYSTEM__, first=0) -%}"
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set ns.first = 1 -%}"
    "{%- if messages[0]['content'] is string -%}{%- set ns.system = messages[0]['content'] -%}"
    "{%- else -%}{%- set ns.system = messages[0]['content'] | map(attribute='text') | join('') -%}{%- endif -%}"
    "{%- endif -%}"
    "{{- bos_token + ns.system + __SEP__ -}}"
    "{%- for message in messages[ns.first:] -%}"
    "{%- if message['role'] == 'user' -%}{{- __USER__ -}}{%- else -%}{{- __ASSISTANT__ -}}{%- endif -%}{{- ': ' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] in ('image', 'image_url') -%}{{- '<image>\\n' -}}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{%- if message['role'] == 'user' -%}{{- __SEP__ -}}{%- else -%}{{- __SEP2__ -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- __ASSISTANT__ + ':' -}}{%- endif -%}"
)


def export_checkpoint(model_path: str, out: str | Path, conv_mode: str = "vicuna_v1") -> Path:
    """Write the checkpoint `model_path` to the folder `out`; the weights keep their precision.

    The vocabulary grows by the id of `<image>`. Its row of the head is that of the first id, so that it never wins.

    Args:
        model_path: Checkpoint folder or hub id, in either layout.
        out: Folder to write; it must not hold a checkpoint yet.
        conv_mode: Conversation mode the chat template reproduces.

    Returns:
        The folder.

    Raises:
        FileExistsError: `out` has a config.json.
        ValueError: A checkpoint the layout cannot express, or a conversation mode of another style.
    """
    out = Path(out)
    if (out / "config.json").exists():
        raise FileExistsError(f"{out} already holds a checkpoint; name another folder with --out")
    template = chat_template(conv_mode)
    tokenizer, model, image_processor, context = load_pretrained_model(
        model_path, None, get_model_name_from_path(model_path), device="cpu", dtype="auto"
    )
    _refuse(model_path, model.config)
    image_id = model.config.text_config.vocab_size
    fast = with_image_token(tokenizer, image_id)
    _check_ids(fast, tokenizer, conv_mode, image_id)
    out.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(_file_tensors(model), out)
    fast.save(str(out / "tokenizer.json"))
    _write(out / "tokenizer_config.json", _tokenizer_config(tokenizer, context))
    _write(out / "preprocessor_config.json", _image_config(image_processor, model.config))
    _write(out / "processor_config.json", _processor_config(model.config))
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    _config(model, image_id).save_pretrained(out)
    ids = {name: getattr(model.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(out)
    return out


def chat_template(conv_mode: str) -> str:
    """A Jinja chat template that renders messages as the conversation mode does, images first in a turn.

    Raises:
        ValueError: Unknown mode, or one that is not of the `USER: ... ASSISTANT: ...</s>` style without examples.
    """
    conversation = new_conversation(conv_mode)
    if conversation.sep_style is not SeparatorStyle.TWO or conversation.messages or "mmtag" in conversation.version:
        known = [
            name
            for name, one in conv_templates.items()
            if one.sep_style is SeparatorStyle.TWO and not one.messages and "mmtag" not in one.version
        ]
        raise ValueError(f"no chat template can be made of conversation mode {conv_mode!r}; choose {', '.join(known)}")
    words = {
        "__SYSTEM__": conversation.system,
        "__SEP__": conversation.sep,
        "__SEP2__": conversation.sep2,
        "__USER__": conversation.roles[0],
        "__ASSISTANT__": conversation.roles[1],
    }
    return re.sub("|".join(words), lambda match: json.dumps(words[match[0]]), _TURN)


def with_image_token(tokenizer: Any, image_id: int) -> Tokenizer:
    """A copy of a Llama tokenizer with the special token `<image>` as `image_id`.

    Every piece of text between special tokens gets SentencePiece's word-start mark, also in front of a space or line
    break, as `tokenizer_image_token` has it.

    Raises:
        ValueError: The tokenizer has no file form, or another size.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"a {type(tokenizer).__name__} without a tokenizers backend cannot be written as one file")
    state = json.loads(backend.to_str())
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    state["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]}
    state["pre_tokenizer"] = None
    fast = Tokenizer.from_str(json.dumps(state))
    fast.add_special_tokens([AddedToken(DEFAULT_IMAGE_TOKEN, normalized=False, special=True)])
    if fast.token_to_id(DEFAULT_IMAGE_TOKEN) != image_id:
        raise ValueError(
            f"the tokenizer has {fast.get_vocab_size()} tokens with <image>, but the model's vocabulary ends at "
            f"{image_id}; tokenizer and weights do not belong together"
        )
    return fast


def _refuse(path: str, config: Any) -> None:
    """Raise ValueError for what the layout has no words for."""
    if getattr(config, "image_aspect_ratio", None) == "anyres":
        raise ValueError(f"{path} sees an image as several crops (anyres); export serves LLaVA-1.5 checkpoints")
    if config.mm_projector_type != "mlp2x_gelu":
        raise ValueError(f"{path} has the projector {config.mm_projector_type!r}; the layout knows mlp2x_gelu alone")
    if config.mm_use_im_start_end or config.mm_use_im_patch_token:
        raise ValueError(f"{path} puts tokens of its own around images; export serves checkpoints without them")


def _check_ids(fast: Tokenizer, tokenizer: Any, conv_mode: str, image_id: int) -> None:
    """Raise unless a prompt has the same ids through both tokenizers."""
    prompt = new_conversation(conv_mode).ask(f"{DEFAULT_IMAGE_TOKEN}\nWhat is  the\tcolour of 12 cats?\nOne.")
    wanted = tokenizer_image_token(prompt, tokenizer, image_id)
    found = fast.encode(tokenizer.bos_token + prompt, add_special_tokens=False).ids
    if found != wanted:
        raise ValueError(f"the tokenizer cannot be written as one file: a prompt became {found} instead of {wanted}")


def _file_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights under their names in the file, with a row for `<image>` in the embedding and in the head."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        for pattern, text in _FILE_NAMES.items():
            name, found = re.subn(pattern, text, name)
            if found:
                break
        if name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            tensor = torch.cat([tensor, tensor[:1]])
        tensors[name] = tensor.contiguous()
    return tensors


def _config(model: Any, image_id: int) -> LlavaConfig:
    """A plain config of the Hugging Face class."""
    source = model.config
    text = source.text_config.to_dict() | {"vocab_size": image_id + 1, "architectures": ["LlamaForCausalLM"]}
    if text["model_type"] == "mistral":
        text["architectures"] = ["MistralForCausalLM"]
    vision = source.vision_config.to_dict()
    vision.pop("_name_or_path", None)  # a folder of this machine
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        vision_feature_layer=source.vision_feature_layer,
        vision_feature_select_strategy=source.vision_feature_select_strategy,
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        architectures=["LlavaForConditionalGeneration"],
        dtype=str(model.dtype).removeprefix("torch."),
    )
    for name in ("image_aspect_ratio", "sample_weights"):
        if hasattr(source, name):
            setattr(config, name, getattr(source, name))
    return config


def _tokenizer_config(tokenizer: Any, context: int) -> dict[str, Any]:
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return {
        # Llama's own class would rebuild the tokenizer from its vocabulary.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        **{name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None},
    }


def _image_config(processor: Any, config: Any) -> dict[str, Any]:
    """The PIL processor: what LLaVA was trained with, to the bit."""
    fields = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor")
    fields += ("do_normalize", "image_mean", "image_std", "do_convert_rgb")
    known = {name: getattr(processor, name) for name in fields}
    return {
        "image_processor_type": "LlavaImageProcessorPil",
        "processor_class": "LlavaProcessor",
        "do_pad": getattr(config, "image_aspect_ratio", None) == "pad",
        **{name: dict(value) if isinstance(value, Mapping) else value for name, value in known.items()},
    }


def _processor_config(config: Any) -> dict[str, Any]:
    return {
        "processor_class": "LlavaProcessor",
        "image_token": DEFAULT_IMAGE_TOKEN,
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": 1,  # CLS
    }


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """JSON form of what image processors keep: sizes and resampling filters."""
    return (
        {name: one for name, one in vars(value).items() if one is not None}
        if hasattr(value, "__dict__")
        else int(value)
    )
