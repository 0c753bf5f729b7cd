"""Methods with options as text."""

import pytest

from apet.config import ApetConfig, StagePreset
from apet.methods import get_method, parse_method, selector


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("random", "random", {}),
        ("apet_plus:", "apet_plus", {}),
        ("apet_plus:quota=0.5,merge=False", "apet_plus", {"quota": 0.5, "merge": False}),
        ("apet_plus:quota=false, similarity_floor=none", "apet_plus", {"quota": 0, "similarity_floor": None}),
        ("apet_plus:normalise=unit,rounds=8,text=1", "apet_plus", {"normalise": "unit", "rounds": 8, "text": 1.0}),
    ],
)
def test_name_and_options(text, name, options):
    found = parse_method(text)
    assert found == (name, options)
    assert {field: type(value) for field, value in found[1].items()} == {
        field: type(value) for field, value in options.items()
    }
    # What is configured is what runs.
    config = ApetConfig(method=name, method_options=found[1])
    assert selector(config, "vision", StagePreset()).method == get_method(name, **options)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("apet_pluss:quota=0", "Did you mean 'apet_plus'"),
        ("apet_plus:quote=0", "Did you mean 'quota'"),
        ("random:rounds=1", "none at all"),
        ("apet_plus:quota", "option=value"),
        ("apet_plus:quota=2", "must lie in"),
        ("apet_plus:quota=0,quota=1", "twice"),
        ("apet_plus:merge=3", "merge is 3, expected bool"),
        ("apet_plus:rounds=1.5", "rounds is 1.5, expected int"),
        ("apet_plus:quota=none", "quota is None, expected float"),
        ("apet_plus:normalise=all", "choose raw"),
    ],
)
def test_wrong_text_is_refused(text, word):
    with pytest.raises(ValueError, match=word):
        parse_method(text)
