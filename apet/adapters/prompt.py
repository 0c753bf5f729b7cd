"""One prompt through the decoder, from its embeddings to what the next token needs.

The base model's hook opens a `Forward` and passes it on as a keyword argument, which the host hands to its text model
and to every layer; so the state of a forward is with the forward, however many run at once or inside each other. In a
prefill the text model's hook finds the images (`_plan`), and the hooks in front of the layers run the stages
(`_run_stage`): what is kept, how the sequence becomes shorter, and for the layers behind it positions and a mask of
their own. What decoding must know goes onto the prompt's cache (`adapters.cache`).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apet.adapters import host
from apet.adapters.base import Adapter
from apet.adapters.cache import LayerGroup, PromptState, forget_prompt, keep_state, state_of, widened
from apet.adapters.copies import HostCopies, Reads
from apet.adapters.encoder import CARRIED
from apet.adapters.hooks import InFlight, PerThread, Removable, Wrapped
from apet.adapters.inputs import StageView
from apet.adapters.layout import Block, Item, Layout, Segment, Unit, layout_from_ids, to_device
from apet.adapters.size_bias import LARGEST, SizeBias
from apet.adapters.stages import Stage, StageRun, choose, gather, report
from apet.adapters.vision import Encoding
from apet.config import ApetConfig
from apet.result import CompressionResult, StageResult, TowerResult

# Keyword arguments of a base model that are the patch's own, not the host's.
_OWN = ("visual_items", "visual_encoding", host.RESULTS)


@dataclass(eq=False)
class Forward:
    """One forward of the base model: everything the patch knows of it.

    Attributes:
        given: Arguments of the base model, by name.
        cache: The cache it was given; in a prefill without one that of the text model.
        prefill: Whether a prompt begins; else it goes on from a filled cache.
        copies: What the host knows of the arguments, in a prefill.
        encoded: Per kind of placeholder (image, video) what an encoder call left.
        generated: Columns at the end that are no part of the prompt: without a cache, tokens generated before.
        state: What decoding must know of the prompt; None where nothing is compressed.
        layout: Roles of the columns, as they are now.
        prompt: The images and videos as they are in the prompt.
        positions: (B, L), or (3, B, L) with M-RoPE, of the columns.
        shortened: (B,) rows that have lost tokens.
        sizes: (B, L) image tokens behind every column, where anything asks for them.
        entry: What entered layer 0, and its layout, where methods ask for it.
        taps: Input and rotary embeddings of the layers in front of stages that ask for them.
        overrides: Per first layer of a group, mask and rotary embeddings of its layers.
        runs: What the stages did.
        makes_cache: Whether the text model is to make the cache.
        reached: Whether the text model and its first layer have seen the forward.
    """

    given: dict[str, Any]
    cache: Any
    prefill: bool
    copies: HostCopies | None = None
    encoded: dict[int, Encoding] = field(default_factory=dict)
    generated: int = 0
    state: PromptState | None = None
    layout: Layout | None = None
    prompt: tuple[Unit, ...] = ()
    positions: Tensor | None = None
    shortened: np.ndarray | bool = False
    sizes: Tensor | None = None
    entry: tuple[Tensor, Layout] | None = None
    taps: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    overrides: dict[int, tuple[Tensor | None, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    runs: list[StageRun] = field(default_factory=list)
    makes_cache: bool = False
    reached: bool = False

    @property
    def rows(self) -> int:
        """Sequences of the batch."""
        return self.layout.items.shape[0]

    def group_of(self, layer: int) -> LayerGroup | None:
        """The layers around `layer` whose inputs differ from what the text model believes."""
        return None if self.state is None else self.state.group_of(layer)


class PromptPatch:
    """The decoder-side hooks of one model.

    Args:
        adapter: The family.
        config: The configuration, for the results.
        stages: In the order of the layers.
        keep_positions: Surviving tokens keep their positions; else they are counted anew.
        size_bias: Put the sizes of tokens into the decoder's attention.
    """

    def __init__(
        self, adapter: Adapter, config: ApetConfig, stages: Sequence[Stage], keep_positions: bool, size_bias: bool
    ) -> None:
        self._adapter, self._config, self._keep_positions = adapter, config, keep_positions
        self._stages = {stage.layer: stage for stage in stages}
        rules = [rule for stage in stages for rule in (stage, stage.videos) if rule is not None and rule.select]
        self._asks = any(rule.select.needs for rule in rules)
        self._tapped = {rule.layer - 1 for rule in rules if any(-1 in layers for layers in rule.select.needs.values())}
        self._size_bias = size_bias
        self._sizes = size_bias or any(rule.select.reads_sizes for rule in rules)
        self._base_names = host.argument_names(adapter.base_model.forward)
        self._generating, self._last = InFlight(), PerThread()
        self.forwards, self.reads = InFlight(), Reads(adapter.model, adapter.base_model)

    @property
    def last(self) -> CompressionResult | None:
        """Result of this thread's last prefill."""
        return getattr(self._last, "result", None)

    def attach(self) -> list[Removable]:
        """Register all hooks; returns their handles."""
        model, base, text = self._adapter.model, self._adapter.base_model, self._adapter.text_model
        handles = [
            model.register_forward_pre_hook(self._enter_model, with_kwargs=True),
            model.register_forward_hook(self._leave_model, with_kwargs=True),
            base.register_forward_pre_hook(self._enter, with_kwargs=True),
            Wrapped(base, "forward", self._run),
            base.register_forward_hook(self._leave, with_kwargs=True),
            text.register_forward_pre_hook(self._before_text, with_kwargs=True),
        ]
        for index, layer in enumerate(self._adapter.layers):
            hook = functools.partial(self._before_layer, index)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        handles += [Wrapped(model, "generate", self._generate), *self.reads.attach()]
        handles += [Wrapped(model, name, _refuse_continuous) for name in host.CONTINUOUS if hasattr(model, name)]
        if self._size_bias:
            handles += SizeBias(self._adapter).attach()
        return handles

    # A forward begins and ends

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if module.training:
            raise ValueError(
                "a patched model is for inference; call model.eval(), or apet.remove_patch(model) to train it"
            )
        if kwargs.get("labels") is not None:
            raise ValueError("labels do not fit a shortened sequence; apet.remove_patch(model) before computing a loss")
        return args, {**kwargs, host.RESULTS: []}

    def _leave_model(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        for result in kwargs[host.RESULTS]:
            host.attach(output, CARRIED, result)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = host.by_name(self._base_names, args) | kwargs
        cache = host.cache_of(given)
        tokens = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
        state = state_of(cache)
        # A known cache and a single token are a decoding step; asking a static cache for its length would synchronise.
        decoding = state is not None and tokens.shape[1] == 1
        prefill = not decoding and (cache is None or int(host.cached_length(cache)) == 0)
        forward = Forward(given, cache, prefill)
        if prefill:
            forget_prompt(cache)  # an emptied cache may carry the state of the prompt before
            forward.copies = self.reads.begun(given)
            forward.generated = self._generated(given.get("input_ids"), cache)
        else:
            refuse_continuation(given, tokens, cache, state)
            forward.state = state
        own = {name: value for name, value in kwargs.items() if name not in _OWN}
        return args, {**own, host.PASSED: forward}

    def _run(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        forward: Forward = kwargs[host.PASSED]
        if not forward.prefill:
            return original(*args, **kwargs)
        with self.forwards.during(forward), self.reads.during(forward.copies):
            return original(*args, **kwargs)

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        forward: Forward = kwargs[host.PASSED]
        host.check_reached(forward.reached)
        if forward.prefill:
            self._finish_prefill(forward, output)

    @torch.compiler.disable
    def _finish_prefill(self, forward: Forward, output: Any) -> None:
        """Hand out the result, and make the state fit the cache it is on."""
        self._last.result = result = self._result(forward)
        host.attach(output, CARRIED, result)
        forward.given.get(host.RESULTS, []).append(result)
        if forward.state is not None:
            forward.state.groups = [widened(group, forward.cache) for group in forward.state.groups]

    def _generate(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        ids = host.prompt_ids(args, kwargs)
        copies = self.reads.begun(kwargs | {"input_ids": ids})
        with self._generating.during(None if ids is None else ids.shape[1]), self.reads.during(copies):
            return original(*args, **kwargs)

    def _generated(self, ids: Tensor | None, cache: Any) -> int:
        """Tokens of `ids` (B, L) behind the prompt, where `generate` works without a cache and gives all of them again.

        Methods that read the text must see the same text at every step, or the tokens they keep would change.
        """
        length = self._generating.top
        return 0 if ids is None or cache is not None or length is None else ids.shape[1] - length

    def _result(self, forward: Forward) -> CompressionResult:
        rows = forward.rows
        lengths = [item.length for item in forward.prompt]
        stages = [
            StageResult(
                run.stage.name,
                run.stage.layer,
                _by_row(run.items, [kept.detach() for kept in run.kept], rows),
                _by_row(run.items, run.lengths, rows),
            )
            for run in forward.runs
        ]
        tokens_in = _by_row(forward.prompt, lengths, rows)
        layers = len(self._adapter.layers)
        return CompressionResult(self._config, layers, tuple(stages), tokens_in, self._tower_results(forward))

    def _tower_sizes(self, forward: Forward, sizes: Tensor) -> Tensor:
        """Tokens (B, L) behind every column: more than one where the vision tower merged some."""
        for item in forward.prompt:
            origin = item.blocks[0].origin
            own = forward.encoded[int(origin.video)].token_sizes(origin.number, item.length)
            if own is not None:
                sizes[item.row, to_device(item.columns, sizes.device)] = own
        return sizes

    def _tower_results(self, forward: Forward) -> tuple[TowerResult, ...]:
        """What the tower stages left of the prompt's images and videos."""
        results = []
        for layer in sorted({cut.layer for encoding in forward.encoded.values() for cut in encoding.cuts}):
            found = []
            for item in forward.prompt:
                origin = item.blocks[0].origin
                encoding = forward.encoded[int(origin.video)]
                found += [cut.of(encoding.crops_of(origin.number)) for cut in encoding.cuts if cut.layer == layer]
            kept, sources = zip(*found, strict=True)
            by_row = (_by_row(forward.prompt, values, forward.rows) for values in (kept, sources))
            results.append(TowerResult(layer, *by_row))
        return tuple(results)

    # The text model and its layers

    def _before_text(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        forward: Forward | None = kwargs.get(host.PASSED)
        if forward is None:
            host.check_alone(self.forwards.top)
            return None
        inputs = host.text_inputs(kwargs)
        if forward.prefill:
            return args, self._prefill(forward, kwargs, inputs)
        group = forward.group_of(0)
        if group is None:
            return None
        mask, positions = self._decode_inputs(forward, group, inputs.embeds.shape[1])
        return args, host.replaced_text_inputs(kwargs, host.TextInputs(inputs.embeds, mask, positions))

    # Host arithmetic and a method's own loops are nothing that torch.compile could make faster.
    @torch.compiler.disable
    def _prefill(self, forward: Forward, kwargs: dict, inputs: host.TextInputs) -> dict:
        """Find the images, and run the stage in front of layer 0."""
        embeds = inputs.embeds
        forward.layout = self._plan(forward, embeds, inputs.mask)
        forward.prompt = tuple(forward.layout.units(_by_item))
        if not forward.prompt:
            forward.runs.extend(StageRun(stage, (), (), ()) for stage in self._stages.values())
            return kwargs
        forward.positions = self._rotary_positions(inputs.positions, embeds)
        last = to_device(forward.layout.last_valid, embeds.device).view(-1, 1).expand(*forward.positions.shape[:-1], 1)
        forward.state = PromptState(embeds.shape[1], forward.positions.gather(-1, last))
        if self._sizes:
            forward.sizes = self._tower_sizes(forward, torch.ones(embeds.shape[:2], device=embeds.device))
        forward.entry = (embeds, forward.layout) if self._asks else None
        forward.makes_cache = forward.cache is None and host.makes_cache(self._adapter.text_model, kwargs)
        before, source = forward.layout, None
        if 0 in self._stages:
            embeds, source = self._run_stage(forward, self._stages[0], embeds)
        if source is None:
            mask = self._known_mask(forward, embeds, inputs.mask)
            return host.replaced_text_inputs(kwargs, host.TextInputs(embeds, mask, inputs.positions))
        kwargs = self._adapter.shorten_inputs(kwargs, before, forward.layout, source)
        mask = self._known_mask(forward, embeds, forward.state.groups[-1].mask)
        if mask is None and forward.cache is None and not forward.makes_cache:
            # Without cache and mask the text model would take gaps in the positions for packed sequences.
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return host.replaced_text_inputs(kwargs, host.TextInputs(embeds, mask, forward.positions))

    def _known_mask(self, forward: Forward, embeds: Tensor, mask: Any) -> Any:
        """A mask for the text model that it need not read to see whether there is padding.

        Args:
            forward: The forward, with the layout of the columns.
            embeds: (B, L, D).
            mask: What it would be given; only one of shape (B, L) is exchanged.
        """
        if not isinstance(mask, Tensor) or mask.shape != embeds.shape[:2]:
            return mask
        if not forward.layout.has_padding:
            return None if forward.cache is not None or forward.makes_cache else mask
        text_model = self._adapter.text_model
        if not host.takes_prepared_mask(text_model):
            return mask
        return host.causal_mask(text_model, embeds, mask, forward.cache, 0, padded=True)

    def _before_layer(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if host.PASSED not in kwargs:
            return None
        kwargs = dict(kwargs)
        forward: Forward = kwargs.pop(host.PASSED)
        if index == 0:
            self._meet_cache(forward, args, kwargs)
        if forward.state is None:
            return args, kwargs
        hidden = host.layer_hidden(args, kwargs)
        if forward.prefill and index > 0 and index in self._stages:
            group, rotary = forward.group_of(index), host.layer_rotary(kwargs)
            if group is not None and group.first > 0:
                _, rotary = forward.overrides[group.first]
            hidden, _ = self._run_stage(forward, self._stages[index], hidden, rotary)
        group = forward.group_of(index)
        if group is not None and group.first > 0:
            if group.first not in forward.overrides:
                forward.overrides[group.first] = self._layer_inputs(forward, group, hidden)
            kwargs = host.with_layer_inputs(kwargs, *forward.overrides[group.first])
        if group is not None and group.log_sizes is not None:
            kwargs[host.SIZES] = group.log_sizes
        if forward.prefill and index in self._tapped:
            forward.taps[index] = hidden, host.layer_rotary(kwargs)
        return host.with_hidden(args, kwargs, hidden)

    def _meet_cache(self, forward: Forward, args: tuple, kwargs: dict) -> None:
        """In front of layer 0: the cache the layers get must be the one the patch goes by; the state goes onto it."""
        forward.reached = True
        cache = host.check_cache(forward.cache, args, kwargs)
        host.check_made(forward.makes_cache, cache)
        if forward.prefill and cache is not None:
            forward.cache = cache
            if forward.state is not None:
                keep_state(cache, forward.state)

    # Where are the images

    def _plan(self, forward: Forward, embeds: Tensor, mask: Any) -> Layout:
        """Roles of the prompt's columns: from the caller's `visual_items`, or from placeholder ids.

        Raises:
            ValueError: Images that cannot be found in the prompt, or that this model did not encode.
        """
        ids, items = forward.given.get("input_ids"), forward.given.get("visual_items")
        if items is not None:
            if forward.given.get("visual_encoding") is not None:  # a text has none
                forward.encoded[0] = forward.given["visual_encoding"]
            known = self._encoded(forward, 0, bool((items >= 0).any()))
            segments = tuple(Segment(index, False, index, item.grid, item.crops) for index, item in enumerate(known))
            return Layout(items.cpu().numpy(), segments=segments).with_lines([item.lines for item in known])
        if ids is None:
            raise ValueError(
                "a patched model cannot find the images in inputs_embeds; pass input_ids with pixel_values instead"
            )
        kinds = kinds_of(forward.copies.of(ids), self._adapter.placeholder_ids)
        valid = valid_columns(mask, forward.cache, forward.copies, kinds.shape)
        known = range(len(self._adapter.placeholder_ids))
        encoded = [self._encoded(forward, kind, bool((kinds == kind).any())) for kind in known]
        return layout_from_ids(kinds, valid, encoded, self._adapter.runs_are_items)

    def _encoded(self, forward: Forward, kind: int, needed: bool) -> Sequence[Item]:
        """The images (kind 0) or videos (1) that the prompt's placeholders stand for."""
        encoding = forward.encoded.get(kind) or getattr(host.encoder_output(forward.given, kind), CARRIED, None)
        if encoding is None or encoding.items is None:
            if not needed:
                return ()
            raise ValueError(
                f"the prompt has {('images', 'videos')[kind]} that this model did not encode; pass their pixels to a "
                "patched model, or what its encoder gave for them"
            )
        forward.encoded[kind] = encoding
        if encoding.settings != self._config:
            raise ValueError(
                "the images were encoded under another configuration of the patch; encode them again under this one"
            )
        return encoding.items

    def _rotary_positions(self, positions: Tensor | None, embeds: Tensor) -> Tensor:
        """The text model's positions (B, L), or (3, B, L) with M-RoPE."""
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device).unsqueeze(0)
        axes = self._adapter.position_axes
        if axes == 1:
            return positions.expand(embeds.shape[0], -1)
        # A row in front of the three is the text position, which no rotary embedding reads.
        return positions[-axes:].expand(axes, embeds.shape[0], -1)

    # What is kept, and how the sequence becomes shorter

    @torch.compiler.disable
    def _run_stage(
        self, forward: Forward, stage: Stage, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Shorten `hidden` (B, L, D) at a stage; returns it and its old columns (B, L'), None if none was dropped.

        `rotary` are the rotary embeddings of its columns, which the stage in front of layer 0 does not have.
        """
        forward.layout = forward.layout.joined(lambda segment: stage.rule(segment).pool == "segment")
        units = forward.layout.units(stage.unit_key)
        if stage.select is None:
            records = forward.encoded[0].records
            choices = [records[unit.item].choice(unit, hidden.device) for unit in units]
        else:
            choices = choose(stage, units, hidden, forward.sizes, self._view(forward, stage, hidden, rotary))
        forward.runs.append(report(stage, forward.prompt, units, choices))
        if all(choice.count == unit.length for choice, unit in zip(choices, units, strict=True)):
            return hidden, None
        after = gather(forward.layout, units, choices, hidden, forward.sizes)
        forward.shortened = forward.shortened | (after.layout.valid.sum(1) < forward.layout.valid.sum(1))
        forward.layout, forward.sizes = after.layout, after.sizes
        self._open_group(forward, stage, after.source)
        return after.hidden, after.source

    def _view(
        self, forward: Forward, stage: Stage, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> StageView | None:
        """What methods may ask for at a stage; None if none asks for anything."""
        if not self._asks:
            return None
        encoded = forward.encoded if stage.layer == 0 else {}
        return StageView(
            self._adapter.layers, self._adapter.text_model.norm, stage.layer, hidden, forward.layout, rotary,
            forward.taps.get(stage.layer - 1), forward.entry, encoded, forward.generated,
        )  # fmt: skip

    def _open_group(self, forward: Forward, stage: Stage, source: Tensor) -> None:
        """Start the layer group behind a stage that dropped tokens: its mask and positions."""
        layout, device = forward.layout, source.device
        valid = to_device(layout.valid, device)
        moved = source.expand(*forward.positions.shape[:-1], -1)
        kept, last = forward.positions.gather(-1, moved).masked_fill(~valid, 0), forward.state.original_last
        if not self._keep_positions:
            compact = (valid.long().cumsum(-1) - 1).clamp(min=0)
            if self._adapter.position_axes > 1:
                # Counting would change rows that lost nothing: their answers must not depend on the rest of the batch.
                shortened = to_device(forward.shortened, device).unsqueeze(-1)
                last = torch.where(shortened, compact[:, -1:], last)
                compact = torch.where(shortened, compact, kept)
            else:
                last = compact[:, -1:]
            kept = compact
        forward.positions = kept
        mask = valid if layout.has_padding else None
        log_sizes = forward.sizes.clamp(min=1, max=LARGEST).log() if self._size_bias else None
        forward.state.groups.append(LayerGroup(stage.layer, layout.length, mask, last + 1 - layout.length, log_sizes))

    # What the layers behind a stage are given, now and in decoding

    def _layer_inputs(
        self, forward: Forward, group: LayerGroup, hidden: Tensor
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
        """Attention mask and rotary embeddings of the layers of a group, in prefill or decoding."""
        if forward.prefill:
            mask, positions = group.mask, forward.positions
        else:
            mask, positions = self._decode_inputs(forward, group, hidden.shape[1])
        text_model, padded = self._adapter.text_model, forward.prefill and mask is not None
        mask = host.causal_mask(text_model, hidden, mask, forward.cache, group.first, padded)
        return mask, host.rotary(text_model, hidden, positions)

    def _decode_inputs(self, forward: Forward, group: LayerGroup, queries: int) -> tuple[Tensor | None, Tensor]:
        """2-D mask (None without padding) and positions (B, q) of a step on a filled cache."""
        past = host.cached_length(forward.cache, group.first)
        mask = group.mask
        if mask is not None:
            missing = host.key_length(forward.cache, group.first, queries) - mask.shape[1]
            mask = nn.functional.pad(mask, (0, missing), value=True) if missing else mask
        return mask, group.offset + past + torch.arange(queries, device=group.offset.device)


class PromptCount:
    """Counts the visual tokens of prompts, and changes nothing: what a configuration without budgets is worth.

    Placeholders that touch are counted as one image: nobody asked the encoder.
    """

    def __init__(self, adapter: Adapter, config: ApetConfig) -> None:
        self._adapter, self._config = adapter, config
        self._base_names = host.argument_names(adapter.base_model.forward)
        self._last = PerThread()

    @property
    def last(self) -> CompressionResult | None:
        """Result of this thread's last prefill."""
        return getattr(self._last, "result", None)

    def attach(self) -> list[Removable]:
        """Register the one hook; returns its handle."""
        return [self._adapter.base_model.register_forward_pre_hook(self._enter, with_kwargs=True)]

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = host.by_name(self._base_names, args) | kwargs
        ids, items, cache = given.get("input_ids"), given.get("visual_items"), host.cache_of(given)
        step = ids is not None and ids.shape[1] == 1
        if (ids is not None or items is not None) and not step and (cache is None or not host.cached_length(cache)):
            self._last.result = self._count(ids, items)
        return args, {name: value for name, value in kwargs.items() if name not in _OWN}

    def _count(self, ids: Tensor | None, items: Tensor | None) -> CompressionResult:
        kinds = kinds_of(ids.cpu(), self._adapter.placeholder_ids) if items is None else items.cpu().numpy()
        blocks = Layout(kinds).blocks()
        rows = range(len(kinds))
        tokens_in = tuple(tuple(block.length for block in blocks if block.row == row) for row in rows)
        return CompressionResult(self._config, len(self._adapter.layers), (), tokens_in)


def refuse_continuation(given: dict, tokens: Tensor, cache: Any, state: PromptState | None) -> None:
    """Raise where a filled cache is continued in a way that cannot be right; `state` is what the prompt left on it."""
    if host.has_pictures(given):
        raise ValueError(
            "a patched model compresses images in the first forward of a prompt; this cache already holds one. "
            "Start a new cache for a conversation with new images (and leave out prefill_chunk_size)"
        )
    group = state.group_of(0) if state is not None else None
    if group is None or tokens.shape[1] == 1:
        return
    fed = int(host.cached_length(cache)) - group.length + tokens.shape[1]
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        consistent = mask.shape[1] == state.original_length + fed
    elif positions is not None:
        axes = state.original_last.shape[0] if state.original_last.dim() == 3 else 1
        rotary = positions[-axes:] if axes > 1 else positions
        consistent = int(rotary.max()) == int(state.original_last.max()) + fed
    else:
        consistent = True
    if not consistent:
        raise ValueError(
            "this cache holds a compressed prompt, so it is shorter than the conversation and generate() would feed "
            "old tokens again; pass only the new input_ids with an attention_mask for the whole conversation, or start "
            "a new cache"
        )


def kinds_of(ids: Tensor, placeholders: Sequence[int]) -> np.ndarray:
    """(B, L) int64 number of the placeholder that an id (B, L, on the CPU) is; -1 for text."""
    kinds = np.full(ids.shape, -1, dtype=np.int64)
    for kind, placeholder in enumerate(placeholders):
        kinds[ids.numpy() == placeholder] = kind
    return kinds


def valid_columns(mask: Any, cache: Any, copies: HostCopies, shape: tuple[int, int]) -> np.ndarray:
    """(B, L) bool, False on padding, from any mask the text model can be given; read where `copies` do not have it.

    Raises:
        ValueError: A 4-D mask that `generate` did not make.
    """
    mask = host.full_mask(mask)
    if mask is None:
        return np.ones(shape, dtype=bool)
    known = copies.of(mask)
    if known is None and mask.dim() == 4:
        if not host.is_static(cache):
            raise ValueError("a patched model takes 2-D attention masks (batch, length); it cannot shorten a 4-D one")
        # generate() builds 4-D masks for static caches; the last query sees exactly the real tokens.
        row = mask[:, 0, -1]
        mask = row if row.dtype == torch.bool else row == 0
    return (mask if known is None else known).bool().cpu().numpy()[:, : shape[1]]


def _refuse_continuous(original: Any, *args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "a patched model does not do continuous batching: transformers' paged cache holds prompts of several lengths "
        "in one row. Call generate with a batch, or serve with vLLM (docs/serving.md)"
    )


def _by_item(block: Block) -> int:
    return block.item


def _by_row(items: Sequence[Unit], values: Sequence[Any], rows: int) -> tuple[tuple, ...]:
    """Values of the images, grouped by the sample they belong to."""
    return tuple(
        tuple(value for item, value in zip(items, values, strict=True) if item.row == row) for row in range(rows)
    )
