"""Fixtures of the evaluation tests: golden files, made-up files in the true formats, command lines run in-process."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def golden():
    """`golden("pope")` reads tests/golden/scorers/pope.json."""
    return lambda name: json.loads((ROOT / f"tests/golden/scorers/{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def save(tmp_path):
    """`save(name, content)` writes below tmp_path: text as it is, rows as JSON lines if the name says so, else JSON."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str):
            lines = name.endswith(".jsonl")
            content = "".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content)
        path.write_text(content, encoding="utf-8")
        return path

    return write


@pytest.fixture
def command(capsys):
    """`command(main, *argv)` -> (exit status, stdout, stderr)."""

    def run(main, *argv):
        capsys.readouterr()
        status = main([str(word) for word in argv])
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def script():
    """`script("convert_gqa_for_eval")` imports scripts/convert_gqa_for_eval.py and gives its `main`."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main

    return load
