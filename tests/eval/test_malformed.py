"""Malformed inputs of the command lines, and the one sentence that each gets.

Every case is a question file, a picture or a flag; the sentence is all that stands behind "error:" on stderr, with the
test's folder written as DIR. A question that cannot be asked is skipped and recorded with `--on_error skip`.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_endpoint import FakeEndpoint, Reply, message
from pictures import encoded, floats, noise, png
from PIL import Image

from apet.eval.endpoint import KEY_VARIABLE
from apet.eval.scoring_cli import run
from llava.eval import model_vqa_loader, model_vqa_mmbench, model_vqa_science, run_llava
from llava.eval.program import main
from llava.model import builder

TINY = Path(__file__).resolve().parents[1] / "golden" / "end_to_end" / "llava-v1.5-tiny"
ROW = {"question_id": 1, "image": "p.png", "text": "What?"}


@dataclass(frozen=True)
class Case:
    """A malformed input.

    Attributes:
        sentence: What it gets.
        make: Writes the input into the folder; returns flags that differ.
        program: Which program reads it.
        served: Answered by a server; otherwise by the tiny checkpoint.
        skipped: With `--on_error skip` the run goes on and records the sentence.
        status: Exit status.
        environment: Variables set.
    """

    sentence: str
    make: Callable[[Path], list[str] | None] = lambda folder: None
    program: object = model_vqa_loader
    served: bool = True
    skipped: bool = False
    status: int = 1
    environment: dict[str, str] = field(default_factory=dict)


def lines(*rows: object) -> Callable[[Path], None]:
    """A question file of these rows; text is written as it is."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return lambda folder: (folder / "q.jsonl").write_text(text) and None


def raw(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "q.jsonl").write_bytes(content) and None


def row(**changes: object) -> Callable[[Path], None]:
    return lines(ROW | changes)


def picture(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "images/p.png").write_bytes(content) and None


def flags(*words: str) -> Callable[[Path], list[str]]:
    return lambda folder: [word.replace("DIR", str(folder)) for word in words]


def table(index: str = "1", image: str = "", columns: str = "index\tquestion\thint\tA\tB\tC\tD\timage"):
    image = image or "aGVsbG8="
    return raw(f"{columns}\n{index}\tWhich?\t\tx\ty\t\t\t{image}\n".encode())


def science(entries: object) -> Callable[[Path], None]:
    return raw(json.dumps(entries).encode())


def linked(folder: Path) -> None:
    (folder / "images/p.png").unlink()
    (folder / "images/p.png").symlink_to(folder / "secret.png")


def pipe(folder: Path) -> None:
    (folder / "images/p.png").unlink()
    os.mkfifo(folder / "images/p.png")


def ask(*words: str) -> Callable[[Path], list[str]]:
    """Flags of run_llava."""
    return flags("--model-path", str(TINY), "--image-file", "DIR/images/p.png", "--query", "What?", *words)


def ask_about(content: bytes) -> Callable[[Path], list[str]]:
    return lambda folder: [picture(content)(folder), ask()(folder)][1]


CASES: dict[str, Case] = {
    "question file that is not there": Case(
        "[Errno 2] No such file or directory: 'DIR/none.jsonl'",
        make=flags("--question-file", "DIR/none.jsonl"),
    ),
    "empty question file": Case(
        "DIR/q.jsonl is empty: it holds no JSON line",
        make=raw(b""),
    ),
    "question file of another encoding": Case(
        "DIR/q.jsonl is not UTF-8 text (byte 0): is it the right file?",
        make=raw("ä".encode("utf-16")),
    ),
    "question file of zeros": Case(
        "DIR/q.jsonl line 1: not JSON (Expecting value at column 1): "
        "'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00'; mend or delete the line (--resume answers again what an "
        "interrupted run left half written)",
        make=raw(bytes(9)),
    ),
    "line that is no JSON": Case(
        "DIR/q.jsonl line 1: not JSON (Expecting property name enclosed in double quotes at column 19): "
        "'{\"question_id\": 1,'; mend or delete the line (--resume answers again what an interrupted run left half "
        "written)",
        make=lines('{"question_id": 1,'),
    ),
    "line that is a list": Case(
        "DIR/q.jsonl line 1: expected a JSON object, got list: '[1]'; mend or delete the line (--resume answers "
        "again what an interrupted run left half written)",
        make=lines([1]),
    ),
    "line without an image": Case(
        "DIR/q.jsonl line 1: no 'image' (keys there: question_id, text)",
        make=lines({"question_id": 1, "text": "?"}),
    ),
    "line with a key of two lines": Case(
        "DIR/q.jsonl line 1: no 'question_id' and no 'image' (keys there: text, a\\nb)",
        make=lines({"text": "?", "a\nb": 1}),
    ),
    "question_id true": Case(
        "DIR/q.jsonl line 1: 'question_id' is True, expected int or str",
        make=row(question_id=True),
    ),
    "question_id null": Case(
        "DIR/q.jsonl line 1: 'question_id' is None, expected int or str",
        make=row(question_id=None),
    ),
    "text that is a number": Case(
        "DIR/q.jsonl line 1: 'text' is 5, expected str",
        make=row(text=5),
    ),
    "image that is a list": Case(
        "DIR/q.jsonl line 1: 'image' is ['p.png'], expected str",
        make=row(image=["p.png"]),
    ),
    "question twice": Case(
        "DIR/q.jsonl line 2: question_id 1 with the same text is already on line 1; remove one of the two lines",
        make=lines(ROW, ROW),
    ),
    "half a character": Case(
        'DIR/q.jsonl line 1: it holds \'\\ud800\', which is half a character: \'{"question_id": 1, "image": '
        '"p.png", "text": "\\\\ud800"}\'; mend or delete the line (--resume answers again what an interrupted run '
        "left half written)",
        make=lines('{"question_id": 1, "image": "p.png", "text": "\\ud800"}'),
    ),
    "number of 5000 digits": Case(
        'DIR/q.jsonl line 1: it holds a number of thousands of digits: \'{"question_id": '
        "1111111111111111111111111111111111111111111111111111111111111111...'; mend or delete the line (--resume "
        "answers again what an interrupted run left half written)",
        make=lines('{"question_id": ' + "1" * 5000 + "}"),
    ),
    "nested too deep": Case(
        "DIR/q.jsonl line 1: it is nested too deep: "
        "'[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[...'; mend or delete the "
        "line (--resume answers again what an interrupted run left half written)",
        make=lines("[" * 100_000),
    ),
    "picture that is not there": Case(
        "question 1: image file DIR/images/none.png does not exist (--image-folder DIR/images). Mend the file and "
        "continue with --resume, or leave such questions out with --on_error skip",
        make=row(image="none.png"),
        skipped=True,
    ),
    "picture that is a folder": Case(
        "question 1: image file DIR/images is not a regular file (--image-folder DIR/images). Mend the file and "
        "continue with --resume, or leave such questions out with --on_error skip",
        make=row(image="."),
        skipped=True,
    ),
    "picture that is a pipe": Case(
        "question 1: image file DIR/images/p.png is not a regular file (--image-folder DIR/images). Mend the file "
        "and continue with --resume, or leave such questions out with --on_error skip",
        make=pipe,
        skipped=True,
    ),
    "decompression bomb": Case(
        "question 1: image file DIR/images/p.png is too large to open: Image size (3600000000 pixels) exceeds "
        "limit of 178956970 pixels; scale it down. Mend the file and continue with --resume, or leave such "
        "questions out with --on_error skip",
        make=picture(png(60_000, 60_000)),
        skipped=True,
    ),
    "picture cut off": Case(
        "question 1: image file DIR/images/p.png cannot be decoded: image file is truncated. Mend the file and "
        "continue with --resume, or leave such questions out with --on_error skip",
        make=picture(encoded(noise())[:900]),
        skipped=True,
    ),
    "picture of no bytes": Case(
        "question 1: image file DIR/images/p.png is not an image PIL can read. Mend the file and continue with "
        "--resume, or leave such questions out with --on_error skip",
        make=picture(b""),
        skipped=True,
    ),
    "web page as a picture": Case(
        "question 1: image file DIR/images/p.png is not an image PIL can read. Mend the file and continue with "
        "--resume, or leave such questions out with --on_error skip",
        make=picture(b"<html>404</html>"),
        skipped=True,
    ),
    "floats without a white": Case(
        "question 1: image file DIR/images/p.png holds floating-point numbers from 0 to 300; only 0 to 1 has a "
        "known brightness: scale them, or save the picture with 8 bits. Mend the file and continue with --resume, "
        "or leave such questions out with --on_error skip",
        make=picture(encoded(floats(0, 300), "TIFF")),
        skipped=True,
    ),
    "integers without a white": Case(
        "question 1: image file DIR/images/p.png holds 32-bit integers, whose white is unknown; save it with 8 or "
        "16 bits. Mend the file and continue with --resume, or leave such questions out with --on_error skip",
        make=picture(encoded(Image.new("I", (4, 4), 70_000), "TIFF")),
        skipped=True,
    ),
    "picture above the image folder": Case(
        "question 1: image file DIR/images/../secret.png is DIR/secret.png, outside --image-folder DIR/images, and "
        "is not sent to the server; copy it into the folder, or give --allow-outside-pictures to send such files. "
        "Mend the file and continue with --resume, or leave such questions out with --on_error skip",
        make=row(image="../secret.png"),
        skipped=True,
    ),
    "picture by its absolute path": Case(
        "question 1: image file DIR/secret.png is DIR/secret.png, outside --image-folder DIR/images, and is not "
        "sent to the server; copy it into the folder, or give --allow-outside-pictures to send such files. Mend "
        "the file and continue with --resume, or leave such questions out with --on_error skip",
        make=lambda folder: row(image=str(folder / "secret.png"))(folder),
        skipped=True,
    ),
    "link to a picture outside": Case(
        "question 1: image file DIR/images/p.png is DIR/secret.png, outside --image-folder DIR/images, and is not "
        "sent to the server; copy it into the folder, or give --allow-outside-pictures to send such files. Mend "
        "the file and continue with --resume, or leave such questions out with --on_error skip",
        make=linked,
        skipped=True,
    ),
    "picture with a line end and a zero in its name": Case(
        "question 1: image file DIR/images/a\\n\\x00b does not exist (--image-folder DIR/images). Mend the file and "
        "continue with --resume, or leave such questions out with --on_error skip",
        make=row(image="a\n\0b"),
        skipped=True,
    ),
    "two <image> for one picture": Case(
        "question 1: the text has <image> 2 times for 1 picture; give one marker per picture, or none: '<image> or "
        "<image>?'. Mend the file and continue with --resume, or leave such questions out with --on_error skip",
        make=row(text="<image> or <image>?"),
        skipped=True,
    ),
    "table with a picture that is no base64": Case(
        "question 1: the image of question 1 is not base64: Only base64 data is allowed. Mend the file and "
        "continue with --resume, or leave such questions out with --on_error skip",
        make=table(image="%%%"),
        program=model_vqa_mmbench,
        skipped=True,
    ),
    "table without a column": Case(
        "DIR/q.jsonl has no column hint, A, B, C, D, image (columns: index, question)",
        make=table(columns="index\tquestion"),
        program=model_vqa_mmbench,
    ),
    "table with a column name of two lines": Case(
        "DIR/q.jsonl has no column question, hint, A, B, C, D, image (columns: index, a\\nb)",
        make=table(columns='index\t"a\nb"'),
        program=model_vqa_mmbench,
    ),
    "table with an index that is no number": Case(
        "DIR/q.jsonl line 2: index '²' is not a number",
        make=table(index="²"),
        program=model_vqa_mmbench,
    ),
    "table with a short row": Case(
        "DIR/q.jsonl line 2: the row has another number of cells than the header",
        make=raw(b"index\tquestion\thint\tA\tB\tC\tD\timage\n1\tWhich?\n"),
        program=model_vqa_mmbench,
    ),
    "ScienceQA entry that is a number": Case(
        "DIR/q.jsonl entry 1: expected a JSON object, got int",
        make=science([5]),
        program=model_vqa_science,
    ),
    "ScienceQA without turns": Case(
        "DIR/q.jsonl entry 1: 'conversations' is 5, expected list",
        make=science([{"id": "1", "conversations": 5}]),
        program=model_vqa_science,
    ),
    "ScienceQA image that is a number": Case(
        "DIR/q.jsonl entry 1: 'image' is 3, expected str",
        make=science([{"id": "1", "image": 3, "conversations": [{"value": "?"}]}]),
        program=model_vqa_science,
    ),
    "ScienceQA that is an object": Case(
        "DIR/q.jsonl: expected a non-empty JSON list of questions",
        make=science({}),
        program=model_vqa_science,
    ),
    "temperature nan": Case(
        "--temperature nan must be a number of at least 0; 0 is greedy",
        make=flags("--temperature", "nan"),
    ),
    "temperature inf": Case(
        "--temperature inf must be a number of at least 0; 0 is greedy",
        make=flags("--temperature", "inf"),
    ),
    "top_p 0": Case(
        "--top_p 0.0 must be a number above 0 and at most 1",
        make=flags("--top_p", "0"),
    ),
    "no new tokens": Case(
        "--max_new_tokens 0 must be at least 1",
        make=flags("--max_new_tokens", "0"),
    ),
    "no requests at a time": Case(
        "--concurrency 0 must be at least 1",
        make=flags("--concurrency", "0"),
    ),
    "limit 0": Case(
        "--limit 0 must be at least 1",
        make=flags("--limit", "0"),
    ),
    "batch of words": Case(
        "argument --batch_size: 'many' must be a number, or auto",
        make=flags("--batch_size", "many"),
        status=2,
    ),
    "seed below 0": Case(
        "seed=-1 must be an int of 0 .. 2**63 - 1",
        make=flags("--seed", "-1"),
    ),
    "ratio nan": Case(
        "image_token_ratio=nan must be a share in (0, 1]",
        make=flags("--image_token_ratio", "nan"),
        served=False,
    ),
    "error target nan": Case(
        "option error_target=nan of method 'apet_plus' must lie in [0, 1]",
        make=flags("--method", "apet_plus", "--apet", "error_target=nan"),
        served=False,
    ),
    "option inf": Case(
        "method 'apet_plus:ridge=inf': ridge is inf, expected a number of at most 1,000,000,000",
        make=flags("--method", "apet_plus:ridge=inf"),
        served=False,
    ),
    "list that is no list": Case(
        "--layer_list='16' is not a list; write it like '[16]'",
        make=flags("--layer_list", "16"),
        served=False,
    ),
    "benchmark of videos": Case(
        "--benchmark msvd is about videos; answer it with llava.eval.video_qa",
        make=flags("--benchmark", "msvd"),
    ),
    "benchmark of another file": Case(
        "--benchmark pope has other question files than this program reads, those of mmbench; answer it with "
        "llava.eval.model_vqa_loader",
        make=flags("--benchmark", "pope"),
        program=model_vqa_mmbench,
    ),
    "unknown benchmark": Case(
        "unknown benchmark 'pop' (did you mean 'pope'?); available: activitynet, gqa, llava_bench, mmbench, "
        "mmbench_cn, mme, mmvet, msrvtt, msvd, pope, scienceqa, seed, textvqa, tgif, vizwiz, vqa, vqav2",
        make=flags("--benchmark", "pop"),
    ),
    "unknown user's home": Case(
        "~nobody-here/a.jsonl: there is no user of that name; write the path out",
        make=flags("--answers-file", "~nobody-here/a.jsonl"),
    ),
    "address without a port": Case(
        "server URL 'http://localhost:99999' must look like http://localhost:8000/v1",
        make=flags("--server", "http://localhost:99999"),
    ),
    "key over plain http": Case(
        "the key in APET_API_KEY would travel unencrypted to http://192.0.2.1:8000/v1; use https, reach the server "
        "through a tunnel (ssh -L 8000:HOST:8000, http://localhost:8000), or unset APET_API_KEY",
        make=flags("--server", "http://192.0.2.1:8000"),
        environment={KEY_VARIABLE: "secret"},
    ),
    "outside pictures without a server": Case(
        "--allow-outside-pictures is about what is sent to a --server; leave it out without one",
        make=flags("--allow-outside-pictures"),
        served=False,
    ),
    "GPU that is not there": Case(
        "device 'cuda:7' is not there: torch sees cpu and no GPU; give another --device",
        make=flags("--device", "cuda:7"),
        served=False,
    ),
    "unknown device": Case(
        "device 'teapot' is not there: torch sees cpu and no GPU; give another --device",
        make=flags("--device", "teapot"),
        served=False,
    ),
    "quantisation without its package": Case(
        "load_8bit and load_4bit need the package bitsandbytes; install it, or leave them out",
        make=ask("--load-4bit"),
        program=run_llava,
    ),
    "run_llava and a bomb": Case(
        "image file DIR/images/p.png is too large to open: Image size (3600000000 pixels) exceeds limit of "
        "178956970 pixels; scale it down",
        make=ask_about(png(60_000, 60_000)),
        program=run_llava,
    ),
    "run_llava without a separator": Case(
        "--sep '' cannot separate image files; leave it out for a comma",
        make=ask("--sep", ""),
        program=run_llava,
    ),
    "run_llava at temperature nan": Case(
        "--temperature nan must be a number of at least 0; 0 is greedy",
        make=ask("--temperature", "nan"),
        program=run_llava,
    ),
    "run_llava and two markers": Case(
        "the text has <image> 2 times for 1 picture; give one marker per picture, or none: '<image> or <image>?'",
        make=ask("--query", "<image> or <image>?", "--device", "cpu"),
        program=run_llava,
    ),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A question about a picture, and a picture outside the image folder."""
    (tmp_path / "images").mkdir()
    noise().save(tmp_path / "images/p.png")
    noise().save(tmp_path / "secret.png")
    row()(tmp_path)
    return tmp_path


def answer(case: Case, folder: Path, *more: str) -> int:
    """Exit status of the case's program."""
    words = case.make(folder) or []
    if case.program is run_llava:
        return run(run_llava.parser(), run_llava._ask, [*words, *more])
    read = getattr(case.program, "read", None)
    common = ["--question-file", str(folder / "q.jsonl"), "--image-folder", str(folder / "images"), "--num_workers",
              "0", "--temperature", "0", "--answers-file", str(folder / "a.jsonl")]  # fmt: skip
    if not case.served:
        return main(case.program.parser(), [*common, "--model-path", str(TINY), *words, *more], read)
    with FakeEndpoint(lambda body: Reply(body=message("ok"))) as server:
        status = main(case.program.parser(), [*common, "--server", server.url, *words, *more], read)
        assert not server.chats()  # nothing of a malformed question is sent
    return status


def sentence(capsys, folder: Path) -> str:
    """What stands behind "error:" on the last line of stderr."""
    text = capsys.readouterr().err.replace(str(folder), "DIR")
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if "error: " in line]
    assert text.splitlines()[-1] == line
    return line.partition("error: ")[2]


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch):
    """Without a GPU and without bitsandbytes, whatever this one has."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    nothing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(builder, "importlib", nothing)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.mark.parametrize("name", CASES)
def test_the_sentence(name, folder, capsys, monkeypatch):
    case = CASES[name]
    for variable, value in case.environment.items():
        monkeypatch.setenv(variable, value)
    if case.status == 2:
        with pytest.raises(SystemExit) as ended:
            answer(case, folder)
        assert ended.value.code == 2
    else:
        assert answer(case, folder) == case.status
    assert sentence(capsys, folder) == case.sentence


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.skipped])
def test_skipped_questions_are_recorded_with_the_sentence(name, folder):
    assert answer(CASES[name], folder, "--on_error", "skip") == 0
    record = json.loads((folder / "a.run.json").read_text())
    (failure,) = record["failures"]
    said = failure["error"].replace(str(folder), "DIR")
    assert record["status"] == "complete" and f": {said}. " in CASES[name].sentence


def test_there_are_forty():
    assert len(CASES) >= 40
