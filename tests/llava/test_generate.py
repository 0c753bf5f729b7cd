"""`generate` as LLaVA scripts call it, and the names third-party tools import, read and replace."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LogitsProcessor, TextStreamer

import apet
from apet.adapters import host
from llava.model.builder import load_pretrained_model
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

TINY = Path(__file__).parents[1] / "golden" / "llava" / "tiny"
PATCHES, VOCAB = 4, 384
ALL = apet.ApetConfig(visual_token_num=PATCHES, layer_list=[1], image_token_list=[PATCHES], basis_token_num=1)
SOME = apet.ApetConfig(visual_token_num=3, layer_list=[1], image_token_list=[2], basis_token_num=1)
# Prompts of different lengths; the second shows no image, the third shows two.
ROWS = [[1, 300, -200, 340, 271, 290], [1, 304, 271], [1, -200, 301, -200, 259, 265, 354, 331, 350, 365, 42]]
GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}


def load(name: str):
    return load_pretrained_model(str(TINY / name), None, name, device="cpu")[:2]


@pytest.fixture(scope="module")
def loaded():
    """Tokenizer and model of the 1.5 checkpoint."""
    return load("llava-v1.5-tiny")


@pytest.fixture
def model(loaded):
    """The 1.5 model; what a test hangs on it is taken off again."""
    names = set(vars(loaded[1]))
    yield loaded[1]
    apet.remove_patch(loaded[1])
    for name in set(vars(loaded[1])) - names:
        delattr(loaded[1], name)


@pytest.fixture(scope="module")
def anyres():
    """The 1.6 model."""
    return load("llava-v1.6-vicuna-tiny")[1]


def pixels(count: int, *crops: int) -> torch.Tensor:
    return torch.randn(count, *crops, 3, 28, 28, generator=torch.Generator().manual_seed(5))


def left_pad(rows) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    return {
        "inputs": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def logits(model, inputs, **options):
    """Generated ids and (steps, B, V) logits."""
    output = model.generate(inputs, return_dict_in_generate=True, output_logits=True, **GREEDY | options)
    return output.sequences, torch.stack(output.logits)


class TestReturnValue:
    def test_only_new_tokens(self, model):
        ids = model.generate(torch.tensor([ROWS[0]]), images=pixels(1), **GREEDY)
        assert ids.shape == (1, 8) and ids.dtype == torch.int64 and int(ids.min()) >= 0 and int(ids.max()) < VOCAB

    def test_the_end_token_ends_and_counts(self, model):
        full = model.generate(torch.tensor([ROWS[0]]), images=pixels(1), **GREEDY)[0].tolist()
        end = full[2]
        ids = model.generate(torch.tensor([ROWS[0]]), images=pixels(1), **GREEDY | {"eos_token_id": end})
        assert ids[0].tolist() == full[: full.index(end) + 1]

    def test_finished_rows_are_padded_behind(self, model):
        batch = left_pad([ROWS[0], ROWS[1]])
        full = model.generate(**batch, images=pixels(2), **GREEDY)
        end = next(token for token in full[0].tolist() if token not in full[1].tolist())
        ids = model.generate(**batch, images=pixels(2), **GREEDY | {"eos_token_id": end})
        place = full[0].tolist().index(end)
        assert ids[0].tolist() == full[0, : place + 1].tolist() + [0] * (7 - place) and torch.equal(ids[1], full[1])

    def test_dictionary(self, model):
        ids, scores = logits(model, torch.tensor([ROWS[0]]), images=pixels(1))
        assert torch.equal(scores[:, 0].argmax(-1), ids[0])

    def test_input_ids_is_another_name(self, model):
        ids = torch.tensor([ROWS[0]])
        assert torch.equal(
            model.generate(input_ids=ids, images=pixels(1), **GREEDY), model.generate(ids, pixels(1), **GREEDY)
        )

    def test_defaults_are_greedy_and_short(self, model):
        ids = torch.tensor([ROWS[0]])
        first = model.generate(ids, images=pixels(1), eos_token_id=None)
        assert first.shape == (1, 20) and torch.equal(first[:, :8], model.generate(ids, images=pixels(1), **GREEDY))


@pytest.mark.parametrize("config", [None, ALL, SOME], ids=["plain", "all", "some"])
@pytest.mark.host
class TestBatches:
    def test_a_batch_is_its_rows_alone(self, model, config):
        if config:
            apet.apply_patch(model, config)
        images = pixels(4)
        ids, scores = logits(model, **left_pad(ROWS), images=images)
        # A row without a placeholder uses up one image.
        for index, (row, own) in enumerate(zip(ROWS, (images[:1], None, images[2:]), strict=True)):
            alone, expected = logits(model, torch.tensor([row]), images=own)
            assert torch.equal(ids[index], alone[0])
            torch.testing.assert_close(scores[:, index], expected[:, 0], atol=1e-4, rtol=0)

    def test_padding_on_the_right_is_the_same(self, model, config):
        if config:
            apet.apply_patch(model, config)
        left = left_pad(ROWS)
        width = left["inputs"].shape[1]
        right = {
            "inputs": torch.tensor([row + [0] * (width - len(row)) for row in ROWS]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ROWS]),
        }
        assert torch.equal(logits(model, **left, images=pixels(4))[1], logits(model, **right, images=pixels(4))[1])

    def test_text_only_batches(self, model, config):
        if config:
            apet.apply_patch(model, config)
        rows = [ROWS[1], [1, 304, 271, 290, 259]]
        ids, _ = logits(model, **left_pad(rows))
        alone = [logits(model, torch.tensor([row]))[0][0] for row in rows]
        assert torch.equal(ids, torch.stack(alone))
        plain = super(LlavaMetaForCausalLM, model).generate(torch.tensor([rows[0]]), **GREEDY)
        assert torch.equal(plain[0, len(rows[0]) :], ids[0])


class TestImages:
    def test_a_list_is_a_tensor(self, model):
        batch, images = left_pad([ROWS[0], ROWS[2]]), pixels(3)
        expected = logits(model, **batch, images=images)[1]
        for same in (list(images), [image[None] for image in images], images[:, None]):
            assert torch.equal(logits(model, **batch, images=same)[1], expected)

    def test_several_crops_follow_each_other(self, model):
        crops = pixels(1, 2)
        flat = torch.tensor([[1, 300, -200, -200, 340]])
        one = torch.tensor([[1, 300, -200, 340]])
        assert torch.equal(logits(model, flat, images=crops[0])[1], logits(model, one, images=crops)[1])

    @pytest.mark.parametrize("config", [None, SOME], ids=["plain", "some"])
    def test_surplus_images_do_not_matter(self, model, config):
        if config:
            apet.apply_patch(model, config)
        ids = torch.tensor([ROWS[0]])
        assert torch.equal(logits(model, ids, images=pixels(3))[0], logits(model, ids, images=pixels(3)[:1])[0])

    def test_images_of_another_dtype(self, model):
        half, ids = pixels(1).bfloat16(), torch.tensor([ROWS[0]])
        assert torch.equal(logits(model, ids, images=half)[1], logits(model, ids, images=half.float())[1])

    def test_positions_of_the_ids_are_not_those_of_the_sequence(self, model):
        ids = torch.tensor([ROWS[0]])
        given = logits(model, ids, images=pixels(1), position_ids=torch.arange(len(ROWS[0]))[None])
        assert torch.equal(given[1], logits(model, ids, images=pixels(1))[1])

    def test_anyres_lists(self, anyres):
        """Pictures of 3 and 5 crops in one batch, and a single crop."""
        wide, square = pixels(1, 3)[0], pixels(2, 5)[1]
        rows, sizes = [ROWS[0], [1, -200, 301, 259]], [(50, 20), (60, 50)]
        _, scores = logits(anyres, **left_pad(rows), images=[wide, square], image_sizes=sizes)
        for index, (row, image) in enumerate(zip(rows, (wide, square), strict=True)):
            alone = logits(anyres, torch.tensor([row]), images=image[None], image_sizes=sizes[index : index + 1])[1]
            torch.testing.assert_close(scores[:, index], alone[:, 0], atol=1e-4, rtol=0)
        single = logits(anyres, torch.tensor([ROWS[0]]), images=[wide[0]], image_sizes=[(20, 20)])
        assert single[1].shape == (8, 1, VOCAB)

    def test_the_newline_is_seen(self, anyres):
        ids, images = torch.tensor([ROWS[0]]), pixels(1, 3)
        before = logits(anyres, ids, images=images, image_sizes=[(50, 20)])[1]
        with torch.no_grad():
            anyres.model.image_newline += 1
        after = logits(anyres, ids, images=images, image_sizes=[(50, 20)])[1]
        with torch.no_grad():
            anyres.model.image_newline -= 1
        assert (after - before).abs().max() > 1e-3


class TestRefusals:
    def test_a_placeholder_without_images(self, model):
        with pytest.raises(ValueError, match="images is None"):
            model.generate(torch.tensor([ROWS[0]]), **GREEDY)

    def test_more_placeholders_than_images(self, model):
        with pytest.raises(IndexError, match="1 images given"):
            model.generate(torch.tensor([ROWS[2]]), images=pixels(1), **GREEDY)

    @pytest.mark.parametrize("value", [None, torch.zeros(1, 3, 32)], ids=["none", "tensor"])
    def test_inputs_embeds(self, model, value):
        with pytest.raises(NotImplementedError, match="inputs_embeds"):
            model.generate(torch.tensor([ROWS[0]]), images=pixels(1), inputs_embeds=value)

    def test_no_ids(self, model):
        with pytest.raises(ValueError, match="needs the ids"):
            model.generate(images=pixels(1))

    def test_anyres_without_sizes(self, anyres):
        with pytest.raises(ValueError, match="image_sizes"):
            anyres.generate(torch.tensor([ROWS[0]]), images=pixels(1, 3), **GREEDY)


class LastIds(LogitsProcessor):
    """Remembers every id that reaches logits processors."""

    def __init__(self):
        self.seen = set()

    def __call__(self, input_ids, scores):
        self.seen.update(input_ids.flatten().tolist())
        return scores


@pytest.mark.host
class TestDecoding:
    @pytest.mark.parametrize("config", [None, SOME], ids=["plain", "some"])
    def test_the_cache_cannot_be_turned_off(self, model, config):
        """Generation forces the cache for prompts given as embeddings; the answer must be the cached one."""
        if config:
            apet.apply_patch(model, config)
        ids = torch.tensor([ROWS[0]])
        cached = logits(model, ids, images=pixels(1))
        assert torch.equal(logits(model, ids, images=pixels(1), use_cache=False)[1], cached[1])

    def test_cached_steps_are_whole_forwards(self, model):
        ids, images = torch.tensor([ROWS[0]]), pixels(1)
        new, scores = logits(model, ids, images=images)
        for step in range(8):
            prompt = model.splice(torch.cat([ids, new[:, :step]], 1), None, None, images, None, padding_side="left")
            with torch.no_grad():
                whole = model(inputs_embeds=prompt.inputs_embeds).logits[0, -1]
            torch.testing.assert_close(scores[step, 0], whole, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("config", [None, ALL, SOME], ids=["plain", "all", "some"])
    def test_beams(self, model, config):
        if config:
            apet.apply_patch(model, config)
        ids = model.generate(**left_pad(ROWS), images=pixels(4), **GREEDY | {"num_beams": 3})
        for index, (row, own) in enumerate(zip(ROWS, (pixels(4)[:1], None, pixels(4)[2:]), strict=True)):
            alone = model.generate(torch.tensor([row]), images=own, **GREEDY | {"num_beams": 3})
            assert torch.equal(ids[index], alone[0])

    def test_beams_find_no_worse_answers(self, model):
        ids = torch.tensor([ROWS[0]])
        options = {"images": pixels(1), "return_dict_in_generate": True, "output_scores": True} | GREEDY
        beams = model.generate(ids, num_beams=4, **options)
        greedy = model.generate(ids, output_logits=True, **options)
        likelihood = torch.stack(greedy.logits)[:, 0].log_softmax(-1).max(-1).values.sum() / 8
        assert float(beams.sequences_scores[0]) >= float(likelihood) - 1e-5

    def test_sampling_follows_the_seed(self, model):
        options = GREEDY | {"images": pixels(1), "do_sample": True, "temperature": 2.0}
        answers = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            answers.append(model.generate(torch.tensor([ROWS[0]]), **options)[0].tolist())
        assert answers[0] == answers[1] != answers[2]

    def test_streamer(self, loaded, model, capsys):
        tokenizer, _ = loaded
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        # Its answer has half characters at the end alone: what becomes of others a streamer cannot know.
        image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
        ids = model.generate(torch.tensor([[1, 300, -200, 340]]), images=image, streamer=streamer, **GREEDY)
        assert capsys.readouterr().out.strip() == tokenizer.decode(ids[0], skip_special_tokens=True).strip()

    def test_repetition_penalty(self, model):
        """Works on the new tokens; no placeholder or stand-in id of the prompt reaches it."""
        spy, ids = LastIds(), torch.tensor([[1, -200, 72, 378, 360, 340]])
        free = model.generate(ids, images=pixels(1), **GREEDY | {"max_new_tokens": 30})[0].tolist()
        penalised = model.generate(
            ids, images=pixels(1), repetition_penalty=1e6, logits_processor=[spy], **GREEDY | {"max_new_tokens": 30}
        )[0].tolist()
        assert len(set(free)) < 30 and penalised[0] == free[0]
        # A huge penalty divides positive logits to nothing: a token comes back only if all others are negative.
        assert len(set(penalised)) == 30 and spy.seen == set(penalised[:-1])

    @pytest.mark.filterwarnings("error")
    def test_repetition_penalty_does_not_see_padding(self, model):
        options = GREEDY | {"repetition_penalty": 5.0, "max_new_tokens": 25}
        rows = [[1, -200, 72, 378, 360, 340], [1, 304, 271]]
        ids = model.generate(**left_pad(rows), images=pixels(2), **options)
        for index, row in enumerate(rows):
            alone = model.generate(torch.tensor([row]), images=pixels(2)[index : index + 1], **options)
            assert torch.equal(ids[index], alone[0]) and len(set(alone[0].tolist())) == 25

    @pytest.mark.filterwarnings("error")
    def test_no_warnings(self, model):
        model.generate(**left_pad(ROWS), images=pixels(4), **GREEDY)


@pytest.mark.host
class TestPatch:
    @pytest.mark.parametrize("batch", [left_pad(ROWS[:1]), left_pad(ROWS)], ids=["one", "mixed"])
    def test_keeping_everything_and_removing_are_bit_identical(self, model, batch):
        images = pixels(4)
        plain = logits(model, **batch, images=images)
        apet.apply_patch(model, ALL)
        kept = logits(model, **batch, images=images)
        apet.apply_patch(model, SOME)
        some = logits(model, **batch, images=images)
        apet.remove_patch(model)
        after = logits(model, **batch, images=images)
        for other in (kept, after):
            assert torch.equal(plain[0], other[0]) and torch.equal(plain[1], other[1])
        assert not torch.equal(plain[1], some[1])

    def test_the_report_knows_rows_and_images(self, model):
        apet.apply_patch(model, SOME)
        model.generate(**left_pad(ROWS), images=pixels(4), **GREEDY)
        result = apet.last_result(model)
        assert result.tokens_in == ((4,), (), (4, 4))
        assert [stage.tokens_out for stage in result.stages] == [((3,), (), (3, 3)), ((2,), (), (2, 2))]
        assert result.layer_averaged_tokens == [2.5, 0, 5]


class TestReplacement:
    """Other tools put functions of their own on the object or on a class; `generate` must call them."""

    @pytest.mark.parametrize("place", ["object", "mix-in", "class"])
    def test_splicing(self, model, monkeypatch, place):
        own, calls = LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal, []

        def replacement(
            self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
        ):
            calls.append(image_sizes)
            result = own(self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes)
            # Without its last visual token, and without a mask, as most of them return it.
            return (*result[:2], None, result[3], torch.cat([result[4][:, :5], result[4][:, 6:]], 1), None)

        target = {"object": model, "mix-in": LlavaMetaForCausalLM, "class": type(model)}[place]
        value = replacement.__get__(model) if place == "object" else replacement
        plain = logits(model, torch.tensor([ROWS[0]]), images=pixels(1))[1]
        monkeypatch.setattr(target, "prepare_inputs_labels_for_multimodal", value, raising=False)
        shorter = model.generate(
            torch.tensor([ROWS[0]]), images=pixels(1), image_sizes=[(9, 9)], return_dict_in_generate=True,
            output_logits=True, **GREEDY,
        )  # fmt: skip
        assert calls == [[(9, 9)]] and not torch.equal(torch.stack(shorter.logits), plain)
        assert host.cache_of(shorter).get_seq_length() == len(ROWS[0]) - 1 + PATCHES - 1 + 7

    @pytest.mark.parametrize("place", ["object", "mix-in"])
    def test_encoding(self, model, monkeypatch, place):
        """An encoder that keeps one token of every image."""
        own = LlavaMetaForCausalLM.encode_images
        target = model if place == "object" else LlavaMetaForCausalLM
        value = (lambda images: own(model, images)[:, :1]) if place == "object" else lambda self, x: own(self, x)[:, :1]
        monkeypatch.setattr(target, "encode_images", value)
        output = model.generate(torch.tensor([ROWS[0]]), images=pixels(1), return_dict_in_generate=True, **GREEDY)
        assert host.cache_of(output).get_seq_length() == len(ROWS[0]) + 7

    def test_the_tower(self, model, monkeypatch):
        own = CLIPVisionTower.forward
        monkeypatch.setattr(CLIPVisionTower, "forward", lambda self, images: own(self, images)[:, :3])
        assert model.encode_images(pixels(2)).shape == (2, 3, 32)


class TestModelObject:
    def test_vision_tower(self, loaded, model):
        tower = model.get_vision_tower()
        assert tower.is_loaded and tower.load_model() is None
        assert (tower.num_patches, tower.num_patches_per_side, tower.hidden_size) == (4, 2, 16)
        assert (tower.select_layer, tower.select_feature) == (-2, "patch")
        assert (tower.device, tower.dtype) == (torch.device("cpu"), torch.float32)
        assert tower.config.image_size == 28 and tower.image_processor.crop_size["height"] == 28
        assert tower.dummy_feature.shape == (1, 16)
        assert [len(one) for one in tower(list(pixels(2)))] == [1, 1]

    def test_features_are_those_of_the_chosen_layer(self, model):
        tower, images = model.get_vision_tower(), pixels(2)
        hidden = tower.vision_tower(images, output_hidden_states=True).hidden_states
        assert torch.equal(tower(images), hidden[-2][:, 1:])
        whole = CLIPVisionTower(
            tower.vision_tower, None, SimpleNamespace(mm_vision_select_layer=-1, mm_vision_select_feature="cls_patch")
        )
        assert torch.equal(whole(images), hidden[-1])
        wrong = CLIPVisionTower(tower.vision_tower, None, SimpleNamespace(mm_vision_select_feature="cls"))
        with pytest.raises(ValueError, match="mm_vision_select_feature='cls'"):
            wrong(images)

    def test_names_of_parts(self, model, anyres):
        inner = model.get_model()
        assert inner is model.model
        assert inner.embed_tokens.weight.shape == model.lm_head.weight.shape == (VOCAB, 32)
        assert len(inner.layers) == 2 and inner.norm is inner.language_model.norm
        assert inner.mm_projector(torch.zeros(1, 16)).shape == (1, 32)
        assert anyres.model.image_newline.shape == (32,) and not hasattr(inner, "image_newline")

    def test_config_fields(self, model, anyres):
        config = model.config
        assert (config.mm_use_im_start_end, config.mm_use_im_patch_token, config.image_aspect_ratio) == (
            False, False, "pad",
        )  # fmt: skip
        assert (config.hidden_size, config.vocab_size, config.mm_hidden_size) == (32, VOCAB, 16)
        assert config.mm_projector_type == "mlp2x_gelu" and config.mm_vision_select_layer == -2
        assert anyres.config.mm_patch_merge_type == "spatial_unpad" and len(anyres.config.image_grid_pinpoints) == 5
        assert anyres.config.tokenizer_model_max_length == 2048 and anyres.config.unfreeze_mm_vision_tower is True

    def test_the_sequence_is_cut_at_the_tokenizers_length(self, model, monkeypatch):
        monkeypatch.setattr(model.config, "tokenizer_model_max_length", 6, raising=False)
        output = model.generate(torch.tensor([ROWS[2]]), images=pixels(2), return_dict_in_generate=True, **GREEDY)
        assert host.cache_of(output).get_seq_length() == 6 + 7


NAMES = {
    "llava": ["LlavaLlamaForCausalLM"],
    "llava.model": [
        "LlavaLlamaForCausalLM", "LlavaConfig", "LlavaMistralForCausalLM", "LlavaMistralConfig", "LlavaMptForCausalLM",
        "LlavaMptConfig",
    ],
    "llava.utils": [
        "disable_torch_init", "build_logger", "StreamToLogger", "violates_moderation", "pretty_print_semaphore",
        "server_error_msg", "moderation_msg",
    ],
    "llava.model.builder": ["load_pretrained_model"],
    "llava.model.llava_arch": ["LlavaMetaModel", "LlavaMetaForCausalLM", "unpad_image"],
    "llava.model.multimodal_encoder.clip_encoder": ["CLIPVisionTower"],
    "llava.model.multimodal_encoder.builder": ["build_vision_tower"],
    "llava.model.multimodal_projector.builder": ["build_vision_projector"],
    "llava.eval.m4c_evaluator": ["EvalAIAnswerProcessor", "TextVQAAccuracyEvaluator"],
}  # fmt: skip


class TestNames:
    @pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in NAMES.items() for name in names])
    def test_importable(self, module, name):
        assert getattr(importlib.import_module(module), name) is not None

    def test_the_package_has_no_other_names(self):
        import llava
        from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

        assert llava.LlavaLlamaForCausalLM is LlavaLlamaForCausalLM
        with pytest.raises(AttributeError, match="LlavaGemmaForCausalLM"):
            _ = llava.LlavaGemmaForCausalLM

    def test_import_errors_are_not_hidden(self, tmp_path):
        """A broken dependency shows under its own name."""
        (tmp_path / "transformers.py").write_text("raise ImportError('broken on purpose')")
        use = "import llava; print('light'); llava.LlavaLlamaForCausalLM"
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {use}"
        root = Path(__file__).parents[2]
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
        assert done.returncode != 0 and done.stdout == "light\n" and "broken on purpose" in done.stderr

    def test_mpt_says_why_not(self):
        from llava.model import LlavaMptForCausalLM

        for make in (LlavaMptForCausalLM, LlavaMptForCausalLM.from_pretrained):
            with pytest.raises(NotImplementedError, match="MPT"):
                make("folder")
