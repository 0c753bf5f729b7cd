"""What vLLM calls in each of its processes: `register`, of the entry point group `vllm.general_plugins`.

It adds names to vLLM's model registry, which nothing refers to yet, and looks at every engine configuration. One with
settings for ApET is checked, and its model is exchanged for ours; any other passes untouched.
"""

import functools
from typing import Any

from apet.config import ApetConfig
from apet.serving import host
from apet.serving.settings import KEY, SERVED, Served, check_family, read_settings, served

# On the checkpoint's config, which vLLM hands to the processes that lay out prompts.
_ATTRIBUTE = "apet_settings"
_ENCODER_BUDGET = "apet.serving.encoder.EncoderBudget"


def register() -> None:
    """Make vLLM understand ``additional_config["apet"]``. Calling it again changes nothing."""
    from vllm import ModelRegistry
    from vllm.config import VllmConfig

    for row in SERVED:
        ModelRegistry.register_model(row.registered, row.model)
    original = VllmConfig.try_verify_and_update_config
    if getattr(original, "apet", False):
        return

    @functools.wraps(original)
    def verified(self: Any) -> None:
        original(self)
        configure(self)

    verified.apet = True
    VllmConfig.try_verify_and_update_config = verified


def configure(vllm_config: Any) -> None:
    """Check the settings of an engine configuration, if it has any, and put our model in place.

    Raises:
        ValueError: As `read_settings` and `check_family`, or an engine option that does not go together with them.
        UnknownVllmError: As `host.prove`.
    """
    config = read_settings(vllm_config.additional_config)
    model_config = vllm_config.model_config
    # The draft model of speculative decoding is configured too; it reads the prompts of the model it drafts for.
    if config is None or model_config is None or model_config.runner_type == "draft":
        return
    row = served(model_config.architecture)
    if model_config.architecture == row.registered:
        return
    check_family(config, row)
    host.prove(row.family)
    # Engine options that would prune twice, bypass the model or count tokens otherwise.
    for wrong, sentence in [*_objections(vllm_config), *_objections_to(row, vllm_config)]:
        if wrong:
            raise ValueError(f"additional_config[{KEY!r}]: {sentence}")
    setattr(model_config.hf_config, _ATTRIBUTE, config.to_dict())
    model_config.hf_config.architectures = [row.registered]
    model_config._model_info, model_config._architecture = model_config.registry.inspect_model_cls(
        [row.registered], model_config
    )
    vllm_config.ec_manager_config.encoder_cache_manager_cls = _ENCODER_BUDGET
    if row.position_mode == "keep":
        # vLLM asks a model for corrected M-RoPE positions only while its own pruning of videos is on; our class does
        # the pruning itself and never reads the rate.
        model_config.multimodal_config.video_pruning_rate = 1e-6


def settings_of(hf_config: Any) -> ApetConfig:
    """The settings that `configure` left on a checkpoint's config."""
    return ApetConfig.from_dict(getattr(hf_config, _ATTRIBUTE))


def _objections(vllm_config: Any) -> list[tuple[bool, str]]:
    """Options that no model can be served with: whether they are set, and what to say then."""
    lora, multimodal = vllm_config.lora_config, vllm_config.model_config.multimodal_config
    rate = None if multimodal is None else multimodal.video_pruning_rate
    manager = vllm_config.ec_manager_config.encoder_cache_manager_cls
    workers = vllm_config.parallel_config.tensor_parallel_size
    return [
        (
            lora is not None and lora.enable_tower_connector_lora,
            "adapters of the vision tower or projector (--enable-tower-connector-lora) are not possible, as vLLM "
            "derives their lengths from the tokens in the prompt; leave out the flag",
        ),
        (
            multimodal is None or multimodal.language_model_only,
            "the engine runs the language model alone, without images",
        ),
        (bool(rate), f"ApET and --video-pruning-rate {rate} both prune videos; leave out the latter"),
        (
            manager is not None,
            f"encoder_cache_manager_cls={manager!r} would replace the manager by which ApET counts what it encodes; "
            "leave it out",
        ),
        (
            vllm_config.compilation_config.cudagraph_mm_encoder,
            "an encoder in CUDA graphs (cudagraph_mm_encoder) goes around the compression; leave it out",
        ),
        (
            # Its workers were seen to die there in the middle of a request.
            workers > 1 and host.on_cpu() and vllm_config.use_v2_model_runner,
            f"on a CPU, {workers} workers that share every layer (--tensor-parallel-size {workers}) run with vLLM's "
            "first model runner only; set VLLM_USE_V2_MODEL_RUNNER=0",
        ),
    ]


def _objections_to(row: Served, vllm_config: Any) -> list[tuple[bool, str]]:
    """Options that this model cannot be served with."""
    model_config, stages = vllm_config.model_config, vllm_config.parallel_config.pipeline_parallel_size
    encoder = model_config.hf_config.vision_config.model_type
    moves = row.position_mode == "keep"
    return [
        (
            row.family == "llava" and encoder == "pixtral",
            f"LLaVA with a {encoder} encoder is not served, only CLIP or SigLIP",
        ),
        (
            moves and stages > 1,
            f"{row.family} cannot be cut into pipeline stages (--pipeline-parallel-size {stages}), because only the "
            "first one learns which positions the kept tokens have; use --tensor-parallel-size",
        ),
        (
            moves and model_config.enable_prompt_embeds,
            f"{row.family} takes no prompts of embeddings (--enable-prompt-embeds), which would come without "
            "positions; leave out the flag",
        ),
    ]
