"""`prefill` and `generate` on a tiny model; presets of every family with small layers; components."""

import json

import pytest
import torch
from transformers import CompileConfig

import apet
from apet.bench import __main__ as program
from apet.bench import prefill
from apet.bench.comparison import Comparison
from apet.bench.components import REST, TOTAL, layer_groups, marked
from apet.bench.presets import get_preset
from apet.bench.variants import make_variants, runnable
from apet.methods.base import Selector

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "average"),
    [
        ("llava-1.5-7b", 64), ("llava-1.5-13b", 64), ("llava-next-7b", 320), ("qwen2.5-vl-7b", 259), ("cpu-small", 64),
        ("dinov2-smollm2", 64),
    ],
)  # fmt: skip
def test_presets_spend_their_budget(name, average):
    preset = get_preset(name).shrunk()
    model = preset.build(CPU, torch.float32)
    inputs = preset.inputs(1, 8, CPU, torch.float32)
    with torch.inference_mode(), apet.patched(model, preset.compression("apet")):
        model(**inputs)
        result = apet.last_result(model)
    assert result.tokens_in == ((preset.image_tokens,),)
    # Newlines of LLaVA-NeXT stand outside the budget.
    newlines = 48 if name == "llava-next-7b" else 0
    assert average - 1 <= result.layer_averaged_tokens[0] <= average + newlines


def test_a_clip_keeps_its_tokens_per_frame():
    preset = get_preset("video-llava-7b").shrunk()
    model = preset.build(CPU, torch.float32)
    with torch.inference_mode(), apet.patched(model, preset.compression("apet")):
        model(**preset.inputs(1, 8, CPU, torch.float32))
        result = apet.last_result(model)
    assert result.tokens_in == ((8 * 257,),)
    assert result.layer_averaged_tokens == [8 * (22 + 10 + 1)]


def bench(capsys, *words: str) -> dict:
    assert program.main([*words, "--preset", "tiny", "--device", "cpu", "--repeats", "1", "--warmup", "1"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_prefill(capsys):
    result = bench(capsys, "prefill", "--batch", "1,2", "--text_tokens", "5")
    assert [one["batch"] for one in result["batches"]] == [1, 2]
    figures = result["batches"][0]
    assert list(figures["calls"]) == ["none", "random", "apet", "as published"]
    assert figures["calls"]["none"]["speedup"]["median"] == 1
    assert figures["calls"]["random"]["of_random"] == 1
    assert figures["calls"]["apet"]["predicted_ms"] < figures["calls"]["none"]["predicted_ms"]
    parts = figures["components"]["apet"]
    assert {
        "tower",
        "selector, vision",
        "projector",
        "layers 1-2",
        "selector, after layer 2",
        "layers 3-4",
        "head",
    } <= set(parts)
    assert figures["components"]["none"]["selector_share"] == 0
    assert 0 < parts["selector_share"] < 1
    assert result["budget"]["visual_token_num"] == 18


def test_prefill_with_further_settings(capsys):
    text = "tower_layer_list=[1],tower_token_list=[0.9]"
    result = bench(capsys, "prefill", "--batch", "1", "--text_tokens", "5", "--no_published", "--apet", text)
    (figures,) = result["batches"]
    assert list(figures["calls"]) == ["none", "random", "apet", f"apet, {text}"]
    parts = figures["components"][f"apet, {text}"]
    assert {"tower", "selector, after tower layer 1", "selector, vision"} <= set(parts)
    assert not any("tower layer" in part for part in figures["components"]["apet"])
    assert figures["calls"][f"apet, {text}"]["predicted_ms"] < figures["calls"]["apet"]["predicted_ms"]


def test_generate(capsys):
    result = bench(capsys, "generate", "--batch", "2", "--new_tokens", "1,3", "--text_tokens", "5", "--no_published")
    (figures,) = result["batches"]
    assert [one["new_tokens"] for one in figures["calls"]] == [1, 3]
    assert set(figures["calls"][0]) == {"new_tokens", "none", "random", "apet"}
    assert [one["title"].split(",")[0] for one in result["tables"]] == ["whole answers", "decoding"]


def test_generate_compiled(capsys, monkeypatch):
    def traced():
        config = CompileConfig(backend="eager", mode=None, fullgraph=True, dynamic=False)
        config._compile_all_devices = True
        return config

    monkeypatch.setattr(apet, "compile_config", traced)
    torch._dynamo.utils.counters.clear()
    result = bench(capsys, "generate", "--batch", "1", "--new_tokens", "3", "--text_tokens", "5", "--compile")
    assert set(result["batches"][0]["calls"][0]) == {"new_tokens", "none", "random", "apet", "as published"}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert "compiled" in result["tables"][0]["title"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prefill", "--preset", "llava-7b"], "unknown --preset 'llava-7b'"),
        (["prefill", "--preset", "tiny", "--device", "cpu", "--batch", "0"], "--batch '0'"),
        (["prefill", "--preset", "tiny", "--device", "cpu", "--cuda_graphs"], "needs --device cuda"),
        (["generate", "--preset", "tiny", "--device", "cpu", "--new_tokens", "x"], "--new_tokens 'x'"),
        (["generate", "--preset", "tiny", "--device", "cpu", "--methods", "apt"], "Did you mean"),
    ],
)
def test_what_cannot_be_is_one_line(words, message, capsys):
    assert program.main(words) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_dinov2_tower_is_measured_too():
    preset = get_preset("dinov2-smollm2").shrunk()
    words = ["--device", "cpu", "--repeats", "1", "--warmup", "1", "--no_published", "--tflops", "1", "--gbytes", "1"]
    args = program.parser("prefill").parse_args(words)
    figures = prefill.measure(preset, preset.build(CPU, torch.float32), args)["batches"][0]
    assert list(figures["calls"]) == ["none", "random", "apet"]
    assert figures["calls"]["apet"]["predicted_ms"] < figures["calls"]["none"]["predicted_ms"]


def test_all_variants_generate_as_many_tokens():
    preset = get_preset("tiny")
    model = preset.build(CPU, torch.float32)
    inputs = preset.inputs(2, 6, CPU, torch.float32)
    for variant in make_variants(model, preset, ["apet"], None, True).values():
        with variant.active():
            tokens = variant.generate(inputs, 3)
            assert torch.equal(variant.prefill(inputs), tokens[:, -3:-2])


def test_a_prefill_from_embeddings_gives_the_same_token():
    preset = get_preset("tiny")
    model = preset.build(CPU, torch.float32)
    inputs = preset.inputs(3, 6, CPU, torch.float32)
    for variant in make_variants(model, preset, ["apet"], None, False).values():
        with variant.active():
            assert torch.equal(variant.embedded_prefill(inputs)(), variant.prefill(inputs))
    other = get_preset("qwen2.5-vl-7b").shrunk()
    (none, *_) = make_variants(other.build(CPU, torch.float32), other, [], None, False).values()
    with pytest.raises(ValueError, match="llava only, not for qwen2_5_vl"):
        none.embedded_prefill({})


def test_out_of_memory_is_recorded_and_the_rest_goes_on():
    preset = get_preset("tiny")
    variants = make_variants(preset.build(CPU, torch.float32), preset, ["apet"], None, False)

    def run(variant):
        if variant.name == "none":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    fine, failed = runnable(variants, run)
    assert [variant.name for variant in fine] == ["random", "apet"]
    assert failed == {"none": "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB."}
    compared = Comparison.of({"random": [2.0], "apet": [4.0]}, "apet", 8)
    assert (compared.samples_per_second, compared.speedup, compared.of_random) == (2000, None, None)


def hooks(model) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_components_add_up_and_leave_nothing_behind():
    preset = get_preset("tiny")
    model = preset.build(CPU, torch.float32)
    inputs = preset.inputs(1, 6, CPU, torch.float32)
    original = Selector.__call__
    with torch.inference_mode():
        before = model(**inputs).logits
        attached = hooks(model)  # transformers keeps some of its own
        with apet.patched(model, preset.compression("apet")), marked(model, CPU, (2,)) as marks:
            model(**inputs)
        spent = marks.milliseconds()
        assert torch.equal(model(**inputs).logits, before)
    assert Selector.__call__ is original
    assert spent[TOTAL] == pytest.approx(sum(value for part, value in spent.items() if part != TOTAL))
    assert spent[REST] > 0
    assert hooks(model) == attached


def test_layer_groups():
    assert layer_groups(4, (1, 3)) == {0: "layers 1-1", 1: "layers 2-3", 2: "layers 2-3", 3: "layers 4-4"}
    assert set(layer_groups(4, ()).values()) == {"layers 1-4"}


def test_cost_predicts_for_given_and_for_measured_ceilings(capsys):
    words = ["cost", "--preset", "llava-1.5-7b", "--device", "cpu", "--dtype", "bfloat16", "--batch", "1,16"]
    assert program.main([*words, "--tflops", "600", "--gbytes", "4000"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ceilings"] == {"flops": 6e14, "bandwidth": 4e12}
    none, compressed = result["predictions"][2:]
    assert none["kv_bytes"] == 16 * 640 * 2**19
    assert compressed["speedup"]["ttft_ms"] == none["ttft_ms"] / compressed["ttft_ms"] > 3
    assert bench(capsys, "cost", "--batch", "1")["ceilings"]["flops"] > 0
    assert program.main([*words, "--tflops", "0"]) == 1
    assert "--tflops 0.0 must be above 0" in capsys.readouterr().err
