"""LLaVA on Llama-like decoders: the transformers LLaVA model with LLaVA's own prompt handling."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

import apet
from apet.adapters import host
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
from llava.model.multimodal_projector.builder import build_vision_projector

_BUILT_IN_PROJECTOR = "mlp2x_gelu"


class LlavaLlamaForCausalLM(LlavaMetaForCausalLM, LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` that also understands -200 placeholders, `images` and `image_sizes`."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.model.__class__ = LlavaMetaModel
        if getattr(config, "mm_projector_type", _BUILT_IN_PROJECTOR) != _BUILT_IN_PROJECTOR:
            sizes = {"mm_hidden_size": config.vision_config.hidden_size, "hidden_size": config.text_config.hidden_size}
            named = SimpleNamespace(mm_projector_type=config.mm_projector_type, **sizes)
            self.model.multi_modal_projector = build_vision_projector(named)
        if "unpad" in (getattr(config, "mm_patch_merge_type", None) or ""):
            # What closes every row of an anyres picture; the transformers class of this family has no such weight.
            self.model.image_newline = torch.nn.Parameter(torch.zeros(config.text_config.hidden_size))

    def forward(
        self, *args: Any, visual_items: Tensor | None = None, visual_encoding: Any = None, **kwargs: Any
    ) -> Any:
        """The transformers forward; a patch learns where the images of an embedded prompt are, and what was kept.

        Args:
            *args: As transformers has them.
            visual_items: (B, L), see `llava.model.llava_arch.Prompt`.
            visual_encoding: What `apet.expecting_images` gave.
            **kwargs: As transformers has them.
        """
        if visual_items is not None and apet.active_config(self) is not None:
            kwargs |= {"visual_items": visual_items, "visual_encoding": visual_encoding}
        return super().forward(*args, **kwargs)

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict, *args: Any, **kwargs: Any) -> dict:
        # A compiled decoding step would be made anew for every prompt length these have.
        model_kwargs.pop("visual_items", None)
        model_kwargs.pop("visual_encoding", None)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """The transformers method; weights get the names of the transformers class, whatever they were loaded from."""
        super().save_pretrained(save_directory, *args, **{"save_original_format": False} | kwargs)


LlavaLlamaForCausalLM.forward.__signature__ = host.with_arguments(
    LlavaForConditionalGeneration.forward, "visual_items", "visual_encoding"
)
