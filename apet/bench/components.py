"""Where the time of a prefill goes: tower, selection, projector, decoder layers in front of and behind the LLM stage.

Marks are set by hooks, on a GPU as events in its stream, so that measuring adds no wait. Selection runs inside
pre-hooks of the patch; the hooks here are registered after them and see the modules without it.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from apet.adapters import adapter_for
from apet.measure import synchronize
from apet.methods.base import Selector

TOWER, PROJECTOR, HEAD, TOTAL, REST = "tower", "projector", "head", "total", "rest"
_TOWERS = ("vision_tower", "visual", "video_tower")
_STAGE_NAMES = {"vision": "vision", "llm": "after layer {}", "tower": "after tower layer {}"}


class Marks:
    """Named spans of time of one call.

    Args:
        device: On a GPU spans are measured there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: dict[str, Any] = {}
        self._spans: list[tuple[str, Any, Any]] = []

    def start(self, name: str) -> None:
        """Open a span of this name."""
        self._open[name] = self._now()

    def stop(self, name: str) -> None:
        """Close the span of this name."""
        self._spans.append((name, self._open.pop(name), self._now()))

    def milliseconds(self) -> dict[str, float]:
        """Time per name, spans of one name added up, and what of the total no other span holds. Waits for the GPU."""
        synchronize(self._device)
        spent: dict[str, float] = {}
        for name, start, stop in self._spans:
            elapsed = start.elapsed_time(stop) if self._device.type == "cuda" else (stop - start) * 1e3
            spent[name] = spent.get(name, 0.0) + elapsed
        spent[REST] = 2 * spent[TOTAL] - sum(spent.values())
        return spent

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def layer_groups(layers: int, stages: tuple[int, ...]) -> Mapping[int, str]:
    """Name of the group that each decoder layer (0-based) belongs to: those between two stages."""
    borders = [0, *stages, layers]
    return {
        layer: f"layers {first + 1}-{last}"
        for first, last in zip(borders, borders[1:], strict=False)
        for layer in range(first, last)
    }


@contextmanager
def marked(model: nn.Module, device: torch.device, stages: tuple[int, ...]) -> Iterator[Marks]:
    """Measure the components of every call inside the block; enter it after patching.

    Args:
        model: A model that `apet.apply_patch` serves.
        device: Where it runs.
        stages: Layers, counted from 1, behind which the decoder's time is split.
    """
    marks, adapter = Marks(device), adapter_for(model)
    groups = layer_groups(len(adapter.layers), stages)
    parts = [(TOTAL, model), (TOWER, tower_of(model)), (HEAD, model.get_output_embeddings())]
    parts += [(PROJECTOR, adapter.projector)] if adapter.projector is not None else []
    parts += [(groups[index], layer) for index, layer in enumerate(adapter.layers)]
    handles = [handle for name, module in parts for handle in _marking(marks, name, module)]
    original = Selector.__call__

    def timed(select: Selector, *args: Any, **kwargs: Any) -> Any:
        context = select.context
        inside = context.stage == "tower"
        name = f"selector, {_STAGE_NAMES[context.stage].format(context.layer)}"
        if inside:  # its time is not the tower's
            marks.stop(TOWER)
        marks.start(name)
        result = original(select, *args, **kwargs)
        marks.stop(name)
        if inside:
            marks.start(TOWER)
        return result

    Selector.__call__ = timed
    try:
        yield marks
    finally:
        Selector.__call__ = original
        for handle in handles:
            handle.remove()


def tower_stops_early(model: nn.Module, call: Callable[[], Any]) -> bool:
    """Whether `call` leaves out the last layer of the vision tower.

    The hook sits on the layer's first part: a layer that is skipped is still called.
    """
    tower = tower_of(model)
    lists = ("layers", "layer", "blocks")  # as CLIP, DINOv2 and Qwen call them
    last = [part for name, part in tower.named_modules() if name.rpartition(".")[0].endswith(lists)][-1]
    ran: list[bool] = []
    handle = next(last.children()).register_forward_pre_hook(lambda *_: ran.append(True))
    try:
        call()
    finally:
        handle.remove()
    return not ran


def tower_of(model: nn.Module) -> nn.Module:
    """The vision tower that the presets use."""
    base = adapter_for(model).base_model
    return next(getattr(base, name) for name in _TOWERS if hasattr(base, name))


def _marking(marks: Marks, name: str, module: nn.Module) -> list:
    """Hooks that open a span right before a module and close it right behind, inside all other hooks."""
    return [
        module.register_forward_pre_hook(lambda *_: marks.start(name)),
        module.register_forward_hook(lambda *_: marks.stop(name), prepend=True),
    ]
