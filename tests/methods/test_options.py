"""Hyper-parameters out of range are refused, with the option, its value and what is allowed."""

import re

import pytest

from apet.methods import get_method
from methods.synthetic import Inputs, noise, run


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        ("apet_plus", "normalise", "whiten", "is unknown; choose raw, unit, centre, centre_unit"),
        ("apet_plus", "sinks", "drop", "is unknown; choose keep, clip, merge"),
        ("apet_plus", "start", "first", "is unknown; choose norm, farthest"),
        ("apet_plus", "quota", 1.5, "must lie in [0, 1]"),
        ("apet_plus", "sink_share", -0.1, "must lie in [0, 1]"),
        ("apet_plus", "rounds", -1, "must be at least 0"),
        ("apet_plus", "windows", 0, "must be at least 1"),
        ("apet_plus", "min_keep", 0, "must be at least 1"),
        ("apet_plus", "error_target", 1.1, "must lie in [0, 1]"),
        ("cdpruner", "relevance", "siglip", "is unknown; choose clip, embeddings"),
        ("cdpruner", "theta", 1.0, "must lie in [0, 0.99]"),
        ("dart", "image_pivots", 0, "must be at least 1"),
        ("fastv", "stop", 0, "must be at least 1"),
        ("holov", "inside", "paper", "is unknown; choose attention, score"),
        ("holov", "crops", 0, "must be at least 1"),
        ("mmtok", "image_temperature", 0.0, "must be at least 0.001"),
        ("prumerge_plus", "neighbours", -1, "must be at least 0"),
        ("scope", "alpha", -1.0, "must be at least 0"),
        ("sparsevlm", "recycled", 2.0, "must lie in [0, 1]"),
        ("visionzip", "contextual", 1.2, "must lie in [0, 1]"),
        ("vispruner", "step", 0, "must be at least 1"),
        ("vscan", "local", -0.5, "must lie in [0, 1]"),
    ],
)
def test_an_option_out_of_range(name, option, value, message):
    expected = f"option {option}={value!r} of method {name!r} {message}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        get_method(name, **{option: value})


def test_an_option_that_does_not_exist():
    with pytest.raises(
        ValueError, match=r"unknown option of method 'vscan': 'windos'. Did you mean 'windows'\? Available: "
    ):
        get_method("vscan", windos=3)
    with pytest.raises(ValueError, match="Available: none at all"):
        get_method("random", seed=1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("visionzip", {"contextual": 1.0}),
        ("visionzip", {"contextual": 0.0}),
        ("vispruner", {"important": 0.0}),
        ("holov", {"crops": 500}),
        ("prumerge_plus", {"neighbours": 0}),
        ("prumerge_plus", {"neighbours": 500}),
        ("dart", {"image_pivots": 50, "text_pivots": 50}),
        ("sparsevlm", {"recycled": 1.0, "members": 1}),
        ("sparsevlm", {"recycled": 0.0}),
        ("vscan", {"local": 1.0, "windows": 30}),
        ("apet_plus", {"windows": 30, "quota": 1.0, "sink_share": 1.0, "sinks": "merge", "basis": 100}),
        ("apet_plus", {"rounds": 100, "sink_share": 1.0, "ridge": 10.0, "error_target": 0.0}),
    ],
)
@pytest.mark.parametrize("keep", [1, 7, 29])
def test_options_at_the_edge_of_their_range_work(name, options, keep):
    tokens = noise(2, 30, 6)
    result = run(name, tokens, keep, grid=(5, 6), inputs=Inputs.random(2, 30, 6), **options)
    assert result.tokens.shape == (2, keep, 6) and result.tokens.isfinite().all()
    assert (result.indices.diff() > 0).all() and (result.indices >= 0).all()
