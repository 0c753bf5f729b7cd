"""Fixtures shared by the tests."""

import pytest
from tiny import tiny_llava
from transformers import LlavaForConditionalGeneration


@pytest.fixture(scope="session", params=["sdpa", "eager"])
def llava(request) -> LlavaForConditionalGeneration:
    """A tiny LLaVA per attention implementation."""
    return tiny_llava(request.param)


@pytest.fixture(scope="session")
def llava_sdpa() -> LlavaForConditionalGeneration:
    """A tiny LLaVA with sdpa attention."""
    return tiny_llava("sdpa")
