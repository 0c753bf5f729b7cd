"""Which differences between methods the questions can tell apart: paired bootstrap tests, corrected for their number.

A table of twenty methods holds twenty chances to be ahead by luck. Holm's step-down correction (1979) keeps the chance
of a single false claim per budget below the level, without assuming that the tests are independent.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from apet.compare.plan import BASELINE, UNCOMPRESSED
from apet.compare.rows import Row

METHOD = "apet"
OURS = (METHOD, "apet_plus")


def p_value(differences: np.ndarray) -> float:
    """Two-sided p-value of no difference, from resampled differences (r,); at least 2 / (r + 1)."""
    beside = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    return min(1.0, 2 * (beside + 1) / (len(differences) + 1))


def holm(values: Sequence[float]) -> list[float]:
    """P-values corrected for their number; in the order given."""
    corrected, largest = [0.0] * len(values), 0.0
    for place, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - place) * values[index]))
        corrected[index] = largest
    return corrected


def with_p_values(rows: Sequence[Row]) -> list[Row]:
    """The rows with p-values against `apet` and against the best peer, corrected within every budget.

    The best peer is the best of the methods that are neither this project's nor random selection.
    """
    found = {id(row): row for row in rows}
    for budget in {row.budget for row in rows if row.method != UNCOMPRESSED}:
        group = [row for row in rows if row.budget == budget and row.method != UNCOMPRESSED]
        peers = [row for row in group if row.method.partition(":")[0] not in (*OURS, BASELINE)]
        references = {
            "p_apet": next((row for row in group if row.method == METHOD), None),
            "p_peer": min(peers, key=lambda row: row.rank, default=None),
        }
        for name, reference in references.items():
            others = [row for row in group if row is not reference]
            if reference is None or reference.pictures < 2:
                continue
            values = holm([p_value(row.resamples - reference.resamples) for row in others])
            for row, value in zip(others, values, strict=True):
                found[id(row)] = replace(found[id(row)], **{name: value})
    return [found[id(row)] for row in rows]
