"""LLaVA-1.5 with compression run the way the published code runs it: what the patched model is compared with.

One sample at a time. The tower returns every attention map (so it needs eager attention) and every layer's hidden
states, the last layer runs for nothing, the projector maps all tokens and most are thrown away afterwards, the decoder
keeps the hidden states of all layers, and the head computes logits for every position. Part of the comparison only.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from apet.adapters import host
from apet.bench.as_published import compress_as_published
from apet.config import ApetConfig

MODEL_TYPES = ("llava",)


class PublishedPipeline:
    """Prefill and greedy decoding of a LLaVA-1.5 of transformers, without a patch on it.

    Args:
        model: `LlavaForConditionalGeneration`.
        config: Budgets as counts, at most one decoder stage.

    Raises:
        ValueError: Another model or other budgets.
    """

    def __init__(self, model: nn.Module, config: ApetConfig) -> None:
        counts = all(isinstance(budget, int) for budget in config.stage_budgets)
        if model.config.model_type not in MODEL_TYPES or len(config.layer_list) > 1 or not counts:
            raise ValueError(
                f"the published pipeline is written down for {', '.join(MODEL_TYPES)} with counts as budgets and at "
                f"most one decoder stage, not for {model.config.model_type} with {list(config.stage_budgets)} after "
                f"layers {list(config.layer_list)}"
            )
        self._model, self._basis = model, config.basis_token_num
        self._keep, *self._later = config.stage_budgets
        self._stage_layer = config.layer_list[0] if config.layer_list else None

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, pixel_values: Tensor, **ignored: Tensor) -> Tensor:
        """First new token (B, 1), sample after sample."""
        pairs = zip(input_ids, pixel_values, strict=True)
        return torch.stack([self._prefill(ids, pixels)[0] for ids, pixels in pairs])

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, pixel_values: Tensor, max_new_tokens: int, **ignored: Tensor) -> Tensor:
        """`max_new_tokens` new tokens (B, T), sample after sample."""
        rows = []
        for ids, pixels in zip(input_ids, pixel_values, strict=True):
            token, cache = self._prefill(ids, pixels)
            tokens = [token]
            for _ in range(max_new_tokens - 1):
                hidden = self._model.get_input_embeddings()(tokens[-1]).unsqueeze(0)
                tokens.append(self._head(self._layers(hidden, cache)))
            rows.append(torch.cat(tokens))
        return torch.stack(rows)

    @contextmanager
    def eager_tower(self) -> Iterator[None]:
        """The tower with eager attention inside the ``with`` block: other implementations return no attention maps."""
        tower = self._model.model.vision_tower
        before = host.attention_name(tower.config)
        tower.set_attn_implementation("eager")
        try:
            yield
        finally:
            tower.set_attn_implementation(before)

    def _prefill(self, ids: Tensor, pixels: Tensor) -> tuple[Tensor, DynamicCache]:
        base = self._model.model
        state, attentions = host.tower_state(base.vision_tower, pixels.unsqueeze(0), -2, attentions=True)
        torch.stack(attentions)  # made, and never read
        features = state[:, 1:]
        chosen = compress_as_published(features, self._keep, basis=self._basis)
        merged = features.clone()
        merged[0, chosen.indices[0]] = chosen.tokens[0]
        projected = base.multi_modal_projector(merged)[:, chosen.indices[0]]

        places = torch.where(ids == self._model.config.image_token_id)[0]
        start, stop = places[0].item(), places[-1].item() + 1
        embed = self._model.get_input_embeddings()
        hidden = torch.cat([embed(ids[:start]), projected[0], embed(ids[stop:])]).unsqueeze(0)
        cache = DynamicCache(config=self._model.config.text_config)
        return self._head(self._layers(hidden, cache, start)), cache

    def _layers(self, hidden: Tensor, cache: DynamicCache, image_start: int | None = None) -> Tensor:
        """All decoder layers; `image_start` is given in the prefill, where the block behind it is compressed."""
        text, states = self._model.model.language_model, []
        for index, layer in enumerate(text.layers):
            if image_start is not None and index == self._stage_layer:
                hidden = self._shorten(hidden, image_start)
            states.append(hidden)
            past = host.cached_length(cache, index)
            positions = torch.arange(past, past + hidden.shape[1], device=hidden.device).unsqueeze(0)
            hidden = host.run_layer(layer, hidden, None, host.rotary(text, hidden, positions), cache)
        return text.norm(hidden)

    def _shorten(self, hidden: Tensor, start: int) -> Tensor:
        block = hidden[:, start : start + self._keep]
        chosen = compress_as_published(block, self._later[0], basis=self._basis, slots="error")
        return torch.cat([hidden[:, :start], chosen.tokens, hidden[:, start + self._keep :]], 1)

    def _head(self, hidden: Tensor) -> Tensor:
        """Most likely next token (1,), from logits of all positions as the published generation loop computes them."""
        return self._model.lm_head(hidden).float()[:, -1].argmax(-1)
