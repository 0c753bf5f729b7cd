"""The question-file programs against a chat server on localhost."""

import base64
import io
import json

import numpy as np
import pytest
from fake_endpoint import FakeEndpoint, Reply, message
from PIL import Image

from apet.eval.endpoint import KEY_VARIABLE
from llava.eval import model_vqa_loader, model_vqa_mmbench, model_vqa_science
from llava.eval.program import main


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture
def questions(tmp_path):
    """Nine questions about three pictures, and one without."""
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    rows = [{"question_id": n, "image": f"{n % 3}.png", "text": f"Question {n}?", "category": "x"} for n in range(9)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def picture_of(body) -> np.ndarray:
    """The pixels inside a request."""
    (part,) = (part for part in body["messages"][0]["content"] if part["type"] == "image_url")
    kind, _, data = part["image_url"]["url"].partition(";base64,")
    assert kind == "data:image/png"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def text_of(body) -> str:
    return "".join(part.get("text", "") for part in body["messages"][0]["content"])


def echo(body) -> Reply:
    return Reply(body=message(f" about {text_of(body)} {int(picture_of(body).sum())} "))


def ask(server, questions, *flags, program=model_vqa_loader):
    """Exit status and answers file of a run."""
    answers = questions.with_name("answers.jsonl")
    arguments = ["--server", server.url, "--question-file", str(questions), "--image-folder", str(questions.parent)]
    arguments += ["--answers-file", str(answers), "--temperature", "0", "--num_workers", "0", *flags]
    return main(program.parser(), arguments, getattr(program, "read", None)), answers


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_those_of_the_server_in_the_order_of_the_questions(questions):
    with FakeEndpoint(echo) as server:
        status, answers = ask(server, questions, "--concurrency", "3", "--max_new_tokens", "17")
    assert status == 0
    for number, row in enumerate(rows(answers)):
        pixels = np.asarray(Image.open(questions.with_name(f"{number % 3}.png")))
        assert row["text"] == f"about Question {number}? {int(pixels.sum())}"
        assert (row["question_id"], row["prompt"], row["model_id"]) == (number, f"Question {number}?", "tiny")
    assert all(body["temperature"] == 0 and body["max_tokens"] == 17 for body in server.chats())
    assert not any("seed" in body or "top_p" in body for body in server.chats())
    assert [len(body["messages"]) for body in server.chats()] == [1] * 9


def test_the_record_says_what_answered(questions):
    with FakeEndpoint(echo) as server:
        server.extra["/v1/apet"] = {"compression": {"visual_token_num": 64}}
        _, answers = ask(server, questions, "--limit", "2")
    record = json.loads(answers.with_suffix(".run.json").read_text())
    settings = record["settings"]
    assert settings["model_id"] == "tiny" and settings["served_model"]["max_model_len"] == 1024
    assert settings["server"] == {"compression": {"visual_token_num": 64}}
    assert settings["generation"] == {"temperature": 0.0, "max_tokens": 128}
    assert record["environment"]["device"] == f"server {server.url}"
    assert (record["counts"]["answers"], record["counts"]["new_tokens"]) == (2, 6)
    assert record["layer_averaged_tokens"] is None


def test_sampling_flags_reach_the_server(questions):
    with FakeEndpoint(echo) as server:
        ask(server, questions, "--limit", "1", "--temperature", "0.7", "--top_p", "0.9", "--seed", "5")
    (body,) = server.chats()
    assert (body["temperature"], body["top_p"], body["seed"]) == (0.7, 0.9, 5)


def test_a_failed_run_goes_on_where_it_stopped(questions, capsys):
    broken = Reply(400, {"error": {"message": "prompt too long"}})
    with FakeEndpoint(lambda body: broken if "6" in text_of(body) else echo(body)) as server:
        status, answers = ask(server, questions, "--concurrency", "1")
        assert status == 1 and "prompt too long" in capsys.readouterr().err
        assert [row["question_id"] for row in rows(answers)] == [0, 1, 2, 3]  # a batch is four times the concurrency
        server.answer_with(echo)
        asked = len(server.chats())
        assert ask(server, questions, "--concurrency", "1", "--resume")[0] == 0
    assert [row["question_id"] for row in rows(answers)] == list(range(9))
    assert [text_of(body) for body in server.chats()[asked:]] == [f"Question {n}?" for n in range(4, 9)]


def test_a_server_with_other_settings_does_not_continue_a_run(questions, capsys):
    with FakeEndpoint(echo) as server:
        server.extra["/v1/apet"] = {"compression": {"visual_token_num": 64}}
        ask(server, questions, "--limit", "2")
        server.extra["/v1/apet"] = {"compression": {"visual_token_num": 32}}
        status, _ = ask(server, questions, "--resume")
    assert status == 1 and "made with other settings (server" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--model-path", "x"], ["--dtype", "fp16"], ["--visual_token_num", "64"], ["--layer_list", "[2]"],
        ["--conv-mode", "vicuna_v1"], ["--num_beams", "2"], ["--batch_size", "4"], ["--load-8bit"],
    ],
)  # fmt: skip
def test_flags_that_a_server_would_not_hear_of_are_refused(questions, capsys, flags):
    with FakeEndpoint(echo) as server:
        status, _ = ask(server, questions, *flags)
    assert status == 1 and not server.requests
    error = capsys.readouterr().err
    assert flags[0].replace("-", "_") in error.replace("-", "_") and "scripts/serve.sh" in error


@pytest.mark.parametrize("named", ["../secret.png", "absolute", "link.png", "folder/link.png"])
def test_pictures_outside_the_folder_stay_here_unless_allowed(questions, tmp_path_factory, named):
    outside = tmp_path_factory.mktemp("outside")
    secret = outside / "secret.png"
    Image.new("RGB", (3, 3), "red").save(secret)
    images = questions.parent / "images"
    images.mkdir()
    (images / "link.png").symlink_to(secret)
    (images / "folder").symlink_to(outside)
    (outside / "link.png").symlink_to(secret)
    name = {"absolute": str(secret), "../secret.png": f"../../{outside.name}/secret.png"}.get(named, named)
    Image.new("RGB", (3, 3), "lime").save(images / "in.png")
    rows_ = [{"question_id": n, "image": image, "text": "?"} for n, image in enumerate((name, "in.png"))]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows_))
    with FakeEndpoint(echo) as server:
        status, answers = ask(server, questions, "--image-folder", str(images), "--on_error", "skip")
        (sent,) = server.chats()
        assert status == 0 and picture_of(sent)[0, 0].tolist() == [0, 255, 0]
        (failure,) = json.loads(answers.with_suffix(".run.json").read_text())["failures"]
        assert failure["question_id"] == 0 and "--allow-outside-pictures" in failure["error"]
        answers.unlink()
        status, answers = ask(server, questions, "--image-folder", str(images), "--allow-outside-pictures")
    assert status == 0 and len(rows(answers)) == 2


def test_a_linked_image_folder_is_the_folder(questions):
    """Data sets often lie elsewhere as a whole; and a folder may name itself in an absolute path."""
    link = questions.with_name("linked")
    link.symlink_to(questions.parent)
    row = {"question_id": 99, "image": str(questions.with_name("1.png")), "text": "Question?"}
    questions.write_text(questions.read_text() + json.dumps(row) + "\n")
    with FakeEndpoint(echo) as server:
        status, answers = ask(server, questions, "--image-folder", str(link))
    assert status == 0 and len(rows(answers)) == 10


def test_a_picture_is_sent_where_the_text_has_it(questions):
    texts = ["<image>\nA?", "Is <image> red?", "B?\n<image>"]
    rows_ = [{"question_id": n, "image": "0.png", "text": text} for n, text in enumerate(texts)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows_))
    with FakeEndpoint(echo) as server:
        status, answers = ask(server, questions, "--concurrency", "1")
    sent = [[part.get("text", "PICTURE") for part in body["messages"][0]["content"]] for body in server.chats()]
    assert status == 0
    assert sorted(sent) == [["B?", "PICTURE"], ["Is ", "PICTURE", " red?"], ["PICTURE", "A?"]]  # longest first
    assert [row["prompt"] for row in rows(answers)] == texts


def test_the_server_s_key_is_its_own(questions, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of OpenAI")
    with FakeEndpoint(echo) as server:
        assert ask(server, questions, "--limit", "1")[0] == 0
        assert not any("Authorization" in headers for _, headers, _ in server.requests)
        monkeypatch.setenv("APET_API_KEY", "of the server")
        (questions.with_name("answers.jsonl")).unlink()
        assert ask(server, questions, "--limit", "1")[0] == 0
    assert server.requests[-1][1]["Authorization"] == "Bearer of the server"


def test_an_unknown_model_and_a_bad_address_are_one_line(questions, capsys):
    with FakeEndpoint(echo) as server:
        assert ask(server, questions, "--server_model", "huge")[0] == 1
        assert "does not serve a model 'huge'" in capsys.readouterr().err
        server.url = "nowhere"
        assert ask(server, questions)[0] == 1
        assert "must look like http" in capsys.readouterr().err


def test_questions_without_a_picture_and_other_programs(tmp_path):
    science = [
        {"id": "1", "conversations": [{"from": "human", "value": "Which?\nA. x\nB. y"}, {"from": "gpt", "value": "A"}]}
    ]
    path = tmp_path / "problems.json"
    path.write_text(json.dumps(science))
    with FakeEndpoint(lambda body: Reply(body=message("B"))) as server:
        status, answers = ask(server, path, program=model_vqa_science)
        assert status == 0 and [row["text"] for row in rows(answers)] == ["B"]
        assert [part["type"] for part in server.chats()[0]["messages"][0]["content"]] == ["text"]
        buffer = io.BytesIO()
        Image.new("RGB", (3, 3), "red").save(buffer, "PNG")
        image = base64.b64encode(buffer.getvalue()).decode()
        table = tmp_path / "table.tsv"
        table.write_text(
            f"index\timage\tquestion\thint\tA\tB\tC\tD\tcategory\tanswer\n7\t{image}\tColour?\tnan\tred\tblue\tnan\tnan\tc\tA\n"
        )
        status, answers = ask(server, table, "--overwrite", program=model_vqa_mmbench)
    assert status == 0 and rows(answers)[0]["question_id"] == 7
    assert picture_of(server.chats()[-1]).tolist() == [[[255, 0, 0]] * 3] * 3
