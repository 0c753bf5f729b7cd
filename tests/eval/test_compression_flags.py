"""Flags of the programs as a configuration."""

import pytest

from apet.eval.cli import add_compression_flags, config_from_flags
from apet.eval.scoring_cli import Parser


def config(*words: str):
    parser = Parser(prog="test")
    add_compression_flags(parser)
    return config_from_flags(parser.parse_args(words))


def test_an_error_target_is_an_option_of_the_method():
    made = config("--method", "apet_plus:min_keep=4", "--visual_token_num", "64", "--error_target", "0.2")
    assert made.method_options == {"min_keep": 4, "error_target": 0.2}
    assert config("--method", "apet_plus").method_options == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--error_target", "0.2"], "method 'apet'"),
        (["--method", "apet_plus", "--error_target", "2"], "error_target"),
        (["--method", "apet_plus:quota"], "quota"),
    ],
)
def test_bad_options_are_named(words, said):
    with pytest.raises(ValueError, match=said):
        config(*words)
