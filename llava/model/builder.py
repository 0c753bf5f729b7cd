"""Load a LLaVA checkpoint: `load_pretrained_model` with the signature LLaVA scripts call."""

import logging
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, CLIPImageProcessorPil, GenerationConfig
from transformers.utils import logging as transformers_logging

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.checkpoint import (
    Checkpoint,
    is_llava,
    load_tokenizer,
    load_vision_weights,
    open_checkpoint,
    read_config,
)
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM

logger = logging.getLogger(__name__)

# Modules that quantisation leaves alone: they are small, and the tower's weights come from another file.
_NOT_QUANTISED = ["vision_tower", "multi_modal_projector", "lm_head"]


def load_pretrained_model(
    model_path: str,
    model_base: str | None,
    model_name: str,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str = "cuda",
    use_flash_attn: bool = False,
    *,
    llm_pruning: bool = False,
    multimodal: bool | None = None,
    vision_tower: str | None = None,
    **kwargs: Any,
) -> tuple[Any, torch.nn.Module, Any, int]:
    """Load tokenizer, model, image processor and context length.

    The format is read from config.json: original LLaVA-1.5 or Hugging Face. The weights are placed shard by shard, so no
    second copy of them is held. The model is in evaluation mode, uncompressed; `apet.apply_patch` compresses it.

    Args:
        model_path: Checkpoint folder or hub id.
        model_base: Base language model whose weights a projector-only checkpoint completes.
        model_name: Name used in answers; the format never depends on it.
        load_8bit: Quantise with bitsandbytes.
        load_4bit: Quantise with bitsandbytes (nf4, double quantisation).
        device_map: As in transformers; a `device` other than "cuda" takes its place.
        device: Device of the whole model. "cuda" without a GPU means "cpu".
        use_flash_attn: Short for `attn_implementation="flash_attention_2"`.
        llm_pruning: Accepted and ignored, as in the published scripts.
        multimodal: Accepted and ignored, as other tools pass it.
        vision_tower: Folder of the vision tower, instead of the one in config.json.
        **kwargs: For `from_pretrained`: `attn_implementation`, `torch_dtype` or `dtype` (default float16 on a GPU,
            float32 on a CPU), `cache_dir`, ...

    Raises:
        FileNotFoundError: The folder, its config.json or its tokenizer is missing.
        ValueError: A checkpoint that is not supported or whose weights do not fit.
        ImportError: Quantisation without bitsandbytes.
    """
    options = _placement(device_map, device) | _quantisation(load_8bit, load_4bit) | kwargs
    if use_flash_attn:
        options["attn_implementation"] = "flash_attention_2"
    options["dtype"] = options.pop("torch_dtype", options.pop("dtype", None)) or _default_dtype(options["device_map"])
    fields = read_config(model_path)
    if not is_llava(fields):
        return _load_language_model(model_path, model_base, options)
    checkpoint = open_checkpoint(model_path, fields, vision_tower)
    tokenizer = load_tokenizer(model_base or model_path)
    model = _load_llava(checkpoint, model_base, options)
    model.generation_config = _greedy_defaults(model)
    _add_image_tokens(tokenizer, model)
    processor_path = checkpoint.vision_tower or checkpoint.path
    model.model.image_processor = CLIPImageProcessorPil.from_pretrained(processor_path)
    context_len = getattr(model.config, "max_sequence_length", 2048)
    return tokenizer, model.eval(), model.model.image_processor, context_len


def _load_llava(checkpoint: Checkpoint, model_base: str | None, options: dict[str, Any]) -> LlavaLlamaForCausalLM:
    mistral = checkpoint.config.text_config.model_type == "mistral"
    cls = LlavaMistralForCausalLM if mistral else LlavaLlamaForCausalLM
    if checkpoint.key_mapping is not None:
        options = options | {"key_mapping": checkpoint.key_mapping}
    verbosity = transformers_logging.get_verbosity()
    # transformers reports weights that come from another file as missing; they are checked below.
    transformers_logging.set_verbosity_error()
    try:
        model, info = cls.from_pretrained(
            model_base or checkpoint.path, config=checkpoint.config, output_loading_info=True, **options
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = {key for key in info["missing_keys"] if "position_ids" not in key}
    tower_missing = {key for key in missing if key.startswith("model.vision_tower.")}
    if checkpoint.vision_tower is not None and tower_missing:
        load_vision_weights(model, checkpoint.vision_tower)
        missing -= tower_missing
    source = checkpoint.path if checkpoint.vision_tower is None or not tower_missing else checkpoint.vision_tower
    logger.info("vision tower weights: %s", source)
    if model_base is not None:
        missing -= _load_projector(model, checkpoint.path)
    unexpected = {key for key in info["unexpected_keys"] if not key.endswith(("inv_freq", "position_ids"))}
    if missing or unexpected or info["mismatched_keys"]:
        raise ValueError(
            f"the weights in {model_base or checkpoint.path} do not fit its config.json: "
            f"{len(missing)} missing {sorted(missing)[:2]}, {len(unexpected)} unknown {sorted(unexpected)[:2]}, "
            f"{len(info['mismatched_keys'])} of another shape {sorted(info['mismatched_keys'])[:2]}"
        )
    return model


def _load_projector(model: LlavaLlamaForCausalLM, path: str) -> set[str]:
    """Copy `mm_projector.bin` into the model; returns the parameters it filled."""
    from transformers.utils import cached_file

    weights = torch.load(cached_file(path, "mm_projector.bin"), map_location="cpu", weights_only=True)
    target = model.model.multi_modal_projector.state_dict()
    names = {"0": "linear_1", "2": "linear_2"} if hasattr(model.model.multi_modal_projector, "linear_1") else {}
    filled = set()
    for name, tensor in weights.items():
        number, kind = name.split("mm_projector.")[-1].split(".")
        key = f"{names.get(number, number)}.{kind}"
        if key not in target:
            raise ValueError(f"{path}/mm_projector.bin holds {name}, which the projector of config.json does not have")
        target[key].copy_(tensor)
        filled.add(f"model.multi_modal_projector.{key}")
    return filled


def _load_language_model(path: str, base: str | None, options: dict[str, Any]) -> tuple[Any, torch.nn.Module, None, int]:
    """A plain language model: no image processor."""
    tokenizer = AutoTokenizer.from_pretrained(base or path)
    model = AutoModelForCausalLM.from_pretrained(path, **options).eval()
    return tokenizer, model, None, getattr(model.config, "max_sequence_length", 2048)


def _placement(device_map: Any, device: str) -> dict[str, Any]:
    if device == "cuda" and not torch.cuda.is_available():
        device = "cpu"
    return {"device_map": device_map if device == "cuda" else {"": device}}


def _default_dtype(device_map: Any) -> torch.dtype:
    on_cpu = isinstance(device_map, dict) and set(map(str, device_map.values())) == {"cpu"}
    return torch.float32 if on_cpu or not torch.cuda.is_available() else torch.float16


def _quantisation(load_8bit: bool, load_4bit: bool) -> dict[str, Any]:
    if load_4bit:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=torch.float16,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=_NOT_QUANTISED,
        )
        return {"quantization_config": config}
    if load_8bit:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_NOT_QUANTISED)}
    return {}


def _greedy_defaults(model: torch.nn.Module) -> GenerationConfig:
    """Ids only: Vicuna's generation_config carries sampling values that contradict its own do_sample=False."""
    text = model.config.text_config
    return GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=_pad_id(text)
    )


def _pad_id(text: Any) -> int:
    if text.pad_token_id is not None and text.pad_token_id >= 0:
        return text.pad_token_id
    return text.eos_token_id if isinstance(text.eos_token_id, int) else 0


def _add_image_tokens(tokenizer: Any, model: LlavaLlamaForCausalLM) -> None:
    """Add the special tokens the config asks for; an original checkpoint without the field means <im_patch>."""
    original = getattr(model.config, "mm_vision_tower", None) is not None
    names = []
    if getattr(model.config, "mm_use_im_patch_token", original):
        names.append(DEFAULT_IMAGE_PATCH_TOKEN)
    if getattr(model.config, "mm_use_im_start_end", False):
        names += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    if names:
        tokenizer.add_tokens(names, special_tokens=True)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
