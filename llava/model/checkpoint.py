"""Read LLaVA checkpoints in the original and the Hugging Face layout into the same classes.

The original layout (`mm_vision_tower` in config.json, weights named after the original modules, the vision tower in a
folder of its own) and the Hugging Face one (`vision_config`) are told apart by config.json, never by the folder's name.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, MistralConfig
from transformers.utils import cached_file

from llava.model.multimodal_encoder.builder import resolve_vision_tower

# Original parameter names to those of the transformers class, as regular expressions; the layout of the tower inside
# CLIPVisionModel changed in transformers 5.6 and is read off the model.
_LANGUAGE_KEYS = {
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
}
_SEQUENTIAL_PROJECTOR = {r"^model\.mm_projector\.": "model.multi_modal_projector."}
_TOWER_PREFIX = "model.vision_tower.vision_tower."
_TEXT_CONFIGS = {"mistral": MistralConfig}
_SUPPORTED = ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder (or hub id) is.

    Attributes:
        path: Folder or hub id of the weights.
        config: Config for the transformers class, with the original `mm_*` fields attached.
        key_mapping: Renames for `from_pretrained`, None for the Hugging Face layout.
        vision_tower: Folder or hub id of the separate vision tower, None if the weights hold it.
    """

    path: str
    config: LlavaConfig
    key_mapping: dict[str, str] | None
    vision_tower: str | None


def read_config(path: str) -> dict[str, Any]:
    """config.json of a checkpoint folder or hub id.

    Raises:
        FileNotFoundError: No such folder, or a folder without config.json.
        ValueError: config.json is not JSON.
    """
    if Path(path).is_dir():
        file = Path(path) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{path} has no config.json; --model-path must name a checkpoint folder")
    elif Path(path).is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise FileNotFoundError(f"checkpoint folder {path} does not exist; check --model-path")
    else:
        try:
            file = Path(cached_file(path, "config.json"))
        except OSError as error:
            raise FileNotFoundError(f"{path} is neither a folder nor a checkpoint the hub can give: {error}") from error
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def is_llava(fields: dict[str, Any]) -> bool:
    """Whether a config.json describes a LLaVA model, in either layout."""
    return "mm_vision_tower" in fields or "vision_config" in fields


def open_checkpoint(path: str, fields: dict[str, Any], vision_tower: str | None = None) -> Checkpoint:
    """Describe a LLaVA checkpoint from its config.json.

    Args:
        path: Folder or hub id.
        fields: Its config.json.
        vision_tower: Folder of the vision tower, instead of the one `mm_vision_tower` names.

    Raises:
        ValueError: A model type that is not supported, or a vision tower that cannot be found.
    """
    if "mm_vision_tower" not in fields:
        return _open_hugging_face(path, fields)
    architecture = (fields.get("architectures") or ["LlavaLlamaForCausalLM"])[0]
    if architecture not in _SUPPORTED or "mpt" in fields.get("model_type", ""):
        raise ValueError(f"{path} is a {architecture} checkpoint; supported: {', '.join(_SUPPORTED)}")
    tower = resolve_vision_tower(fields["mm_vision_tower"], path, vision_tower)
    config = _original_config(fields, _vision_config(tower))
    kind = fields.get("mm_projector_type", "linear")
    projector = {} if kind == "mlp2x_gelu" else _SEQUENTIAL_PROJECTOR
    return Checkpoint(path, config, projector | _LANGUAGE_KEYS, tower)


def load_vision_weights(model: torch.nn.Module, tower: str) -> None:
    """Copy the weights of a CLIP folder (or hub id) into the model's vision tower, tensor by tensor.

    Raises:
        ValueError: The folder has no weights, or they do not fit the tower.
    """
    target = model.model.vision_tower.state_dict()
    missing = {name for name in target if not name.endswith("position_ids")}
    for name, tensor in _tower_tensors(tower):
        key = _tower_key(name, target)
        if key is None or key not in missing:
            continue
        if target[key].shape != tensor.shape:
            raise ValueError(
                f"vision tower {tower}: {name} has shape {tuple(tensor.shape)}, expected {tuple(target[key].shape)}"
            )
        target[key].copy_(tensor)
        missing.discard(key)
    if missing:
        raise ValueError(f"vision tower {tower} lacks {len(missing)} weights, for example {sorted(missing)[0]}")


def load_tokenizer(path: str, **kwargs: Any) -> Any:
    """The tokenizer class that tokenizer_config.json names (AutoTokenizer goes by the model type and picks wrong ones).

    Raises:
        ValueError: The tokenizer drops the word boundary: the silent failure of a wrong class.
    """
    try:
        file = cached_file(path, "tokenizer_config.json")
    except OSError as error:
        raise FileNotFoundError(f"{path} has no tokenizer_config.json; copy the tokenizer files beside the weights") from (
            error
        )
    name = json.loads(Path(file).read_text(encoding="utf-8")).get("tokenizer_class", "LlamaTokenizer")
    cls = getattr(transformers, name.removesuffix("Fast"), None) or transformers.AutoTokenizer
    tokenizer = cls.from_pretrained(path, **kwargs)
    if cls is transformers.LlamaTokenizer:
        pieces = tokenizer.convert_ids_to_tokens(tokenizer("A", add_special_tokens=False).input_ids)
        if "".join(pieces)[:1] != "\u2581":
            raise ValueError(
                f"the tokenizer of {path} turns 'A' into {pieces}, without the word boundary '\u2581'; its files do not "
                "belong to a SentencePiece Llama tokenizer"
            )
    return tokenizer


def _open_hugging_face(path: str, fields: dict[str, Any]) -> Checkpoint:
    if fields.get("model_type") != "llava":
        raise ValueError(f"{path} has model_type {fields.get('model_type')!r}; supported: llava")
    config = AutoConfig.from_pretrained(path)
    layer = fields.get("vision_feature_layer", -2)
    whole = fields.get("vision_feature_select_strategy") == "full"
    defaults = {
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": "cls_patch" if whole else "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        # Converted checkpoints centre-crop by default, the original pads: same weights, same preparation.
        "image_aspect_ratio": "pad",
    }
    for name, value in defaults.items():
        if not hasattr(config, name):
            setattr(config, name, value)
    return Checkpoint(path, config, None, None)


def _original_config(fields: dict[str, Any], vision: CLIPVisionConfig) -> LlavaConfig:
    """The transformers config of an original checkpoint; the original fields stay readable as attributes."""
    text_type = _TEXT_CONFIGS.get(fields.get("model_type", "").removeprefix("llava_"), LlamaConfig)
    own = {"model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "max_length"}
    multimodal = {
        name: value
        for name, value in fields.items()
        if name.startswith(("mm_", "image_", "tune_", "freeze_", "unfreeze_", "tokenizer_", "use_mm", "sample_", "s2"))
        or name == "max_sequence_length"
    }
    text = text_type(**{name: fields[name] for name in fields if name not in own and name not in multimodal})
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        # No id of the vocabulary stands for an image: the splicing never looks one up.
        image_token_index=text.vocab_size,
        vision_feature_layer=fields.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=(
            "full" if fields.get("mm_vision_select_feature", "patch") == "cls_patch" else "default"
        ),
        tie_word_embeddings=fields.get("tie_word_embeddings", False),
    )
    for name, value in ({"mm_use_im_start_end": False, "mm_projector_type": "linear"} | multimodal).items():
        setattr(config, name, value)
    for name in ("hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings"):
        setattr(config, name, getattr(text, name))
    return config


def _vision_config(tower: str) -> CLIPVisionConfig:
    config = AutoConfig.from_pretrained(tower)
    vision = getattr(config, "vision_config", config)
    if not isinstance(vision, CLIPVisionConfig):
        raise ValueError(f"vision tower {tower} is a {config.model_type!r} model; a CLIP vision model is needed")
    return vision


def _tower_tensors(tower: str):
    """(name, tensor) of every vision weight of a CLIP checkpoint, one at a time where the format allows it."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        file = cached_file(tower, name, _raise_exceptions_for_missing_entries=False)
        if file is None:
            continue
        if name.endswith(".safetensors"):
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():
                    yield key, weights.get_tensor(key)
        else:
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
        return
    raise ValueError(f"vision tower {tower} has neither model.safetensors nor pytorch_model.bin")


def _tower_key(name: str, target: dict[str, Any]) -> str | None:
    """Name of a CLIP weight inside the tower's state dict (with or without the `vision_model.` level)."""
    bare = name.removeprefix(_TOWER_PREFIX).removeprefix("vision_model.")
    return next((key for key in (bare, f"vision_model.{bare}") if key in target), None)
