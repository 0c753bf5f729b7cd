"""Everything ApET assumes about the insides of vLLM: what it overrides, calls and imports, with the arguments it reads.

`prove` looks for all of it before an engine with settings for ApET starts, so that a vLLM that has renamed something is
refused with a sentence and never computes something else in silence. No other file of this package imports a name of
vLLM or overrides a method of it that is not listed here (`tests/serving/test_host.py` holds us to it).
"""

import importlib
import inspect
from typing import Any

# What `scripts/test_vllm.sh` runs; pyproject.toml and scripts/_vllm.sh have the same range.
TESTED = ">=0.32,<0.33"

# module -> name (of a class, or of a method of it) -> arguments that we give, take or hand on
Names = dict[str, dict[str, tuple[str, ...]]]

ENGINE: Names = {
    "vllm": {"ModelRegistry.register_model": ("model_arch", "model_cls")},
    "vllm.config": {"VllmConfig.try_verify_and_update_config": (), "VllmConfig.use_v2_model_runner": ()},
    "vllm.config.ec_manager_config": {"EncoderCacheManagerConfig": ("encoder_cache_manager_cls",)},
    "vllm.model_executor.models.registry": {"_ModelRegistry.inspect_model_cls": ("architectures", "model_config")},
    "vllm.multimodal": {
        "MULTIMODAL_REGISTRY.register_processor": ("processor", "info", "dummy_inputs"),
        "MULTIMODAL_REGISTRY.get_processing_info": ("model_config",),
    },
    "vllm.multimodal.processing": {
        "BaseMultiModalProcessor._get_mm_hashes": ("inputs",),
        "BaseMultiModalProcessor.apply": ("inputs", "timing_ctx"),
        "PromptReplacement": ("modality", "target", "replacement"),
    },
    "vllm.v1.core.encoder_cache_manager": {
        "EncoderCacheManager": ("cache_size",),
        "EncoderCacheManager.create_manager": ("cache_size", "vllm_config"),
        "EncoderCacheManager.can_allocate": (
            "request", "input_id", "encoder_compute_budget", "num_embeds_to_schedule",
        ),
        "EncoderCacheManager.allocate": ("request", "input_id"),
        "EncoderCacheManager.get_freed_mm_hashes": (),
        "EncoderCacheManager.reset": (),
    },
    "vllm.platforms": {"current_platform.is_cpu": ()},
    "vllm.version": {"__version__": ()},
}  # fmt: skip

_SIZE = ("image_width", "image_height")
_MAX = ("seq_len", "mm_counts")
_UPDATES = ("mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs")
_POSITIONS = ("input_ids", "multimodal_embeddings", "mrope_positions", "num_computed_tokens")
_MROPE: Names = {
    "vllm.utils.gpu_sync_debug": {"gpu_sync_allowed": ()},
    "vllm.v1.worker.cpu_model_runner": {"CPUModelRunner.load_model": ()},
}

MODELS: dict[str, Names] = {
    "llava": {
        "vllm.model_executor.models.llava": {
            "LlavaForConditionalGeneration": ("vllm_config", "prefix"),
            "LlavaForConditionalGeneration._process_image_input": ("image_input",),
            "LlavaProcessingInfo.get_num_image_tokens": _SIZE,
            "LlavaProcessingInfo.get_max_image_tokens": (),
            "LlavaProcessingInfo.get_image_size_with_most_features": (),
            "LlavaProcessingInfo.get_mm_max_tokens_per_item": _MAX,
            "LlavaMultiModalProcessor": (),
            "LlavaDummyInputsBuilder": (),
            "LlavaImageEmbeddingInputs": (),
        },
    },
    "llava_next": {
        "vllm.model_executor.models.llava": {"LlavaDummyInputsBuilder": ()},
        "vllm.model_executor.models.llava_next": {
            "LlavaNextForConditionalGeneration": ("vllm_config", "prefix"),
            "LlavaNextForConditionalGeneration._process_image_input": ("image_input",),
            "LlavaNextForConditionalGeneration._merge_image_patch_embeddings": (
                "image_size", "patch_embeddings", "strategy",
            ),
            "LlavaNextProcessingInfo.get_num_image_tokens": _SIZE,
            "LlavaNextProcessingInfo.get_max_image_tokens": (),
            "LlavaNextProcessingInfo.get_image_size_with_most_features": (),
            "LlavaNextProcessingInfo.get_mm_max_tokens_per_item": _MAX,
            "LlavaNextMultiModalProcessor": (),
            "LlavaNextImageEmbeddingInputs": (),
            "LlavaNextImagePixelInputs": (),
        },
    },
    "llava_onevision": {
        "vllm.model_executor.models.llava_onevision": {
            "LlavaOnevisionForConditionalGeneration": ("vllm_config", "prefix"),
            "LlavaOnevisionForConditionalGeneration._process_image_input": ("image_input",),
            "LlavaOnevisionForConditionalGeneration._process_video_pixels": ("inputs",),
            "LlavaOnevisionForConditionalGeneration._merge_image_patch_embeddings": (
                "image_size", "patch_embeddings", "image_newline", "strategy",
            ),
            "LlavaOnevisionProcessingInfo.get_num_image_tokens": _SIZE,
            "LlavaOnevisionProcessingInfo.get_num_video_tokens": (*_SIZE, "num_frames"),
            "LlavaOnevisionProcessingInfo._get_num_frame_tokens": _SIZE,
            "LlavaOnevisionProcessingInfo.get_max_image_tokens": (),
            "LlavaOnevisionProcessingInfo.get_max_video_tokens": _MAX,
            "LlavaOnevisionProcessingInfo.get_num_frames_with_most_features": _MAX,
            "LlavaOnevisionProcessingInfo.get_image_size_with_most_features": (),
            "LlavaOnevisionProcessingInfo.get_mm_max_tokens_per_item": _MAX,
            "LlavaOnevisionMultiModalProcessor": (),
            "LlavaOnevisionDummyInputsBuilder": (),
            "LlavaOnevisionImageEmbeddingInputs": (),
        },
    },
    "internvl": {
        "vllm.model_executor.models.interns1": {
            "InternS1ForConditionalGeneration": ("vllm_config", "prefix"),
            "InternS1ForConditionalGeneration._process_vision_input": ("image_input",),
            "InternS1ProcessingInfo.get_hf_processor": ("kwargs",),
            "InternS1ProcessingInfo.get_num_image_tokens": (*_SIZE, "processor", "mm_kwargs"),
            "InternS1ProcessingInfo.get_max_image_tokens": (),
            "InternS1ProcessingInfo.get_image_size_with_most_features": (),
            "InternS1ProcessingInfo.get_num_frames_with_most_features": _MAX,
            "InternS1ProcessingInfo.get_mm_max_tokens_per_item": _MAX,
            "InternS1MultiModalProcessor": (),
            "InternS1DummyInputsBuilder": (),
        },
    },
    "qwen2_5_vl": _MROPE | {
        "vllm.model_executor.models.qwen2_5_vl": {
            "Qwen2_5_VLForConditionalGeneration": ("vllm_config", "prefix"),
            "Qwen2_5_VLForConditionalGeneration._postprocess_image_embeds_evs": ("image_embeds_split", "image_input"),
            "Qwen2_5_VLForConditionalGeneration._postprocess_video_embeds_evs": ("video_embeds_split", "video_input"),
            "Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions": ("input_tokens", "mm_features"),
            "Qwen2_5_VLForConditionalGeneration.recompute_mrope_positions": _POSITIONS,
            "Qwen2_5_VLForConditionalGeneration.iter_mm_grid_thw": ("mm_features",),
            "Qwen2_5_VLMultiModalProcessor._get_prompt_updates": _UPDATES,
            "Qwen2_5_VLProcessingInfo.get_num_image_tokens": (*_SIZE, "image_processor", "mm_kwargs"),
            "Qwen2_5_VLProcessingInfo.get_image_processor": (),
            "Qwen2_5_VLDummyInputsBuilder": (),
        },
    },
    "qwen3_vl": _MROPE | {
        "vllm.model_executor.models.qwen3_vl": {
            "Qwen3VLForConditionalGeneration": ("vllm_config", "prefix"),
            "Qwen3VLForConditionalGeneration._postprocess_image_embeds_evs": ("image_embeds_split", "image_input"),
            "Qwen3VLForConditionalGeneration._postprocess_video_embeds_evs": ("video_embeds_split", "video_input"),
            "Qwen3VLForConditionalGeneration._create_final_video_embeddings": (
                "video_embeddings", "num_tokens_per_frame", "timestamps", "video_grid_thw", "retention_mask",
            ),
            "Qwen3VLForConditionalGeneration._get_expanded_positions": ("device", "retention_mask"),
            "Qwen3VLForConditionalGeneration.get_mrope_input_positions": ("input_tokens", "mm_features"),
            "Qwen3VLForConditionalGeneration.recompute_mrope_positions": _POSITIONS,
            "Qwen3VLMultiModalProcessor._get_prompt_updates": _UPDATES,
            "Qwen3VLMultiModalProcessor.get_video_repl": (
                "tokens_per_frame", "timestamps", "tokenizer", "vision_start_token_id", "vision_end_token_id",
                "video_token_id",
            ),
            "Qwen3VLProcessingInfo.get_num_image_tokens": (*_SIZE, "image_processor", "mm_kwargs"),
            "Qwen3VLProcessingInfo.get_image_processor": (),
            "Qwen3VLDummyInputsBuilder": (),
        },
    },
}  # fmt: skip


class UnknownVllmError(RuntimeError):
    """The installed vLLM does not look as ApET knows it."""

    def __init__(self, missing: str) -> None:
        from vllm import __version__

        super().__init__(
            f"vLLM {__version__} is not one that ApET knows: {missing}. Tested are versions {TESTED}; install one of "
            f"them (pip install 'vllm{TESTED}') or a newer ApET"
        )


def prove(family: str) -> None:
    """Check that everything ApET uses of vLLM to serve a family is there.

    Raises:
        UnknownVllmError: Something is missing; the message names it.
    """
    for names in (ENGINE, MODELS[family]):
        for module, listed in names.items():
            try:
                found = importlib.import_module(module)
            except ImportError as error:
                raise UnknownVllmError(f"{module} does not load ({error})") from None
            for name, arguments in listed.items():
                _check(found, module, name, arguments)


def on_cpu() -> bool:
    """Whether this vLLM runs on CPUs."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def _check(module: Any, path: str, name: str, arguments: tuple[str, ...]) -> None:
    """Raise UnknownVllmError unless `name` of a module exists and takes the arguments."""
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise UnknownVllmError(f"{path} has no {name}")
        found = getattr(found, part)
    taken = inspect.signature(found).parameters if arguments else {}
    for argument in arguments:
        if argument not in taken:
            raise UnknownVllmError(f"{path}.{name} takes no argument {argument!r}")
