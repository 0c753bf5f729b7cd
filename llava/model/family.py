"""Load checkpoints of the other families `apet` serves, as Hugging Face publishes them."""

from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from apet.adapters import registered
from llava.model.processors import FamilyProcessor, Limits, family_types, load_processor


def is_family(fields: dict[str, Any]) -> bool:
    """Whether a config.json is of a family that is loaded here."""
    return fields.get("model_type") in family_types()


def load_family(
    path: str, model_type: str, options: dict[str, Any], limits: Limits
) -> tuple[Any, torch.nn.Module, FamilyProcessor, int]:
    """Tokenizer, model, processor and context length of a checkpoint.

    The checkpoint's generation config stays (a repetition penalty is part of how Qwen models were published), except
    for its sampling values: whether and how to sample is the caller's choice.

    Args:
        path: Checkpoint folder or hub id.
        model_type: Of its config.json.
        options: For `from_pretrained`.
        limits: Smallest and largest image.

    Raises:
        FileNotFoundError: Files are missing.
        ValueError: Weights that cannot be read or do not fit config.json.
    """
    adapter = next(one for one in registered() if model_type in one.model_types)
    cls = getattr(transformers, adapter.classes[adapter.model_types.index(model_type)])
    try:
        model, info = cls.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, SafetensorError, EOFError, UnpicklingError) as error:
        raise ValueError(f"the weights of {path} cannot be read: {str(error).splitlines()[0]}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"the weights in {path} do not fit its config.json: {len(missing)} missing {missing[:2]}")
    processor = load_processor(path, model.config, limits)
    generation = model.generation_config
    generation.do_sample, generation.temperature, generation.top_p, generation.top_k = False, None, None, None
    if generation.pad_token_id is None:
        generation.pad_token_id = processor.tokenizer.pad_token_id
    context = getattr(model.config.get_text_config(), "max_position_embeddings", 2048)
    return processor.tokenizer, model.eval(), processor, context
