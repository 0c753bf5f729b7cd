"""Decoding on static caches: the patched step traces as one graph, and one graph serves every prompt."""

from dataclasses import replace

import pytest
import torch
from tiny import images, left_pad, prompt, tiny_llava
from transformers import CompileConfig, StaticCache

import apet
from apet.adapters import host
from apet.adapters.cache import PromptCache

pytestmark = pytest.mark.host

CONFIG = apet.ApetConfig(visual_token_num=14, layer_list=[1], image_token_list=[6], basis_token_num=3)
LENGTHS = [(9, 9), (12, 9), (15, 11), (7, 7), (21, 4)]


def inputs(lengths):
    rows = [prompt(length, (3,), seed) for seed, length in enumerate(lengths)]
    return left_pad(rows) | {"pixel_values": images(len(rows))}


def traced() -> CompileConfig:
    """One graph or an error, run as it is traced, on any device."""
    return host.compile_everywhere(backend="eager", mode=None, fullgraph=True)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def model():
    # Of its own: a model keeps its compiled step. A layer in front of the stage and one behind it: tracing is slow.
    return tiny_llava("sdpa", layers=2)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, size_bias=True), None], ids=["compressed", "sizes", "none"])
@pytest.mark.parametrize("cache_type", ["prompt", "static"])
def test_one_graph_serves_all_prompts(model, config, cache_type):
    if config is not None:
        apet.apply_patch(model, config)
    options = {"max_new_tokens": 6, "do_sample": False}
    plain = [model.generate(**inputs(lengths), **options) for lengths in LENGTHS]
    text = model.config.text_config
    cache = PromptCache(model, 6) if cache_type == "prompt" else StaticCache(config=text, max_cache_len=80)
    for lengths, expected in zip(LENGTHS, plain, strict=True):
        cache.reset()
        found = model.generate(**inputs(lengths), **host.with_cache(cache), compile_config=traced(), **options)
        assert torch.equal(found, expected)
    # Batches with and without padding.
    assert graphs() <= 2


def test_generate_compiles_a_patched_model_as_it_would_any_other(model):
    before = getattr(model.generation_config, "disable_compile", None)
    with apet.patched(model, CONFIG):
        assert getattr(model.generation_config, "disable_compile", None) == before
        options = {"max_new_tokens": 4, "do_sample": False}
        expected = model.generate(**inputs((9, 7)), **options)
        found = model.generate(**inputs((9, 7)), cache_implementation="static", compile_config=traced(), **options)
    assert torch.equal(found, expected)
    assert graphs() == 1


def test_a_prompt_cache_is_as_long_as_the_prompt_of_each_layer():
    model = tiny_llava("sdpa")
    cache = PromptCache(model, 70)
    with torch.inference_mode(), apet.patched(model, replace(CONFIG, layer_list=[2])):
        given = inputs((60, 60))
        model(**given, **host.with_cache(cache))
        assert [layer.get_max_length() for layer in cache.layers] == [256, 256, 256, 256]
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [74, 74, 66, 66]
        first = [layer.keys.data_ptr() for layer in cache.layers]
        cache.reset()
        assert cache.get_seq_length() == 0
        model(**inputs((50, 40)), **host.with_cache(cache))
        assert [layer.get_max_length() for layer in cache.layers] == [256, 256, 128, 128]
        cache.reset()
        model(**given, **host.with_cache(cache))
        assert [layer.keys.data_ptr() for layer in cache.layers] == first  # a CUDA graph finds its memory again


def test_an_emptied_cache_forgets_the_prompt_before(model):
    """A prompt without images behind one with images, on the same cache."""
    text = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]]), "attention_mask": torch.ones(2, 4).long()}
    options = {"max_new_tokens": 4, "do_sample": False}
    with apet.patched(model, CONFIG):
        expected = model.generate(**text, **options)
        cache = StaticCache(config=model.config.text_config, max_cache_len=80)
        model.generate(**inputs((12, 5)), **host.with_cache(cache), **options)
        cache.reset()
        assert torch.equal(model.generate(**text, **host.with_cache(cache), **options), expected)
