"""One question, asked of a checkpoint under one compression, with everything that its stages decided."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import apet
from apet.config import ApetConfig
from apet.eval.benchmarks import Question
from apet.eval.loader import LoadedModel
from apet.vis.trace import MethodTrace, listening, trace


@dataclass(frozen=True)
class Asked:
    """An answer.

    Attributes:
        trace: What the method did, and what the model said.
        seen: (H, W, 3) uint8 picture as the model sees it.
        seconds: From the prepared question to the answer.
    """

    trace: MethodTrace
    seen: np.ndarray
    seconds: float


def ask(loaded: LoadedModel, method: str, config: ApetConfig, question: Question, images: Sequence[Any]) -> Asked:
    """Ask one question about one image; `method` is the name in the picture.

    Raises:
        ValueError: The model or the method cannot do it.
    """
    answerer = loaded.answerer(config)
    prepared = answerer.preparer.prepare(question, images)
    start = time.perf_counter()
    with listening(config.method) as decisions:
        (answer,) = answerer.answer([prepared])
    seconds = time.perf_counter() - start
    return Asked(trace(method, apet.last_result(loaded.model), decisions, answer.text), loaded.seen(prepared), seconds)
