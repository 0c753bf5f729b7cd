"""Questions about videos: reading, answer lines, scores by text and by a judge behind a scripted server."""

import json

import pytest
from fake_endpoint import FakeEndpoint, Reply, message

from apet.eval.benchmarks import get_benchmark
from apet.eval.endpoint import JUDGE_KEY_VARIABLE, KEY_VARIABLE, Endpoint
from apet.eval.judge import parse_verdict
from apet.eval.scorers import URL_VARIABLE
from llava.eval import eval_video_qa

ASKED = [{"video_name": f"clip{index}", "question": "who?", "question_id": index} for index in range(3)]
PREDICTIONS = [
    {"id": 0, "question": "who runs?", "answer": "dog", "pred": "A dog."},
    {"id": 1, "question": "who sits?", "answer": "two men", "pred": "There are two men here."},
    {"id": 2, "question": "what colour?", "answer": "red", "pred": "red"},
    {"id": "v_x-1/2", "question": "how many?", "answer": "3", "pred": "four"},
]
YES = '{"pred": "yes", "score": 5}'
NO = '{"pred": "no", "score": 1}'


# --- questions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["msvd", "msrvtt", "tgif", "activitynet"])
def test_questions_are_joined_with_answers_by_id(save, name):
    questions = save("test_q.json", ASKED)
    answers = save("test_a.json", [{"answer": str(index), "question_id": index} for index in (2, 0, 1, 9)])
    benchmark = get_benchmark(name)
    read = benchmark.read(questions, answers)
    prefix = "v_" if name == "activitynet" else ""
    assert [(one.question_id, one.video, one.prompt) for one in read] == [
        (index, f"{prefix}clip{index}", "who?") for index in range(3)
    ]
    line = benchmark.answer_line(read[1], "me", answer_id="x", model_id="y")
    assert list(line.items()) == [("id", 1), ("question", "who?"), ("answer", "1"), ("pred", "me")]


def test_answers_without_ids_are_joined_by_place(save):
    questions = save("test_q.json", ASKED)
    read = get_benchmark("msvd").read(questions, save("test_a.json", [{"answer": word} for word in "abc"]))
    assert [one.fields["answer"] for one in read] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("asked", "answers", "said"),
    [
        (ASKED, [{"answer": "a"}], "1 answers without question_id for the 3"),
        (ASKED, [{"answer": "a", "question_id": 0}], "no answer to 2 questions"),
        (ASKED, [{"answer": word, "question_id": 0} for word in "ab"], "entry 2: another answer for question_id 0"),
        (ASKED, [{"answer": "a", "question_id": 0}, {"answer": "b"}, {"answer": "c"}], "entry 2 has no question_id"),
        ([*ASKED, ASKED[0]], [{"answer": "a"}] * 4, "entry 4: question_id 0 is already that of entry 1"),
        ([], [{"answer": "a"}], "at least one"),
        ([{"question": "x"}], [{"answer": "a"}], "entry 1"),
        (ASKED, {"answer": "a"}, "JSON list"),
    ],
)
def test_files_that_do_not_fit_are_refused(save, asked, answers, said):
    with pytest.raises(ValueError, match=said):
        get_benchmark("msvd").read(save("test_q.json", asked), save("test_a.json", answers))


# --- scores by text ---------------------------------------------------------------------------------------------------


def test_score_by_text(save, command, tmp_path):
    path, target = save("merge.jsonl", PREDICTIONS), tmp_path / "results.json"
    status, out, _ = command(eval_video_qa.main, "--pred_path", path, "--output_json", target)
    assert status == 0 and "Samples: 4" in out and "Normalised accuracy: 50.00%" in out and "Exact match: 25.00%" in out
    assert "contained in prediction: 75.00%" in out
    score = json.loads(target.read_text())
    assert (score["name"], score["metric"], score["value"]) == ("msvd", "normalised accuracy", 50.0)
    assert score["per_sample"] == {"0": 1.0, "1": 0.0, "2": 1.0, "v_x-1/2": 0.0}


def test_an_incomplete_run_is_not_scored_and_unread_videos_are_said(save, command):
    path = save("merge.jsonl", PREDICTIONS)
    for questions, failures, status in ((4, [], "running"), (6, [{}], "complete")):
        save("merge.run.json", {"questions": questions, "failures": failures, "status": status})
        code, _, err = command(eval_video_qa.main, "--pred_path", path)
        assert code == 1 and f"4 of {questions} answers" in err
    save("merge.run.json", {"questions": 5, "failures": [{}], "status": "complete"})
    status, out, _ = command(eval_video_qa.main, "--pred_path", path)
    assert status == 0 and "Not counted: 1 questions whose video cannot be read" in out


@pytest.mark.parametrize("content", ["", '{"id": 1}\n', '{"id"', 2 * (json.dumps(PREDICTIONS[0]) + "\n")])
def test_broken_predictions_are_refused(save, command, content):
    status, _, err = command(eval_video_qa.main, "--pred_path", save("merge.jsonl", content))
    assert status == 1 and "merge.jsonl" in err and "Traceback" not in err


# --- scores by a judge ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (YES, ("yes", 5)),
        ("```json\n" + NO + "\n```", ("no", 1)),
        ('{"pred": "Yes", "score": 4.8}', ("yes", 4)),
        ('{"pred": "maybe", "score": 3}', None),
        ('{"pred": "yes", "score": 9}', None),
        ('{"pred": "yes"}', None),
        ("yes", None),
        ("", None),
        ("{", None),
    ],
)
def test_replies(text, verdict):
    found = parse_verdict(text)
    assert (None if found is None else (found["pred"], found["score"])) == verdict


@pytest.fixture
def ask_judge(save, command, tmp_path):
    """`ask_judge(server)` -> (status, stdout, stderr) of the scorer."""
    path = save("merge.jsonl", PREDICTIONS)

    def ask(server: FakeEndpoint, *flags: str):
        return command(
            eval_video_qa.main, "--pred_path", path, "--output_dir", tmp_path / "judged", "--output_json",
            tmp_path / "results.json", "--judge", "tiny", "--api_base", server.url, *flags,
        )  # fmt: skip

    return ask


def by_prediction(body: dict) -> Reply:
    """A judge that accepts what holds the reference answer."""
    lines = dict(line.split(": ", 1) for line in body["messages"][1]["content"].splitlines()[:3])
    reference, given = lines["Reference answer"], lines["Candidate answer"]
    return Reply(body=message(YES if reference in given.lower() else NO))


def test_score_by_judge(ask_judge, tmp_path, monkeypatch):
    monkeypatch.setenv(JUDGE_KEY_VARIABLE, "secret")
    monkeypatch.setenv(KEY_VARIABLE, "of another server")
    with FakeEndpoint(by_prediction) as server:
        status, out, _ = ask_judge(server, "--num_tasks", "2")
    assert status == 0 and "Yes count: 3\nNo count: 1\nAccuracy: 75.00%\nAverage score: 4.000" in out
    assert server.busiest <= 2 and all(body["temperature"] == 0 for body in server.chats())
    assert all(headers["Authorization"] == "Bearer secret" for path, headers, _ in server.requests)
    score = json.loads((tmp_path / "results.json").read_text())
    assert score["metric"] == "accuracy by judge tiny" and score["details"]["judge"] == "tiny"
    assert score["details"]["prompt_version"] and score["details"]["served_models"] == ["tiny"]
    assert "secret" not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    verdict, pair = json.loads((tmp_path / "judged/0.json").read_text())
    assert (verdict["pred"], pair) == ("yes", {"q": "who runs?", "a": "dog", "pred": "A dog."})


def test_judgements_are_kept_and_changed_predictions_judged_again(ask_judge, save, tmp_path):
    with FakeEndpoint(by_prediction) as server:
        assert ask_judge(server)[0] == 0 and ask_judge(server)[0] == 0
        assert len(server.chats()) == 4
        save("merge.jsonl", [*PREDICTIONS[:3], PREDICTIONS[3] | {"pred": "3"}])
        assert "Accuracy: 100.00%" in ask_judge(server)[1]
        assert len(server.chats()) == 5
        (tmp_path / "judged/1.json").unlink()
        assert ask_judge(server)[0] == 0 and len(server.chats()) == 6
        server.models.append({"id": "other"})
        assert ask_judge(server, "--judge", "other")[0] == 0 and len(server.chats()) == 10


def test_a_failing_judge_leaves_what_it_said(ask_judge, tmp_path):
    said = []

    def refuse_later(body: dict) -> Reply:
        said.append(body)
        return Reply(body=message(YES)) if len(said) < 3 else Reply(401, {"error": {"message": "no more"}})

    with FakeEndpoint(refuse_later) as server:
        status, _, err = ask_judge(server, "--num_tasks", "1")
        assert status == 1 and "no more" in err and "Traceback" not in err
        assert len(list((tmp_path / "judged").glob("*.json"))) == 2 and not (tmp_path / "results.json").exists()
    with FakeEndpoint(by_prediction) as server:
        assert ask_judge(server)[0] == 0 and len(server.chats()) == 2


def test_a_refused_request_costs_only_its_answer(ask_judge, tmp_path):
    def filtered(body: dict) -> Reply:
        refused = "four" in body["messages"][1]["content"]
        return Reply(400, {"error": {"message": "filtered"}}) if refused else by_prediction(body)

    with FakeEndpoint(filtered) as server:
        status, out, _ = ask_judge(server)
        assert (
            status == 0 and "Accuracy: 100.00%" in out and "0 replies that are no judgement, 1 refused requests" in out
        )
        assert json.loads((tmp_path / "results.json").read_text())["details"]["without_judgement"] == ["v_x-1/2"]
        assert ask_judge(server)[0] == 0 and len(server.chats()) == 4 + 1
    with FakeEndpoint(lambda body: Reply(400, {"error": {"message": "no such field"}})) as server:
        status, _, err = ask_judge(server, "--output_dir", str(tmp_path / "anew"))
    assert status == 1 and "no such field" in err


def test_a_busy_judge_is_asked_again(ask_judge, monkeypatch):
    monkeypatch.setattr(Endpoint, "first_wait", 0.0)
    busy = [Reply(503, {"error": "busy"}, {"Retry-After": "0"})]

    def answer(body: dict) -> Reply:
        return busy.pop() if busy else by_prediction(body)

    with FakeEndpoint(answer) as server:
        assert "Accuracy: 75.00%" in ask_judge(server)[1]


def test_replies_that_are_no_judgement_are_not_counted_and_asked_again(ask_judge, tmp_path):
    def answer(body: dict) -> Reply:
        unclear = "four" in body["messages"][1]["content"]
        return Reply(body=message("I cannot say.")) if unclear else by_prediction(body)

    with FakeEndpoint(answer) as server:
        status, out, _ = ask_judge(server)
        assert status == 0 and "Accuracy: 100.00%" in out and "Not counted: 1 replies" in out
        assert len(server.chats()) == 3 + 3
        ask_judge(server)
        assert len(server.chats()) == 3 + 3 + 3
    with FakeEndpoint(lambda body: Reply(body=message("What?"))) as server:
        status, _, err = ask_judge(server, "--output_dir", str(tmp_path / "anew"))
    assert status == 1 and "no usable judgement" in err


def test_flags_that_are_missing_are_named(save, command, monkeypatch):
    path = save("merge.jsonl", PREDICTIONS)
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    status, _, err = command(eval_video_qa.main, "--pred_path", path, "--judge", "tiny")
    assert status == 1 and "--output_dir" in err and "OPENAI_BASE_URL" in err
    status, _, err = command(eval_video_qa.main, "--pred_path", path, "--benchmark", "gqa")
    assert status == 1 and "about images" in err
