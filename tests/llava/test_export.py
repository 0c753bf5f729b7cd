"""The Hugging Face layout against the original checkpoint: prompts, pixels, weights, answers."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration

from apet.eval.scoring_cli import run
from apet.eval.server import conversation
from llava.conversation import new_conversation
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.hugging_face import chat_template, export_checkpoint
from llava.serve import export

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = str(ROOT / "data/sample/model/llava-v1.5-sample")
TINY = ROOT / "tests/golden/end_to_end"
QUESTIONS = [
    "What colour is the bus?\nAnswer the question using a single word or phrase.",
    "  two leading blanks,\ttab, ünïcode 猫, and a line\n\nbreak ",
    "<b>1 < 2</b>",
    "\nA. x\nB. y",
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_checkpoint(SAMPLE, tmp_path_factory.mktemp("hf") / "sample")


@pytest.fixture(scope="module")
def original():
    return load_pretrained_model(SAMPLE, None, "sample", device="cpu")


def wanted_prompt(question, images=1):
    turn = new_conversation("vicuna_v1")
    turn.append_message(turn.roles[0], "<image>\n" * images + question)
    turn.append_message(turn.roles[1], None)
    return turn.get_prompt()


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("images", [0, 1, 2])
def test_the_chat_template_and_tokenizer_give_the_ids_of_the_programs(exported, original, question, images):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    messages = conversation(question, ["x"] * images)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s>" + wanted_prompt(question, images)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    wanted = tokenizer_image_token(wanted_prompt(question, images), original[0], image_id)
    assert tokenizer(text, add_special_tokens=False).input_ids == wanted


def test_turns_and_system_messages_render_as_the_conversation_does(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    turn = new_conversation("vicuna_v1")
    for role, text in zip(turn.roles * 2, ["<image>\nOne?", "1", "Two?", None], strict=True):
        turn.append_message(role, text)
    messages = [
        *conversation("One?", ["x"]), {"role": "assistant", "content": "1"}, {"role": "user", "content": "Two?"},
    ]  # fmt: skip
    render = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(messages, **render) == "<s>" + turn.get_prompt()
    turn.system = "Be brief."
    for system in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
        started = [{"role": "system", "content": system}, *messages]
        assert tokenizer.apply_chat_template(started, **render) == "<s>" + turn.get_prompt()


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision rounds otherwise than PIL")
@pytest.mark.parametrize("size", [(336, 336), (500, 375), (61, 200), (700, 350)])
def test_the_image_processor_gives_the_pixels_of_the_programs(exported, original, size):
    image = Image.effect_noise(size, 90).convert("RGB")
    image.putpixel((0, 0), (255, 0, 7))
    processor = AutoImageProcessor.from_pretrained(exported)
    found = processor([image], return_tensors="pt")["pixel_values"]
    assert torch.equal(found, process_images([image], original[2], original[1].config))


def test_weights_keep_their_precision_and_answers_are_the_same(exported, original):
    tokenizer, model, processor, _ = original
    served = LlavaForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
    stored = json.loads((exported / "config.json").read_text())
    assert stored["dtype"] == "float16" and stored["text_config"]["vocab_size"] == len(tokenizer) + 1
    image = Image.open(next((ROOT / "data/sample/eval/gqa/images").iterdir())).convert("RGB")
    pixels = process_images([image], processor, model.config)
    prompt = wanted_prompt("What shape is in the image?")
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt").unsqueeze(0)
    wanted = model.generate(ids, images=pixels, image_sizes=[image.size], do_sample=False, max_new_tokens=8)
    image_id = stored["image_token_index"]
    at = ids[0].tolist().index(-200)
    full = torch.cat([ids[0, :at], torch.full((576,), image_id), ids[0, at + 1 :]]).unsqueeze(0)
    found = served.generate(
        input_ids=full, attention_mask=torch.ones_like(full), pixel_values=pixels, do_sample=False, max_new_tokens=8
    )
    assert found[:, full.shape[1] :].tolist() == wanted.tolist()


def test_the_programs_load_the_export_with_the_same_weights(exported, original):
    model = load_pretrained_model(str(exported), None, "sample", device="cpu")[1]
    grown = {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    ours, theirs = model.state_dict(), original[1].state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        found = ours[name]
        if name in grown:
            assert len(found) == len(tensor) + 1 and torch.equal(found[-1], tensor[0])
        assert torch.equal(found[: len(tensor)], tensor)


def test_files_name_no_folder_of_this_machine(exported):
    for path in exported.glob("*.json"):
        assert str(ROOT) not in path.read_text(), path.name


def test_the_program_reports_and_refuses(tmp_path, capsys, exported):
    arguments = ["--model-path", SAMPLE, "--out", str(exported)]
    assert run(export.parser(), export.export, arguments) == 1
    assert "already holds a checkpoint" in capsys.readouterr().err
    tiled = str(TINY / "llava-v1.6-vicuna-tiny")
    assert run(export.parser(), export.export, ["--model-path", tiled, "--out", str(tmp_path / "x")]) == 1
    assert "anyres" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("mode", ["plain", "llava_v0", "mistral_instruct", "v1_mmtag"])
def test_conversation_modes_without_a_template_are_refused(mode):
    with pytest.raises(ValueError, match=f"{mode!r}; choose .*vicuna_v1"):
        chat_template(mode)


@pytest.mark.parametrize(("field", "value"), [("mm_projector_type", "linear"), ("mm_use_im_start_end", True)])
def test_checkpoints_the_layout_cannot_express_are_refused(tmp_path, field, value, monkeypatch, original):
    monkeypatch.setattr(original[1].config, field, value)
    monkeypatch.setattr("llava.model.hugging_face.load_pretrained_model", lambda *_, **__: original)
    with pytest.raises(ValueError, match="the layout knows mlp2x_gelu|tokens of its own"):
        export_checkpoint(SAMPLE, tmp_path / "out")
