"""The page of methods is the registry's, and every method says where it comes from."""

import ast
import importlib.util
import inspect
import re
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from apet.methods import get_method, method_names

ROOT = Path(__file__).parents[2]
NO_NUMBER = {"stacktok"}  # we know its formulas from a survey
BASELINES = {"none", "random", "uniform", "grid", "avg_pool", "norm"}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_current(script, capsys):
    assert script.main(["--check"]) == 0, capsys.readouterr().err


def test_one_line_per_method(script):
    named = re.findall(r"^\| `(\w+)` \|", script.methods_page(), flags=re.MULTILINE)
    assert named == method_names() * 2


@pytest.mark.parametrize("name", method_names())
def test_a_method_is_described(name):
    method = get_method(name)
    module = inspect.getmodule(type(method))
    assert module.__name__ == f"apet.methods.{name}"
    assert is_dataclass(method) and type(method).__dataclass_params__.frozen
    assert method.idea and bool(method.paper) == (name not in BASELINES)
    assert bool(method.arxiv) == (name not in BASELINES | NO_NUMBER)
    assert method.features in ("pre_projector", "post_projector")
    if method.arxiv:
        assert re.fullmatch(r"\d{4}\.\d{5}", method.arxiv) and f"arXiv {method.arxiv}" in module.__doc__
        assert "need" in module.__doc__.lower() or name == "apet_plus"


@pytest.mark.parametrize("name", method_names())
def test_every_option_is_documented(name):
    cls = type(get_method(name))
    described = ast.get_docstring(ast.parse(inspect.getsource(cls)).body[0])
    for option in cls.__dataclass_fields__:
        assert f"    {option}: " in described
