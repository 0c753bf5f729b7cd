"""Everything ApET assumes about the insides of transformers, one function or constant per assumption.

No other file names an argument of a host's forward, a cache layer's attribute or a private helper
(`tests/test_host_seam.py` holds us to it). `prove` checks on the model at hand, before it is touched, that what the
hooks will read is there; `check_cache` checks while they run that the layers were given the cache the hooks saw. So a
host that renames something is refused with a sentence, and never computes something else in silence.

Seen in 5.17.0, 5.20.2, 5.22.2, 5.23.0 and 5.24.0; where they differ, the function says how.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, CompileConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.vision_utils import (
    get_max_seqlen,
    get_vision_attention_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

# What CI runs; requirements.txt has the same range.
TESTED = ">=5.17,<5.25"

# Up to 5.23 forwards, `create_causal_mask` and outputs call the cache by the second name, from 5.24 on by the first.
_CACHE_NAMES = ("cache", "past_key_values")
# The images of Video-LLaVA have the second name up to 5.22.
_PIXEL_NAMES = ("pixel_values", "pixel_values_images", "pixel_values_videos")
# Up to 5.23 `generate` may hand a model what its encoder gave instead of pixels under this name; so does 5.24.
_ENCODED = "mm_encoder_outputs"
_PROBE = "apet_probe"

_BASE_READS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
_TEXT_READS = ("inputs_embeds", "attention_mask", "position_ids")
_LAYER_READS = ("hidden_states", "attention_mask", "position_embeddings", "position_ids")
_LAYER_HAS = ("self_attn", "input_layernorm")
_TEXT_HAS = ("layers", "rotary_emb", "norm", "config")


class UnknownHostError(RuntimeError):
    """The installed transformers does not look as ApET knows it."""

    def __init__(self, missing: str) -> None:
        super().__init__(
            f"transformers {transformers.__version__} is not a host that ApET knows: {missing}. Tested are versions "
            f"{TESTED}; install one of them (pip install 'transformers{TESTED}') or a newer ApET"
        )


# Before a model is touched


def prove(base_model: nn.Module, text_model: nn.Module) -> None:
    """Check that everything the hooks will read exists in this model's classes.

    Raises:
        UnknownHostError: Something is missing; the message names it.
    """
    for name in _TEXT_HAS:
        _expect(hasattr(text_model, name), f"{type(text_model).__name__} has no {name!r}")
    for layer in text_model.layers[:1]:
        for name in _LAYER_HAS:
            _expect(hasattr(layer, name), f"{type(layer).__name__} has no {name!r}")
    reads = [(base_model, _BASE_READS), (text_model, _TEXT_READS)]
    reads += [(layer, _LAYER_READS) for layer in text_model.layers[:1]]
    for module, names in reads:
        known = argument_names(module.forward)
        for name in names:
            _expect(name in known, f"{type(module).__name__}.forward has no argument {name!r}")
        _cache_name(known, f"{type(module).__name__}.forward")
    cache_argument()


def signature(function: Callable) -> inspect.Signature:
    """Signature of a function, through decorators that kept it."""
    return inspect.signature(function)


def argument_names(function: Callable) -> list[str]:
    """Names of a function's arguments in order, through decorators that kept the signature."""
    return list(signature(function).parameters)


def by_name(names: Sequence[str], args: Sequence[Any]) -> dict[str, Any]:
    """Positional arguments by name."""
    return dict(zip(names[: len(args)], args, strict=True))


def _cache_name(known: Sequence[str], where: str) -> str:
    found = [name for name in _CACHE_NAMES if name in known]
    _expect(bool(found), f"{where} has no argument for the cache ({' or '.join(map(repr, _CACHE_NAMES))})")
    return found[0]


def _expect(fine: bool, missing: str) -> None:
    if not fine:
        raise UnknownHostError(missing)


# Arguments of forwards

# Keyword arguments that are not its own a model hands to its base model, that to its text model and (some) to the
# image encoder, the text model to every layer, a layer to its attention function. So what a forward needs goes with it.
PASSED, RESULTS, SIZES = "apet_forward", "apet_results", "apet_log_sizes"


def check_reached(reached: bool) -> None:
    """Raise where a base model ran, but its layers never got what was passed to it."""
    _expect(reached, "the keyword arguments of its base model do not reach the decoder layers")


def check_alone(running: Any) -> None:
    """A text model without what is passed to it must have been called by the user, not by a base model."""
    _expect(running is None, "the keyword arguments of its base model do not reach the text model")


def attach(output: Any, name: str, value: Any) -> None:
    """Let an output object carry something; tuples cannot."""
    if not isinstance(output, tuple):
        setattr(output, name, value)


def cache_argument() -> str:
    """What this host calls the cache in forwards, outputs and `generate`."""
    return _cache_name(argument_names(create_causal_mask), "create_causal_mask")


def with_cache(cache: Cache | None) -> dict[str, Cache | None]:
    """The keyword argument of a forward or of `generate` that hands over a cache."""
    return {cache_argument(): cache}


def cache_of(given: Mapping[str, Any] | Any) -> Cache | None:
    """The cache among a forward's arguments (by either name), or the one an output carries."""
    for name in _CACHE_NAMES:
        cache = given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)
        if cache is not None:
            return cache
    return None


def check_cache(seen: Cache | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache that a decoder layer was given, found by its type; it must be the one the base model was given.

    The text model makes one itself where it was given none; that one is still empty.

    Raises:
        UnknownHostError: The hooks missed the cache, or the layers did.
    """
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
    given = caches[0] if caches else None
    if seen is None and given is not None:
        _expect(cached_length(given) == 0, "its layers get a filled cache that its base model was not given by name")
    if seen is not None:
        _expect(given is seen, "its base model was given a cache that its layers do not get")
    return given


def has_pictures(given: Mapping[str, Any]) -> bool:
    """Whether a forward is given pixels, or what the encoder made of them."""
    return bool(given.get(_ENCODED)) or any(given.get(name) is not None for name in _PIXEL_NAMES)


def encoder_output(given: Mapping[str, Any], kind: int) -> Any:
    """What a forward is given instead of pixels: the encoder's output for images (0) or videos (1), or None."""
    return (given.get(_ENCODED) or {}).get(("image", "video")[kind])


def pixel_argument(model_class: type) -> str:
    """What the forward of a class calls the pixels of images."""
    known = argument_names(model_class.forward)
    found = [name for name in _PIXEL_NAMES[:2] if name in known]
    _expect(bool(found), f"{model_class.__name__}.forward has no argument {_PIXEL_NAMES[0]!r}")
    return found[0]


class TextInputs(NamedTuple):
    """What a base model hands to its text model.

    Attributes:
        embeds: (B, L, D).
        mask: 2-D, 4-D, a mapping of them, or None.
        positions: (B, L), with M-RoPE (3 or 4, B, L), or None.
    """

    embeds: Tensor
    mask: Any
    positions: Tensor | None


def text_inputs(kwargs: Mapping[str, Any]) -> TextInputs:
    """What a base model hands to its text model, all by keyword.

    Raises:
        UnknownHostError: Something is not handed over.
    """
    for name in _TEXT_READS:
        _expect(name in kwargs, f"the text model is called without {name!r}")
    _expect(kwargs["inputs_embeds"] is not None, "the text model is called without embeddings")
    return TextInputs(*(kwargs[name] for name in _TEXT_READS))


def replaced_text_inputs(kwargs: Mapping[str, Any], inputs: TextInputs) -> dict[str, Any]:
    """The keyword arguments of a text model with other embeddings, mask and positions."""
    return {**kwargs, **dict(zip(_TEXT_READS, inputs, strict=True))}


def full_mask(mask: Any) -> Any:
    """The mask of full-attention layers, where a mask per kind of layer was made (static caches)."""
    return mask.get("full_attention") if isinstance(mask, Mapping) else mask


def layer_hidden(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """(B, L, D) what enters a layer of a decoder or of a tower: its first argument, or a keyword."""
    _expect(len(args) > 0 or "hidden_states" in kwargs, "a layer is called without 'hidden_states'")
    return args[0] if args else kwargs["hidden_states"]


def with_hidden(args: tuple, kwargs: dict, hidden: Tensor) -> tuple[tuple, dict]:
    """A layer's arguments with another input."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def layer_rotary(kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The rotary embeddings (cos, sin) that a decoder layer is given."""
    _expect(kwargs.get("position_embeddings") is not None, "a decoder layer is called without 'position_embeddings'")
    return kwargs["position_embeddings"]


def with_layer_inputs(kwargs: dict, mask: Tensor | None, rotary: tuple[Tensor, Tensor]) -> dict:
    """A decoder layer's keyword arguments with a mask and rotary embeddings of its own.

    Positions are needed for the rotary embeddings only; handed to the layers they would only make FlashAttention look
    for packed sequences.
    """
    _expect("attention_mask" in kwargs, "a decoder layer is called without 'attention_mask'")
    return {**kwargs, "attention_mask": mask, "position_embeddings": rotary, "position_ids": None}


def run_layer(
    layer: nn.Module, hidden: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor], cache: Cache
) -> Tensor:
    """(B, L, D) the output of a decoder layer."""
    return layer(hidden, attention_mask=mask, position_embeddings=rotary, use_cache=True, **with_cache(cache))


# What a host reads on its own, and what it computes with it

# Arguments of `generate`, of forwards and of encoders whose values decide about shapes or positions.
READ_BY_HOSTS = (
    "input_ids", "attention_mask", "image_sizes", "batch_num_images", "image_grid_thw", "video_grid_thw",
    "mm_token_type_ids", "second_per_grid_ts",
)  # fmt: skip
# Those that an encoder may be given on the host.
READ_BY_ENCODERS = ("image_sizes", "batch_num_images", "image_grid_thw", "video_grid_thw")
# What makes the arguments of a forward of those of `generate`; where placeholders are, and the check of their number;
# rotary positions with M-RoPE.
PREPARE, PLACEHOLDERS, ROTARY_POSITIONS = "prepare_inputs_for_generation", "get_placeholder_mask", "get_rope_index"
# `generate` looks for negative ids here, behind the encoder.
LOGITS_PROCESSORS = "_get_logits_processor"


def prompt_beside(given: Mapping[str, Any]) -> Tensor | None:
    """The ids among the arguments of `LOGITS_PROCESSORS`, where it only looks at them; None if it keeps them."""
    config = given["generation_config"]
    penalty, length = config.encoder_repetition_penalty, config.encoder_no_repeat_ngram_size
    return given.get("encoder_input_ids") if penalty in (None, 1.0) and length in (None, 0) else None


def with_prompt_beside(given: Mapping[str, Any], ids: Tensor) -> dict[str, Any]:
    """These arguments with other ids."""
    return {**given, "encoder_input_ids": ids}


def shape_alone(given: Mapping[str, Any], ids: Tensor) -> dict[str, Tensor]:
    """Arguments of `PLACEHOLDERS` with which it works on the host: ids, and embeddings of which only the shape counts.

    Args:
        given: Its arguments.
        ids: (B, L) on the CPU.
    """
    embeds = given["inputs_embeds"]
    return {"input_ids": ids, "inputs_embeds": torch.empty((), dtype=embeds.dtype).expand(embeds.shape)}


# Masks, positions and caches


def causal_mask(
    text_model: nn.Module, hidden: Tensor, mask: Tensor | None, cache: Cache | None, layer: int, padded: bool = False
) -> Any:
    """The mask of a decoder layer, as its attention implementation wants it.

    Args:
        text_model: The decoder.
        hidden: (B, Q, D) what enters the layer.
        mask: (B, keys) bool, False on padding; None without padding.
        cache: The prompt's cache.
        layer: 0-based.
        padded: Whether the mask is known to have padding; else the host reads it, to leave out a mask without any.
    """
    return create_causal_mask(
        config=text_model.config, inputs_embeds=hidden, attention_mask=mask, layer_idx=layer,
        allow_is_causal_skip=not padded, **with_cache(cache),
    )  # fmt: skip


def takes_prepared_mask(text_model: nn.Module) -> bool:
    """Whether attention takes what `causal_mask` makes of padding as it is: all but FlashAttention, which unpads."""
    return ALL_MASK_ATTENTION_FUNCTIONS[attention_name(text_model.config)] in _MASKS_OF_VALUES


_MASKS_OF_VALUES = tuple(ALL_MASK_ATTENTION_FUNCTIONS[name] for name in ("eager", "sdpa"))


def makes_cache(text_model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether a text model that is given no cache makes one before it makes its mask."""
    asked = kwargs.get("use_cache")
    return bool(text_model.config.use_cache if asked is None else asked)


def check_made(expected: bool, cache: Cache | None) -> None:
    """Raise where a text model that should have made a cache has not."""
    _expect(not expected or cache is not None, "a text model with use_cache makes no cache")


def rotary(text_model: nn.Module, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The decoder's rotary embeddings (cos, sin) at positions (B, L) or (3, B, L)."""
    return text_model.rotary_emb(hidden, positions)


def cached_length(cache: Cache, layer: int = 0) -> int | Tensor:
    """Tokens in a layer of the cache; a tensor on the device for a static one."""
    return cache.get_seq_length(layer)


def key_length(cache: Cache, layer: int, queries: int) -> int:
    """Keys that `queries` new tokens will meet in a layer: for a static cache all that it has room for."""
    return cache.get_mask_sizes(queries, layer)[0]


def is_static(cache: Cache | None, layer: int | None = None) -> bool:
    """Whether a cache (or one layer of it) has a fixed shape, so that decoding on it may be compiled."""
    part = cache if cache is None or layer is None else cache.layers[layer]
    return bool(getattr(part, "is_compileable", False))


def compile_everywhere(**changes: Any) -> CompileConfig:
    """A `compile_config` for `generate` that compiles the decoding step on any device; by itself it does so on GPUs."""
    config = CompileConfig(**{"dynamic": False} | changes)
    config._compile_all_devices = True
    return config


# Attention


def other_attention(config: Any) -> str | None:
    """Which attention other than full a decoder's configuration asks for; None where all is full."""
    kinds = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window or any(kind != "full_attention" for kind in kinds):
        return f"sliding_window={window}, layers {sorted(set(kinds))}"
    return None


def attention_name(config: Any) -> str:
    """The attention implementation that a configuration names."""
    return config._attn_implementation


def set_attention_name(config: Any, name: str) -> None:
    """Name another implementation in a configuration; modules look it up when they run."""
    config._attn_implementation = name


def register_attention(name: str, function: Callable, masks_of: str | None = None) -> None:
    """Make an attention function available under a name, with the masks of the implementation `masks_of`."""
    AttentionInterface.register(name, function)
    if masks_of is not None:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[masks_of])


def attention_function(name: str, module: nn.Module) -> Callable:
    """The attention function of an implementation; every modelling file has an eager one of its own."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention module of a decoder layer."""
    return layer.self_attn


class AttentionCall(NamedTuple):
    """How an attention module is called without a cache: `module.forward(hidden, **kwargs)`."""

    module: nn.Module
    hidden: Tensor
    kwargs: dict[str, Any]


def decoder_attention(layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> AttentionCall:
    """The attention of a decoder layer whose input is `hidden` (B, L, D)."""
    inputs = {"position_embeddings": rotary, "attention_mask": None}
    return AttentionCall(layer.self_attn, layer.input_layernorm(hidden), inputs)


def tower_attention(layer: nn.Module, hidden: Tensor) -> AttentionCall:
    """The attention of a layer of a CLIP, SigLIP or DINOv2 tower whose input is `hidden` (C, P, D)."""
    if hasattr(layer, "self_attn"):
        return AttentionCall(layer.self_attn, layer.layer_norm1(hidden), {"attention_mask": None})
    return AttentionCall(tower_attention_module(layer), layer.norm1(hidden), {})


def tower_attention_module(layer: nn.Module) -> nn.Module:
    """The module of such a layer that looks up its attention function.

    DINOv2 makes queries and keys one module further inside before 5.20.
    """
    attention = getattr(layer, "self_attn", None) or layer.attention
    return getattr(attention, "attention", attention)


def tower_keys_values(layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (C, n, D) that a tower layer makes of rows of its input (C, n, D), heads side by side."""
    call = tower_attention(layer, hidden)
    names = next(pair for pair in _KEYS_VALUES if hasattr(call.module, pair[0]))
    return tuple(getattr(call.module, name)(call.hidden) for name in names)


# The projections of keys and values; DINOv2 has the second names before 5.20.
_KEYS_VALUES = (("k_proj", "v_proj"), ("key", "value"))


def tower_attention_modules(tower: nn.Module) -> list[nn.Module]:
    """The modules of a tower, packed or not, that look up their attention function."""
    return [tower_attention_module(layer) for layer in tower_layers(tower)] + [
        layer.attn for layer in packed_layers(tower)
    ]


def prove_tower(tower: nn.Module) -> None:
    """Check that a tower's layers are built as the tower stage reads them.

    Raises:
        UnknownHostError: Something is missing; the message names it.
    """
    for layer in packed_layers(tower)[:1]:
        for name in ("attn", "norm1"):
            _expect(hasattr(layer, name), f"{type(layer).__name__} has no {name!r}")
        for name in ("hidden_states", *_PACKED_READS):
            known = argument_names(layer.forward)
            _expect(name in known, f"{type(layer).__name__}.forward has no argument {name!r}")
        _expect("grid_thw" in argument_names(tower.forward), f"{type(tower).__name__}.forward has no 'grid_thw'")
        _expect(
            layer.attn.config is tower.config, f"{type(layer.attn).__name__} does not share its tower's configuration"
        )
    for layer in tower_layers(tower)[:1]:
        norm = "layer_norm1" if hasattr(layer, "self_attn") else "norm1"
        for name in (norm, "self_attn" if hasattr(layer, "self_attn") else "attention"):
            _expect(hasattr(layer, name), f"{type(layer).__name__} has no {name!r}")
        module = tower_attention_module(layer)
        kind = type(module).__name__
        _expect(any(all(hasattr(module, name) for name in pair) for pair in _KEYS_VALUES), f"{kind} has no 'k_proj'")
        _expect(module.config is tower.config, f"{kind} does not share the configuration of its tower")
        first = next(iter(argument_names(layer.forward)), None)
        _expect(first == "hidden_states", f"{type(layer).__name__}.forward does not begin with 'hidden_states'")


def check_no_tower_mask(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """A tower layer must see all patches: a mask would have to be cut with them.

    Raises:
        UnknownHostError: It is given a mask.
    """
    masked = any(isinstance(value, Tensor) for value in args[1:]) or kwargs.get("attention_mask") is not None
    _expect(not masked, "a layer of the vision tower is given an attention mask")


def tower_pixels(forward: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """What a tower is given: its first argument, pixels (C, 3, H, W) or, of a packed one, values (S, V) of patches."""
    name = argument_names(forward)[0]
    _expect(bool(args) or kwargs.get(name) is not None, "the vision tower is called without pixels")
    return args[0] if args else kwargs[name]


def patch_side(tower: nn.Module) -> int:
    """Pixels of a side of a patch."""
    return tower.config.patch_size


def check_patches(fine: bool) -> None:
    """Raise where the layers of a tower get other rows than the class token and the patches of its pixels."""
    _expect(fine, "the layers of the vision tower get other rows than the patches of its pixels")


# Towers whose pictures stand one behind the other in one sequence (Qwen-VL)

_PACKED_READS = ("cu_seqlens", "position_embeddings")


def packed_layers(tower: nn.Module) -> Sequence[nn.Module]:
    """Layers of such a tower in order; none for another."""
    return getattr(tower, "blocks", ())


def packed_unit(tower: nn.Module) -> int:
    """Patches that the merger makes one token of."""
    return tower.config.spatial_merge_size**2


def packed_side(tower: nn.Module) -> int:
    """Patches of a side of these."""
    return tower.config.spatial_merge_size


def packed_grid(forward: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """(pictures, 3) time, rows and columns of patches, from the arguments of a tower's forward."""
    given = by_name(argument_names(forward), args) | dict(kwargs)
    _expect(given.get("grid_thw") is not None, "the vision tower is called without 'grid_thw'")
    return given["grid_thw"]


def packed_precomputed(tower: nn.Module, grid: Tensor) -> dict[str, Any]:
    """What such a tower computes from the sizes of its pictures, and takes as keyword arguments too.

    Args:
        tower: The tower.
        grid: (pictures, 3) on the CPU.
    """
    merged, config = tower.spatial_merge_size, tower.config
    borders, longest = get_vision_attention_seqlens(grid, config)
    found = {"position_ids": get_vision_position_ids(grid, merged), "cu_seqlens": borders, "max_seqlen": longest}
    if hasattr(tower, "fullatt_block_indexes"):
        order, windows = get_vision_window_index(grid, merged, tower.window_size, tower.patch_size)
        longest = get_max_seqlen(windows, config)
        found |= {"window_index": order, "cu_window_seqlens": windows, "max_window_seqlen": longest}
    if hasattr(tower, "num_grid_per_side"):
        found["interp_indices"], found["interp_weights"] = get_vision_interpolation_indices_and_weights(
            grid, tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners, merged
        )
    return {name: value for name, value in found.items() if value is not None}


def packed_read(tower: nn.Module) -> frozenset[str]:
    """Those of them that layers read on the host: borders of segments, but for FlashAttention's kernels."""
    flash = attention_name(tower.config).startswith("flash_attention")
    return frozenset() if flash else frozenset(("cu_seqlens", "cu_window_seqlens"))


def packed_order(tower: nn.Module, grid: Tensor) -> Tensor:
    """(G,) token, on the grid's device, that every group becomes: a tower with windows moves patches together."""
    count = int(grid.prod(-1).sum()) // packed_unit(tower)
    if not hasattr(tower, "fullatt_block_indexes"):
        return torch.arange(count, device=grid.device)
    order, _ = get_vision_window_index(
        grid, spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size, patch_size=tower.patch_size
    )
    return order.to(grid.device)


def packed_inputs(kwargs: Mapping[str, Any]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Borders of the segments (n + 1,) and rotary embeddings (cos, sin) that a layer is given."""
    for name in _PACKED_READS:
        _expect(kwargs.get(name) is not None, f"a layer of the vision tower is called without {name!r}")
    return tuple(kwargs[name] for name in _PACKED_READS)


def with_packed_inputs(kwargs: Mapping[str, Any], borders: Tensor, rotary: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """A layer's keyword arguments with other segments; the longest of them is an upper bound as it was."""
    return {**kwargs, **dict(zip(_PACKED_READS, (borders, rotary), strict=True))}


def packed_attention(layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> AttentionCall:
    """The attention of such a layer over rows (S, D) of one segment."""
    borders = torch.tensor([0, len(hidden)], dtype=torch.int32, device=hidden.device)
    return AttentionCall(layer.attn, layer.norm1(hidden), dict(zip(_PACKED_READS, (borders, rotary), strict=True)))


def check_segments(fine: bool) -> None:
    """Raise where the attention of a packed tower does not go through its segments one by one, or all at once."""
    _expect(fine, "the vision tower's attention does not go through its segments in order")


def takes_other_keys(name: str) -> bool:
    """Whether an attention implementation is known to take more keys than queries, and heads of any multiple of 8."""
    return name in ("eager", "sdpa") or name.startswith("flash_attention")


class Projected(NamedTuple):
    """What an attention module would compare, and mix.

    Attributes:
        queries: (B, heads, L, d).
        keys: (B, kv_heads, L, d).
        scale: Factor of their products.
        values: (B, kv_heads, L, d).
    """

    queries: Tensor
    keys: Tensor
    scale: float
    values: Tensor

    def scores(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Scaled products (G, heads, Q, L) of the queries at `columns` (G, Q) of rows (G, 1) with all keys.

        In float32, or float64 for a float64 model.
        """
        heads = self.queries.shape[1]
        queries = _wide(self.queries.transpose(1, 2)[rows, columns].transpose(1, 2)) * self.scale
        keys = _wide(self.keys[rows.flatten()]).repeat_interleave(heads // self.keys.shape[1], 1)
        return queries @ keys.transpose(2, 3)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _Taken(Exception):
    def __init__(self, projected: Projected) -> None:
        self.projected = projected


def _take(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
    scale = kwargs.get("scaling")
    raise _Taken(Projected(query, key, query.shape[-1] ** -0.5 if scale is None else scale, value))


register_attention(_PROBE, _take)


@torch.no_grad()
def project(call: AttentionCall) -> Projected:
    """Queries and keys of an attention module that looks its attention function up, for one input (B, L, D).

    Raises:
        NotImplementedError: The module calls no attention function.
    """
    # A shallow copy shares the weights; its configuration names our function, the model's own stays as it is.
    probe = copy.copy(call.module)
    probe.config = copy.copy(probe.config)
    set_attention_name(probe.config, _PROBE)
    try:
        probe.forward(call.hidden, **call.kwargs)
    except _Taken as taken:
        return taken.projected
    raise NotImplementedError(f"{type(call.module).__name__} does not look up its attention function")


# Vision towers and encoders

ENCODERS = ("get_image_features", "get_video_features")

# Ways into continuous batching, where they exist.
CONTINUOUS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def encoded_features(output: Any) -> Any:
    """Features behind the projector in the output of one of `ENCODERS`: per image (T, D), or (C, T, D)."""
    _expect(hasattr(output, "pooler_output"), f"the image encoder gives a {type(output).__name__} without features")
    return output.pooler_output


def tower_layers(tower: nn.Module) -> Sequence[nn.Module]:
    """Layers of a vision tower in order (DINOv2 calls their list `layer`); none for a tower of another build."""
    encoder = getattr(tower, "encoder", None)
    return getattr(encoder, "layers", getattr(encoder, "layer", ()))


def has_class_token(tower: nn.Module) -> bool:
    """Whether a tower puts a class token in front of its patches."""
    embeddings = getattr(tower, "embeddings", None)
    return any(getattr(embeddings, name, None) is not None for name in ("class_embedding", "cls_token"))


def wanted_state(kwargs: Mapping[str, Any]) -> int | None:
    """The one hidden state a tower is asked for, by number (0 is the embedding); None for all, or several.

    From 5.23 on LLaVA asks for its layer by number; before, a list counted differently.
    """
    states = kwargs.get("output_hidden_states")
    return states if type(states) is int and states != 0 else None


def tower_state(tower: nn.Module, pixels: Tensor, layer: int, attentions: bool = False) -> tuple[Tensor, Any]:
    """Hidden state `layer` of a tower for pixels (C, 3, H, W), and all attention maps where they are asked for."""
    extra = {"output_attentions": True} if attentions else {}
    # Asked for by number, so that a patched tower can stop there.
    output = tower(pixels, output_hidden_states=True if attentions else layer or True, return_dict=True, **extra)
    return output.hidden_states[layer], output.attentions if attentions else None


def crops_of(size: Sequence[int], pinpoints: Any, side: int) -> int:
    """Crops that an anyres picture of size (height, width) is encoded as, the overview included."""
    return image_size_to_num_patches(size, pinpoints, side)


def packed(base_model: nn.Module, crops: Tensor, size: Sequence[int], newline: Tensor, **options: Any) -> Tensor:
    """How a host arranges the rows (crops, N, D) of one anyres picture in its prompt: (T, D)."""
    (arranged,), _ = base_model.pack_image_features([crops], [size], image_newline=newline, **options)
    return arranged


# Generation


def with_arguments(forward: Callable, *names: str) -> inspect.Signature:
    """The signature of a forward with more keywords: `generate` reads it to see what it may hand over."""
    known = signature(forward)
    *before, rest = known.parameters.values()
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    return known.replace(parameters=[*before, *added, rest])


def prompt_ids(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The ids (B, L) that `generate` was called with; None for embeddings alone."""
    given = [*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")]
    return next((one for one in given if isinstance(one, Tensor)), None)
