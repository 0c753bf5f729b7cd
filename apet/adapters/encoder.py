"""Families compressed behind their projector: remember how many tokens each encoded image and video has.

The features stay as they are until they are embedded in the prompt (the host counts placeholders), so nothing but
their lengths and the roles of special tokens is needed. `get_image_features` and `get_video_features` are the one place
that every route passes: `generate` of transformers 5.23 calls them before the prefill, 5.17 inside forward.
"""

import functools
import inspect
import threading
from collections.abc import Sequence
from typing import Any

from apet.adapters.base import Adapter, InstanceAttribute, Removable
from apet.adapters.layout import Item

_METHODS = ("get_image_features", "get_video_features")


class EncoderLog:
    """Images and videos of the last encoder calls, per thread.

    Args:
        adapter: The family.
        per_frame: Videos are compressed frame by frame, so the borders of the frames are needed.
    """

    def __init__(self, adapter: Adapter, per_frame: bool) -> None:
        self._adapter, self._per_frame = adapter, per_frame
        self._local = threading.local()

    def attach(self) -> list[Removable]:
        """Wrap the encoder methods of the base model; returns the handles."""
        return [self._wrap(kind) for kind in range(len(self._adapter.placeholder_ids))]

    def items(self, kind: int) -> Sequence[Item] | None:
        """The images (kind 0) or videos (1) encoded last in this thread; None before the first."""
        return getattr(self._local, "items", {}).get(kind)

    def _wrap(self, kind: int) -> Removable:
        base = self._adapter.base_model
        original = getattr(base, _METHODS[kind])
        names = list(inspect.signature(original).parameters)

        # generate() reads the signature to decide which inputs to hand over.
        @functools.wraps(original)
        def logged(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._local, "busy", False):  # a video encoder may call the one for images
                return original(*args, **kwargs)
            self._local.busy = True
            try:
                output = original(*args, **kwargs)
                given = dict(zip(names, args, strict=False)) | kwargs
                if kind == 0:
                    items = self._adapter.image_items(output.pooler_output, given)
                else:
                    items = self._adapter.video_items(output.pooler_output, given, self._per_frame)
            finally:
                self._local.busy = False
            self._local.items = getattr(self._local, "items", {}) | {kind: items}
            return output

        setattr(base, _METHODS[kind], logged)
        return InstanceAttribute(base, _METHODS[kind])
