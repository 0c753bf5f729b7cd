"""The helpers LLaVA scripts import."""

import asyncio
import io
import logging
import sys
import urllib.error
import urllib.request

import pytest

from llava import utils


@pytest.fixture
def records():
    """A logger of its own and the (level, message) pairs it got."""
    seen = []
    logger = logging.Logger("test")
    handler = logging.Handler()
    handler.emit = lambda record: seen.append((record.levelname, record.getMessage()))
    logger.addHandler(handler)
    return logger, seen


def test_stream_to_logger(records):
    logger, seen = records
    stream = utils.StreamToLogger(logger, logging.ERROR)
    print("one\ntw", end="", file=stream)
    assert seen == [("ERROR", "one")]
    print("o", file=stream)
    stream.write("rest")
    stream.flush()
    stream.flush()
    assert seen == [("ERROR", "one"), ("ERROR", "two"), ("ERROR", "rest")]


def test_build_logger(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "LOGDIR", str(tmp_path / "logs"))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    logger = utils.build_logger("llava-test", "worker.log")
    assert utils.build_logger("llava-test", "worker.log", redirect=True) is logger
    assert len(logger.handlers) == 2
    logger.info("ready")
    print("printed")
    lines = (tmp_path / "logs/worker.log").read_text().splitlines()
    assert [line.split(" | ", 1)[1] for line in lines] == ["INFO | llava-test | ready", "INFO | stdout | printed"]
    for handler in logger.handlers:
        handler.close()


@pytest.mark.parametrize("flagged", [True, False])
def test_moderation(flagged, monkeypatch):
    asked = []

    def answer(request, timeout):
        asked.append(request.data)
        return io.BytesIO(b'{"results": [{"flagged": %s}]}' % str(flagged).lower().encode())

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    assert utils.violates_moderation("two\nlines") is flagged
    assert asked == [b'{"input": "twolines"}']


def test_moderation_out_of_reach(monkeypatch, caplog):
    def fail(request, timeout):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    assert utils.violates_moderation("text") is False
    assert "no route" in caplog.text


def test_small_things():
    utils.disable_torch_init()
    assert utils.pretty_print_semaphore(None) == "None"
    assert utils.pretty_print_semaphore(asyncio.Semaphore(3)) == "Semaphore(value=3, locked=False)"
