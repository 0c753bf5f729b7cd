"""Families compressed behind their projector: remember how many tokens each encoded image and video has.

The features stay as they are until they are embedded in the prompt (the host counts placeholders), so nothing but
their lengths and the roles of special tokens is needed. `get_image_features` and `get_video_features` are the one place
that every route passes: `generate` of transformers 5.23 calls them before the prefill, 5.17 inside forward.
"""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from apet.adapters import host
from apet.adapters.base import Adapter, InstanceAttribute, Removable
from apet.adapters.inputs import Encoded
from apet.adapters.layout import Item
from apet.adapters.tower_log import TowerTap


class EncoderLog:
    """Images and videos of the last encoder calls, per thread.

    Args:
        adapter: The family.
        per_frame: Videos are compressed frame by frame, so the borders of the frames are needed.
        taps: Notes of the towers of images and of videos, where the method asks for what happened in them.
    """

    def __init__(self, adapter: Adapter, per_frame: bool, taps: Sequence[TowerTap] = ()) -> None:
        self._adapter, self._per_frame, self._taps = adapter, per_frame, taps
        self._local = threading.local()

    def attach(self) -> list[Removable]:
        """Wrap the encoder methods of the base model; returns the handles."""
        notes = [handle for tap in self._taps for handle in tap.attach()]
        return [*notes, *(self._wrap(kind) for kind in range(len(self._adapter.placeholder_ids)))]

    def items(self, kind: int) -> Sequence[Item] | None:
        """The images (kind 0) or videos (1) encoded last in this thread; None before the first."""
        return getattr(self._local, "items", {}).get(kind)

    def encoded(self, kind: int) -> Encoded | None:
        """What the tower did to them, where that is noted."""
        call = getattr(self._local, "calls", {}).get(kind)
        return None if call is None else Encoded(call, _rows)

    def _wrap(self, kind: int) -> Removable:
        base = self._adapter.base_model
        original = getattr(base, host.ENCODERS[kind])
        names = host.argument_names(original)

        # generate() reads the signature to decide which inputs to hand over.
        @functools.wraps(original)
        def logged(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._local, "busy", False):  # a video encoder may call the one for images
                return original(*args, **kwargs)
            self._local.busy = True
            try:
                output = original(*args, **kwargs)
                given = dict(zip(names, args, strict=False)) | kwargs
                features = host.encoded_features(output)
                if kind == 0:
                    items = self._adapter.image_items(features, given)
                else:
                    items = self._adapter.video_items(features, given, self._per_frame)
            finally:
                self._local.busy = False
            self._local.items = getattr(self._local, "items", {}) | {kind: items}
            if self._taps:
                call = self._taps[kind].take(*features.shape[:2])
                self._local.calls = getattr(self._local, "calls", {}) | {kind: call}
            return output

        setattr(base, host.ENCODERS[kind], logged)
        return InstanceAttribute(base, host.ENCODERS[kind])


def _rows(number: int, length: int) -> np.ndarray:
    """Rows of an image or video whose tokens are all the rows of its crops; all of a kind are equally long."""
    return np.arange(number * length, (number + 1) * length)
