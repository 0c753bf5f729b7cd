"""scripts/host_tests.py on a small stand-in for transformers' source tree."""

import os
import subprocess
from pathlib import Path

import pytest
from forking_python import forking_python

ROOT = Path(__file__).parents[2]
SUITE = """
import torch
from tiny import images, prompt, tiny_llava

def test_generation():
    model = tiny_llava()
    assert model.generate(torch.tensor([prompt(5, (1,))]), pixel_values=images(1), max_new_tokens=2).shape == (1, 32)

def test_training():
    model, ids = tiny_llava().train(), torch.tensor([prompt(5, (1,))])
    model(input_ids=ids, pixel_values=images(1), labels=ids).loss.backward()

def test_broken():
    assert False
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")])}
    command = [forking_python(), str(ROOT / "scripts" / "host_tests.py"), str(folder), "--models", "llava", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path):
    suite = tmp_path / "tests" / "models" / "llava"
    suite.mkdir(parents=True)
    (suite / "test_modeling_llava.py").write_text(SUITE)
    return tmp_path


def test_a_configuration_that_asks_for_nothing_changes_nothing(folder):
    found = run(folder)
    assert found.returncode == 0, found.stdout
    assert "3 tests, 2 pass plain; 0 end otherwise" in found.stdout


def test_what_ends_otherwise_is_named(folder):
    found = run(folder, "--config", '{"visual_token_num": 100000}')
    assert found.returncode == 1
    assert "test_modeling_llava.test_training: passed plain, failure patched" in found.stdout
    assert "1 end otherwise" in found.stdout


def test_a_folder_without_the_tests(tmp_path):
    found = run(tmp_path)
    assert found.returncode == 2 and "give the folder of transformers' sources" in found.stderr
