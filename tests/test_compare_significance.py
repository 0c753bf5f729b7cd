"""P-values of the comparison: Holm's correction, what counts as the best peer, and how often luck is called a lead."""

import itertools

import numpy as np
import pytest

from apet.compare.bootstrap import Outcome, resampled_scores
from apet.compare.rows import Row
from apet.compare.significance import holm, p_value, with_p_values


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9, 0.8]) == [1.0, 1.0, 1.0]
    assert holm([]) == [] and holm([0.2]) == [0.2]


@pytest.mark.parametrize("order", list(itertools.permutations([0.001, 0.02, 0.02, 0.3])))
def test_holm_does_not_depend_on_the_order(order):
    known = dict(zip([0.001, 0.02, 0.3], [0.004, 0.06, 0.3], strict=True))
    assert holm(order) == pytest.approx([known[value] for value in order])


def test_p_values_of_clear_and_of_no_differences():
    assert p_value(np.ones(1999)) == p_value(-np.ones(1999)) == 0.001
    assert p_value(np.zeros(1999)) == 1.0
    assert p_value(np.concatenate([np.full(100, -1.0), np.ones(1899)])) == pytest.approx(2 * 101 / 2000)


def row(method: str, budget: int | None, values: np.ndarray, rank: int | None, pictures: int = 30) -> Row:
    return Row(
        "gqa", "accuracy", method, budget, float(values.mean()), 64.0, 60, pictures, 1, rank=rank, resamples=values
    )


def test_references_and_who_is_tested_against_them():
    low, middle, high = (np.linspace(at, at + 1, 999) for at in (0, 5, 10))
    rows = [
        row("none", None, high, None),
        row("apet", 64, low, 4),
        row("apet_plus", 64, high, 1),
        row("divprune", 64, middle, 2),
        row("random", 64, low, 4),
        row("apet", 32, low, 1),
    ]
    none, apet, plus, divprune, chance, small = with_p_values(rows)
    assert none.p_apet is None and apet.p_apet is None and small.p_apet is None and small.p_peer is None
    # Three are compared with apet, three with the best peer, which is neither ours nor random selection.
    assert plus.p_apet == divprune.p_apet == pytest.approx(3 * 0.002) and chance.p_apet == 1.0
    assert divprune.p_peer is None
    assert plus.p_peer == apet.p_peer == chance.p_peer == pytest.approx(3 * 0.002)


def test_one_picture_tells_nothing():
    rows = with_p_values([row("apet", 64, np.zeros(9), 1, pictures=1), row("tome", 64, np.ones(9), 2, pictures=1)])
    assert all(one.p_apet is None and one.p_peer is None for one in rows)


def test_luck_is_rarely_called_a_difference():
    """Twenty methods that all guess: a false claim against apet in at most one table of twenty, about."""
    generator, claims, trials = np.random.default_rng(0), 0, 60
    pictures = tuple(str(number // 3) for number in range(180))
    for trial in range(trials):
        outcomes = [
            Outcome(tuple(map(str, range(180))), generator.integers(0, 2, 180).astype(float), pictures=pictures)
            for _ in range(12)
        ]
        values = resampled_scores(f"luck {trial}", outcomes, 400)
        names = ["apet", *(f"m{number}" for number in range(11))]
        rows = with_p_values([row(name, 64, one, 1) for name, one in zip(names, values, strict=True)])
        claims += any(one.p_apet is not None and one.p_apet < 0.05 for one in rows)
    assert claims <= 0.1 * trials
