"""The ways of running one model that are timed side by side, and what must hold while one of them runs."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import apet
from apet.adapters import host
from apet.bench.device import chosen_device
from apet.bench.presets import Preset, get_preset
from apet.bench.published_pipeline import MODEL_TYPES, PublishedPipeline
from apet.bench.shapes import AS_PUBLISHED
from apet.config import ApetConfig
from apet.methods import parse_options

NONE, RANDOM = "none", "random"


@dataclass(frozen=True)
class Variant:
    """One way of running the model.

    Attributes:
        name: A method, "none" for the model as it is, or "as published".
        model: The model.
        config: Its compression, None without one.
        pipeline: Runs the model instead of its own forward.
        cache: Decode with a compiled step on this cache.
    """

    name: str
    model: nn.Module = field(repr=False)
    config: ApetConfig | None
    pipeline: PublishedPipeline | None = None
    cache: apet.PromptCache | None = field(default=None, repr=False)

    def compiled(self, new_tokens: int) -> "Variant":
        """The variant with a compiled decoding step, for answers of at most so many tokens."""
        return replace(self, cache=apet.PromptCache(self.model, new_tokens))

    def active(self) -> AbstractContextManager:
        """What must hold during `prefill` and `generate`."""
        if self.pipeline is not None:
            return self.pipeline.eager_tower()
        return nullcontext() if self.config is None else apet.patched(self.model, self.config)

    @torch.inference_mode()
    def prefill(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """First new token (B, 1): tower, projector, decoder, logits of the last position."""
        if self.pipeline is not None:
            return self.pipeline.prefill(**inputs)
        cache = DynamicCache(config=self.model.config.get_text_config())  # as `generate` does
        return self.model(**inputs, **host.with_cache(cache), logits_to_keep=1).logits.argmax(-1)

    def embedded_prefill(self, inputs: Mapping[str, Tensor]) -> Callable[[], Tensor]:
        """The same prefill from embeddings put together here, for capture as a CUDA graph.

        The host's own forward waits for the device to compare placeholders with features, and a patch waits to find
        the images; both know the answer here. For equally long prompts of one image each, without padding.

        Raises:
            ValueError: Another model than LLaVA-1.5.
        """
        if self.model.config.model_type not in MODEL_TYPES:
            raise ValueError(f"written down for {', '.join(MODEL_TYPES)} only, not for {self.model.config.model_type}")
        ids, base, embed = inputs["input_ids"], self.model.model, self.model.get_input_embeddings()
        visual = (ids == self.model.config.image_token_id).cpu()
        rows = visual.flatten().nonzero().flatten().to(ids.device)
        images = torch.arange(len(ids)).unsqueeze(-1)
        known = {} if self.config is None else {"visual_items": torch.where(visual, images, -1)}

        @torch.inference_mode()
        def prefill() -> Tensor:
            encoded = base.get_image_features(inputs["pixel_values"])
            features = torch.cat(tuple(host.encoded_features(encoded)))
            if known:
                known["visual_encoding"] = encoded.apet
            embeds = embed(ids)
            embeds.flatten(0, 1).index_copy_(0, rows, features.to(embeds.dtype))
            cache = DynamicCache(config=self.model.config.get_text_config())
            output = self.model(inputs_embeds=embeds, **host.with_cache(cache), logits_to_keep=1, **known)
            return output.logits.argmax(-1)

        return prefill

    @torch.inference_mode()
    def generate(self, inputs: Mapping[str, Tensor], new_tokens: int) -> Tensor:
        """`new_tokens` greedy tokens (B, T), or prompt and tokens."""
        if self.pipeline is not None:
            return self.pipeline.generate(**inputs, max_new_tokens=new_tokens)
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        if self.cache is not None:
            self.cache.reset()
            options |= host.with_cache(self.cache) | {"compile_config": apet.compile_config()}
        return self.model.generate(**inputs, **options)


def built(args: argparse.Namespace) -> tuple[Preset, nn.Module]:
    """The preset and model that a command's flags name."""
    device, dtype = chosen_device(args)
    preset = get_preset(args.preset)
    return preset, preset.build(device, dtype, args.attn_implementation)


def make_variants(
    model: nn.Module,
    preset: Preset,
    methods: Sequence[str],
    tokens: int | None,
    published: bool,
    further: Sequence[str] = (),
) -> dict[str, Variant]:
    """No compression, the methods, random selection and the published pipeline, all at one budget.

    Args:
        model: The preset's model.
        preset: Knows how to spend a budget.
        methods: Registered names beside "random".
        tokens: Budget averaged over the layers, None for the preset's.
        published: Add the published pipeline where it is written down for the model.
        further: Fields of `ApetConfig` as ``name=value,name=value``, for one more variant per method and text.

    Raises:
        ValueError: A method or setting that the model or the budget refuses.
    """
    found = [Variant(NONE, model, None)]
    configs = {name: preset.compression(name, tokens) for name in dict.fromkeys([RANDOM, *methods])}
    for text in further:
        changes = parse_options(text, f"--apet {text}", "--apet name=value,name=value")
        configs |= {f"{name}, {text}": preset.compression(name, tokens, **changes) for name in methods}
    for name, config in configs.items():
        with apet.patched(model, config):  # refuses here what it would refuse later
            found.append(Variant(name, model, config))
    if published and model.config.model_type in MODEL_TYPES:
        config = preset.compression("apet", tokens)
        found.append(Variant(AS_PUBLISHED, model, config, PublishedPipeline(model, config)))
    return {variant.name: variant for variant in found}


def runnable(variants: Mapping[str, Variant], run: Callable[[Variant], Any]) -> tuple[list[Variant], dict[str, str]]:
    """The variants that `run` works for, and why the others do not (the memory of the GPU)."""
    fine, failed = [], {}
    for variant in variants.values():
        try:
            with variant.active():
                run(variant)
        except torch.OutOfMemoryError as error:
            failed[variant.name] = f"out of memory: {str(error).splitlines()[0]}"
            torch.cuda.empty_cache()
        else:
            fine.append(variant)
    return fine, failed


def parse_counts(text: str, flag: str) -> list[int]:
    """Whole numbers of at least 1, separated by commas.

    Raises:
        ValueError: Something else.
    """
    words = [word.strip() for word in str(text).split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"{flag} {text!r} must be numbers of at least 1, separated by commas")
    return [int(word) for word in words]
