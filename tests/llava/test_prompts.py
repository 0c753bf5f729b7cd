"""Prompts a model can be asked: pictures where the text has `<image>`, and no more tokens than the context."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_endpoint import FakeEndpoint
from PIL import Image

import apet
from apet.eval.benchmarks import Question
from apet.eval.images import ImageError
from apet.eval.prompts import Context, PromptError, around_images
from llava.eval import model_vqa_loader, run_llava
from llava.eval.answerer import LlavaPreparer, place_images
from llava.eval.lengths import context_of, crops_of, image_lengths, room_of_prompt
from llava.eval.program import main
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TINY = GOLDEN / "end_to_end"
MODEL = TINY / "llava-v1.5-tiny"


@pytest.fixture(scope="module")
def loaded():
    return load_pretrained_model(str(MODEL), None, "llava", device="cpu")[:3]


@pytest.fixture(scope="module")
def preparer(loaded):
    tokenizer, model, processor = loaded
    return LlavaPreparer(tokenizer, processor, model.config, "vicuna_v1", context=context_of(model.config))


def asked(text: str, image: str | None = "a.png") -> Question:
    return Question(1, text, text, image=image)


class TestPlaces:
    @pytest.mark.parametrize(
        ("text", "images", "placed"),
        [
            ("What?", 1, "<image>\nWhat?"),
            ("What?", 0, "What?"),
            ("<image>\nWhat?", 1, "<image>\nWhat?"),
            ("See <image> there?", 1, "See <image> there?"),
            ("What?\n<image>", 1, "What?\n<image>"),
            ("<image> or <image>?", 2, "<image> or <image>?"),
            ("Which?", 2, "<image>\n<image>\nWhich?"),
        ],
    )
    def test_pictures_stand_where_the_text_has_them(self, text, images, placed):
        assert place_images(text, images, False) == placed
        marked = place_images(text, images, True)
        assert marked == placed.replace("<image>", "<im_start><image><im_end>")

    @pytest.mark.parametrize(("text", "images"), [("<image>?", 0), ("<image><image>", 1), ("<image>", 2)])
    def test_other_counts_are_refused(self, text, images):
        with pytest.raises(PromptError, match=f"has <image> {text.count('<image>')} times for {images} picture"):
            around_images(text, images)

    def test_ids_of_a_prompt(self, preparer):
        one = preparer.input_ids(asked("What is this?"))
        assert torch.equal(preparer.input_ids(asked("<image>\nWhat is this?")), one)
        inside = preparer.input_ids(asked("Is <image> red?"))
        assert (inside == -200).sum() == 1 and not torch.equal(inside, one)


class TestContext:
    def test_what_the_config_says(self, loaded):
        assert context_of(loaded[1].config) == Context(positions=4096)

    @pytest.mark.parametrize(
        ("rotary", "positions"),
        [
            ({"rope_type": "default"}, 2048),
            ({"rope_type": "linear", "factor": 2.0}, 4096),
            ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
            ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 1024}, 2048),
        ],
        ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
    )
    def test_scaled_positions_count(self, rotary, positions):
        class Config:
            max_position_embeddings, rope_parameters, tokenizer_model_max_length = 2048, rotary, 1500

            def get_text_config(self):
                return self

        assert context_of(Config()) == Context(positions, 1500)

    def test_the_sentence_has_both_lengths(self):
        with pytest.raises(
            PromptError, match=r"has 700 tokens \(124 of text, 576 of pictures\), .*context of 600 tokens"
        ):
            Context(600).room(124, 576, 576)
        with pytest.raises(PromptError, match="has 1,700 tokens, .*cuts prompts at 600"):
            Context(5000, 600).room(1700, 0, 0)
        assert Context(600).room(124, 576, 96) == 380 and Context().room(9, 9, 9) is None

    @pytest.mark.parametrize("model", ["llava-v1.5-tiny", "llava-v1.6-vicuna-tiny"])
    @pytest.mark.parametrize("size", [(336, 336), (640, 200), (90, 700)])
    def test_lengths_are_those_of_the_model(self, model, size):
        """Without a model in `image_lengths`, against what it splices and what a patch leaves of it."""
        tokenizer, network, processor, _ = load_pretrained_model(str(TINY / model), None, "llava", device="cpu")
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        pixels = process_images([image], processor, network.config)[0]
        length, _ = image_lengths(network.config, size, crops_of(pixels))
        ids = torch.tensor([[1, -200, 5, 6, 7]])
        items = network.splice(ids, None, None, [pixels], [size], "left").visual_items
        assert (items >= 0).sum() == length
        for config in (apet.ApetConfig(), apet.ApetConfig(64), apet.ApetConfig(image_token_ratio=0.3)):
            with apet.patched(network, config):
                network.generate(ids, images=[pixels], image_sizes=[size], max_new_tokens=1, do_sample=False)
                kept = apet.last_result(network).stages[0].tokens_out[0][0] if config != apet.ApetConfig() else length
            room = room_of_prompt(Context(9000), network.config, config, ids[0], [(size, crops_of(pixels))])
            # Of several crops newlines may go too, whose lines are empty.
            spare = 0 if crops_of(pixels) == 1 else 100
            assert 0 <= (9000 - 4 - room) - kept <= spare


@pytest.mark.parametrize(
    ("aspect", "size", "pixels"), [("pad", (20_000, 1), "400,000,000"), (None, (1, 2_000), "225,792,000")]
)
def test_a_strip_that_would_become_gigabytes_is_an_image_error(loaded, aspect, size, pixels):
    """Few pixels in the file, and any number of them once it is a square or its short side fits the tower."""
    tokenizer, model, processor = loaded
    config = copy.copy(model.config)
    config.image_aspect_ratio = aspect
    preparer = LlavaPreparer(tokenizer, processor, config, "vicuna_v1")
    with pytest.raises(ImageError, match=f"of question 1 cannot be prepared: .* pixels would become {pixels}"):
        preparer.prepare(asked("What?"), [Image.new("RGB", size)])


@pytest.mark.parametrize("address", ["http://localhost:1/p.png", "http://host:port/p.png", "http://[::1/p.png"])
def test_an_address_without_a_picture_is_an_image_error(address):
    with pytest.raises(ImageError, match="cannot be fetched"):
        run_llava.load_image(address)


def test_what_an_address_sends_is_opened_like_a_file():
    with FakeEndpoint(lambda body: None) as server:
        server.extra["/v1/page.png"] = {"no": "picture"}
        with pytest.raises(ImageError, match="page.png is not an image PIL can read"):
            run_llava.load_image(f"{server.url}/page.png")


@pytest.fixture
def short(tmp_path) -> Path:
    """The tiny checkpoint with a context of 700 tokens; a picture takes 576."""
    shutil.copytree(TINY, tmp_path / "own")
    model = tmp_path / "own" / "llava-v1.5-tiny"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 700}))
    return model


def loader(model: Path, folder: Path, texts: list[str], *flags: str) -> tuple[int, list[dict], dict]:
    """Exit status, answers and record of a run over questions about one picture."""
    rows = [{"question_id": index, "image": "image_a.png", "text": text} for index, text in enumerate(texts)]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / f"a{len(list(folder.iterdir()))}.jsonl"
    arguments = ["--model-path", str(model), "--image-folder", str(TINY / "images"), "--answers-file", str(path)]
    arguments += ["--question-file", str(folder / "q.jsonl"), "--conv-mode", "vicuna_v1", "--temperature", "0"]
    arguments += ["--device", "cpu", "--max_new_tokens", "12", "--num_workers", "0", *flags]
    status = main(model_vqa_loader.parser(), arguments)
    return status, [json.loads(line) for line in path.read_text().splitlines()], json.loads(
        path.with_suffix(".run.json").read_text()
    )  # fmt: skip


TEXTS = ["What?", "What? " * 60, "Is <image> red?", "<image> <image>", "Why?"]


def test_what_cannot_be_asked_is_skipped_and_recorded(short, tmp_path, capsys):
    status, answers, record = loader(short, tmp_path, TEXTS, "--on_error", "skip", "--batch_size", "2")
    assert status == 0 and [row["question_id"] for row in answers] == [0, 2, 4]
    long, doubled = record["failures"]
    assert long["question_id"] == 1 and "576 of pictures), but the model's context of 700 tokens" in long["error"]
    assert doubled["question_id"] == 3 and "<image> 2 times for 1 picture" in doubled["error"]
    status, answers, _ = loader(short, tmp_path, TEXTS)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 1 and "question 1: the prompt has" in error and "--on_error skip" in error and len(answers) == 1


def test_a_prompt_fits_that_compression_makes_short_enough(short, tmp_path, capsys):
    status, answers, record = loader(short, tmp_path, TEXTS[:2], "--visual_token_num", "64")
    assert status == 0 and len(answers) == 2 and record["failures"] == []
    status, *_ = loader(short, tmp_path, TEXTS[:2], "--visual_token_num", "64", "--apet", "position_mode=keep")
    assert status == 1  # the tokens left have the positions of all
    status, *_ = loader(short, tmp_path, TEXTS[:2], "--visual_token_num", "64", "--method", "apet_plus")
    assert status == 1 and "--apet position_mode=compact" in capsys.readouterr().err
    compact = ["--method", "apet_plus", "--apet", "position_mode=compact"]
    status, answers, _ = loader(short, tmp_path, TEXTS[:2], "--visual_token_num", "64", *compact)
    assert status == 0 and len(answers) == 2


@pytest.mark.parametrize("batch", ["1", "3"])
def test_an_answer_ends_with_the_context_whatever_the_batch(short, tmp_path, batch):
    """Where 12 new tokens fit for one prompt and not for another, only the other's answer is cut."""
    texts = ["What?", "What? " * 12, "Why not?"]
    _, whole, _ = loader(MODEL, tmp_path, texts, "--batch_size", batch)
    config = json.loads((short / "config.json").read_text())
    tokenizer, model, processor, _ = load_pretrained_model(str(short), None, "llava", device="cpu")
    preparer = LlavaPreparer(tokenizer, processor, model.config, "vicuna_v1")
    longest = max(len(preparer.input_ids(asked(text))) for text in texts) - 1 + 576
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": longest + 5}))
    _, cut, record = loader(short, tmp_path, texts, "--batch_size", batch)
    assert [row["text"] for row in cut][::2] == [row["text"] for row in whole][::2]
    assert whole[1]["text"].startswith(cut[1]["text"]) and len(cut[1]["text"]) < len(whole[1]["text"])


def test_run_llava_places_pictures_and_refuses_with_a_sentence(short, tmp_path, capsys):
    image = str(TINY / "images/image_a.png")
    argv = ["--model-path", str(MODEL), "--image-file", image, "--temperature", "0", "--device", "cpu", "--conv-mode",
            "vicuna_v1", "--max_new_tokens", "8"]  # fmt: skip

    def ask(*words: str) -> tuple[int, str, str]:
        status = run_llava.run(run_llava.parser(), run_llava._ask, [*argv, *words])
        said = capsys.readouterr()
        return status, said.out.strip().rpartition("\n")[2], said.err.strip().rpartition("\n")[2]

    in_front = ask("--query", "What is this?")
    assert in_front[0] == 0 and ask("--query", "<image>\nWhat is this?")[1] == in_front[1]
    assert ask("--query", "<image-placeholder>\nWhat is this?")[1] == in_front[1]
    for query in ("<image> <image-placeholder>", "<image><image>"):
        status, _, error = ask("--query", query)
        assert status == 1 and "<image> 2 times for 1 picture" in error
    status, _, error = ask("--query", "What?", "--image-file", f"{image},{image},{image}", "--model-path", str(short))
    assert status == 1 and "1,728 of pictures), but the model's context of 700 tokens" in error
