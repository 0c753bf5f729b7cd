"""Every family that is compressed behind its projector: the independent reference, and behaviour around the numbers."""

import functools
import json

import pytest
import torch
from families import FAMILIES, SUPPRESSED, VideoLlava
from family_reference import FamilyReference

import apet
from apet import ApetConfig
from apet.adapters import host
from apet.config import StagePreset

STEPS = 5
VISION = {"image_token_ratio": 0.5, "basis_token_num": 2}
LAYER = {"layer_list": [2], "image_token_ratio_list": [0.6], "basis_token_num": 2}
STAGES = {"none": {"basis_token_num": 2}, "vision": VISION, "layer": LAYER, "both": VISION | LAYER}
ATTENTION = ("sdpa", "eager")


@functools.cache
def model_of(name: str, attention: str = "sdpa"):
    return FAMILIES[name].build(attention)


@functools.cache
def expected(name: str, index: int, fields: str):
    """What the reference says about a prompt."""
    config = ApetConfig.from_dict(json.loads(fields))
    return FamilyReference(FAMILIES[name], model_of(name), config).generate(FAMILIES[name].prompts[index], STEPS)


def generate(model, inputs, **options):
    return model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, suppress_tokens=SUPPRESSED, return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip


def check(name: str, attention: str, which: list[int], fields: dict, **options) -> None:
    model, family = model_of(name, attention), FAMILIES[name]
    with apet.patched(model, ApetConfig.from_dict(fields)):
        out = generate(model, family.inputs([family.prompts[index] for index in which]), **options)
    for row, index in enumerate(which):
        tokens, logits = expected(name, index, json.dumps(fields, sort_keys=True))
        assert out.sequences[row, -STEPS:].tolist() == tokens, f"prompt {index}"
        found = torch.stack(out.logits, 1)[row].double()
        torch.testing.assert_close(found, logits, atol=3e-4, rtol=0)


def everything(name: str) -> list[int]:
    return list(range(len(FAMILIES[name].prompts)))


@pytest.mark.host
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_reference(name, stages, attention):
    check(name, attention, [0], STAGES[stages])
    check(name, attention, everything(name), STAGES[stages])


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("positions", ["compact", "keep"])
@pytest.mark.parametrize("stages", ["vision", "layer", "both"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_cache_kind_equals_the_reference(name, stages, positions, options):
    fields = STAGES[stages] | {"position_mode": positions}
    check(name, "sdpa", [0], fields, **options)
    check(name, "sdpa", everything(name), fields, **options)


@pytest.mark.parametrize(
    "fields",
    [
        STAGES["both"] | {"position_mode": "compact"},
        STAGES["both"] | {"position_mode": "keep"},
        STAGES["both"] | {"budget_per": "prompt"},
        STAGES["both"] | {"budget_per": "image"},
        {"visual_token_num": 7, "layer_list": [2, 3], "image_token_list": [5, 3], "basis_token_num": 2},
        {"visual_token_num": 13, "layer_list": [2], "image_token_list": [10], "basis_token_num": 2}
        | {"position_mode": "compact"},
    ],
    ids=["compact", "keep", "prompt", "image", "counts", "some whole"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_options_equal_the_reference(name, fields):
    if fields.get("budget_per") == "prompt" and FAMILIES[name].per_frame:
        fields = fields | {"video_budget_per": "clip"}
    check(name, "sdpa", everything(name), fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"video_budget_per": "frame", "video_token_num": 4},
        {"video_budget_per": "clip", "video_token_num": 9},
        {"video_budget_per": "clip", "video_token_num": 9} | LAYER,
    ],
    ids=["frame", "clip", "clip and layer"],
)
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.has_video])
def test_video_budgets_equal_the_reference(name, fields):
    check(name, "eager", everything(name), {"basis_token_num": 2} | fields)


@pytest.mark.parametrize("name", FAMILIES)
class TestBehaviour:
    @pytest.mark.host
    def test_keeping_everything_and_removing_are_bit_identical(self, name):
        model, family = model_of(name), FAMILIES[name]
        before = set(vars(model.model))
        inputs = family.inputs(family.prompts)
        untouched = generate(model, inputs)
        whole = {"visual_token_num": 2000, "layer_list": [2], "image_token_list": [2000]}
        for fields in (whole, {}, {"image_token_ratio": 1.0}):
            with apet.patched(model, ApetConfig.from_dict(fields)):
                assert all(map(torch.equal, generate(model, inputs).logits, untouched.logits))
        assert set(vars(model.model)) == before
        assert all(map(torch.equal, generate(model, inputs).logits, untouched.logits))

    def test_counts(self, name):
        model, family = model_of(name), FAMILIES[name]
        with apet.patched(model, ApetConfig.from_dict(STAGES["both"] | {"budget_per": "image"})):
            generate(model, family.inputs(family.prompts))
            result = apet.last_result(model)
        for sample, parts in enumerate(family.prompts):
            pictures = [part for part in parts if not isinstance(part, int)]
            assert result.tokens_in[sample] == tuple(sum(family.runs(part)) for part in pictures)
            for index, part in enumerate(pictures):
                following = [follows for *_, follows in family.roles(part)]
                plain = following.count(False)
                vision, layer = (stage.tokens_out[sample][index] for stage in result.stages)
                if not any(following):
                    assert vision == max(1, int(0.5 * plain)) and layer == max(1, int(0.6 * vision))
                assert len(result.origin()[sample][index]) == layer >= 1
                assert result.stages[1].tokens_in[sample][index] == vision

    def test_one_token_at_least(self, name):
        model, family = model_of(name), FAMILIES[name]
        with apet.patched(model, ApetConfig(image_token_ratio=0.001, layer_list=[2], image_token_ratio_list=[0.001])):
            out = generate(model, family.inputs(family.prompts))
            kept = [count for sample in apet.last_result(model).stages[1].tokens_out for count in sample]
        assert min(kept) >= 1 and all(step.isfinite().all() for step in out.logits)

    def test_two_interleaved_generations_do_not_mix(self, name):
        model, family = model_of(name), FAMILIES[name]
        with apet.patched(model, ApetConfig.from_dict(STAGES["both"])):
            single = [family.inputs([parts]) for parts in family.prompts[:2]]
            wanted = [generate(model, inputs).sequences[0, -STEPS:].tolist() for inputs in single]
            running = []
            for inputs in single:
                width = inputs["input_ids"].shape[1]
                delta = 0
                if family.mrope:
                    grids = {key: value for key, value in inputs.items() if "grid" in key}
                    found, delta = model.model.get_rope_index(
                        inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], **grids
                    )
                    delta = int(delta)
                running.append((model(**inputs, use_cache=True), [], width + delta))
            for step in range(STEPS):
                for index, (out, tokens, start) in enumerate(running):
                    logits = out.logits[0, -1].clone()
                    logits[SUPPRESSED] = -torch.inf
                    tokens.append(int(logits.argmax()))
                    place = torch.tensor([[start + step]])
                    out = model(
                        input_ids=torch.tensor([tokens[-1:]]), **host.with_cache(host.cache_of(out)), use_cache=True,
                        position_ids=place.expand(3, 1, 1) if family.mrope else place,
                    )  # fmt: skip
                    running[index] = (out, tokens, start)
        assert [tokens for _, tokens, _ in running] == wanted

    def test_beams_do_not_depend_on_the_cache(self, name):
        model, family = model_of(name), FAMILIES[name]
        with apet.patched(model, ApetConfig.from_dict(STAGES["both"])):
            inputs = family.inputs([family.prompts[index] for index in family.beams])
            options = {"num_beams": 3, "num_return_sequences": 2}
            cached = generate(model, inputs, **options)
            again = generate(model, inputs, use_cache=False, **options)
        assert torch.equal(cached.sequences, again.sequences)

    def test_half_precision_runs_and_is_finite(self, name):
        model, family = FAMILIES[name].build("sdpa").bfloat16(), FAMILIES[name]
        inputs = family.inputs(family.prompts)
        inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
        untouched = generate(model, inputs)
        with apet.patched(model, ApetConfig(visual_token_num=2000, layer_list=[2], image_token_list=[2000])):
            assert all(map(torch.equal, generate(model, inputs).logits, untouched.logits))
        with apet.patched(model, ApetConfig.from_dict(STAGES["both"])):
            assert all(step.isfinite().all() for step in generate(model, inputs).logits)

    def test_pooled_budgets_may_leave_a_picture_without_tokens(self, name):
        model, family = model_of(name), FAMILIES[name]
        config = ApetConfig(visual_token_num=3, layer_list=[2], image_token_list=[1], budget_per="prompt")
        with apet.patched(model, config):
            out = generate(model, family.inputs(family.prompts))
            result = apet.last_result(model)
        assert all(step.isfinite().all() for step in out.logits)
        for sample, parts in enumerate(family.prompts):
            pictures = sum(not isinstance(part, int) for part in parts)
            assert len(result.origin()[sample]) == len(result.stages[1].tokens_in[sample]) == pictures
            assert sum(result.stages[1].tokens_out[sample]) >= bool(pictures)

    def test_prompt_lookup_equals_plain_decoding(self, name):
        model, family = model_of(name), FAMILIES[name]
        with apet.patched(model, ApetConfig.from_dict(STAGES["both"])):
            inputs = family.inputs(family.prompts[:1])
            guessed = generate(model, inputs, prompt_lookup_num_tokens=3)
            assert torch.equal(generate(model, inputs).sequences, guessed.sequences)

    def test_continuing_a_shortened_prompt_is_refused(self, name):
        model, family = model_of(name), FAMILIES[name]
        inputs = family.inputs(family.prompts[:1])
        with apet.patched(model, ApetConfig.from_dict(VISION)):
            first = generate(model, inputs)
            ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13]])], 1)
            with pytest.raises(ValueError, match="compressed prompt"):
                model.generate(input_ids=ids, **host.with_cache(host.cache_of(first)), max_new_tokens=3)
            with pytest.raises(ValueError, match="already holds one"):
                model(**inputs | {"attention_mask": None}, **host.with_cache(host.cache_of(first)))

    def test_decoder_stages_alone_continue_right(self, name):
        model, family = model_of(name), FAMILIES[name]
        inputs = family.inputs(family.prompts[:1])
        with apet.patched(model, ApetConfig.from_dict(LAYER)):
            first = generate(model, inputs)
            ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13]])], 1)
            mask = torch.ones_like(ids)
            again = generate(model, {"input_ids": ids, "attention_mask": mask, **host.with_cache(host.cache_of(first))})
            longer = inputs | {"input_ids": ids, "attention_mask": mask}
            if family.mrope:
                types = inputs["mm_token_type_ids"]
                longer["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, ids.shape[1] - types.shape[1]))
            assert torch.equal(again.sequences, generate(model, longer).sequences)

    def test_random_selection_keeps_the_budget(self, name):
        model, family = model_of(name), FAMILIES[name]
        config = ApetConfig(
            visual_token_num=5, layer_list=[2], image_token_list=[3], method="random", budget_per="image"
        )
        with apet.patched(model, config):
            generate(model, family.inputs(family.prompts))
            result = apet.last_result(model)
        for sample, parts in enumerate(family.prompts):
            for index, part in enumerate(part for part in parts if not isinstance(part, int)):
                if not any(follows for *_, follows in family.roles(part)):
                    assert len(result.origin()[sample][index]) == 3

    def test_pictures_that_were_not_encoded_are_refused(self, name):
        model, family = FAMILIES[name].build("sdpa"), FAMILIES[name]
        inputs = family.inputs(family.prompts[:1])
        with apet.patched(model, ApetConfig.from_dict(VISION)), pytest.raises(ValueError, match="did not encode"):
            model(input_ids=inputs["input_ids"])

    def test_the_preset_runs_after_the_middle_layer(self, name):
        model, family = model_of(name), FAMILIES[name]
        config = apet.preset_config(model)
        assert config.layer_list in ((), (2,))
        with apet.patched(model, config):
            assert all(step.isfinite().all() for step in generate(model, family.inputs(family.prompts)).logits)


def test_frames_of_video_llava_are_class_token_kept_tokens_and_basis():
    """33 rows a frame, in the published order, with the published budgets."""
    family = VideoLlava()
    family.side, family.frames = 224, 2
    model = family.build("sdpa")
    inputs = family.inputs([[3, ("video", 0), 4]])
    features = model.model.get_video_features(inputs["pixel_values_videos"], return_dict=True).pooler_output
    expected = apet.compress(features[:, 1:], 22, basis=10, insertion="append").indices + 1
    config = apet.preset_config(model)
    assert (config.video_token_num, config.basis_token_num, config.visual_token_num) == (22, 10, None)
    with apet.patched(model, config):
        model(**inputs)
        result = apet.last_result(model)
    (kept,) = result.stages[0].kept[0]
    assert result.tokens_in == ((514,),) and kept.shape == (66,)
    for frame, rows in enumerate(kept.view(2, 33) - 257 * torch.arange(2)[:, None]):
        assert rows[0] == 0 and torch.equal(rows[1:], expected[frame])


def test_a_frame_never_grows():
    """Where kept tokens and appended basis would be more than there were, the frame stays as it is."""
    family, model = FAMILIES["video_llava"], model_of("video_llava")
    inputs = family.inputs(family.prompts[:1])
    untouched = generate(model, inputs)
    with apet.patched(model, ApetConfig(video_token_num=12, basis_token_num=5)):
        assert all(map(torch.equal, generate(model, inputs).logits, untouched.logits))


def test_pooled_budgets_are_shared_and_reported_per_picture():
    family, model = FAMILIES["qwen2_5_vl"], model_of("qwen2_5_vl")
    with apet.patched(model, ApetConfig.from_dict(STAGES["both"] | {"budget_per": "prompt"})):
        generate(model, family.inputs(family.prompts))
        result = apet.last_result(model)
    assert [sum(sample) for sample in result.stages[0].tokens_out] == [10, 12, 0, 12, 19]
    assert [sum(sample) for sample in result.stages[1].tokens_out] == [6, 7, 0, 7, 11]
    assert [len(sample) for sample in result.origin()] == [1, 2, 0, 1, 2]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_qwen_presets_are_the_published_ones(name):
    preset = apet.adapters.adapter_for(model_of(name)).preset
    assert preset.llm == StagePreset(slots="error", insertion="blend", ridge=0.1)
    assert preset.vision == preset.frame == StagePreset(slots="position", insertion="blend", ridge=1e-5)
    config = apet.preset_config(model_of(name), basis_token_num=4)
    assert (config.image_token_ratio, config.layer_list, config.image_token_ratio_list) == (0.3, (2,), (0.333,))
    assert preset.position_mode == "keep" and config.basis_token_num == 4


def test_stages_among_layers_that_add_features_are_refused():
    model = model_of("qwen3_vl")
    with pytest.raises(ValueError, match=r"after layer 1, but the first layers .* choose layers 2\.\.3"):
        apet.apply_patch(model, ApetConfig(layer_list=[1], image_token_list=[4]))
    assert apet.active_config(model) is None
    assert apet.preset_config(model).layer_list == (2,)


class TestRefused:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"budget_per": "prompt", "video_token_num": 4}, "pools videos"),
            ({"budget_per": "prompt", "visual_token_num": [4, 4]}, "not a list"),
            ({"video_budget_per": "second"}, "choose auto, frame, clip"),
            ({"video_token_num": 0}, "at least 1 token"),
        ],
    )
    def test_by_the_configuration(self, fields, message):
        with pytest.raises(ValueError, match=message):
            ApetConfig.from_dict(fields)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"visual_token_num": 9, "budget_per": "prompt"}, "not possible for llava"),
            ({"visual_token_num": 9, "video_token_num": 4}, "takes no videos"),
            ({"visual_token_num": 9, "video_budget_per": "clip"}, "takes no videos"),
        ],
    )
    def test_by_llava(self, llava_sdpa, fields, message):
        with pytest.raises(ValueError, match=message):
            apet.apply_patch(llava_sdpa, ApetConfig.from_dict(fields))
        assert apet.active_config(llava_sdpa) is None

    def test_published_accounting_of_crops(self):
        model = model_of("qwen2_vl")
        with pytest.raises(ValueError, match="anyres"):
            apet.apply_patch(model, ApetConfig(visual_token_num=4, compat="published"))
        assert apet.active_config(model) is None
