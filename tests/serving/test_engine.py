"""Inside a real vLLM, in float32: same tokens kept, same embeddings and answers as the transformers patch."""

import dataclasses
import os

import numpy as np
import pytest
import torch
import transformers
from checkpoints import (
    PROMPT,
    QUESTION,
    picture,
    write_internvl,
    write_llava_next,
    write_llava_onevision,
    write_qwen,
    write_qwen3,
)  # fmt: skip
from engine import ROOT, SMALL, engine, in_model
from families import END, IMAGE, START, VIDEO
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget

import apet
from llava.model.hugging_face import export_checkpoint

PICTURES = {"wide": picture(170, 84, 1), "tall": picture(84, 200, 2), "square": picture(140, 140, 3)}
# Text tokens in front of the first picture, and the pictures.
SHOWN = [
    (4, ["wide"]), (40, ["tall"]), (4, ["tall", "wide"]), (40, ["square", "square"]), (40, ["wide", "tall", "square"]),
    (40, []),
]  # fmt: skip
# Short prompts run in one step and the others in several; whole blocks come back from the prefix cache.
CHUNKED = {"max_num_batched_tokens": 64, "block_size": 32, "limit_mm_per_prompt": {"image": 3}}
MODELS = {
    "qwen": ("Qwen2_5_VL", write_qwen),
    "qwen3": ("Qwen3VL", write_qwen3),
    "next": ("LlavaNext", write_llava_next),
    "llava_onevision": ("LlavaOnevision", write_llava_onevision),
    "internvl": ("InternVL", write_internvl),
}
NEW, SPECIAL = 8, [0, 1, 2, *range(90, 96)]
GREEDY = SamplingParams(
    temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False, allowed_token_ids=list(range(3, 90))
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    sample = export_checkpoint(str(ROOT / "data/sample/model/llava-v1.5-sample"), root / "sample")
    return {"sample": sample} | {name: write(root / name) for name, (_, write) in MODELS.items()}


class Reference:
    """The transformers model of a tiny checkpoint, patched, and prompts for both sides."""

    def __init__(self, folder, settings):
        self.kind = folder.name
        cls = getattr(transformers, f"{MODELS[self.kind][0]}ForConditionalGeneration")
        self.model = cls.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        if settings is not None:
            apet.apply_patch(self.model, apet.ApetConfig.from_dict(settings))

    def ids(self, runs, lead=4, whole=False):
        """Ids of a prompt with these runs of placeholders; only the patch gets marks that the engine adds itself."""
        rows = (PROMPT + [3 + 7 * number % 80 for number in range(lead)])[:lead]
        marked = self.kind.startswith("qwen") or (whole and self.kind == "internvl")
        for number, run in enumerate(runs):
            rows += [7, 9] * (number > 0) + ([START, *run, END] if marked else run)
        return rows + QUESTION

    def pixels(self, names):
        """The model's inputs of some pictures, and how many tokens it makes of each."""
        inputs = dict(self.processor.image_processor([PICTURES[name] for name in names], return_tensors="pt"))
        if self.kind.startswith("qwen"):
            return inputs, (inputs["image_grid_thw"].prod(-1) // 4).tolist()
        if self.kind == "internvl":
            return inputs, (9 * inputs.pop("num_patches")).tolist()
        inputs.pop("batch_num_images", None)  # the engine cuts each of several pictures into tiles, too
        with torch.inference_mode():
            return inputs, [len(one) for one in self.model.model.get_image_features(**inputs).pooler_output]

    def answer(self, names, lead=4):
        """Greedy ids; also the number of tokens of the whole prompt."""
        inputs, counts = self.pixels(names) if names else ({}, [])
        return self._generate(self.ids([[IMAGE] * count for count in counts], lead, True), inputs)

    def answer_video(self, frames):
        """The same for a video, (frames, 3, height, width)."""
        inputs = dict(self.processor.video_processor([frames], return_tensors="pt"))
        if self.kind == "llava_onevision":
            return self._generate(self.ids([[VIDEO] * (4 * len(frames) + 1)]), inputs)
        if self.kind == "internvl":
            # A frame is a tile behind its number, a word that the engine's tokenizer does not know.
            run = [0, START, *[IMAGE] * 9, END] * len(frames)
            return self._generate(self.ids([run]), {"pixel_values": inputs["pixel_values_videos"][0]})
        steps, height, width = inputs["video_grid_thw"][0].tolist()
        run = [VIDEO] * (height * width // 4)
        if self.kind == "qwen3":
            # A time stamp is two words to the engine's tokenizer, and it knows neither.
            return self._generate(self.ids([[0, 0, START, *run, END] * steps]), inputs)
        inputs["second_per_grid_ts"] = torch.tensor([1.0])
        return self._generate(self.ids([run * steps]), inputs)

    def _generate(self, rows, inputs):
        ids = torch.tensor([rows])
        if self.kind.startswith("qwen"):
            inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        output = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
            suppress_tokens=SPECIAL, **inputs,
        )  # fmt: skip
        return output[0, ids.shape[1] :].tolist(), ids.shape[1]


def prompts(reference, shown=SHOWN):
    """What the engine gets."""
    return [
        {
            "prompt_token_ids": reference.ids([[IMAGE]] * len(names), lead),
            "multi_modal_data": {"image": [PICTURES[n] for n in names]},
        }
        if names
        else {"prompt_token_ids": reference.ids([], lead)}
        for lead, names in shown
    ]


# What apet_plus does by itself where the host can, and an engine cannot.
AS_ENGINES_DO = {"size_bias": False, "position_mode": "compact"}
CASES = [
    ("qwen", None), ("qwen", {"image_token_ratio": 0.3}), ("qwen", {"visual_token_num": 5, "method": "divprune"}),
    ("qwen3", {"visual_token_num": 6}), ("llava_onevision", {"image_token_ratio": 0.5}),
    ("internvl", {"visual_token_num": 4}),
    ("next", None), ("next", {"visual_token_num": 16}), ("next", {"visual_token_num": 60, "budget_per": "image"}),
    ("next", {"visual_token_num": 16, "method": "apet_plus", "method_options": AS_ENGINES_DO}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_greedy_answers_equal_those_of_the_transformers_patch(folders, name, settings):
    reference = Reference(folders[name], settings)
    wanted = [reference.answer(names, lead) for lead, names in SHOWN]
    with engine(folders[name], settings, **CHUNKED) as llm:
        alone = [llm.generate(one, GREEDY, use_tqdm=False)[0] for one in prompts(reference)]
        # Once more together: now with embeddings and prefixes from the caches.
        again = llm.generate(prompts(reference), GREEDY, use_tqdm=False)
    for (lead, names), (ids, length), first, second in zip(SHOWN, wanted, alone, again, strict=True):
        assert list(first.outputs[0].token_ids) == ids, (lead, names)
        assert list(second.outputs[0].token_ids) == ids, (lead, names)
        assert (len(first.prompt_token_ids) < length) == (settings is not None and len(names) > 0)
    lengths = [len(one.prompt_token_ids) for one in alone]
    assert min(lengths) < CHUNKED["max_num_batched_tokens"] < max(lengths)
    assert all(two.num_cached_tokens for two in again if len(two.prompt_token_ids) > 2 * CHUNKED["block_size"])


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core for each of two workers")
def test_two_workers_that_share_every_layer_answer_the_same(folders, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, sorted(os.sched_getaffinity(0))[:2])))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    settings = {"visual_token_num": 16}
    reference = Reference(folders["next"], settings)
    with engine(folders["next"], settings, limit_mm_per_prompt={"image": 2}, tensor_parallel_size=2) as llm:
        shown = SHOWN[:4]
        outputs = llm.generate(prompts(reference, shown), GREEDY, use_tqdm=False)
    found = [list(one.outputs[0].token_ids) for one in outputs]
    assert found == [reference.answer(names, lead)[0] for lead, names in shown]


VIDEOS = [
    ("qwen", {"visual_token_num": 7}, 7), ("qwen", {"visual_token_num": 2, "video_budget_per": "frame"}, 4),
    ("qwen3", {"visual_token_num": 7}, 7 + 2 * 4), ("llava_onevision", {"visual_token_num": 7}, 7 + 1),
    ("internvl", {"visual_token_num": 4}, 4 * (4 + 3)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "kept"), VIDEOS, ids=str)
def test_answers_about_a_video_equal_those_of_the_transformers_patch(folders, name, settings, kept):
    reference = Reference(folders[name], settings)
    # Two steps in time, wider than long: here transformers and vLLM agree on the text behind the video.
    frames = np.stack([np.asarray(picture(168, 84, seed)) for seed in range(4)])
    meta = {
        "fps": 2.0,
        "duration": 2.0,
        "total_num_frames": 4,
        "frames_indices": [0, 1, 2, 3],
        "do_sample_frames": False,
    }
    wanted, length = reference.answer_video(torch.from_numpy(frames).permute(0, 3, 1, 2))
    with engine(folders[name], settings, limit_mm_per_prompt={"video": 1, "image": 0}) as llm:
        prompt = {"prompt_token_ids": reference.ids([[VIDEO]]), "multi_modal_data": {"video": [(frames, meta)]}}
        (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    marks = 2 * name.startswith("qwen")
    assert len(output.prompt_token_ids) == len(PROMPT) + marks + len(QUESTION) + kept < length
    assert list(output.outputs[0].token_ids) == wanted


def embedded(model, pixels, sizes=None):
    """What the engine's model makes of pixels: kept positions and embeddings, as lists."""
    import contextlib

    import torch

    original, encodings = model._vision_stage.encoding, []

    @contextlib.contextmanager
    def watched(*args):
        with original(*args) as encoding:
            yield encoding
        encodings.append(encoding)

    model._vision_stage.encoding = watched
    try:
        with torch.inference_mode():
            extra = {} if sizes is None else {"image_sizes": torch.tensor(sizes)}
            rows = model.embed_multimodal(pixel_values=torch.tensor(pixels), **extra)
    finally:
        del model._vision_stage.encoding
    kept = [[crop.tolist() for crop in record.kept] for encoding in encodings for record in encoding.records]
    return kept, [one.tolist() for one in rows]


def test_kept_tokens_and_embeddings_of_llava_equal_those_of_the_patch(folders):
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folders["sample"], dtype=torch.float32).eval()
    settings = {"visual_token_num": 64}
    pixels = torch.randn(3, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    with apet.patched(model, apet.ApetConfig.from_dict(settings)), torch.inference_mode():
        encoded = model.model.get_image_features(pixel_values=pixels)
        features, records = encoded.pooler_output, encoded.apet.records
    with engine(folders["sample"], settings) as llm:
        kept, rows = in_model(llm, embedded, pixels=pixels.tolist())
    for full, record, indices, found in zip(features, records, kept, rows, strict=True):
        assert [record.kept[0].tolist()] == indices
        torch.testing.assert_close(torch.tensor(found), full[record.kept[0]], rtol=1e-4, atol=1e-5)


def test_kept_tokens_and_embeddings_of_tiles_equal_those_of_the_patch_and_newlines_stay(folders):
    settings = {"visual_token_num": 4}
    reference = Reference(folders["next"], settings)
    inputs = reference.processor.image_processor([PICTURES["wide"], PICTURES["tall"]], return_tensors="pt")
    model = reference.model
    with torch.inference_mode():
        encoded = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    features, records = encoded.pooler_output, encoded.apet.records
    with engine(folders["next"], settings, limit_mm_per_prompt={"image": 2}) as llm:
        kept, rows = in_model(
            llm, embedded, pixels=inputs["pixel_values"].tolist(), sizes=inputs["image_sizes"].tolist()
        )
    for full, record, indices, found in zip(features, records, kept, rows, strict=True):
        assert [crop.tolist() for crop in record.kept] == indices
        columns = dataclasses.replace(record, all_newlines=True).kept_columns()
        assert len(columns) > len(record.kept_columns())  # some line is empty, its newline stays
        torch.testing.assert_close(torch.tensor(found), full[columns], rtol=1e-4, atol=1e-5)


def watch(model):
    """Let the engine's model note how many pictures every call of its encoder is given."""
    original, model.batches = model.embed_multimodal, []

    def embed(**inputs):
        model.batches.append(len(inputs["pixel_values"]))
        return original(**inputs)

    model.embed_multimodal = embed


def batches(model):
    return model.batches


def test_a_step_encodes_no_more_pictures_than_it_would_without_compression(folders):
    settings = {"visual_token_num": 8}
    prompt = {"prompt_token_ids": [1, 5, 32000, 9], "multi_modal_data": None}
    pictures = [picture(336, 336, seed) for seed in range(7)]
    with engine(folders["sample"], settings, max_num_batched_tokens=2 * 576 + 50) as llm:
        prompt["prompt_token_ids"][2] = llm.llm_engine.model_config.hf_config.image_token_index
        budget = MultiModalBudget(llm.llm_engine.vllm_config, MULTIMODAL_REGISTRY)
        in_model(llm, watch)
        outputs = llm.generate(
            [prompt | {"multi_modal_data": {"image": one}} for one in pictures], GREEDY, use_tqdm=False
        )
        encoded = in_model(llm, batches)
    assert len(outputs) == sum(encoded) == len(pictures) and max(encoded) == 2
    # vLLM measures its memory with as many.
    assert budget.mm_max_items_per_batch == {"image": 2}


BAD = [
    ("sample", {"visual_token_num": 64, "layer_list": [6], "image_token_list": [32]}, "equally many in all"),
    ("sample", {"visual_token_num": 64, "method": "visionzip"}, "visionzip"),
    ("sample", {"tokens": 64}, "unknown ApetConfig field 'tokens'"),
    ("qwen", {"visual_token_num": 64, "position_mode": "compact"}, "knows 'keep'"),
]


@pytest.mark.parametrize(("name", "settings", "says"), BAD, ids=str)
def test_a_bad_configuration_is_refused(folders, name, settings, says):
    arguments = EngineArgs(str(folders[name]), additional_config={"apet": settings}, **SMALL)
    with pytest.raises(ValueError, match=says):
        arguments.create_engine_config()


def test_several_workers_with_the_second_model_runner_are_refused_on_a_cpu(folders, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    options = {"additional_config": {"apet": {"visual_token_num": 64}}, "tensor_parallel_size": 2}
    with pytest.raises(ValueError, match="first model runner only; set VLLM_USE_V2_MODEL_RUNNER=0"):
        EngineArgs(str(folders["next"]), **options, **SMALL).create_engine_config()


def test_settings_reach_the_model_and_only_where_they_are_given(folders):
    given, none = (
        EngineArgs(str(folders["sample"]), additional_config=one, **SMALL).create_engine_config()
        for one in ({"apet": {"visual_token_num": 64}}, {})
    )
    assert given.model_config.architecture == "ApetLlava"
    assert none.model_config.architecture == "LlavaForConditionalGeneration"
