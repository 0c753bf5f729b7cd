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
from apet.adapters.layout import Block, Layout, follows, layout_from_ids, to_device
from apet.adapters.vision import Budget, ImageRecord, Select, VisionStage, budget_for

_STATE = "_apet_state"


@dataclass(frozen=True)
class Stage:
    """One place where sequences are shortened.

    Attributes:
        name: "vision" or "layer L".
        layer: 0-based index of the layer in front of which it acts.
        budget: Tokens per image: count, share (float), one count per image, or None for all.
        select: The method, or None where the projector hooks have already compressed the rows.
        window: Only the first so many tokens of an image take part, the others stay (the published accounting of anyres
            images); None for all of them.
    """

    name: str
    layer: int
    budget: Budget
    select: Select | None
    window: int | None = None


@dataclass(frozen=True)
class StageRun:
    """What a stage did: blocks that entered, tokens kept of each, and their positions relative to the block."""

    stage: Stage
    blocks: tuple[Block, ...]
    kept: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Choice:
    """What a stage keeps of one block.

    Attributes:
        way: Number of columns kept where only the device knows which, or the columns themselves.
        indices: (K,) kept positions relative to the block.
        tokens: (K', D) new content of kept tokens, None where they stay as they are.
        places: (K',) columns of the shortened block that `tokens` go to.
    """

    way: int | np.ndarray
    indices: Tensor
    tokens: Tensor | None = None
    places: np.ndarray | None = None

    @property
    def count(self) -> int:
        """Columns kept."""
        return self.way if isinstance(self.way, int) else len(self.way)


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
    records: tuple[ImageRecord, ...] | None = None
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
        call.records = self._vision.records if self._vision is not None else None
        call.layout = self._read_layout(call, embeds, kwargs.get("attention_mask"))
        blocks = call.layout.blocks()
        self.prompt, self.rows, self.runs = tuple(blocks), embeds.shape[0], None
        if not blocks:
            call.runs.extend(StageRun(stage, (), ()) for stage in self._stages.values())
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
        embeds, shortened = self._run_stage(call, stage, embeds)
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

    def _run_stage(self, call: _Call, stage: Stage, hidden: Tensor) -> tuple[Tensor, bool]:
        """Shorten `hidden` (B, L, D) at a stage; returns it and whether anything was dropped."""
        blocks = call.layout.blocks()
        if stage.select is None:
            choices = [_vision_choice(call.records[block.item], block, hidden.device) for block in blocks]
        else:
            choices = self._select(call, stage, blocks, hidden)
        call.runs.append(StageRun(stage, tuple(blocks), tuple(choice.indices for choice in choices)))
        if all(choice.count == block.length for choice, block in zip(choices, blocks, strict=True)):
            return hidden, False
        move = call.layout.shorten([choice.way for choice in choices])
        source = to_device(move.source, hidden.device)
        moved = move.layout.blocks()
        for members in _equal([choice.way if isinstance(choice.way, int) else None for choice in choices]):
            # Here the host knows how many columns stay; which ones is filled in on the device.
            indices = torch.stack([choices[member].indices for member in members]).to(hidden.device)
            starts = torch.tensor([[blocks[member].start] for member in members], device=hidden.device)
            rows, columns = _span([moved[member] for member in members], np.arange(indices.shape[1]), hidden.device)
            source[rows, columns] = starts + indices
        packed = _take(hidden, source)
        for block, choice in zip(moved, choices, strict=True):
            if choice.tokens is not None:
                packed[block.row, to_device(block.start + choice.places, hidden.device)] = choice.tokens
        call.layout = move.layout
        self._open_group(call, stage, source, hidden.device)
        if call.layout.has_padding:
            packed = packed * call.state.groups[-1].mask.unsqueeze(-1)
        return packed, True

    def _select(self, call: _Call, stage: Stage, blocks: Sequence[Block], hidden: Tensor) -> list[_Choice]:
        """Let the method choose, for all blocks with equally many candidates and the same budget at once."""
        images = len({block.item for block in blocks})
        candidates = [_candidates(stage, block, call.layout.block_lines(block)) for block in blocks]
        counts = [
            budget_for(stage.budget, len(columns), block.item, images)
            for block, columns in zip(blocks, candidates, strict=True)
        ]
        choices = [_whole(block, hidden.device) for block in blocks]
        sizes = [(len(columns), count) for columns, count in zip(candidates, counts, strict=True)]
        for members in _equal([size if size[1] < size[0] else None for size in sizes]):
            columns = np.stack([blocks[member].start + candidates[member] for member in members])
            rows = to_device(np.array([[blocks[member].row] for member in members]), hidden.device)
            result = stage.select(hidden[rows, to_device(columns, hidden.device)], counts[members[0]])
            for position, member in enumerate(members):
                choices[member] = _method_choice(
                    result.tokens[position],
                    result.indices[position],
                    blocks[member],
                    candidates[member],
                    call.layout.block_lines(blocks[member]),
                )
        return choices

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

    def _read_layout(self, call: _Call, embeds: Tensor, mask: Any) -> Layout:
        """Roles of the prompt's columns: from the caller's `visual_items`, or from placeholder ids.

        Raises:
            ValueError: Images that cannot be found in the prompt, or that this model did not encode.
        """
        lines = [record.layout.lines for record in call.records or ()]
        if call.items is not None:
            return Layout(call.items.cpu().numpy()).with_lines(lines)
        if call.ids is None:
            if self._stages:
                raise ValueError(
                    "a patched model cannot find the images in inputs_embeds; pass input_ids with pixel_values instead"
                )
            return Layout(np.full(embeds.shape[:2], -1))
        visual = torch.isin(call.ids, torch.tensor(self._adapter.placeholder_ids, device=call.ids.device))
        valid = _valid_columns(mask, call.cache, visual)
        visual, valid = torch.stack([visual, valid.to(visual.device)]).cpu().numpy()
        if call.records is None and visual.any():
            raise ValueError(
                "the prompt has images that this model did not encode; pass pixel_values to a patched model"
            )
        lengths = [len(record.layout.columns) for record in call.records or ()]
        return layout_from_ids(visual, valid, lengths).with_lines(lines)


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
            "old tokens again; pass only the new input_ids with an attention_mask for the whole conversation, or start "
            "a new cache"
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


def _whole(block: Block, device: torch.device) -> _Choice:
    return _Choice(block.length, torch.arange(block.length, device=device))


def _vision_choice(record: ImageRecord, block: Block, device: torch.device) -> _Choice:
    """What the projector hooks kept of an image, as columns of its block."""
    if record.kept is None:
        return _whole(block, device)
    if record.is_plain and block.length == record.layout.length:
        return _Choice(len(record.kept[0]), record.kept[0])
    columns = record.kept_columns()
    columns = columns[columns < block.length]
    return _Choice(columns, torch.from_numpy(columns))


def _candidates(stage: Stage, block: Block, lines: np.ndarray | None) -> np.ndarray:
    """Columns of a block that a stage chooses from: newlines follow their lines and are no candidates."""
    if stage.window is not None:
        return np.arange(min(stage.window, block.length))
    return np.arange(block.length) if lines is None else np.flatnonzero(lines > -2)


def _method_choice(
    tokens: Tensor, indices: Tensor, block: Block, candidates: np.ndarray, lines: np.ndarray | None
) -> _Choice:
    """The method's decision (`indices` among the candidates, ascending) as columns of the block."""
    if len(candidates) == block.length:
        return _Choice(len(indices), indices, tokens, np.arange(len(indices)))
    chosen = candidates[indices.cpu().numpy()]
    keep = np.ones(block.length, dtype=bool)
    keep[candidates] = False
    keep[chosen] = True
    if lines is not None and len(candidates) == (lines > -2).sum():
        keep = (keep & (lines > -2)) | follows(lines, keep & (lines > -2))
    columns = np.flatnonzero(keep)
    return _Choice(columns, torch.from_numpy(columns), tokens, np.searchsorted(columns, chosen))


def _equal(keys: Sequence[Any]) -> list[list[int]]:
    """Indices of equal keys, so that each group is one batch; None belongs to no group."""
    groups: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        if key is not None:
            groups.setdefault(key, []).append(index)
    return list(groups.values())


def _span(blocks: Sequence[Block], inside: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column indices (M, n) of the columns `inside` (n,) of every block."""
    rows = np.array([[block.row] for block in blocks])
    columns = np.array([[block.start] for block in blocks]) + inside
    return to_device(rows, device), to_device(columns, device)


def _take(hidden: Tensor, source: Tensor) -> Tensor:
    return hidden.gather(1, source.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
