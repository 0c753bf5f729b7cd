"""The short way: compress a model by one number, see what that means, undo it.

    apet.compress_model(model, tokens=64)      # or ratio=0.11, target_flops=2e12, speedup=3
    print(model.apet)                          # tokens per stage and layer, FLOPs, cache, speed-up
    apet.restore(model)

The budgets of every stage follow from the number by the method's own schedule (`Method.plan`) and the model's family
and depth. `ApetConfig` with `apet.apply_patch` stays for those who need every knob.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from apet.adapters import Adapter, UsualImage
from apet.config import ApetConfig
from apet.cost import Estimate, ModelDims, left_in_tower, prefill_cost, tokens_per_layer
from apet.methods import get_method, parse_method
from apet.patch import active_config, adapter_of, annotate, apply_patch, patched, remove_patch
from apet.plan import is_empty

TEXT_TOKENS = 64  # of the prompt that predictions speak of
_FINE = 10**6  # tokens of an image that is cut finely enough for shares


@dataclass(frozen=True)
class StageLine:
    """One line of a description.

    Attributes:
        name: "uncompressed", "vision" or "after layer L".
        first: First decoder layer with this count, from 1.
        last: Last one.
        tokens: Visual tokens that these layers see.
    """

    name: str
    first: int
    last: int
    tokens: int


@dataclass(frozen=True)
class Description:
    """What a model's compression will do to an image of the usual size; `print` shows it as a table.

    Nothing was run: counts follow from the budgets (newlines and class tokens, which take none, at most), costs are
    `apet.cost`'s. The speed-up is that of the first token where matrix products bound it.

    Attributes:
        family: The model's family.
        method: Method with its options.
        image: The image or clip, in words.
        text_tokens: Text tokens of the prompt.
        tokens_in: Visual tokens before compression.
        beside: Newlines and class tokens among them.
        stages: Runs of layers with equal counts.
        flops: Matrix products from pixels to the first token, without and with compression.
        cache_bytes: Key-value cache behind the prompt, without and with.
        tower: What happens inside the vision tower, in words; "" for nothing.
    """

    family: str
    method: str
    image: str
    text_tokens: int
    tokens_in: int
    beside: int
    stages: tuple[StageLine, ...]
    flops: tuple[float, float]
    cache_bytes: tuple[int, int]
    tower: str = ""

    @property
    def tokens_per_layer(self) -> list[int]:
        """Visual tokens of every decoder layer."""
        return [stage.tokens for stage in self.stages for _ in range(stage.first, stage.last + 1)]

    @property
    def layer_averaged_tokens(self) -> float:
        """Visual tokens, averaged over the decoder layers."""
        return sum(self.tokens_per_layer) / len(self.tokens_per_layer)

    @property
    def speedup(self) -> float:
        """How many times fewer matrix products."""
        return self.flops[0] / self.flops[1]

    def __str__(self) -> str:
        layers = self.stages[-1].last
        head = (
            f"{self.family} with {self.method}: {self.image} ({self.tokens_in} visual tokens) and {self.text_tokens} "
            "text tokens"
        )
        head += f"\n{self.tower}" if self.tower else ""
        rows = [(stage.name, f"{stage.first}-{stage.last}", f"{stage.tokens}") for stage in self.stages]
        rows.append(("average", f"1-{layers}", f"{self.layer_averaged_tokens:.1f}".removesuffix(".0")))
        lines = [f"{'stage':<16}{'layers':>8}{'visual tokens':>16}{'share':>9}"]
        for (name, span, count), tokens in zip(
            rows, [*(stage.tokens for stage in self.stages), self.layer_averaged_tokens], strict=True
        ):
            lines.append(f"{name:<16}{span:>8}{count:>16}{tokens / self.tokens_in:>8.1%}")
        lines += [
            f"{'predicted':<16}{'without':>16}{'with':>16}{'factor':>9}",
            _cost_line("prefill, TFLOP", self.flops, 1e12),
            _cost_line("cache, MiB", self.cache_bytes, 2**20),
        ]
        lines.append(f"first token: {self.speedup:.1f} times sooner where matrix products bound it")
        if self.beside:
            lines.append(f"counts hold up to {self.beside} newlines or class tokens, which take no budget")
        return "\n".join([head, *lines])


def compress_model(
    model: nn.Module,
    *,
    tokens: float | None = None,
    ratio: float | None = None,
    target_flops: float | None = None,
    speedup: float | None = None,
    method: str = "apet",
) -> nn.Module:
    """Compress visual tokens in every later forward and `generate` of `model`, until `restore`.

    Exactly one of the four numbers says how much. All are averages over the decoder layers, as papers state budgets;
    the method's published schedule spends them (64 tokens of LLaVA-1.5 with ApET: 96, and 32 behind layer 16 of 32).

    Args:
        model: A transformers vision-language model; or a `torch.compile` or PEFT wrapper, or a pipeline around one.
        tokens: Visual tokens per image, or per frame for Video-LLaVA; a clip of other families counts as one image.
            Newlines and class tokens, and the basis of Video-LLaVA's frames, come on top.
        ratio: Share of the visual tokens, between 0 and 1: natural where images keep their own size, and for clips.
        target_flops: Matrix products from pixels to the first token, for the usual image (`describe` says which).
        speedup: How many times fewer of them than without compression.
        method: Registered name, with options if any: ``"apet_plus:quota=0"``.

    Returns:
        What was given; `model.apet` describes the compression.

    Raises:
        TypeError: The model's family is unknown.
        ValueError: Not exactly one number, one that cannot be reached, or a method that the model cannot serve.
    """
    how = {"tokens": tokens, "ratio": ratio, "target_flops": target_flops, "speedup": speedup, "method": method}
    apply_patch(model, config_for(model, **how))
    annotate(model, describe(model))
    return model


@contextmanager
def compressed(model: nn.Module, **how: Any) -> Iterator[nn.Module]:
    """`compress_model` inside a ``with`` block; afterwards the model is as it was before, also when it raises.

    Args:
        model: As in `compress_model`.
        how: Its other arguments.
    """
    with patched(model, config_for(model, **how)):
        annotate(model, describe(model))
        yield model


def restore(model: nn.Module) -> nn.Module:
    """Give the model back as it was, to the bit; nothing happens to one that is not compressed. Returns the model."""
    return remove_patch(model)


def config_for(
    model: nn.Module,
    *,
    tokens: float | None = None,
    ratio: float | None = None,
    target_flops: float | None = None,
    speedup: float | None = None,
    method: str = "apet",
) -> ApetConfig:
    """The configuration that `compress_model` applies; the arguments and errors are its."""
    given = {"tokens": tokens, "ratio": ratio, "target_flops": target_flops, "speedup": speedup}
    name, value = _only(given)
    adapter = adapter_of(model)
    if name == "tokens":
        return _spent(adapter, method, value)
    if name == "ratio":
        return _shared(adapter, method, value)
    return _solved(adapter, method, name, value)


def describe(model: nn.Module) -> Description:
    """What the compression of `model` will do to an image of the usual size; of an uncompressed one, nothing.

    Raises:
        TypeError: The model's family is unknown.
        ValueError: Budgets for single images, which say nothing about others.
    """
    adapter, config = adapter_of(model), active_config(model)
    image, layers = adapter.usual_image, len(adapter.layers)
    counts = _counts(adapter, config)
    before, after = (_cost(adapter, one) for one in (None, config))
    starts = [layer for layer in range(layers) if layer == 0 or counts[layer] != counts[layer - 1]]
    lines = []
    for start, end in zip(starts, [*starts[1:], layers], strict=True):
        name = f"after layer {start}" if start else "vision" if counts[0] < _all(image) else "uncompressed"
        lines.append(StageLine(name, start + 1, end, counts[start]))
    method = "no compression" if config is None or is_empty(config) else _method(config)
    return Description(
        adapter.family, method, image.what, TEXT_TOKENS, _all(image), image.beside, tuple(lines),
        (before.flops, after.flops), (before.kv_bytes, after.kv_bytes), _inside(adapter, config),
    )  # fmt: skip


def _inside(adapter: Adapter, config: ApetConfig | None) -> str:
    """What happens inside the vision tower, in words."""
    if config is None or not config.reduces_tower:
        return ""
    if config.tower_mode == "lossless":
        return "in the vision tower: lossless, patches that their neighbours predict are left out (not in the figures)"
    image = adapter.usual_image
    tower = ModelDims.of(adapter.model.config, image.crops, image.grid).tower
    patches, kind = (
        tower.patches // tower.merged,
        "patches" if tower.merged == 1 else f"groups of {tower.merged} patches",
    )
    left = zip(left_in_tower(config, patches), config.tower_layer_list, strict=True)
    cuts = ", ".join(f"{count} of {patches} {kind} behind layer {layer}" for count, layer in left)
    return f"in the vision tower: {config.tower_mode}, {cuts}{' of each crop' if image.crops > 1 else ''}"


def _only(given: Mapping[str, float | None]) -> tuple[str, float]:
    """The one number that is given.

    Raises:
        ValueError: None or several, or one that is not positive.
    """
    found = [(name, value) for name, value in given.items() if value is not None]
    if len(found) != 1:
        names = ", ".join(f"{name}=" for name in given)
        got = ", ".join(f"{name}={value!r}" for name, value in found) or "none"
        raise ValueError(f"give exactly one of {names} to say how much to compress; got {got}")
    ((name, value),) = found
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r} must be a number above 0")
    if name == "ratio" and value >= 1:
        raise ValueError(f"ratio={value!r} must be a share below 1; to keep every token, do not compress")
    return name, value


def _spent(adapter: Adapter, method: str, tokens: float) -> ApetConfig:
    """Budgets in counts for an image of any size."""
    length = _length(adapter)
    fields = _planned(adapter, method, tokens, length, f"tokens={tokens!r}")
    if _by_frame(adapter):
        # Decoder budgets are for whole clips, of any number of frames. Shares are rounded down: half a token more.
        decoder = _shares(fields, length, 0.5).get("image_token_ratio_list", ())
        fields = {name: value for name, value in fields.items() if name != "image_token_list"}
        fields["image_token_ratio_list"] = decoder
    if not adapter.single_crop and "visual_token_num" in fields:
        fields["budget_per"] = "image"
    return ApetConfig.from_dict(fields)


def _shared(adapter: Adapter, method: str, ratio: float) -> ApetConfig:
    """Budgets in shares; in counts where all images have equally many tokens, as published."""
    if _alike(adapter):
        return _spent(adapter, method, ratio * _length(adapter))
    fields = _planned(adapter, method, ratio * _FINE, _FINE, f"ratio={ratio!r}")
    kept = {name: value for name, value in fields.items() if name not in ("visual_token_num", "image_token_list")}
    return ApetConfig.from_dict(kept | _shares(fields, _FINE))


def _planned(adapter: Adapter, method: str, average: float, length: int, asked: str) -> dict[str, Any]:
    """What the method's schedule makes of an average, as fields of `ApetConfig`.

    Raises:
        ValueError: The method cannot spend it, or keeps every token.
    """
    name, options = parse_method(method)
    fields = get_method(name, **options).plan(average, length, len(adapter.layers))
    if not fields:
        image = adapter.usual_image
        raise ValueError(
            f"{asked} lets method {name!r} keep every visual token of {image.what} ({length}); there is nothing to "
            "compress: ask for less, or leave the model as it is"
        )
    return {**fields, "method": name, "method_options": options}


def _shares(fields: Mapping[str, Any], length: int, rest: float = 0.0) -> dict[str, Any]:
    """Counts as shares of the tokens that enter their stage; `rest` is added to those inside the decoder."""
    found: dict[str, Any] = {}
    if "visual_token_num" in fields:
        found["image_token_ratio"] = fields["visual_token_num"] / length
    entering, shares = fields.get("visual_token_num", length), []
    for count in fields.get("image_token_list", ()):
        shares.append(min(1.0, (count + rest) / entering))
        entering = count
    return found | ({"image_token_ratio_list": tuple(shares)} if shares else {})


def _solved(adapter: Adapter, method: str, name: str, value: float) -> ApetConfig:
    """The most tokens of the usual image that cost no more than asked for.

    Raises:
        ValueError: Even one token costs more, or nothing has to be compressed.
    """
    base, length = _cost(adapter, None).flops, _length(adapter)
    most = value if name == "target_flops" else base / value
    if most >= base:
        raise ValueError(f"{name}={value!r} asks for no less than the uncompressed {base:.4g} FLOPs; nothing to do")
    by_share = not (_alike(adapter) or _by_frame(adapter))

    def config(tokens: int) -> ApetConfig:
        return _shared(adapter, method, tokens / length) if by_share else _spent(adapter, method, tokens)

    def flops(tokens: int) -> float:
        return _cost(adapter, config(tokens)).flops

    least = _fewest(config, length)
    if flops(least) > most:
        raise ValueError(
            f"{name}={value!r} cannot be reached: with {least} visual tokens on average method {method!r} still needs "
            f"{flops(least):.4g} of {base:.4g} FLOPs (vision tower and text are not compressed), "
            f"{base / flops(least):.2f} times fewer; ask for less"
        )
    low, high = least, length
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if flops(middle) <= most else (low, middle)
    return config(low)


def _fewest(config: Callable[[int], ApetConfig], length: int) -> int:
    """The smallest average that the method's schedule can spend; raises its error if there is none."""
    low, high = 0, length - 1
    config(high)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            config(middle)
        except ValueError:
            low = middle
        else:
            high = middle
    return high


def _alike(adapter: Adapter) -> bool:
    """Whether every image has equally many tokens."""
    return adapter.crop_tokens is not None and adapter.single_crop


def _by_frame(adapter: Adapter) -> bool:
    """Whether vision budgets of clips are for each frame."""
    return adapter.videos is not None and adapter.preset.video_budget_per == "frame"


def _length(adapter: Adapter) -> int:
    """Visual tokens of the usual image, or of one frame of the usual clip."""
    image = adapter.usual_image
    return image.tokens // image.crops if _by_frame(adapter) else image.tokens


def _all(image: UsualImage) -> int:
    return image.tokens + image.beside


def _chosen(adapter: Adapter, config: ApetConfig | None) -> list[int]:
    """Tokens of the usual image in every decoder layer, without those that take no budget."""
    image, layers = adapter.usual_image, len(adapter.layers)
    if config is None or is_empty(config):
        return [image.tokens] * layers
    if config.compat is not None:
        raise ValueError(f"compat={config.compat!r} is not predicted; take the counts from apet.last_result")
    clip = _by_frame(adapter) and config.video_budget_per != "clip"
    if config.video_token_num is not None:
        budget = {"visual_token_num": config.video_token_num, "image_token_ratio": None} if _by_frame(adapter) else {}
        config = replace(config, **budget, video_token_num=None)
    parted = config.budget_per == "crop" and (clip or not adapter.single_crop)
    reads = get_method(config.method, **config.method_options).reads(config)
    appends = clip and adapter.preset.frame.insertion == "append" and "basis_selection" in reads
    added = config.basis_token_num if appends else 0
    return tokens_per_layer(config, image.tokens, layers, image.crops if parted else 1, added, image.crops)


def _counts(adapter: Adapter, config: ApetConfig | None) -> list[int]:
    """Tokens of the usual image in every decoder layer: newlines and class tokens at most one for every other token."""
    beside = adapter.usual_image.beside
    return [count + min(beside, count) for count in _chosen(adapter, config)]


def _cost(adapter: Adapter, config: ApetConfig | None) -> Estimate:
    """From pixels to the first token, for the usual image."""
    image, model = adapter.usual_image, adapter.model
    shape = {"crops": image.crops} if image.grid is None else {"grid": image.grid}
    compressed = config is not None and not is_empty(config)
    projected = None
    if compressed and adapter.projector is not None:
        method = get_method(config.method, **config.method_options)
        in_front = method.features == "pre_projector" and "text_embeddings" not in method.needs("vision")
        projected = _chosen(adapter, config)[0] if in_front else image.tokens
    return prefill_cost(
        ModelDims.of(model.config, **shape), _counts(adapter, config), text_tokens=TEXT_TOKENS, dtype=model.dtype,
        projected=projected, early_exit=compressed and bool(adapter.towers), config=config,
    )  # fmt: skip


def _method(config: ApetConfig) -> str:
    options = ",".join(f"{name}={value}" for name, value in config.method_options.items())
    return f"{config.method}:{options}" if options else config.method


def _cost_line(name: str, values: tuple[float, float], unit: float) -> str:
    without, with_ = values
    return f"{name:<16}{without / unit:>16.4g}{with_ / unit:>16.4g}{without / with_:>8.1f}x"
