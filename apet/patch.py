"""Turn compression on and off for a transformers model: `apply_patch`, `remove_patch`, `patched`, `last_result`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from torch import nn

from apet.adapters import Adapter, adapter_for
from apet.adapters.decoder import DecoderPatch, Stage, StageRun
from apet.adapters.vision import ImageLayout, VisionStage
from apet.config import ApetConfig, check_not_growing
from apet.methods import selector
from apet.result import CompressionResult, StageResult

_PATCH = "_apet_patch"


class _Patch:
    """Everything `apply_patch` put on a model, so that `remove_patch` can take it away again."""

    def __init__(self, adapter: Adapter, config: ApetConfig) -> None:
        self.config = config
        self.num_layers = len(adapter.layers)
        self.vision, stages = _build_stages(adapter, config)
        positions = adapter.preset.position_mode if config.position_mode == "auto" else config.position_mode
        self.decoder = DecoderPatch(adapter, stages, positions, self.vision)
        self._generation = adapter.model.generation_config
        # With a static cache on a GPU generate() compiles the decoding step; the hooks' state is not traceable.
        self._disable_compile = getattr(self._generation, "disable_compile", False)
        self._generation.disable_compile = True
        self._handles = self.decoder.attach()
        if self.vision is not None:
            self._handles += self.vision.attach() + adapter.attach_encoder(self.vision)

    def detach(self) -> None:
        """Remove the hooks and restore the generation config."""
        for handle in self._handles:
            handle.remove()
        self._generation.disable_compile = self._disable_compile


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
        ValueError: A layer the model does not have, budgets that grow, an unknown method, or a text model with
            sliding-window attention.
    """
    if not isinstance(config, ApetConfig):
        raise TypeError(f"config must be an apet.ApetConfig, got {type(config).__name__}")
    adapter = adapter_for(model)
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
    tokens_in = _by_row(decoder.prompt, [block.length for block in decoder.prompt], decoder.rows)
    stages = tuple(_stage_result(run, decoder.rows) for run in decoder.runs)
    return CompressionResult(patch.config, patch.num_layers, stages, tokens_in)


def _stage_result(run: StageRun, rows: int) -> StageResult:
    lengths = _by_row(run.blocks, [block.length for block in run.blocks], rows)
    return StageResult(run.stage.name, run.stage.layer, _by_row(run.blocks, run.kept, rows), lengths)


def _by_row(blocks, values, rows: int) -> tuple[tuple, ...]:
    """Values of the blocks, grouped by the sample they belong to."""
    return tuple(
        tuple(value for block, value in zip(blocks, values, strict=True) if block.row == row) for row in range(rows)
    )


def _build_stages(adapter: Adapter, config: ApetConfig) -> tuple[VisionStage | None, list[Stage]]:
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
    if adapter.single_crop:
        # With several crops the vision budget is a crop's and the others are the image's.
        names = ["visual_token_num", *(f"the stage after layer {layer}" for layer in config.layer_list)]
        check_not_growing(list(zip(names, config.stage_budgets, strict=True)))
    if config.layer_list:
        _refuse_sliding_window(adapter)
    vision, stages = None, []
    published = config.compat == "published"
    vision_select = None
    if vision_budget is not None:
        vision_select = selector(config, "vision", adapter.preset.vision, num_layers=num_layers, available=())
    if adapter.projector is not None:
        per_image = config.budget_per == "image"
        vision = VisionStage(adapter.projector, vision_budget, vision_select, per_image, published)
    if vision_budget is not None:
        stages.append(Stage("vision", 0, vision_budget, None if vision is not None else vision_select))
    window = vision_budget if published else None
    for layer, budget in zip(config.layer_list, layer_budgets, strict=True):
        select = selector(config, "llm", adapter.preset.llm, layer=layer, num_layers=num_layers, available=())
        stages.append(Stage(f"layer {layer}", layer, budget, select, window))
        window = budget if published else None
    return vision, stages


def _refuse_sliding_window(adapter: Adapter) -> None:
    config = adapter.text_model.config
    kinds = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window or any(kind != "full_attention" for kind in kinds):
        raise ValueError(
            f"the text model uses attention other than full (sliding_window={window}, layers {sorted(set(kinds))}); "
            "stages inside the decoder need full attention: leave layer_list empty"
        )
