"""For tools that ask for this file; the metadata of the `apet` distribution is in pyproject.toml."""

from setuptools import setup

setup()
