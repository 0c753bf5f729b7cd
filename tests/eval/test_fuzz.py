"""Any bytes and any flags: an answer or one sentence, never a traceback.

Question files go through the command lines to a server on localhost; flags too, and those of a model in this process up
to where it would be loaded.
"""

import json
import random

import pytest
from fake_endpoint import FakeEndpoint, Reply, message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import noise

from apet.eval.benchmarks import available_benchmarks, get_benchmark
from apet.eval.benchmarks.video_qa import VideoQa
from apet.eval.scoring_cli import run
from llava.eval import model_vqa_loader, model_vqa_mmbench, model_vqa_science, program, run_llava


def examples(count: int) -> settings:
    """So many examples, the same in every run; a run of a program takes longer than hypothesis expects."""
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


pytestmark = pytest.mark.slow

PROGRAMS = {"jsonl": model_vqa_loader, "tsv": model_vqa_mmbench, "json": model_vqa_science}

texts = st.text(st.characters(codec=None), max_size=12) | st.sampled_from(
    ["<image>", "<image> <image>", "p.png", "../p"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
KEYS = ("question_id", "image", "text", "id", "conversations", "value", "video_name", "question", "category")


def objects(inner: st.SearchStrategy = values) -> st.SearchStrategy:
    """Objects with the keys of question files, mostly of plausible values."""
    likely = {"question_id": st.integers(0, 3) | inner, "image": st.just("p.png") | inner, "text": texts | inner}
    return st.fixed_dictionaries(likely) | st.dictionaries(st.sampled_from(KEYS) | texts, inner, max_size=5)


def dumped(value: object) -> bytes:
    return json.dumps(value).encode()


rows_of_json = st.lists(objects(), max_size=4).map(lambda rows: b"\n".join(map(dumped, rows)))
turns = st.lists(st.fixed_dictionaries({"value": texts | values}) | values, max_size=2)
science = st.lists(
    st.fixed_dictionaries({"id": texts | values, "conversations": turns | values}) | objects(), max_size=3
)
header = st.just("index\tquestion\thint\tA\tB\tC\tD\timage\n")
tables = st.tuples(header, st.text(st.sampled_from("12²\t\nab,\"'é\0="), max_size=60)).map("".join).map(str.encode)
contents = st.one_of(st.binary(max_size=80), rows_of_json, science.map(dumped), values.map(dumped), tables)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    noise((4, 3)).save(root / "p.png")
    return root


@pytest.fixture(scope="module")
def server():
    with FakeEndpoint(lambda body: Reply(body=message("ok"))) as server:
        yield server


def outcome(capsys, command, argv: list[str]) -> int:
    """Exit status; fails unless there is an answer, or one sentence on stderr."""
    capsys.readouterr()
    try:
        status = command(argv)
    except SystemExit as ended:  # of argparse, which prints how the program is used before its sentence
        status = ended.code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert status == 0 or said.rstrip("\n").rpartition("\n")[2].count("error: ") >= 1
    return status


@pytest.mark.parametrize("kind", PROGRAMS)
def test_any_question_file(kind, folder, server, capsys):
    module = PROGRAMS[kind]
    seen = set()

    @examples(120)
    @given(contents, st.sampled_from(["stop", "skip"]))
    def check(content: bytes, on_error: str) -> None:
        path, answers = folder / f"q.{kind}", folder / f"{kind}-{random.getrandbits(64)}.jsonl"
        path.write_bytes(content)
        argv = ["--question-file", str(path), "--image-folder", str(folder), "--answers-file", str(answers)]
        argv += ["--server", server.url, "--num_workers", "0", "--on_error", on_error]
        read = getattr(module, "read", None)
        status = outcome(capsys, lambda words: program.main(module.parser(), words, read), argv)
        seen.add(status)
        if status == 0:
            record = json.loads(answers.with_suffix(".run.json").read_text())
            count = len(answers.read_text().splitlines())
            assert record["status"] == "complete" and count + len(record["failures"]) == record["questions"]

    check()
    assert 1 in seen


@pytest.mark.parametrize("name", available_benchmarks())
def test_every_reader_refuses_with_a_sentence(name, tmp_path):
    benchmark = get_benchmark(name)
    path, truth = tmp_path / "q", tmp_path / "a"

    @examples(80)
    @given(contents, contents)
    def check(content: bytes, answers: bytes) -> None:
        path.write_bytes(content)
        truth.write_bytes(answers)
        try:
            questions = benchmark.read(path, truth) if isinstance(benchmark, VideoQa) else benchmark.read(path)
        except ValueError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error)
        else:
            assert questions and all(isinstance(one.prompt, str) for one in questions)
            for one in questions:
                json.dumps(benchmark.answer_line(one, "x", answer_id="1", model_id="m")).encode()

    check()


NUMBERS = st.sampled_from(
    ["nan", "inf", "-inf", "-1", "0", "1", "0.5", "1e400", "9" * 30, "9" * 5000, "", "x", "½", "1_0"]
)
WORDS = st.sampled_from(["", "auto", "none", "apet", "apet_plus:quota=nan", "apet_plus:rounds=" + "9" * 400, "random:x",
                         "[1]", "[[1]]", "[nan]", "[" * 300, "{", "None", "~nobody-here", "é", "\ud800", "cuda:7",
                         "http://[::1", "http://x:99999", "msvd", "mmbench"])  # fmt: skip


def flag_words(parser) -> st.SearchStrategy:
    """Up to four flags of a parser with values of any kind."""
    actions = [one for one in parser._actions if one.option_strings and one.dest not in ("help", "server")]
    one = st.sampled_from(actions).flatmap(
        lambda action: (
            st.tuples(st.sampled_from(action.option_strings), NUMBERS | WORDS | texts)
            if action.nargs != 0
            else st.tuples(st.sampled_from(action.option_strings))
        )
    )
    whole = st.lists(one, max_size=4).map(lambda flags: [word for flag in flags for word in flag])
    return whole | whole.map(lambda words: ["=".join(words[:2]), *words[2:]])


class Loaded(Exception):
    """All flags were accepted: the checkpoint would be loaded now."""


def stop(*args, **kwargs):
    raise Loaded


@pytest.mark.parametrize("served", [True, False], ids=["server", "model"])
def test_any_flags(served, folder, server, capsys, monkeypatch):
    # Not from the file system: a random word may be a folder there. Devices are checked before anything is read.
    monkeypatch.setattr("llava.model.builder.read_config", stop)
    monkeypatch.chdir(folder)
    (folder / "q.jsonl").write_bytes(dumped({"question_id": 1, "image": "p.png", "text": "?"}))
    parser = model_vqa_loader.parser()
    loaded = []

    @examples(200)
    @given(flag_words(parser))
    def check(words: list[str]) -> None:
        answers = f"{random.getrandbits(64)}.jsonl"
        argv = ["--question-file", "q.jsonl", "--answers-file", answers, "--num_workers", "0", "--temperature", "0"]
        argv += ["--server", server.url] * served
        try:
            outcome(capsys, lambda given: program.main(parser, given), [*argv, *words])
        except Loaded:
            loaded.append(words)

    check()
    assert bool(loaded) != served


def test_any_flags_of_run_llava(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llava.model.builder.read_config", stop)
    noise().save(tmp_path / "p.png")
    loaded = []

    @examples(120)
    @given(flag_words(run_llava.parser()))
    def check(words: list[str]) -> None:
        argv = ["--image-file", str(tmp_path / "p.png"), "--query", "?", "--model-path", "x", *words]
        try:
            outcome(capsys, lambda given: run(run_llava.parser(), run_llava._ask, given), argv)
        except Loaded:
            loaded.append(words)

    check()
    assert loaded
