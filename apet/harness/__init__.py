"""ApET as a model of other people's evaluation harnesses.

`lmms-eval` finds it through the entry point group ``lmms_eval.models``, so that

    lmms-eval --model apet_llava_hf --model_args pretrained=llava-hf/llava-1.5-7b-hf,tokens=64,method=apet --tasks gqa

runs any of its tasks. The models are lmms-eval's own with `apet.compress_model` behind the loading; every argument they
take is theirs.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

_MODELS = {
    "apet_llava_hf": ("llava_hf", "LlavaHf"),
    "apet_qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VL"),
}


def lmms_eval_manifests() -> "Sequence[ModelManifest]":
    """What lmms-eval reads at its start: a name per model, and where its classes are."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(name, f"apet.harness.{module}.{cls}Simple", f"apet.harness.{module}.{cls}")
        for name, (module, cls) in _MODELS.items()
    ]
