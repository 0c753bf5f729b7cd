"""Turn compression on and off for a transformers model: `apply_patch`, `remove_patch`, `patched`, `last_result`."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from apet.adapters import Adapter, adapter_for, host
from apet.adapters.encoder import EncoderPatch
from apet.adapters.hooks import Attribute
from apet.adapters.prompt import PromptCount, PromptPatch
from apet.adapters.vision import Encoding, ImageLayout
from apet.config import ApetConfig
from apet.plan import is_empty, plan
from apet.result import CompressionResult

_PATCH = "_apet_patch"
_NOTE = "apet"


class _Patch:
    """Everything `apply_patch` put on a model, so that `remove_patch` can take it away again."""

    def __init__(self, adapter: Adapter, config: ApetConfig) -> None:
        self.config = config
        self.encoder: EncoderPatch | None = None
        if is_empty(config):
            self.prompt: PromptPatch | PromptCount = PromptCount(adapter, config)
            self._handles = self.prompt.attach()
            return
        made = plan(adapter, config)
        self.prompt = PromptPatch(adapter, config, made.stages, made.keep_positions, made.size_bias)
        self.encoder = EncoderPatch(
            adapter, made.vision, made.taps, made.per_frame, config, self.prompt.forwards, self.prompt.reads, made.tower
        )
        self._handles = [*self.encoder.attach(), *self.prompt.attach()]

    def carry(self, handle: Attribute) -> None:
        """Take something else off the model when the patch comes off."""
        self._handles.append(handle)

    def detach(self) -> None:
        """Remove the hooks, the last first: a wrapper finds what it wrapped."""
        for handle in reversed(self._handles):
            handle.remove()


def _unwrapped(model: Any) -> Any:
    """The transformers model inside a wrapper that leaves no doubt: torch.compile, PEFT, a pipeline."""
    if isinstance(model, nn.Module) and isinstance(vars(model).get("_modules", {}).get("_orig_mod"), nn.Module):
        return _unwrapped(model._orig_mod)
    if callable(getattr(model, "get_base_model", None)):
        return _unwrapped(model.get_base_model())
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
        return _unwrapped(model.model)
    return model


def _forget_compiled() -> None:
    """Let everything be compiled anew: code compiled before looks at no hooks. Nothing to do if nothing ever was."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def apply_patch(model: nn.Module, config: ApetConfig) -> nn.Module:
    """Compress visual tokens in every later forward and `generate` of `model`, until `remove_patch`.

    Everything is checked before the model is touched. A model that is already patched gets the new configuration.
    Batches, padding, caches, beams and attention implementations work as before; the model is for inference only.

    Args:
        model: A transformers vision-language model with its language-model head; or a `torch.compile` or PEFT wrapper,
            or a pipeline around one.
        config: Budgets and options.

    Returns:
        What was given.

    Raises:
        TypeError: The model's family is unknown, or `config` is not an ApetConfig.
        ValueError: A layer the model does not have or that cannot be shortened, budgets that grow or that the family
            does not know, an unknown method, or a text model with sliding-window attention.
        UnknownHostError: The installed transformers does not have what the patch reads.
    """
    if not isinstance(config, ApetConfig):
        raise TypeError(f"config must be an apet.ApetConfig, got {type(config).__name__}")
    inner = _unwrapped(model)
    adapter = adapter_for(inner)
    host.prove(adapter.base_model, adapter.text_model)
    plan(adapter, config)
    remove_patch(inner)
    setattr(inner, _PATCH, _Patch(adapter, config))
    _forget_compiled()
    return model


def remove_patch(model: nn.Module) -> nn.Module:
    """Restore `model` to the bit; does nothing on a model that is not patched. Returns the model."""
    patch = getattr(_unwrapped(model), _PATCH, None)
    if patch is not None:
        patch.detach()
        delattr(_unwrapped(model), _PATCH)
        _forget_compiled()
    return model


@contextmanager
def patched(model: nn.Module, config: ApetConfig) -> Iterator[nn.Module]:
    """Patch `model` inside a ``with`` block; afterwards it is as it was before, also when the block raises."""
    before, note = active_config(model), vars(_unwrapped(model)).get(_NOTE)
    apply_patch(model, config)
    try:
        yield model
    finally:
        remove_patch(model)
        if before is not None:
            apply_patch(model, before)
        if note is not None:
            annotate(model, note)


def annotate(model: nn.Module, note: Any) -> None:
    """Let `model.apet` be `note` until the patch of the model comes off; a patch takes one note."""
    inner = _unwrapped(model)
    getattr(inner, _PATCH).carry(Attribute(inner, _NOTE, note))


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter of a model, or of the one inside a wrapper.

    Raises:
        TypeError: The model's family is unknown.
    """
    return adapter_for(_unwrapped(model))


@contextmanager
def expecting_images(model: nn.Module, layouts: Sequence[ImageLayout] | None = None) -> Iterator[Encoding | None]:
    """Compress what a patched model encodes inside the ``with`` block, for code that calls tower and projector itself.

    Args:
        model: The model.
        layouts: How the crops of every image become its prompt columns; None where each crop is an image.

    Yields:
        What the block leaves for the prompt (`llava` hands it to the forward as `visual_encoding`); None on a model
        that is not patched or compresses nothing.
    """
    patch = getattr(_unwrapped(model), _PATCH, None)
    if patch is None or patch.encoder is None:
        yield None
        return
    with patch.encoder.expecting(layouts) as encoding:
        yield encoding


def preset_config(model: nn.Module, **changes: Any) -> ApetConfig:
    """The preset budgets of a model's family (docs/families.md); decoder stages run after the middle layer, 14 of 28.

    Args:
        model: A transformers vision-language model of a known family.
        changes: Fields of `ApetConfig` to set otherwise.

    Raises:
        TypeError: The model's family is unknown.
        ValueError: A field that is unknown or out of range.
    """
    adapter = adapter_of(model)
    fields = dict(adapter.preset.budgets)
    if fields.get("image_token_list") or fields.get("image_token_ratio_list"):
        fields["layer_list"] = [max(len(adapter.layers) // 2, adapter.first_stage_layer)]
    return ApetConfig.from_dict(fields | changes)


def active_config(model: nn.Module) -> ApetConfig | None:
    """The configuration `model` is patched with, or None."""
    patch = getattr(_unwrapped(model), _PATCH, None)
    return patch.config if patch is not None else None


def last_result(model: nn.Module) -> CompressionResult:
    """What this thread's last prefill of a patched model kept: per stage, sample and image, with counts per layer.

    Raises:
        RuntimeError: The model is not patched, or has not run since.
    """
    patch = getattr(_unwrapped(model), _PATCH, None)
    if patch is None:
        raise RuntimeError("the model is not patched; call apet.apply_patch(model, config) first")
    if patch.prompt.last is None:
        raise RuntimeError("the patched model has not run yet in this thread; call model.generate(...) first")
    return patch.prompt.last
