"""Sampling that depends on nothing but the question: not on its batch, nor on what was answered before it.

Gumbel-max: where g_i are independent Gumbel variables, argmax_i (log p_i + g_i) is a draw from p. The variables are
hashes of (the question's seed, step, token), so a row draws the same tokens alone, in any batch, worker or chunk, and
after an interruption.
"""

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from apet.eval.benchmarks import Question

# What transformers takes where neither the call nor the checkpoint says how many of the likeliest tokens may be drawn.
DEFAULT_TOP_K = 50
# Settings of transformers' sampling that are not applied here.
_REFUSED = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # of splitmix64's finaliser, as signed numbers
_STEP = -0x61C8864680B583EB


def draw_key(question: Question) -> str:
    """What sets the draws of a question apart from those of others: its id, and which of those with that id it is."""
    return json.dumps([question.question_id, question.occurrence])


def draw_seed(seed: int, key: str) -> int:
    """The seed of a question, in -2^63..2^63-1, of the run's seed and its `draw_key`."""
    digest = hashlib.sha256(json.dumps([seed, key]).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


class QuestionSampling(LogitsProcessor):
    """Turns a greedy `generate` into sampling: adds each row's own Gumbel noise to what the warpers leave.

    Made for one call of `generate`, with `do_sample=False`.

    Args:
        seeds: One per row.
        temperature: Above 0.
        top_p: As in `generate`; None for all.
        stored: The checkpoint's defaults, of which top_k, top_p and min_p hold where they are set.

    Raises:
        ValueError: The checkpoint asks for a way to sample that is not known here.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float | None, stored: GenerationConfig) -> None:
        unknown = [name for name in _REFUSED if getattr(stored, name, None) not in (None, 0.0, 1.0)]
        if unknown:
            raise ValueError(
                f"the checkpoint's generation_config.json sets {unknown[0]}={getattr(stored, unknown[0])}, which "
                "seeded sampling does not know; remove it there, or give --temperature 0"
            )
        self._seeds = torch.tensor(seeds, dtype=torch.int64)
        self._first: int | None = None
        top_k = DEFAULT_TOP_K if stored.top_k is None else stored.top_k
        top_p = stored.top_p if top_p is None else top_p
        self._warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
        if top_k:
            self._warpers.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(top_p))
        if stored.min_p is not None:
            self._warpers.append(MinPLogitsWarper(stored.min_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) float64: log-likelihoods up to a constant, plus noise; the greatest is the token drawn."""
        if self._first is None:  # the prompt's length, which depends on the batch
            self._first = input_ids.shape[1]
        warped = self._warpers(input_ids, scores)
        step = input_ids.shape[1] - self._first
        self._seeds = self._seeds.to(scores.device)
        return warped.double() + gumbel(self._seeds, step, scores.shape[1])


def gumbel(seeds: Tensor, step: int, count: int) -> Tensor:
    """(B, count) float64 standard Gumbel variables, a function of (B,) int64 seeds, the step and the column."""
    moved = (_STEP * (step + 1) + 2**63) % 2**64 - 2**63  # as int64 wraps around
    rows = _mixed(seeds + moved).unsqueeze(1)
    columns = torch.arange(1, count + 1, device=seeds.device)
    bits = _mixed(rows + columns * _STEP)
    uniform = (_shifted(bits, 12).double() + 0.5) * 2.0**-52  # never 0 nor 1
    return -torch.log(-torch.log(uniform))


def _mixed(values: Tensor) -> Tensor:
    """Splitmix64's finaliser, modulo 2^64: every bit of the result depends on every bit of the value."""
    values = (values ^ _shifted(values, 30)) * _MULTIPLIERS[0]
    values = (values ^ _shifted(values, 27)) * _MULTIPLIERS[1]
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, count: int) -> Tensor:
    """Shifted right with zeros coming in, which int64 does not do by itself."""
    return (values >> count) & ((1 << (64 - count)) - 1)
