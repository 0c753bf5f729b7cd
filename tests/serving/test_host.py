"""The one file that says what ApET assumes of vLLM: it is complete, it holds for the installed vLLM, and it refuses."""

import ast
import importlib
import sys
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace

import pytest

from apet.serving import host
from apet.serving.settings import SERVED

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "apet/serving"
LISTED = {
    (module, name.partition(".")[0])
    for names in (host.ENGINE, *host.MODELS.values())
    for module, listed in names.items()
    for name in listed
}


def imports(path: Path) -> set[tuple[str, str]]:
    """(module, name) of everything a file imports from vLLM."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "vllm":
            found |= {(node.module, alias.name) for alias in node.names}
        assert not (isinstance(node, ast.Import) and any(alias.name.startswith("vllm") for alias in node.names)), path
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_what_is_imported_from_vllm_is_listed(path):
    assert path.name == "host.py" or imports(path) <= LISTED


def test_the_versions_are_the_same_everywhere():
    assert f"vllm{host.TESTED}" in (ROOT / "pyproject.toml").read_text()
    assert "${APET_VLLM_RANGE-" + host.TESTED + "}" in (ROOT / "scripts/_vllm.sh").read_text()
    lowest = host.TESTED.partition(",")[0].removeprefix(">=")
    assert f"vllm-openai:v{lowest}." in (ROOT / "examples/serving/Dockerfile").read_text()
    assert set(host.MODELS) == {row.family for row in SERVED}


@pytest.fixture
def vllm(monkeypatch):
    """Modules of a vLLM with everything that is listed for LLaVA."""

    def module(path: str) -> ModuleType:
        made = ModuleType(path)
        monkeypatch.setitem(sys.modules, path, made)
        return made

    module("vllm").__version__ = "9.9"
    for names in (host.ENGINE, host.MODELS["llava"]):
        for path, listed in names.items():
            found = sys.modules[path] if path == "vllm" else module(path)
            for name, arguments in listed.items():
                owner, _, method = name.partition(".")
                if not hasattr(found, owner):
                    setattr(found, owner, SimpleNamespace())
                scope = {}
                exec(f"def f({', '.join(arguments)}): pass", scope)
                if method:
                    setattr(getattr(found, owner), method, scope["f"])
                else:
                    scope["f"].__dict__.update(vars(getattr(found, owner)))
                    setattr(found, owner, scope["f"])
    return sys.modules


def test_a_vllm_with_everything_is_accepted(vllm):
    host.prove("llava")


def test_a_vllm_that_renamed_something_is_refused_with_a_sentence(vllm):
    llava = "vllm.model_executor.models.llava"
    vllm[llava].LlavaForConditionalGeneration._process_image_input = lambda pictures: None
    with pytest.raises(host.UnknownVllmError, match="_process_image_input takes no argument 'image_input'") as caught:
        host.prove("llava")
    assert f"vLLM 9.9 is not one that ApET knows: {llava}." in str(caught.value)
    assert f"pip install 'vllm{host.TESTED}'" in str(caught.value)
    del vllm[llava].LlavaForConditionalGeneration._process_image_input
    with pytest.raises(
        host.UnknownVllmError, match=f"{llava} has no LlavaForConditionalGeneration._process_image_input"
    ):
        host.prove("llava")
    vllm[llava] = None
    with pytest.raises(host.UnknownVllmError, match=f"{llava} does not load"):
        host.prove("llava")


def installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


@pytest.mark.skipif(not installed(), reason="needs vLLM (scripts/test_vllm.sh)")
@pytest.mark.parametrize("row", SERVED, ids=lambda row: row.family)
def test_the_installed_vllm_has_everything_and_no_override_is_left_out(row):
    host.prove(row.family)
    module = importlib.import_module(row.model.partition(":")[0])
    for cls in vars(module).values():
        if not isinstance(cls, type) or not cls.__module__.startswith("apet.serving"):
            continue
        theirs = [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]
        ours = [base for base in cls.__mro__ if base.__module__.startswith("apet.")]
        listed = {
            name for names in (host.ENGINE, host.MODELS[row.family]) for found in names.values() for name in found
        }
        methods = {name.rpartition(".")[2] for name in listed}
        for name, value in (pair for base in ours for pair in vars(base).items()):
            written = isinstance(getattr(value, "__func__", value), FunctionType) and not name.startswith("__")
            if written and any(name in vars(base) for base in theirs):
                assert name in methods, f"{cls.__name__}.{name} overrides vLLM's and is not listed"
