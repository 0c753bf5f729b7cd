"""The comparison against published results: Spearman's correlation by hand, its interval, and when nothing is said."""

import numpy as np
import pytest

from apet.compare.published import PUBLISHED, agreement, spearman
from apet.methods import method_names


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    # Two equal values share rank 2.5: covariance 4.5 of standard deviations 4.5 and 5.
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert spearman([1, 1, 1], [1, 2, 3]) == 0


def test_published_numbers_are_of_methods_that_exist():
    for numbers in PUBLISHED.values():
        assert set(numbers) <= set(method_names())
        assert all(60 < value < 100 for value in numbers.values())


def test_the_published_order_agrees_with_itself_and_noise_widens_the_interval():
    percents = {method: 1.5 * value - 50 for method, value in PUBLISHED[64].items()}
    noise = np.random.default_rng(0)
    resamples = {method: value + noise.normal(0, 2, 400) for method, value in percents.items()}
    found = agreement(64, percents | {"norm": 10.0}, resamples | {"norm": np.zeros(400)})
    assert found.correlation == pytest.approx(1) and "norm" not in found.here
    low, high = found.bounds
    assert 0.4 < low < high < 1
    text = str(found)
    assert f"{len(PUBLISHED[64])} methods" in text and "correlation with published averages" in text
    assert text.index("| stacktok") < text.index("| fastv")


def test_few_methods_and_other_budgets_say_nothing():
    assert agreement(64, {"apet": 90.0, "tome": 80.0}) is None
    assert agreement(100, dict.fromkeys(PUBLISHED[64], 90.0)) is None
    assert agreement(64, dict.fromkeys(PUBLISHED[64], 90.0)).bounds is None
