"""From a configuration to the stages of a model: what runs where; what does not fit is refused, the model untouched."""

from dataclasses import dataclass

from torch import nn

from apet.adapters import Adapter, host
from apet.adapters.stages import Stage
from apet.adapters.tower import TowerTap, upper_half
from apet.adapters.tower_stage import TowerStage
from apet.adapters.vision import VisionStage
from apet.config import ApetConfig, StagePreset, check_not_growing
from apet.methods import get_method, keeps_positions, selector
from apet.methods.base import Selector
from apet.methods.context import StageContext, missing_input


@dataclass(frozen=True)
class Plan:
    """A configuration on a model.

    Attributes:
        vision: Hooks around the projector, None for families that are compressed behind it.
        stages: In the order of the layers.
        taps: Notes of the vision towers, where the method reads them.
        size_bias: Put the sizes of tokens into the decoder's attention.
        keep_positions: Surviving tokens keep their positions; else they are counted anew.
        per_frame: The vision budgets of videos are for each frame.
        tower: What happens inside the vision towers, if anything.
    """

    vision: VisionStage | None
    stages: list[Stage]
    taps: list[TowerTap]
    size_bias: bool
    keep_positions: bool
    per_frame: bool
    tower: TowerStage | None


def is_empty(config: ApetConfig) -> bool:
    """Whether a configuration asks for no compression anywhere."""
    none = all(budget is None for budget in config.stage_budgets) and config.video_token_num is None
    return none and not config.reduces_tower


def plan(adapter: Adapter, config: ApetConfig) -> Plan:
    """The stages of a configuration on a model, checked.

    Raises:
        ValueError: As `apet.apply_patch`.
    """
    _check_layers(adapter, config)
    _check_family(adapter, config)
    _check_budgets(adapter, config)
    stages = _decoder_stages(adapter, config)
    select = None
    if config.stage_budgets[0] is not None or config.video_token_num is not None:
        select = _selector(adapter, config, "vision", adapter.preset.vision)
    selects = [stage.select for stage in stages] + ([] if select is None else [select])
    tower = _tower_stage(adapter, config, select)
    in_tower = [] if tower is None else list(tower.selects.values())
    _check_options(adapter, config, selects, in_tower)
    size_bias = any(one.size_bias for one in selects)
    sizes = size_bias or any(stage.select.reads_sizes for stage in stages)
    taps = [] if select is None else _tower_taps(adapter, select)
    # Text is known when the prompt is put together: a method that reads it chooses among the embedded image tokens.
    embedded = adapter.projector is None or (select is not None and "text_embeddings" in select.needs)
    vision = None if adapter.projector is None else _vision_stage(adapter, config, select, embedded, taps, sizes)
    drops = tower is not None and tower.mode != "restore"
    if embedded and (select is not None or drops and vision is None):
        # Without a budget every token is kept that the tower left, and nobody is asked.
        stages.insert(0, _embedded_stage(adapter, config, select or _apet(adapter, config, "vision")))
    elif config.stage_budgets[0] is not None or drops:
        stages.insert(0, Stage("vision", 0, config.stage_budgets[0], None))
    keep = keeps_positions(config, adapter.preset.position_mode)
    return Plan(vision, stages, taps, size_bias, keep, _per_frame(adapter, config), tower)


def _tower_stage(adapter: Adapter, config: ApetConfig, select: Selector | None) -> TowerStage | None:
    """What happens inside the vision towers; None for nothing.

    Raises:
        ValueError: A setting without effect, or one that the family, its tower or the method cannot have.
        UnknownHostError: A tower of another build.
    """
    mode, layers = config.tower_mode, config.tower_layer_list
    _check_tower_options(config)
    if not config.reduces_tower:
        return None
    if mode not in adapter.tower_modes:
        possible = ", ".join(adapter.tower_modes) or "none"
        raise ValueError(
            f"tower_mode={mode!r} is not possible for {adapter.family} (possible: {possible}); leave it out"
        )
    if mode != "restore" and select is not None and "text_embeddings" in select.needs:
        raise ValueError(
            f"method {select.method.name!r} chooses among the embedded tokens, where those that the tower dropped are "
            "blank; choose tower_mode='restore', or another method"
        )
    for tower in adapter.reducible_towers:
        _check_tower(tower, mode)
    last = adapter.tower_depth - 1
    if layers and layers[-1] > last:
        raise ValueError(
            f"tower_layer_list={list(layers)}: the model reads features behind layer {last + 1} of the vision tower, "
            f"so a stage can stand after layers 1..{last}"
        )
    budgets = dict(zip(layers, config.tower_token_list, strict=True))
    selects = {layer: _apet(adapter, config, "tower", layer) for layer in layers} if mode == "merge" else {}
    return TowerStage(mode, budgets, selects, config.tower_key_layers)


def _apet(adapter: Adapter, config: ApetConfig, stage: str, layer: int = 0) -> Selector:
    """The method that merges inside towers, whichever one chooses behind them."""
    return Selector(get_method("apet"), StageContext(stage, adapter.preset.vision, config, layer))


def _check_tower(tower: nn.Module, mode: str) -> None:
    """Raise for a tower whose layers or attention the tower stage does not know."""
    packed = host.packed_layers(tower)
    if not packed and not host.tower_layers(tower):
        raise ValueError(f"the tower stage does not know the layers of {type(tower).__name__}; leave it out")
    host.prove_tower(tower)
    name = host.attention_name(tower.config)
    if not host.takes_other_keys(name):
        raise ValueError(
            f"the tower stage does not know whether attention {name!r} takes other keys than queries; load the model "
            "with attn_implementation='sdpa', 'eager' or 'flash_attention_2'"
        )
    if packed and mode == "restore" and name.startswith("flash_attention"):
        raise ValueError(
            "tower_mode='restore' gives every segment of the vision tower further keys, which is not written for "
            f"{name}, that takes all segments at once; load the model with attn_implementation='sdpa'"
        )


def _check_tower_options(config: ApetConfig) -> None:
    """Raise for settings of the tower stage that have no effect."""
    if config.tower_mode == "restore" and not config.tower_layer_list:
        raise ValueError("tower_mode='restore' has no effect without a tower_layer_list; give one, or leave it out")
    default = type(config).tower_key_layers
    if config.tower_mode != "restore" and config.tower_key_layers != default:
        raise ValueError(f"tower_key_layers={config.tower_key_layers} has no effect without tower_mode='restore'")


def _check_layers(adapter: Adapter, config: ApetConfig) -> None:
    """Raise for decoder stages that the model cannot have."""
    num_layers, asked = len(adapter.layers), f"layer_list={list(config.layer_list)} asks for a stage after layer"
    for layer in config.layer_list:
        if layer >= num_layers:
            raise ValueError(
                f"{asked} {layer}, but the model has {num_layers} layers; choose layers 1..{num_layers - 1}"
            )
        if layer < adapter.first_stage_layer:
            raise ValueError(
                f"{asked} {layer}, but the first layers of the model add features to every visual token; choose layers "
                f"{adapter.first_stage_layer}..{num_layers - 1}"
            )
    other = host.other_attention(adapter.text_model.config)
    if config.layer_list and other is not None:
        raise ValueError(
            f"the text model uses attention other than full ({other}); "
            "stages inside the decoder need full attention: leave layer_list empty"
        )


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


def _check_budgets(adapter: Adapter, config: ApetConfig) -> None:
    """Raise where a stage would keep more than the one before leaves."""
    parted = not adapter.single_crop or (adapter.videos is not None and _per_frame(adapter, config))
    if not parted or config.budget_per == "prompt":
        # The vision budget of a crop or frame is not comparable with the others, which are the image's or clip's.
        names = ["visual_token_num", *(f"the stage after layer {layer}" for layer in config.layer_list)]
        check_not_growing(list(zip(names, config.stage_budgets, strict=True)))


def _check_options(adapter: Adapter, config: ApetConfig, selects: list[Selector], in_tower: list[Selector]) -> None:
    """Raise for options that nothing in this configuration reads, or that no image of the model can follow."""
    if config.fps_start != "farthest" and adapter.crop_tokens is not None and config.fps_start >= adapter.crop_tokens:
        raise ValueError(
            f"fps_start: start={config.fps_start} is not one of the {adapter.crop_tokens} tokens of an image; choose "
            f"0..{adapter.crop_tokens - 1}, or 'farthest'"
        )
    get_method(config.method, **config.method_options)
    changed = config.changed_options()
    idle = {} if selects else dict(config.method_options) | ({} if in_tower else changed)
    if idle:
        options = ", ".join(f"{name}={value!r}" for name, value in idle.items())
        raise ValueError(f"{options}: no effect without a budget; give visual_token_num or another one")
    read = {name for select in [*selects, *in_tower] for name in select.method.reads(config)}
    for name, value in changed.items():
        if name not in read:
            raise ValueError(
                f"{name}={value!r} has no effect with method {config.method!r}; leave it out, or choose a method that "
                "reads it"
            )


def _decoder_stages(adapter: Adapter, config: ApetConfig) -> list[Stage]:
    """The stages inside the decoder."""
    published = config.compat == "published"
    vision_budget, *budgets = config.stage_budgets
    window = vision_budget if published else None
    pool = "prompt" if config.budget_per == "prompt" else "item"
    stages = []
    for layer, budget in zip(config.layer_list, budgets, strict=True):
        select = _selector(adapter, config, "llm", adapter.preset.llm, layer)
        stages.append(Stage(f"layer {layer}", layer, budget, select, window, pool))
        window = budget if published else None
    return stages


def _vision_stage(
    adapter: Adapter, config: ApetConfig, select: Selector | None, embedded: bool, taps: list[TowerTap], sizes: bool
) -> VisionStage:
    """The hooks around the projector; they only record where tokens are chosen behind it (`embedded`)."""
    here = (None, None) if embedded else (config.stage_budgets[0], select)
    tap = taps[0] if taps else None
    return VisionStage(adapter.projector, *here, config.budget_per == "image", config.compat == "published", tap, sizes)


def _selector(adapter: Adapter, config: ApetConfig, stage: str, preset: StagePreset, layer: int = 0) -> Selector:
    """The method at a stage.

    Raises:
        ValueError: The method cannot run there, or asks for something the family does not have.
    """
    select = selector(config, stage, preset, layer=layer, num_layers=len(adapter.layers))
    for name, layers in select.needs.items():
        reason = adapter.unavailable(name, layers)
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
    states = "vision_states" in select.needs
    if not layers and not states and "vision_features" not in select.needs:
        return []
    towers = adapter.class_token_towers
    if adapter.projector is not None:
        towers = towers[:1] if layers or states else [None]
    projector = adapter.row_projector if adapter.projector is None and "vision_features" in select.needs else None
    return [
        TowerTap(tower, layers | (set(upper_half(host.tower_layers(tower))) if states else set()), projector)
        for tower in towers
    ]


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
