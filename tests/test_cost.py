"""The cost model: FLOPs equal to torch's count, cache bytes equal to the cache, time as the roofline says."""

import pytest
import torch
from families import FAMILIES
from torch.utils.flop_counter import FlopCounterMode

import apet
from apet.adapters import host
from apet.bench.components import tower_stops_early
from apet.bench.presets import get_preset
from apet.cost import Ceilings, ModelDims, decode_cost, prefill_cost, tokens_per_layer

CPU = torch.device("cpu")
NAMES = ("llava-1.5-7b", "llava-next-7b", "video-llava-7b", "qwen2.5-vl-7b", "dinov2-smollm2")


def counted(call) -> int:
    """Torch's count without rotary embeddings: transformers before 5.23 makes their tables by a matrix product."""
    with FlopCounterMode(display=False) as counter:
        call()
    tables = [sum(ops.values()) for name, ops in counter.get_flop_counts().items() if "rotary" in name.split(".")[-1]]
    return counter.get_total_flops() - sum(tables)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_flops_and_cache_are_those_of_a_run(name, compressed):
    preset = get_preset(name).shrunk()
    model = preset.build(CPU, torch.float32, "eager")
    inputs = preset.inputs(1, 9, CPU, torch.float32)
    dims = preset.dims()
    # Random selection has no matrix products.
    config = preset.compression("random") if compressed else apet.ApetConfig()

    def run():
        return model(**inputs, use_cache=True, logits_to_keep=1)

    with torch.inference_mode(), apet.patched(model, config):
        early = tower_stops_early(model, run)
        real = counted(run)
        cache = host.cache_of(run())
        visual = apet.last_result(model).tokens_per_layer[0]
        projected = 5 * 96 if name == "llava-next-7b" and compressed else None
        prefill = prefill_cost(dims, visual, text_tokens=9, dtype=torch.float32, projected=projected, early_exit=early)
        assert prefill.flops == real
        assert prefill.kv_bytes == cache_bytes(cache)
        token, lengths = torch.ones(1, 1, dtype=torch.int64), [9 + count for count in visual]
        step = decode_cost(dims, lengths, dtype=torch.float32)
        assert step.flops == counted(lambda: model(input_ids=token, **host.with_cache(cache)))
        assert step.kv_bytes == cache_bytes(cache)


SHAPES = {
    "qwen2_vl": ({"grid": (8, 10)}, 4 * 5),
    "qwen3_vl": ({"grid": (8, 10)}, 4 * 5),
    "internvl": ({"crops": 2}, 2 * 9),
    "llava_onevision": ({"crops": 3}, 9 + 3 * 7),
}


@pytest.mark.parametrize("name", list(SHAPES))
def test_flops_of_families_without_a_preset(name):
    family = FAMILIES[name]
    model, inputs = family.build("eager"), family.inputs(family.prompts[:1])
    shape, visual = SHAPES[name]
    text_tokens = inputs["input_ids"].shape[1] - visual
    cost = prefill_cost(ModelDims.of(model.config, **shape), [visual] * 4, text_tokens=text_tokens, dtype=torch.float32)
    with torch.inference_mode():
        assert cost.flops == counted(lambda: model(**inputs, logits_to_keep=1))
        assert cost.kv_bytes == cache_bytes(host.cache_of(model(**inputs, use_cache=True)))


def test_batches_multiply():
    dims = ModelDims.of(get_preset("llava-1.5-7b").shrunk().config())
    one, four = (prefill_cost(dims, [96] * 4, text_tokens=9, batch=batch) for batch in (1, 4))
    assert (four.flops, four.kv_bytes) == (4 * one.flops, 4 * one.kv_bytes)
    assert [part.weight_bytes for part in four.parts] == [part.weight_bytes for part in one.parts]


def cache_bytes(cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)


@pytest.mark.parametrize("name", ["llava-1.5-7b", "qwen2.5-vl-7b", "video-llava-7b"])
def test_tokens_per_layer_are_those_of_a_run(name):
    preset = get_preset(name).shrunk()
    model = preset.build(CPU, torch.float32)
    config = preset.compression("apet")
    with torch.inference_mode(), apet.patched(model, config):
        model(**preset.inputs(1, 9, CPU, torch.float32))
        assert preset.visual_tokens(config) == apet.last_result(model).tokens_per_layer[0]


def test_tokens_per_layer_with_crops_and_without_compression():
    config = apet.ApetConfig(visual_token_num=96, layer_list=[2], image_token_list=[160])
    assert tokens_per_layer(config, 2928, 4, crops=5) == [480, 480, 160, 160]
    assert tokens_per_layer(None, 576, 3) == [576] * 3
    with pytest.raises(ValueError, match="last_result"):
        tokens_per_layer(apet.ApetConfig(video_token_num=22), 2056, 4)


def test_published_dimensions():
    """13.5 GFLOP per token of a 7B prefill, 0.5 MiB of cache per token."""
    preset = get_preset("llava-1.5-7b")
    dims = ModelDims.of(preset.config())
    whole = prefill_cost(dims, [576] * 32, text_tokens=64)
    text = sum(part.flops for part in whole.parts if part.name.startswith("layer"))
    assert text / 640 == pytest.approx(13.3e9, rel=0.02)
    assert whole.kv_bytes == 640 * 2**19
    short = prefill_cost(dims, [96] * 16 + [32] * 16, text_tokens=64, early_exit=True)
    ceilings = Ceilings(flops=600e12, bandwidth=4e12)
    assert whole.seconds(ceilings) > 2 * short.seconds(ceilings)
    tower = {name: estimate.parts[0].flops for name, estimate in (("whole", whole), ("short", short))}
    assert tower["short"] / tower["whole"] == pytest.approx(23 / 24, rel=2e-3)


def test_seconds_are_bound_by_products_or_by_weights():
    dims = ModelDims.of(get_preset("llava-1.5-7b").shrunk().config())
    cost = decode_cost(dims, [100] * 4)
    weights = sum(part.weight_bytes for part in cost.parts)
    moved = sum(part.activation_bytes for part in cost.parts)
    assert cost.seconds(Ceilings(1e30, 1e9)) == pytest.approx((weights + moved) / 1e9)
    assert cost.seconds(Ceilings(1e9, 1e30)) == pytest.approx(cost.flops / 1e9)


def test_what_cannot_be_predicted():
    config = get_preset("qwen2.5-vl-7b").shrunk().config()
    with pytest.raises(ValueError, match="grid of patches"):
        ModelDims.of(config)
    config.model_type = "blip"
    with pytest.raises(ValueError, match="'blip' is not known"):
        ModelDims.of(config)
    dims = ModelDims.of(get_preset("llava-1.5-7b").shrunk().config())
    with pytest.raises(ValueError, match="3 numbers for 4 decoder layers"):
        prefill_cost(dims, [576] * 3, text_tokens=9)
