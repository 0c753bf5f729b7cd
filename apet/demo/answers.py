"""The model side of the demo: one question at a time, under one method and budget."""

import threading
from dataclasses import dataclass

import numpy as np

import apet
from apet.config import ApetConfig
from apet.eval.benchmarks import Question
from apet.eval.images import open_images
from apet.eval.loader import LoadedModel
from apet.methods import method_names, parse_method
from apet.vis.ask import ask
from apet.vis.draw import group_picture, kept_picture
from apet.vis.trace import MethodTrace

UNCOMPRESSED = "none"
DEFAULT_METHODS = ("apet", "random")


@dataclass(frozen=True)
class Shown:
    """What the page shows of one answer.

    Attributes:
        answer: What the model said.
        kept: (H, W, 3) uint8 picture with the patches that the last stage left.
        groups: The same with the groups that patches were merged into; None where nothing was merged.
        facts: (name, value) lines: tokens, FLOPs, cache, time.
    """

    answer: str
    kept: np.ndarray
    groups: np.ndarray | None
    facts: tuple[tuple[str, str], ...]


class Asker:
    """A checkpoint that is asked under changing compressions; calls wait for each other.

    Args:
        loaded: The checkpoint; one with a fixed grid of tokens.

    Attributes:
        grid: (rows, columns) of an image's tokens.
        tokens: Visual tokens of an image.
        model_id: Name of the checkpoint.

    Raises:
        ValueError: The checkpoint's images have no fixed grid.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded, self._lock = loaded, threading.Lock()
        self.grid, self.tokens, self.model_id = loaded.grid, loaded.image_tokens, loaded.model_id

    def __call__(self, picture: str, text: str, method: str, tokens: int) -> Shown:
        """Ask about an image file; `tokens` is the average over the decoder layers.

        Raises:
            ValueError: A picture that cannot be read, or a method that cannot spend this budget on this model.
        """
        question = Question(0, text, text, picture)
        images = open_images(question, "")
        with self._lock:
            model = self._loaded.model
            config = self._config(method, tokens)
            asked = ask(self._loaded, method, config, question, images)
            said = apet.describe(model)
        return Shown(
            asked.trace.answer,
            kept_picture(asked.seen, self.grid, _kept(asked.trace, self.tokens)),
            self._groups(asked.trace, asked.seen),
            (
                ("visual tokens per layer", f"{asked.trace.tokens:.1f} of {self.tokens}"),
                ("prefill, predicted", f"{said.flops[1] / 1e9:.2f} GFLOP ({said.speedup:.1f} times fewer)"),
                ("cache, predicted", f"{said.cache_bytes[1] / 2**20:.2f} MiB"),
                ("time", f"{asked.seconds * 1e3:.0f} ms"),
            ),
        )

    def _config(self, method: str, tokens: int) -> ApetConfig:
        name, _ = parse_method(method)
        if name == UNCOMPRESSED:
            return ApetConfig(method=UNCOMPRESSED)
        return apet.config_for(self._loaded.model, tokens=tokens, method=method)

    def _groups(self, trace: MethodTrace, seen: np.ndarray) -> np.ndarray | None:
        """Groups as the last stage left them."""
        if not trace.stages:
            return None
        last = trace.stages[-1]
        if (last.groups >= 0).sum() == len(last.kept):
            return None
        return group_picture(seen, self.grid, last.groups, last.kept)


def choices() -> list[str]:
    """Methods to choose from, the uncompressed model first."""
    return [UNCOMPRESSED, *(name for name in method_names() if name != UNCOMPRESSED)]


def _kept(trace: MethodTrace, tokens: int) -> np.ndarray:
    return trace.stages[-1].kept if trace.stages else np.arange(tokens)
