"""Prompts against the renderings recorded from original LLaVA, and the chat helpers around them."""

import base64
import json
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from llava import constants
from llava.conversation import (
    SeparatorStyle,
    conv_templates,
    default_conversation,
    infer_conv_mode,
    new_conversation,
    plain_conv_mode,
    resolve_conv_mode,
)

GOLDEN = Path(__file__).parents[1] / "golden/llava"
PROMPTS = json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))
MODES = json.loads((GOLDEN / "conv_mode.json").read_text(encoding="utf-8"))
Q1, A1, Q2, A2 = (PROMPTS["inputs"][name] for name in ("q1", "a1", "q2", "a2"))
PICTURE = Image.new("RGB", (4, 3), (10, 20, 30))

# Messages of each rendered case, first role first.
CASES = {
    "empty": [],
    "one_turn": [f"<image>\n{Q1}", None],
    "one_turn_no_image": [Q1, None],
    "one_turn_answered": [f"<image>\n{Q1}", A1],
    "two_turn": [f"<image>\n{Q1}", A1, Q2, None],
    "two_turn_answered": [f"<image>\n{Q1}", A1, Q2, A2],
    "tuple_first_message": [(f"{Q1} <image>", PICTURE, "Default"), None],
    "empty_string_answer": [f"<image>\n{Q1}", "", Q2, None],
}
RENDERED = [(key, case) for key, entry in PROMPTS["templates"].items() for case in entry["rendered"]]
ERRORS = {"TypeError": TypeError, "AssertionError": AssertionError}


def conversation(key, messages):
    """A copy of a template with alternating messages."""
    chat = conv_templates[key].copy()
    for index, message in enumerate(messages):
        chat.append_message(chat.roles[index % 2], message)
    return chat


def test_constants():
    assert {name: getattr(constants, name) for name in PROMPTS["constants"]} == PROMPTS["constants"]


def test_names_and_styles():
    assert list(conv_templates) == list(PROMPTS["templates"])
    assert default_conversation is conv_templates[PROMPTS["default_conversation_is"]]
    assert [style.name for style in SeparatorStyle] == PROMPTS["SeparatorStyle"]


@pytest.mark.parametrize("key", PROMPTS["templates"])
def test_template_fields(key):
    template, golden = conv_templates[key], PROMPTS["templates"][key]
    for field in ("system", "sep", "sep2", "version", "offset"):
        assert getattr(template, field) == golden[field], field
    assert list(template.roles) == golden["roles"]
    assert template.sep_style.name == golden["sep_style"]
    assert len(template.messages) == golden["n_preset_messages"]
    aliases = [name for name in conv_templates if conv_templates[name] is template and name != key]
    assert aliases == golden["same_object_as"]
    two = template.sep_style is SeparatorStyle.TWO
    assert (template.sep2 if two else template.sep) == golden["stop_str"]


@pytest.mark.parametrize(("key", "case"), RENDERED)
def test_rendered_prompt(key, case):
    golden = PROMPTS["templates"][key]["rendered"][case]
    chat = conversation(key, CASES[case])
    if "error" in golden:
        with pytest.raises(ERRORS[golden["error"]]):
            chat.get_prompt()
    else:
        assert chat.get_prompt() == golden["prompt"]


@pytest.mark.parametrize("messages", [[None], ["", None]])
def test_llama_2_needs_a_first_question(messages):
    with pytest.raises(AssertionError, match="first message"):
        conversation("llava_llama_2", messages).get_prompt()


def test_dict_and_chatbot():
    chat = conversation("vicuna_v1", CASES["two_turn"])
    assert json.loads(json.dumps(chat.dict())) == PROMPTS["dict_method"]
    assert chat.to_gradio_chatbot() == PROMPTS["chatbot_method"]


def test_pictures_in_messages():
    chat = conversation("vicuna_v1", CASES["tuple_first_message"])
    assert chat.get_images(return_pil=True) == [PICTURE]
    (encoded,) = chat.get_images()
    assert Image.open(BytesIO(base64.b64decode(encoded))).tobytes() == PICTURE.tobytes()
    assert chat.dict()["messages"][0] == ["USER", f"{Q1} <image>"]
    question, answer = chat.to_gradio_chatbot()[0]
    assert question.startswith('<img src="data:image/jpeg;base64,') and question.endswith(Q1) and answer is None


def test_copy_is_independent():
    chat = conversation("vicuna_v1", CASES["one_turn"])
    chat.skip_next = True
    twin = chat.copy()
    twin.append_message("USER", "more")
    twin.messages[0][1] = "changed"
    assert chat.messages == [["USER", f"<image>\n{Q1}"], ["ASSISTANT", None]]
    assert (chat.skip_next, twin.skip_next) == (True, False)
    assert conv_templates["vicuna_v1"].messages == []


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [
        ("Default", (300, 200), (300, 200)),
        ("Crop", (300, 200), (300, 200)),
        ("Pad", (300, 200), (300, 300)),
        ("Resize", (300, 200), (336, 336)),
        ("Default", (2000, 1000), (1344, 672)),
        ("Default", (1000, 4000), (336, 1344)),
        ("Default", (2000, 2000), (672, 672)),
        ("Default", (5000, 1), (1344, 1)),
    ],
)
def test_process_image_size(mode, size, expected):
    assert default_conversation.process_image(Image.new("L", size), mode, return_pil=True).size == expected


def test_process_image_unknown_mode():
    with pytest.raises(ValueError, match="'Stretch' is unknown"):
        default_conversation.process_image(PICTURE, "Stretch")


@pytest.mark.parametrize("row", MODES["run_llava_and_cli_inference"])
def test_inferred_mode(row):
    assert infer_conv_mode(row["model_name"]) == row["conv_mode"]


@pytest.mark.parametrize("row", MODES["loader_mmbench_plain_switch"])
def test_plain_switch(row):
    heard = []
    mode = plain_conv_mode(row["model_name"], row["conv_mode_in"], warn=heard.append)
    assert mode == row["conv_mode_out"]
    assert (mode in conv_templates) == row["exists"]
    assert len(heard) == (mode != row["conv_mode_in"])


def test_requested_mode_wins_with_a_warning():
    heard = []
    assert resolve_conv_mode("llava-v1.5-7b", None, heard.append) == "llava_v1"
    assert resolve_conv_mode("llava-v1.5-7b", "llava_v1", heard.append) == "llava_v1"
    assert not heard
    assert resolve_conv_mode("llava-v1.5-7b", "vicuna_v1", heard.append) == "vicuna_v1"
    assert heard == [
        "[WARNING] the auto inferred conversation mode is llava_v1, while `--conv-mode` is vicuna_v1, using vicuna_v1"
    ]


def test_new_conversation():
    assert new_conversation("vicuna_v1") == default_conversation
    assert new_conversation("vicuna_v1") is not default_conversation
    with pytest.raises(
        ValueError, match=r"'vicuna_v11' is unknown; did you mean 'vicuna_v1'.*Known modes: default, v0"
    ):
        new_conversation("vicuna_v11")
