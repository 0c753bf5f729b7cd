"""ApetConfig checks itself before any model is touched; list flags are literals, never code."""

import json
import re

import pytest

from apet import ApetConfig
from apet.config import FAMILY_PRESETS, parse_list

REFUSED = [
    # budgets
    ({"visual_token_num": 0}, "visual_token_num=0 must keep at least 1 token"),
    ({"visual_token_num": -5}, "visual_token_num=-5 must keep at least 1 token"),
    ({"visual_token_num": 9.5}, "visual_token_num=9.5"),
    ({"visual_token_num": True}, "visual_token_num=True"),
    ({"visual_token_num": "96"}, "visual_token_num='96'"),
    ({"visual_token_num": [96, 0]}, "visual_token_num=(96, 0)"),
    ({"image_token_ratio": 0}, "image_token_ratio=0 must be a share in (0, 1]"),
    ({"image_token_ratio": 1.01}, "image_token_ratio=1.01 must be a share in (0, 1]"),
    ({"image_token_ratio": -0.5}, "image_token_ratio=-0.5"),
    ({"image_token_ratio": float("nan")}, "image_token_ratio=nan"),
    ({"image_token_ratio": True}, "image_token_ratio=True"),
    ({"image_token_ratio": "0.5"}, "image_token_ratio='0.5'"),
    ({"visual_token_num": 96, "image_token_ratio": 0.5}, "visual_token_num or image_token_ratio, not both"),
    # stages
    ({"layer_list": [8, 16], "image_token_list": [32]}, "2 layers [8, 16] but image_token_list has 1 entries [32]"),
    ({"layer_list": [8], "image_token_list": [32, 16]}, "1 layers [8] but image_token_list has 2 entries [32, 16]"),
    ({"layer_list": [8], "image_token_ratio_list": [0.5, 0.2]}, "image_token_ratio_list has 2 entries"),
    ({"layer_list": [8]}, "layer_list=[8] needs an image_token_list"),
    ({"image_token_list": [32]}, "layer_list has 0 layers [] but image_token_list has 1 entries"),
    (
        {"layer_list": [8], "image_token_list": [32], "image_token_ratio_list": [0.5]},
        "image_token_list or image_token_ratio_list, not both",
    ),
    ({"layer_list": [16, 8], "image_token_list": [32, 16]}, "layer_list=[16, 8] must hold increasing layers"),
    ({"layer_list": [8, 8], "image_token_list": [32, 16]}, "8 does not follow 8"),
    ({"layer_list": [0], "image_token_list": [32]}, "layer_list=[0] must hold increasing layers counted from 1"),
    ({"layer_list": [-1], "image_token_list": [32]}, "-1 does not follow 0"),
    ({"layer_list": [8.0], "image_token_list": [32]}, "layer_list=[8.0]"),
    ({"layer_list": [True], "image_token_list": [32]}, "layer_list=[True]"),
    ({"layer_list": ["8"], "image_token_list": [32]}, "layer_list=['8']"),
    ({"layer_list": 16, "image_token_list": [32]}, "layer_list=16 must be a list"),
    ({"layer_list": "[16]", "image_token_list": [32]}, "layer_list='[16]' must be a list"),
    ({"layer_list": [16], "image_token_list": 32}, "image_token_list=32 must be a list"),
    ({"layer_list": [16], "image_token_ratio_list": 0.5}, "image_token_ratio_list=0.5 must be a list"),
    ({"layer_list": [8], "image_token_list": [0]}, "image_token_list=0 must keep at least 1 token"),
    ({"layer_list": [8], "image_token_list": [[5, 0]]}, "image_token_list=(5, 0)"),
    ({"layer_list": [8], "image_token_ratio_list": [1.5]}, "image_token_ratio_list=1.5 must be a share in (0, 1]"),
    ({"layer_list": [8], "image_token_ratio_list": [0.0]}, "image_token_ratio_list=0.0"),
    # budgets that grow
    (
        {"layer_list": [8, 16], "image_token_list": [32, 33]},
        "the stage after layer 16 keeps 33 tokens but the stage after layer 8 leaves only 32",
    ),
    # options
    ({"basis_token_num": -1}, "basis_token_num=-1 must be an int of at least 0"),
    ({"basis_token_num": 2.0}, "basis_token_num=2.0"),
    ({"basis_token_num": None}, "basis_token_num=None"),
    ({"basis_selection": "kmeans"}, "basis_selection='kmeans' is unknown; choose fps, dpc or random"),
    ({"fps_start": "nearest"}, "fps_start='nearest' must be 'farthest' or a token index"),
    ({"fps_start": -1}, "fps_start=-1"),
    ({"fps_start": True}, "fps_start=True"),
    ({"compat": "original"}, "compat='original' is unknown; choose published"),
    ({"method_options": "quota=0"}, "method_options='quota=0' must be a mapping"),
    ({"position_mode": "absolute"}, "position_mode='absolute' is unknown; choose auto, compact, keep"),
]

ACCEPTED = [
    {},
    {"visual_token_num": 1},
    {"visual_token_num": (288, 96)},
    {"image_token_ratio": 1},
    {"visual_token_num": 96, "layer_list": [8, 16], "image_token_list": [96, 32]},
    {"visual_token_num": 96, "layer_list": [8], "image_token_ratio_list": [0.333]},
    {"image_token_ratio": 0.3, "layer_list": [14], "image_token_ratio_list": [1.0]},
    {"layer_list": [8, 16], "image_token_list": [(40, 20), (20, 10)]},
    {"method": "apet_plus", "method_options": {"quota": 0.5, "similarity_floor": None}},
    {"basis_token_num": 0, "basis_selection": "dpc", "fps_start": 0, "position_mode": "keep", "seed": 7},
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_refused(fields, message):
    for make in (lambda: ApetConfig(**fields), lambda: ApetConfig.from_dict(fields)):
        with pytest.raises(ValueError, match=re.escape(message)):
            make()


@pytest.mark.parametrize("fields", ACCEPTED)
def test_json_round_trip(fields, tmp_path):
    config = ApetConfig(**fields)
    assert ApetConfig.from_dict(config.to_dict()) == config
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()), encoding="utf-8")
    assert ApetConfig.from_json(str(path)) == config
    assert hash(ApetConfig.from_json(str(path))) == hash(config)


def test_lists_and_tuples_are_the_same():
    as_lists = ApetConfig(visual_token_num=[96, 48], layer_list=[8], image_token_list=[[32, 16]])
    as_tuples = ApetConfig(visual_token_num=(96, 48), layer_list=(8,), image_token_list=((32, 16),))
    assert as_lists == as_tuples and as_lists.image_token_list == ((32, 16),)


def test_a_list_does_not_stay_connected():
    layers = [8]
    config = ApetConfig(layer_list=layers, image_token_list=[32])
    layers.append(4)
    assert config.layer_list == (8,)
    with pytest.raises(AttributeError):
        config.layer_list = (4,)


def test_none_lists_are_empty():
    assert ApetConfig(layer_list=None, image_token_list=None, image_token_ratio_list=None) == ApetConfig()


def test_nothing_given_is_no_compression():
    assert ApetConfig().stage_budgets == (None,)


def test_stage_budgets_are_the_vision_stage_then_one_per_layer():
    counts = ApetConfig(visual_token_num=96, layer_list=[8, 16], image_token_list=[48, 32])
    assert counts.stage_budgets == (96, 48, 32)
    shares = ApetConfig(image_token_ratio=0.3, layer_list=[14], image_token_ratio_list=[0.333])
    assert shares.stage_budgets == (0.3, 0.333)
    assert ApetConfig(layer_list=[14], image_token_list=[5]).stage_budgets == (None, 5)


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match="unknown ApetConfig field 'visual_tokens'; known:.*visual_token_num"):
        ApetConfig.from_dict({"visual_tokens": 5})


def test_presets_are_those_of_the_published_code():
    llava = FAMILY_PRESETS["llava"]
    assert (llava.stage("vision").slots, llava.stage("llm").slots) == ("position", "error")
    for stage in ("vision", "llm"):
        assert (llava.stage(stage).insertion, llava.stage(stage).ridge) == ("overwrite", 1e-5)
    assert llava.position_mode == "compact"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[16]", (16,)),
        (" [8, 16] ", (8, 16)),
        ("(8, 16)", (8, 16)),
        ("8, 16", (8, 16)),
        ("[0.5]", (0.5,)),
        ("[[40, 20], [10, 5]]", ([40, 20], [10, 5])),
        ("None", ()),
        ("[]", ()),
        ("", ()),
        ("  ", ()),
        (None, ()),
        ([16], (16,)),
        ((8, 16), (8, 16)),
    ],
)
def test_list_flags(text, expected):
    assert parse_list(text, "--layer_list") == expected


@pytest.mark.parametrize("text", ["16", "0.5", "'16'", "{8: 16}", "{8}", "True", 16, "[16", "16]", "eight", "[8; 16]"])
def test_what_is_no_list_is_refused(text):
    with pytest.raises(ValueError, match=f"--layer_list={re.escape(repr(text))} is not a list; write it like"):
        parse_list(text, "--layer_list")


@pytest.mark.parametrize(
    "text", ["__import__('os').system('{}')", "[open('{}', 'w')]", "[*range(3)]", "[3 * 4]", "{{[]: 1}}", "[" * 10_000]
)
def test_code_is_never_evaluated(text, tmp_path):
    trace = tmp_path / "trace"
    with pytest.raises(ValueError, match="is not a list"):
        parse_list(text.format(f"touch {trace}" if "system" in text else trace), "--layer_list")
    assert not trace.exists()
