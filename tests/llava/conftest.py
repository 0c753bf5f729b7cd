"""Tiny checkpoints, loaded once per file, or as folders of their own that a test may change."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_checkpoints import CLIP, TINY, V15, V16, load


@pytest.fixture
def folder(tmp_path) -> Callable[..., Path]:
    """`folder(name, **fields)` copies a tiny checkpoint and its tower; fields of config.json, None removes one."""

    def copy(name: str = V15, target: str | None = None, clip: bool = True, **fields) -> Path:
        path = tmp_path / (target or name)
        shutil.copytree(TINY / name, path)
        if clip and not (tmp_path / CLIP.name).exists():
            shutil.copytree(CLIP, tmp_path / CLIP.name)
        config = json.loads((path / "config.json").read_text()) | fields
        config = {key: value for key, value in config.items() if value is not None}
        (path / "config.json").write_text(json.dumps(config))
        return path

    return copy


@pytest.fixture
def records():
    """Log records of transformers, at every level that is shown by default."""

    class Collector(logging.Handler):
        def emit(self, record):
            found.append(record.getMessage())

    found: list[str] = []
    handler = Collector(logging.WARNING)
    logging.getLogger("transformers").addHandler(handler)
    yield found
    logging.getLogger("transformers").removeHandler(handler)


@pytest.fixture(scope="module")
def v15():
    return load(TINY / V15)


@pytest.fixture(scope="module")
def v16():
    return load(TINY / V16)
