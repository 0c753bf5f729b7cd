"""A miniature of every benchmark in its published layout, and scripts run on it with the tiny golden checkpoint."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from forking_python import forking_python
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests/golden/end_to_end/llava-v1.5-tiny"
SHORT = "\nAnswer the question using a single word or phrase."
MME_CATEGORIES = (
    "existence count position color posters celebrity scene landmark artwork OCR "
    "commonsense_reasoning numerical_calculation text_translation code_reasoning"
).split()


@dataclass(frozen=True)
class Outcome:
    """How a script ended."""

    status: int
    out: str
    err: str


def script_environment(data: Path, **settings: object) -> dict[str, str]:
    """Environment of a script: nothing of the caller's settings, one thread, no worker processes."""
    kept = {
        name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV")
    }
    base = {
        "PYTHON": sys.executable, "DATA": data, "MODEL": MODEL, "NUM_WORKERS": 0, "BATCH_SIZE": 14, "DEVICE": "cpu",
        "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    return kept | {name: str(value) for name, value in (base | settings).items()}


def start_script(name: str, data: Path, *arguments: str, **settings: object) -> subprocess.Popen:
    """Start `scripts/<name>.sh` in a process group of its own."""
    return subprocess.Popen(
        ["bash", str(ROOT / f"scripts/{name}.sh"), *arguments], cwd=data, env=script_environment(data, **settings),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # Tests that run in the background ignore Ctrl-C, and a program would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def run_script(name: str, data: Path, *arguments: str, **settings: object) -> Outcome:
    """Run `scripts/<name>.sh` to its end, with answers of two tokens; programs are forked unless PYTHON is given."""
    settings = {"PYTHON": forking_python()} | settings
    process = start_script(name, data, *arguments, "--max_new_tokens", "2", **settings)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        kill_group(process)
    return Outcome(process.returncode, out, err)


def kill_group(process: subprocess.Popen) -> None:
    """SIGKILL for a script and everything it started, as far as it is still there."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


@pytest.fixture
def data(tmp_path) -> Path:
    """A miniature of its own for a test that changes it."""
    return write_miniature(tmp_path / "eval")


def write_miniature(root: Path) -> Path:
    """All nine benchmarks, a few questions each; returns the folder that DATA names."""
    for write in (_gqa, _pope, _textvqa, _mme, _mmbench, _scienceqa, _vizwiz, _vqav2):
        write(root)
    return root


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A picture with a slope and a block, another one for every seed."""
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    image.paste((40 * seed % 256, 90 * seed % 256, 200), (seed % 30, 5, seed % 30 + 20, 30))
    return image


def save_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path)


def save(path: Path, content: object) -> None:
    """A JSON file, or JSON lines if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content), encoding="utf-8"
    )


def _rows(questions: list[tuple[object, str, str]], category: str = "default") -> list[dict]:
    keys = ("question_id", "image", "text")
    return [dict(zip(keys, question, strict=True)) | {"category": category} for question in questions]


def _gqa(root: Path) -> None:
    folder, asked, answers = root / "gqa", [], {}
    for index in range(6):
        save_picture(folder / "images" / f"n{index // 2}.jpg", index // 2)
        key, text = f"2010{index}", ("Is the block blue?", "What is on the left?")[index % 2]
        asked.append((key, f"n{index // 2}.jpg", text + SHORT))
        answers[key] = {
            "question": text, "answer": ("yes", "block")[index % 2], "isBalanced": index < 5,
            "types": {"structural": ("verify", "query")[index % 2], "semantic": "attr", "detailed": "x"},
            "semantic": [{"operation": "select", "argument": "block", "dependencies": []}],
            "groups": {"global": "color" if index % 2 else None, "local": "1"},
        }  # fmt: skip
    save(folder / "llava_gqa_testdev_balanced.jsonl", _rows(asked))
    save(folder / "testdev_balanced_questions.json", answers)


def _pope(root: Path) -> None:
    folder, asked = root / "pope", []
    for number, split in enumerate(("adversarial", "popular", "random")):
        labels = []
        for index in range(2):
            image, text = f"COCO_val2014_{index:012d}.jpg", f"Is there a {('dog', 'cup')[index]} in the image?"
            save_picture(folder / "val2014" / image, index)
            asked += _rows([(number * 10 + index, image, text + SHORT)], split)
            labels.append({"question_id": index, "image": image, "text": text, "label": ("yes", "no")[index]})
        save(folder / "coco" / f"coco_pope_{split}.jsonl", labels)
        (folder / "coco" / f"coco_pope_{split}.jsonl").rename(folder / "coco" / f"coco_pope_{split}.json")
    save(folder / "llava_pope_test.jsonl", asked)


def _textvqa(root: Path) -> None:
    folder, asked, truth = root / "textvqa", [], []
    for index, (image, text) in enumerate(
        [("a1", "what does it say?"), ("a1", "which number?"), ("b2", "what brand?")]
    ):
        save_picture(folder / "train_images" / f"{image}.jpg", index)
        asked.append((image, f"{image}.jpg", f"{text}\nReference OCR token: stop, 12{SHORT}"))
        truth.append({"question_id": index, "image_id": image, "question": text, "answers": ["stop"] * 10})
    save(folder / "llava_textvqa_val_v051_ocr.jsonl", _rows(asked))
    save(folder / "TextVQA_0.5.1_val.json", {"dataset_name": "textvqa", "data": truth})


def _mme(root: Path) -> None:
    folder, asked = root / "MME", []
    release = folder / "MME_Benchmark_release_version" / "MME_Benchmark"
    for seed, category in enumerate(MME_CATEGORIES):
        # Two layouts of one release: with and without folders of images and of questions.
        images, truth = ("images", "questions_answers_YN") if seed % 2 else ("", "")
        save_picture(release / category / images / "0001.jpg", seed)
        pairs = [("Is this a cat?", "Yes"), ("Is this a dog?", "No")]
        (release / category / truth).mkdir(exist_ok=True)
        lines = [f"{question} Please answer yes or no.\t{answer}\n" for question, answer in pairs]
        (release / category / truth / "0001.txt").write_text("".join(lines))
        image = "/".join(filter(None, [category, images, "0001.jpg"]))
        asked += _rows([(image, image, question + SHORT) for question, _ in pairs], category)
    save(folder / "llava_mme.jsonl", asked)


def _mmbench(root: Path) -> None:
    columns = "index question hint A B C D answer category image source l2-category comment split".split()
    for name, question in (("mmbench_dev_20230712", "Which one is it?"), ("mmbench_dev_cn_20231003", "这是哪一个？")):
        lines = ["\t".join(columns)]
        for index, options in ((7, "cat dog"), (8, "red green blue")):
            for turn in range(2):
                words = options.split()
                turned = (words[turn:] + words[:turn] + ["", ""])[:4]
                image = io.BytesIO()
                picture(index).save(image, "JPEG")
                cells = [str(index + turn * 1_000_000), question, "", *turned, "AB"[turn], "kind",
                         base64.b64encode(image.getvalue()).decode(), "x", "level", "", "dev"]  # fmt: skip
                lines.append("\t".join(cells))
        path = root / "mmbench" / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _scienceqa(root: Path) -> None:
    folder, asked, problems = root / "scienceqa", [], {}
    for index, has_image in enumerate((True, False, True)):
        value = ("<image>\n" if has_image else "") + "Context: N/A\nWhich is it?\nA. a cat\nB. a dog"
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "The answer is A."}]
        asked.append({"id": str(index), "conversations": turns})
        problems[str(index)] = {"question": "Which is it?", "choices": ["a cat", "a dog"], "answer": 0, "split": "test"}
        if has_image:
            asked[-1]["image"] = f"{index}/image.png"
            save_picture(folder / "images" / "test" / str(index) / "image.png", index)
    save(folder / "llava_test_CQM-A.json", asked)
    save(folder / "problems.json", problems)
    save(folder / "pid_splits.json", {"train": [], "test": list(problems)})


def _vizwiz(root: Path) -> None:
    folder, asked = root / "vizwiz", []
    instruction = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    for index in range(3):
        image = f"VizWiz_test_{index:08d}.jpg"
        save_picture(folder / "test" / image, index)
        asked.append((index, image, "What is this? " + instruction + SHORT))
    save(folder / "llava_test.jsonl", _rows(asked))


def _vqav2(root: Path) -> None:
    folder, asked = root / "vqav2", []
    for index in range(5):
        image = f"COCO_test2015_{index // 2:012d}.jpg"
        save_picture(folder / "test2015" / image, index // 2)
        asked.append((index, image, f"How many blocks, question {index}?{SHORT}"))
    save(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", _rows(asked[1:4]))
    save(folder / "llava_vqav2_mscoco_test2015.jsonl", _rows(asked))


def read_lines(path: Path) -> list[dict]:
    """Rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def benchmark_scripts() -> Iterator[tuple[str, str]]:
    """(family, name) of every benchmark script in the tree."""
    for path in sorted((ROOT / "scripts").glob("[!_]*/[!_]*.sh")):
        yield path.parent.name, path.stem
