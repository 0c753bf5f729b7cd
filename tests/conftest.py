"""Fixtures shared by the tests."""

import pytest
import torch
from tiny import tiny_llava
from transformers import LlavaForConditionalGeneration

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
