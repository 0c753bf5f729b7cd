"""Load a checkpoint: `load_pretrained_model` with the signature LLaVA scripts call."""

import importlib.util
import logging
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    CLIPImageProcessorPil,
    GenerationConfig,
)
from transformers.utils import logging as transformers_logging

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.checkpoint import Checkpoint, is_llava, key_mapping, load_tokenizer, open_checkpoint, read_config
from llava.model.extra_weights import is_buffer, is_partial, load_trained_parts, load_vision_weights
from llava.model.family import is_family, load_family
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llava.model.processors import Limits

logger = logging.getLogger(__name__)

# Modules that quantisation leaves alone: they are small, and the tower's weights may come from another file.
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
    limits: Limits | None = None,
    **kwargs: Any,
) -> tuple[Any, torch.nn.Module, Any, int]:
    """Load tokenizer, model, image processor and context length.

    The format is read from config.json: LLaVA, original or Hugging Face, or one of the families of
    `llava.model.processors`, whose processor takes the place of the image processor. The weights are placed tensor by
    tensor, so no second copy of them is held. The model is in evaluation mode, uncompressed; `apet.apply_patch`
    compresses it.

    Args:
        model_path: Checkpoint folder or hub id.
        model_base: Base language model, for a checkpoint that holds only a projector (`mm_projector.bin`) or LoRA
            adapters (`adapter_config.json`); adapters are merged into its weights.
        model_name: Name used in answers; the format never depends on it.
        load_8bit: Quantise with bitsandbytes.
        load_4bit: Quantise with bitsandbytes (nf4, double quantisation).
        device_map: As in transformers; a `device` other than "cuda" takes its place.
        device: Device of the whole model. "cuda" without a GPU means "cpu", unless `device_map` names only the CPU.
        use_flash_attn: Short for `attn_implementation="flash_attention_2"`.
        llm_pruning: Accepted and ignored, as in the published scripts.
        multimodal: Accepted and ignored, as other tools pass it.
        vision_tower: Folder of the vision tower, instead of the one in config.json.
        limits: Smallest and largest image, for models that see images in their own size.
        **kwargs: For `from_pretrained`: `attn_implementation`, `torch_dtype` or `dtype` (default float32 on a CPU; on a
            GPU float16, for families other than LLaVA the checkpoint's), `cache_dir`, ...

    Raises:
        FileNotFoundError: The folder, its config.json or its tokenizer is missing.
        ValueError: A checkpoint that is not supported or whose weights do not fit, or a device that is not there.
        ImportError: Quantisation without bitsandbytes.
    """
    options = _placement(device_map, device) | _quantisation(load_8bit, load_4bit) | kwargs
    if use_flash_attn:
        options["attn_implementation"] = "flash_attention_2"
    fields = read_config(model_path)
    options["dtype"] = options.pop("torch_dtype", options.pop("dtype", None)) or _default_dtype(
        options["device_map"], "auto" if is_family(fields) else torch.float16
    )
    if is_family(fields):
        if model_base is not None or vision_tower is not None:
            raise ValueError(
                f"{model_path} is a {fields['model_type']} checkpoint, which is whole: leave out --model-base and "
                "--vision-tower"
            )
        return load_family(model_path, fields["model_type"], options, limits or Limits())
    if limits not in (None, Limits()):
        raise ValueError(
            f"--min_pixels and --max_pixels are for models that see images in their own size; {model_path} does not"
        )
    if not is_llava(fields):
        return _load_language_model(model_path, model_base, options)
    return _load_llava(open_checkpoint(model_path, fields, vision_tower), model_base, options)


def _load_llava(
    checkpoint: Checkpoint, base: str | None, options: dict[str, Any]
) -> tuple[Any, LlavaLlamaForCausalLM, CLIPImageProcessorPil, int]:
    """Tokenizer, model, image processor and context length of a LLaVA checkpoint."""
    if base is None and is_partial(checkpoint.path):
        raise ValueError(
            f"{checkpoint.path} holds only trained parts (a projector or LoRA adapters); name the language model they "
            "belong to with --model-base"
        )
    tokenizer = load_tokenizer(base or checkpoint.path)
    image_processor = _load_image_processor(checkpoint.vision_tower or checkpoint.path)
    model = _load_weights(checkpoint, base, options)
    model.generation_config = _greedy_defaults(model)
    _add_image_tokens(tokenizer, model)
    model.model.image_processor = image_processor
    return tokenizer, model.eval(), image_processor, getattr(model.config, "max_sequence_length", 2048)


def _load_weights(checkpoint: Checkpoint, base: str | None, options: dict[str, Any]) -> LlavaLlamaForCausalLM:
    """Weights of the checkpoint, or of the base completed by the checkpoint, and of the vision tower.

    Raises:
        ValueError: They do not fit config.json.
    """
    source, renames = checkpoint.path, checkpoint.key_mapping
    if base is not None:
        source, renames = base, key_mapping(read_config(base), checkpoint.config.mm_projector_type)
    model, info = _from_pretrained(checkpoint.config, source, options | {"key_mapping": renames})
    missing, mismatched = set(info["missing_keys"]), {key for key, *_ in info["mismatched_keys"]}
    tower = {name for name, _ in model.named_parameters() if name.startswith("model.vision_tower.")}
    separate = checkpoint.vision_tower is not None and tower <= missing
    if separate:
        load_vision_weights(model, checkpoint.vision_tower)
        missing -= tower
    if base is not None:
        filled = load_trained_parts(model, checkpoint.path, checkpoint.key_mapping)
        missing, mismatched = missing - filled, mismatched - filled
    logger.info("vision tower weights: %s", checkpoint.vision_tower if separate else source)
    problems = {"missing": missing, "unknown": info["unexpected_keys"], "of another shape": mismatched}
    _check_fit(source, {kind: sorted(key for key in keys if not is_buffer(key)) for kind, keys in problems.items()})
    return model


def _from_pretrained(config: Any, source: str, options: dict[str, Any]) -> tuple[LlavaLlamaForCausalLM, dict[str, Any]]:
    """The model and transformers' report on its weights.

    Raises:
        ValueError: Files that are missing or cannot be read.
    """
    cls = LlavaMistralForCausalLM if config.text_config.model_type == "mistral" else LlavaLlamaForCausalLM
    verbosity = transformers_logging.get_verbosity()
    # transformers reports weights that come from another file as missing; the caller checks them.
    transformers_logging.set_verbosity_error()
    try:
        return cls.from_pretrained(
            source, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, SafetensorError, EOFError, UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise  # nothing about the file: out of memory, for example
        raise ValueError(f"the weights of {source} cannot be read: {str(error).splitlines()[0]}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _check_fit(source: str, problems: dict[str, list[str]]) -> None:
    """Raise ValueError if any weights are missing, unknown or of another shape."""
    if any(problems.values()):
        found = ", ".join(f"{len(keys)} {kind} {keys[:2]}" for kind, keys in problems.items())
        raise ValueError(f"the weights in {source} do not fit the config.json of the checkpoint: {found}")


def _load_image_processor(path: str) -> CLIPImageProcessorPil:
    """The PIL processor, bit-identical to what LLaVA was trained and measured with.

    Raises:
        FileNotFoundError: The folder has no preprocessor_config.json.
    """
    try:
        return CLIPImageProcessorPil.from_pretrained(path)
    except OSError as error:
        message = f"{path} has no preprocessor_config.json; copy it there from the CLIP checkpoint"
        raise FileNotFoundError(message) from error


def _load_language_model(path: str, base: str | None, options: dict[str, Any]) -> tuple[Any, Any, None, int]:
    """A plain language model: no image processor."""
    tokenizer = AutoTokenizer.from_pretrained(base or path)
    model = AutoModelForCausalLM.from_pretrained(path, **options).eval()
    return tokenizer, model, None, getattr(model.config, "max_sequence_length", 2048)


def _placement(device_map: Any, device: str) -> dict[str, Any]:
    _check_device(device)
    if device != "cuda":
        return {"device_map": {"": device}}
    if torch.cuda.is_available() or _places(device_map) <= {"cpu", "disk"}:
        return {"device_map": device_map}
    return {"device_map": {"": "cpu"}}


def _check_device(device: str) -> None:
    """Raise ValueError for a device that torch does not know or that is not here; "cuda" stands for a CPU too."""
    try:
        usable = device == "cuda" or torch.empty(0, device=device).device.type != "meta"
    except (RuntimeError, AssertionError, ImportError):  # what torch raises depends on how it was built
        usable = False
    if not usable:
        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        known = ", ".join(["cpu", *gpus]) + ("" if gpus else " and no GPU")
        raise ValueError(f"device {device!r} is not there: torch sees {known}; give another --device")


def _places(device_map: Any) -> set[str]:
    """Devices a device map names."""
    return set(map(str, device_map.values() if isinstance(device_map, dict) else [device_map]))


def _default_dtype(device_map: Any, on_gpu: Any) -> Any:
    on_cpu = not torch.cuda.is_available() or _places(device_map) <= {"cpu", "disk"}
    return torch.float32 if on_cpu else on_gpu


def _quantisation(load_8bit: bool, load_4bit: bool) -> dict[str, Any]:
    """Raises ValueError for both at once, ImportError without bitsandbytes."""
    if not load_8bit and not load_4bit:
        return {}
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit exclude each other; choose one")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("load_8bit and load_4bit need the package bitsandbytes; install it, or leave them out")
    if load_8bit:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_NOT_QUANTISED)}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.float16,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=_NOT_QUANTISED,
    )
    return {"quantization_config": config}


def _greedy_defaults(model: torch.nn.Module) -> GenerationConfig:
    """Ids only: Vicuna's generation_config carries sampling values that contradict its own do_sample=False."""
    stored, text = model.generation_config, model.config.text_config
    ids = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(stored, name)
        ids[name] = getattr(text, name) if value is None else value
    if ids["pad_token_id"] is None or ids["pad_token_id"] < 0:
        ids["pad_token_id"] = ids["eos_token_id"] if isinstance(ids["eos_token_id"], int) else 0
    return GenerationConfig(**ids)


def _add_image_tokens(tokenizer: Any, model: LlavaLlamaForCausalLM) -> None:
    """Add the special tokens that the config asks for."""
    names = [DEFAULT_IMAGE_PATCH_TOKEN] if model.config.mm_use_im_patch_token else []
    if model.config.mm_use_im_start_end:
        names += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    if not names:
        return
    tokenizer.add_tokens(names, special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
        model.config.vocab_size = model.config.image_token_id = len(tokenizer)
