"""The documentation site builds without a warning, and what its pages print is what their code prints."""

import contextlib
import io
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from forking_python import forking_python

import apet
from apet.methods import base

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = ("tutorial", "extend", "theory")  # to be run from top to bottom
BLOCK = re.compile(r"^```(python|text|bash)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(name: str) -> list[tuple[str, str]]:
    """(language, text) of a page's blocks, in order."""
    return BLOCK.findall((DOCS / f"{name}.md").read_text(encoding="utf-8"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder that looks like the checkout, where pages may write."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))  # a page registers one
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_a_page_prints_what_the_page_says(name, place):
    names: dict[str, object] = {"__name__": "__main__"}
    shown, compared = "", 0
    for language, text in blocks(name):
        if language == "python":
            assert shown == "", f"{name}.md shows nothing of {shown!r}"
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(text, f"{name}.md", "exec"), names)
            shown = printed.getvalue()
        elif language == "text":
            assert shown == text
            shown, compared = "", compared + 1
    assert shown == "" and compared > 0


@pytest.mark.slow
def test_the_commands_of_the_tutorial_run(place):
    lines = [line for language, text in blocks("tutorial") if language == "bash" for line in text.splitlines()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    python = forking_python()
    for line in lines:
        assert line.startswith("apet "), line
        done = subprocess.run(
            [python, "-m", *line.split()], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (line, done.stderr)
    assert len(lines) == 3 and (place / "runs/kept.png").is_file() and (place / "runs/first/table.md").is_file()


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^::: apet\.[\w.]*\.(\w+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), flags=re.M)
    assert sorted(listed) == sorted(apet.__all__)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("mkdocs") is None or find_spec("material") is None or find_spec("mkdocstrings") is None,
    reason="the documentation site needs mkdocs-material and mkdocstrings (extra docs; scripts/test_pages.sh)",
)
def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site/reference/index.html").read_text(encoding="utf-8")
    assert all(f".{name}" in reference for name in apet.__all__) and "Visual tokens per image" in reference
