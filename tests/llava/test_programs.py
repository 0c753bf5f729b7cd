"""The command lines from flags to answers, on the tiny golden checkpoint."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forking_python import forking_python
from PIL import Image

from apet.eval.runner import merge_chunks
from llava.eval import model_vqa, model_vqa_loader, model_vqa_mmbench, model_vqa_science, run_llava
from llava.eval.program import main
from llava.serve import cli

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TINY = GOLDEN / "end_to_end"
MODEL = str(TINY / "llava-v1.5-tiny")
QUESTION = "What color is the stripe in the lower part of the picture?"
COMPRESSED = [
    "--visual_token_num",
    "96",
    "--layer_list",
    "[16]",
    "--image_token_list",
    "[32]",
    "--apet",
    "fps_start=first",
]

pytestmark = pytest.mark.usefixtures("checkpoints_loaded_once")


@pytest.fixture
def questions(tmp_path) -> Path:
    """Six questions about two pictures."""
    rows = []
    for index in range(6):
        text = QUESTION + " Really?" * (index * 5 % 4)
        rows.append({"question_id": index, "image": f"image_{'ab'[index % 2]}.png", "text": text, "category": "x"})
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def loader(questions: Path, answers: str = "answers.jsonl", *flags: str, program=model_vqa_loader) -> tuple[int, Path]:
    """Exit status and answers file of a loader run."""
    path = questions.with_name(answers)
    arguments = ["--model-path", MODEL, "--image-folder", str(TINY / "images"), "--question-file", str(questions)]
    arguments += ["--answers-file", str(path), "--conv-mode", "vicuna_v1", "--temperature", "0", "--device", "cpu"]
    arguments += ["--max_new_tokens", "12", "--num_workers", "0", *flags]
    return main(program.parser(), arguments), path


def rows(path: Path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "answer_id"} for line in lines]


def fails(capsys, status: int, *words: str) -> None:
    """The run ended with status 1 and one line on stderr that holds the words."""
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 1 and "error:" in error and "Traceback" not in error
    for word in words:
        assert word in error


@pytest.mark.host
@pytest.mark.parametrize("picture", "ab")
@pytest.mark.parametrize(("setting", "flags"), [
    ("none", []),
    ("v96_b10_l16_t32", COMPRESSED),
    ("v192_b12_l8-16_t96-40", [
        "--visual-token-num", "192", "--layer-list", "[8, 16]", "--image-token-list", "[96, 40]",
        "--basis-token-num", "12", "--apet", "fps_start=0",
    ]),
])  # fmt: skip
def test_golden_answers_through_the_command_line(questions, picture, setting, flags):
    golden = np.load(TINY / "goldens" / f"llava15_{picture}_{setting}.npz")
    question = {"question_id": 1, "image": f"image_{picture}.png", "text": str(golden["question"]), "category": ""}
    questions.write_text(json.dumps(question) + "\n")
    status, path = loader(questions, "answers.jsonl", *flags)
    assert status == 0
    from transformers import LlamaTokenizer

    expected = LlamaTokenizer.from_pretrained(MODEL).decode(golden["tokens"], skip_special_tokens=True).strip()
    assert rows(path) == [
        {
            "question_id": 1,
            "prompt": str(golden["question"]),
            "text": expected,
            "model_id": "llava-v1.5-tiny",
            "metadata": {},
        }
    ]
    record = json.loads(path.with_suffix(".run.json").read_text())
    budgets = {
        "none": 576,
        "v96_b10_l16_t32": (96 * 16 + 32 * 4) / 20,
        "v192_b12_l8-16_t96-40": (192 * 8 + 96 * 8 + 160) / 20,
    }
    assert record["layer_averaged_tokens"] == pytest.approx(budgets[setting])


@pytest.mark.host
@pytest.mark.parametrize("flags", [["--batch_size", "4"], ["--batch-size", "3", "--num_workers", "2"]], ids=" ".join)
def test_answers_do_not_depend_on_batches(questions, flags):
    assert loader(questions, "one.jsonl", *COMPRESSED)[0] == 0
    assert loader(questions, "many.jsonl", *COMPRESSED, *flags)[0] == 0
    expected = rows(questions.with_name("one.jsonl"))
    assert len({row["text"] for row in expected}) > 1
    assert rows(questions.with_name("many.jsonl")) == expected


def test_chunks_and_resume_give_the_same_answers(questions):
    assert loader(questions, "one.jsonl", *COMPRESSED)[0] == 0
    expected = rows(questions.with_name("one.jsonl"))
    joined = []
    for index in range(4):
        _, path = loader(questions, f"4_{index}.jsonl", *COMPRESSED, "--num-chunks", "4", "--chunk-idx", str(index))
        joined += rows(path)
    assert joined == expected
    path = questions.with_name("one.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert loader(questions, "one.jsonl", *COMPRESSED, "--resume", "--batch_size", "2")[0] == 0
    assert rows(path) == expected


class TestSampling:
    """Later flags win: `loader` gives temperature 0."""

    SAMPLED = ("--temperature", "1", "--top_p", "0.95", "--max_new_tokens", "6", *COMPRESSED)

    @pytest.fixture
    def repeated(self, questions) -> Path:
        """Three of the ids are there twice, as in TextVQA."""
        lines = [json.loads(line) | {"question_id": index % 3} for index, line in enumerate(questions.open())]
        questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return questions

    def test_answers_are_the_same_for_every_batch_worker_chunk_and_resume(self, repeated):
        status, path = loader(repeated, "one.jsonl", *self.SAMPLED)
        expected = path.read_bytes()
        assert status == 0 and len({row["text"] for row in rows(path)}) == 6
        status, path = loader(repeated, "many.jsonl", *self.SAMPLED, "--batch_size", "4", "--num_workers", "2")
        assert status == 0 and path.read_bytes() == expected
        parts = []
        for index in range(2):
            flags = ("--num-chunks", "2", "--chunk-idx", str(index), "--batch_size", "2")
            parts.append(loader(repeated, f"2_{index}.jsonl", *self.SAMPLED, *flags)[1])
        merge_chunks(parts, repeated.with_name("joined.jsonl"))
        assert repeated.with_name("joined.jsonl").read_bytes() == expected
        path.write_bytes(b"".join(expected.splitlines(keepends=True)[1::2]))
        assert loader(repeated, "many.jsonl", *self.SAMPLED, "--resume", "--batch_size", "3")[0] == 0
        assert path.read_bytes() == expected

    def test_another_seed_gives_other_answers(self, repeated):
        texts = [
            [row["text"] for row in rows(loader(repeated, f"{seed}.jsonl", *self.SAMPLED, "--seed", str(seed))[1])]
            for seed in (0, 1)
        ]
        assert texts[0] != texts[1]

    def test_beams_draw_one_question_at_a_time(self, repeated, capsys):
        beams = (*self.SAMPLED, "--num_beams", "2")
        fails(capsys, loader(repeated, "no.jsonl", *beams, "--batch_size", "2")[0], "--num_beams 2", "--batch_size 1")
        expected = rows(loader(repeated, "one.jsonl", *beams)[1])
        _, path = loader(repeated, "part.jsonl", *beams, "--limit", "4")
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:3]))
        assert loader(repeated, "part.jsonl", *beams, "--resume")[0] == 0
        assert rows(path) == expected


def test_a_killed_run_of_a_model_goes_on_to_the_same_file(questions):
    """The real thing once: a checkpoint, two workers, SIGKILL after the first answers."""
    whole = loader(questions, "one.jsonl", *COMPRESSED)[1].read_bytes()
    path = questions.with_name("killed.jsonl")
    flags = ["--model-path", MODEL, "--image-folder", str(TINY / "images"), "--question-file", str(questions)]
    flags += ["--answers-file", str(path), "--conv-mode", "vicuna_v1", "--temperature", "0", "--device", "cpu"]
    flags += ["--max_new_tokens", "12", "--num_workers", "2", *COMPRESSED]
    command = [sys.executable, "-m", "llava.eval.model_vqa_loader", *flags]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(GOLDEN.parents[1]), *sys.path]),
    }
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (path.exists() and b"\n" in path.read_bytes()):
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = path.read_bytes().count(b"\n")
    assert 0 < before < 6
    assert loader(questions, "killed.jsonl", *COMPRESSED, "--resume", "--num_workers", "2")[0] == 0
    assert path.read_bytes() == whole
    record = json.loads(path.with_suffix(".run.json").read_text())
    assert record["counts"]["answers"] == record["counts"]["measured"] == 6 and record["status"] == "complete"


CHUNKINGS = json.loads((GOLDEN / "llava" / "chunking.json").read_text())["cases"]


@pytest.mark.parametrize("case", [case for case in CHUNKINGS if case["n_items"]], ids=str)
def test_no_chunk_of_the_published_cases_is_missing(case):
    items, chunks = list(range(case["n_items"])), case["num_chunks"]
    parts = [model_vqa_loader.get_chunk(items, chunks, index) for index in range(chunks)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) == (-(-case["n_items"] // chunks)) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_ranks_of_a_launcher_are_the_chunks(questions):
    assert loader(questions, "one.jsonl", *COMPRESSED)[0] == 0
    command = [forking_python(), "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "llava.eval.model_vqa_loader"]
    command += ["--model-path", MODEL, "--image-folder", str(TINY / "images"), "--question-file", str(questions)]
    command += [
        "--answers-file",
        str(questions.with_name("ranks.jsonl")),
        "--conv-mode",
        "vicuna_v1",
        "--temperature",
        "0",
    ]
    command += ["--max_new_tokens", "12", "--num_workers", "0", "--device", "cpu", *COMPRESSED]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(GOLDEN.parents[1])}
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
    assert rows(questions.with_name("ranks.jsonl")) == rows(questions.with_name("one.jsonl"))
    record = json.loads(questions.with_name("ranks.run.json").read_text())
    assert record["questions"] == record["counts"]["answers"] == 6


def test_an_empty_chunk_writes_an_empty_file(questions):
    status, path = loader(questions, "empty.jsonl", "--num-chunks", "9", "--chunk-idx", "8")
    assert status == 0 and path.read_text() == ""


def test_model_vqa_answers_alike(questions):
    assert loader(questions, "loader.jsonl")[0] == loader(questions, "vqa.jsonl", program=model_vqa)[0] == 0
    assert rows(questions.with_name("vqa.jsonl")) == rows(questions.with_name("loader.jsonl"))


def test_limit_and_dtype(questions):
    status, path = loader(questions, "bf16.jsonl", "--limit", "2", "--dtype", "bf16", "--attn_implementation", "eager")
    record = json.loads(path.with_suffix(".run.json").read_text())
    assert status == 0 and len(rows(path)) == 2
    assert (record["settings"]["dtype"], record["settings"]["attn_implementation"]) == ("bfloat16", "eager")


class TestBadInput:
    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--model-path", "missing/folder/llava"], ["missing/folder/llava", "--model-path"]),
            (["--layer_list", "[20]", "--image_token_list", "[32]"], ["layers 1..19"]),
            (["--layer_list", "[4, 8]", "--image_token_list", "[32]"], ["2 layers", "1 entries"]),
            (
                ["--visual_token_num", "32", "--layer_list", "[4]", "--image_token_list", "[96]"],
                ["must not grow", "96", "32"],
            ),
            (["--visual_token_num", "0"], ["visual_token_num=0", "at least 1"]),
            (["--layer_list", "[4]", "--image_token_list", "[0]"], ["image_token_list", "at least 1"]),
            (["--layer_list", "16"], ["--layer_list", "'[16]'"]),
            (["--layer_list", "__import__('os').getcwd()"], ["--layer_list", "not a list"]),
            (["--apet", "fps_start=nearest"], ["fps_start", "farthest"]),
            (["--apet", "fps_start=600", "--visual_token_num", "96"], ["start=600", "0..575"]),
            (["--method", "aped", "--visual_token_num", "96"], ["Did you mean 'apet'"]),
            (["--conv-mode", "vicuna"], ["vicuna_v1"]),
            (["--benchmark", "pop"], ["'pope'"]),
            (["--num-chunks", "2", "--chunk-idx", "2"], ["0..1"]),
            (["--temperature", "-1"], ["--temperature"]),
            (["--question-file", "nothing.jsonl"], ["nothing.jsonl"]),
        ],
        ids=lambda value: " ".join(value)[:40],
    )
    def test_flags(self, questions, capsys, flags, words):
        fails(capsys, loader(questions, "answers.jsonl", *flags)[0], *words)
        assert not questions.with_name("answers.jsonl").exists() or "fps_start=600" in flags

    def test_a_broken_line_is_named(self, questions, capsys):
        questions.write_text(questions.read_text() + '{"question_id": 7, "image"\n')
        fails(capsys, loader(questions)[0], "line 7")

    def test_duplicate_questions_are_named(self, questions, capsys):
        text = questions.read_text()
        questions.write_text(text + text.splitlines(keepends=True)[2])
        fails(capsys, loader(questions)[0], "line 7", "line 3")

    def test_a_missing_image_stops_or_is_skipped(self, questions, capsys):
        questions.write_text(questions.read_text().replace("image_b.png", "image_z.png", 1))
        fails(capsys, loader(questions, "stop.jsonl")[0], "image_z.png", "--on_error skip")
        status, path = loader(questions, "skip.jsonl", "--on_error", "skip", "--batch_size", "4")
        assert status == 0 and len(rows(path)) == 5
        assert "1 questions have no answer" in capsys.readouterr().out

    def test_answers_of_another_run_are_refused(self, questions, capsys):
        assert loader(questions, "answers.jsonl", *COMPRESSED)[0] == 0
        fails(capsys, loader(questions, "answers.jsonl", "--resume")[0], "compression", "--answers-file")
        assert len(rows(questions.with_name("answers.jsonl"))) == 6

    def test_answers_of_a_checkpoint_retrained_in_its_folder_are_refused(self, questions, tmp_path, capsys):
        shutil.copytree(TINY, tmp_path / "own")  # the vision tower lies beside the checkpoint
        model = tmp_path / "own" / "llava-v1.5-tiny"
        flags = ("answers.jsonl", "--model-path", str(model))
        assert loader(questions, *flags)[0] == 0
        assert loader(questions, *flags, "--resume")[0] == 0
        shard = model / "pytorch_model-00002-of-00002.bin"
        torch.save({name: 1.5 * tensor for name, tensor in torch.load(shard).items()}, shard)
        fails(capsys, loader(questions, *flags, "--resume")[0], "other settings", "weights", "--answers-file")
        assert len(rows(questions.with_name("answers.jsonl"))) == 6


ENTRY_POINTS = json.loads((GOLDEN / "llava" / "entry_points.json").read_text())
PARSERS = {
    "llava/eval/model_vqa_loader.py": model_vqa_loader,
    "llava/eval/model_vqa.py": model_vqa,
    "llava/eval/model_vqa_mmbench.py": model_vqa_mmbench,
    "llava/eval/model_vqa_science.py": model_vqa_science,
    "llava/eval/run_llava.py": run_llava,
    "llava/serve/cli.py": cli,
}


@pytest.mark.parametrize("name", PARSERS)
def test_every_published_flag_has_its_default(name):
    golden = ENTRY_POINTS[name]
    actions = {option: action for action in PARSERS[name].parser()._actions for option in action.option_strings}
    for flag in golden["upstream"] + golden.get("apet_added_or_changed", []):
        action = actions[flag["flag"]]
        assert action.required == flag.get("required", False)
        if flag.get("action") == "store_true":
            assert action.const is True and action.default is False
        else:
            assert action.default == flag.get("default") and action.type.__name__ == flag["type"]
    for flag in ("visual_token_num", "layer_list", "image_token_list", "basis_token_num", "method", "apet"):
        assert f"--{flag}" in actions


@pytest.mark.parametrize("spelling", ["--num-beams", "--num_beams"])
def test_flags_take_both_spellings(spelling):
    assert model_vqa_loader.parser().parse_args([spelling, "3"]).num_beams == 3


class TestRunLlava:
    def ask(self, *flags: str, image: str = "image_a.png", query: str = QUESTION) -> str:
        arguments = ["--model-path", MODEL, "--image-file", str(TINY / "images" / image), "--query", query]
        arguments += [
            "--temperature",
            "0",
            "--max_new_tokens",
            "12",
            "--device",
            "cpu",
            "--conv-mode",
            "vicuna_v1",
            *flags,
        ]
        return run_llava.eval_model(run_llava.parser().parse_args(arguments))

    def test_answers_like_the_loader(self, questions, capsys):
        _, path = loader(questions, "answers.jsonl", *COMPRESSED, "--limit", "1")
        assert self.ask(*COMPRESSED) == rows(path)[0]["text"]
        assert "[WARNING] the auto inferred conversation mode is llava_v1" in capsys.readouterr().out

    def test_old_argument_objects_still_work(self):
        class Args:
            model_path, model_base, query, conv_mode, sep = MODEL, None, QUESTION, None, ","
            image_file = str(TINY / "images" / "image_a.png")
            temperature, top_p, num_beams, max_new_tokens = 0, None, 1, 4

        arguments = type("Namespace", (), {})()
        for name in ("model_path", "model_base", "query", "conv_mode", "sep", "image_file"):
            setattr(arguments, name, getattr(Args, name))
        for name in ("temperature", "top_p", "num_beams", "max_new_tokens"):
            setattr(arguments, name, getattr(Args, name))
        assert isinstance(run_llava.eval_model(arguments), str)

    def test_several_images_and_placeholders(self, tmp_path):
        both = ",".join(str(TINY / "images" / name) for name in ("image_a.png", "image_b.png"))
        query = "First <image-placeholder> then <image-placeholder>: which?"
        arguments = ["--model-path", MODEL, "--image-file", both, "--query", query, "--temperature", "0"]
        arguments += ["--max_new_tokens", "4", "--device", "cpu", *COMPRESSED]
        assert isinstance(run_llava.eval_model(run_llava.parser().parse_args(arguments)), str)

    def test_a_missing_image_is_named(self):
        with pytest.raises(ValueError, match="nowhere.png"):
            self.ask(image="nowhere.png")


class TestChat:
    def talk(self, monkeypatch, capsys, *lines: str, flags=()) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        arguments = ["--model-path", MODEL, "--image-file", str(TINY / "images" / "image_a.png"), "--device", "cpu"]
        arguments += ["--temperature", "0", "--max-new-tokens", "6", "--conv-mode", "vicuna_v1", *flags]
        cli.chat(cli.parser().parse_args(arguments))
        return capsys.readouterr().out

    def test_two_turns_with_a_clean_history(self, monkeypatch, capsys):
        out = self.talk(monkeypatch, capsys, "What is this?", "And this?", "", flags=["--debug", *COMPRESSED])
        assert out.rstrip().endswith("exit...") and out.count("ASSISTANT: ") >= 2
        second = out.split("{'prompt':")[2]
        assert second.count("<image>") == 1 and "<s>" not in second and "</s></s>" not in second

    def test_markers_that_do_not_fit_are_named_and_the_chat_goes_on(self, monkeypatch, capsys):
        out = self.talk(monkeypatch, capsys, "<image> <image>", "Is <image> red?", "And <image> now?", "And now?", "")
        assert "<image> 2 times for 1 picture" in out and "<image> 1 times for 0 pictures" in out
        assert out.count("ASSISTANT: ") == 2 and out.rstrip().endswith("exit...")

    def test_end_of_input_ends_the_chat(self, monkeypatch, capsys):
        assert "exit..." in self.talk(monkeypatch, capsys)


def test_mmbench_and_science_programs(tmp_path):
    import base64

    picture = base64.b64encode((TINY / "images" / "image_a.png").read_bytes()).decode()
    table = tmp_path / "mm.tsv"
    table.write_text(f"index\tquestion\thint\tA\tB\tC\tD\timage\n5\tWhich?\t\tx\ty\t\t\t{picture}\n")
    common = [
        "--model-path",
        MODEL,
        "--device",
        "cpu",
        "--temperature",
        "0",
        "--max_new_tokens",
        "3",
        "--num_workers",
        "0",
    ]
    answers = str(tmp_path / "mm.jsonl")
    flags = [
        "--question-file",
        str(table),
        "--answers-file",
        answers,
        "--all-rounds",
        "--single-pred-prompt",
        "--lang",
        "cn",
    ]
    assert main(model_vqa_mmbench.parser(), [*common, *flags, *COMPRESSED], model_vqa_mmbench.read) == 0
    lines = rows(Path(answers))
    assert [line["round_id"] for line in lines] == [0, 1] and lines[1]["option_char"] == ["B", "A"]

    (tmp_path / "12").mkdir()
    Image.new("P", (30, 20), 3).save(tmp_path / "12" / "image.png")
    turn = [{"from": "human", "value": "<image>\nWhich?\nA. x\nB. y"}, {"from": "gpt", "value": "A"}]
    problems = [{"id": "12", "image": "image.png", "conversations": turn}, {"id": "13", "conversations": turn}]
    problems[1]["conversations"] = [{"from": "human", "value": "Why?\nA. x"}, turn[1]]
    (tmp_path / "sqa.json").write_text(json.dumps(problems))
    answers = str(tmp_path / "sqa.jsonl")
    flags = ["--question-file", str(tmp_path / "sqa.json"), "--answers-file", answers, "--image-folder", str(tmp_path)]
    flags += ["--single-pred-prompt", "--batch_size", "2", "--conv-mode", "vicuna_v1"]
    assert main(model_vqa_science.parser(), [*common, *flags, *COMPRESSED], model_vqa_science.read) == 0
    assert [line["prompt"].startswith("<image>\n") for line in rows(Path(answers))] == [True, False]
