"""Stop the vision tower after the layer whose output is used.

LLaVA reads the second-to-last hidden state of CLIP, so the last layer of the tower is work for nothing. Who asks for a
hidden state by number (transformers from 5.23 on, and `llava` everywhere) tells the tower how deep it must go; a call
that asks for several runs all layers.
"""

import threading
from typing import Any

from torch import nn

from apet.adapters import host
from apet.adapters.base import InstanceAttribute, Removable


class TowerDepth:
    """Lets the layers of one vision tower pass their input on where nobody reads their output.

    The pooled output of a shortened call is that of the last layer that ran.

    Args:
        tower: The vision model. One of another build than CLIP's is left alone.
        least: Layers that run in any case.
    """

    def __init__(self, tower: nn.Module, least: int = 0) -> None:
        self._tower, self._least = tower, least
        self._layers = host.tower_layers(tower)
        self._local = threading.local()

    def attach(self) -> list[Removable]:
        """Wrap the layers and watch the tower's calls; returns the handles."""
        for index, layer in enumerate(self._layers):
            layer.forward = self._until(index, layer.forward)
        wrapped = [InstanceAttribute(layer, "forward") for layer in self._layers]
        return [self._tower.register_forward_pre_hook(self._before, with_kwargs=True), *wrapped]

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._local.depth = self._needed(host.wanted_state(kwargs))

    def _needed(self, state: int | None) -> int:
        """Layers that must run for a hidden state by number; all for None."""
        count = len(self._layers)
        if state is None:
            return count
        return max(self._least, state if state > 0 else count + 1 + state)

    def _until(self, index: int, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if index >= getattr(self._local, "depth", index + 1):
                return host.layer_hidden(args, kwargs)
            return forward(*args, **kwargs)

        return run
