"""Read LLaVA checkpoints in the original and the Hugging Face layout into the same classes.

The original layout (`mm_vision_tower` in config.json, weights named after the original modules, the vision tower in a
folder of its own or among the weights) and the Hugging Face one (`vision_config`) are told apart by config.json, never
by the folder's name. Weights that lie in files of their own are the business of `llava.model.extra_weights`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig, MistralConfig
from transformers.utils import cached_file

from llava.model.multimodal_encoder.builder import resolve_vision_tower

# Names in files to names in the transformers classes, as regular expressions that are applied in turn. CLIP's level
# `vision_model` exists in memory up to transformers 5.5; later versions drop it from every name by themselves.
_ORIGINAL_KEYS = {
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
    r"^model\.vision_tower\.vision_tower\.(vision_model\.)?": "model.vision_tower.vision_model.",
}
_BUILT_IN_PROJECTOR = {
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
}
_OTHER_PROJECTOR = {r"^model\.mm_projector\.": "model.multi_modal_projector."}
# transformers renames these by itself, but only for its own classes.
_HUGGING_FACE_KEYS = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.(model\.)?": "model.language_model.",
    r"^vision_tower\.": "model.vision_tower.",
    r"^multi_modal_projector\.": "model.multi_modal_projector.",
    r"^image_newline": "model.image_newline",
}
_MULTIMODAL_FIELDS = ("mm_", "image_", "tune_", "freeze_", "unfreeze_", "tokenizer_", "use_mm", "sample_", "s2")
_FILE_FIELDS = {
    "model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "max_length",
}  # fmt: skip
_SUPPORTED = ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder (or hub id) is.

    Attributes:
        path: Folder or hub id of the weights.
        config: Config for the transformers class, with the original `mm_*` fields attached.
        key_mapping: Renames for `from_pretrained`.
        vision_tower: Folder or hub id of the separate vision tower, None for the Hugging Face layout.
    """

    path: str
    config: LlavaConfig
    key_mapping: dict[str, str]
    vision_tower: str | None


def read_config(path: str) -> dict[str, Any]:
    """config.json of a checkpoint folder or hub id.

    Raises:
        FileNotFoundError: No such folder, or a folder without config.json.
        ValueError: config.json is not a JSON object.
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
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} must hold a JSON object, it holds a {type(fields).__name__}")
    return fields


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
    if "vision_config" in fields:
        return _open_hugging_face(path, fields)
    architecture = (fields.get("architectures") or ["LlavaLlamaForCausalLM"])[0]
    if architecture not in _SUPPORTED:
        raise ValueError(f"{path} is a {architecture} checkpoint; supported: {', '.join(_SUPPORTED)}")
    if fields.get("s2"):
        raise ValueError(f"{path} encodes images at several scales (s2 in config.json), which is not supported")
    tower = resolve_vision_tower(fields["mm_vision_tower"], path, vision_tower)
    return Checkpoint(path, _original_config(fields, _vision_config(tower)), key_mapping(fields), tower)


def key_mapping(fields: dict[str, Any], projector_type: str | None = None) -> dict[str, str]:
    """Renames that make a checkpoint's names those of the transformers class.

    Args:
        fields: config.json of the weights; a plain language model names its weights like an original LLaVA.
        projector_type: Projector of the model that is built, if `fields` does not say.
    """
    if "vision_config" in fields:
        return _HUGGING_FACE_KEYS
    kind = projector_type or fields.get("mm_projector_type", "linear")
    return _ORIGINAL_KEYS | (_BUILT_IN_PROJECTOR if kind == "mlp2x_gelu" else _OTHER_PROJECTOR)


def load_tokenizer(path: str, **kwargs: Any) -> Any:
    """The tokenizer class that tokenizer_config.json names (AutoTokenizer goes by the model type and picks wrong ones).

    Raises:
        FileNotFoundError: No tokenizer files.
        ValueError: Files that make no tokenizer, or one without word boundaries: the silent failure of a wrong class.
    """
    try:
        file = cached_file(path, "tokenizer_config.json")
    except OSError as error:
        message = f"{path} has no tokenizer_config.json; copy the tokenizer files beside the weights"
        raise FileNotFoundError(message) from error
    cls = _tokenizer_class(json.loads(Path(file).read_text(encoding="utf-8")).get("tokenizer_class"))
    try:
        tokenizer = cls.from_pretrained(path, **kwargs)
    except Exception as error:  # broken files fail in as many ways as there are tokenizer backends
        raise ValueError(f"the tokenizer files of {path} cannot be read: {_first_line(error)}") from error
    if cls is transformers.LlamaTokenizer:
        pieces = tokenizer.convert_ids_to_tokens(tokenizer("A", add_special_tokens=False).input_ids)
        if "".join(pieces)[:1] != "\u2581":
            raise ValueError(
                f"the tokenizer of {path} turns 'A' into {pieces}, without the word boundary '\u2581'; its files do "
                "not belong to a SentencePiece Llama tokenizer (is tokenizer.model or tokenizer.json missing?)"
            )
    return tokenizer


def _tokenizer_class(name: str | None) -> Any:
    name = name or "LlamaTokenizer"
    if name == "PreTrainedTokenizerFast":  # not a fast variant of a class, but the class that reads tokenizer.json
        return transformers.PreTrainedTokenizerFast
    return getattr(transformers, name.removesuffix("Fast"), None) or transformers.AutoTokenizer


def _open_hugging_face(path: str, fields: dict[str, Any]) -> Checkpoint:
    kind = fields.get("model_type")
    if kind not in ("llava", "llava_next"):
        raise ValueError(f"{path} has model_type {kind!r}; supported: llava, llava_next")
    config = LlavaConfig.from_pretrained(path) if kind == "llava" else _from_llava_next(path)
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        raise ValueError(f"{path} joins vision layers (vision_feature_layer={layer}); only a single one is supported")
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
    return Checkpoint(path, config, key_mapping(fields), None)


def _from_llava_next(path: str) -> LlavaConfig:
    """The config of a Hugging Face LLaVA-NeXT checkpoint with the fields the original has for anyres images.

    The list of pinpoints is the original's: (width, height), although transformers reads it as (height, width).
    """
    source = LlavaNextConfig.from_pretrained(path)
    config = LlavaConfig(
        vision_config=source.vision_config,
        text_config=source.text_config,
        image_token_index=source.image_token_id,
        vision_feature_layer=source.vision_feature_layer,
        vision_feature_select_strategy=source.vision_feature_select_strategy,
        tie_word_embeddings=source.tie_word_embeddings,
    )
    config.image_grid_pinpoints = source.image_grid_pinpoints
    config.image_aspect_ratio, config.mm_patch_merge_type = "anyres", "spatial_unpad"
    return config


def _original_config(fields: dict[str, Any], vision: CLIPVisionConfig) -> LlavaConfig:
    """The transformers config of an original checkpoint; the original fields stay readable as attributes."""
    multimodal = {
        name: value
        for name, value in fields.items()
        if name.startswith(_MULTIMODAL_FIELDS) or name == "max_sequence_length"
    }
    kinds = (fields.get("model_type", ""), *(fields.get("architectures") or ()))
    text_type = MistralConfig if any("mistral" in kind.lower() for kind in kinds) else LlamaConfig
    text = text_type(**{name: fields[name] for name in fields if name not in _FILE_FIELDS | multimodal.keys()})
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
    defaults = {"mm_use_im_start_end": False, "mm_use_im_patch_token": True, "mm_projector_type": "linear"}
    for name, value in (defaults | multimodal).items():
        setattr(config, name, value)
    for name in ("hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings"):
        setattr(config, name, getattr(text, name))
    return config


def _vision_config(tower: str) -> CLIPVisionConfig:
    try:
        config = AutoConfig.from_pretrained(tower)
    except (OSError, ValueError) as error:
        raise ValueError(f"the config.json of vision tower {tower} cannot be read: {_first_line(error)}") from error
    vision = getattr(config, "vision_config", config)
    if not isinstance(vision, CLIPVisionConfig):
        raise ValueError(f"vision tower {tower} is a {config.model_type!r} model; a CLIP vision model is needed")
    return vision


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
