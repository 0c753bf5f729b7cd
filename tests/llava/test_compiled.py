"""--compile: the answers of every batch are those of a plain run, and few steps are compiled for many batches."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import cut_decoder

import apet
from apet.eval.benchmarks import get_benchmark
from llava.eval.answerer import LlavaAnswerer, LlavaPreparer
from llava.eval.generation import CompiledDecoding, GenerationSettings
from llava.model.builder import load_pretrained_model

MODEL = Path(__file__).parents[1] / "golden" / "end_to_end" / "llava-v1.5-tiny"
BUDGETS = {"visual_token_num": 96, "layer_list": [1], "image_token_list": [32]}


@pytest.fixture(scope="module")
def loaded():
    found = load_pretrained_model(str(MODEL), None, "llava-v1.5-tiny", device="cpu", dtype=torch.float32)
    cut_decoder(found[1], 2)  # a layer in front of the stage and one behind it: tracing is slow
    return found


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """Trace as for compilation, but run the graphs as they are: no C++ compiler, and nothing that cannot be traced."""
    plain = CompiledDecoding.__init__

    def init(self, *args):
        plain(self, *args)
        self._compile.backend, self._compile.mode, self._compile.fullgraph = "eager", None, True

    monkeypatch.setattr(CompiledDecoding, "__init__", init)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def questions(tmp_path, count=7):
    Image.effect_mandelbrot((90, 70), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(tmp_path / "a.png")
    rows = [{"question_id": i, "image": "a.png", "text": f"What is {'very ' * (i % 3)}it, {i}?"} for i in range(count)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = get_benchmark("vqa").read(tmp_path / "q.jsonl")
    # One question is without an image, as in ScienceQA.
    return [replace(one, image=None) if index == 3 else one for index, one in enumerate(asked)]


def answers(loaded, asked, folder, compile, config, batch=3):
    tokenizer, model, processor, _ = loaded
    preparer = LlavaPreparer(tokenizer, processor, model.config, "vicuna_v1")
    generation = GenerationSettings(max_new_tokens=6, compile=compile)
    answerer = LlavaAnswerer(model, preparer, generation, config, "tiny", str(MODEL))
    prepared = [
        preparer.prepare(one, [Image.open(folder / "a.png").convert("RGB")] if one.image else []) for one in asked
    ]
    found = []
    for start in range(0, len(prepared), batch):
        found += answerer.answer(answerer.load(prepared[start : start + batch]))
    return found, answerer


@pytest.mark.parametrize("config", [apet.ApetConfig(**BUDGETS), apet.ApetConfig()], ids=["compressed", "none"])
def test_answers_are_those_of_a_plain_run(loaded, tmp_path, config):
    asked = questions(tmp_path)
    plain, _ = answers(loaded, asked, tmp_path, False, config)
    ours, _ = answers(loaded, asked, tmp_path, True, config)
    assert ours == plain
    compiled = torch._dynamo.utils.counters
    assert compiled["stats"]["unique_graphs"] >= 1
    assert not compiled["graph_break"]


def test_one_compiled_step_serves_prompts_of_other_lengths_and_smaller_batches(loaded, tmp_path):
    asked = [one for one in questions(tmp_path) if one.image][:5]
    ours, answerer = answers(loaded, asked, tmp_path, True, apet.ApetConfig(**BUDGETS), batch=2)
    assert len(ours) == 5
    assert answerer._compiled._rows == 2  # the last batch was filled up
    # One step for batches with padding and one for those without.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_settings_of_runs_without_compilation_are_as_they_were(loaded, tmp_path):
    asked = questions(tmp_path, 1)
    for compile in (False, True):
        _, answerer = answers(loaded, asked, tmp_path, compile, apet.ApetConfig())
        assert answerer.settings()["generation"].get("compile", False) is compile


def test_beams_are_refused():
    with pytest.raises(ValueError, match="--compile does not go with --num_beams 2"):
        GenerationSettings(num_beams=2, compile=True)
