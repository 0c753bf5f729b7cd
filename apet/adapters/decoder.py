"""The one decoder-side patch: shortens sequences before chosen layers, through forward pre-hooks only.

No forward is replaced. Hooks sit on the base model (what kind of call is this), on the text model (stage before layer
0) and on every decoder layer (later stages, and what all layers behind them must see instead of the text model's
values). Where a stage dropped tokens, all later layers get a sequence packed to the right, a mask of their own length
and positions of their own; each cache layer then simply stores fewer tokens.

State of a prompt travels on its cache object, so interleaved generations cannot mix; without a cache it lives within
one forward.
"""

import inspect
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from apet.adapters.base import Adapter
from apet.adapters.layout import Block, Layout, layout_from_ids, to_device
from apet.adapters.vision import Select, VisionRecord, VisionStage, budget_for

_STATE = "_apet_state"


@dataclass(frozen=True)
class Stage:
    """One place where sequences are shortened.

    Attributes:
        name: "vision" or "layer L".
        layer: 0-based index of the layer in front of which it acts.
        budget: Tokens per image: count, share (float), one count per image, or None for all.
        select: The method, or None where the projector hooks have already compressed the rows.
    """

    name: str
    layer: int
    budget: int | float | Sequence[int] | None
    select: Select | None


@dataclass(frozen=True)
class StageRun:
    """What a stage did: blocks that entered, tokens kept of each, and their positions relative to the block."""

    stage: Stage
    blocks: tuple[Block, ...]
    kept: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Group:
    """Consecutive layers that see the same tokens.

    Attributes:
        first: 0-based first layer.
        length: Prompt columns, padding included.
        mask: (B, length) bool, or None without padding.
        last: (B, 1) int64 position of the last prompt token.
    """

    first: int
    length: int
    mask: Tensor | None
    last: Tensor


@dataclass
class _State:
    """What decoding must know about a compressed prompt.

    Attributes:
        groups: Layer groups whose inputs differ from what the text model believes, by first layer.
        original_length: Columns of the prompt before compression.
        original_last: Largest position of the prompt before compression.
    """

    original_length: int
    original_last: Tensor
    groups: list[_Group] = field(default_factory=list)

    def group_of(self, layer: int) -> _Group | None:
        """The group that holds `layer`, None where the text model's own values are right."""
        return next((group for group in reversed(self.groups) if group.first <= layer), None)


@dataclass
class _Call:
    """One forward of the base model in flight."""

    prefill: bool
    cache: Any
    state: _State | None = None
    layout: Layout | None = None
    positions: Tensor | None = None
    ids: Tensor | None = None
    items: Tensor | None = None
    runs: list[StageRun] = field(default_factory=list)
    overrides: dict[int, tuple[Tensor | None, tuple[Tensor, Tensor]]] = field(default_factory=dict)


class DecoderPatch:
    """The hooks of one model. `runs` and `prompt` describe the last prefill."""

    def __init__(self, adapter: Adapter, stages: Sequence[Stage], positions: str, vision: VisionStage | None) -> None:
        self._adapter = adapter
        self._stages = {stage.layer: stage for stage in stages}
        self._keep_positions = positions == "keep"
        self._vision = vision
        self._local = threading.local()
        self._base_names = list(inspect.signature(adapter.base_model.forward).parameters)
        self.prompt: tuple[Block, ...] = ()
        self.rows = 0
        self.runs: tuple[StageRun, ...] | None = None

    def attach(self) -> list:
        """Register all hooks; returns their handles."""
        handles = [
            self._adapter.model.register_forward_pre_hook(_refuse_training, with_kwargs=True),
            self._adapter.base_model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._adapter.base_model.register_forward_hook(self._leave, always_call=True),
            self._adapter.text_model.register_forward_pre_hook(self._before_text, with_kwargs=True),
        ]
        for index, layer in enumerate(self._adapter.layers):
            hook = _layer_hook(self, index)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        return handles

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = dict(zip(self._base_names, args, strict=False)) | kwargs
        items = kwargs.pop("visual_items", None)
        cache = given.get("past_key_values")
        tokens = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
        state = getattr(cache, _STATE, None)
        # A known cache and a single token are a decoding step; asking a static cache for its length would synchronise.
        decoding = state is not None and tokens.shape[1] == 1
        prefill = not decoding and (cache is None or int(cache.get_seq_length()) == 0)
        call = _Call(prefill, cache, ids=given.get("input_ids"), items=items)
        if not prefill:
            _refuse_continuation(given, tokens, cache, state)
            call.state = state
        self._local.call = call
        return args, kwargs

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        call, self._local.call = getattr(self._local, "call", None), None
        if call is not None and call.prefill and call.layout is not None:
            self.runs = tuple(call.runs)

    def _before_text(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = getattr(self._local, "call", None)
        if call is None or kwargs.get("inputs_embeds") is None:
            return None
        if call.prefill:
            return args, self._prefill_text(call, kwargs)
        group = call.state.group_of(0) if call.state is not None else None
        if group is None:
            return None
        mask, positions = self._decode_inputs(call, group, kwargs["inputs_embeds"].shape[1])
        return args, kwargs | {"attention_mask": mask, "position_ids": positions}

    def _prefill_text(self, call: _Call, kwargs: dict) -> dict:
        """Find the images, decide what every stage will drop, and run the stage in front of layer 0."""
        embeds = kwargs["inputs_embeds"]
        record = self._vision.record if self._vision is not None else None
        call.layout = self._read_layout(call, embeds, kwargs.get("attention_mask"), record)
        blocks = call.layout.blocks()
        self.prompt, self.rows, self.runs = tuple(blocks), embeds.shape[0], None
        if not self._drops_anything(blocks):
            call.runs.extend(_untouched(stage, blocks, embeds.device) for stage in self._stages.values())
            return kwargs
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device).unsqueeze(0)
        call.positions = positions.expand(embeds.shape[0], -1)
        valid = to_device(call.layout.valid, embeds.device)
        call.state = _State(embeds.shape[1], torch.where(valid, call.positions, -1).amax(-1, keepdim=True))
        stage = self._stages.get(0)
        if stage is None:
            return kwargs
        origin = None if record is None or stage.select is not None else record.kept
        embeds, shortened = self._run_stage(call, stage, embeds, origin)
        if not shortened:
            return kwargs
        mask = call.state.groups[-1].mask
        if mask is None and call.cache is None:
            # Without cache and mask the text model would take gaps in the positions for packed sequences.
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return kwargs | {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": call.positions}

    def before_layer(self, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Pre-hook of decoder layer `index`."""
        call = getattr(self._local, "call", None)
        if call is None or call.state is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if call.prefill:
            if index == 0 and kwargs.get("past_key_values") is not None:
                call.cache = kwargs["past_key_values"]
                setattr(call.cache, _STATE, call.state)
            stage = self._stages.get(index) if index > 0 else None
            if stage is not None:
                hidden, _ = self._run_stage(call, stage, hidden)
        group = call.state.group_of(index)
        if group is not None and group.first > 0:
            if group.first not in call.overrides:
                call.overrides[group.first] = self._layer_inputs(call, group, hidden)
            mask, embeddings = call.overrides[group.first]
            # Positions are needed for the rotary embeddings only; handed to the layers they would only make
            # FlashAttention look for packed sequences.
            kwargs = kwargs | {"attention_mask": mask, "position_embeddings": embeddings, "position_ids": None}
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    def _run_stage(
        self, call: _Call, stage: Stage, hidden: Tensor, origin: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, bool]:
        """Shorten `hidden` (B, L, D) at a stage; returns it and whether anything was dropped.

        `origin` gives, per image, the positions of rows that the vision hooks have already compressed and put first.
        """
        blocks = call.layout.blocks()
        keep = self._keep_counts(stage, blocks)
        if all(count == block.length for count, block in zip(keep, blocks, strict=True)):
            call.runs.append(_untouched(stage, blocks, hidden.device))
            return hidden, False
        move = call.layout.shorten(keep)
        source = to_device(move.source, hidden.device)
        packed = _take(hidden, source)
        moved = move.layout.blocks()
        kept: list[Tensor] = [torch.empty(0)] * len(blocks)
        for members in _equal(blocks, keep):
            old, new = [blocks[member] for member in members], [moved[member] for member in members]
            count = keep[members[0]]
            if origin is not None:
                indices = torch.stack([origin[block.item][:count].to(hidden.device) for block in old])
            elif count == old[0].length:
                indices = torch.arange(count, device=hidden.device).expand(len(old), -1)
            else:
                rows, columns = _span(old, old[0].length, hidden.device)
                result = stage.select(hidden[rows, columns], count)
                indices = result.indices
                rows, columns = _span(new, count, hidden.device)
                packed[rows, columns] = result.tokens
            rows, columns = _span(new, count, hidden.device)
            starts = torch.tensor([block.start for block in old], device=hidden.device).unsqueeze(1)
            source[rows, columns] = starts + indices
            for position, member in enumerate(members):
                kept[member] = indices[position]
        call.runs.append(StageRun(stage, tuple(blocks), tuple(kept)))
        call.layout = move.layout
        self._open_group(call, stage, source, hidden.device)
        if call.layout.has_padding:
            packed = packed * call.state.groups[-1].mask.unsqueeze(-1)
        return packed, True

    def _open_group(self, call: _Call, stage: Stage, source: Tensor, device: torch.device) -> None:
        """Start the layer group behind a stage that dropped tokens: its mask and positions."""
        layout = call.layout
        valid = to_device(layout.valid, device)
        if self._keep_positions:
            call.positions = call.positions.gather(1, source).masked_fill(~valid, 0)
            last = call.state.original_last
        else:
            call.positions = (valid.long().cumsum(-1) - 1).clamp(min=0)
            last = call.positions[:, -1:]
        mask = valid if layout.has_padding else None
        call.state.groups.append(_Group(stage.layer, layout.length, mask, last))

    def _layer_inputs(self, call: _Call, group: _Group, hidden: Tensor) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
        """Attention mask and rotary embeddings of the layers of a group, in prefill or decoding."""
        if call.prefill:
            mask, positions = group.mask, call.positions
            if mask is None and call.cache is None:
                mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        else:
            mask, positions = self._decode_inputs(call, group, hidden.shape[1])
        mask = create_causal_mask(
            config=self._adapter.text_model.config,
            inputs_embeds=hidden,
            attention_mask=mask,
            past_key_values=call.cache,
            layer_idx=group.first,
        )
        return mask, self._adapter.text_model.rotary_emb(hidden, positions)

    def _decode_inputs(self, call: _Call, group: _Group, queries: int) -> tuple[Tensor | None, Tensor]:
        """2-D mask (None without padding) and positions (B, q) of a step on a filled cache."""
        past = call.cache.get_seq_length(group.first)
        steps = torch.arange(1, queries + 1, device=group.last.device) + (past - group.length)
        mask = group.mask
        if mask is not None:
            layer = call.cache.layers[group.first]
            total = layer.max_cache_len if layer.is_compileable else past + queries
            mask = nn.functional.pad(mask, (0, total - group.length), value=True)
        return mask, group.last + steps

    def _drops_anything(self, blocks: Sequence[Block]) -> bool:
        return any(
            count < block.length
            for stage in self._stages.values()
            for count, block in zip(self._keep_counts(stage, blocks), blocks, strict=True)
        )

    def _keep_counts(self, stage: Stage, blocks: Sequence[Block]) -> list[int]:
        images = len({block.item for block in blocks})
        return [budget_for(stage.budget, block.length, block.item, images) for block in blocks]

    def _read_layout(self, call: _Call, embeds: Tensor, mask: Any, record: VisionRecord | None) -> Layout:
        """Roles of the prompt's columns: from the caller's `visual_items`, or from placeholder ids."""
        if call.items is not None:
            return Layout(call.items.cpu().numpy())
        if call.ids is None:
            if self._stages:
                raise ValueError(
                    "a patched model cannot find the images in inputs_embeds; pass input_ids with pixel_values instead"
                )
            return Layout(np.full(embeds.shape[:2], -1))
        visual = torch.isin(call.ids, torch.tensor(self._adapter.placeholder_ids, device=call.ids.device))
        valid = _valid_columns(mask, call.cache, visual)
        visual, valid = torch.stack([visual, valid.to(visual.device)]).cpu().numpy()
        return layout_from_ids(visual, valid, self._adapter.split_run, len(record.kept) if record is not None else None)


def _layer_hook(patch: DecoderPatch, index: int):
    return lambda module, args, kwargs: patch.before_layer(index, args, kwargs)


def _refuse_training(module: nn.Module, args: tuple, kwargs: dict) -> None:
    if module.training:
        raise ValueError("a patched model is for inference; call model.eval(), or apet.remove_patch(model) to train it")
    if kwargs.get("labels") is not None:
        raise ValueError("labels do not fit a shortened sequence; apet.remove_patch(model) before computing a loss")


def _refuse_continuation(given: dict, tokens: Tensor, cache: Any, state: _State | None) -> None:
    """Raise where a filled cache is continued in a way that cannot be right."""
    if given.get("pixel_values") is not None or given.get("mm_encoder_outputs"):
        raise ValueError(
            "a patched model compresses images in the first forward of a prompt; this cache already holds one. "
            "Start a new cache for a conversation with new images (and leave out prefill_chunk_size)"
        )
    group = state.group_of(0) if state is not None else None
    if group is None or tokens.shape[1] == 1:
        return
    fed = int(cache.get_seq_length()) - group.length + tokens.shape[1]
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        consistent = mask.shape[1] == state.original_length + fed
    elif positions is not None:
        consistent = int(positions.max()) == int(state.original_last.max()) + fed
    else:
        consistent = True
    if not consistent:
        raise ValueError(
            "this cache holds a compressed prompt, so it is shorter than the conversation and generate() would feed "
            "old tokens again; pass only the new input_ids together with an attention_mask for the whole conversation, or "
            "start a new cache"
        )


def _valid_columns(mask: Any, cache: Any, visual: Tensor) -> Tensor:
    """(B, L) bool, False on padding, from any mask the text model can be given.

    Raises:
        ValueError: A 4-D mask that `generate` did not make.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if mask is None:
        return torch.ones_like(visual)
    if mask.dim() == 2:
        return mask[:, : visual.shape[1]].bool()
    if not getattr(cache, "is_compileable", False):
        raise ValueError("a patched model takes 2-D attention masks (batch, length); it cannot shorten a 4-D one")
    # generate() builds 4-D masks for static caches; the last query sees exactly the real tokens.
    row = mask[:, 0, -1, : visual.shape[1]]
    return row if row.dtype == torch.bool else row == 0


def _untouched(stage: Stage, blocks: Sequence[Block], device: torch.device) -> StageRun:
    return StageRun(stage, tuple(blocks), tuple(torch.arange(block.length, device=device) for block in blocks))


def _equal(blocks: Sequence[Block], keep: Sequence[int]) -> list[list[int]]:
    """Indices of blocks grouped by (length, tokens kept), so that each group is one batch."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (block, count) in enumerate(zip(blocks, keep, strict=True)):
        groups.setdefault((block.length, count), []).append(index)
    return list(groups.values())


def _span(blocks: Sequence[Block], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column indices (M, length) of the first `length` columns of every block."""
    rows = np.array([[block.row] for block in blocks])
    columns = np.array([[block.start] for block in blocks]) + np.arange(length)
    return to_device(rows, device), to_device(columns, device)


def _take(hidden: Tensor, source: Tensor) -> Tensor:
    return hidden.gather(1, source.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
