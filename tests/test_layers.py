"""Who may import whom: the imports of every module of `apet` and `llava`, read with `ast`, against one table.

The table is the architecture: `core` works without a model, methods never see a family, adapters never see a method,
the library never sees the command line or `llava`. A new module belongs to the longest prefix that names it.
"""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Layer:
    """What modules below `prefix` may import, beside the standard library."""

    prefix: str
    ours: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


ALGORITHM = ("apet.config", "apet.core", "apet.kernels", "apet.compressor")
MODEL_SIDE = (*ALGORITHM, "apet.methods", "apet.adapters", "apet.result")
LIBRARY = (*MODEL_SIDE, "apet.patch", "apet.cost")
PUBLIC = ("apet", "torch", "transformers")

LAYERS = (
    Layer("apet", ("apet",), ("torch",)),  # the package file itself: re-exports
    Layer("apet.cli", ("apet",)),
    Layer("apet.__main__", ("apet.cli",)),
    Layer("apet.config"),
    Layer("apet.core", ("apet.core",), ("torch",)),
    Layer("apet.kernels", ("apet.core", "apet.kernels"), ("torch", "triton")),
    Layer("apet.compressor", ALGORITHM, ("torch",)),
    Layer("apet.result", ALGORITHM, ("torch",)),
    Layer("apet.methods", (*ALGORITHM, "apet.methods"), ("torch",)),
    # Its loop of dependent small steps runs in NumPy on CPUs, at half the time of torch's dispatch.
    Layer("apet.methods._volume", (*ALGORITHM, "apet.methods"), ("torch", "numpy")),
    Layer(
        "apet.adapters",
        ("apet.config", "apet.core", "apet.adapters", "apet.result"),
        ("torch", "transformers", "numpy"),
    ),
    Layer("apet.plan", MODEL_SIDE, ("torch",)),
    Layer("apet.patch", (*MODEL_SIDE, "apet.plan"), ("torch",)),
    Layer("apet.families", ("apet.config", "apet.adapters")),
    Layer("apet.cost", (*MODEL_SIDE, "apet.patch"), ("torch",)),
    Layer("apet.api", (*LIBRARY, "apet.plan"), ("torch",)),
    Layer("apet.harness", ("apet.api", "apet.harness"), ("lmms_eval", "vlmeval", "transformers")),
    Layer("apet.vis", ("apet",), ("torch", "numpy", "matplotlib")),
    Layer("apet.demo", ("apet",), ("numpy", "gradio")),
    Layer("apet.bench", ("apet",), ("torch", "transformers", "numpy", "tqdm", "PIL")),
    Layer("apet.compare", ("apet",), ("torch", "transformers", "numpy", "tqdm")),
    Layer(
        "apet.serving",
        (*MODEL_SIDE, "apet.serving", "apet.__version__"),
        ("torch", "transformers", "numpy", "vllm", "fastapi", "prometheus_client"),
    ),
    Layer("apet.serving.settings", ("apet.config", "apet.methods", "apet.serving")),
    Layer("apet.tables"),
    Layer("apet.measure", (), ("torch", "numpy")),
    Layer("apet.plots", ("apet.eval.benchmarks",), ("matplotlib",)),
    Layer("apet.report", ("apet.eval", "apet.plots", "apet.report", "apet.tables")),
    Layer(
        "apet.eval",
        (*LIBRARY, "apet.eval", "apet.tables"),
        ("torch", "transformers", "PIL", "numpy", "tqdm", "shortuuid"),
    ),
    Layer("apet.eval.endpoint"),
    Layer("apet.eval.hub", ("apet.eval",), ("datasets",)),
    Layer("apet.eval.videos", ("apet.eval",), ("PIL", "numpy", "av")),
    Layer("apet.eval.metrics"),
    Layer("apet.eval.benchmarks", ("apet.eval.benchmarks", "apet.eval.metrics"), ("numpy", "pandas", "openpyxl")),
    Layer("llava", ("llava",), ("torch", "transformers")),  # the package file itself: re-exports
    Layer("llava._unmixed"),
    Layer("llava.constants"),
    Layer("llava.mm_utils", ("llava.constants",), ("torch", "transformers", "PIL")),
    Layer("llava.conversation", ("llava.constants", "llava.mm_utils"), ("PIL",)),
    Layer("llava.utils", ("llava.constants",)),
    Layer(
        "llava.model",
        ("apet", "llava.constants", "llava.conversation", "llava.mm_utils", "llava.utils", "llava.model"),
        ("torch", "transformers", "accelerate", "safetensors", "sentencepiece", "peft", "PIL", "numpy"),
    ),
    Layer(
        "llava.model.hugging_face",
        ("llava",),
        ("torch", "transformers", "tokenizers", "huggingface_hub"),
    ),
    Layer("llava.eval", ("apet", "llava"), ("torch", "transformers", "PIL", "numpy", "tqdm", "shortuuid")),
    Layer("llava.serve", ("apet", "llava"), ("torch", "transformers", "PIL")),
)

# Modules that only some places may use, whatever the table above says.
RESERVED = {
    "argparse": (
        "apet.eval",
        "apet.bench",
        "apet.compare",
        "apet.vis",
        "apet.demo",
        "apet.report",
        "apet.serving.cli",
        "llava.eval",
        "llava.serve",
    ),
    "flash_attn": (),  # transformers' attn_implementation loads it
}
FORBIDDEN_CALLS = {"eval", "exec"}  # user text is parsed as literals


def below(module: str, prefix: str) -> bool:
    """Whether `module` is `prefix` or lies in it."""
    return module == prefix or module.startswith(prefix + ".")


def layer_of(module: str) -> Layer | None:
    """The row of the table a module belongs to; the two package rows cover only the package files."""
    rows = [row for row in LAYERS if module == row.prefix or ("." in row.prefix and below(module, row.prefix))]
    return max(rows, key=lambda row: len(row.prefix), default=None)


def imports(tree: ast.AST, package: str) -> set[str]:
    """Absolute dotted names of everything a module imports, inside functions too; `package` resolves relative ones."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            names.update(f"{source}.{alias.name}" for alias in node.names)
    return names


def violations(module: str, source: str, package: str) -> list[str]:
    """What a module does against the table, one sentence each."""
    row, tree = layer_of(module), ast.parse(source)
    if row is None:
        return [f"{module} belongs to no layer; add a row to LAYERS"]
    found = []
    for name in sorted(imports(tree, package)):
        top = name.split(".")[0]
        if top in ("apet", "llava"):
            allowed = any(below(name, prefix) for prefix in row.ours)
        else:
            allowed = top in sys.stdlib_module_names or top in row.others
        reserved = RESERVED.get(top)
        if not allowed or (reserved is not None and not any(below(module, place) for place in reserved)):
            found.append(f"{module} must not import {name}")
    calls = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return found + [f"{module} must not call {name}()" for name in calls if name in FORBIDDEN_CALLS]


def module_files() -> list[tuple[str, str, Path]]:
    """(module, package, file) of the tree; the package of `a/b/__init__.py` is a.b itself."""
    found = []
    for path in sorted(path for top in ("apet", "llava") for path in (ROOT / top).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = ".".join(parts[:-1])
        found.append((package if parts[-1] == "__init__" else ".".join(parts), package, path))
    return found


MODULES = module_files()


@pytest.mark.parametrize(("module", "package", "path"), MODULES, ids=[module for module, _, _ in MODULES])
def test_imports_follow_the_layers(module, package, path):
    assert violations(module, path.read_text(encoding="utf-8"), package) == []


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("apet.core.rows", "import torch\nfrom apet.core.types import X", 0),
        ("apet.core.rows", "from .types import X", 0),
        ("apet.core.rows", "from ..config import X", 1),
        ("apet.core.rows", "import transformers", 1),
        ("apet.config", "import json, torch", 1),
        ("apet.methods.new", "from apet import adapters", 1),
        ("apet.methods.new", "def late():\n    import apet.adapters.llava", 1),
        ("apet.adapters.new", "from apet.methods.base import Method", 1),
        ("apet.patch", "import argparse", 1),
        ("apet.eval.cli", "import argparse\nfrom apet.config import ApetConfig", 0),
        ("apet.eval.benchmarks.new", "from apet.eval.runner import run", 1),
        ("apet.eval.runner", "import llava.mm_utils", 1),
        ("llava.model.builder", "import apet\nfrom llava.eval import answerer", 1),
        ("llava.eval.new", "import flash_attn", 1),
        ("llava.eval.new", "lists = eval(text)", 1),
        ("apet.elsewhere", "", 1),
        ("llava.evaluation", "", 1),
    ],
)
def test_the_check_itself(module, source, broken):
    assert len(violations(module, source, module.rpartition(".")[0])) == broken
