"""A row of the comparison: one method at one budget, on a benchmark or on average."""

from dataclasses import dataclass, field

import numpy as np

from apet.compare.cost import Cost

AVERAGE = "average"
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Row:
    """A method at a budget, on one benchmark or on average; seeds are pooled.

    Attributes:
        benchmark: Name of the task, or "average".
        metric: What the score is.
        method: Registered name.
        budget: Tokens asked for; None for the uncompressed model.
        score: Mean over the seeds; on average the mean over the benchmarks of the score in percent of `maximum`.
        spread: Standard deviation of the score over seeds; None with fewer than two.
        score_interval: 95 % interval of the score itself.
        percent: Percent of the uncompressed score; on average the mean percentage.
        percent_interval: Its 95 % interval.
        difference: Score minus that of random selection at the same budget, in points.
        difference_interval: Its 95 % interval.
        rank: 1 for the best at this budget; equal values share the better rank.
        tokens: Visual tokens per question averaged over layers, as measured.
        seeds: Number of seeds; 1 for methods that do not draw.
        questions: Questions scored.
        pictures: Pictures they are about: the units that intervals are resampled by.
        maximum: The best score there is.
        p_apet: P-value of no difference from `apet` at the same budget (`significance`).
        p_peer: The same from the best peer.
        cost: Time and memory, of the method on some questions of all benchmarks; None if they were not measured.
    """

    benchmark: str
    metric: str
    method: str
    budget: int | None
    score: float
    tokens: float | None
    questions: int
    pictures: int
    seeds: int
    maximum: float = 100.0
    cost: Cost | None = None
    spread: float | None = None
    score_interval: Interval = None
    percent: float | None = None
    percent_interval: Interval = None
    difference: float | None = None
    difference_interval: Interval = None
    rank: int | None = None
    p_apet: float | None = None
    p_peer: float | None = None
    resamples: np.ndarray = field(default=None, repr=False, compare=False)
    percent_resamples: np.ndarray = field(default=None, repr=False, compare=False)
