"""`apet.compress` against the plain float64 implementation of brute_force.py on random tokens."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import apet
from core import brute_force
from core.test_golden import load

# Decisions taken by less than this are rounding noise in float32.
CLEAR = 1e-5


@st.composite
def problems(draw):
    """Tokens (B, N, D) in float32, `start`, and the options that brute_force.compress knows too."""
    n, dim, batch = draw(st.integers(2, 40)), draw(st.integers(3, 24)), draw(st.integers(1, 3))
    generator = np.random.default_rng(draw(st.integers(0, 2**16)))
    tokens = generator.normal(size=(batch, n, dim)) * draw(st.sampled_from([0.05, 1.0, 300.0]))
    if draw(st.booleans()):
        tokens[:, :: max(1, n // 3)] *= 20
    options = {
        "keep": draw(st.integers(1, n - 1)),
        "ridge": draw(st.sampled_from([1e-5, 0.1])),
        "slots": draw(st.sampled_from(["position", "error"])),
        "insertion": draw(st.sampled_from(["overwrite", "blend", "append", "none"])),
        "merge": draw(st.booleans()),
    }
    return tokens.astype(np.float32), draw(st.integers(0, 12)), draw(st.none() | st.integers(0, n - 1)), options


def choose(x: np.ndarray, k: int, selection: str, start: int | None, picked: list[int]):
    """Picks, basis features and margin; where the choice is random, the picks are given."""
    if selection == "dpc" and k:
        return brute_force.density_peaks(x, k)
    picks, margin = brute_force.farthest_points(x, k, start) if selection == "fps" and k else (picked, np.inf)
    return picks, x[picks], margin


def check(result, sample: int, tokens: np.ndarray, expected: brute_force.Result) -> None:
    size = np.linalg.norm(tokens, axis=1).max()
    np.testing.assert_array_equal(result.indices[sample], expected.indices)
    np.testing.assert_array_equal(result.sources[sample], expected.sources)
    np.testing.assert_allclose(result.errors[sample], expected.errors, rtol=1e-4, atol=1e-5 * size)
    np.testing.assert_allclose(result.tokens[sample], expected.tokens, rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize("selection", ["fps", "dpc", "random"])
@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])
@given(problem=problems())
def test_random_problems(selection, problem):
    tokens, basis, start, options = problem
    if selection == "dpc":
        tokens = tokens / np.abs(tokens).max()
    k = min(basis, options["keep"] - 1 if options["insertion"] in ("overwrite", "blend") else tokens.shape[1])
    result = apet.compress(torch.from_numpy(tokens), basis=basis, basis_selection=selection, start=start, **options)
    for sample, x in enumerate(tokens.astype(np.float64)):
        picks, features, margin = choose(x, k, selection, start, result.basis[sample].tolist())
        assume(margin > CLEAR)
        np.testing.assert_array_equal(result.basis[sample], picks)
        assert len(set(picks)) == k
        expected = brute_force.compress(x, picks=picks, basis=features, **options)
        assume(expected.margin > CLEAR)
        check(result, sample, x, expected)


@pytest.mark.parametrize("slots", ["position", "error"])
@pytest.mark.parametrize("insertion", ["overwrite", "blend", "none"])
def test_the_size_of_clip(slots, insertion):
    """576 tokens of width 1024, 10 basis tokens, 96 kept: the published setting."""
    tokens = load("enc_b1_n576_d1024_keep96_basis10")["features"].astype(np.float64)
    picks, _ = brute_force.farthest_points(tokens[0], 10, start=0)
    options = {"keep": 96, "slots": slots, "insertion": insertion}
    expected = brute_force.compress(tokens[0], picks=picks, basis=tokens[0][picks], **options)
    assert expected.margin > CLEAR
    check(apet.compress(torch.from_numpy(tokens).float(), start=0, **options), 0, tokens[0], expected)
