"""What a vision tower did on the way to the tokens: its attention and keys, and the features it gave.

For methods that read them. Hooks sit on the layers that were asked for and nowhere else, and note references; rows of
attention are made from queries and keys when they are asked for.
"""

import threading
from collections.abc import Collection

import torch
from torch import Tensor, nn

from apet.adapters import host
from apet.adapters.probe import Projected, project


class TowerCall:
    """One run of a tower, or of the projector behind it.

    Values have one row per row of the features: without the class token, unless the features have it too.

    Args:
        layers: Layers of the tower.
        inputs: Per layer asked for, (C, 1 + P, D) what entered it: the class token first.
        features: (C, N, D_v) what entered the projector; None if nobody asked.
        shape: C crops and N rows of each.
    """

    def __init__(
        self, layers: nn.ModuleList, inputs: dict[int, Tensor], features: Tensor | None, shape: tuple[int, int]
    ) -> None:
        self.features, self.shape = features, shape
        self._layers, self._inputs = layers, inputs
        self._projected: dict[int, Projected] = {}

    def attention(self, layer: int) -> Tensor:
        """(C, N, heads) attention of the class token to every row."""
        projected = self._project(layer)
        crops = torch.arange(len(projected.queries), device=projected.queries.device).unsqueeze(-1)
        attention = projected.scores(crops, torch.zeros_like(crops)).softmax(-1)[:, :, 0]
        return attention.transpose(1, 2)[:, -self.shape[1] :]

    def keys(self, layer: int) -> Tensor:
        """(C, N, heads, d) keys of every row, bias included."""
        return self._project(layer).keys.transpose(1, 2)[:, -self.shape[1] :]

    def _project(self, layer: int) -> Projected:
        index = layer % len(self._layers)
        if index not in self._projected:
            self._projected[index] = project(host.tower_attention(self._layers[index], self._inputs[index]))
        return self._projected[index]


class TowerTap:
    """Notes, per thread, what the last call of a tower and its projector were given.

    Args:
        tower: Vision model with a class token in front of the patches; None to note features only.
        layers: Layers as `attentions[layer]` counts them.
        projector: Module whose input is noted, or None.
    """

    def __init__(self, tower: nn.Module | None, layers: Collection[int], projector: nn.Module | None = None) -> None:
        self._layers = nn.ModuleList() if tower is None else host.tower_layers(tower)
        self._wanted = sorted({layer % len(self._layers) for layer in layers})
        self._projector = projector
        self._local = threading.local()

    @property
    def depth(self) -> int:
        """Layers of the tower that must run for the notes to be right."""
        return max(self._wanted, default=0)

    def attach(self) -> list:
        """Register the hooks; returns their handles. A layer that is skipped still says what entered it."""
        modules = [(index, self._layers[index]) for index in self._wanted]
        modules += [] if self._projector is None else [(None, self._projector)]
        return [module.register_forward_pre_hook(self._remember(key), with_kwargs=True) for key, module in modules]

    def take(self, crops: int, rows: int, features: Tensor | None = None) -> TowerCall:
        """The last call, which must have been about so many crops; it is forgotten.

        Args:
            crops: Crops that were encoded.
            rows: Rows of each.
            features: What entered the projector, where it is not noted here.

        Raises:
            ValueError: The tower did not run on them.
        """
        notes = self._local.__dict__.pop("notes", {})
        wanted = [*self._wanted, *([] if self._projector is None else [None])]
        if any(key not in notes or len(notes[key]) != crops for key in wanted):
            raise ValueError(
                f"the method reads the vision tower, which has not just run on these {crops} crops; give the model "
                "pixels, not what the tower made of them before"
            )
        return TowerCall(self._layers, notes, notes.pop(None, features), (crops, rows))

    def _remember(self, key: int | None):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            notes = self._local.__dict__.setdefault("notes", {})
            notes[key] = host.layer_hidden(args, kwargs)

        return hook
