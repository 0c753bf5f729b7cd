"""Stop the vision tower after the layer whose output is used.

LLaVA reads the second-to-last hidden state of CLIP, so the last layer of the tower is work for nothing. Who asks for a
hidden state by number (transformers from 5.23 on, and `llava` everywhere) tells the tower how deep it must go; a call
that asks for several runs all layers.
"""

import threading
from typing import Any

from torch import Tensor, nn

from apet.adapters.base import InstanceAttribute, Removable


class TowerDepth:
    """Lets the layers of one vision tower pass their input on where nobody reads their output.

    The pooled output of a shortened call is that of the last layer that ran.

    Args:
        tower: The vision model: gets `output_hidden_states` as a keyword. One without `encoder.layers` is left alone.
        least: Layers that run in any case.
    """

    def __init__(self, tower: nn.Module, least: int = 0) -> None:
        self._tower, self._least = tower, least
        self._layers = getattr(getattr(tower, "encoder", None), "layers", ())
        self._local = threading.local()

    def attach(self) -> list[Removable]:
        """Wrap the layers and watch the tower's calls; returns the handles."""
        for index, layer in enumerate(self._layers):
            layer.forward = self._until(index, layer.forward)
        wrapped = [InstanceAttribute(layer, "forward") for layer in self._layers]
        return [self._tower.register_forward_pre_hook(self._before, with_kwargs=True), *wrapped]

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._local.depth = self._needed(kwargs.get("output_hidden_states"))

    def _needed(self, states: Any) -> int:
        """Layers that must run for a hidden state by number (0 is the embedding); all for anything else."""
        count = len(self._layers)
        if type(states) is not int or states == 0:  # a list counts differently before transformers 5.23
            return count
        return max(self._least, states if states > 0 else count + 1 + states)

    def _until(self, index: int, forward: Any) -> Any:
        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if index >= getattr(self._local, "depth", index + 1):
                return hidden_states
            return forward(hidden_states, *args, **kwargs)

        return run
