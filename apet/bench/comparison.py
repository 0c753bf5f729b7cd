"""A variant beside the others: speed-up over no compression, share of random's speed-up, and over the published way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apet.bench.shapes import AS_PUBLISHED
from apet.bench.variants import NONE, RANDOM
from apet.measure import Timing, ratio

COLUMNS = ("ms, median (p10..p90)", "samples/s", "speed-up", "of random's", "over published")


@dataclass(frozen=True)
class Comparison:
    """One variant at one batch size.

    Attributes:
        time: Milliseconds per batch.
        samples_per_second: At the median.
        speedup: Over no compression; None if that could not run.
        of_random: Median speed-up over that of random selection, the ceiling at the same budget.
        over_published: Speed-up over the published pipeline at the same batch; None where it was not run.
    """

    time: Timing
    samples_per_second: float
    speedup: Timing | None
    of_random: float | None
    over_published: Timing | None

    @classmethod
    def of(cls, times: Mapping[str, Sequence[float]], name: str, batch: int) -> "Comparison":
        """Compare the times of `name` with those of the others, taken in the same rounds."""
        time = Timing.of(times[name])
        speedup = ratio(times[NONE], times[name]) if NONE in times else None
        of_random = None
        if speedup is not None and RANDOM in times:
            of_random = speedup.median / ratio(times[NONE], times[RANDOM]).median
        over = ratio(times[AS_PUBLISHED], times[name]) if AS_PUBLISHED in times else None
        return cls(time, batch / time.median * 1e3, speedup, of_random, over)

    def cells(self) -> list[Any]:
        """The cells of `COLUMNS`."""
        return [self.time, self.samples_per_second, self.speedup, percent(self.of_random), self.over_published]

    def as_json(self) -> dict[str, Any]:
        """The fields, timings as mappings."""
        return timings_as_json(vars(self))


def timings_as_json(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures with every `Timing` among them as a mapping."""
    return {key: value._asdict() if isinstance(value, Timing) else value for key, value in figures.items()}


def percent(share: float | None) -> str | None:
    """A share as a cell."""
    return None if share is None else f"{100 * share:.1f} %"
