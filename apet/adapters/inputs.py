"""What methods may ask for beside the tokens (`apet.methods.context.StageInputs`), read off the running model.

Nothing is kept or computed unless the configured method declared it: the towers' and decoder layers' inputs are
remembered by reference, and rows of attention are made from queries and keys when they are asked for.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from apet.adapters.layout import TEXT, Layout, Unit, to_device
from apet.adapters.probe import Projected, project

DECODER_INPUTS = frozenset(
    {
        "text_embeddings",
        "image_embeddings",
        "text_hidden",
        "attention_row",
        "text_attention",
        "keys",
        "text_keys",
        "final_norm",
    }
)
TOWER_INPUTS = frozenset({"cls_attention", "vision_keys", "vision_features"})


class TowerTap:
    """Remembers what entered some layers of a vision tower in the last call of a thread.

    Args:
        tower: The vision model, with `encoder.layers` and a class token in front of the patches.
        layers: Layers as `attentions[layer]` counts them.
    """

    def __init__(self, tower: nn.Module, layers: Collection[int], local: object) -> None:
        self._layers = tower.encoder.layers
        self._wanted, self._local = sorted({layer % len(self._layers) for layer in layers}), local

    def attach(self) -> list:
        """Register the hooks; returns their handles. A layer that is skipped still says what entered it."""
        return [
            self._layers[index].register_forward_pre_hook(self._remember(index), with_kwargs=True)
            for index in self._wanted
        ]

    def projected(self, layer: int) -> Projected:
        """Queries and keys (C, heads, 1 + N, d) of a layer for all crops of the last call."""
        index = layer % len(self._layers)
        module = self._layers[index]
        return project(module.self_attn, module.layer_norm1(self._inputs()[index]), attention_mask=None)

    def _inputs(self) -> dict[int, Tensor]:
        if not hasattr(self._local, "tower_inputs"):
            self._local.tower_inputs = {}
        return self._local.tower_inputs

    def _remember(self, index: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._inputs()[index] = args[0] if args else kwargs["hidden_states"]

        return hook


@dataclass(frozen=True)
class CropInputs:
    """`StageInputs` of a group of crops at the vision stage.

    Attributes:
        tap: The tower; None where no layer of it was asked for.
        features: (C, N, D) what enters the projector, for all crops.
        rows: (G, 1) crops of the group.
        places: (G, n) their rows that take part.
    """

    tap: TowerTap | None
    features: Tensor
    rows: Tensor
    places: Tensor

    def cls_attention(self, layer: int) -> Tensor:
        projected = self.tap.projected(layer)
        crops = torch.arange(len(projected.queries), device=projected.queries.device).unsqueeze(-1)
        attention = projected.scores(crops, torch.zeros_like(crops)).softmax(-1)[:, :, 0, 1:]
        return self._of_group(attention.transpose(1, 2)).transpose(1, 2)

    def vision_keys(self, layer: int) -> Tensor:
        keys = self.tap.projected(layer).keys[:, :, 1:]
        return self._of_group(keys.transpose(1, 2)).transpose(1, 2)

    def vision_features(self) -> Tensor:
        return self._of_group(self.features)

    def _of_group(self, values: Tensor) -> Tensor:
        """Values (C, N, ...) of the group's rows (G, n, ...)."""
        if values.shape[1] != self.features.shape[1]:
            raise NotImplementedError("the features hold the class token too (vision_feature_select_strategy 'full')")
        return values[self.rows, self.places]


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
        features: Features that entered the projector, one block per image, where the vision stage runs behind it.
    """

    layers: nn.ModuleList
    norm: nn.Module
    layer: int
    hidden: Tensor
    layout: Layout
    embeddings: tuple[Tensor, Tensor] | None
    before: tuple[Tensor, tuple[Tensor, Tensor]] | None
    entry: tuple[Tensor, Layout]
    features: Tensor | None = None
    _projected: dict[int, Projected] = field(default_factory=dict)

    def projected(self, layer: int) -> Projected:
        """Queries and keys of the layer about to run, or of the one before."""
        if layer not in self._projected:
            hidden, embeddings = (self.hidden, self.embeddings) if layer == self.layer else self.before
            module = self.layers[layer]
            hidden = module.input_layernorm(hidden)
            self._projected[layer] = project(
                module.self_attn, hidden, position_embeddings=embeddings, attention_mask=None, past_key_values=None
            )
        return self._projected[layer]

    def attention(self, layer: int, rows: Tensor, columns: Tensor) -> Tensor:
        """Causal attention (G, heads, Q, L) float32 of the queries at `columns` (G, Q) of `rows` (G, 1)."""
        every = torch.arange(self.layout.length, device=columns.device)
        valid = to_device(self.layout.valid, columns.device)[rows]
        seen = (valid & (every <= columns.unsqueeze(-1))).unsqueeze(1)
        scores = self.projected(layer).scores(rows, columns).masked_fill(~seen, -torch.inf)
        return torch.where(seen.any(-1, keepdim=True), scores.softmax(-1), 0)  # padding sees nothing


class BlockInputs:
    """`StageInputs` of a group of equally long blocks inside the decoder.

    Args:
        view: The decoder's state.
        units: The images, one per block.
        columns: (G, n) columns of the blocks in their rows.
    """

    def __init__(self, view: StageView, units: Sequence[Unit], columns: np.ndarray) -> None:
        self._view, self._units, self._device = view, units, view.hidden.device
        self._rows = to_device(np.array([[unit.row] for unit in units]), self._device)
        self._columns = to_device(columns, self._device)

    def text_embeddings(self) -> tuple[Tensor, Tensor]:
        embeds, layout = self._view.entry
        columns, mask = self._text(layout)
        return embeds[self._rows, columns], mask

    def image_embeddings(self) -> Tensor:
        embeds, layout = self._view.entry
        columns = [self._block_columns(layout, unit) for unit in self._units]
        if len({len(one) for one in columns}) > 1:
            raise NotImplementedError("images of one batch entered the decoder with different numbers of tokens")
        return embeds[self._rows, to_device(np.stack(columns), self._device)]

    def text_hidden(self) -> Tensor:
        return self._view.hidden[self._rows, self._text(self._view.layout)[0]]

    def attention_row(self, layer: int) -> Tensor:
        last = to_device(self._view.layout.last_valid, self._device)[self._rows]
        return self._attention(layer, last)[:, :, 0]

    def text_attention(self, layer: int) -> Tensor:
        return self._attention(layer, self._text(self._view.layout)[0])

    def keys(self, layer: int) -> Tensor:
        return self._keys_at(layer, self._columns)

    def text_keys(self, layer: int) -> Tensor:
        return self._keys_at(layer, self._text(self._view.layout)[0])

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self._view.norm(hidden.to(self._view.hidden.dtype))

    def vision_features(self) -> Tensor:
        return self._view.features[torch.tensor([unit.item for unit in self._units], device=self._device)]

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
            text = np.flatnonzero(layout.items[unit.row] == TEXT)
            images = self._block_columns(layout, unit)
            behind = text[text > images.max()] if len(images) else text
            found.append(behind if len(behind) else text)
        width = max(map(len, found))
        columns = np.zeros((len(found), width), dtype=np.int64)
        mask = np.zeros((len(found), width), dtype=bool)
        for number, one in enumerate(found):
            columns[number, : len(one)], mask[number, : len(one)] = one, True
        return to_device(columns, self._device), to_device(mask, self._device)

    @staticmethod
    def _block_columns(layout: Layout, unit: Unit) -> np.ndarray:
        """Columns of a unit's images in a layout with other columns."""
        items = {block.item for block in unit.blocks}
        wanted = [
            np.arange(block.start, block.start + block.length)
            for block in layout.blocks()
            if block.row == unit.row and block.item in items
        ]
        return np.concatenate(wanted) if wanted else np.empty(0, dtype=np.int64)
