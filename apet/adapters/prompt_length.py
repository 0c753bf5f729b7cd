"""Where the prompt ends when `generate` works without a cache and gives the model all tokens again at every step.

Methods that read the text must see the same text at every step, or the tokens they keep would change on the way.
"""

import functools
import threading
from typing import Any

from torch import Tensor, nn

from apet.adapters import host
from apet.adapters.base import InstanceAttribute, Removable


class PromptLength:
    """Knows, per thread, how long the ids are that `generate` was called with; ids are all it is needed for."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._local = threading.local()

    def attach(self) -> Removable:
        """Wrap `generate`; returns the handle."""
        original = self._model.generate

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            ids = host.prompt_ids(args, kwargs)
            self._local.length = None if ids is None else ids.shape[1]
            try:
                return original(*args, **kwargs)
            finally:
                self._local.length = None

        self._model.generate = watched
        return InstanceAttribute(self._model, "generate")

    def generated(self, ids: Tensor | None, cache: Any) -> int:
        """Tokens of `ids` (B, L) behind the prompt."""
        length = getattr(self._local, "length", None)
        return 0 if ids is None or cache is not None or length is None else ids.shape[1] - length
