"""Turn compression on and off for a transformers model: `apply_patch`, `remove_patch`, `patched`, `last_result`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from apet.adapters import Adapter, adapter_for, host
from apet.adapters.available import unavailable
from apet.adapters.decoder import DecoderPatch
from apet.adapters.encoder import EncoderLog
from apet.adapters.stages import Stage, StageRun
from apet.adapters.tower import TowerDepth
from apet.adapters.tower_log import TowerTap
from apet.adapters.vision import ImageLayout, VisionStage
from apet.config import ApetConfig, StagePreset, check_not_growing
from apet.methods import selector
from apet.methods.base import Selector
from apet.methods.context import missing_input
from apet.result import CompressionResult, StageResult

_PATCH = "_apet_patch"


class _Patch:
    """Everything `apply_patch` put on a model, so that `remove_patch` can take it away again."""

    def __init__(self, adapter: Adapter, config: ApetConfig) -> None:
        self.config = config
        self.num_layers = len(adapter.layers)
        built = _build_stages(adapter, config)
        self.vision = built.vision
        positions = adapter.preset.position_mode if config.position_mode == "auto" else config.position_mode
        encoder = EncoderLog(adapter, _per_frame(adapter, config), built.taps) if self.vision is None else None
        self.decoder = DecoderPatch(adapter, built.stages, positions, self.vision, encoder, built.size_bias)
        self._handles = self.decoder.attach()
        for tower in adapter.towers:
            self._handles += TowerDepth(tower, max((tap.depth for tap in built.taps), default=0)).attach()
        if self.vision is not None:
            self._handles += self.vision.attach() + adapter.attach_encoder(self.vision)
        else:
            self._handles += encoder.attach()

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def apply_patch(model: nn.Module, config: ApetConfig) -> nn.Module:
    """Compress visual tokens in every later forward and `generate` of `model`, until `remove_patch`.

    Everything is checked before the model is touched. A model that is already patched gets the new configuration.
    Batches, padding, caches, beams and attention implementations work as before; the model is for inference only.

    Args:
        model: A transformers vision-language model with its language-model head.
        config: Budgets and options.

    Returns:
        The same model.

    Raises:
        TypeError: The model's family is unknown, or `config` is not an ApetConfig.
        ValueError: A layer the model does not have or that cannot be shortened, budgets that grow or that the family
            does not know, an unknown method, or a text model with sliding-window attention.
        UnknownHostError: The installed transformers does not have what the patch reads.
    """
    if not isinstance(config, ApetConfig):
        raise TypeError(f"config must be an apet.ApetConfig, got {type(config).__name__}")
    adapter = adapter_for(model)
    host.prove(adapter.base_model, adapter.text_model)
    _build_stages(adapter, config)
    remove_patch(model)
    setattr(model, _PATCH, _Patch(adapter, config))
    return model


def remove_patch(model: nn.Module) -> nn.Module:
    """Restore `model` to the bit; does nothing on a model that is not patched. Returns the model."""
    patch = getattr(model, _PATCH, None)
    if patch is not None:
        patch.detach()
        delattr(model, _PATCH)
    return model


@contextmanager
def patched(model: nn.Module, config: ApetConfig) -> Iterator[nn.Module]:
    """Patch `model` inside a ``with`` block; afterwards it is as it was before, also when the block raises."""
    before = getattr(model, _PATCH, None)
    apply_patch(model, config)
    try:
        yield model
    finally:
        remove_patch(model)
        if before is not None:
            apply_patch(model, before.config)


def expecting_images(model: nn.Module, layouts: Sequence[ImageLayout]):
    """Tell a patched model, for the images encoded inside the ``with`` block, how their crops become prompt columns.

    For code that arranges crops itself (`llava`). Does nothing on a model without a patch.
    """
    patch = getattr(model, _PATCH, None)
    if patch is None or patch.vision is None:
        return nullcontext()
    return patch.vision.expecting(layouts)


def preset_config(model: nn.Module, **changes: Any) -> ApetConfig:
    """The preset budgets of a model's family (docs/families.md); decoder stages run after the middle layer, 14 of 28.

    Args:
        model: A transformers vision-language model of a known family.
        changes: Fields of `ApetConfig` to set otherwise.

    Raises:
        TypeError: The model's family is unknown.
        ValueError: A field that is unknown or out of range.
    """
    adapter = adapter_for(model)
    fields = dict(adapter.preset.budgets)
    if fields.get("image_token_list") or fields.get("image_token_ratio_list"):
        fields["layer_list"] = [max(len(adapter.layers) // 2, adapter.first_stage_layer)]
    return ApetConfig.from_dict(fields | changes)


def active_config(model: nn.Module) -> ApetConfig | None:
    """The configuration `model` is patched with, or None."""
    patch = getattr(model, _PATCH, None)
    return patch.config if patch is not None else None


def last_result(model: nn.Module) -> CompressionResult:
    """What the last prefill of a patched model kept: per stage, sample and image, with counts per layer.

    Raises:
        RuntimeError: The model is not patched, or has not run since.
    """
    patch = getattr(model, _PATCH, None)
    if patch is None:
        raise RuntimeError("the model is not patched; call apet.apply_patch(model, config) first")
    decoder = patch.decoder
    if decoder.runs is None:
        raise RuntimeError("the patched model has not run yet; call model.generate(...) first")
    tokens_in = _by_row(decoder.prompt, [item.length for item in decoder.prompt], decoder.rows)
    stages = tuple(_stage_result(run, decoder.rows) for run in decoder.runs)
    return CompressionResult(patch.config, patch.num_layers, stages, tokens_in)


def _stage_result(run: StageRun, rows: int) -> StageResult:
    lengths = _by_row(run.items, run.lengths, rows)
    return StageResult(run.stage.name, run.stage.layer, _by_row(run.items, run.kept, rows), lengths)


def _by_row(items, values, rows: int) -> tuple[tuple, ...]:
    """Values of the images, grouped by the sample they belong to."""
    return tuple(
        tuple(value for item, value in zip(items, values, strict=True) if item.row == row) for row in range(rows)
    )


@dataclass(frozen=True)
class _Built:
    """A configuration on a model.

    Attributes:
        vision: Hooks around the projector, None for families that are compressed behind it.
        stages: In the order of the layers.
        taps: Notes of the vision towers, where the method reads them.
        size_bias: Put the sizes of tokens into the decoder's attention.
    """

    vision: VisionStage | None
    stages: list[Stage]
    taps: list[TowerTap]
    size_bias: bool


def _build_stages(adapter: Adapter, config: ApetConfig) -> _Built:
    """The stages of a configuration on a model, checked.

    Raises:
        ValueError: As `apply_patch`.
    """
    num_layers = len(adapter.layers)
    vision_budget, *layer_budgets = config.stage_budgets
    for layer in config.layer_list:
        if layer >= num_layers:
            raise ValueError(
                f"layer_list={list(config.layer_list)} asks for a stage after layer {layer}, but the model has "
                f"{num_layers} layers; choose layers 1..{num_layers - 1}"
            )
        if layer < adapter.first_stage_layer:
            raise ValueError(
                f"layer_list={list(config.layer_list)} asks for a stage after layer {layer}, but the first layers of "
                "the model add features to every visual token; choose layers "
                f"{adapter.first_stage_layer}..{num_layers - 1}"
            )
    _check_family(adapter, config)
    parted = not adapter.single_crop or (adapter.videos is not None and _per_frame(adapter, config))
    if not parted or config.budget_per == "prompt":
        # The vision budget of a crop or frame is not comparable with the others, which are the image's or clip's.
        names = ["visual_token_num", *(f"the stage after layer {layer}" for layer in config.layer_list)]
        check_not_growing(list(zip(names, config.stage_budgets, strict=True)))
    if config.layer_list:
        _refuse_sliding_window(adapter)
    published = config.compat == "published"
    window = vision_budget if published else None
    pool = "prompt" if config.budget_per == "prompt" else "item"
    stages = []
    for layer, budget in zip(config.layer_list, layer_budgets, strict=True):
        select = _selector(adapter, config, "llm", adapter.preset.llm, layer)
        stages.append(Stage(f"layer {layer}", layer, budget, select, window, pool))
        window = budget if published else None
    select = None
    if vision_budget is not None or config.video_token_num is not None:
        select = _selector(adapter, config, "vision", adapter.preset.vision)
    selects = [stage.select for stage in stages] + ([] if select is None else [select])
    size_bias = any(one.size_bias for one in selects)
    sizes = size_bias or any(stage.select.reads_sizes for stage in stages)
    taps = [] if select is None else _tower_taps(adapter, select)
    # Text is known when the prompt is put together: a method that reads it chooses among the embedded image tokens.
    embedded = adapter.projector is None or (select is not None and "text_embeddings" in select.needs)
    vision = None
    if adapter.projector is not None:
        here = (None, None) if embedded else (vision_budget, select)
        per_image, tap = config.budget_per == "image", taps[0] if taps else None
        vision = VisionStage(adapter.projector, *here, per_image, published, tap, sizes)
    if embedded and select is not None:
        stages.insert(0, _embedded_stage(adapter, config, select))
    elif vision_budget is not None:
        stages.insert(0, Stage("vision", 0, vision_budget, None))
    return _Built(vision, stages, taps, size_bias)


def _selector(adapter: Adapter, config: ApetConfig, stage: str, preset: StagePreset, layer: int = 0) -> Selector:
    """The method at a stage.

    Raises:
        ValueError: The method cannot run there, or asks for something the family does not have.
    """
    select = selector(config, stage, preset, layer=layer, num_layers=len(adapter.layers))
    for name, layers in select.needs.items():
        reason = unavailable(adapter, name, layers)
        if reason is not None:
            raise ValueError(missing_input(select.method.name, name, layers, stage, reason))
    if stage == "vision" and "text_embeddings" in select.needs and config.compat == "published":
        raise ValueError(
            f"method {select.method.name!r} reads the text, which the published accounting (compat='published') does "
            "not know; leave compat out"
        )
    return select


def _tower_taps(adapter: Adapter, select: Selector) -> list[TowerTap]:
    """Notes of the towers that a method's vision stage reads: one for each kind of input; none if it reads no tower."""
    layers = {layer for wanted in select.needs.values() for layer in wanted}
    if not layers and "vision_features" not in select.needs:
        return []
    if adapter.projector is not None:
        return [TowerTap(adapter.class_token_towers[0] if layers else None, layers)]
    projector = adapter.row_projector if "vision_features" in select.needs else None
    return [TowerTap(tower, layers, projector) for tower in adapter.class_token_towers]


def _embedded_stage(adapter: Adapter, config: ApetConfig, select: Selector) -> Stage:
    """The vision stage among the embedded tokens."""
    budget = config.stage_budgets[0]
    if config.budget_per == "prompt":
        return Stage("vision", 0, budget, select, pool="prompt")
    per_crop = config.budget_per == "crop"
    if adapter.projector is not None:
        # The host has arranged the crops as one picture: tokens of all of them are chosen together.
        return Stage("vision", 0, budget, select, per_crop=per_crop)
    videos = None
    if adapter.videos is not None:
        per_frame = _per_frame(adapter, config)
        video_select = _selector(adapter, config, "vision", adapter.preset.frame) if per_frame else select
        video_budget = budget if config.video_token_num is None else config.video_token_num
        videos = Stage("vision", 0, video_budget, video_select, pool="segment" if per_frame else "item")
    return Stage("vision", 0, budget, select, pool="segment" if per_crop else "item", videos=videos)


def _per_frame(adapter: Adapter, config: ApetConfig) -> bool:
    """Whether the vision budgets of videos are for each frame."""
    chosen = adapter.preset.video_budget_per if config.video_budget_per == "auto" else config.video_budget_per
    return chosen == "frame" and config.budget_per != "prompt"


def _check_family(adapter: Adapter, config: ApetConfig) -> None:
    """Raise where the family does not know an option."""
    if adapter.projector is not None and config.budget_per == "prompt":
        raise ValueError(
            f"budget_per='prompt' is not possible for {adapter.family}: its images are compressed one by one"
        )
    if adapter.videos is None and (config.video_token_num is not None or config.video_budget_per != "auto"):
        raise ValueError(f"{adapter.family} takes no videos; leave out video_token_num and video_budget_per")
    if adapter.projector is None and config.compat == "published":
        raise ValueError(f"compat='published' is about anyres images; {adapter.family} has none: leave it out")


def _refuse_sliding_window(adapter: Adapter) -> None:
    other = host.other_attention(adapter.text_model.config)
    if other is not None:
        raise ValueError(
            f"the text model uses attention other than full ({other}); "
            "stages inside the decoder need full attention: leave layer_list empty"
        )
