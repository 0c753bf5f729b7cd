"""Paired cluster bootstrap: the same resamples of the pictures for every run, so differences are within questions.

Questions about one picture are right or wrong together: a picture that a method spoils spoils all of them. Drawn one by
one, as if they were independent, they would make intervals too narrow. So a resample draws as many pictures as there
are, with replacement, each with all its questions; and it draws them among those that occur in the same strata (POPE's
splits, MME's categories; otherwise there is one stratum), so that no stratum is ever empty. The headline score is
computed anew on every resample: mean correctness, the mean over the splits of F1, or the sum over the categories.
Percentages and differences are taken per resample and then summarised by the 2.5 % and 97.5 % quantiles.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
_SEED = 20_000
_BLOCK = 100


@dataclass(frozen=True)
class Outcome:
    """One run's answers, judged, question by question.

    Attributes:
        ids: Question ids, or those of pictures that are scored as a whole.
        correct: (n,) correctness in 0..1; with `summed` the picture's points over 100, in 0..2.
        truth: (n,) bool, the right answer is "yes": the headline is the mean over strata of F1. None: the headline is
            the mean of `correct`.
        strata: (n,) int, the stratum of every question; None for one.
        summed: The headline is the sum over strata of the mean of `correct`.
        pictures: What each question is about; None where every one is about a picture of its own.
    """

    ids: tuple[str, ...]
    correct: np.ndarray
    truth: np.ndarray | None = None
    strata: np.ndarray | None = None
    summed: bool = False
    pictures: tuple[str, ...] | None = None

    @property
    def maximum(self) -> float:
        """The best headline score there is."""
        return 200.0 * len(self.groups) if self.summed else 100.0

    @property
    def clusters(self) -> list[list[np.ndarray]]:
        """Question numbers of every picture, in groups of pictures that occur in the same strata."""
        members: dict[str | int, list[int]] = {}
        for index, picture in enumerate(self.pictures or range(len(self.ids))):
            members.setdefault(picture, []).append(index)
        strata = np.zeros(len(self.ids), dtype=int) if self.strata is None else self.strata
        groups: dict[tuple[int, ...], list[np.ndarray]] = {}
        for questions in members.values():
            groups.setdefault(tuple(np.unique(strata[questions])), []).append(np.array(questions))
        return list(groups.values())

    @property
    def groups(self) -> list[np.ndarray]:
        """Question numbers of every stratum."""
        if self.strata is None:
            return [np.arange(len(self.ids))]
        return [np.flatnonzero(self.strata == stratum) for stratum in np.unique(self.strata)]

    def scores(self, counts: np.ndarray) -> np.ndarray:
        """(r,) headline scores where question i counts ``counts[:, i]`` times, counts (r, n)."""
        if self.summed:
            parts = [counts[:, group] @ self.correct[group] / counts[:, group].sum(1) for group in self.groups]
            return 100 * np.sum(parts, axis=0)
        if self.truth is None:
            return 100 * (counts @ self.correct) / counts.sum(1)
        return 100 * np.mean([self._f1(counts[:, group], group) for group in self.groups], axis=0)

    @property
    def score(self) -> float:
        """The headline score itself."""
        return float(self.scores(np.ones((1, len(self.ids))))[0])

    def _f1(self, counts: np.ndarray, group: np.ndarray) -> np.ndarray:
        """2 TP / (2 TP + FP + FN); 0 without a true positive, as the scorer has it."""
        right = counts @ (self.truth[group] * self.correct[group])
        wrong = counts @ (1 - self.correct[group])
        return 2 * right / np.maximum(2 * right + wrong, 1)


def resampled_counts(
    groups: Sequence[Sequence[np.ndarray]], resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """(resamples, n) how often each question is drawn, with all others about its picture; groups as `clusters`."""
    counts = np.zeros((resamples, sum(len(questions) for group in groups for questions in group)))
    for group in groups:
        drawn = generator.integers(0, len(group), (resamples, len(group)))
        flat = drawn + np.arange(resamples)[:, None] * len(group)
        times = np.bincount(flat.ravel(), minlength=resamples * len(group)).reshape(resamples, -1)
        sizes = [len(questions) for questions in group]
        counts[:, np.concatenate(group)] = np.repeat(times, sizes, axis=1)
    return counts


def resampled_scores(name: str, outcomes: Sequence[Outcome], resamples: int = RESAMPLES) -> np.ndarray:
    """(runs, resamples) headline scores; resample r is the same pictures for every run.

    Args:
        name: The benchmark: it seeds the draw, so that benchmarks are resampled independently and reproducibly.
        outcomes: Runs over the same questions in any order.
        resamples: Number of resamples.

    Raises:
        ValueError: Runs over different questions.
    """
    aligned = [_aligned(outcome, outcomes[0]) for outcome in outcomes]
    return np.concatenate(
        [
            np.stack([outcome.scores(counts) for outcome in aligned])
            for counts in _blocks(outcomes[0].clusters, name, resamples)
        ],
        axis=1,
    )


def interval(values: np.ndarray) -> tuple[float, float] | None:
    """95 % quantile interval; None where a resample has no value."""
    if not np.isfinite(values).all():
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _blocks(groups: Sequence[Sequence[np.ndarray]], name: str, resamples: int) -> Iterator[np.ndarray]:
    # In blocks: 2,000 x 12,578 counts at once would take 200 MB.
    generator = np.random.default_rng([_SEED, zlib.crc32(name.encode())])
    for start in range(0, resamples, _BLOCK):
        yield resampled_counts(groups, min(_BLOCK, resamples - start), generator)


def _aligned(outcome: Outcome, reference: Outcome) -> Outcome:
    """The outcome in the question order of another one."""
    if outcome.ids == reference.ids:
        return outcome
    place = {key: index for index, key in enumerate(outcome.ids)}
    if set(place) != set(reference.ids):
        raise ValueError(
            f"two runs answered different questions ({len(outcome.ids)} and {len(reference.ids)}); give another --out"
        )
    order = np.array([place[key] for key in reference.ids])
    truth, strata = (None if values is None else values[order] for values in (outcome.truth, outcome.strata))
    return Outcome(reference.ids, outcome.correct[order], truth, strata, outcome.summed, reference.pictures)
