"""The two distributions of this tree, built as wheels, installed and used in an environment outside the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib import metadata
from pathlib import Path

import pytest

import apet
from llava._unmixed import check, foreign_files

ROOT = Path(__file__).parents[1]
# Distribution, as its files are named -> its package.
PACKAGES = {"apet": "apet", "apet_llava": "llava"}


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed; what the tests add to Python's path is not there."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """Both wheels by name, built from a copy of the tree, so that nothing is left in it."""
    work = tmp_path_factory.mktemp("wheels")
    tree = work / "tree"
    tree.mkdir()
    for name in ("apet", "llava"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    for name in ("pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    options = ("--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", work)
    run(sys.executable, "-m", "pip", "wheel", *options, ".", "./llava", cwd=tree)
    return {name: next(work.glob(f"{name}-*.whl")) for name in PACKAGES}


def installed(folder: Path, *wheels: Path) -> Path:
    """A new environment with these wheels, and with the packages that they need from the one of the tests."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, *wheels, cwd=folder)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A line of a path file adds the folder without its own path files, so without an editable `apet`.
    (site / "needed.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    return python


@pytest.fixture(scope="module")
def alone(wheels, tmp_path_factory) -> Path:
    """The interpreter of an environment with `apet` only."""
    return installed(tmp_path_factory.mktemp("alone"), wheels["apet"])


@pytest.fixture(scope="module")
def both(wheels, tmp_path_factory) -> Path:
    """The interpreter of an environment with both distributions."""
    return installed(tmp_path_factory.mktemp("both"), *wheels.values())


def modules(package: str) -> set[str]:
    """Module files of a package in the checkout, below the root."""
    tracked = (path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py"))
    return {name for name in tracked if not name.startswith(f"{package}/build/")}


@pytest.mark.parametrize(("name", "package"), PACKAGES.items())
def test_a_wheel_holds_its_package_whole_and_no_other(wheels, tmp_path, name, package):
    shutil.unpack_archive(wheels[name], tmp_path, format="zip")
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    info = f"{name}-{apet.__version__}.dist-info"
    assert {file.partition("/")[0] for file in files} == {package, info}
    assert {file for file in files if file.endswith(".py")} == modules(package)
    assert {f"{package}/py.typed", f"{info}/licenses/LICENSE"} <= files


def test_versions_agree():
    """`apet-llava` needs the `apet` of its own tree."""
    own = tomllib.loads((ROOT / "llava" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert own["version"] == apet.__version__ and own["dependencies"] == [f"apet=={apet.__version__}"]


def test_metadata_say_who_where_and_what(wheels, tmp_path):
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    for name, wheel in wheels.items():
        shutil.unpack_archive(wheel, tmp_path / name, format="zip")
        (info,) = metadata.distributions(path=[str(tmp_path / name)])
        fields = info.metadata
        assert f"- name: {fields['Author']}\n" in citation and f"license: {fields['License-Expression']}\n" in citation
        assert any("arxiv.org" in url for url in fields.get_all("Project-URL"))
        assert "Typing :: Typed" in fields.get_all("Classifier")
        # A package index knows no folder beside the page.
        assert not re.findall(r"!\[[^\]]*\]\((?!https://)|<img [^>]*src=\"(?!https://)", fields["Description"])


def test_needed_packages_are_those_of_the_scripts(alone, tmp_path):
    code = "import json; from importlib.metadata import requires; print(json.dumps(requires('apet')))"
    needed = [one for one in json.loads(run(alone, "-c", code, cwd=tmp_path)) if "extra ==" not in one]

    def canonical(line: str) -> tuple[str, frozenset[str]]:
        name, bounds = re.fullmatch(r"([\w-]+)(.*)", line).groups()
        return name, frozenset(bounds.split(","))

    wanted = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert {canonical(one) for one in needed} == {canonical(one) for one in wanted}


def test_the_command_line_is_installed(alone, tmp_path):
    said = run(alone.parent / "apet", "--help", cwd=tmp_path)
    assert said.startswith("usage: apet COMMAND") and said == run(alone, "-m", "apet", "--help", cwd=tmp_path)


COMPRESS = """
import importlib.util, json, pathlib, sys, torch, apet
kept = apet.compress(torch.randn(2, 24, 8), 6)
home = pathlib.Path(apet.__file__).is_relative_to(sys.prefix)
print(json.dumps([list(kept.tokens.shape), home, importlib.util.find_spec("llava") is None]))
"""


def test_apet_compresses_without_checkout_and_without_llava(alone, tmp_path):
    assert json.loads(run(alone, "-c", COMPRESS, cwd=tmp_path)) == [[2, 6, 8], True, True]


LOADERS = """
import importlib.util, json, sys
from importlib.metadata import entry_points
(one,) = entry_points(group="apet.loaders")
print(json.dumps([one.name, one.value, importlib.util.find_spec("llava").origin.startswith(sys.prefix)]))
"""


def test_apet_llava_brings_the_loader_of_checkpoints(both, tmp_path):
    found = json.loads(run(both, "-c", LOADERS, cwd=tmp_path))
    assert found == ["llava", "llava.eval.apet_loader", True]


def test_the_published_programs_run_outside_the_checkout(both, tmp_path):
    assert "--question-file" in run(both, "-m", "llava.eval.model_vqa_loader", "--help", cwd=tmp_path)


@pytest.mark.parametrize("last", ["apet-llava", "the other"])
def test_a_mixture_with_another_llava_is_refused(wheels, tmp_path, last):
    """As pip leaves it: the files of both, of equal names those of the one that came last."""
    site = tmp_path / "site"
    shutil.unpack_archive(wheels["apet_llava"], site, format="zip")
    (site / "llava" / "train").mkdir()
    for name in ("train.py", "__init__.py"):
        (site / "llava" / "train" / name).write_text("")
    if last == "the other":
        (site / "llava" / "__init__.py").write_text("")
    module = {"apet-llava": "llava.constants", "the other": "llava.eval.apet_loader"}[last]
    code = f"import sys; sys.path[:0] = [{str(site)!r}]; import {module}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"ImportError: {site / 'llava'} holds files of another package `llava`")
    assert "train/__init__.py, train/train.py" in said and "pip uninstall llava apet-llava" in said


def test_what_apet_llava_installed_is_its_own(wheels, tmp_path):
    shutil.unpack_archive(wheels["apet_llava"], tmp_path, format="zip")
    check(tmp_path / "llava")
    (tmp_path / "llava" / "eval" / "another.py").write_text("")
    assert foreign_files(tmp_path / "llava") == ["eval/another.py"]


def test_a_checkout_may_grow_modules_but_not_packages(tmp_path):
    for name in ("eval/mine.py", "build/lib/llava/eval/mine.py", "train/train.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    assert foreign_files(tmp_path) == ["train/train.py"]
    assert foreign_files(ROOT / "llava") == []
