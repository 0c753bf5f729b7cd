"""What vLLM calls in each of its processes: `register`, of the entry point group `vllm.general_plugins`.

It adds names to vLLM's model registry, which nothing refers to yet, and looks at every engine configuration. One with
settings for ApET is checked, and its model is exchanged for ours; any other passes untouched.
"""

import functools
from typing import Any

from apet.config import ApetConfig
from apet.serving.settings import KEY, SERVED, Served, check_family, read_settings, served

# On the checkpoint's config, which vLLM hands to the processes that lay out prompts.
_ATTRIBUTE = "apet_settings"


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
    _check_engine(vllm_config, row)
    setattr(model_config.hf_config, _ATTRIBUTE, config.to_dict())
    model_config.hf_config.architectures = [row.registered]
    model_config._model_info, model_config._architecture = model_config.registry.inspect_model_cls(
        [row.registered], model_config
    )
    if row.position_mode == "keep":
        # vLLM asks a model for corrected M-RoPE positions only while its own pruning of videos is on; our class does
        # the pruning itself and never reads the rate.
        model_config.multimodal_config.video_pruning_rate = 1e-6


def settings_of(hf_config: Any) -> ApetConfig:
    """The settings that `configure` left on a checkpoint's config."""
    return ApetConfig.from_dict(getattr(hf_config, _ATTRIBUTE))


def _check_engine(vllm_config: Any, row: Served) -> None:
    """Raise ValueError for engine options that would prune twice, bypass the model or count tokens otherwise."""
    model_config, lora = vllm_config.model_config, vllm_config.lora_config
    if lora is not None and lora.enable_tower_connector_lora:
        raise ValueError(
            f"additional_config[{KEY!r}]: adapters of the vision tower or projector (--enable-tower-connector-lora) "
            "are not possible, as vLLM derives their lengths from the tokens in the prompt; leave out the flag"
        )
    if row.architecture == "LlavaForConditionalGeneration":
        kind = model_config.hf_config.vision_config.model_type
        if kind == "pixtral":
            raise ValueError(
                f"additional_config[{KEY!r}]: LLaVA with a {kind} encoder is not served, only CLIP or SigLIP"
            )
    multimodal = model_config.multimodal_config
    if multimodal is None or multimodal.language_model_only:
        raise ValueError(f"additional_config[{KEY!r}]: the engine runs the language model alone, without images")
    if multimodal.video_pruning_rate:
        raise ValueError(
            f"additional_config[{KEY!r}] and --video-pruning-rate {multimodal.video_pruning_rate} both prune videos; "
            "leave out the latter"
        )
