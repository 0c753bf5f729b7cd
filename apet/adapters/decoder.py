"""The one decoder-side patch: shortens sequences before chosen layers, through forward pre-hooks only.

No forward is replaced. Hooks sit on the base model (what kind of call is this), on the text model (stage before layer
0) and on every decoder layer (later stages, and what all layers behind them must see instead of the text model's
values). Where a stage dropped tokens, all later layers get a sequence packed to the right, a mask of their own length
and positions of their own; each cache layer then simply stores fewer tokens.

State of a prompt travels on its cache object, so interleaved generations cannot mix; without a cache it lives within
one forward.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apet.adapters import host
from apet.adapters.base import Adapter
from apet.adapters.checks import refuse_continuation, refuse_training, valid_columns
from apet.adapters.encoder import EncoderLog
from apet.adapters.inputs import Encoded, StageView
from apet.adapters.layout import Block, Item, Layout, Segment, Unit, layout_from_ids, square, to_device
from apet.adapters.prompt_length import PromptLength
from apet.adapters.prompt_state import LayerGroup, PromptState, forget_prompt, keep_state, state_of, widened
from apet.adapters.size_bias import LARGEST, SizeBias
from apet.adapters.stages import Stage, StageRun, choose, equal, report, vision_choice, ways_of
from apet.adapters.vision import ImageRecord, VisionStage


@dataclass
class _Call:
    """One forward of the base model in flight."""

    prefill: bool
    cache: Any
    state: PromptState | None = None
    layout: Layout | None = None
    positions: Tensor | None = None
    shortened: np.ndarray | bool = False
    ids: Tensor | None = None
    items: Tensor | None = None
    records: tuple[ImageRecord, ...] | None = None
    entry: tuple[Tensor, Layout] | None = None
    taps: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    sizes: Tensor | None = None
    generated: int = 0
    runs: list[StageRun] = field(default_factory=list)
    overrides: dict[int, tuple[Tensor | None, tuple[Tensor, Tensor]]] = field(default_factory=dict)


class DecoderPatch:
    """The hooks of one model. `runs` and `prompt` describe the last prefill."""

    def __init__(
        self,
        adapter: Adapter,
        stages: Sequence[Stage],
        positions: str,
        vision: VisionStage | None,
        encoder: EncoderLog | None = None,
        size_bias: bool = False,
    ) -> None:
        self._adapter = adapter
        self._stages = {stage.layer: stage for stage in stages}
        self._keep_positions = positions == "keep"
        self._vision, self._encoder = vision, encoder
        rules = [rule for stage in stages for rule in (stage, stage.videos) if rule is not None and rule.select]
        self._asks = any(rule.select.needs for rule in rules)
        self._tapped = {rule.layer - 1 for rule in rules if any(-1 in layers for layers in rule.select.needs.values())}
        self._size_bias = size_bias
        self._sizes = size_bias or any(rule.select.reads_sizes for rule in rules)
        self._prompt_length = PromptLength(adapter.model)
        self._local = threading.local()
        self._base_names = host.argument_names(adapter.base_model.forward)
        self.prompt: tuple[Unit, ...] = ()
        self.rows = 0
        self.runs: tuple[StageRun, ...] | None = None

    def attach(self) -> list:
        """Register all hooks; returns their handles."""
        handles = [
            self._adapter.model.register_forward_pre_hook(refuse_training, with_kwargs=True),
            self._adapter.base_model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._adapter.base_model.register_forward_hook(self._leave, always_call=True),
            self._adapter.text_model.register_forward_pre_hook(self._before_text, with_kwargs=True),
        ]
        for index, layer in enumerate(self._adapter.layers):
            hook = _layer_hook(self, index)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        if self._asks:
            handles.append(self._prompt_length.attach())
        if self._size_bias:
            handles += SizeBias(self._adapter, self._log_sizes).attach()
        return handles

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = dict(zip(self._base_names, args, strict=False)) | kwargs
        items = kwargs.pop("visual_items", None)
        cache = host.cache_of(given)
        tokens = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
        state = state_of(cache)
        # A known cache and a single token are a decoding step; asking a static cache for its length would synchronise.
        decoding = state is not None and tokens.shape[1] == 1
        prefill = not decoding and (cache is None or int(host.cached_length(cache)) == 0)
        ids = given.get("input_ids")
        call = _Call(prefill, cache, ids=ids, items=items, generated=self._prompt_length.generated(ids, cache))
        if prefill:
            forget_prompt(cache)  # an emptied cache may carry the state of the prompt before
        else:
            refuse_continuation(given, tokens, cache, state)
            call.state = state
        self._local.call = call
        return args, kwargs

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        call, self._local.call = getattr(self._local, "call", None), None
        if call is not None and call.prefill and call.layout is not None:
            self.runs = tuple(call.runs)
            if call.state is not None:
                call.state.groups = [widened(group, call.cache) for group in call.state.groups]

    def _before_text(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = getattr(self._local, "call", None)
        if call is None:
            return None
        inputs = host.text_inputs(kwargs)
        if call.prefill:
            return args, self._prefill_text(call, kwargs, inputs)
        group = call.state.group_of(0) if call.state is not None else None
        if group is None:
            return None
        mask, positions = self._decode_inputs(call, group, inputs.embeds.shape[1])
        return args, host.replaced_text_inputs(kwargs, inputs._replace(mask=mask, positions=positions))

    def _prefill_text(self, call: _Call, kwargs: dict, inputs: host.TextInputs) -> dict:
        """Find the images, decide what every stage will drop, and run the stage in front of layer 0."""
        embeds = inputs.embeds
        call.records = self._vision.records if self._vision is not None else None
        call.layout = self._read_layout(call, embeds, inputs.mask)
        self.prompt, self.rows, self.runs = tuple(call.layout.units(_by_item)), embeds.shape[0], None
        if not self.prompt:
            call.runs.extend(StageRun(stage, (), (), ()) for stage in self._stages.values())
            return kwargs
        call.positions = self._rotary_positions(inputs.positions, embeds)
        last = to_device(call.layout.last_valid, embeds.device).view(-1, 1).expand(*call.positions.shape[:-1], 1)
        call.state = PromptState(embeds.shape[1], call.positions.gather(-1, last))
        if self._sizes:
            call.sizes = torch.ones(embeds.shape[:2], device=embeds.device)
        call.entry = (embeds, call.layout) if self._asks else None
        stage = self._stages.get(0)
        if stage is None:
            return kwargs
        before = call.layout
        embeds, source = self._run_stage(call, stage, embeds)
        if source is None:
            return kwargs
        call.entry = (embeds, call.layout) if self._asks else None
        kwargs = self._adapter.shorten_inputs(kwargs, before, call.layout, source)
        mask = call.state.groups[-1].mask
        if mask is None and call.cache is None:
            # Without cache and mask the text model would take gaps in the positions for packed sequences.
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return host.replaced_text_inputs(kwargs, host.TextInputs(embeds, mask, call.positions))

    def before_layer(self, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Pre-hook of decoder layer `index`."""
        call = getattr(self._local, "call", None)
        if call is None:
            return None
        if index == 0:
            cache = host.check_cache(call.cache, args, kwargs)
            if call.prefill and call.state is not None and cache is not None:
                call.cache = cache
                keep_state(cache, call.state)
        if call.state is None:
            return None
        hidden = host.layer_hidden(args, kwargs)
        if call.prefill:
            stage = self._stages.get(index) if index > 0 else None
            if stage is not None:
                group = call.state.group_of(index)
                rotary = host.layer_rotary(kwargs)
                if group is not None and group.first > 0:
                    _, rotary = call.overrides[group.first]
                hidden, _ = self._run_stage(call, stage, hidden, rotary)
        group = call.state.group_of(index)
        if group is not None and group.first > 0:
            if group.first not in call.overrides:
                call.overrides[group.first] = self._layer_inputs(call, group, hidden)
            kwargs = host.with_layer_inputs(kwargs, *call.overrides[group.first])
        if call.prefill and index in self._tapped:
            call.taps[index] = hidden, host.layer_rotary(kwargs)
        return host.with_hidden(args, kwargs, hidden)

    def _rotary_positions(self, positions: Tensor | None, embeds: Tensor) -> Tensor:
        """The text model's positions (B, L), or (3, B, L) with M-RoPE."""
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device).unsqueeze(0)
        axes = self._adapter.position_axes
        if axes == 1:
            return positions.expand(embeds.shape[0], -1)
        # A row in front of the three is the text position, which no rotary embedding reads.
        return positions[-axes:].expand(axes, embeds.shape[0], -1)

    def _run_stage(
        self, call: _Call, stage: Stage, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Shorten `hidden` (B, L, D) at a stage; returns it and its old columns (B, L'), None if none was dropped.

        `rotary` are the rotary embeddings of its columns, which the stage in front of layer 0 does not have.
        """
        call.layout = call.layout.joined(lambda segment: stage.rule(segment).pool == "segment")
        units = call.layout.units(stage.unit_key)
        if stage.select is None:
            choices = [vision_choice(call.records[unit.item], unit, hidden.device) for unit in units]
        else:
            choices = choose(stage, units, hidden, call.sizes, self._view(call, stage, hidden, rotary))
        call.runs.append(report(stage, self.prompt, units, choices))
        if all(choice.count == unit.length for choice, unit in zip(choices, units, strict=True)):
            return hidden, None
        move = call.layout.shorten(ways_of(call.layout, units, choices))
        source = to_device(move.source, hidden.device)
        new_columns = dict(zip(call.layout.blocks(), move.places, strict=True))
        places = [np.concatenate([new_columns[block] for block in unit.blocks]) for unit in units]
        for members in equal([choice.way if isinstance(choice.way, int) else None for choice in choices]):
            # Here the host knows how many columns stay; which ones is filled in on the device.
            indices = torch.stack([choices[member].indices for member in members]).to(hidden.device)
            starts = torch.tensor([[units[member].blocks[0].start] for member in members], device=hidden.device)
            rows = np.array([[units[member].row] for member in members])
            columns = np.stack([places[member] for member in members])
            source[to_device(rows, hidden.device), to_device(columns, hidden.device)] = starts + indices
        packed = _take(hidden, source)
        sizes = None if call.sizes is None else call.sizes.gather(1, source)
        for unit, choice, columns in zip(units, choices, places, strict=True):
            if choice.tokens is not None:
                packed[unit.row, to_device(columns[choice.places], hidden.device)] = choice.tokens
            if choice.sizes is not None:
                at = columns if choice.places is None else columns[choice.places]
                sizes[unit.row, to_device(at, hidden.device)] = choice.sizes
        call.sizes = sizes
        call.shortened = call.shortened | (move.layout.valid.sum(1) < call.layout.valid.sum(1))
        call.layout = move.layout
        self._open_group(call, stage, source, hidden.device)
        if call.layout.has_padding:
            packed = packed * call.state.groups[-1].mask.unsqueeze(-1)
        return packed, source

    def _view(
        self, call: _Call, stage: Stage, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> StageView | None:
        """What methods may ask for at a stage; None if none asks for anything."""
        if not self._asks:
            return None
        return StageView(
            self._adapter.layers, self._adapter.text_model.norm, stage.layer, hidden, call.layout, rotary,
            call.taps.get(stage.layer - 1), call.entry, self._encoded() if stage.layer == 0 else (), call.generated,
        )  # fmt: skip

    def _encoded(self) -> list[Encoded | None]:
        """What the tower did to the images and to the videos of the prompt."""
        if self._encoder is not None:
            return [self._encoder.encoded(kind) for kind in range(len(self._adapter.placeholder_ids))]
        return [self._vision.encoded]

    def _open_group(self, call: _Call, stage: Stage, source: Tensor, device: torch.device) -> None:
        """Start the layer group behind a stage that dropped tokens: its mask and positions."""
        layout = call.layout
        valid = to_device(layout.valid, device)
        moved = source.expand(*call.positions.shape[:-1], -1)
        kept, last = call.positions.gather(-1, moved).masked_fill(~valid, 0), call.state.original_last
        if not self._keep_positions:
            compact = (valid.long().cumsum(-1) - 1).clamp(min=0)
            if self._adapter.position_axes > 1:
                # Counting would change rows that lost nothing: their answers must not depend on the rest of the batch.
                shortened = to_device(call.shortened, device).unsqueeze(-1)
                last = torch.where(shortened, compact[:, -1:], last)
                compact = torch.where(shortened, compact, kept)
            else:
                last = compact[:, -1:]
            kept = compact
        call.positions = kept
        mask = valid if layout.has_padding else None
        log_sizes = call.sizes.clamp(min=1, max=LARGEST).log() if self._size_bias else None
        call.state.groups.append(LayerGroup(stage.layer, layout.length, mask, last + 1 - layout.length, log_sizes))

    def _log_sizes(self, layer: int, keys: int) -> Tensor | None:
        """Log sizes (B, keys) in a layer of the forward in flight; generated tokens count as one."""
        call = getattr(self._local, "call", None)
        group = call.state.group_of(layer) if call is not None and call.state is not None else None
        if group is None or group.log_sizes is None:
            return None
        return nn.functional.pad(group.log_sizes, (0, keys - group.log_sizes.shape[1]))

    def _layer_inputs(
        self, call: _Call, group: LayerGroup, hidden: Tensor
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
        """Attention mask and rotary embeddings of the layers of a group, in prefill or decoding."""
        if call.prefill:
            mask, positions = group.mask, call.positions
            if mask is None and call.cache is None:
                mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        else:
            mask, positions = self._decode_inputs(call, group, hidden.shape[1])
        text_model = self._adapter.text_model
        mask = host.causal_mask(text_model, hidden, mask, call.cache, group.first)
        return mask, host.rotary(text_model, hidden, positions)

    def _decode_inputs(self, call: _Call, group: LayerGroup, queries: int) -> tuple[Tensor | None, Tensor]:
        """2-D mask (None without padding) and positions (B, q) of a step on a filled cache."""
        past = host.cached_length(call.cache, group.first)
        mask = group.mask
        if mask is not None:
            missing = host.key_length(call.cache, group.first, queries) - mask.shape[1]
            mask = nn.functional.pad(mask, (0, missing), value=True) if missing else mask
        return mask, group.offset + past + torch.arange(queries, device=group.offset.device)

    def _read_layout(self, call: _Call, embeds: Tensor, mask: Any) -> Layout:
        """Roles of the prompt's columns: from the caller's `visual_items`, or from placeholder ids.

        Raises:
            ValueError: Images that cannot be found in the prompt, or that this model did not encode.
        """
        if call.items is not None:
            known = [_item(record) for record in call.records or ()]
            segments = tuple(Segment(index, False, index, item.grid, item.crops) for index, item in enumerate(known))
            return Layout(call.items.cpu().numpy(), segments=segments).with_lines([item.lines for item in known])
        if call.ids is None:
            if self._stages:
                raise ValueError(
                    "a patched model cannot find the images in inputs_embeds; pass input_ids with pixel_values instead"
                )
            return Layout(np.full(embeds.shape[:2], -1))
        kinds = torch.full_like(call.ids, -1)
        for kind, placeholder in enumerate(self._adapter.placeholder_ids):
            kinds = kinds.masked_fill(call.ids == placeholder, kind)
        valid = valid_columns(mask, call.cache, kinds >= 0)
        kinds, valid = torch.stack([kinds, valid.to(kinds)]).cpu().numpy()
        encoded = self._encoded_items(call)
        for kind, items in enumerate(encoded):
            if items is None and (kinds == kind).any():
                raise ValueError(
                    "the prompt has images that this model did not encode; pass pixel_values to a patched model"
                )
        return layout_from_ids(
            kinds, valid.astype(bool), [items or () for items in encoded], self._adapter.runs_are_items
        )

    def _encoded_items(self, call: _Call) -> list[Sequence[Item] | None]:
        """Per kind of placeholder the images or videos of the last encoder call, None where none was encoded."""
        if self._encoder is not None:
            return [self._encoder.items(kind) for kind in range(len(self._adapter.placeholder_ids))]
        if call.records is None:
            return [None]
        return [[_item(record) for record in call.records]]


def _layer_hook(patch: DecoderPatch, index: int):
    return lambda module, args, kwargs: patch.before_layer(index, args, kwargs)


def _item(record: ImageRecord) -> Item:
    """An image that the projector hooks have seen."""
    layout = record.layout
    grid = square(layout.length) if record.is_plain else None
    return Item((len(layout.columns),), layout.lines, grid=grid, crops=layout.crops)


def _by_item(block: Block) -> int:
    return block.item


def _take(hidden: Tensor, source: Tensor) -> Tensor:
    return hidden.gather(1, source.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
