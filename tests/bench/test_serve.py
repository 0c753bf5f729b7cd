"""The serving benchmark against chat servers on localhost."""

import json

import pytest
from fake_endpoint import FakeEndpoint, Reply, streamed

from apet.bench import serve
from apet.bench.__main__ import main, parser
from apet.eval.endpoint import KEY_VARIABLE, Completion

QUICK = ["--concurrency", "1,3", "--requests", "4", "--size", "32x24", "--max_tokens", "2", "--pictures", "2"]


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def answering(prompt_tokens, cached=None):
    """Streams two tokens; counts as told."""

    def answer(body):
        events = streamed(["a", "b"])
        events[-2]["usage"]["prompt_tokens"] = prompt_tokens
        if cached is not None:
            events[-2]["usage"]["prompt_tokens_details"] = {"cached_tokens": cached}
        return Reply(events=events)

    return answer


def measured(*flags):
    return serve.run(parser("serve").parse_args([*QUICK, *flags]))


def pictures(bodies):
    return [body["messages"][0]["content"][0]["image_url"]["url"] for body in bodies]


def test_every_case_is_measured_with_its_own_pictures_and_fixed_answers():
    with FakeEndpoint(answering(80, 20)) as server:
        result = measured("--server", server.url)
        bodies, busiest = server.chats(), server.busiest
    (only,) = result["servers"]
    cases = [(one["images"], one["concurrency"], one["requests"]) for one in only["figures"]]
    assert cases == [("distinct", 1, 4), ("distinct", 3, 4), ("repeated", 1, 4), ("repeated", 3, 4)]
    assert all(one["prompt_tokens"] == 80 and one["cached"] == 0.25 for one in only["figures"])
    assert all(one["first_token_ms_p99"] >= one["first_token_ms"] > 9 for one in only["figures"])  # it waits 10 ms
    for one in only["figures"]:
        assert one["tokens_per_second"] == pytest.approx(2 * one["requests_per_second"])
    warm = (1 + 4) + (3 + 4)
    assert len(set(pictures(bodies[:warm]))) == warm and len(set(pictures(bodies[warm:]))) == 2 * 2
    assert len(bodies) == warm + (2 + 4) + (3 + 4)  # every repeated picture is shown before the clock starts
    assert len({body["messages"][0]["content"][1]["text"] for body in bodies[warm : warm + 5]}) == 5
    assert all(body["max_tokens"] == 2 and body["ignore_eos"] and body["stream"] for body in bodies)
    assert busiest <= 3


def test_pictures_are_new_each_time_unless_a_seed_is_given():
    seen = []
    for flags in ([], [], ["--seed", "3"], ["--seed", "3"]):
        with FakeEndpoint(answering(80)) as server:
            measured("--server", server.url, *flags)
            seen.append(sorted(pictures(server.chats())))
    assert not set(seen[0]) & set(seen[1]) and seen[2] == seen[3]


def test_a_baseline_stands_beside_and_gains_are_its_ratio(capsys, tmp_path):
    with FakeEndpoint(answering(80)) as ours, FakeEndpoint(answering(592)) as base:
        ours.extra["/v1/apet"] = {"compression": {"visual_token_num": 64}}
        file = tmp_path / "none.json"
        assert main(["serve", *QUICK, "--server", base.url, "--json", str(file)]) == 0
        capsys.readouterr()
        for baseline in (base.url, str(file)):
            assert main(["serve", *QUICK, "--server", ours.url, "--baseline", baseline]) == 0
            printed = capsys.readouterr().out
            result = json.loads(printed.splitlines()[-1])
            assert [one["settings"] for one in result["servers"]] == [{"compression": {"visual_token_num": 64}}, None]
            (shown,) = result["tables"]
            assert "80.0 / 592" in printed and "? / ?" in printed
            for row, first, second in zip(shown["rows"], *(one["figures"] for one in result["servers"]), strict=True):
                assert row[-2] == pytest.approx(first["requests_per_second"] / second["requests_per_second"])
                assert row[-1] == pytest.approx(second["first_token_ms"] / first["first_token_ms"])
        assert main(["serve", *QUICK, "--server", ours.url, "--baseline", str(file), "--max_tokens", "9"]) == 1
        assert "measured with max_tokens 2, this run has 9" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "says"), [
    (["--concurrency", "1,x"], "--concurrency 1,x must be positive"), (["--size", "640"], "--size 640 must be"),
    (["--requests", "0"], "--requests 0 must be"), (["--pictures", "-1"], "--pictures -1 must be"),
])  # fmt: skip
def test_flags_that_cannot_be_are_refused_before_anything_is_asked(flags, says):
    with FakeEndpoint(answering(80)) as server:
        with pytest.raises(ValueError, match=says):
            measured("--server", server.url, *flags)
        assert not server.requests


def test_a_failing_server_and_a_foreign_baseline_are_one_line(capsys, tmp_path):
    (tmp_path / "other.json").write_text("[]")
    with FakeEndpoint(lambda body: Reply(503, {"error": "overloaded"})) as server:
        assert main(["serve", *QUICK, "--server", server.url]) == 1
        assert "overloaded" in capsys.readouterr().err and len(server.chats()) == 1
        assert main(["serve", *QUICK, "--server", server.url, "--baseline", str(tmp_path / "other.json")]) == 1
        assert "is no file of" in capsys.readouterr().err


def test_answers_without_text_or_counts_are_no_measurement():
    whole = {
        "text": "x",
        "prompt_tokens": 5,
        "completion_tokens": 1,
        "finish_reason": "stop",
        "model": "m",
        "seconds": 1.0,
    }
    good = Completion(**whole, first_token_seconds=0.5)
    assert serve._figure("distinct", 1, [good, good], 2.0).requests_per_second == 1.0
    for missing in ({"first_token_seconds": None}, {"completion_tokens": None}, {"prompt_tokens": None}):
        with pytest.raises(ValueError, match="without text or token counts"):
            serve._figure("distinct", 1, [good, Completion(**{**whole, "first_token_seconds": 0.5, **missing})], 2.0)
