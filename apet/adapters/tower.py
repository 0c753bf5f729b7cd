"""The vision tower: how deep it must run, and what methods want to know of it.

LLaVA reads the second-to-last hidden state of CLIP, so the last layer of the tower is work for nothing. Notes are
references to what entered the layers that a method asked for; rows of attention are made from them when asked for.
"""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apet.adapters import host
from apet.adapters.hooks import InFlight, Removable, Wrapped
from apet.adapters.layout import Unit
from apet.adapters.stages import Group
from apet.adapters.tower_stage import TowerCut


class TowerDepth:
    """Stops one vision tower after the layer whose output is used: layers behind it pass their input on.

    Who asks for a hidden state by number (transformers from 5.23 on, and `llava` everywhere) says how deep it must go;
    a call that asks for several runs all layers. The pooled output of a shortened call is that of the last layer that
    ran.

    Args:
        tower: The vision model. One of another build than CLIP's is left alone.
        least: Layers that run in any case.
    """

    def __init__(self, tower: nn.Module, least: int = 0) -> None:
        self._tower, self._least = tower, least
        self._layers = host.tower_layers(tower)
        self._depths = InFlight()

    def attach(self) -> list[Removable]:
        """Wrap the tower and its layers; returns the handles."""
        if not self._layers:
            return []
        layers = [
            Wrapped(layer, "forward", functools.partial(self._run_layer, index))
            for index, layer in enumerate(self._layers)
        ]
        return [Wrapped(self._tower, "forward", self._run_tower), *layers]

    def _run_tower(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        with self._depths.during(self._needed(host.wanted_state(kwargs))):
            return original(*args, **kwargs)

    def _needed(self, state: int | None) -> int:
        """Layers that must run for a hidden state by number; all for None."""
        count = len(self._layers)
        if state is None:
            return count
        return max(self._least, state if state > 0 else count + 1 + state)

    def _run_layer(self, index: int, original: Any, *args: Any, **kwargs: Any) -> Any:
        depth = self._depths.top
        if depth is not None and index >= depth:
            return host.layer_hidden(args, kwargs)
        return original(*args, **kwargs)


class TowerCall:
    """What one run of a tower, or of the projector behind it, was given.

    Values have one row per row of the features: without the class token, unless the features have it too.

    Args:
        layers: Layers of the tower.
        inputs: Per layer asked for, (C, 1 + P, D) what entered it: the class token first.
        features: (C, N, D_v) what entered the projector; None if nobody asked.
        shape: C crops and N rows of each.
        cuts: What the tower stages left, in the order they ran.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        inputs: dict[int, Tensor],
        features: Tensor | None,
        shape: tuple[int, int],
        cuts: Sequence[TowerCut] = (),
    ) -> None:
        self.features, self.shape = features, shape
        self._layers, self._inputs, self._cuts = layers, inputs, cuts
        self._projected: dict[int, host.Projected] = {}

    def attention(self, layer: int) -> Tensor:
        """(C, N, heads) attention of the class token to every row, as the layer sees them.

        Merged rows count for what they stand for, rows merged away have none. Behind a stage that restores its rows,
        they are looked at as restored, also in layers that leave them out.
        """
        projected = self._project(layer)
        crops = torch.arange(len(projected.queries), device=projected.queries.device).unsqueeze(-1)
        scores = projected.scores(crops, torch.zeros_like(crops))[:, :, 0]
        before = [cut for cut in self._cuts if cut.layer <= layer % len(self._layers) and cut.mode != "restore"]
        if before:
            scores = scores + before[-1].spread(before[-1].log_sizes, -torch.inf).unsqueeze(1)
        return scores.softmax(-1).transpose(1, 2)[:, -self.shape[1] :]

    def keys(self, layer: int) -> Tensor:
        """(C, N, heads, d) keys of every row, bias included."""
        return self._project(layer).keys.transpose(1, 2)[:, -self.shape[1] :]

    def states(self) -> list[Tensor]:
        """(C, N, D) what entered each of the layers from the middle on, row by row."""
        return [self._inputs[layer][:, -self.shape[1] :] for layer in upper_half(self._layers)]

    def asked_length(self, needs: Collection[str], unit: Unit) -> None:
        """Crops with equally many rows have inputs of one length."""

    def inputs(self, group: Group) -> "_CropInputs":
        """What a method at the vision stage may ask for about a group of crops."""
        return _CropInputs(self, group)

    def _project(self, layer: int) -> host.Projected:
        index = layer % len(self._layers)
        if index not in self._projected:
            self._projected[index] = host.project(host.tower_attention(self._layers[index], self._inputs[index]))
        return self._projected[index]


@dataclass(frozen=True)
class _CropInputs:
    """`StageInputs` of a group of crops at the vision stage."""

    call: TowerCall
    group: Group

    def cls_attention(self, layer: int) -> Tensor:
        return self._own(self.call.attention(layer)).transpose(1, 2)

    def vision_keys(self, layer: int) -> Tensor:
        return self._own(self.call.keys(layer)).transpose(1, 2)

    def vision_states(self) -> Tensor:
        return torch.stack([self._own(one) for one in self.call.states()], 1)

    def vision_features(self) -> Tensor:
        return self._own(self.call.features)

    def _own(self, values: Tensor) -> Tensor:
        return values[self.group.rows, self.group.places]


def upper_half(layers: Sequence[nn.Module]) -> range:
    """Numbers of a tower's layers from the middle on: 12 .. 23 of 24."""
    return range(len(layers) // 2, len(layers))


class TowerTap:
    """Notes what a tower and its projector are given, on the encoder call in flight.

    Args:
        tower: Vision model with a class token in front of the patches; None to note features only.
        layers: Layers as `attentions[layer]` counts them.
        projector: Module whose input is noted, or None.
    """

    def __init__(self, tower: nn.Module | None, layers: Collection[int], projector: nn.Module | None = None) -> None:
        self._layers = nn.ModuleList() if tower is None else host.tower_layers(tower)
        self._wanted = sorted({layer % len(self._layers) for layer in layers})
        self._projector = projector

    @property
    def depth(self) -> int:
        """Layers of the tower that must run for the notes to be right."""
        return max(self._wanted, default=0)

    def attach(self, encodings: InFlight) -> list[Removable]:
        """Register the hooks; returns their handles. A layer that is skipped still says what entered it."""
        modules = [(index, self._layers[index]) for index in self._wanted]
        modules += [] if self._projector is None else [(None, self._projector)]
        return [
            module.register_forward_pre_hook(functools.partial(_note, encodings, key), with_kwargs=True)
            for key, module in modules
        ]

    def call(
        self,
        notes: dict[int | None, Tensor],
        crops: int,
        rows: int,
        features: Tensor | None = None,
        cuts: Sequence[TowerCut] = (),
    ) -> TowerCall:
        """What was noted of a call about so many crops.

        Args:
            notes: Of the encoder call.
            crops: Crops that were encoded.
            rows: Rows of each.
            features: What entered the projector, where it is not noted here.
            cuts: What the tower stages left.

        Raises:
            ValueError: The tower did not run on them.
        """
        wanted = [*self._wanted, *([] if self._projector is None else [None])]
        if any(key not in notes or len(notes[key]) != crops for key in wanted):
            raise ValueError(
                f"the method reads the vision tower, which has not just run on these {crops} crops; give the model "
                "pixels, not what the tower made of them before"
            )
        inputs = {key: notes[key] for key in self._wanted}
        return TowerCall(self._layers, inputs, notes.get(None, features), (crops, rows), cuts)


def _note(encodings: InFlight, key: int | None, module: nn.Module, args: tuple, kwargs: dict) -> None:
    if encodings.top is not None:
        encodings.top.notes[key] = host.layer_hidden(args, kwargs)
