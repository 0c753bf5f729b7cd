"""Fixtures shared by the tests."""

import copy
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its own functions are bound then

from tiny import tiny_llava  # noqa: E402
from transformers import LlavaForConditionalGeneration  # noqa: E402

# The models are tiny: a second thread costs more in synchronisation than it computes, most of all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["sdpa", "eager"])
def llava(request) -> LlavaForConditionalGeneration:
    """A tiny LLaVA per attention implementation."""
    return tiny_llava(request.param)


@pytest.fixture(scope="session")
def llava_sdpa() -> LlavaForConditionalGeneration:
    """A tiny LLaVA with sdpa attention."""
    return tiny_llava("sdpa")


@pytest.fixture(scope="module")
def checkpoints_loaded_once():
    """The programs read a checkpoint once per test file, and get a copy of their own of what was loaded.

    For tests of what a program does with a model; one that changes the files of a checkpoint gets it read again.
    """
    from llava.eval import program

    load, known = program.load_pretrained_model, {}

    def copied(path: str, *words, **options):
        files = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(Path(path).glob("*"))]
        key = repr((path, files, words, sorted(options.items())))
        if key not in known:
            known[key] = load(path, *words, **options)
        return copy.deepcopy(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "load_pretrained_model", copied)
        yield
