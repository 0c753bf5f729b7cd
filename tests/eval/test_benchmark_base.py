"""Reading questions and answers, the answer line, the registry, and what broken files are told."""

import json
import os

import pytest

from apet.eval import benchmarks
from apet.eval.benchmarks import files
from apet.eval.benchmarks.base import Benchmark, Question, register
from apet.eval.scoring_cli import Parser

ROW = {"question_id": 7, "image": "a/b.jpg", "text": "what?\nAnswer shortly."}


def test_reads_the_common_format(save):
    path = save("q.jsonl", [ROW, {**ROW, "question_id": "x8", "category": "c"}])
    first, second = benchmarks.get_benchmark("vqa").read(path)
    assert first == Question(7, text=ROW["text"], prompt=ROW["text"], image="a/b.jpg")
    assert second.question_id == "x8"


def test_line_separators_inside_text_and_byte_order_marks_are_kept_apart(save):
    path = save("q.jsonl", "\ufeff" + json.dumps({**ROW, "text": "a\u2028b"}, ensure_ascii=False) + "\r\n\n")
    assert [question.text for question in benchmarks.get_benchmark("vqa").read(path)] == ["a\u2028b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(ROW) + "\n\n{oops\n", r"q\.jsonl line 3: not JSON .*oops"),
        ("[1]\n", "line 1: expected a JSON object, got list"),
        (json.dumps({"question_id": 1, "text": "t"}), "line 1: no 'image' .keys there: question_id, text"),
        (json.dumps({**ROW, "question_id": 1.5}), "line 1: 'question_id' is 1.5, expected int or str"),
        (json.dumps({**ROW, "question_id": True}), "'question_id' is True"),
        (json.dumps({**ROW, "text": None}), "line 1: 'text' is None, expected str"),
        (json.dumps({**ROW, "image": ["a"]}), "'image' is .*expected str"),
        (f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n", "line 2: question_id 7 with the same text is already on line 1"),
        ("\n \n", r"q\.jsonl is empty"),
    ],
)
def test_broken_question_files_are_named_with_the_line(save, content, message):
    with pytest.raises(ValueError, match=message):
        benchmarks.get_benchmark("vqa").read(save("q.jsonl", content))


def test_a_repeated_id_with_another_text_is_no_error(save):
    path = save("q.jsonl", [ROW, {**ROW, "text": "other?"}])
    assert len(benchmarks.get_benchmark("vqa").read(path)) == 2


def test_binary_files_are_not_questions(tmp_path):
    (tmp_path / "q.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        benchmarks.get_benchmark("vqa").read(tmp_path / "q.jsonl")


def test_answer_line_has_the_published_key_order():
    benchmark = benchmarks.get_benchmark("gqa")
    line = benchmark.answer_line(Question("1", "t", "t", "i"), "yes", answer_id="abc", model_id="toy")
    assert list(line) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert line["prompt"] == "t" and line["text"] == "yes" and line["metadata"] == {}


def test_registry_refuses_bad_names_and_suggests():
    with pytest.raises(ValueError, match="did you mean 'textvqa'.*available: .*gqa"):
        benchmarks.get_benchmark("texvqa")
    assert benchmarks.get_benchmark("GQA").name == "gqa"

    class Upper(Benchmark):
        name = "Upper"

    with pytest.raises(ValueError, match="lower-case"):
        register(Upper)
    with pytest.raises(ValueError, match="not taken"):
        register(type(benchmarks.get_benchmark("gqa")))


def test_a_benchmark_without_scorer_says_which_have_one():
    with pytest.raises(ValueError, match="vqa has no local scorer.*gqa"):
        benchmarks.get_benchmark("vqa").score()


def test_repeated_answers_are_refused_or_the_last_wins(save):
    path = save("a.jsonl", [{"question_id": 1, "text": "old"}, {"question_id": "1", "text": "new"}])
    with pytest.raises(ValueError, match="'1' is answered twice, at 1 and 2"):
        files.read_answers(path)
    assert files.read_answers(path, "last")["1"]["text"] == "new"
    with pytest.raises(ValueError, match="duplicates='first' is not one of error, last"):
        files.read_answers(path, "first")


def test_incomplete_answers_are_refused():
    with pytest.raises(ValueError, match="no answer for 2 of the 3 questions of Q: '2', '3'"):
        files.require_complete(["1", "2", "3"], ["1"], "A", "Q")
    with pytest.raises(ValueError, match="none of the 2 questions.*another split"):
        files.require_complete(["1", "2"], ["8"], "A", "Q")
    with pytest.raises(ValueError, match="answers 1 questions that Q does not have: '2'"):
        files.require_complete(["1"], ["1", "2"], "A", "Q")
    files.require_complete(["1"], ["1", "2"], "A", "Q", exact=False)


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "new" / "s.json"
    files.write_json_atomic(path, {"a": 1})
    with pytest.raises(UnicodeEncodeError):
        files.write_text_atomic(path, "\ud800")

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        files.write_json_atomic(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(path.parent) == ["s.json"]


def test_flags_are_taken_with_dash_and_underscore():
    parser = Parser()
    group = parser.add_argument_group("g").add_mutually_exclusive_group()
    group.add_argument("--answers-file")
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--mapSize", type=int)
    for words in (["--answers-file", "a_b", "--top_p=0.5"], ["--answers_file", "a_b", "--top-p=0.5"]):
        args = parser.parse_args([*words, "--mapSize", "3"])
        assert (args.answers_file, args.top_p, args.mapSize) == ("a_b", 0.5, 3)
    with pytest.raises(SystemExit):
        parser.parse_args(["--answers_fil_e", "x"])
