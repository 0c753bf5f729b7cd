"""Checkpoints of every family through the image programs, from question file to score."""

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES
from family_checkpoints import write_checkpoint
from PIL import Image
from transformers import AutoConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import apet
from apet.eval.benchmarks import Question
from apet.eval.cli import add_compression_flags, config_from_flags
from apet.eval.prompts import PromptError
from apet.eval.scoring_cli import Parser
from llava.eval import apet_loader, eval_pope, model_vqa_loader, model_vqa_mmbench, model_vqa_science, run_llava
from llava.eval.family_answerer import FamilyAnswerer, FamilyPreparer
from llava.eval.generation import CompiledDecoding, GenerationSettings
from llava.eval.program import main
from llava.model.builder import load_pretrained_model
from llava.model.processors import Limits, load_processor

SMALL = ["--min_pixels", "3136", "--max_pixels", "12544"]
RATIOS = [
    "--layer-list", "[2]", "--image-token-ratio-list", "[0.5]", "--image-token-ratio", "0.6", "--basis-token-num", "2",
]  # fmt: skip
SIZES = ((64, 48), (120, 60), (56, 90), (200, 40))
pytestmark = pytest.mark.usefixtures("checkpoints_loaded_once")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """`checkpoint(family)`: the folder of a tiny one, written once."""
    root, known = tmp_path_factory.mktemp("checkpoints"), {}

    def find(family: str) -> Path:
        if family not in known:
            known[family] = write_checkpoint(family, root / family)
        return known[family]

    return find


@pytest.fixture(scope="module")
def pope(tmp_path_factory) -> Path:
    """A miniature of POPE over pictures of four shapes."""
    root, asked = tmp_path_factory.mktemp("pope"), []
    for index, size in enumerate(SIZES):
        picture(index, size).save(root / f"{index}.png")
    for number, split in enumerate(("adversarial", "popular", "random")):
        labels = []
        for index in range(2):
            row = {"image": f"{(2 * number + index) % 4}.png", "text": "Is there a dog?" + " Really?" * index * number}
            asked.append({"question_id": 10 * number + index, **row, "category": split})
            labels.append({"question_id": index, **row, "label": ("yes", "no")[index]})
        lines(root / f"coco_pope_{split}.json", labels)
    lines(root / "questions.jsonl", asked)
    return root


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def lines(path: Path, content: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def rows(path: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "answer_id"} for line in path.read_text().splitlines()]


def words(model: Path, questions: Path, answers: Path, *flags: str) -> list[str]:
    small = SMALL if "qwen" in model.name else []
    return [
        "--model-path", str(model), "--image-folder", str(questions.parent), "--question-file", str(questions),
        "--answers-file", str(answers), "--temperature", "0", "--device", "cpu", "--num_workers", "0",
        "--max_new_tokens", "5", *small, *flags,
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_from_questions_to_a_score(family, checkpoint, pope, tmp_path, capsys):
    model, questions = checkpoint(family), pope / "questions.jsonl"
    flags = ["--benchmark", "pope", *RATIOS]
    for name, batch in (("one", "1"), ("many", "4")):
        arguments = words(model, questions, tmp_path / f"{name}.jsonl", *flags, "--batch_size", batch)
        assert main(model_vqa_loader.parser(), arguments) == 0
    found = rows(tmp_path / "one.jsonl")
    assert rows(tmp_path / "many.jsonl") == found
    assert all(list(row) == ["question_id", "prompt", "text", "model_id", "metadata"] for row in found)
    assert {row["model_id"] for row in found} == {family} and len({row["text"] for row in found}) > 1
    assert main(model_vqa_loader.parser(), words(model, questions, tmp_path / "whole.jsonl")) == 0
    record, whole = (json.loads((tmp_path / f"{name}.run.json").read_text()) for name in ("one", "whole"))
    assert record["settings"]["family"] == AutoConfig.from_pretrained(model).model_type
    assert record["layer_averaged_tokens"] < 0.7 * whole["layer_averaged_tokens"]
    capsys.readouterr()
    scoring = ["--annotation-dir", str(pope), "--question-file", str(questions), "--result-file"]
    assert (
        eval_pope.main([*scoring, str(tmp_path / "one.jsonl"), "--output-json", str(tmp_path / "one.score.json")]) == 0
    )
    assert json.loads((tmp_path / "one.score.json").read_text())["n_questions"] == 6


def test_ratios_are_taken_of_every_image(checkpoint, pope, tmp_path):
    """60 % of each image for two layers, and half of those for the other two."""
    model = checkpoint("qwen2_5_vl")
    assert main(model_vqa_loader.parser(), words(model, pope / "questions.jsonl", tmp_path / "x.jsonl", *RATIOS)) == 0
    expected = []
    for index in (0, 1, 2, 3, 0, 1):
        width, height = SIZES[index]
        loaded = smart_resize(height, width, 28, 4 * 28**2, 16384 * 28**2)
        tall, wide = smart_resize(*loaded, 28, 3136, 12544)
        kept = int(0.6 * (tall // 28) * (wide // 28))
        expected.append((2 * kept + 2 * max(1, int(0.5 * kept))) / 4)
    measured = json.loads((tmp_path / "x.run.json").read_text())["layer_averaged_tokens"]
    assert measured == pytest.approx(sum(expected) / 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_answers_are_those_of_a_plain_run(family, checkpoint, pope, tmp_path, monkeypatch):
    """Traced as for compilation, but run as they are: no C++ compiler is needed."""
    plain = CompiledDecoding.__init__

    def init(self, *args):
        plain(self, *args)
        self._compile.backend, self._compile.mode, self._compile.fullgraph = "eager", None, True

    monkeypatch.setattr(CompiledDecoding, "__init__", init)
    torch._dynamo.reset()
    for name, extra in (("plain", []), ("compiled", ["--compile"])):
        flags = [*RATIOS, "--batch_size", "4", *extra]  # the second batch of the six questions is filled up
        path = tmp_path / f"{name}.jsonl"
        assert main(model_vqa_loader.parser(), words(checkpoint(family), pope / "questions.jsonl", path, *flags)) == 0
    assert rows(tmp_path / "compiled.jsonl") == rows(tmp_path / "plain.jsonl")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_the_programs_for_tables_and_text_only_questions(family, checkpoint, tmp_path):
    buffer = io.BytesIO()
    picture(0, (60, 60)).save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    columns = "index question hint A B C D answer category image source l2-category comment split".split()
    cells = ["1", "Which?", "nan", "cat", "dog", "", "", "A", "x", encoded, "x", "x", "", "dev"]
    table = tmp_path / "table.tsv"
    table.write_text("\t".join(columns) + "\n" + "\t".join(cells) + "\n")
    arguments = words(checkpoint(family), table, tmp_path / "mmbench.jsonl", "--single-pred-prompt", *RATIOS)
    assert main(model_vqa_mmbench.parser(), arguments, model_vqa_mmbench.read) == 0
    assert list(rows(tmp_path / "mmbench.jsonl")[0]) == [
        "question_id", "round_id", "prompt", "text", "options", "option_char", "model_id", "metadata",
    ]  # fmt: skip
    (tmp_path / "2").mkdir()
    picture(1, (70, 40)).save(tmp_path / "2" / "image.png")
    turns = [{"from": "human", "value": "Which is it?\nA. a\nB. b"}]
    asked = [{"id": "1", "conversations": turns}, {"id": "2", "conversations": turns, "image": "image.png"}]
    (tmp_path / "sqa.json").write_text(json.dumps(asked))
    for name, batch in (("one", "1"), ("two", "2")):
        flags = ["--single-pred-prompt", *RATIOS, "--batch_size", batch]
        arguments = words(checkpoint(family), tmp_path / "sqa.json", tmp_path / f"{name}.jsonl", *flags)
        assert main(model_vqa_science.parser(), arguments, model_vqa_science.read) == 0
    assert rows(tmp_path / "one.jsonl") == rows(tmp_path / "two.jsonl")


def test_one_question_about_two_images(checkpoint, pope, capsys):
    for family in ("qwen2_vl", "llava_onevision"):
        files = f"{pope / '0.png'},{pope / '1.png'}"
        arguments = ["--model-path", str(checkpoint(family)), "--image-file", files, "--query", "What?"]
        arguments += ["--temperature", "0", "--device", "cpu", "--max_new_tokens", "4", "--visual_token_num", "5"]
        answer = run_llava.eval_model(run_llava.parser().parse_args(arguments))
        assert capsys.readouterr().out.strip().splitlines()[-1:] == answer.splitlines()[-1:]


def test_qwen_prompt_and_pixels(checkpoint):
    """The chat template's prompt; the image resized when it is loaded and again by the image processor."""
    folder = checkpoint("qwen2_5_vl")
    made = load_processor(str(folder), AutoConfig.from_pretrained(folder), Limits())
    shown = made("What is it?", [picture(0, (100, 30))])
    assert shown.tensors["image_grid_thw"].tolist() == [[1, 16, 64]]  # 100 x 30 -> 112 x 28 -> 896 x 224
    text = made.tokenizer.decode(shown.input_ids)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * 256
        + "<|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    for size, tokens in (((640, 480), 391), ((336, 336), 256), ((1024, 768), 999), ((3000, 2000), 1980)):
        grid = made("?", [picture(0, size)]).tensors["image_grid_thw"]
        assert grid.prod().item() // 4 == tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_stands_where_the_question_has_it(family, checkpoint):
    processor = load_pretrained_model(str(checkpoint(family)), None, family, device="cpu")[2]
    marker = processor.marker(False)
    first, inside = (processor.render(text, 1, False, "llava_v1") for text in ("Is it red?", "Is <image> red?"))
    assert first.index(marker) < first.index("Is it red?") and first.count(marker) == 1
    assert inside.index("Is ") < inside.index(marker) < inside.index(" red?") and inside.count(marker) == 1
    shown = processor("Is <image> red?", [picture(0, (60, 60))], conv_mode="llava_v1")
    assert (
        shown.pictures == 1 and shown.visual == processor("Is it?", [picture(0, (60, 60))], conv_mode="llava_v1").visual
    )
    with pytest.raises(PromptError, match="2 times for 1 picture"):
        processor("<image> <image>", [picture(0, (60, 60))], conv_mode="llava_v1")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "video_llava"])
def test_tokens_of_images_in_the_decoder_are_known_before(family, checkpoint, pope):
    """What decides whether a prompt fits the context, against what a patched model keeps."""
    _, model, processor, _ = load_pretrained_model(str(checkpoint(family)), None, family, device="cpu")
    for config in (apet.ApetConfig(), apet.ApetConfig(image_token_ratio=0.4), apet.ApetConfig(3), apet.ApetConfig(900)):
        answerer = FamilyAnswerer(
            model, FamilyPreparer(processor, "llava_v1"), GenerationSettings(max_new_tokens=1), config, family, ""
        )
        question = Question(0, "<image> or <image>?", "<image> or <image>?")
        inputs = answerer.preparer.prepare(question, [picture(0, (64, 48)), picture(1, (120, 60))])
        answerer.answer([inputs])
        entered = apet.last_result(model).tokens_per_layer[0][0]
        text = len(inputs.input_ids) - sum(inputs.visual)
        assert inputs.room == answerer.preparer.context.positions - text - entered
        apet.remove_patch(model)


def test_a_question_must_not_hold_a_marker(checkpoint):
    folder = checkpoint("internvl")
    made = load_processor(str(folder), AutoConfig.from_pretrained(folder), Limits())
    with pytest.raises(ValueError, match="must not hold the marker"):
        made("What is <IMG_CONTEXT>?", [picture(0, (50, 50))])


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_keeps_the_repetition_penalty_and_drops_sampling(family, checkpoint):
    folder = checkpoint(family)
    tokenizer, model, processor, length = load_pretrained_model(str(folder), None, "x", device="cpu")
    assert type(model).__name__.endswith("ForConditionalGeneration") and model.dtype == torch.float32
    assert length == 2048 and processor.tokenizer is tokenizer
    assert model.generation_config.repetition_penalty == (1.05 if "qwen" in family else None)
    assert model.generation_config.do_sample is False and model.generation_config.temperature is None


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("qwen2_vl", {"model_base": "x"}, "--model-base"),
        ("internvl", {"vision_tower": "x"}, "--vision-tower"),
        ("internvl", {"limits": Limits(10)}, "own size"),
    ],
)
def test_options_of_other_families_are_refused(family, options, said, checkpoint):
    options = {"model_base": None} | options
    with pytest.raises(ValueError, match=said):
        load_pretrained_model(str(checkpoint(family)), model_name="x", device="cpu", **options)


def test_limits_are_checked():
    with pytest.raises(ValueError, match="at least 1"):
        Limits(0)
    with pytest.raises(ValueError, match="above"):
        Limits(100, 50)


def test_missing_files_and_weights_are_named(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("qwen2_vl"), tmp_path / "copy")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="image processor"):
        load_pretrained_model(str(folder), None, "x", device="cpu")
    shutil.copy(checkpoint("qwen2_vl") / "preprocessor_config.json", folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        load_pretrained_model(str(folder), None, "x", device="cpu")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_pretrained_model(str(folder), None, "x", device="cpu")[0].chat_template == template
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        load_pretrained_model(str(folder), None, "x", device="cpu")


def test_loaders_for_comparisons(checkpoint):
    parser = Parser()
    apet_loader.add_flags(parser)

    def load(family: str, *flags: str):
        return apet_loader.load(parser.parse_args(["--model-path", str(checkpoint(family)), "--device", "cpu", *flags]))

    assert load("video_llava").image_tokens == 16 and load("qwen2_5_vl").image_tokens == 256
    loaded = load("qwen2_5_vl", *SMALL)
    assert (loaded.image_tokens, loaded.layers, loaded.model_id) == (4, 4, "qwen2_5_vl")
    answerer = loaded.answerer(apet.ApetConfig(visual_token_num=3), new_tokens=3)
    (answer,) = answerer.answer([answerer.preparer.processor("What?", [picture(0, (60, 60))])])
    assert answer.new_tokens == 3 and answer.visual_tokens == 3
    with pytest.raises(ValueError, match="fixed grid"):
        _ = loaded.grid
    with pytest.raises(ValueError, match="several crops"):
        load("internvl")


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        ([], {"visual_token_num": None, "video_token_num": None}),
        (["--visual_token_num", "576"], {"visual_token_num": 576}),
        (["--image_token_ratio", "0.3"], {"visual_token_num": None, "image_token_ratio": 0.3}),
        (["--apet=video_token_num=22,video_budget_per=clip"], {"video_token_num": 22, "video_budget_per": "clip"}),
        (["--apet", "budget_per=prompt", "--image-token-ratio", "0.3"], {"budget_per": "prompt"}),
    ],
)
def test_budget_flags(flags, fields):
    parser = Parser()
    add_compression_flags(parser)
    made = config_from_flags(parser.parse_args(flags))
    assert {name: getattr(made, name) for name in fields} == fields


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_adds_nothing_to_the_history(family, checkpoint):
    """A repetition penalty reads the padded ids; a row must be the same alone and beside a longer one."""
    folder = checkpoint(family)
    made = load_processor(str(folder), AutoConfig.from_pretrained(folder), Limits())
    prompts = ("What?", "What is it, and where is it?")
    rows = [made(text, [picture(0, (50, 50))], conv_mode="vicuna_v1") for text in prompts]
    batch = made.collate(rows)
    assert (batch["attention_mask"].sum(1) == torch.tensor([len(row.input_ids) for row in rows])).all()
    for ids, row in zip(batch["input_ids"], rows, strict=True):
        assert set(ids.tolist()) == set(row.input_ids.tolist())
