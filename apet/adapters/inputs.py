"""What methods may ask for beside the tokens (`apet.methods.context.StageInputs`), read off the running model.

Nothing is kept or computed unless the configured method declared it: inputs of layers are remembered by reference, and
rows of attention are made from queries and keys when they are asked for. Queries and keys come from the attention
module's own forward (projections, biases, norms, rotary embeddings, of whatever family), which hands them to an
attention function that only takes them out: a row of attention costs the projections and one product, and the model
keeps the attention it was loaded with.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from apet.adapters import host
from apet.adapters.layout import TEXT, Layout, Unit, to_device
from apet.adapters.stages import Group
from apet.adapters.tower import TowerCall
from apet.adapters.vision import Encoding


@dataclass
class StageView:
    """The state of a decoder when a stage runs.

    Attributes:
        layers: Decoder layers.
        norm: Final norm.
        layer: 0-based layer in front of which the stage runs.
        hidden: (B, L, D) its input.
        layout: Layout of the columns.
        embeddings: Rotary embeddings of the columns.
        before: Input and rotary embeddings of the layer before, if it was asked for; its columns are the same.
        entry: (B, L0, D) what entered layer 0, and its layout.
        encoded: What encoder calls left, per kind of item: images (0), videos (1).
        generated: Columns at the end that are no part of the prompt: without a cache, tokens generated before.
    """

    layers: nn.ModuleList
    norm: nn.Module
    layer: int
    hidden: Tensor
    layout: Layout
    embeddings: tuple[Tensor, Tensor] | None
    before: tuple[Tensor, tuple[Tensor, Tensor]] | None
    entry: tuple[Tensor, Layout]
    encoded: Mapping[int, Encoding] = field(default_factory=dict)
    generated: int = 0
    _projected: dict[int, host.Projected] = field(default_factory=dict)

    def projected(self, layer: int) -> host.Projected:
        """Queries and keys of the layer about to run, or of the one before."""
        if layer not in self._projected:
            hidden, embeddings = (self.hidden, self.embeddings) if layer == self.layer else self.before
            self._projected[layer] = host.project(host.decoder_attention(self.layers[layer], hidden, embeddings))
        return self._projected[layer]

    def asked_length(self, needs: Collection[str], unit: Unit) -> int | None:
        """Length of a unit's inputs where it can differ between units of equal length."""
        if "image_embeddings" not in needs:
            return None
        return len(block_columns(self.entry[1], unit))

    def inputs(self, group: Group) -> "BlockInputs":
        """What a method inside the decoder may ask for about a group of blocks."""
        return BlockInputs(self, group)

    def attention(self, layer: int, rows: Tensor, columns: Tensor) -> Tensor:
        """Causal attention (G, heads, Q, L) of the queries at `columns` (G, Q) of `rows` (G, 1)."""
        every = torch.arange(self.layout.length, device=columns.device)
        valid = to_device(self.layout.valid, columns.device)[rows]
        seen = (valid & (every <= columns.unsqueeze(-1))).unsqueeze(1)
        scores = self.projected(layer).scores(rows, columns).masked_fill(~seen, -torch.inf)
        return torch.where(seen.any(-1, keepdim=True), scores.softmax(-1), 0)  # padding sees nothing


class BlockInputs:
    """`StageInputs` of a group of equally long blocks inside the decoder.

    Args:
        view: The decoder's state.
        group: The blocks.
    """

    def __init__(self, view: StageView, group: Group) -> None:
        self._view, self._units, self._device = view, group.units, view.hidden.device
        self._rows, self._columns, self._host_columns = group.rows, group.places, group.columns

    def text_embeddings(self) -> tuple[Tensor, Tensor]:
        embeds, layout = self._view.entry
        columns, mask = self._text(layout)
        return embeds[self._rows, columns], mask

    def image_embeddings(self) -> Tensor:
        embeds, layout = self._view.entry
        columns = np.stack([block_columns(layout, unit) for unit in self._units])
        return embeds[self._rows, to_device(columns, self._device)]

    def text_hidden(self) -> Tensor:
        return self._view.hidden[self._rows, self._text(self._view.layout)[0]]

    def attention_row(self, layer: int) -> Tensor:
        layout, generated = self._view.layout, self._view.generated
        last = to_device(layout.last_valid - generated, self._device)[self._rows]
        return self._attention(layer, last)[:, :, 0]

    def text_attention(self, layer: int) -> Tensor:
        return self._attention(layer, self._text(self._view.layout)[0])

    def keys(self, layer: int) -> Tensor:
        return self._keys_at(layer, self._columns)

    def text_keys(self, layer: int) -> Tensor:
        return self._keys_at(layer, self._text(self._view.layout)[0])

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self._view.norm(hidden.to(self._view.hidden.dtype))

    def cls_attention(self, layer: int) -> Tensor:
        return self._of_tower(lambda call: call.attention(layer)).transpose(1, 2)

    def vision_keys(self, layer: int) -> Tensor:
        return self._of_tower(lambda call: call.keys(layer)).transpose(1, 2)

    def vision_states(self) -> Tensor:
        count = len(self._view.encoded[int(self._units[0].blocks[0].video)].tower.states())
        return torch.stack([self._of_tower(lambda call, at=at: call.states()[at]) for at in range(count)], 1)

    def vision_features(self) -> Tensor:
        return self._of_tower(lambda call: call.features)

    def _of_tower(self, values: Callable[[TowerCall], Tensor]) -> Tensor:
        """Values (G, n, ...) of the block's tokens, given those (C, N, ...) of a call."""
        blocks = []
        for number, unit in enumerate(self._units):
            parts = self._tower_rows(unit, self._host_columns[number])
            found = [values(call).flatten(0, 1)[to_device(rows, self._device)] for call, rows in parts]
            blocks.append(torch.cat(found))
        return torch.stack(blocks)

    def _tower_rows(self, unit: Unit, columns: np.ndarray) -> Iterator[tuple[TowerCall, np.ndarray]]:
        """Image by image, the rows of a call that a unit's columns show. Nothing has been dropped from them yet."""
        layout = self._view.layout
        for item in dict.fromkeys(block.item for block in unit.blocks):
            blocks = [block for block in layout.blocks() if block.row == unit.row and block.item == item]
            places = np.concatenate([np.arange(block.start, block.start + block.length) for block in blocks])
            encoded = self._view.encoded[int(blocks[0].video)]
            rows = encoded.rows(blocks[0].origin.number, len(places))
            yield encoded.tower, rows[np.searchsorted(places, columns[np.isin(columns, places)])]

    def _attention(self, layer: int, queries: Tensor) -> Tensor:
        """(G, heads, Q, n) attention of the columns `queries` (G, Q) to the block's tokens."""
        rows = self._view.attention(layer, self._rows, queries)
        columns = self._columns[:, None, None, :].expand(-1, *rows.shape[1:3], -1)
        return rows.gather(3, columns)

    def _keys_at(self, layer: int, columns: Tensor) -> Tensor:
        keys = self._view.projected(layer).keys.transpose(1, 2)
        return keys[self._rows, columns].transpose(1, 2)

    def _text(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Columns (G, T) of the text behind every image, or of all text where none follows, and their mask."""
        found = []
        for unit in self._units:
            text = np.flatnonzero(layout.items[unit.row, : layout.length - self._view.generated] == TEXT)
            images = block_columns(layout, unit)
            behind = text[text > images.max()] if len(images) else text
            found.append(behind if len(behind) else text)
        width = max(map(len, found))
        columns = np.zeros((len(found), width), dtype=np.int64)
        mask = np.zeros((len(found), width), dtype=bool)
        for number, one in enumerate(found):
            columns[number, : len(one)], mask[number, : len(one)] = one, True
        return to_device(columns, self._device), to_device(mask, self._device)


def block_columns(layout: Layout, unit: Unit) -> np.ndarray:
    """Columns of a unit's images in a layout with other columns, newlines left out."""
    items = {block.item for block in unit.blocks}
    wanted = [
        np.arange(block.start, block.start + block.length)
        for block in layout.blocks()
        if block.row == unit.row and block.item in items
    ]
    columns = np.concatenate(wanted) if wanted else np.empty(0, dtype=np.int64)
    return columns if layout.lines is None else columns[layout.lines[unit.row, columns] > -2]
