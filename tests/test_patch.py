"""Behaviour of apply_patch, remove_patch, patched and last_result around the numbers."""

import copy

import pytest
import torch
from tiny import IMAGE_ID, MIXED_ROWS, PATCHES, batch, images, left_pad, prompt, tiny_llava

import apet
from apet import ApetConfig
from apet.adapters import host

pytestmark = pytest.mark.host

BOTH = ApetConfig(visual_token_num=12, layer_list=[2], image_token_list=[5], basis_token_num=3)
ALL = ApetConfig(visual_token_num=PATCHES, layer_list=[1, 2], image_token_list=[PATCHES, PATCHES], basis_token_num=3)


def generate(model, inputs, steps: int = 6, **options):
    return model.generate(
        **inputs, max_new_tokens=steps, do_sample=options.pop("do_sample", False), suppress_tokens=[IMAGE_ID],
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


def same(first, second) -> bool:
    """Bit-identical tokens and logits."""
    logits = zip(first.logits, second.logits, strict=True)
    return torch.equal(first.sequences, second.sequences) and all(torch.equal(a, b) for a, b in logits)


def test_keeping_everything_and_removing_are_bit_identical(llava):
    inputs = batch(MIXED_ROWS)
    untouched = generate(llava, inputs)
    with apet.patched(llava, ALL):
        assert same(generate(llava, inputs), untouched)
    with apet.patched(llava, BOTH):
        assert not same(generate(llava, inputs), untouched)
    assert same(generate(llava, inputs), untouched)


def test_removal_leaves_no_trace():
    model = tiny_llava()
    before = {name: list(module._forward_pre_hooks) for name, module in model.named_modules()}
    generation = copy.deepcopy(model.generation_config.to_dict())
    apet.apply_patch(model, BOTH)
    apet.apply_patch(model, ALL)
    assert apet.remove_patch(model) is model
    assert {name: list(module._forward_pre_hooks) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks for module in model.modules())
    assert model.generation_config.to_dict() == generation
    assert not hasattr(model, "_apet_patch")
    apet.remove_patch(model)


def test_applying_twice_equals_applying_once(llava_sdpa):
    inputs = batch(MIXED_ROWS)
    with apet.patched(llava_sdpa, BOTH):
        once = generate(llava_sdpa, inputs)
        apet.apply_patch(llava_sdpa, BOTH)
        assert same(generate(llava_sdpa, inputs), once)


def test_the_with_block_restores_the_previous_patch_even_after_an_error(llava_sdpa):
    with apet.patched(llava_sdpa, ALL):
        with pytest.raises(RuntimeError, match="stop"), apet.patched(llava_sdpa, BOTH):
            raise RuntimeError("stop")
        assert apet.active_config(llava_sdpa) == ALL
    assert apet.active_config(llava_sdpa) is None


def test_a_batch_gives_what_its_rows_give_alone(llava):
    with apet.patched(llava, BOTH):
        together = generate(llava, batch(MIXED_ROWS))
        for index, row in enumerate(MIXED_ROWS):
            alone = generate(llava, batch([row]))
            assert alone.sequences[0, -6:].tolist() == together.sequences[index, -6:].tolist()
            for one, many in zip(alone.logits, together.logits, strict=True):
                torch.testing.assert_close(one[0], many[index], atol=1e-4, rtol=0)


def test_beams_do_not_depend_on_the_cache(llava):
    with apet.patched(llava, BOTH):
        options = {"num_beams": 3, "num_return_sequences": 2, "steps": 5}
        # transformers 5.17 itself hands the images of a row with several images to the wrong beams.
        rows = [MIXED_ROWS[0], MIXED_ROWS[3], MIXED_ROWS[1]]
        cached = generate(llava, batch(rows), **options)
        again = generate(llava, batch(rows), use_cache=False, **options)
        assert torch.equal(cached.sequences, again.sequences)
        alone = generate(llava, batch(rows[2:]), **options)
        assert torch.equal(alone.sequences[:, -5:], cached.sequences[4:, -5:])


def test_beam_keep_positions_map_every_beam_to_its_image(llava_sdpa):
    config = ApetConfig(visual_token_num=9, basis_token_num=3, position_mode="keep")
    with apet.patched(llava_sdpa, config):
        beams = generate(llava_sdpa, batch(MIXED_ROWS[:2]), num_beams=3, steps=5)
        for index in range(2):
            alone = generate(llava_sdpa, batch(MIXED_ROWS[index : index + 1]), num_beams=3, steps=5)
            assert torch.equal(alone.sequences[0, -5:], beams.sequences[index, -5:])


def test_prompt_lookup_equals_plain_decoding(llava_sdpa):
    with apet.patched(llava_sdpa, BOTH):
        plain = generate(llava_sdpa, batch(MIXED_ROWS[:1]), steps=12)
        guessed = generate(llava_sdpa, batch(MIXED_ROWS[:1]), steps=12, prompt_lookup_num_tokens=3)
        assert torch.equal(plain.sequences, guessed.sequences)


def test_hidden_states_shorten_along_the_layers(llava):
    ids, _ = MIXED_ROWS[0]
    with apet.patched(llava, BOTH):
        out = llava(**batch(MIXED_ROWS[:1]), output_hidden_states=True)
    text = len(ids) - PATCHES
    assert [state.shape[1] for state in out.hidden_states[:2]] == [text + 12] * 2
    assert out.logits.shape[1] == text + 5


@pytest.mark.parametrize("positions", ["compact", "keep"])
@pytest.mark.parametrize("given", ["mask", "nothing"])
def test_a_manual_loop_equals_generate(llava, positions, given):
    config = ApetConfig.from_dict(BOTH.to_dict() | {"position_mode": positions})
    inputs = batch(MIXED_ROWS[:1])
    with apet.patched(llava, config):
        expected = generate(llava, inputs).sequences[0, -6:].tolist()
        out = llava(**inputs, use_cache=True)
        mask, tokens = inputs["attention_mask"], []
        for _ in range(6):
            tokens.append(int(out.logits[0, -1].argmax()))
            mask = torch.cat([mask, mask[:, :1]], 1)
            step = {"input_ids": torch.tensor([tokens[-1:]]), **host.with_cache(host.cache_of(out))}
            # transformers derives positions from the mask's length if it gets one, so positions go along with it.
            if given == "mask":
                step |= {"attention_mask": mask, "position_ids": torch.tensor([[mask.shape[1] - 1]])}
            out = llava(**step)
    assert tokens == expected


def test_two_interleaved_generations_do_not_mix(llava):
    with apet.patched(llava, BOTH):
        expected = [generate(llava, batch([row])).sequences[0, -6:].tolist() for row in MIXED_ROWS[:3]]
        running = [(llava(**batch([row]), use_cache=True), []) for row in MIXED_ROWS[:3]]
        for _ in range(6):
            for index, (out, tokens) in enumerate(running):
                tokens.append(int(out.logits[0, -1].argmax()))
                step = llava(input_ids=torch.tensor([tokens[-1:]]), **host.with_cache(host.cache_of(out)))
                running[index] = (step, tokens)
    assert [tokens for _, tokens in running] == expected


@torch.no_grad()
def test_a_copied_cache_continues_like_its_original(llava_sdpa):
    with apet.patched(llava_sdpa, BOTH):
        out = llava_sdpa(**batch(MIXED_ROWS[:3]), use_cache=True)
        twin = copy.deepcopy(host.cache_of(out))
        step = torch.tensor([[5], [6], [7]])
        first = llava_sdpa(input_ids=step, **host.with_cache(host.cache_of(out))).logits
        assert torch.equal(first, llava_sdpa(input_ids=step, **host.with_cache(twin)).logits)


class TestMultiTurn:
    """Continuing on a returned cache is right, or refused."""

    follow_up = torch.tensor([[11, 12, 13, 14]])

    def turns(self, model, config):
        inputs = batch(MIXED_ROWS[:1])
        first = generate(model, inputs)
        ids = torch.cat([first.sequences, self.follow_up], 1)
        return inputs, first, ids

    def test_llm_stages_alone_continue_right(self, llava_sdpa):
        config = ApetConfig(layer_list=[2], image_token_list=[5], basis_token_num=3)
        with apet.patched(llava_sdpa, config):
            inputs, first, ids = self.turns(llava_sdpa, config)
            mask = torch.ones_like(ids)
            fresh = generate(llava_sdpa, inputs | {"input_ids": ids, "attention_mask": mask})
            again = generate(
                llava_sdpa, {"input_ids": ids, "attention_mask": mask, **host.with_cache(host.cache_of(first))}
            )
        assert torch.equal(again.sequences, fresh.sequences)

    def test_a_shortened_prompt_is_refused(self, llava_sdpa):
        with apet.patched(llava_sdpa, BOTH):
            _, first, ids = self.turns(llava_sdpa, BOTH)
            with pytest.raises(ValueError, match="compressed prompt"):
                generate(llava_sdpa, {"input_ids": ids, **host.with_cache(host.cache_of(first))})

    def test_new_tokens_with_the_full_mask_continue_right(self, llava_sdpa):
        with apet.patched(llava_sdpa, BOTH):
            inputs, first, ids = self.turns(llava_sdpa, BOTH)
            mask = torch.ones_like(ids)
            fresh = generate(llava_sdpa, inputs | {"input_ids": ids, "attention_mask": mask})
            new = ids[:, first.sequences.shape[1] - 1 :]
            again = generate(
                llava_sdpa,
                {"input_ids": new, "attention_mask": mask, **host.with_cache(host.cache_of(first))},
            )
        assert again.sequences[0, -6:].tolist() == fresh.sequences[0, -6:].tolist()

    def test_new_images_are_refused(self, llava_sdpa):
        with apet.patched(llava_sdpa, BOTH):
            inputs, first, _ = self.turns(llava_sdpa, BOTH)
            with pytest.raises(ValueError, match="already holds one"):
                llava_sdpa(**inputs | {"attention_mask": None}, **host.with_cache(host.cache_of(first)))


class TestRefused:
    def test_training(self, llava_sdpa):
        inputs = batch(MIXED_ROWS[:1])
        with apet.patched(llava_sdpa, BOTH):
            with pytest.raises(ValueError, match="labels"):
                llava_sdpa(**inputs, labels=inputs["input_ids"])
            try:
                llava_sdpa.train()
                with pytest.raises(ValueError, match="eval"):
                    llava_sdpa(**inputs)
            finally:
                llava_sdpa.eval()

    def test_user_made_4d_masks(self, llava_sdpa):
        inputs = batch(MIXED_ROWS[:1])
        length = inputs["input_ids"].shape[1]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        with apet.patched(llava_sdpa, BOTH), pytest.raises(ValueError, match="4-D"):
            llava_sdpa(**inputs | {"attention_mask": mask})

    def test_images_without_ids(self, llava_sdpa):
        embeds = torch.zeros(1, 5, 48)
        with apet.patched(llava_sdpa, BOTH), pytest.raises(ValueError, match="inputs_embeds"):
            llava_sdpa(inputs_embeds=embeds)

    def test_chunked_prefill_never_goes_wrong_silently(self, llava_sdpa):
        inputs = batch(MIXED_ROWS[:1])
        with apet.patched(llava_sdpa, BOTH):
            with pytest.raises((ValueError, RuntimeError, TypeError)):
                generate(llava_sdpa, inputs, prefill_chunk_size=10)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"layer_list": [4], "image_token_list": [5]}, r"choose layers 1\.\.3"),
            ({"visual_token_num": 5, "layer_list": [2], "image_token_list": [9]}, "not grow.*keeps 9.*leaves only 5"),
            ({"visual_token_num": 9, "method": "aped"}, "Did you mean 'apet'"),
            ({"visual_token_num": [9, 9, 9]}, "3 budgets"),
            ({"visual_token_num": 9, "fps_start": 40}, "start=40 is not one of the 25 tokens"),
        ],
    )
    def test_settings_the_model_cannot_follow(self, llava_sdpa, fields, message):
        with pytest.raises(ValueError, match=message), apet.patched(llava_sdpa, ApetConfig.from_dict(fields)):
            llava_sdpa(**batch(MIXED_ROWS[:1]))
        assert apet.active_config(llava_sdpa) is None

    def test_other_objects(self):
        with pytest.raises(TypeError, match="llava"):
            apet.apply_patch(torch.nn.Linear(2, 2), BOTH)
        with pytest.raises(TypeError, match="ApetConfig"):
            apet.apply_patch(tiny_llava(), {"visual_token_num": 3})

    def test_sliding_window_text_models(self):
        model = tiny_llava()
        model.config.text_config.layer_types = ["sliding_attention"] * 4
        with pytest.raises(ValueError, match="leave layer_list empty"):
            apet.apply_patch(model, BOTH)
        assert apet.active_config(model) is None


class TestLastResult:
    def test_counts_and_indices(self, llava):
        with apet.patched(llava, BOTH):
            with pytest.raises(RuntimeError, match="not run"):
                apet.last_result(llava)
            generate(llava, batch(MIXED_ROWS))
            result = apet.last_result(llava)
        assert [stage.name for stage in result.stages] == ["vision", "layer 2"]
        per_row = [1, 1, 2, 0, 2]
        for stage, into, left in zip(result.stages, (PATCHES, 12), (12, 5), strict=True):
            assert stage.tokens_in == tuple((into,) * count for count in per_row)
            assert stage.tokens_out == tuple((left,) * count for count in per_row)
            for sample in stage.kept:
                for kept in sample:
                    assert kept.tolist() == sorted(set(kept.tolist())) and kept.max() < into
        assert result.tokens_per_layer == [[12 * n, 12 * n, 5 * n, 5 * n] for n in per_row]
        assert result.layer_averaged_tokens == [8.5 * n for n in per_row]
        first = result.stages[0].kept[2][1]
        assert result.origin()[2][1].tolist() == first[result.stages[1].kept[2][1]].tolist()

    def test_indices_are_those_of_compress(self, llava_sdpa):
        inputs = batch(MIXED_ROWS[:1])
        features = llava_sdpa.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
        expected = apet.compress(features[:, 1:], 12, basis=3)
        with apet.patched(llava_sdpa, BOTH):
            llava_sdpa(**inputs)
            assert apet.last_result(llava_sdpa).stages[0].kept[0][0].tolist() == expected.indices[0].tolist()

    def test_uncompressed_runs_are_counted_too(self, llava_sdpa):
        with apet.patched(llava_sdpa, ApetConfig()):
            llava_sdpa(**batch(MIXED_ROWS))
            assert apet.last_result(llava_sdpa).layer_averaged_tokens == [25, 25, 50, 0, 50]
        with pytest.raises(RuntimeError, match="not patched"):
            apet.last_result(llava_sdpa)


def test_budgets_per_image_equal_the_images_alone(llava):
    rows = [MIXED_ROWS[0], MIXED_ROWS[1], MIXED_ROWS[3]]
    config = ApetConfig(visual_token_num=[12, 6], layer_list=[2], image_token_list=[[5, 4]], basis_token_num=3)
    with apet.patched(llava, config):
        together = generate(llava, batch(rows))
        assert apet.last_result(llava).tokens_per_layer == [[12, 12, 5, 5], [6, 6, 4, 4], [0] * 4]
    for index, (vision, layer) in enumerate([(12, 5), (6, 4)]):
        single = ApetConfig(visual_token_num=vision, layer_list=[2], image_token_list=[layer], basis_token_num=3)
        with apet.patched(llava, single):
            alone = generate(llava, batch([rows[index]]))
        assert alone.sequences[0, -6:].tolist() == together.sequences[index, -6:].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_and_is_finite(dtype):
    model = tiny_llava().to(dtype)
    inputs = batch(MIXED_ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    untouched = generate(model, inputs)
    with apet.patched(model, ALL):
        assert same(generate(model, inputs), untouched)
    with apet.patched(model, BOTH):
        assert all(torch.isfinite(step).all() for step in generate(model, inputs).logits)


def test_random_selection_keeps_the_budget(llava_sdpa):
    config = ApetConfig.from_dict(BOTH.to_dict() | {"method": "random"})
    results = []
    for seed in (0, 0, 1):
        with apet.patched(llava_sdpa, ApetConfig.from_dict(config.to_dict() | {"seed": seed})):
            generate(llava_sdpa, batch(MIXED_ROWS))
            result = apet.last_result(llava_sdpa)
            assert result.layer_averaged_tokens == [8.5, 8.5, 17, 0, 17]
            results.append([kept.tolist() for sample in result.origin() for kept in sample])
    assert results[0] == results[1] != results[2]


def test_right_padded_prompts_are_packed_left(llava_sdpa):
    ids, pixels = prompt(9, (3,), 0), images(1)
    padded = left_pad([ids, ids + [0] * 4])
    padded["attention_mask"] = torch.tensor([[0] * 4 + [1] * len(ids), [1] * len(ids) + [0] * 4])
    with apet.patched(llava_sdpa, BOTH):
        logits = llava_sdpa(**padded, pixel_values=torch.cat([pixels, pixels])).logits
    torch.testing.assert_close(logits[0, -1], logits[1, -1], atol=1e-4, rtol=0)
