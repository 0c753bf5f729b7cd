"""The image encoder of a patched model: every call leaves what was kept on its own output (`output.apet`).

`get_image_features` and `get_video_features` are the one place that every route passes: `generate` of transformers
from 5.20 on calls them before the prefill and hands their output over; a forward with pixels calls them itself, and
finds what they left on the forward in flight. Features that are chosen from behind the projector stay as they are until
they are embedded in the prompt (the host counts placeholders), so only their lengths and roles are noted.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from apet.adapters import host
from apet.adapters.base import Adapter
from apet.adapters.copies import PackedSizes, Reads
from apet.adapters.hooks import InFlight, Removable, Wrapped
from apet.adapters.tower import TowerDepth, TowerTap
from apet.adapters.tower_packed import PackedReduction
from apet.adapters.tower_stage import TowerReduction, TowerStage, exchange_attention
from apet.adapters.vision import Encoding, ImageLayout, VisionStage

CARRIED = "apet"


class EncoderPatch:
    """Wraps the encoder methods of one model.

    Args:
        adapter: The family.
        vision: Hooks around the projector; None for families that are compressed behind it.
        taps: Notes of the towers, of images and of videos, where the method asks for what happened in them.
        per_frame: Videos are compressed frame by frame, so the borders of the frames are needed.
        settings: Configuration; a forward takes only what was encoded under its own.
        forwards: Forwards of the model in flight.
        reads: What the host knows of arguments.
        tower: What happens inside the towers, if anything.
    """

    def __init__(
        self,
        adapter: Adapter,
        vision: VisionStage | None,
        taps: Sequence[TowerTap],
        per_frame: bool,
        settings: Any,
        forwards: InFlight,
        reads: Reads,
        tower: TowerStage | None = None,
    ) -> None:
        self._adapter, self._vision, self._taps, self._tower = adapter, vision, taps, tower
        self._per_frame, self._settings, self._forwards, self._reads = per_frame, settings, forwards, reads
        self._encodings = InFlight() if vision is None else vision.encodings

    def attach(self) -> list[Removable]:
        """Wrap and hook; returns the handles."""
        depth, towers = max((tap.depth for tap in self._taps), default=0), self._adapter.towers
        packed = [tower for tower in self._adapter.reducible_towers if host.packed_layers(tower)]
        handles = [handle for tower in packed for handle in PackedSizes(tower, self._tower is not None).attach()]
        handles += self._reduce_towers()
        # Outside of the stage's wrappers, so that these never see a layer that is skipped.
        handles += [handle for tower in towers for handle in TowerDepth(tower, depth).attach()]
        if self._vision is not None:
            handles += self._vision.attach()
        else:
            handles += [handle for tap in self._taps for handle in tap.attach(self._encodings)]
        for kind in range(len(self._adapter.placeholder_ids)):
            around = functools.partial(self._encode, kind)
            handles.append(Wrapped(self._adapter.base_model, host.ENCODERS[kind], around))
        return handles

    def _reduce_towers(self) -> list[Removable]:
        """Let the tower stage run in the towers; returns the handles."""
        if self._tower is None:
            return []
        extras, towers = InFlight(), self._adapter.reducible_towers
        handles = exchange_attention(towers, extras)
        for tower in towers:
            reduction = PackedReduction if host.packed_layers(tower) else TowerReduction
            handles += reduction(tower, self._tower, self._encodings, extras).attach()
        return handles

    @contextmanager
    def expecting(self, layouts: Sequence[ImageLayout] | None) -> Iterator[Encoding]:
        """Compress what is encoded inside the block without `get_image_features`; yields what the call leaves."""
        encoding = Encoding(layouts, settings=self._settings)
        with self._encodings.during(encoding):
            yield encoding
        encoding.finish()

    def _encode(self, kind: int, original: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop(host.PASSED, None)
        forward, outer = self._forwards.top, self._encodings.top
        if outer is not None and outer.owner is forward:  # a video encoder may call the one for images
            return original(*args, **kwargs)
        names = host.argument_names(original)
        copies = self._reads.begun(host.by_name(names, args) | kwargs)
        args = tuple(copies.seen(name, value) for name, value in zip(names, args, strict=False))
        kwargs = {name: copies.seen(name, value) for name, value in kwargs.items()}
        given = host.by_name(names, args) | kwargs
        self._check_layer(given.get("vision_feature_layer"))
        encoding = Encoding(self._adapter.crop_layouts(given), forward, self._settings)
        if self._vision is not None:
            self._vision.check_images(len(encoding.layouts or given["pixel_values"]))
        with self._encodings.during(encoding):
            output = original(*args, **kwargs)
        if isinstance(output, tuple):
            return output  # nothing can ride on it, so a forward will refuse what is in it
        if self._vision is None:
            self._note(kind, encoding, output, given)
        encoding.finish()
        setattr(output, CARRIED, encoding)
        if forward is not None:
            forward.encoded[kind] = encoding
        return output

    def _check_layer(self, layer: Any) -> None:
        """Raise where a call asks for features of another layer than the tower stage was planned for."""
        known = getattr(self._adapter.model.config, "vision_feature_layer", None)
        if self._tower is not None and layer not in (None, known):
            raise ValueError(
                f"vision_feature_layer={layer} is not the layer that the tower stage was checked for; set it "
                "in the model's configuration before patching, or leave tower_layer_list empty"
            )

    @torch.compiler.disable
    def _note(self, kind: int, encoding: Encoding, output: Any, given: Mapping[str, Any]) -> None:
        """Lengths and roles of tokens that are compressed behind the projector."""
        features = host.encoded_features(output)
        if kind == 0:
            encoding.items = self._adapter.image_items(features, given)
        else:
            encoding.items = self._adapter.video_items(features, given, self._per_frame)
        if self._taps:
            encoding.tower = self._taps[kind].call(encoding.notes, *features.shape[:2], cuts=encoding.cuts)
        if encoding.dropped is not None:
            encoding.items = encoding.without_dropped()
