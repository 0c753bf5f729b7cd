"""The chat client against a server on localhost: what it sends, what it repeats, what it refuses."""

import itertools
import json
import os
import subprocess
import sys
import threading

import pytest
from fake_endpoint import FakeEndpoint, Reply, message, streamed

from apet.eval.endpoint import JUDGE_KEY_VARIABLE, KEY_VARIABLE, Endpoint, EndpointError

ASK = [{"role": "user", "content": "What?"}]


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def scripted(*replies):
    """An answer function that gives these replies in turn, then the last again."""
    rest = itertools.chain(replies, itertools.repeat(replies[-1]))
    lock = threading.Lock()

    def answer(body):
        with lock:
            return next(rest)

    return answer


def endpoint(server, **fields):
    return Endpoint(server.url, **{"first_wait": 0.001, "timeout": 5, **fields})


def test_sends_messages_and_options_and_reads_text_and_usage():
    with FakeEndpoint(scripted(Reply(body=message("blue")))) as server:
        answer = endpoint(server).complete(ASK, model="tiny", temperature=0, max_tokens=9)
    assert server.chats() == [{"model": "tiny", "messages": ASK, "temperature": 0, "max_tokens": 9}]
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == ("blue", 7, 3)
    assert (answer.finish_reason, answer.model, answer.attempts) == ("stop", "tiny", 1)
    assert answer.seconds > 0 and answer.first_token_seconds is None


def test_an_answer_without_text_or_usage_is_empty_text():
    body = {"choices": [{"message": {"role": "assistant", "content": None}, "finish_reason": "length"}]}
    with FakeEndpoint(scripted(Reply(body=body))) as server:
        answer = endpoint(server).complete(ASK, model="tiny")
    assert (answer.text, answer.prompt_tokens, answer.model, answer.finish_reason) == ("", None, None, "length")


def test_streaming_joins_the_pieces_and_times_the_first_with_text():
    with FakeEndpoint(scripted(Reply(events=streamed(["dark", " ", "blue"])))) as server:
        answer = endpoint(server).complete(ASK, model="tiny", stream=True)
    assert server.chats()[0]["stream"] is True and server.chats()[0]["stream_options"] == {"include_usage": True}
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == ("dark blue", 7, 3)
    # The server pauses 0.01 s after each event: one with the role precedes the first text, four follow it.
    assert 0.01 <= answer.first_token_seconds < answer.seconds - 0.02


def test_a_stream_of_no_text_has_no_first_token():
    with FakeEndpoint(scripted(Reply(events=streamed([])))) as server:
        answer = endpoint(server).complete(ASK, model="tiny", stream=True)
    assert (answer.text, answer.first_token_seconds) == ("", None)


TRANSIENT = {
    "busy": Reply(503, {"error": {"message": "warming up"}}),
    "too many": Reply(429, {"error": "slow down"}),
    "server error": Reply(500, b"<html>oops</html>"),
    "cut off": Reply(body=message("blue"), drop=20),
    "silent": Reply(body=message("late"), wait=1.0),
}


@pytest.mark.parametrize("reply", TRANSIENT.values(), ids=TRANSIENT)
def test_transient_failures_are_repeated(reply):
    with FakeEndpoint(scripted(reply, reply, Reply(body=message("blue")))) as server:
        answer = endpoint(server, timeout=0.3).complete(ASK, model="tiny")
    assert (answer.text, answer.attempts, len(server.chats())) == ("blue", 3, 3)


STREAM_FAILURES = {
    "cut off": streamed(["dark", "blue"])[:2],
    "error inside": [streamed(["x"])[0], {"error": {"message": "out of memory", "code": 500}}],
}


@pytest.mark.parametrize("events", STREAM_FAILURES.values(), ids=STREAM_FAILURES)
def test_broken_streams_are_repeated_from_the_start(events):
    with FakeEndpoint(scripted(Reply(events=events), Reply(events=streamed(["dark", " blue"])))) as server:
        answer = endpoint(server).complete(ASK, model="tiny", stream=True)
    assert (answer.text, answer.attempts) == ("dark blue", 2)


def test_gives_up_after_the_last_attempt_with_the_servers_words():
    with FakeEndpoint(scripted(TRANSIENT["busy"])) as server, pytest.raises(EndpointError) as caught:
        endpoint(server, attempts=3).complete(ASK, model="tiny")
    assert len(server.chats()) == 3 and caught.value.status == 503
    assert "3 attempts" in str(caught.value) and "warming up" in str(caught.value)


def test_no_server_is_an_error_that_names_the_url():
    with FakeEndpoint(scripted(Reply(body=message("x")))) as server:
        gone = endpoint(server, attempts=2)
    with pytest.raises(EndpointError, match=rf"{gone.url} failed after 2 attempts: no connection"):
        gone.models()


def test_waits_as_long_as_the_server_asks(monkeypatch):
    waits = []
    monkeypatch.setattr("apet.eval.endpoint.time.sleep", waits.append)
    late = Reply(429, {"error": "later"}, {"Retry-After": "17"})
    with FakeEndpoint(scripted(late, TRANSIENT["busy"], TRANSIENT["busy"], Reply(body=message("x")))) as server:
        endpoint(server, first_wait=2.0).complete(ASK, model="tiny")
    waits = [wait for wait in waits if wait]  # the server's own sleeps are of length 0
    assert waits[0] == 17 and 2 <= waits[1] <= 4 and 4 <= waits[2] <= 8


REFUSALS = {
    "bad request": (
        Reply(400, {"error": {"message": "max_tokens is too large"}}),
        "status 400: max_tokens is too larg",
    ),
    "no model": (Reply(404, {"message": "no such model"}), "status 404: no such model"),
    "no key": (Reply(401, {"error": "who are you"}), f"who are you.*{KEY_VARIABLE}, which is not set"),
    "redirect": (Reply(307, b"", {"Location": "http://example.org/"}), "redirects to http://example.org/"),
    "no json": (Reply(200, b"<html>hello</html>"), "not JSON: <html>hello</html>.*/v1"),
    "no choices": (Reply(200, {"choices": []}), "without a message"),
}


@pytest.mark.parametrize(("reply", "says"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_are_not_repeated(reply, says):
    with FakeEndpoint(scripted(reply)) as server, pytest.raises(EndpointError, match=says):
        endpoint(server).complete(ASK, model="tiny")
    assert len(server.chats()) == 1


def test_the_key_comes_from_the_environment_and_shows_nowhere(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret-1")
    monkeypatch.setenv("JUDGE_KEY", "secret-2")
    with FakeEndpoint(scripted(Reply(401, {"error": "wrong key"}))) as server:
        for fields in ({}, {"key_variable": "JUDGE_KEY"}):
            client = endpoint(server, **fields)
            with pytest.raises(EndpointError) as caught:
                client.complete(ASK, model="tiny")
            assert "is set" in str(caught.value) and "secret" not in str(caught.value) + repr(client)
    assert [headers["Authorization"] for _, headers, _ in server.requests] == ["Bearer secret-1", "Bearer secret-2"]


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1:8000", "http://host/v1", "http://127.0.0.1.example.org", "http://127.1"]
)
def test_a_key_never_leaves_this_machine_unencrypted(monkeypatch, url):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    opened = []
    monkeypatch.setattr("urllib.request.OpenerDirector.open", lambda *args, **kwargs: opened.append(args))
    with pytest.raises(EndpointError, match=f"the key in {KEY_VARIABLE} would travel unencrypted to {url}") as caught:
        Endpoint(url, attempts=1).models()
    assert opened == [] and "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["https://host/v1", "http://localhost:1", "http://127.0.0.9:1", "http://[::1]:1"])
def test_a_key_is_sent_over_https_and_to_this_machine(monkeypatch, url):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    sent = []

    def opened(self, request, **_):
        sent.append(request.get_header("Authorization"))
        raise TimeoutError

    monkeypatch.setattr("urllib.request.OpenerDirector.open", opened)
    with pytest.raises(EndpointError, match="no answer"):
        Endpoint(url, attempts=1).models()
    assert sent == ["Bearer secret"]


def test_openai_s_key_goes_to_nobody_who_was_not_named_for_it(monkeypatch):
    monkeypatch.setenv(JUDGE_KEY_VARIABLE, "secret")
    with FakeEndpoint(scripted(Reply(body=message("x")))) as server:
        endpoint(server).complete(ASK, model="tiny")
        endpoint(server, key_variable=JUDGE_KEY_VARIABLE).complete(ASK, model="tiny")
    assert [headers.get("Authorization") for _, headers, _ in server.requests] == [None, "Bearer secret"]


def test_requests_to_this_machine_take_no_proxy():
    """A proxy would read the key, and knows another localhost. Openers read the environment when they are made."""
    code = "import sys; from apet.eval.endpoint import Endpoint; print(Endpoint(sys.argv[1]).model_id())"
    with FakeEndpoint(scripted(Reply(body=message("x")))) as proxy, FakeEndpoint(echo) as server:
        proxies = {"http_proxy": proxy.url.removesuffix("/v1"), KEY_VARIABLE: "secret", "no_proxy": ""}
        command = [sys.executable, "-c", code, server.url]
        done = subprocess.run(command, env=os.environ | proxies, capture_output=True, text=True, timeout=120)
        assert done.stdout == "tiny\n" and proxy.requests == []
        assert server.requests[0][1]["Authorization"] == "Bearer secret"


def test_no_key_sends_no_header():
    with FakeEndpoint(scripted(Reply(body=message("x")))) as server:
        endpoint(server).complete(ASK, model="tiny")
    assert "Authorization" not in server.requests[0][1]


def test_nothing_about_the_user_or_the_machine_is_sent(monkeypatch):
    """What OpenAI's own client would send, to whichever server."""
    for name, value in (("ORG_ID", "org"), ("PROJECT_ID", "project"), ("CUSTOM_HEADERS", "X-Team: secret")):
        monkeypatch.setenv(f"OPENAI_{name}", value)
    with FakeEndpoint(scripted(Reply(body=message("x")))) as server:
        endpoint(server).complete(ASK, model="tiny")
    technical = {"Accept", "Accept-Encoding", "Connection", "Content-Length", "Content-Type", "Host", "User-Agent"}
    assert set(server.requests[0][1]) == technical


def test_a_key_that_no_header_can_hold_is_refused(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "two\nlines")
    with pytest.raises(EndpointError, match=f"the key in {KEY_VARIABLE} has characters"):
        Endpoint("http://127.0.0.1:9").complete(ASK, model="tiny")


def echo(body):
    """Answers with the question; even numbers take longer, so that answers overtake each other."""
    text = body["messages"][0]["content"]
    return Reply(body=message(text), wait=0.02 if int(text) % 2 == 0 else 0.0)


def conversations(count):
    return ([{"role": "user", "content": str(index)}] for index in range(count))


@pytest.mark.parametrize("concurrency", [1, 3])
def test_many_answers_come_in_order_within_the_limit(concurrency):
    with FakeEndpoint(echo) as server:
        answers = list(endpoint(server, concurrency=concurrency).complete_all(conversations(12), model="tiny"))
    assert [one.text for one in answers] == [str(index) for index in range(12)]
    assert server.busiest == concurrency


def test_many_answers_stop_at_a_refusal_and_keep_those_before():
    def answer(body):
        text = body["messages"][0]["content"]
        return Reply(400, {"error": "no"}) if text == "4" else Reply(body=message(text))

    got = []
    with FakeEndpoint(answer) as server, pytest.raises(EndpointError, match="refused"):
        for one in endpoint(server, concurrency=2).complete_all(conversations(100), model="tiny"):
            got.append(one.text)
    assert got == ["0", "1", "2", "3"] and len(server.chats()) <= 4 + 1 + 2 * 2


def test_conversations_are_read_only_as_far_as_needed():
    read = []
    with FakeEndpoint(echo) as server:
        source = (read.append(index) or one for index, one in enumerate(conversations(100)))
        answers = endpoint(server, concurrency=2).complete_all(source, model="tiny")
        assert next(answers).text == "0"
        answers.close()
    assert len(read) <= 4


def test_models_and_the_one_to_ask_for():
    with FakeEndpoint(echo) as server:
        client = endpoint(server)
        assert client.models() == server.models and client.model_id() == client.model_id("tiny") == "tiny"
        with pytest.raises(EndpointError, match="does not serve a model 'huge'; it serves: tiny"):
            client.model_id("huge")
        server.models = [{"id": "a"}, {"id": "b"}]
        with pytest.raises(EndpointError, match="serves 2 models, name one of them: a, b"):
            client.model_id()
        server.models = ["a"]
        with pytest.raises(EndpointError, match="OpenAI-compatible"):
            client.models()
        with pytest.raises(EndpointError, match="status 404: Not Found"):
            client.get("/elsewhere")


def test_a_url_without_a_path_gets_v1():
    assert Endpoint("http://host:8000").url == Endpoint("http://host:8000/").url == "http://host:8000/v1"
    assert Endpoint("https://host/api/v3/").url == "https://host/api/v3"


BAD = [
    ({"url": "localhost:8000"}, "must look like http"),
    ({"url": "http://me:pw@host/v1"}, "environment variable"),
    ({"url": "http://host/v1?key=1"}, "environment variable"),
    ({"concurrency": 0}, "concurrency=0 must be at least 1"),
    ({"attempts": 0}, "attempts=0 must be at least 1"),
    ({"timeout": 0}, "timeout=0 must be positive"),
    ({"timeout": float("nan")}, "timeout=nan must be positive"),
    ({"first_wait": float("inf")}, "first_wait=inf not negative, both finite"),
    ({"url": "http://me:pw@host:99999"}, "a user name or password in it must look like http"),
    ({"url": "http://[::1"}, "must look like http"),
    ({"url": "http://host:port"}, "must look like http"),
    ({"url": "http://ho st"}, "must look like http"),
]


@pytest.mark.parametrize(("fields", "says"), BAD, ids=[json.dumps(fields) for fields, _ in BAD])
def test_bad_settings_are_refused(fields, says):
    with pytest.raises(ValueError, match=says) as caught:
        Endpoint(**{"url": "http://host", **fields})
    assert "pw" not in str(caught.value) and "key=1" not in str(caught.value)
