"""For tools that ask for this file; the metadata of the `apet` distribution is in pyproject.toml.

Only the page for package indexes is made here: README.md without its pictures, which an index has no folder for.
"""

from pathlib import Path

from setuptools import setup

_LINES = Path(__file__).with_name("README.md").read_text(encoding="utf-8").splitlines(keepends=True)

setup(
    long_description="".join(line for line in _LINES if not line.startswith("![")),
    long_description_content_type="text/markdown",
)
