"""Fixtures shared by the tests."""

import os

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
