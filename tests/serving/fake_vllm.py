"""As much of vLLM as the plugin touches when it is registered and when an engine is configured.

Attributes and calls have the names of vLLM 0.32; that they still mean the same in a real vLLM is what
`scripts/test_vllm.sh` finds out.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any


class FakeRegistry:
    """`vllm.ModelRegistry`."""

    def __init__(self) -> None:
        self.models: dict[str, str] = {}

    def register_model(self, name: str, model: str) -> None:
        self.models[name] = model

    def inspect_model_cls(self, architectures: list[str], model_config: Any) -> tuple[str, str]:
        return f"info of {architectures[0]}", architectures[0]


def install(monkeypatch) -> FakeRegistry:
    """Put the stand-in where ``import vllm`` finds it; `VllmConfig` verifies itself when it is made."""
    registry = FakeRegistry()

    class VllmConfig:
        def __init__(self, architecture: str, additional_config: Any = None, **multimodal: Any) -> None:
            self.additional_config = {} if additional_config is None else additional_config
            self.lora_config = multimodal.pop("lora_config", None)
            self.ec_manager_config = SimpleNamespace(encoder_cache_manager_cls=multimodal.pop("manager", None))
            self.compilation_config = SimpleNamespace(cudagraph_mm_encoder=multimodal.pop("graphs", False))
            self.parallel_config = SimpleNamespace(
                pipeline_parallel_size=multimodal.pop("stages", 1), tensor_parallel_size=multimodal.pop("workers", 1)
            )
            self.use_v2_model_runner = multimodal.pop("second_runner", False)
            vision = SimpleNamespace(model_type=multimodal.pop("encoder", "clip_vision_model"))
            defaults = {"language_model_only": False, "video_pruning_rate": None}
            self.model_config = SimpleNamespace(
                runner_type=multimodal.pop("runner_type", "generate"),
                enable_prompt_embeds=multimodal.pop("prompt_embeds", False),
                architecture=architecture, _architecture=architecture, _model_info="info", registry=registry,
                hf_config=SimpleNamespace(architectures=[architecture], vision_config=vision),
                multimodal_config=SimpleNamespace(**(defaults | multimodal)),
            )  # fmt: skip
            self.verified = 0
            self.try_verify_and_update_config()

        def try_verify_and_update_config(self) -> None:
            self.verified += 1

    monkeypatch.setattr("apet.serving.host.prove", lambda family: None)  # tests/serving/test_host.py is about it
    monkeypatch.setattr("apet.serving.host.on_cpu", lambda: True)
    vllm, config = ModuleType("vllm"), ModuleType("vllm.config")
    vllm.ModelRegistry, config.VllmConfig = registry, VllmConfig
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    return registry
