"""What a prefill costs, without running it: FLOPs, bytes of the key-value cache, and the time to the first token.

FLOPs are those of matrix products (a multiply-add is two; attention without the saving of its causal half), counted as
`torch.utils.flop_counter` counts them and equal to its count. Time is a roofline: every part takes as long as its
products at the measured rate, or as reading its weights where that is longer, and then the passes of its elementwise
operations over its activations. Selection is not in it: it reads the tokens once and costs well below one layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from apet.config import ApetConfig

# Passes of transformers' elementwise operations over the activations, in vectors of the hidden width per token: two
# norms in float32 and two residual sums; and over the widths of rotary embeddings and of the MLP.
_NORM_PASSES, _ROTARY_PASSES, _MLP_PASSES = 30, 8, 5


@dataclass(frozen=True)
class TowerDims:
    """A vision tower, for one image or clip.

    Attributes:
        layers: Layers it has.
        needed: Layers in front of the features that are read.
        width: Hidden width.
        mlp: Width of its MLP.
        gated: Whether the MLP has a gate.
        rows: Rows per crop or frame, class token included.
        crops: Crops or frames.
        patch_values: Numbers of a patch.
        pairs: Pairs of rows that attend to each other in a layer, averaged over the layers.
        class_token: Whether one row of each crop is no patch.
        heads: Attention heads.
        merged: Patches that one token is made of.
    """

    layers: int
    needed: int
    width: int
    mlp: int
    gated: bool
    rows: int
    crops: int
    patch_values: int
    pairs: float
    class_token: bool = False
    heads: int = 0
    merged: int = 1

    @property
    def patches(self) -> int:
        """Patches of a crop."""
        return self.rows - self.class_token

    def layer_flops(self, part: "TowerPart | None" = None) -> float:
        """Matrix products of one layer, for all rows or for a part of them."""
        dense = self.width * (4 * self.width + (3 if self.gated else 2) * self.mlp)
        if part is None:
            return self.crops * (2 * self.rows * dense + 4 * self.pairs * self.width)
        head = self.width // self.heads
        attended = self.heads * (head + (8 - head % 8 if part.biased else 0))
        # Values come with the queries and keys where one matrix makes all three.
        others = (part.keys - part.rows) * (2 if self.merged == 1 else 3)
        projected = 2 * part.rows * dense + 2 * others * self.width**2
        pairs = self.pairs * part.rows * part.keys / self.rows**2  # of windows: as if each lost the same share
        return self.crops * (projected + 4 * pairs * attended)

    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer."""
        return self.width * (4 * self.width + (3 if self.gated else 2) * self.mlp)


@dataclass(frozen=True)
class TowerPart:
    """What a tower layer computes where a tower stage left a part of a crop's rows.

    Attributes:
        rows: Rows that go through it.
        keys: Rows that they attend to; keys and values of the others are made too.
        biased: Whether attention counts rows for the number of patches they stand for, in one more dimension of heads.
    """

    rows: int
    keys: int
    biased: bool


def tower_parts(config: ApetConfig | None, tower: TowerDims) -> list[TowerPart | None]:
    """What each layer of a tower computes under a configuration; None for all rows.

    What "lossless" leaves out depends on the picture, so nothing of it is predicted.
    """
    parts: list[TowerPart | None] = [None] * tower.layers
    if config is None:
        return parts
    tokens = tower.patches // tower.merged
    for layer, left in zip(config.tower_layer_list, left_in_tower(config, tokens), strict=True):
        rows, merged = left * tower.merged + tower.class_token, config.tower_mode == "merge"
        for index in range(layer, tower.layers if left < tokens else 0):
            seen = not merged and index < layer + config.tower_key_layers
            parts[index] = TowerPart(rows, tower.rows if seen else rows, merged)
    return parts


def left_in_tower(config: ApetConfig, patches: int) -> list[int]:
    """Patches of a crop (of Qwen-VL: tokens to be of a frame) behind every tower stage."""
    left = []
    for budget in config.tower_token_list:
        patches = min(patches, max(1, int(budget * patches)) if isinstance(budget, float) else budget)
        left.append(patches)
    return left


@dataclass(frozen=True)
class TextDims:
    """A decoder with gated MLPs."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer."""
        attention = self.width * self.head_dim * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.width * self.mlp

    def layer_flops(self, queries: int, keys: int) -> int:
        """Matrix products of one layer for `queries` tokens that see `keys` tokens."""
        return 2 * queries * self.layer_weights() + 4 * queries * keys * self.heads * self.head_dim

    def layer_activations(self, queries: int) -> int:
        """Numbers that the elementwise operations of one layer read and write."""
        rotary = (self.heads + self.kv_heads) * self.head_dim
        return queries * (_NORM_PASSES * self.width + _ROTARY_PASSES * rotary + _MLP_PASSES * self.mlp)


@dataclass(frozen=True)
class ModelDims:
    """A vision-language model with one image (or clip) per prompt.

    Attributes:
        tower: Vision tower.
        projector: (inputs, outputs) of the matrices between tower and decoder.
        projector_rows: Rows that enter them without compression.
        text: Decoder.
        before_projector: Whether compression acts in front of the projector, which then maps the kept rows only.
    """

    tower: TowerDims
    projector: tuple[tuple[int, int], ...]
    projector_rows: int
    text: TextDims
    before_projector: bool

    @classmethod
    def of(cls, config: Any, crops: int = 1, grid: tuple[int, int] | None = None) -> "ModelDims":
        """Dimensions of a transformers configuration.

        Args:
            config: Of a family that `apet.apply_patch` serves.
            crops: Crops of an image, or frames of a clip.
            grid: (rows, columns) of patches of an image, where the model takes any size.

        Raises:
            ValueError: Another model, or a missing grid.
        """
        if config.model_type in _CROP_DIMS:
            return _CROP_DIMS[config.model_type](config, crops)
        if config.model_type in _GRID_DIMS:
            if grid is None:
                kind = config.model_type
                raise ValueError(f"{kind} takes images of any size; give the grid of patches (rows, columns)")
            return _GRID_DIMS[config.model_type](config, grid)
        known = ", ".join([*_CROP_DIMS, *_GRID_DIMS])
        raise ValueError(f"the cost of model type {config.model_type!r} is not known; known: {known}")


@dataclass(frozen=True)
class Part:
    """One part of a forward pass: FLOPs, bytes of its weights, bytes its elementwise operations move."""

    name: str
    flops: float
    weight_bytes: float
    activation_bytes: float


@dataclass(frozen=True)
class Ceilings:
    """What a device does at best.

    Attributes:
        flops: Matrix products, FLOP per second.
        bandwidth: Reading memory, bytes per second.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Estimate:
    """Cost of one forward pass.

    Attributes:
        parts: In the order they run.
        kv_bytes: Key-value cache afterwards.
    """

    parts: tuple[Part, ...]
    kv_bytes: int

    @property
    def flops(self) -> float:
        """FLOPs of all parts."""
        return sum(part.flops for part in self.parts)

    def seconds(self, ceilings: Ceilings) -> float:
        """Predicted time on a device with these ceilings."""
        return sum(
            max(part.flops / ceilings.flops, part.weight_bytes / ceilings.bandwidth)
            + part.activation_bytes / ceilings.bandwidth
            for part in self.parts
        )


def tokens_per_layer(
    config: ApetConfig | None,
    image_tokens: int,
    layers: int,
    crops: int = 1,
    added: int = 0,
    tower_crops: int | None = None,
) -> list[int]:
    """Visual tokens that every decoder layer sees of one image, from budgets in counts or shares.

    Args:
        config: Compression, None without one.
        image_tokens: Tokens of the uncompressed image.
        layers: Decoder layers.
        crops: Crops that share these tokens; `visual_token_num` is for each.
        added: Rows that the vision stage adds to each crop's budget.
        tower_crops: Crops that the tower encodes, if these are others: a stage that merges there cuts each of them.

    Raises:
        ValueError: A budget per image (a list) or for clips: `apet.last_result` has the counts of a run.
    """
    counts, now = [], image_tokens
    if config is None:
        return [image_tokens] * layers
    if config.video_token_num is not None or any(isinstance(budget, tuple) for budget in config.stage_budgets):
        raise ValueError("budgets per image or for clips are not predicted; take the counts from apet.last_result")
    stages = dict(zip((0, *config.layer_list), config.stage_budgets, strict=True))
    if config.tower_mode == "merge" and config.tower_layer_list:
        encoded = tower_crops or crops
        most = encoded * left_in_tower(config, image_tokens // encoded)[-1]
    else:
        most = image_tokens
    for layer in range(layers):
        budget, units = stages.get(layer), crops if layer == 0 else 1
        length = now // units
        if isinstance(budget, float):
            budget = max(1, int(budget * length))
        if budget is not None:
            budget += added if layer == 0 else 0
            now = min(now, budget * units)
        now = min(now, most)
        counts.append(now)
    return counts


def prefill_cost(
    dims: ModelDims,
    visual: Sequence[int],
    *,
    text_tokens: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    projected: int | None = None,
    early_exit: bool = False,
    config: ApetConfig | None = None,
) -> Estimate:
    """Cost from pixels to the logits of the last position.

    Args:
        dims: Model.
        visual: Visual tokens of every decoder layer (`tokens_per_layer`, or `apet.last_result`).
        text_tokens: Text tokens of the prompt.
        batch: Prompts.
        dtype: Of weights and activations.
        projected: Rows that pass the projector; None for the visual tokens of the first layer where compression acts in
            front of it (LLaVA-NeXT's newlines are not among them), and for all rows elsewhere.
        early_exit: The tower stops behind the layer whose output is read.
        config: Compression, for what it does inside the tower.

    Raises:
        ValueError: Not one number per layer.
    """
    text, size = dims.text, dtype.itemsize
    if len(visual) != text.layers:
        raise ValueError(f"visual holds {len(visual)} numbers for {text.layers} decoder layers; give one per layer")
    if projected is None:
        projected = min(visual[0], dims.projector_rows) if dims.before_projector else dims.projector_rows
    run = dims.tower.needed if early_exit else dims.tower.layers
    parts = [
        _tower(dims.tower, tower_parts(config, dims.tower)[:run], batch, size),
        _projector(dims.projector, projected, batch, size),
    ]
    for layer, tokens in enumerate(visual, start=1):
        parts.append(_text_layer(f"layer {layer}", text, text_tokens + tokens, text_tokens + tokens, batch, size))
    parts.append(_head(text, batch, size))
    return Estimate(tuple(parts), _kv_bytes(text, [text_tokens + tokens for tokens in visual], batch, size))


def decode_cost(
    dims: ModelDims, lengths: Sequence[int], *, batch: int = 1, dtype: torch.dtype = torch.bfloat16
) -> Estimate:
    """Cost of one decoded token per prompt.

    Args:
        dims: Model.
        lengths: Tokens in the cache of every layer, without the new one.
        batch: Prompts.
        dtype: Of weights and cache.
    """
    text, size = dims.text, dtype.itemsize
    parts = []
    for layer, length in enumerate(lengths, start=1):
        part = _text_layer(f"layer {layer}", text, 1, length + 1, batch, size)
        cache = _kv_bytes(text, [length + 1], batch, size)
        parts.append(Part(part.name, part.flops, part.weight_bytes + cache, part.activation_bytes))
    parts.append(_head(text, batch, size))
    return Estimate(tuple(parts), _kv_bytes(text, [length + 1 for length in lengths], batch, size))


def _tower(tower: TowerDims, inside: Sequence[TowerPart | None], batch: int, size: int) -> Part:
    """The patches' embedding and the layers that run, whose parts are `inside`."""
    rows = tower.crops * sum(tower.rows if part is None else part.rows for part in inside)
    moved = rows * (_NORM_PASSES * tower.width + _MLP_PASSES * tower.mlp)
    embed = tower.patch_values * tower.width
    flops = 2 * tower.crops * tower.patches * embed + sum(map(tower.layer_flops, inside))
    return Part("tower", batch * flops, (len(inside) * tower.layer_weights() + embed) * size, batch * moved * size)


def _projector(layers: Sequence[tuple[int, int]], rows: int, batch: int, size: int) -> Part:
    matrices = sum(inputs * outputs for inputs, outputs in layers)
    written = 3 * rows * sum(outputs for _, outputs in layers)
    return Part("projector", batch * 2 * rows * matrices, matrices * size, batch * written * size)


def _text_layer(name: str, text: TextDims, queries: int, keys: int, batch: int, size: int) -> Part:
    moved = batch * text.layer_activations(queries) * size
    return Part(name, batch * text.layer_flops(queries, keys), text.layer_weights() * size, moved)


def _head(text: TextDims, batch: int, size: int) -> Part:
    return Part("head", 2 * batch * text.width * text.vocab, text.width * text.vocab * size, batch * text.vocab * size)


def _kv_bytes(text: TextDims, lengths: Sequence[int], batch: int, size: int) -> int:
    return batch * sum(lengths) * 2 * text.kv_heads * text.head_dim * size


def _text_dims(config: Any) -> TextDims:
    heads = config.num_attention_heads
    return TextDims(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        heads,
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        config.vocab_size,
    )


def _clip_dims(config: Any, crops: int) -> ModelDims:
    """LLaVA and its relatives: rows of a tower through two matrices, in front of which compression may act."""
    vision, text = config.vision_config, _text_dims(config.text_config)
    patches = (vision.image_size // vision.patch_size) ** 2
    select = config.vision_feature_layer
    needed = vision.num_hidden_layers + 1 + select if select < 0 else select
    # DINOv2 has a ratio in its place.
    mlp = vision.hidden_size * vision.mlp_ratio if vision.model_type == "dinov2" else vision.intermediate_size
    class_token = not vision.model_type.startswith("siglip")
    length = patches + class_token
    tower = TowerDims(
        vision.num_hidden_layers, needed, vision.hidden_size, mlp, False, length, crops, 3 * vision.patch_size**2,
        length**2, class_token, vision.num_attention_heads,
    )  # fmt: skip
    rows = crops * (patches + (config.model_type == "video_llava"))  # its frames keep their class token
    before = config.model_type in ("llava", "llava_next")
    return ModelDims(tower, ((vision.hidden_size, text.width), (text.width, text.width)), rows, text, before)


def _internvl_dims(config: Any, crops: int) -> ModelDims:
    vision, text = config.vision_config, _text_dims(config.text_config)
    (height, width), (patch_height, patch_width) = vision.image_size, vision.patch_size
    patches = (height // patch_height) * (width // patch_width)
    tower = TowerDims(
        vision.num_hidden_layers, vision.num_hidden_layers, vision.hidden_size, vision.intermediate_size, False,
        patches + 1, crops, vision.num_channels * patch_height * patch_width, (patches + 1) ** 2, True,
    )  # fmt: skip
    merged = int(1 / config.downsample_ratio) ** 2
    projector = ((vision.hidden_size * merged, text.width), (text.width, text.width))
    return ModelDims(tower, projector, crops * patches // merged, text, False)


def _qwen2_dims(config: Any, grid: tuple[int, int]) -> ModelDims:
    vision = config.vision_config
    mlp = int(vision.embed_dim * vision.mlp_ratio)
    return _merged_dims(config, grid, vision.embed_dim, mlp, False, (grid[0] * grid[1]) ** 2, vision.hidden_size)


def _qwen2_5_dims(config: Any, grid: tuple[int, int]) -> ModelDims:
    vision = config.vision_config
    window = vision.window_size // vision.patch_size
    spans = [[min(window, length - start) for start in range(0, length, window)] for length in grid]
    windowed = sum((height * width) ** 2 for height in spans[0] for width in spans[1])
    full = len(vision.fullatt_block_indexes)
    pairs = (full * (grid[0] * grid[1]) ** 2 + (vision.depth - full) * windowed) / vision.depth
    mlp = vision.intermediate_size
    return _merged_dims(config, grid, vision.hidden_size, mlp, True, pairs, vision.out_hidden_size)


def _qwen3_dims(config: Any, grid: tuple[int, int]) -> ModelDims:
    """Every layer whose features are added later has a merger of its own."""
    vision = config.vision_config
    mergers = 1 + len(vision.deepstack_visual_indexes)
    pairs, out = (grid[0] * grid[1]) ** 2, vision.out_hidden_size
    return _merged_dims(config, grid, vision.hidden_size, vision.intermediate_size, False, pairs, out, mergers)


def _merged_dims(
    config: Any, grid: tuple[int, int], width: int, mlp: int, gated: bool, pairs: float, out: int, mergers: int = 1
) -> ModelDims:
    """Qwen-VL: patches of an image of any size, merged in squares behind the tower."""
    vision, patches = config.vision_config, grid[0] * grid[1]
    square = vision.spatial_merge_size**2
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    tower = TowerDims(
        vision.depth, vision.depth, width, mlp, gated, patches, 1, values, pairs, False, vision.num_heads, square
    )
    projector = ((width * square, width * square), (width * square, out)) * mergers
    return ModelDims(tower, projector, patches // square, _text_dims(config.text_config), False)


_CROP_DIMS = {
    "llava": _clip_dims,
    "llava_next": _clip_dims,
    "video_llava": _clip_dims,
    "llava_onevision": _clip_dims,
    "internvl": _internvl_dims,
}
_GRID_DIMS = {"qwen2_vl": _qwen2_dims, "qwen2_5_vl": _qwen2_5_dims, "qwen3_vl": _qwen3_dims}
