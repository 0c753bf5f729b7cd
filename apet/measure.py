"""Time calls side by side, in turns so that a drift of the machine hits all of them, and their peak memory."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch

# A measurement shorter than this repeats its call, so that the clock and the wait for the device do not count.
_SHORTEST_MS = 1.0
# Rounds that a limit of time leaves.
FEWEST = 3


class Timing(NamedTuple):
    """Median and spread of repeated measurements (milliseconds, or a ratio of them).

    Attributes:
        median: Of all repetitions.
        p10: 10th percentile.
        p90: 90th percentile.
        p25: Lower quartile.
        p75: Upper quartile.
        count: Measurements.
    """

    median: float
    p10: float
    p90: float
    p25: float
    p75: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Timing":
        """Summary of measurements."""
        p10, p25, median, p75, p90 = np.percentile(values, [10, 25, 50, 75, 90]).tolist()
        return cls(median, p10, p90, p25, p75, len(values))

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.p10)}..{number(self.p90)})"


def number(value: float) -> str:
    """Three digits, and all of them in front of the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def synchronize(device: str | torch.device) -> None:
    """Wait for a CUDA device; nothing to wait for elsewhere."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turns(
    calls: Mapping[str, Callable[[], Any]],
    device: str | torch.device,
    *,
    repeats: int,
    warmup: int = 2,
    seconds: float | None = None,
    around: Mapping[str, Callable[[], AbstractContextManager]] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds per call, `repeats` measurements of each, one round of all calls after another.

    Every other round goes backwards, so that no call always follows the same one. The device is waited for before and
    after each measurement.

    Args:
        calls: What to time, by name.
        device: Where it runs.
        repeats: Measurements per call.
        warmup: Rounds that are not counted.
        seconds: Behind the third round, stop when so much time has passed, warm-up included; None for no limit.
        around: What must hold during a call but is not timed, by the call's name.

    Raises:
        ValueError: Fewer than one repetition or warm-up round.
    """
    if repeats < 1 or warmup < 1:
        raise ValueError(f"--repeats {repeats} and --warmup {warmup} must be at least 1")
    times: dict[str, list[float]] = {name: [] for name in calls}
    inner = dict.fromkeys(calls, 1)
    around = around or {}
    names, begun = list(calls), time.monotonic()
    for turn in range(warmup + repeats):
        if seconds is not None and turn >= warmup + FEWEST and time.monotonic() - begun > seconds:
            break
        for name in names if turn % 2 == 0 else reversed(names):
            with around.get(name, nullcontext)():
                spent = _measure(calls[name], inner[name], device)
            if turn >= warmup:
                times[name].append(spent)
            elif turn == warmup - 1:
                inner[name] = max(1, math.ceil(_SHORTEST_MS / max(spent, 1e-3)))
    return times


def _measure(call: Callable[[], Any], inner: int, device: str | torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(inner):
        call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3 / inner


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Timing:
    """Times of one call over those of another, round by round: a speed-up with its spread."""
    return Timing.of([first / second for first, second in zip(slow, fast, strict=True)])


class Fit(NamedTuple):
    """How time grows with size.

    Attributes:
        exponent: Slope of log time over log size: 1 is linear.
        r2: Share of the variance that a straight line through time over size explains.
    """

    exponent: float
    r2: float


def fit_growth(sizes: Sequence[int], times: Sequence[float]) -> Fit:
    """Fit times over sizes.

    Raises:
        ValueError: Fewer than three sizes.
    """
    if len(sizes) < 3:
        raise ValueError(f"a fit needs at least three sizes, got {list(sizes)}")
    x, y = np.array(sizes, dtype=float), np.array(times, dtype=float)
    exponent = np.polyfit(np.log(x), np.log(y), 1)[0]
    residual = y - np.polyval(np.polyfit(x, y, 1), x)
    return Fit(float(exponent), float(1 - residual.var() / y.var()))


def cuda_peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes allocated at the worst moment of a call beyond what was allocated before it."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
