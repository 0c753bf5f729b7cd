"""Benchmarks from parquet files: what is written is what the programs read, and what the scorers score."""

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from apet.eval import hub, suite
from apet.eval.benchmarks import get_benchmark
from apet.eval.benchmarks.mme import CATEGORIES
from apet.eval.recipes import FAMILIES

datasets = pytest.importorskip("datasets")

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "data/sample/model/llava-v1.5-sample"
SHORT = "\nAnswer the question using a single word or phrase."


def picture(name: str) -> dict:
    return {"bytes": b"\xff\xd8" + name.encode(), "path": f"{name}.jpg"}


def pope() -> list[list[dict]]:
    rows = []
    for split in ("random", "popular", "adversarial"):
        lines = (ROOT / f"data/sample/eval/pope/coco/coco_pope_{split}.json").read_text().splitlines()[:8]
        for one in map(json.loads, lines):
            name = Path(one["image"]).stem
            row = {"question": one["text"], "answer": one["label"], "category": split, "image_source": name}
            rows.append(row | {"image": picture(name)})
    return [rows]


def gqa() -> list[list[dict]]:
    questions = json.loads((ROOT / "data/sample/eval/gqa/testdev_balanced_questions.json").read_text())
    used = ("imageId", "question", "answer", "fullAnswer", "isBalanced", "types", "semantic", "groups")
    rows = [{"id": key} | {name: one[name] for name in used} for key, one in list(questions.items())[:12]]
    return [rows, [{"id": name, "image": picture(name)} for name in sorted({row["imageId"] for row in rows})]]


def textvqa() -> list[list[dict]]:
    rows = [
        {"question_id": 34602 + place, "image_id": name, "question": question, "answers": [answer] * 10,
         "ocr_tokens": tokens, "image": picture(name)}
        for place, (name, question, answer, tokens) in enumerate(
            (("a1", "what is the brand?", "dakota", ["DAKOTA", "digital"]), ("a1", "what year is it?", "2012", []),
             ("b2", "who wrote this?", "unanswerable", ["x"]))
        )
    ]  # fmt: skip
    return [rows]


def mme() -> list[list[dict]]:
    rows = [
        {"question_id": f"{category}/0001.png", "question": f"Is this a {what}? Please answer yes or no.",
         "answer": answer, "category": category, "image": picture(category)}
        for what, answer in (("cat", "Yes"), ("dog", "No")) for category in CATEGORIES
    ]  # fmt: skip
    return [rows]


def sqa() -> list[list[dict]]:
    common = {"question": "Which is it?", "choices": ["a cat", "a dog", "both"]}
    rows = [
        common | {"answer": 1, "hint": "Look.", "image": picture("one")},
        common | {"answer": 0, "hint": "", "image": None},
        common | {"answer": 2, "hint": "", "image": picture("three")},
    ]
    return [rows]


def mmbench(level: str = "l2-category", question: str = "Which one\nis it?") -> list[list[dict]]:
    rows = []
    for turn, options in enumerate((("cat", "dog"), ("dog", "cat"))):
        row = {"index": 7 + turn * 1_000_000, "question": question, "hint": "nan" if turn else None}
        row |= dict(zip("ABCD", (*options, None, None), strict=True)) | {"answer": "AB"[turn], "category": "kind"}
        rows.append(row | {level: "level", "split": "dev", "image": picture("cat")})
    return [rows]


def vizwiz() -> list[list[dict]]:
    names = [f"VizWiz_test_{number:08d}" for number in range(3)]
    return [[{"question_id": name, "question": "What is this? ", "image": picture(name)} for name in names]]


def vqav2() -> list[list[dict]]:
    rows = [
        {"question_id": 10 + number, "question": f"How many, {number}?", "image_id": number // 2,
         "image": picture(f"{number // 2}")}
        for number in range(5)
    ]  # fmt: skip
    return [rows[1:4], rows]


# Benchmark -> the rows of its parts, what its score can be at most (None: an upload), the answer to a question.
TABLE: dict[str, tuple[Callable[[], list[list[dict]]], float | None, Callable[[list[list[dict]], int], str]]] = {
    "gqa": (gqa, 100, lambda parts, place: parts[0][place]["answer"]),
    "mmbench": (mmbench, 100, lambda parts, place: parts[0][place]["answer"]),
    "mmbench_cn": (
        lambda: mmbench("L2-category", "这是哪一个？"), 100, lambda parts, place: parts[0][place]["answer"],
    ),
    "mme": (mme, 2000, lambda parts, place: ("Yes", "No")[place % 2]),
    "pope": (pope, 100, lambda parts, place: parts[0][place]["answer"]),
    "sqa": (sqa, 100, lambda parts, place: "ABC"[parts[0][place]["answer"]]),
    "textvqa": (textvqa, 100, lambda parts, place: parts[0][place]["answers"][0]),
    "vizwiz": (vizwiz, None, lambda parts, place: f"Answer {place}"),
    "vqav2": (vqav2, None, lambda parts, place: f"Answer {place}"),
}  # fmt: skip


def write_parts(folder: Path, benchmark: str, parts: Sequence[list[dict]]) -> Path:
    """Parquet files as the hub has them: placed by configuration and split, pictures declared as such."""
    for part, rows in zip(hub.SOURCES[benchmark].parts, parts, strict=True):
        table = datasets.Dataset.from_list(rows)
        if "image" in table.column_names:
            table = table.cast_column("image", datasets.Image())
        path = folder / (part.config or "data") / f"{part.split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(str(path))
    return folder


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def answered(monkeypatch):
    """Answers instead of a model, and the steps behind them in this process; what is answered can be set."""
    given: dict[str, Callable[[int], str]] = {}

    def run_chunks(chunks) -> bool:
        words = list(chunks[0].words)
        reading = {"single_pred_prompt": True} if "--single-pred-prompt" in words else {}
        name = words[words.index("--benchmark") + 1] if "--benchmark" in words else "scienceqa"
        benchmark = get_benchmark(name)
        questions = benchmark.read(words[words.index("--question-file") + 1], **reading)
        lines = [
            benchmark.answer_line(question, given["text"](place), answer_id="a", model_id="m")
            for place, question in enumerate(questions)
        ]
        chunks[0].answers.parent.mkdir(parents=True, exist_ok=True)
        chunks[0].answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return True

    def do(step) -> int:
        if step.words[0] == "ln":
            Path(step.words[3]).symlink_to(step.words[2])
            return 0
        return importlib.import_module(step.words[2]).main(list(step.words[3:]))

    monkeypatch.setattr(suite, "run_chunks", run_chunks)
    monkeypatch.setattr(suite, "_do", do)
    return given


@pytest.mark.parametrize("benchmark", TABLE)
def test_a_data_set_goes_through_the_question_file_to_the_scorer(benchmark, answered, tmp_path, capsys):
    make, most, answer = TABLE[benchmark]
    parts = make()
    folder = write_parts(tmp_path / "parquet", benchmark, parts)
    words = ["llava1_5", benchmark, "--data", str(tmp_path / "eval"), "--model", str(MODEL), "--experiment", "x"]
    answered["text"] = lambda place: answer(parts, place)
    assert suite.main([*words, "--dataset", str(folder)]) == 0, capsys.readouterr().err
    if most is None:
        (upload,) = (tmp_path / "eval").glob("*/answers_upload/**/x.json")
        rows = json.loads(upload.read_text())
        assert [row["answer"] for row in rows if row["answer"]] == ["answer 0", "answer 1", "answer 2"]
        return
    (file,) = (tmp_path / "eval").glob("**/*.score.json")
    assert json.loads(file.read_text())["value"] == most
    answered["text"] = lambda place: answer(parts, place) if place else "No"
    assert suite.main([*words, "--overwrite"]) == 0, capsys.readouterr().err
    assert json.loads(file.read_text())["value"] < most


def test_questions_are_those_that_were_published(tmp_path):
    texts, shown = {}, {}
    for benchmark, (make, _, _) in TABLE.items():
        folder = hub.write_benchmark(
            benchmark, tmp_path / "eval", str(write_parts(tmp_path / benchmark, benchmark, make()))
        )
        name = hub.find_data(benchmark)
        questions = get_benchmark(name.benchmark or benchmark).read(folder / name.files[0].path)
        texts[benchmark] = questions[0].text
        if name.images:
            shown[benchmark] = {
                one.image: (folder / name.images[0] / one.image).read_bytes() for one in questions if one.image
            }
    assert texts["gqa"] == "Is there a purple star in the image?" + SHORT
    assert texts["textvqa"] == "What is the brand?\nReference OCR token: DAKOTA, digital" + SHORT
    assert texts["mme"] == "Is this a cat?" + SHORT
    assert texts["sqa"] == "<image>\nContext: Look.\nWhich is it?\nA. a cat\nB. a dog\nC. both"
    assert texts["mmbench"] == "Which one\nis it?\nA. cat\nB. dog"
    assert texts["mmbench_cn"] == "这是哪一个？\nA. cat\nB. dog"
    assert texts["vqav2"] == "How many, 1?" + SHORT
    # A space behind the question is the data set's, as in the published file.
    unanswerable = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    assert texts["vizwiz"] == "What is this? " + unanswerable + SHORT
    assert shown["vqav2"] == {f"COCO_test2015_{one:012d}.jpg": picture(f"{one}")["bytes"] for one in (0, 1)}
    assert shown["sqa"] == {"1/image.png": picture("one")["bytes"], "3/image.png": picture("three")["bytes"]}
    assert all(data == picture(Path(name).stem)["bytes"] for name, data in shown["pope"].items())


@pytest.mark.parametrize("benchmark", TABLE)
def test_a_missing_column_is_refused(benchmark, tmp_path):
    parts = TABLE[benchmark][0]()
    for place, part in enumerate(hub.SOURCES[benchmark].parts):
        for column in part.columns:
            rows = [{name: value for name, value in row.items() if name != column} for row in parts[place]]
            folder = write_parts(tmp_path / f"{place}-{column}", benchmark, [*parts[:place], rows, *parts[place + 1 :]])
            other = next(name for name in part.columns if name != column)
            with pytest.raises(ValueError, match=f"has no column {column}; it has .*{other}"):
                hub.write_benchmark(benchmark, tmp_path / "eval", str(folder))


WRONG = (
    ("pope", 0, {"image_source": "../up"}, "'../up' cannot be part of a file name"),
    ("pope", 0, {"answer": "perhaps"}, "answer 'perhaps' must be yes or no"),
    ("pope", 0, {"category": "odd"}, "is not that of pope: .*coco_pope_random.json: missing"),
    ("gqa", 0, {"imageId": "other"}, "row 1: there is no picture of imageId 'other'"),
    ("gqa", 1, {"image": None}, "row 1: column image holds no encoded picture"),
    ("mme", 0, {"question_id": "1234"}, "row 1: question_id '1234' is no path category/picture"),
    ("mme", 0, {"question": "Is it?"}, "must end in 'Please answer yes or no.'"),
    ("sqa", 0, {"answer": 3}, "row 1: answer 3 of 3 choices; at most 5 are known"),
    ("textvqa", 0, {"question": None}, "row 1: question is None, expected text"),
    ("mmbench", 0, {"index": "a"}, "is not that of mmbench: .*index 'a' is not a number"),
    ("vizwiz", 0, {"question_id": "a/b"}, "'a/b' cannot be part of a file name"),
)


@pytest.mark.parametrize(("benchmark", "place", "change", "message"), WRONG)
def test_a_row_that_cannot_be_is_a_sentence(benchmark, place, change, message, tmp_path):
    parts = TABLE[benchmark][0]()
    text = isinstance(next(iter(change.values())), str)
    for number, row in enumerate(parts[place]):
        name = next(iter(change))
        if number == 0 or name == "category" or (text and not isinstance(row[name], str)):
            row.update(change)
    with pytest.raises(ValueError, match=message):
        hub.write_benchmark(benchmark, tmp_path / "eval", str(write_parts(tmp_path / "parquet", benchmark, parts)))


def test_what_cannot_be_read_is_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'msvd' is not read from data sets; known: gqa, mmbench"):
        hub.write_benchmark("msvd", tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"has no parquet file cn/\*\*/dev-\*.parquet"):
        hub.write_benchmark("mmbench_cn", tmp_path, str(tmp_path / "none"))
    with pytest.raises(ValueError, match="data set 'nobody/nothing' cannot be read"):
        hub.write_benchmark("pope", tmp_path, "nobody/nothing")
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install .apet"):
        hub.write_benchmark("pope", tmp_path)


def test_every_image_benchmark_of_the_command_has_a_data_set():
    known = {name for family in FAMILIES.values() for name in family.benchmarks}
    assert {name for name in known if not hub.find_data(name).videos} == set(hub.SOURCES) == set(TABLE)


def test_the_usual_data_set_is_the_one_of_a_flag_without_a_value(tmp_path, monkeypatch):
    asked = []

    def load(name, part, **options):
        asked.append(name)
        raise ValueError("enough")

    monkeypatch.setattr(hub, "_load", load)
    words = ["llava1_5", "textvqa", "--data", str(tmp_path), "--dataset"]
    assert (suite.main(words), suite.main([*words, "me/mine"])) == (1, 1)
    assert asked == ["lmms-lab/textvqa", "me/mine"]
