"""What an engine's configuration may say, how many tokens follow from it, and what the plugin changes."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_vllm import install
from families import FAMILIES

from apet import ApetConfig
from apet.adapters.vision import ImageLayout, VisionStage, single_crop
from apet.config import FAMILY_PRESETS
from apet.methods import method_names
from apet.serving import plugin
from apet.serving.counts import image_tokens, tiled_image_tokens, video_blocks
from apet.serving.positions import extent, fill_marks, from_channels, grid_positions, prompt_positions, to_channels
from apet.serving.processing import CompressedInfo, KeyedProcessor
from apet.serving.settings import SERVED, cache_key, check_family, image_selector, read_settings, served

LLAVA, NEXT, QWEN = (f"{name}ForConditionalGeneration" for name in ("Llava", "LlavaNext", "Qwen2_5_VL"))


def test_importing_the_package_loads_no_vllm():
    code = (
        "import sys, apet, apet.serving.plugin, apet.serving.settings, apet.serving.processing, apet.serving.counts\n"
        "assert not any(name.partition('.')[0] == 'vllm' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("additional", [None, {}, {"other": 1}, object()])
def test_nothing_is_configured_without_our_key(additional):
    assert read_settings(additional) is None


def test_fields_are_those_of_the_config():
    config = read_settings({"apet": {"visual_token_num": 64, "basis_token_num": 8}})
    assert config == ApetConfig(visual_token_num=64, basis_token_num=8)
    assert read_settings({"apet": {"image_token_ratio": 0.25}}).stage_budgets == (0.25,)


REFUSED = [
    (64, "must be an object"),
    ({}, "nothing to compress"),
    ({"visual_tokens": 64}, "unknown ApetConfig field 'visual_tokens'"),
    ({"visual_token_num": 0}, "at least 1"),
    ({"visual_token_num": "64"}, "at least 1"),
    ({"image_token_ratio": 1.5}, "share in"),
    ({"visual_token_num": 96, "layer_list": [16], "image_token_list": [32]}, "equally many in all"),
    ({"visual_token_num": [64, 32]}, "one number"),
    ({"visual_token_num": 64, "budget_per": "prompt"}, "one by one"),
    ({"visual_token_num": 64, "compat": "published"}, "before"),
    ({"visual_token_num": 64, "tower_layer_list": [8], "tower_token_list": [288]}, "vision towers are its own"),
]


@pytest.mark.parametrize(("fields", "says"), REFUSED)
def test_what_an_engine_cannot_do_is_refused_with_the_reason(fields, says):
    with pytest.raises(ValueError, match=says) as caught:
        read_settings({"apet": fields})
    assert str(caught.value).startswith("additional_config['apet']")


FAMILY_REFUSED = [
    (LLAVA, {"position_mode": "keep"}, "position_mode='keep' is not possible for llava"),
    (QWEN, {"position_mode": "compact"}, "knows 'keep'"),
    (LLAVA, {"method": "apet_plus", "method_options": {"position_mode": "keep"}}, "is not possible for llava"),
    (LLAVA, {"video_token_num": 8}, "takes no videos"),
    (QWEN, {"budget_per": "image"}, "several crops"),
    (LLAVA, {"method": "nothing"}, "unknown method"),
    (LLAVA, {"method": "none"}, "no vision stage"),
    (LLAVA, {"method": "fastv"}, "no vision stage"),
    (LLAVA, {"method": "visionzip"}, "attention"),
    (LLAVA, {"method": "apet_plus", "method_options": {"error_target": 0.1}}, "fewer tokens than their budget"),
    (LLAVA, {"size_bias": True}, "attention takes no sizes"),
    (LLAVA, {"method": "apet_plus", "method_options": {"size_bias": True}}, "attention takes no sizes"),
    (NEXT, {"method": "cdpruner"}, "text|relevance"),
]


@pytest.mark.parametrize(("architecture", "fields", "says"), FAMILY_REFUSED)
def test_what_a_family_does_not_know_is_refused_with_the_reason(architecture, fields, says):
    with pytest.raises(ValueError, match=says):
        check_family(ApetConfig(visual_token_num=8, **fields), served(architecture))


def test_every_method_that_needs_nothing_is_accepted_and_no_other():
    accepted = set()
    for name in method_names():
        try:
            select = image_selector(ApetConfig(visual_token_num=8, method=name), served(LLAVA))
        except ValueError:
            continue
        assert not select.needs
        accepted.add(name)
    assert {"apet", "random", "uniform", "divprune", "tome"} <= accepted
    assert not accepted & {"visionzip", "vispruner", "cdpruner", "sparsevlm", "fastv", "none"}


def test_other_models_are_refused_by_name():
    known = ", ".join(row.architecture for row in SERVED)
    with pytest.raises(ValueError, match=f"LlamaForCausalLM; ApET serves {known}"):
        served("LlamaForCausalLM")


def test_cache_keys_tell_settings_apart_and_stay_the_same():
    settings = [
        ApetConfig(visual_token_num=64), ApetConfig(visual_token_num=32), ApetConfig(image_token_ratio=0.5),
        ApetConfig(visual_token_num=64, method="random"), ApetConfig(visual_token_num=64, seed=1),
        ApetConfig(visual_token_num=64, method="apet_plus"),
        ApetConfig(visual_token_num=64, method="apet_plus", method_options={"error_target": 0.1}),
    ]  # fmt: skip
    assert len({cache_key(one) for one in settings}) == len(settings)
    assert cache_key(ApetConfig(visual_token_num=64)) == cache_key(ApetConfig.from_dict(settings[0].to_dict()))


def test_settings_enter_the_keys_of_all_cached_media():
    class Host:
        def __init__(self, settings):
            self.info = type("Info", (CompressedInfo,), {})()
            hf_config = type("Config", (), {"apet_settings": settings.to_dict()})()
            self.info.ctx = type("Context", (), {"get_hf_config": lambda _: hf_config})()

        def _get_mm_hashes(self, inputs):
            return inputs

    processor = type("Processor", (KeyedProcessor, Host), {})
    given = {"image": ["abc", "named-by-the-client"], "video": ["v"]}
    few, many = (processor(ApetConfig(visual_token_num=n))._get_mm_hashes(given) for n in (32, 64))
    for modality, hashes in given.items():
        assert all(one.startswith(old) for one, old in zip(few[modality], hashes, strict=True))
        assert not set(few[modality]) & set(many[modality])


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        ({"visual_token_num": 64}, 64),
        ({"visual_token_num": 600}, 576),
        ({"image_token_ratio": 0.1}, 57),
        ({"image_token_ratio": 0.001}, 1),
    ],
)
def test_tokens_of_an_image_of_one_crop(budget, kept):
    assert image_tokens(ApetConfig(**budget), 576) == kept


def tiled(crops: int, rows: int, lines: list[list[int]]) -> ImageLayout:
    """An overview shown whole and lines of row numbers, each closed by a newline."""
    columns = [*range(rows), *(column for line in lines for column in [*line, -1])]
    return ImageLayout(crops, rows, np.array(columns))


LAYOUTS = {
    "two tiles": tiled(3, 9, [[9, 10, 11, 18, 19, 20], [12, 13, 14, 21, 22, 23], [15, 16, 17, 24, 25, 26]]),
    "padded": tiled(3, 9, [[12, 13, 14, 21, 22, 23]]),
    "overview alone": single_crop(9),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("fields", [
    {"visual_token_num": 2}, {"visual_token_num": 5}, {"visual_token_num": 9}, {"image_token_ratio": 0.5},
    {"visual_token_num": 7, "budget_per": "image"}, {"visual_token_num": 1, "budget_per": "image"},
    {"image_token_ratio": 0.4, "budget_per": "image"},
])  # fmt: skip
def test_tokens_of_a_tiled_image_are_those_the_vision_stage_keeps(layout, fields):
    config = ApetConfig(basis_token_num=2, **fields)
    projector = torch.nn.Linear(6, 4)
    stage = VisionStage(
        projector, config.stage_budgets[0], image_selector(config, served(NEXT)), config.budget_per == "image"
    )
    stage.attach()
    with stage.encoding([layout]) as encoding:
        projector(torch.randn(layout.crops, layout.length, 6, generator=torch.Generator().manual_seed(1)))
    (record,) = encoding.records
    newlines = int((layout.columns == -1).sum())
    shown = [column for column in record.kept_columns() if layout.columns[column] != -1]
    assert tiled_image_tokens(config, layout) == len(shown) + newlines


def test_blocks_of_a_video():
    clip, frame = FAMILY_PRESETS["qwen2_5_vl"], FAMILY_PRESETS["video_llava"]
    assert video_blocks(ApetConfig(visual_token_num=10), clip, 4, 6) == (1, 24, 10)
    assert video_blocks(ApetConfig(visual_token_num=10, video_token_num=3), frame, 4, 6) == (4, 6, 3)
    assert video_blocks(ApetConfig(image_token_ratio=0.5, video_budget_per="frame"), clip, 4, 6) == (4, 6, 3)


@pytest.mark.parametrize("parts", FAMILIES["qwen2_5_vl"].prompts, ids=str)
def test_positions_are_those_of_transformers(parts):
    family = FAMILIES["qwen2_5_vl"]
    model, inputs = family.build("sdpa"), family.inputs([parts])
    grids = {name: inputs.get(f"{name}_grid_thw") for name in ("image", "video")}
    wanted, delta = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], grids["image"], grids["video"]
    )
    spans, extents, pictures = [], [], []
    for start, part in spans_of(family, parts):
        grid = (part[1] if part[0] == "video" else 1, part[-2], part[-1])
        tempo = 2.0 if part[0] == "video" else 1.0
        spans.append((start, grid[0] * grid[1] * grid[2]))
        extents.append(extent(grid, tempo))
        pictures.append(grid_positions(grid, tempo))
    length = inputs["input_ids"].shape[1]
    positions, end = prompt_positions(length, spans, extents)
    for (start, columns), taken in zip(spans, extents, strict=True):
        marks = positions[:, start : start + columns]
        assert (marks == marks[:, :1]).all() and (marks[0] < 0).all() and (marks[0] + marks[1] == taken - 1).all()
    found, behind = fill_marks(positions, positions, 0, pictures)
    assert behind == end
    if any(isinstance(part, tuple) and part[0] == "video" for part in parts):
        # transformers 5.23 lets text go on behind the rows and columns of a video, vLLM behind its time too.
        behind_first = spans[0][0] + spans[0][1]
        assert torch.equal(found[:, :behind_first], wanted[-3:, 0, :behind_first])
        return
    assert torch.equal(found, wanted[-3:, 0])
    assert end - length == delta.item()


def spans_of(family, parts):
    """(first column, part) of every picture of a prompt: BOS first, each picture between two marks."""
    column = 1
    for part in parts:
        if isinstance(part, int):
            column += part
            continue
        yield column + 1, part
        column += 2 + sum(family.runs(part))


def test_text_goes_on_behind_a_video_in_time_or_space():
    assert extent((4, 2, 3), 2.0) == 7 and extent((2, 5, 3), 2.0) == 5 and extent((1, 3, 8), 1.0) == 8
    positions, end = prompt_positions(9, [(2, 4)], [7])
    assert positions[0].tolist() == [0, 1, -3, -3, -3, -3, 9, 10, 11] and end == 12
    assert positions[1].tolist() == [0, 1, 9, 9, 9, 9, 9, 10, 11]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_positions_survive_the_precision_of_the_embeddings(dtype):
    positions = torch.arange(65535).view(-1, 3)
    assert torch.equal(from_channels(to_channels(positions).to(dtype)), positions)


@pytest.fixture
def vllm(monkeypatch):
    registry = install(monkeypatch)
    plugin.register()
    return registry


def engine(architecture=LLAVA, additional_config=None, **multimodal):
    """What vLLM builds from its flags."""
    from vllm.config import VllmConfig

    return VllmConfig(architecture, additional_config, **multimodal)


def test_an_engine_without_settings_keeps_its_model(vllm):
    for architecture in (LLAVA, "LlamaForCausalLM"):
        config = engine(architecture)
        assert config.verified == 1 and config.model_config.hf_config.architectures == [architecture]
        assert config.model_config._architecture == architecture and config.model_config._model_info == "info"
        assert not hasattr(config.model_config.hf_config, "apet_settings")
    assert set(vllm.models) == {row.registered for row in SERVED}


def test_a_draft_model_is_left_alone(vllm):
    config = engine("EagleLlamaForCausalLM", {"apet": {"visual_token_num": 64}}, runner_type="draft")
    assert config.model_config.hf_config.architectures == ["EagleLlamaForCausalLM"]


@pytest.mark.parametrize("row", SERVED, ids=lambda row: row.family)
def test_settings_exchange_the_model(vllm, row):
    config = engine(row.architecture, {"apet": {"visual_token_num": 64}})
    model = config.model_config
    assert model.hf_config.architectures == [row.registered] and model._architecture == row.registered
    assert model._model_info == f"info of {row.registered}" and config.verified == 1
    assert plugin.settings_of(model.hf_config) == ApetConfig(visual_token_num=64)
    assert (model.multimodal_config.video_pruning_rate is None) == (row.position_mode == "compact")
    assert config.ec_manager_config.encoder_cache_manager_cls == "apet.serving.encoder.EncoderBudget"


@pytest.mark.parametrize("options", [{"workers": 2}, {"second_runner": True}], ids=str)
def test_several_workers_or_the_second_model_runner_alone_are_accepted(vllm, options):
    assert engine(NEXT, {"apet": {"visual_token_num": 64}}, **options).model_config.architecture == NEXT


def test_several_workers_with_the_second_model_runner_are_accepted_on_a_gpu(vllm, monkeypatch):
    monkeypatch.setattr("apet.serving.host.on_cpu", lambda: False)
    engine(NEXT, {"apet": {"visual_token_num": 64}}, workers=2, second_runner=True)


def test_registering_twice_wraps_once(vllm):
    from vllm.config import VllmConfig

    before = VllmConfig.try_verify_and_update_config
    plugin.register()
    assert VllmConfig.try_verify_and_update_config is before


@pytest.mark.parametrize(("architecture", "multimodal", "says"), [
    ("LlamaForCausalLM", {}, "the model is a LlamaForCausalLM"),
    (LLAVA, {"encoder": "pixtral"}, "pixtral"),
    (QWEN, {"video_pruning_rate": 0.5}, "--video-pruning-rate 0.5"),
    (LLAVA, {"language_model_only": True}, "without images"),
    (LLAVA, {"manager": "their.Manager"}, "encoder_cache_manager_cls='their.Manager'"),
    (NEXT, {"graphs": True}, "goes around the compression"),
    (NEXT, {"workers": 2, "second_runner": True}, "first model runner only; set VLLM_USE_V2_MODEL_RUNNER=0"),
    (QWEN, {"stages": 2}, "--pipeline-parallel-size 2"),
    (QWEN, {"prompt_embeds": True}, "--enable-prompt-embeds"),
    (LLAVA, {"lora_config": SimpleNamespace(enable_tower_connector_lora=True)}, "adapters of the vision tower"),
])  # fmt: skip
def test_engines_that_do_not_fit_are_refused_and_left_alone(vllm, architecture, multimodal, says):
    with pytest.raises(ValueError, match=says):
        engine(architecture, {"apet": {"visual_token_num": 64}}, **multimodal)
