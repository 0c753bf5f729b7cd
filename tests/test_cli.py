"""The command line `apet`: its commands, their help, and what it says about wrong words."""

import os
import subprocess
import sys
from argparse import ArgumentParser
from importlib.util import find_spec
from pathlib import Path

import pytest

import apet
from apet.bench.__main__ import COMMANDS as MEASUREMENTS
from apet.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
SCREEN = 50  # lines of a terminal of 120 columns


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | {"COLUMNS": "120"} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_list_of_commands_needs_no_torch():
    shown = run("-X", "importtime", "-m", "apet", "--help")
    assert shown.returncode == 0 and all(f"\n  {name} " in shown.stdout for name in COMMANDS)
    assert len(shown.stdout.splitlines()) <= SCREEN and " torch\n" not in shown.stderr


def commands() -> list:
    """All of them; one is a part of the tree that not every checkout has."""
    absent = [name for name in ("serve",) if find_spec(COMMANDS[name].module) is None]
    skipped = pytest.mark.skip(reason="its module is not in this tree")
    return [pytest.param(name, marks=skipped) if name in absent else name for name in COMMANDS]


@pytest.mark.parametrize("name", commands())
def test_a_command_is_a_module_whose_help_fits_a_screen(name, monkeypatch, capsys):
    assert find_spec(COMMANDS[name].module) is not None
    monkeypatch.setenv("COLUMNS", "120")
    try:
        status = main([name, "--help"])
    except SystemExit as ended:
        status = ended.code
    shown = capsys.readouterr().out
    assert status == 0 and "examples:" in shown and len(shown.splitlines()) <= SCREEN, shown


@pytest.mark.parametrize(
    "words", [name for name in commands() if name != "bench"] + [f"bench {name}" for name in MEASUREMENTS]
)
def test_every_flag_of_a_command_has_a_help_text(words, monkeypatch):
    seen = []
    monkeypatch.setattr(ArgumentParser, "print_help", lambda parser, file=None: seen.append(parser))
    try:
        main([*words.split(), "--help"])
    except SystemExit as ended:
        assert ended.code == 0
    silent = [action.option_strings or action.dest for parser in seen for action in parser._actions if not action.help]
    assert seen and not silent


def test_a_word_that_is_no_command(capsys):
    assert main(["evel"]) == 2
    assert "did you mean 'eval'?" in capsys.readouterr().err
    assert main([]) == 2 and "usage: apet COMMAND" in capsys.readouterr().out
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"{apet.__version__}\n"


def test_flags_of_eval_are_the_variables_of_the_scripts(capsys, monkeypatch):
    monkeypatch.setenv("MODEL", "owner/from-the-variable")
    words = ["eval", "llava1_5", "pope", "--dry-run", "--tokens", "64", "--data", "/d"]
    assert main(words) == 0
    answering = capsys.readouterr().out.splitlines()[0]
    assert "--model-path owner/from-the-variable " in answering and "--visual_token_num 96 " in answering
    assert "--answers-file /d/pope/answers/from-the-variable-apet-64.jsonl" in answering
    assert main([*words, "--model", "owner/given", "--method", "random"]) == 0
    answering = capsys.readouterr().out.splitlines()[0]
    assert "--model-path owner/given " in answering and "/given-random-64.jsonl" in answering


def test_a_checkout_that_is_not_the_working_folder_has_its_loader(tmp_path):
    """As with `pip install -e .`, where `apet` alone is found and programs are started from anywhere."""
    (tmp_path / "apet").symlink_to(ROOT / "apet")
    code = """
import subprocess, sys
from apet import cli
cli.import_module = lambda name: sys.modules[__name__]
def main(words):
    from apet.eval.loader import loader_names
    print(loader_names(), flush=True)
    code = "import llava.constants as one; print(one.IMAGE_TOKEN_INDEX)"
    return subprocess.run([sys.executable, "-c", code]).returncode
sys.exit(cli.main(["eval"]))
"""
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert shown.stdout.split() == ["['llava.eval.apet_loader']", "-200"], shown.stderr


def test_a_family_has_only_its_benchmarks(capsys):
    assert main(["eval", "video_llava", "gqa", "--dry-run"]) == 1
    assert "video_llava has no gqa; choose activitynet" in capsys.readouterr().err
