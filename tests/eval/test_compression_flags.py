"""Flags of the programs as a configuration."""

import importlib

import pytest

from apet import ApetConfig
from apet.bench.__main__ import COMMANDS
from apet.bench.__main__ import parser as bench_parser
from apet.eval.cli import add_compression_flags, config_from_flags
from apet.eval.scoring_cli import Parser

PROGRAMS = [
    *(f"llava.eval.{name}" for name in ("model_vqa", "model_vqa_loader", "model_vqa_mmbench", "model_vqa_science")),
    "llava.eval.run_llava", "llava.eval.video_qa", "llava.serve.cli", "apet.eval.suite", "apet.report.__main__",
    "apet.compare.__main__", "apet.vis.__main__", "apet.eval.check_data",
]  # fmt: skip


def config(*words: str):
    parser = Parser(prog="test")
    add_compression_flags(parser)
    return config_from_flags(parser.parse_args(words))


def test_an_error_target_is_an_option_of_the_method():
    made = config("--method", "apet_plus:min_keep=4", "--visual_token_num", "64", "--apet", "error_target=0.2")
    assert made.method_options == {"min_keep": 4, "error_target": 0.2}
    assert config("--method", "apet_plus").method_options == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--apet", "error_target=0.2"], "method 'apet'"),
        (["--method", "apet_plus", "--apet", "error_target=2"], "error_target"),
        (["--method", "apet_plus:quota"], "quota"),
        (["--apet", "position_mod=keep"], "Did you mean 'position_mode'"),
        (["--apet", "seed=3"], "flag of its own, --seed"),
        (["--apet", "position_mode"], "write --apet name=value"),
    ],
)
def test_bad_options_are_named(words, said):
    with pytest.raises(ValueError, match=said):
        config(*words)


def test_every_field_of_the_configuration_can_be_given():
    words = "video_token_num=6,basis_selection=dpc,fps_start=first,position_mode=keep,budget_per=image"
    made = config(
        "--apet", words, "--apet", "video_budget_per=clip,compat=published,size_bias=true,position_mode=compact"
    )
    assert (made.video_token_num, made.basis_selection, made.fps_start) == (6, "dpc", 0)
    assert (made.budget_per, made.video_budget_per, made.compat) == ("image", "clip", "published")
    assert made.size_bias is True and made.position_mode == "compact"
    made = config("--apet", "tower_layer_list=[2,4],tower_token_list=[288,0.5],size_bias=true")
    assert (made.tower_layer_list, made.tower_token_list) == ((2, 4), (288, 0.5))
    flags = ("--visual_token_num", "96", "--layer_list", "[8]", "--image_token_list", "[32]", "--seed", "3")
    made = config(*flags, "--basis_token_num", "4", "--method", "random")
    assert made.stage_budgets == (96, 32) and made.layer_list == (8,)
    assert (made.seed, made.basis_token_num, made.method) == (3, 4, "random")
    assert config(
        "--image_token_ratio", "0.5", "--layer_list", "[8]", "--image_token_ratio_list", "[0.3]"
    ) == ApetConfig(image_token_ratio=0.5, layer_list=[8], image_token_ratio_list=[0.3])


@pytest.mark.parametrize("module", PROGRAMS)
def test_every_flag_has_a_help(module):
    actions = importlib.import_module(module).parser()._actions
    assert [action.dest for action in actions if not action.help] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_the_bench_has_a_help(command):
    assert [action.dest for action in bench_parser(command)._actions if not action.help] == []
