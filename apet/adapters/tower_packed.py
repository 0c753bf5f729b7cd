"""The tower stage in towers whose pictures stand one behind the other in one sequence (Qwen2-VL, Qwen2.5-VL).

What is kept or dropped is a group: the patches that the merger makes one token of, which are neighbours in the
sequence. A budget is for the groups of a frame; frames of equal size are chosen from at once. Segments of full and of
windowed layers (`cu_seqlens`) shrink with what is left, and every row keeps its rotary embedding. "restore" compares
and averages whole groups, row by row; the rest is as in `tower_stage`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apet.adapters import host
from apet.adapters.hooks import InFlight
from apet.adapters.layout import to_device
from apet.adapters.stages import budget_for, equal
from apet.adapters.tower_pixels import unpredicted
from apet.adapters.tower_stage import (
    Extra,
    Reduction,
    TowerCut,
    TowerStage,
    changed_most,
    mean_of,
    merged,
    whole_cut,
)


@dataclass(frozen=True)
class _Frames:
    """Frames of equal size that were cut alike.

    Attributes:
        numbers: Which of the call's frames they are.
        starts: (F, 1) int64 first group of each, in the order of the sequence.
        cut: What was left of them, with groups for rows.
        others: (F, m) groups that do not go on, of "restore".
        near: (F, m, k) which of the kept ones are nearest to them.
    """

    numbers: list[int]
    starts: Tensor
    cut: TowerCut
    others: Tensor | None = None
    near: Tensor | None = None


@dataclass(frozen=True)
class PackedCut:
    """What a stage left of the frames of a call, as `TowerCut` has it for crops.

    Attributes:
        mode: That of the stage.
        layer: Layers that ran before.
        frames: All frames, in classes.
        order: (G,) int64 token that every group of the sequence becomes.
        lengths: Groups of every frame.
    """

    mode: str
    layer: int
    frames: tuple[_Frames, ...]
    order: Tensor
    lengths: tuple[int, ...]

    @cached_property
    def groups(self) -> tuple[Tensor, Tensor]:
        """(M,) groups that go on, ascending, and the tokens that each stands for."""
        numbers = torch.cat([(some.starts + some.cut.rows).flatten() for some in self.frames])
        sizes = torch.cat([some.cut.sizes.flatten() for some in self.frames])
        numbers, order = numbers.sort()
        return numbers, sizes[order]

    def spread(self, values: Tensor, rest: float) -> Tensor:
        """(G,) values (M,) of the groups at the places of their tokens, `rest` elsewhere."""
        full = values.new_full((sum(self.lengths),), rest)
        return full.scatter(0, self.order[self.groups[0]], values)

    def _own(self, frames: slice) -> slice:
        starts = np.cumsum([0, *self.lengths]).tolist()
        return slice(starts[frames.start], starts[frames.stop])

    def tokens_alive(self, frames: slice, count: int) -> np.ndarray:
        """Of the `count` tokens that some frames become, which go on. Waits for the device."""
        return self.spread(torch.ones_like(self.groups[0], dtype=torch.bool), False)[self._own(frames)].cpu().numpy()

    def token_sizes(self, frames: slice, count: int) -> Tensor:
        """Tokens behind each of them."""
        return self.spread(self.groups[1], 1.0)[self._own(frames)]

    def of(self, frames: slice) -> tuple[Tensor, Tensor]:
        """Of the picture that some frames show: tokens left (K,), and which of them holds a token's content (N,)."""
        count = sum(self.lengths)
        holder = self.order.new_full((count,), -1)  # token that holds the content of a token
        for some in self.frames:
            rows, sources = some.cut.rows, some.cut.sources
            if sources is None:
                held = self.order[(some.starts + rows).flatten()]
                holder[held] = held
            else:
                every = some.starts + torch.arange(some.cut.length, device=rows.device)
                into = torch.where(sources < 0, 0, sources)
                into = self.order[some.starts + rows.gather(1, into)]
                holder[self.order[every].flatten()] = torch.where(sources < 0, -1, into).flatten()
        own = self._own(frames)
        kept = self.spread(torch.ones_like(self.groups[0], dtype=torch.bool), False)[own].nonzero().flatten()
        place = torch.searchsorted(kept, (holder[own] - own.start).clamp(min=0))
        return kept, torch.where(holder[own] < 0, -1, place)


@dataclass(eq=False)
class _Run:
    """One call of a tower in flight.

    Attributes:
        encoding: The encoder call it is part of.
        lengths: Groups of every frame.
        order: (G,) token that every group becomes.
        cut: What is left now; None before the first cut.
        saved: Of "restore", the hidden states (S, D) at the cut.
        pixels: (S, V) values of the patches, of "lossless".
        grids: Time, rows and columns of patches of every picture.
    """

    encoding: Any
    lengths: tuple[int, ...]
    order: Tensor
    cut: PackedCut | None = None
    saved: Tensor | None = None
    pixels: Tensor | None = None
    grids: Sequence[Sequence[int]] = ()


class _Chunks:
    """What the attention of a layer adds, handed out segment by segment as the layer asks for them."""

    def __init__(self, parts: Sequence[tuple[int, Extra]]) -> None:
        self._parts, self._next = parts, 0

    def take(self, queries: int) -> Extra:
        """For the next segment, or for all of them at once."""
        own, self._next = self._next, self._next + 1
        count, extra = self._parts[own]
        if queries == count:
            return extra
        host.check_segments(own == 0 and queries == sum(count for count, _ in self._parts))
        biases = [extra.bias for _, extra in self._parts if extra.bias is not None]
        return Extra(bias=torch.cat(biases, 1) if biases else None)


class PackedReduction(Reduction):
    """The stage in a tower that has all pictures in one sequence."""

    def __init__(self, tower: nn.Module, stage: TowerStage, encodings: InFlight, extras: InFlight) -> None:
        super().__init__(tower, host.packed_layers(tower), stage, encodings, extras)
        self._unit = host.packed_unit(tower)

    def _open(self, encoding: Any, original: Any, args: tuple, kwargs: dict) -> _Run:
        grid, pixels = host.packed_grid(original, args, kwargs).cpu(), host.tower_pixels(original, args, kwargs)
        lengths = [rows * columns // self._unit for steps, rows, columns in grid.tolist() for _ in range(steps)]
        order = to_device(host.packed_order(self._tower, grid).numpy(), pixels.device)
        run = _Run(encoding, tuple(lengths), order)
        if self._stage.mode == "lossless":
            run.pixels, run.grids = pixels, grid.tolist()
        return run

    @torch.compiler.disable
    def _leave_out(self, run: _Run, hidden: Tensor) -> None:
        """Leave out the groups whose values their neighbours predict. Waits for the device."""
        side = host.packed_side(self._tower)
        keep, first = [], 0
        for steps, rows, columns in run.grids:
            own = run.pixels[first : first + steps * rows * columns]
            keep.append(unpredicted(own.reshape(steps, rows // side, columns // side, -1)).flatten())
            first += len(own)
        keep = torch.cat(keep)[run.order]  # of the groups of the sequence
        if keep.all():
            return
        frames = []
        for number, (start, own) in enumerate(zip(np.cumsum([0, *run.lengths]), keep.split(run.lengths), strict=False)):
            rows = own.nonzero().view(1, -1)
            cut = TowerCut(self._stage.mode, 0, len(own), 0, rows, torch.ones(rows.shape, device=rows.device))
            frames.append(_Frames([number], rows.new_full((1, 1), int(start)), cut))
        run.cut = PackedCut(self._stage.mode, 0, tuple(frames), run.order, run.lengths)
        run.encoding.cuts.append(run.cut)

    @torch.compiler.disable
    def _through(self, run: _Run, index: int, hidden: Tensor, original: Any, args: tuple, kwargs: dict) -> Tensor:
        """A layer for the groups that are left of `hidden` (S, D); returns all rows."""
        groups, sizes = run.cut.groups
        rows = self._rows_of(groups)
        segments, rotary = host.packed_inputs(kwargs)
        bounds = torch.searchsorted(rows, segments.long())
        bounds, which = bounds.unique_consecutive(return_inverse=True)
        chunks = self._chunks(run, index, hidden, sizes, bounds, which, kwargs)
        args, kwargs = host.with_hidden(args, kwargs, hidden[rows])
        kwargs = host.with_packed_inputs(kwargs, bounds.to(segments), tuple(part[rows] for part in rotary))
        with self._extras.during(chunks):
            inner = original(*args, **kwargs)
        hidden = hidden.index_copy(0, rows, inner)
        return self._restored(run, groups, hidden) if run.cut.mode == "restore" else hidden

    def _chunks(
        self, run: _Run, index: int, hidden: Tensor, sizes: Tensor, bounds: Tensor, which: Tensor, kwargs: dict
    ) -> _Chunks:
        """What the attention adds in every segment between `bounds`; `which` of these each old border has become."""
        counts = bounds.diff().tolist()
        if run.cut.mode == "lossless":
            return _Chunks([(count, Extra()) for count in counts])
        if run.cut.mode == "merge":
            logs = sizes.log().repeat_interleave(self._unit).unsqueeze(0)
            return _Chunks([(count, Extra(bias=own)) for count, own in zip(counts, logs.split(counts, 1), strict=True)])
        if index >= run.cut.layer + self._stage.key_layers:
            return _Chunks([(count, Extra()) for count in counts])
        others = torch.cat([(some.starts + some.others).flatten() for some in run.cut.frames]).sort().values
        rows = self._rows_of(others)
        segments, rotary = host.packed_inputs(kwargs)
        own = tuple(part[rows] for part in rotary)
        projected = host.project(host.packed_attention(self._layers[index], hidden[rows], own))
        # Segments that lost all their rows ask for nothing; their other rows are of no use to anybody.
        seen = torch.searchsorted(rows, segments.long())
        alive = which.diff() > 0
        spans = [
            (first, last)
            for first, last, alive_ in zip(seen[:-1].tolist(), seen[1:].tolist(), alive.tolist(), strict=True)
            if alive_
        ]
        parts = [
            Extra(None, projected.keys[:, :, first:last], projected.values[:, :, first:last]) for first, last in spans
        ]
        return _Chunks(list(zip(counts, parts, strict=True)))

    def _restored(self, run: _Run, groups: Tensor, hidden: Tensor) -> Tensor:
        """`hidden` (S, D) with the other groups as saved, plus the mean change of their nearest kept ones."""
        saved, now = self._grouped(run.saved), self._grouped(hidden)
        for some in run.cut.frames:
            if some.others is None or some.others.shape[1] == 0:
                continue
            kept, others = some.starts + some.cut.rows, some.starts + some.others
            back = saved[others] + mean_of(now[kept] - saved[kept], some.near)
            now = now.index_copy(0, others.flatten(), back.flatten(0, 1))
        return now.view(hidden.shape)

    @torch.compiler.disable
    def _cut(self, run: _Run, layer: int, before: Tensor, hidden: Tensor) -> Tensor:
        """Leave fewer groups of `hidden` (S, D) behind a layer that was given `before`; returns all rows."""
        was, now = self._grouped(before), self._grouped(hidden)
        starts = np.cumsum([0, *run.lengths])[:-1]
        left = run.lengths
        if run.cut is not None:
            left = {number: some.cut.rows.shape[1] for some in run.cut.frames for number in some.numbers}
        keeps = [budget_for(self._stage.budgets[layer], left[frame], 0, 1) for frame in range(len(run.lengths))]
        if all(keep >= left[frame] for frame, keep in enumerate(keeps)):
            return hidden
        classes = []
        for numbers in equal([(length, left[f], keeps[f]) for f, length in enumerate(run.lengths)]):
            first = torch.from_numpy(starts[numbers]).to(hidden.device).unsqueeze(-1)
            every = first + torch.arange(run.lengths[numbers[0]], device=hidden.device)
            frames, now = self._cut_frames(run, layer, numbers, first, keeps[numbers[0]], was[every], now[every], now)
            classes.append(frames)
        run.cut = PackedCut(self._stage.mode, layer, tuple(classes), run.order, run.lengths)
        run.encoding.cuts.append(run.cut)
        run.saved = hidden
        return now.view(hidden.shape)

    def _cut_frames(
        self, run: _Run, layer: int, numbers: list[int], first: Tensor, keep: int, was: Tensor, own: Tensor, now: Tensor
    ) -> tuple[_Frames, Tensor]:
        """Cut frames of equal size: groups (F, G, u * D) before and behind the layer, and all groups."""
        cut = whole_cut(self._stage.mode, own, 0) if run.cut is None else _cut_of(run.cut, numbers)
        if keep >= cut.rows.shape[1]:
            none = first.new_zeros(len(first), 0)
            return _Frames(numbers, first, cut, none), now
        if self._stage.mode == "restore":
            return _Frames(numbers, first, *changed_most(cut, layer, keep, was, own)), now
        rows = cut.rows.unsqueeze(-1).expand(-1, -1, own.shape[2])
        cut, inner = merged(cut, layer, keep, self._stage.selects[layer], own.gather(1, rows))
        now = now.index_copy(0, (first + cut.rows).flatten(), inner.flatten(0, 1))
        return _Frames(numbers, first, cut), now

    def _grouped(self, hidden: Tensor) -> Tensor:
        """(S, D) as (G, u * D)."""
        return hidden.reshape(len(hidden) // self._unit, -1)

    def _rows_of(self, groups: Tensor) -> Tensor:
        """Rows of the sequence, ascending, of groups (M,)."""
        return (groups.unsqueeze(-1) * self._unit + torch.arange(self._unit, device=groups.device)).flatten()


def _cut_of(before: PackedCut, numbers: list[int]) -> TowerCut:
    """What was left of frames of equal size before, as one cut."""
    found = {}
    for some in before.frames:
        for place, number in enumerate(some.numbers):
            sources = None if some.cut.sources is None else some.cut.sources[place]
            found[number] = some.cut.rows[place], some.cut.sizes[place], sources, some.cut.length
    rows, sizes, sources, lengths = zip(*(found[number] for number in numbers), strict=True)
    merged_before = None if any(one is None for one in sources) else torch.stack(sources)
    return TowerCut(before.mode, before.layer, lengths[0], 0, torch.stack(rows), torch.stack(sizes), merged_before)
